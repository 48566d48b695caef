//! What becomes of requests for which the medium has no space left.
//!
//! ```text
//!           no space                      served, failed otherwise, or given up
//! served ─────────────▶ held ─▶ tried again ─────────────────────────────────▶ ended
//!                        ▲           │ still no space
//!                        └───────────┘
//! ```
//!
//! A held request has not taken effect, keeps no view of the stack, and holds up nothing: it is served again, from the newest view, after a
//! second or when somebody says that there is space ([`Space::resume`]). It counts as held until it has ended.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::runtime::WaitQueue;

/// How long a held request waits before it is tried again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Least time between two reports of failed requests.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// That a device has no space, for those who watch it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Whether the request waits, or has failed.
    pub is_held: bool,
    /// What the medium said.
    pub reason: String,
}

/// The requests of one device that wait for space.
#[derive(Default)]
pub struct Space {
    policy: NoSpacePolicy,
    held: AtomicUsize,
    /// Whether it has been told since there was space last, or since the last call to go on.
    is_told: AtomicBool,
    /// When the last failed request was told about.
    told_at: Mutex<Option<Duration>>,
    resumptions: AtomicU64,
    resumed: WaitQueue,
    listener: OnceLock<Box<dyn Fn(Shortage) + Send + Sync>>,
}

impl Space {
    /// Of a device with this policy.
    pub fn new(policy: NoSpacePolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// What the operator has decided.
    pub fn policy(&self) -> NoSpacePolicy {
        self.policy
    }

    /// Tells `listener` of shortages, from queue threads: it must not block. The first call counts.
    pub fn report_to(&self, listener: impl Fn(Shortage) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// Requests that wait for space.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    /// Lets held requests be tried at once. If there is no space for them even now, that is told again.
    pub fn resume(&self) {
        self.is_told.store(false, Ordering::Release);
        self.resumptions.fetch_add(1, Ordering::AcqRel);
        self.resumed.notify_all();
    }

    /// How often somebody has called to go on. To be asked before a request is tried, so that no call is missed by those that fail.
    pub(crate) fn resumptions(&self) -> u64 {
        self.resumptions.load(Ordering::Acquire)
    }

    /// Ends when somebody has called to go on since there were `before` calls.
    pub(crate) async fn resumed_since(&self, before: u64) {
        self.resumed.wait_until(|| (self.resumptions() != before).then_some(())).await;
    }

    /// A request is held from now on, until what this returns is dropped.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.held.fetch_add(1, Ordering::AcqRel);
        Held { space: self }
    }

    /// A request has failed for want of space.
    pub(crate) fn note_failed(&self, error: &LayerError, now: Duration) {
        {
            let mut told_at = self.told_at.lock().unwrap_or_else(PoisonError::into_inner);
            if told_at.is_some_and(|before| now.saturating_sub(before) < REPORT_PAUSE) {
                return;
            }
            *told_at = Some(now);
        }
        self.tell(Shortage { is_held: false, reason: error.to_string() });
    }

    fn tell(&self, shortage: Shortage) {
        if let Some(listener) = self.listener.get() {
            listener(shortage);
        }
    }
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Space({:?}, {} held)", self.policy, self.held())
    }
}

/// A request that is held.
#[derive(Debug)]
#[must_use = "it is held for as long as this lives"]
pub(crate) struct Held<'a> {
    space: &'a Space,
}

impl Held<'_> {
    /// There was no space when it was tried. Told once for all that wait.
    pub(crate) fn note_refused(&self, error: &LayerError) {
        if !self.space.is_told.swap(true, Ordering::AcqRel) {
            self.space.tell(Shortage { is_held: true, reason: error.to_string() });
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.space.held.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.space.is_told.store(false, Ordering::Release);
        }
    }
}

//! One disk as guests see it, whoever is connected to it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::Environment;
use tracing::warn;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::space::Space;
use crate::vring::Limits;
use crate::vring::request::ID_BYTES;

/// Most queues of a device: what a vhost-user message can number.
pub const MAX_QUEUES: u16 = 256;
/// Largest size of a queue: QEMU takes no larger one either.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What the operator decides about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// What people call it.
    pub name: String,
    /// What the guest can ask for by `GET_ID`: at most 20 bytes.
    pub serial: String,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Number of virtqueues offered, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Largest queue size that is accepted, a power of two up to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What becomes of requests for which the medium has no space.
    pub on_no_space: NoSpacePolicy,
}

/// Why a device cannot be as the operator wants it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Too long.
    #[error("serial {0:?} is longer than {ID_BYTES} bytes")]
    Serial(String),
    /// None, or too many.
    #[error("{0} queues: must be 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// A size that no ring can have.
    #[error("queue size {0}: must be a power of two, 2 to {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
}

/// A disk that is served. Shared by its connection and its queues.
#[derive(Debug)]
pub struct Device<E: Environment> {
    options: DeviceOptions,
    serial: [u8; ID_BYTES],
    stack: Arc<Stack<E>>,
    cache: WriteCache,
    stragglers: Arc<Stragglers>,
    space: Space,
    failures: AtomicU64,
}

/// Requests that were given up while they were in flight, as on a disk that does not answer. They may still write, or read into guest memory, so
/// nothing is taken from any queue of the device before they have ended.
#[derive(Debug, Default)]
pub struct Stragglers {
    count: AtomicUsize,
    gone: WaitQueue,
}

impl Stragglers {
    /// So many more have been given up.
    pub fn add(&self, count: usize) {
        self.count.fetch_add(count, Ordering::AcqRel);
    }

    /// One of them has ended.
    pub fn remove(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.gone.notify_all();
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Ends when there are none.
    pub async fn gone(&self) {
        self.gone.wait_until(|| (self.count() == 0).then_some(())).await;
    }
}

impl<E: Environment> Device<E> {
    /// A device over `stack`.
    ///
    /// # Errors
    /// If the options contradict what virtio-blk can do.
    pub fn new(options: DeviceOptions, stack: Arc<Stack<E>>) -> Result<Arc<Self>, DeviceError> {
        let bytes = options.serial.as_bytes();
        let mut serial = [0; ID_BYTES];
        serial.get_mut(..bytes.len()).ok_or_else(|| DeviceError::Serial(options.serial.clone()))?.copy_from_slice(bytes);
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(DeviceError::Queues(options.queues));
        }
        if !options.queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&options.queue_size) {
            return Err(DeviceError::QueueSize(options.queue_size));
        }
        Ok(Arc::new(Self {
            space: Space::new(options.on_no_space),
            options,
            serial,
            stack,
            cache: WriteCache::default(),
            stragglers: Arc::default(),
            failures: AtomicU64::new(0),
        }))
    }

    /// What the operator calls it.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// What the operator decided.
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// The serial number, filled up with zeros.
    pub fn serial(&self) -> &[u8; ID_BYTES] {
        &self.serial
    }

    /// Where the bytes are.
    pub fn stack(&self) -> &Arc<Stack<E>> {
        &self.stack
    }

    /// Which requests make sense.
    pub fn limits(&self) -> Limits {
        Limits { bytes: self.stack.virtual_size(), read_only: self.options.read_only }
    }

    /// The guest's choice between write-back and write-through.
    pub fn cache(&self) -> &WriteCache {
        &self.cache
    }

    /// Requests that were given up in flight.
    pub fn stragglers(&self) -> &Arc<Stragglers> {
        &self.stragglers
    }

    /// Requests that wait for space.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Whether a change of the disk has failed only because there is no space now. An image that has refused further writes after such an error
    /// goes on refusing them.
    pub fn lacks_space(&self, error: &LayerError) -> bool {
        error.is_no_space() && !error.is_failure() && self.stack.failure().is_none()
    }

    /// Requests that the stack has failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Takes note of a request that the stack has failed. Says so for the first one and then ever more rarely: a dead disk fails them all.
    pub fn note_failure(&self, error: &LayerError) {
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            warn!(event = "request_failed", device = self.name(), count, cause = %error, "the guest gets an I/O error");
        }
    }
}

/// Whether completed writes may be lost until the guest flushes (write-back, the default) or must be durable (write-through).
///
/// Without a choice of the driver's, it is what the accepted features say. The choice outlives the connection and device resets. Front-ends keep a copy of the configuration space and tell us changes only (QEMU reads
/// it once, when the device is made, and sends the byte only when it differs from that copy), so the guest of a front-end that comes back
/// may still count on write-through. It goes back to the default for a front-end that reads it before it starts a ring, and so learns of it.
///
/// It outlives the daemon as well, for the guests of those that were killed: as a file that is there while the choice is write-through
/// ([`keep_in`](Self::keep_in)).
#[derive(Debug, Default)]
pub struct WriteCache {
    choice: Mutex<Choice>,
    kept_in: OnceLock<PathBuf>,
    /// What follows from the choice, for queues.
    write_through: AtomicBool,
}

#[derive(Debug)]
struct Choice {
    /// Virtio feature bits that the driver has accepted.
    features: u64,
    /// The byte in the configuration space, if anybody may rely on its value.
    write_back: Option<bool>,
    /// Whether the file is there that says so.
    is_kept: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self { features: 1 << VIRTIO_BLK_F_FLUSH, write_back: None, is_kept: false }
    }
}

impl Choice {
    fn can_flush(&self) -> bool {
        self.features & (1 << VIRTIO_BLK_F_FLUSH) != 0
    }

    /// The byte in the configuration space. VIRTIO 1.3, 5.2.5.2: without flushes the writes must be durable until the driver says otherwise.
    fn write_back(&self) -> bool {
        self.write_back.unwrap_or(self.can_flush())
    }

    /// VIRTIO 1.3, 5.2.6.2, "a write becomes stable": a driver that can neither flush nor choose relies on every write; one that cannot choose
    /// but flush flushes.
    fn write_through(&self) -> bool {
        match self.features & (1 << VIRTIO_BLK_F_CONFIG_WCE) {
            0 => !self.can_flush(),
            _ => !self.write_back(),
        }
    }
}

impl WriteCache {
    /// Whether a write that is taken now must be durable when it completes.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// The byte for the configuration space: 1 for write-back. Whoever reads 0 may keep it and never flush, so it stays 0 until somebody
    /// chooses again.
    pub fn report_write_back(&self) -> u8 {
        let mut choice = self.choice();
        if !choice.write_back() {
            choice.write_back = Some(false);
            self.keep(&mut choice);
        }
        u8::from(choice.write_back())
    }

    /// Keeps the choice in a file called `path`, and takes it from there if a daemon before has left it. Once, before a front-end connects.
    ///
    /// # Errors
    /// If it is not known whether the file is there.
    pub fn keep_in(&self, path: PathBuf) -> io::Result<()> {
        if path.try_exists()? {
            self.change(|choice| (choice.write_back, choice.is_kept) = (Some(false), true));
        }
        // The first call counts.
        let _ = self.kept_in.set(path);
        Ok(())
    }

    /// Lets the file be there, or not. It need not survive a power cut, which no guest does.
    fn keep(&self, choice: &mut Choice) {
        let is_wanted = choice.write_back == Some(false);
        let Some(path) = self.kept_in.get().filter(|_| is_wanted != choice.is_kept) else { return };
        let outcome = if is_wanted { std::fs::File::create(path).map(drop) } else { std::fs::remove_file(path) };
        match outcome {
            Ok(()) => choice.is_kept = is_wanted,
            // If it could not be made, guests are told nothing else: their writes are as durable as they asked while this daemon lives.
            Err(error) => warn!(event = "choice_not_kept", path = %path.display(), cause = %error, "the guest's choice of write cache"),
        }
    }

    /// The driver sets the byte in the configuration space.
    pub fn set_write_back(&self, write_back: bool) {
        self.change(|choice| choice.write_back = Some(write_back));
    }

    /// Goes back to the default, as whoever configures the device is about to read. Not for a driver that may rely on what it chose.
    pub fn reset(&self) {
        self.change(|choice| choice.write_back = None);
    }

    /// A front-end has connected and has accepted nothing yet.
    pub fn begin_negotiation(&self) {
        self.change(|choice| choice.features = Choice::default().features);
    }

    /// The driver has accepted these virtio features.
    pub fn set_features(&self, features: u64) {
        self.change(|choice| {
            choice.features = features;
            // Not chosen by this driver, which relies on its writes. What comes after it may find write-back again: firmware that boots
            // without flushes must not slow the system down that it boots.
            if !choice.can_flush() && choice.write_back == Some(true) {
                choice.write_back = None;
            }
        });
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Choice)) {
        let mut choice = self.choice();
        change(&mut choice);
        self.keep(&mut choice);
        self.write_through.store(choice.write_through(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

    #[test]
    fn write_through_is_what_driver_and_specification_agree_on() {
        // (features, byte set by the driver afterwards, write-through)
        for (features, byte, expected) in [
            (FLUSH, None, false),
            (FLUSH, Some(false), false),
            (FLUSH | WCE, None, false),
            (FLUSH | WCE, Some(false), true),
            (FLUSH | WCE, Some(true), false),
            (WCE, None, true),
            (WCE, Some(true), false),
            (0, None, true),
            (0, Some(true), true),
        ] {
            let cache = WriteCache::default();
            cache.set_features(features);
            if let Some(byte) = byte {
                cache.set_write_back(byte);
            }
            assert_eq!(cache.is_write_through(), expected, "features {features:#x}, byte {byte:?}");
        }
    }

    #[test]
    fn the_choice_survives_a_renewed_negotiation() {
        let cache = WriteCache::default();
        cache.set_features(FLUSH | WCE);
        cache.set_write_back(false);
        cache.set_features(FLUSH | WCE);
        assert!(cache.is_write_through());
        assert_eq!(cache.report_write_back(), 0);
    }

    #[test]
    fn a_system_after_firmware_without_flushes_has_write_back() {
        let cache = WriteCache::default();
        assert_eq!(cache.report_write_back(), 1);
        cache.set_features(0);
        assert!(cache.is_write_through());
        cache.set_features(FLUSH | WCE);
        assert!(!cache.is_write_through());
        cache.set_write_back(true);
        cache.set_features(WCE);
        assert!(cache.is_write_through(), "another driver's choice");
        cache.set_features(FLUSH | WCE);
        assert!(!cache.is_write_through());
    }

    #[test]
    fn a_byte_that_was_read_as_write_through_stays_so_until_a_new_front_end_reads() {
        let cache = WriteCache::default();
        cache.set_features(WCE);
        assert_eq!(cache.report_write_back(), 0);
        cache.set_features(FLUSH | WCE);
        assert!(cache.is_write_through());
        cache.begin_negotiation();
        assert_eq!(cache.report_write_back(), 0, "it may only look");
        cache.reset();
        assert_eq!(cache.report_write_back(), 1);
        cache.set_features(FLUSH | WCE);
        assert!(!cache.is_write_through());
        cache.begin_negotiation();
        cache.set_features(0);
        cache.reset();
        assert!(cache.is_write_through(), "features were accepted before the byte was read");
    }

    #[test]
    fn the_choice_outlives_the_daemon_until_it_is_another() {
        let directory = tempfile::tempdir().expect("a directory");
        let daemon = || {
            let cache = WriteCache::default();
            cache.keep_in(directory.path().join("vda")).expect("a directory that can be looked into");
            cache
        };
        let cache = daemon();
        cache.set_features(FLUSH | WCE);
        assert!(!cache.is_write_through());
        cache.set_write_back(false);
        // Killed; the front-end does not look again.
        let cache = daemon();
        cache.begin_negotiation();
        cache.set_features(FLUSH | WCE);
        assert!(cache.is_write_through());
        cache.set_write_back(true);
        let cache = daemon();
        cache.set_features(FLUSH | WCE);
        assert!(!cache.is_write_through());
        cache.set_write_back(false);
        let cache = daemon();
        cache.reset();
        assert!(!daemon().is_write_through(), "somebody has looked, and seen the default");
    }
}

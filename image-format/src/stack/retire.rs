//! Which views are still in use.

use std::sync::{Arc, PoisonError};

use crate::runtime::WaitQueue;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Whether one view is still in use. Completed when the view is dropped, that is, with its last user.
#[derive(Debug)]
pub(super) struct Retirement {
    /// Place in the order of publication; the maximum before it.
    number: AtomicU64,
    /// Number of the layer that is the view's top.
    top: usize,
    done: AtomicBool,
    waiting: Arc<WaitQueue>,
}

impl Retirement {
    pub(super) fn complete(&self) {
        self.done.store(true, Ordering::SeqCst);
        self.waiting.notify_all();
    }
}

/// The views of one stack.
#[derive(Debug, Default)]
pub(super) struct Retirements {
    state: Mutex<State>,
    waiting: Arc<WaitQueue>,
}

#[derive(Debug, Default)]
struct State {
    next_number: u64,
    live: Vec<Arc<Retirement>>,
}

impl Retirements {
    /// A new view whose top is layer `top`.
    pub(super) fn add(&self, top: usize) -> Arc<Retirement> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.live.retain(|view| !view.done.load(Ordering::SeqCst));
        let view = Arc::new(Retirement {
            number: AtomicU64::new(u64::MAX),
            top,
            done: AtomicBool::new(false),
            waiting: Arc::clone(&self.waiting),
        });
        state.live.push(Arc::clone(&view));
        view
    }

    /// The view becomes the present one: requests can begin to use it.
    pub(super) fn publish(&self, view: &Retirement) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        view.number.store(state.next_number, Ordering::SeqCst);
        state.next_number += 1;
    }

    /// Ends when no view whose top is layer `top` or one beneath is in use.
    pub(super) async fn all_up_to(&self, top: usize) {
        self.none_live(|view| view.top <= top).await;
    }

    /// Ends when no view that was published before `view` is in use.
    pub(super) async fn all_before(&self, view: &Retirement) {
        let number = view.number.load(Ordering::SeqCst);
        self.none_live(|other| other.number.load(Ordering::SeqCst) < number).await;
    }

    async fn none_live(&self, matters: impl Fn(&Retirement) -> bool) {
        self.waiting
            .wait_until(|| {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.live.retain(|view| !view.done.load(Ordering::SeqCst));
                (!state.live.iter().any(|view| matters(view))).then_some(())
            })
            .await;
    }
}

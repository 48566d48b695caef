//! Waiting for a condition that another task, perhaps on another thread, makes true.

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Poll, Waker};

use crate::sync::Mutex;

/// Tasks that wait until something has changed.
///
/// The condition itself lives elsewhere, under whatever lock or atomic guards it. Whoever changes it calls [`notify_all`](Self::notify_all)
/// *after* the change is visible; then no wake-up is lost, because a waiter looks again after it has registered.
#[derive(Debug, Default)]
pub struct WaitQueue {
    wakers: Mutex<Vec<Waker>>,
}

impl WaitQueue {
    /// A queue with nobody in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends with the first `Some` that `condition` gives. It is called at once, and again after each notification.
    pub async fn wait_until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| {
            if let Some(value) = condition() {
                return Poll::Ready(value);
            }
            {
                let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
                if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                    wakers.push(context.waker().clone());
                }
            }
            match condition() {
                Some(value) => Poll::Ready(value),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Lets every waiter look again.
    pub fn notify_all(&self) {
        let wakers = std::mem::take(&mut *self.wakers.lock().unwrap_or_else(PoisonError::into_inner));
        for waker in wakers {
            waker.wake();
        }
    }
}

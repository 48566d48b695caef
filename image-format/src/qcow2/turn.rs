//! Taking turns: work that only one task at a time may do, across awaits.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::runtime::WaitQueue;

/// A lock whose waiters are tasks. Fairness is not promised; the work under it is short or rare.
#[derive(Debug, Default)]
pub(super) struct Turn {
    taken: AtomicBool,
    given_back: WaitQueue,
}

/// The right to go on; given back when dropped.
#[derive(Debug)]
#[must_use = "a turn that is dropped at once excludes nobody"]
pub(super) struct TurnGuard<'a>(&'a Turn);

impl Turn {
    pub(super) async fn take(&self) -> TurnGuard<'_> {
        self.given_back.wait_until(|| self.try_take()).await
    }

    pub(super) fn try_take(&self) -> Option<TurnGuard<'_>> {
        // Acquire pairs with the release in `drop`: what was done in a turn is seen in the next.
        self.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok().map(|_| TurnGuard(self))
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
        self.0.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::run;

    #[test]
    fn a_turn_is_had_by_one_at_a_time() {
        run(async {
            let turn = Turn::default();
            let first = turn.take().await;
            assert!(turn.try_take().is_none());
            drop(first);
            assert!(turn.try_take().is_some());
        });
    }
}

//! How long the rings of a device are waited for.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a drain may take. The VMM stands still meanwhile, so it ends some time even on storage that never answers.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take once another ring of the device has been waited for in vain: front-ends stop one ring after the other, and so the times
/// would add up, to many minutes for a device with many queues.
const NEXT_TIMEOUT: Duration = Duration::from_millis(100);

/// What is known of the drains of one device.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// When a ring was last waited for in vain.
    given_up: Mutex<Option<Instant>>,
}

impl Drains {
    /// When a drain that begins now must have ended.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        let given_up = *self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        let hangs = given_up.is_some_and(|given_up| now.saturating_duration_since(given_up) < DRAIN_TIMEOUT);
        now + if hangs { NEXT_TIMEOUT } else { DRAIN_TIMEOUT }
    }

    /// A ring did not come to rest by its deadline.
    pub(super) fn give_up(&self, now: Instant) {
        *self.given_up.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_many_rings_do_not_add_up() {
        let drains = Drains::default();
        let begin = Instant::now();
        let mut now = begin;
        for _ in 0..64 {
            now = drains.deadline(now);
            drains.give_up(now);
        }
        assert!(now - begin < Duration::from_secs(40), "{:?}", now - begin);
        // A disk that answers again is given its time again.
        let later = now + DRAIN_TIMEOUT;
        assert_eq!(drains.deadline(later), later + DRAIN_TIMEOUT);
    }
}

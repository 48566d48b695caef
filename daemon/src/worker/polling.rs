//! Whether a thread that has nothing to do looks again at once, or sleeps until it is woken.
//!
//! Being woken takes tens of microseconds and a system call of whoever wakes, so a thread that expects something soon does better to go on looking.
//! It expects what it has seen: as long as waits end within the limit, they are spent looking; the first one that is longer ends that, until a wait has
//! been short again. So a thread whose queues are idle, or get a request now and then, uses no processor time for it. Nor does one that others want
//! the processor of: looking for work must not keep those from running who would make some.

use std::time::Duration;

/// How long polling rests after the thread was put off its processor in the midst of it.
const REST: Duration = Duration::from_millis(10);

/// Decides how the waits of one thread are spent. Times are those of a clock that does not jump.
#[derive(Debug)]
pub(super) struct Polling {
    /// Longest wait that is spent looking; zero: none is.
    limit: Duration,
    /// Whether the last wait was within the limit.
    is_busy: bool,
    /// Since when there has been nothing to do.
    since: Option<Duration>,
    /// Until when the processor is left to others.
    rests_until: Duration,
    /// How often others have taken the processor away from the thread, as counted last.
    preemptions: i64,
}

impl Polling {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, is_busy: false, since: None, rests_until: Duration::ZERO, preemptions: 0 }
    }

    /// There is something to do: the wait, if there was one, is over. `now` is asked for only if that matters.
    pub(super) fn end_wait(&mut self, now: impl FnOnce() -> Duration) {
        if let Some(since) = self.since.take() {
            self.is_busy = now().saturating_sub(since) <= self.limit;
        }
    }

    /// There is nothing to do: whether to look again instead of sleeping. `preemptions` counts how often the thread has been put off its
    /// processor by others.
    pub(super) fn looks_again(&mut self, now: impl FnOnce() -> Duration, preemptions: impl FnOnce() -> i64) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let now = now();
        let Some(since) = self.since else {
            self.since = Some(now);
            return self.is_busy && now >= self.rests_until;
        };
        if !self.is_busy || now < self.rests_until {
            return false;
        }
        if now.saturating_sub(since) <= self.limit {
            return true;
        }
        self.is_busy = false;
        let preemptions = preemptions();
        if std::mem::replace(&mut self.preemptions, preemptions) != preemptions {
            self.rests_until = now + REST;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(100);

    /// A thread, its clock, and what others do to it.
    struct Thread {
        polling: Polling,
        now: Duration,
        preemptions: i64,
    }

    impl Thread {
        fn new() -> Self {
            Self { polling: Polling::new(LIMIT), now: Duration::from_secs(1), preemptions: 0 }
        }

        fn looks_again(&mut self) -> bool {
            self.polling.looks_again(|| self.now, || self.preemptions)
        }

        /// Waits for so long, in steps of a microsecond while it polls. Returns for how long it polled.
        fn wait(&mut self, micros: u64) -> u64 {
            let mut polled = 0;
            while polled < micros && self.looks_again() {
                polled += 1;
                self.now += Duration::from_micros(1);
            }
            self.now += Duration::from_micros(micros - polled);
            self.polling.end_wait(|| self.now);
            polled
        }
    }

    #[test]
    fn short_waits_are_polled_after_the_first() {
        let mut thread = Thread::new();
        assert_eq!([5, 80, 100, 7].map(|micros| thread.wait(micros)), [0, 80, 100, 7]);
    }

    #[test]
    fn a_long_wait_is_polled_up_to_the_limit_and_the_next_not_at_all() {
        let mut thread = Thread::new();
        assert_eq!([5, 5000, 5000, 5000, 50, 50].map(|micros| thread.wait(micros)), [0, 101, 0, 0, 0, 50]);
    }

    #[test]
    fn a_limit_of_nothing_never_polls() {
        let mut thread = Thread { polling: Polling::new(Duration::ZERO), ..Thread::new() };
        assert_eq!([0, 1, 1].map(|micros| thread.wait(micros)), [0, 0, 0]);
    }

    #[test]
    fn a_thread_that_others_put_off_rests() {
        let mut thread = Thread::new();
        thread.wait(5);
        thread.preemptions = 1;
        assert_eq!(thread.wait(5000), 101);
        // Short waits again, but others want the processor.
        assert_eq!([5, 5, 5].map(|micros| thread.wait(micros)), [0, 0, 0]);
        thread.now += REST;
        thread.polling.end_wait(|| thread.now);
        assert_eq!([5, 5, 5000, 5, 5].map(|micros| thread.wait(micros)), [5, 5, 101, 0, 5]);
    }
}

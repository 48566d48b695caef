//! Rounds of making things durable, and the first failure, which ends them.
//!
//! That a flush has failed outlives the process, if there is a keeper: what was written before it can be seen until the power is cut, also by a process
//! that opens the file again, and no flush of that one makes it durable.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{LayerError, Structure};
use crate::runtime::WaitQueue;
use crate::storage::Storage;
use crate::storage::kept::{Failure, Incarnation, MemoryKeeper};
use crate::units::HostOffset;

/// Rounds of work on one file, one at a time. Whoever asks while one is under way waits for the next, because the present one may have begun
/// before what they want durable; all who wait share that next one.
///
/// One at a time is also what makes a failure count for everybody: Linux reports pages that it could not write to one flush of an open file, and
/// the next one succeeds without them. After the first failure no round runs any more.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    state: Mutex<State>,
    changed: WaitQueue,
    /// The first failure after which what is in the file is unknown.
    failed: OnceLock<LayerError>,
    outliving: OnceLock<Outliving>,
    /// Nobody refers to the file yet, so what is in it needs no order: it is flushed once, at the end. Relaxed: changed by whoever makes the image, before
    /// others have it.
    is_draft: AtomicBool,
}

/// What is remembered of the files beyond this process.
#[derive(Debug)]
struct Outliving {
    keeper: Arc<dyn MemoryKeeper>,
    /// The image and, if it has one, its data file.
    files: Vec<Incarnation>,
    /// What had been known when they were opened.
    found: Option<Failure>,
}

impl Outliving {
    fn failure(&self) -> Option<Failure> {
        let failures = self.files.iter().filter_map(|file| self.keeper.failure(*file));
        failures.reduce(|one, other| Failure { told: one.told && other.told, rewritten: one.rewritten && other.rewritten })
    }

    fn add(&self, news: Failure) {
        self.files.iter().for_each(|file| self.keeper.add_to_failure(*file, news));
    }
}

#[derive(Debug, Default)]
struct State {
    begun: u64,
    /// Round up to which all have ended, well or not.
    ended: u64,
    running: bool,
}

/// The duty to run a round, or the right to change metadata without one.
struct Round<'a> {
    rounds: &'a Rounds,
    finished: bool,
}

enum Role<'a> {
    /// Another task has run a round that began after we asked.
    Served,
    Runs(Round<'a>),
}

impl Rounds {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the first failure. Returns this one.
    pub(crate) fn fail(&self, error: LayerError) -> LayerError {
        // Only the first is kept: later ones say no more.
        let _ = self.failed.set(error.clone());
        error
    }

    /// From now on flushes that fail are remembered in `keeper`. Only the first call counts.
    pub(crate) fn remember_in(&self, keeper: &Arc<dyn MemoryKeeper>, files: Vec<Incarnation>) {
        self.outliving.get_or_init(|| {
            let mut outliving = Outliving { keeper: Arc::clone(keeper), files, found: None };
            outliving.found = outliving.failure();
            outliving
        });
    }

    /// The failure of a flush since the machine was started and before the file was opened.
    pub(crate) fn earlier_failure(&self) -> Option<Failure> {
        self.outliving.get().and_then(|outliving| outliving.found)
    }

    /// The failure of a flush since the machine was started, here or elsewhere.
    pub(crate) fn present_failure(&self) -> Option<Failure> {
        self.outliving.get().and_then(Outliving::failure)
    }

    /// Remembers beyond this process that a flush of the file has failed. To be called before anybody is told.
    pub(crate) fn note_failure(&self) {
        if let Some(Outliving { keeper, files, .. }) = self.outliving.get() {
            files.iter().for_each(|file| keeper.note_failure(*file));
        }
    }

    /// Remembers what has come to be known of a failure, if there was one.
    pub(crate) fn add_to_failure(&self, news: Failure) {
        if let Some(outliving) = self.outliving.get() {
            outliving.add(news);
        }
    }

    /// Nobody refers to the file before [`end_draft`](Self::end_draft): until then it is not flushed.
    pub(crate) fn begin_draft(&self) {
        self.is_draft.store(true, Ordering::Relaxed);
    }

    /// Makes all of the draft durable. Only when nothing is under way.
    ///
    /// # Errors
    /// What the medium says: it stays a draft, and nobody has lost anything.
    pub(crate) async fn end_draft(&self, file: &impl Storage) -> Result<(), LayerError> {
        let flushed = file.flush().await;
        flushed.map_err(|error| self.fail(LayerError::io("flush", Structure::File, HostOffset::ZERO, error)))?;
        self.is_draft.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Flushes the file, unless it is a draft.
    ///
    /// # Errors
    /// What the medium says, after that has been noted.
    pub(crate) async fn flush(&self, file: &impl Storage) -> Result<(), LayerError> {
        if self.is_draft.load(Ordering::Relaxed) {
            return Ok(());
        }
        file.flush().await.map_err(|error| {
            self.note_failure();
            LayerError::io("flush", Structure::File, HostOffset::ZERO, error)
        })
    }

    /// Whether nothing has failed.
    ///
    /// # Errors
    /// `Failed`, with the first failure.
    pub(crate) fn admit(&self) -> Result<(), LayerError> {
        match self.failed.get() {
            Some(cause) => Err(LayerError::Failed(Box::new(cause.clone()))),
            None => Ok(()),
        }
    }

    /// Whether one is under way.
    pub(crate) fn is_running(&self) -> bool {
        self.state().running
    }

    /// Ends when a round that began after the call has ended: that of `work` or, if another task was faster, of the same work there.
    ///
    /// # Errors
    /// If that round failed, or anything before.
    pub(crate) async fn share(&self, work: impl Future<Output = Result<(), LayerError>>) -> Result<(), LayerError> {
        self.admit()?;
        match self.join().await {
            Role::Served => self.admit(),
            Role::Runs(round) => self.run(round, work).await,
        }
    }

    /// A round of one's own, with no other before its end.
    ///
    /// # Errors
    /// If it fails, or anything has before.
    pub(crate) async fn alone(&self, work: impl Future<Output = Result<(), LayerError>>) -> Result<(), LayerError> {
        loop {
            if let Role::Runs(round) = self.join().await {
                return self.run(round, work).await;
            }
        }
    }

    async fn join(&self) -> Role<'_> {
        let ticket = self.state().begun + 1;
        self.changed
            .wait_until(|| {
                let mut state = self.state();
                if state.ended >= ticket {
                    return Some(Role::Served);
                }
                if state.running {
                    return None;
                }
                state.running = true;
                state.begun += 1;
                Some(Role::Runs(Round { rounds: self, finished: false }))
            })
            .await
    }

    /// Any failure ends all rounds: what is durable is unknown then. So does a future that is dropped half-way: nobody sees whether what it had
    /// begun, a flush perhaps, has failed.
    async fn run(&self, round: Round<'_>, work: impl Future<Output = Result<(), LayerError>>) -> Result<(), LayerError> {
        struct Abandoned<'a>(&'a Rounds, bool);
        impl Drop for Abandoned<'_> {
            fn drop(&mut self) {
                if !self.1 {
                    self.0.note_failure();
                    let source = std::io::ErrorKind::Interrupted.into();
                    self.0.fail(LayerError::io("finish writing", Structure::File, HostOffset::ZERO, source));
                }
            }
        }
        let result = match self.admit() {
            Ok(()) => {
                let mut watch = Abandoned(self, false);
                let result = work.await;
                watch.1 = true;
                result.map_err(|error| self.fail(error))
            }
            Err(error) => Err(error),
        };
        round.finish();
        result
    }
}

impl Round<'_> {
    fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut state = self.rounds.state();
        state.running = false;
        if self.finished {
            state.ended = state.begun;
        }
        drop(state);
        self.rounds.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{poll_fn, ready};
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::storage::kept::TestKeeper;
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Environment, FileIdentity, Location};

    type Outcome = Result<(), LayerError>;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// What `future` gives at once.
    fn now<T>(future: impl Future<Output = T>) -> T {
        match poll(pin!(future)) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it waits"),
        }
    }

    /// Work that counts that it has begun, and ends when `gate` opens.
    fn work<'a>(begun: &'a Cell<u32>, gate: &'a Cell<bool>) -> impl Future<Output = Outcome> + 'a {
        let mut first = true;
        poll_fn(move |_| {
            if std::mem::take(&mut first) {
                begun.set(begun.get() + 1);
            }
            if gate.get() { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
    }

    fn failure() -> LayerError {
        LayerError::io("flush", Structure::File, HostOffset::ZERO, std::io::Error::from_raw_os_error(libc::EIO))
    }

    #[test]
    fn whoever_asks_during_a_round_shares_the_next_one_with_all_who_do() {
        let rounds = Rounds::default();
        let (begun, gate) = (Cell::new(0), Cell::new(false));
        let mut present = pin!(rounds.share(work(&begun, &gate)));
        assert!(!rounds.is_running());
        assert!(poll(present.as_mut()).is_pending());
        assert!(rounds.is_running());
        let mut second = pin!(rounds.share(work(&begun, &gate)));
        let mut third = pin!(rounds.share(work(&begun, &gate)));
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        assert_eq!(begun.get(), 1, "one at a time");
        gate.set(true);
        assert!(matches!(poll(present), Poll::Ready(Ok(()))));
        assert!(!rounds.is_running());
        gate.set(false);
        // The round that has just ended may have begun before what they want.
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        assert_eq!(begun.get(), 2, "one round for both");
        gate.set(true);
        assert!(matches!(poll(second), Poll::Ready(Ok(()))));
        assert!(matches!(poll(third), Poll::Ready(Ok(()))));
        assert_eq!(begun.get(), 2, "one round for both");
        assert!(!rounds.is_running());
    }

    #[test]
    fn a_round_of_ones_own_is_not_another_ones() {
        let rounds = Rounds::default();
        let (begun, gate) = (Cell::new(0), Cell::new(false));
        let mut present = pin!(rounds.share(work(&begun, &gate)));
        assert!(poll(present.as_mut()).is_pending());
        let mut shared = pin!(rounds.share(work(&begun, &gate)));
        let mut own = pin!(rounds.alone(work(&begun, &gate)));
        assert!(poll(own.as_mut()).is_pending() && poll(shared.as_mut()).is_pending());
        gate.set(true);
        assert!(matches!(poll(present), Poll::Ready(Ok(()))));
        assert!(matches!(poll(shared), Poll::Ready(Ok(()))));
        assert_eq!(begun.get(), 2);
        assert!(matches!(poll(own), Poll::Ready(Ok(()))));
        assert_eq!(begun.get(), 3);
    }

    #[test]
    fn after_a_failure_no_round_runs() {
        let rounds = Rounds::default();
        rounds.admit().expect("nothing has failed");
        let failed = now(rounds.share(ready(Err(failure()))));
        assert!(matches!(failed, Err(LayerError::Io { .. })), "whoever sees it first sees its cause: {failed:?}");
        assert!(matches!(rounds.admit(), Err(LayerError::Failed(_))));
        let gate = Cell::new(true);
        let begun = Cell::new(0);
        for again in [now(rounds.share(work(&begun, &gate))), now(rounds.alone(work(&begun, &gate)))] {
            assert!(matches!(again, Err(LayerError::Failed(_))), "{again:?}");
        }
        assert_eq!(begun.get(), 0);
        assert!(!rounds.is_running());
    }

    #[test]
    fn a_failure_is_that_of_those_who_wait_too() {
        let rounds = Rounds::default();
        let gate = Cell::new(false);
        let failing = poll_fn(|_| if gate.get() { Poll::Ready(Err(failure())) } else { Poll::Pending });
        let mut present = pin!(rounds.share(failing));
        assert!(poll(present.as_mut()).is_pending());
        let mut waiting = pin!(rounds.share(ready(Ok(()))));
        let mut own = pin!(rounds.alone(ready(Ok(()))));
        assert!(poll(waiting.as_mut()).is_pending() && poll(own.as_mut()).is_pending());
        gate.set(true);
        assert!(matches!(poll(present), Poll::Ready(Err(LayerError::Io { .. }))));
        assert!(matches!(poll(waiting), Poll::Ready(Err(LayerError::Failed(_)))));
        assert!(matches!(poll(own), Poll::Ready(Err(LayerError::Failed(_)))));
    }

    #[test]
    fn work_that_is_dropped_half_way_has_failed() {
        let rounds = Rounds::default();
        let (begun, gate) = (Cell::new(0), Cell::new(false));
        {
            let mut dropped = pin!(rounds.share(work(&begun, &gate)));
            assert!(poll(dropped.as_mut()).is_pending());
            let mut waiting = pin!(rounds.share(work(&begun, &gate)));
            assert!(poll(waiting.as_mut()).is_pending());
            // Whoever only waits leaves nothing behind.
        }
        assert_eq!(begun.get(), 1);
        assert!(!rounds.is_running());
        assert!(matches!(now(rounds.share(ready(Ok(())))), Err(LayerError::Failed(_))));
    }

    #[test]
    fn a_flush_that_fails_is_remembered_beyond_the_process() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let file = |inode| Incarnation { file: FileIdentity { device: 1, inode }, born: 3 };
        let disk = SimulatedEnvironment::new(1);
        disk.put("/a", &[0; 512]);
        disk.inject(Fault::once(OperationKind::Flush, 0));
        let rounds_of = |inode| {
            let rounds = Rounds::default();
            assert_eq!(rounds.earlier_failure(), None);
            rounds.remember_in(&keeper, vec![file(inode)]);
            rounds
        };
        let begun = Cell::new(0);
        let (sound, failing, dropped) = (rounds_of(1), rounds_of(2), rounds_of(3));
        now(sound.share(ready(Ok(())))).expect("nothing has failed");
        now(sound.share(ready(Err(failure())))).expect_err("something else than a flush of the file");
        let failing = Arc::new(failing);
        let rounds = Arc::clone(&failing);
        Simulation::on(disk.clone()).block_on(async move {
            let file = disk.open(&Location::Trusted("/a".into()), Access::Write, CacheMode::Direct).await.expect("a file");
            rounds.share(rounds.flush(&file)).await.expect_err("a failed flush");
        });
        assert!(poll(pin!(dropped.alone(work(&begun, &Cell::new(false))))).is_pending());
        let failed = Some(Failure::default());
        assert_eq!([&sound, &*failing, &dropped].map(Rounds::earlier_failure), [None; 3], "not before they were opened");
        assert_eq!([&sound, &*failing, &dropped].map(Rounds::present_failure), [None, failed, failed]);
        let again = [1, 2, 3, 4].map(rounds_of);
        assert_eq!(again.each_ref().map(Rounds::earlier_failure), [None, failed, failed, None]);
        again[0].remember_in(&keeper, vec![file(2)]);
        assert_eq!(again[0].earlier_failure(), None, "the first call counts");
        for (number, told, rewritten) in [(0, true, false), (1, true, false), (1, false, true)] {
            again[number].add_to_failure(Failure { told, rewritten });
        }
        let both = Rounds::default();
        both.remember_in(&keeper, vec![file(1), file(2)]);
        assert_eq!(both.earlier_failure(), Some(Failure { told: true, rewritten: true }), "of what has failed of it");
        both.note_failure();
        assert_eq!([1, 2].map(|inode| rounds_of(inode).earlier_failure()), [failed, failed], "a new failure is not known to anybody");
        now(again[1].share(ready(Ok(())))).expect("it can be written to again");
    }

    #[test]
    fn waiting_that_is_given_up_harms_nobody() {
        let rounds = Rounds::default();
        let (begun, gate) = (Cell::new(0), Cell::new(false));
        let mut present = pin!(rounds.share(work(&begun, &gate)));
        assert!(poll(present.as_mut()).is_pending());
        {
            let mut waiting = pin!(rounds.share(work(&begun, &gate)));
            assert!(poll(waiting.as_mut()).is_pending());
        }
        gate.set(true);
        assert!(matches!(poll(present), Poll::Ready(Ok(()))));
        now(rounds.share(work(&begun, &gate))).expect("nothing has failed");
        assert_eq!(begun.get(), 2);
    }
}

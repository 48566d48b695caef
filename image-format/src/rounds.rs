//! Rounds of making things durable, and the first failure, which ends them.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{LayerError, Structure};
use crate::runtime::WaitQueue;
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
    /// begun has failed.
    async fn run(&self, round: Round<'_>, work: impl Future<Output = Result<(), LayerError>>) -> Result<(), LayerError> {
        struct Abandoned<'a>(&'a Rounds, bool);
        impl Drop for Abandoned<'_> {
            fn drop(&mut self) {
                if !self.1 {
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

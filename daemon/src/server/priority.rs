//! Which threads go first where there are more of them than processors.
//!
//! Guests wait for queue threads, and for fences that expire in time. They seldom wait for the rest, which works some milliseconds for each snapshot, in
//! many short turns of many threads: the control thread from the switch of a group until its old views are dropped, and while it freezes a layer that a
//! guest flushes. So the rest runs at a lower priority. A thread has that of whoever makes it, and cannot raise its own without privileges: whoever has
//! kept the priority of the process makes those that need it.

use std::io;
use std::sync::mpsc::{self, Sender};

use rustix::process::{getpriority_process, setpriority_process};

/// How much nicer threads are that no guest waits for (setpriority(2)): beside one queue thread that has always something to do they get a tenth of
/// the processor.
const NICER: i32 = 10;
/// The nicest that Linux has.
const NICEST: i32 = 19;

type Work = Box<dyn FnOnce() + Send>;

/// A thread that has the priority of the process, for making more of them. Ends when this is dropped.
#[derive(Debug)]
pub(super) struct Foreground {
    work: Sender<Work>,
}

impl Foreground {
    /// Begins with the priority of the calling thread.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn new() -> io::Result<Self> {
        let (work, wanted) = mpsc::channel::<Work>();
        std::thread::Builder::new().name("foreground".to_owned()).spawn(move || wanted.into_iter().for_each(|work| work()))?;
        Ok(Self { work })
    }

    /// Does something there and waits for its result.
    ///
    /// # Errors
    /// If it panics, as it does every time after that.
    pub(super) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (done, result) = mpsc::channel();
        let work = move || {
            // Whoever wants the result is waiting for it.
            let _ = done.send(work());
        };
        self.work.send(Box::new(work)).map_err(|_| io::Error::other("the thread that makes threads has panicked"))?;
        result.recv().map_err(|_| io::Error::other("the thread that makes threads has panicked"))
    }
}

/// Lowers the priority of the calling thread, and of those that it makes from now on.
pub(super) fn step_back() {
    // Of the calling thread: threads are processes here, to Linux (setpriority(2), "C library/kernel differences").
    let lowered = getpriority_process(None).and_then(|now| setpriority_process(None, (now + NICER).min(NICEST)));
    if let Err(cause) = lowered {
        tracing::warn!(event = "priority_kept", %cause, "snapshots may take processor time from guests' requests");
    }
}

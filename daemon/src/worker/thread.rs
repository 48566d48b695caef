//! A worker on a thread of its own, over io_uring.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment, Wait};
use tracing::{error, warn};

use super::polling::Polling;
use super::{Turn, Worker, WorkerHandle};

/// How long the end of a thread is waited for: whoever ends it has waited for the requests that it serves before.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// A thread that serves queues. Ends when it is dropped, after the requests in flight; if those hang, it is left to the end of the process.
#[derive(Debug)]
pub struct WorkerThread<E: Environment> {
    handle: WorkerHandle<E>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread is at its end.
    alive: Mutex<Receiver<()>>,
}

impl<E: Environment> WorkerThread<E> {
    /// Starts a thread called `name`, whose ring takes `entries` submissions at a time. Waits that are expected to be no longer than `polling`
    /// are spent looking for work (none if it is zero).
    ///
    /// # Errors
    /// If the system gives no thread or no ring.
    pub fn spawn(name: String, entries: u32, polling: Duration, domain: &Arc<FenceDomain>) -> io::Result<Self> {
        let domain = Arc::clone(domain);
        let (sender, receiver) = sync_channel(1);
        let (living, alive) = channel();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _living = living;
            let reactor = match Reactor::new(entries) {
                Ok(reactor) => reactor,
                Err(error) => return drop(sender.send(Err(error))),
            };
            let (worker, handle) = Worker::new(reactor.executor().clone(), reactor.clone(), &domain);
            if sender.send(Ok(handle)).is_ok() {
                run(&reactor, worker, Polling::new(polling));
            }
        })?;
        let handle = receiver.recv().map_err(|_| io::Error::other("the thread ended before it began"))??;
        Ok(Self { handle, thread: Some(thread), alive: Mutex::new(alive) })
    }

    /// The way to the worker.
    pub fn handle(&self) -> &WorkerHandle<E> {
        &self.handle
    }
}

impl<E: Environment> Drop for WorkerThread<E> {
    fn drop(&mut self) {
        self.handle.end();
        let Some(thread) = self.thread.take() else { return };
        let alive = self.alive.get_mut().unwrap_or_else(PoisonError::into_inner);
        if alive.recv_timeout(LAST_WAIT) == Err(RecvTimeoutError::Timeout) {
            warn!(event = "worker_left", thread = thread.thread().name(), "its requests do not end: it ends with the process");
            return;
        }
        // It does not panic: see `run`.
        let _ = thread.join();
    }
}

/// Turns until the worker ends.
///
/// A panic here is an error of ours in the midst of a write to an image. Nothing that this process holds in memory can be trusted afterwards, while
/// images are always safe against its end: so it ends, and is started again.
fn run<E: Environment>(reactor: &Reactor, mut worker: Worker<E, Reactor>, mut polling: Polling) {
    let outcome = catch_unwind(AssertUnwindSafe(|| -> io::Result<()> {
        let _entered = reactor.enter();
        let mut events = Vec::new();
        loop {
            let wait = match worker.work() {
                Turn::Busy => {
                    polling.end_wait(|| UringEnvironment.now());
                    Wait::No
                }
                Turn::Idle if polling.looks_again(|| UringEnvironment.now(), preemptions) => {
                    std::hint::spin_loop();
                    Wait::No
                }
                Turn::Idle => match worker.rest() {
                    Turn::Idle => Wait::Forever,
                    Turn::Busy | Turn::Ended => Wait::No,
                },
                Turn::Ended => return Ok(()),
            };
            reactor.turn(wait)?;
            // Which kick it was does not matter: the next turn looks at every ring.
            reactor.take_events(&mut events);
            events.clear();
        }
    }));
    match outcome {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error!(event = "worker_failed", cause = %error, "queue thread cannot use its io_uring"),
        Err(_) => error!(event = "worker_failed", "queue thread panicked"),
    }
    std::process::abort();
}

/// How often the calling thread was put off its processor for another one.
fn preemptions() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: there is room for what the system call fills in.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: it has been filled in.
    unsafe { usage.assume_init() }.ru_nivcsw
}

//! A worker on a thread of its own, over io_uring.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::uring::{Reactor, Wait};
use tracing::error;

use super::{Turn, Worker, WorkerHandle};

/// A thread that serves queues. Ends when it is dropped, after the requests in flight.
#[derive(Debug)]
pub struct WorkerThread<E: Environment> {
    handle: WorkerHandle<E>,
    thread: Option<JoinHandle<()>>,
}

impl<E: Environment> WorkerThread<E> {
    /// Starts a thread called `name`, whose ring takes `entries` submissions at a time.
    ///
    /// # Errors
    /// If the system gives no thread or no ring.
    pub fn spawn(name: String, entries: u32, domain: &Arc<FenceDomain>) -> io::Result<Self> {
        let domain = Arc::clone(domain);
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let reactor = match Reactor::new(entries) {
                Ok(reactor) => reactor,
                Err(error) => return drop(sender.send(Err(error))),
            };
            let (worker, handle) = Worker::new(reactor.executor().clone(), reactor.clone(), &domain);
            if sender.send(Ok(handle)).is_ok() {
                run(&reactor, worker);
            }
        })?;
        let handle = receiver.recv().map_err(|_| io::Error::other("the thread ended before it began"))??;
        Ok(Self { handle, thread: Some(thread) })
    }

    /// The way to the worker.
    pub fn handle(&self) -> &WorkerHandle<E> {
        &self.handle
    }
}

impl<E: Environment> Drop for WorkerThread<E> {
    fn drop(&mut self) {
        self.handle.end();
        if let Some(thread) = self.thread.take() {
            // It does not panic: see `run`.
            let _ = thread.join();
        }
    }
}

/// Turns until the worker ends.
///
/// A panic here is an error of ours in the midst of a write to an image. Nothing that this process holds in memory can be trusted afterwards, while
/// images are always safe against its end: so it ends, and is started again.
fn run<E: Environment>(reactor: &Reactor, mut worker: Worker<E, Reactor>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| -> io::Result<()> {
        let _entered = reactor.enter();
        let mut events = Vec::new();
        loop {
            let wait = match worker.turn() {
                Turn::Busy => Wait::No,
                Turn::Idle => Wait::Forever,
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

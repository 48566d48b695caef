//! Work that blocks, on threads of its own.
//!
//! The first thread stays once it has been made, so that a process that may have no more of them still gets its work done, one piece at a time.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::WaitQueue;

/// Threads there are at most. Each may hang with a file server.
const MAX_THREADS: usize = 500;
/// How long a thread waits for more work, if it is not the last one.
const PATIENCE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

/// Threads, and what they have not begun.
struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

struct State {
    queue: VecDeque<Job>,
    threads: usize,
    /// Threads that wait or have just been made, those included that have been woken for something in the queue.
    idle: usize,
}

static POOL: Pool = Pool::new();

impl Pool {
    const fn new() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), threads: 0, idle: 0 }), more: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread do the job, a new one if none is idle; gives it back if there is no thread and none can be made.
    fn submit(&'static self, job: Job) -> Result<(), (io::Error, Job)> {
        let mut state = self.lock();
        state.queue.push_back(job);
        let grown = self.grow(&mut state);
        let threads = state.threads;
        if threads == 0
            && let Err(error) = grown
        {
            return Err((error, state.queue.pop_back().expect("just pushed")));
        }
        drop(state);
        self.more.notify_one();
        if let Err(cause) = grown {
            // One of those that there are does it when it is done.
            tracing::warn!(event = "no_thread", %cause, threads, "work waits for a thread");
        }
        Ok(())
    }

    /// Adds a thread if there is more to do than idle ones can, and there are not so many already.
    fn grow(&'static self, state: &mut State) -> io::Result<()> {
        if state.idle < state.queue.len() && state.threads < MAX_THREADS {
            std::thread::Builder::new().name("offload".to_owned()).spawn(move || self.work())?;
            state.threads += 1;
            state.idle += 1;
        }
        Ok(())
    }

    fn work(&'static self) {
        let mut state = self.lock();
        state.idle -= 1;
        loop {
            if let Some(job) = state.queue.pop_front() {
                // What waits for want of a thread perhaps need not any more; if it must, it has been said.
                let _ = self.grow(&mut state);
                drop(state);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
                    // Whoever waits for it is told, by what the job owned. What was thrown might throw in its turn.
                    std::mem::forget(panic);
                }
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let is_over;
            if state.threads == 1 {
                state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                is_over = false;
            } else {
                let (guard, waited) = self.more.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
                (state, is_over) = (guard, waited.timed_out());
            }
            state.idle -= 1;
            if is_over && state.queue.is_empty() && state.threads > 1 {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// Where the result of one piece of work arrives. `Some(None)`: it panicked.
struct Outcome<T> {
    value: Mutex<Option<Option<T>>>,
    arrived: WaitQueue,
}

impl<T> Outcome<T> {
    fn lock(&self) -> MutexGuard<'_, Option<Option<T>>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wait(&self) -> io::Result<T> {
        let value = self.arrived.wait_until(|| self.lock().take()).await;
        value.ok_or_else(|| io::Error::other("the thread that did it has panicked"))
    }
}

/// Tells that the work has ended, however it did.
struct Ending<T>(Arc<Outcome<T>>);

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        self.0.lock().get_or_insert(None);
        self.0.arrived.notify_all();
    }
}

/// Runs `work`, which may block, on another thread and gives its result. The work goes on if the future is dropped.
///
/// # Errors
/// If the system gives no thread and none waits for work, or the work panicked.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    offload_to(&POOL, work).await
}

/// As [`offload`], on a thread that does nothing else if the system gives one: for work that takes long, or waits for work that is offloaded.
///
/// # Errors
/// As [`offload`].
pub async fn offload_apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (job, outcome) = prepare(work);
    // The job is handed over afterwards: what a thread that cannot be made was given would be lost.
    let (sender, receiver) = channel::<Job>();
    match std::thread::Builder::new().name("offload apart".to_owned()).spawn(move || receiver.recv().map(|job| job())) {
        Ok(_) => sender.send(job).expect("the thread waits for it"),
        Err(_) => POOL.submit(job).map_err(refused)?,
    }
    outcome.wait().await
}

async fn offload_to<T: Send + 'static>(pool: &'static Pool, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (job, outcome) = prepare(work);
    pool.submit(job).map_err(refused)?;
    outcome.wait().await
}

fn prepare<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> (Job, Arc<Outcome<T>>) {
    let outcome = Arc::new(Outcome { value: Mutex::new(None), arrived: WaitQueue::new() });
    let ending = Ending(Arc::clone(&outcome));
    let job = move || {
        let value = work();
        *ending.0.lock() = Some(Some(value));
    };
    (Box::new(job), outcome)
}

/// Not of the kind that the system gives it, which says of other calls that they would have to wait.
fn refused((error, _): (io::Error, Job)) -> io::Error {
    io::Error::other(format!("no thread to do it: {error}"))
}

/// Runs `work`, which may block, on another thread; on this one if the system gives none.
pub fn offload_detached(work: impl FnOnce() + Send + 'static) {
    if let Err((_, job)) = POOL.submit(Box::new(work)) {
        job();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// A pool that no other test uses.
    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool::new()))
    }

    fn wait_for<T>(future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        loop {
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(value) => return value,
                Poll::Pending => std::thread::yield_now(),
            }
        }
    }

    #[test]
    fn work_that_blocks_does_not_hold_up_other_work() {
        let pool = pool();
        let together = Arc::new(Barrier::new(8));
        let mut waiting: Vec<_> = (0..8)
            .map(|number| {
                let together = Arc::clone(&together);
                let mut future = Box::pin(offload_to(pool, move || {
                    together.wait();
                    number
                }));
                assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                future
            })
            .collect();
        let results: Vec<i32> = waiting.iter_mut().map(|future| wait_for(future).expect("threads")).collect();
        assert_eq!(results, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(pool.lock().threads, 8, "one each");
    }

    #[test]
    fn work_apart_is_not_the_work_of_the_pool() {
        let name = || std::thread::current().name().map(str::to_owned);
        assert_eq!(wait_for(offload_apart(name)).expect("a thread").as_deref(), Some("offload apart"));
        assert_eq!(wait_for(offload(name)).expect("a thread").as_deref(), Some("offload"));
    }

    /// As after a time in which the system gave none.
    #[test]
    fn threads_that_were_lacking_are_made_when_work_is_taken() {
        let pool = pool();
        let together = Arc::new(Barrier::new(4));
        let mut outcomes = Vec::new();
        for _ in 0..3 {
            let together = Arc::clone(&together);
            let (job, outcome) = prepare(move || together.wait().is_leader());
            pool.lock().queue.push_back(job);
            outcomes.push(outcome);
        }
        let last = wait_for(offload_to(pool, move || together.wait().is_leader())).expect("a thread");
        let leaders = outcomes.iter().filter(|outcome| wait_for(outcome.wait()).expect("a thread")).count();
        assert_eq!(leaders + usize::from(last), 1);
        assert_eq!(pool.lock().threads, 4, "one each");
    }

    #[test]
    fn a_panic_is_an_error_and_the_thread_goes_on() {
        let pool = pool();
        for _ in 0..3 {
            let error = wait_for(offload_to(pool, || -> () { panic!("on purpose") })).expect_err("it panicked");
            assert!(error.to_string().contains("panicked"), "{error}");
        }
        assert_eq!(wait_for(offload_to(pool, || 7)).expect("a thread"), 7);
    }

    #[test]
    fn idle_threads_are_used_again() {
        let pool = pool();
        for number in 0..100 {
            assert_eq!(wait_for(offload_to(pool, move || number)).expect("a thread"), number);
            let is_idle = || {
                let state = pool.lock();
                state.idle == state.threads
            };
            while !is_idle() {
                std::thread::yield_now();
            }
        }
        assert_eq!(pool.lock().threads, 1);
    }
}

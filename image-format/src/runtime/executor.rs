//! The executor of one thread.
//!
//! Tasks stay on the thread that spawned them. Wakers work from any thread: they put the task's number into the ready list and, if the
//! thread sleeps, call its [`Unpark`]. The executor knows nothing of I/O: whoever owns the thread alternates between
//! [`run_ready`](Executor::run_ready) and waiting for completions.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

/// Wakes a thread out of its wait for I/O.
pub trait Unpark: Send + Sync + 'static {
    /// Makes the present or the next wait end at once.
    fn unpark(&self);
}

/// The tasks of one thread.
#[derive(Clone)]
pub struct Executor {
    inner: Rc<Inner>,
}

struct Inner {
    /// Futures by number, each taken out while it is polled.
    tasks: RefCell<Slab<Option<Task>>>,
    /// Wakers by number. A task with a number that one before it had gets that one's: woken once too often it is polled once too often.
    wakers: RefCell<Vec<Arc<TaskWaker>>>,
    shared: Arc<Shared>,
    batch: RefCell<Vec<usize>>,
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What wakers of other threads reach.
struct Shared {
    ready: Mutex<Vec<usize>>,
    /// Set by the thread before it sleeps. Whoever clears it has the duty to unpark.
    parked: AtomicBool,
    unpark: Box<dyn Unpark>,
}

struct TaskWaker {
    shared: Arc<Shared>,
    task: usize,
    /// Whether the task's number already is in the ready list.
    queued: AtomicBool,
}

impl Shared {
    fn make_ready(&self, task: usize) {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        // Pairs with `prepare_park`: either it sees the entry pushed above, or we see its flag.
        if self.parked.load(Ordering::SeqCst) && self.parked.swap(false, Ordering::SeqCst) {
            self.unpark.unpark();
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.shared.make_ready(self.task);
        }
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Executor>> = const { RefCell::new(None) };
}

/// Runs a task on the executor that is running on this thread.
///
/// # Panics
/// If this thread runs none: only tasks spawn tasks.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    let executor = CURRENT.with_borrow(Clone::clone).expect("tasks are spawned from tasks");
    executor.spawn(task);
}

impl Executor {
    /// An executor without tasks, whose thread is woken by `unpark`.
    pub fn new(unpark: impl Unpark) -> Self {
        let shared = Shared { ready: Mutex::new(Vec::new()), parked: AtomicBool::new(false), unpark: Box::new(unpark) };
        let (tasks, wakers, batch) = (RefCell::new(Slab::new()), RefCell::default(), RefCell::default());
        Self { inner: Rc::new(Inner { tasks, wakers, shared: Arc::new(shared), batch }) }
    }

    /// Adds a task. It is polled for the first time by the next [`run_ready`](Self::run_ready).
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let number = self.inner.tasks.borrow_mut().insert(Some(Box::pin(task)));
        let mut wakers = self.inner.wakers.borrow_mut();
        match wakers.get(number) {
            Some(waker) => waker.queued.store(true, Ordering::SeqCst),
            // Numbers are given out from the lowest on.
            None => {
                wakers.push(Arc::new(TaskWaker { shared: Arc::clone(&self.inner.shared), task: number, queued: AtomicBool::new(true) }))
            }
        }
        drop(wakers);
        self.inner.shared.make_ready(number);
    }

    /// Polls the tasks that were ready when it was called, once each. Tasks that they make ready wait for the next call. Returns how many
    /// were polled.
    pub fn run_ready(&self) -> usize {
        let outer = CURRENT.replace(Some(self.clone()));
        let mut batch = self.inner.batch.take();
        std::mem::swap(&mut batch, &mut self.inner.shared.ready.lock().unwrap_or_else(PoisonError::into_inner));
        let polled = batch.len();
        for task in batch.drain(..) {
            self.poll_task(task);
        }
        self.inner.batch.replace(batch);
        CURRENT.set(outer);
        polled
    }

    /// Whether there is a task to poll now.
    pub fn has_ready(&self) -> bool {
        !self.inner.shared.ready.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Tasks that have not ended.
    pub fn task_count(&self) -> usize {
        self.inner.tasks.borrow().len()
    }

    /// Announces that the thread is about to sleep. `false` means that a task has become ready and it must not. After the sleep call
    /// [`end_park`](Self::end_park).
    pub fn prepare_park(&self) -> bool {
        self.inner.shared.parked.store(true, Ordering::SeqCst);
        if self.has_ready() {
            self.end_park();
            return false;
        }
        true
    }

    /// Announces that the thread runs again.
    pub fn end_park(&self) {
        self.inner.shared.parked.store(false, Ordering::SeqCst);
    }

    /// Polls `future` together with all tasks; calls `idle` when nothing is ready, which must bring something about (completions, time).
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static, mut idle: impl FnMut()) -> T {
        let result = Rc::new(Cell::new(None));
        let slot = Rc::clone(&result);
        self.spawn(async move { slot.set(Some(future.await)) });
        loop {
            if let Some(value) = result.take() {
                return value;
            }
            if self.run_ready() == 0 {
                idle();
            }
        }
    }

    fn poll_task(&self, number: usize) {
        let Some(mut future) = self.inner.tasks.borrow_mut().get_mut(number).and_then(Option::take) else {
            return; // Woken once more after its end, or while it is being polled by a caller of ours.
        };
        let waker = Arc::clone(&self.inner.wakers.borrow()[number]);
        // From here on a wake-up must put the task into the list again.
        waker.queued.store(false, Ordering::SeqCst);
        let waker = Waker::from(waker);
        let poll = future.as_mut().poll(&mut Context::from_waker(&waker));
        match poll {
            Poll::Pending => {
                if let Some(task) = self.inner.tasks.borrow_mut().get_mut(number) {
                    *task = Some(future);
                }
            }
            Poll::Ready(()) => {
                let task = self.inner.tasks.borrow_mut().remove(number);
                drop(task);
                // Dropping the future may wake or spawn others, which borrows the list again: not before here.
                drop(future);
            }
        }
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executor({} tasks)", self.task_count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::WaitQueue;

    struct NoUnpark;
    impl Unpark for NoUnpark {
        fn unpark(&self) {}
    }

    #[test]
    fn a_waiting_task_goes_on_when_another_makes_its_condition_true() {
        let executor = Executor::new(NoUnpark);
        let state = Rc::new((Cell::new(0), WaitQueue::new()));
        let waiter = Rc::clone(&state);
        executor.spawn(async move {
            let seen = waiter.1.wait_until(|| (waiter.0.get() == 2).then_some(2)).await;
            waiter.0.set(seen + 1);
        });
        let setter = Rc::clone(&state);
        executor.spawn(async move {
            setter.0.set(2);
            setter.1.notify_all();
        });
        while executor.run_ready() > 0 {}
        assert_eq!(state.0.get(), 3);
        assert_eq!(executor.task_count(), 0);
    }

    #[test]
    fn wake_ups_from_another_thread_unpark() {
        struct Signal(std::sync::mpsc::SyncSender<()>);
        impl Unpark for Signal {
            fn unpark(&self) {
                self.0.send(()).expect("the test waits for it");
            }
        }
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let executor = Executor::new(Signal(sender));
        let state = Arc::new((AtomicBool::new(false), WaitQueue::new()));
        let waiter = Arc::clone(&state);
        executor.spawn(async move { waiter.1.wait_until(|| waiter.0.load(Ordering::SeqCst).then_some(())).await });
        executor.run_ready();
        assert!(executor.prepare_park());
        let setter = std::thread::spawn(move || {
            state.0.store(true, Ordering::SeqCst);
            state.1.notify_all();
        });
        receiver.recv().expect("the waker unparks");
        executor.end_park();
        executor.run_ready();
        assert_eq!(executor.task_count(), 0);
        setter.join().expect("the setter does not panic");
    }

    #[test]
    fn tasks_spawn_tasks() {
        let executor = Executor::new(NoUnpark);
        let count = Rc::new(Cell::new(0));
        let inner = Rc::clone(&count);
        executor.spawn(async move {
            spawn(async move { inner.set(inner.get() + 1) });
        });
        assert_eq!(executor.run_ready(), 1);
        assert_eq!(executor.run_ready(), 1);
        assert_eq!(count.get(), 1);
    }
}

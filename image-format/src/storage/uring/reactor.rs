//! The ring of one thread: its operations, its watches, its wait.
//!
//! ```text
//!            submit                    completion: finished
//! (nothing) ───────▶ Running ──────────────────────────────────▶ Done ──▶ taken by its future
//!                      │  ▲                                        │
//!        future dropped│  └─ completion: again, or more to come    └─ future dropped: gone
//!                      ▼
//!                   Running, orphaned ── completion: finished ──▶ gone
//! ```
//!
//! Whatever the kernel may still touch belongs to the operation, not to its future, and is freed after the last completion only.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;
use slab::Slab;

use super::operation::{CallKind, CallWork, Next, Output, TransferWork, WatchWork, Work};
use super::probe::{self, Tier};
use crate::runtime::{Executor, Unpark};

/// User data of the poll on the wake-up descriptor. Operations use a slab key and a generation, which never reach these.
const WAKE: u64 = u64::MAX;
/// User data of submissions whose completion says nothing.
const IGNORED: u64 = u64::MAX - 1;
/// How long a thread that ends waits for the kernel to finish with its memory, before it leaves that memory to it for ever.
const LAST_WAIT: Duration = Duration::from_secs(10);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// One io_uring with the tasks of its thread. Clones share both; none leaves the thread that made it.
#[derive(Clone)]
pub struct Reactor {
    // Dropped first: tasks hold futures, whose operations the ring then waits for.
    executor: Executor,
    ring: Rc<Ring>,
}

/// How long a [`Reactor::turn`] may wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all. Without anything to submit or to fetch this makes no system call.
    No,
    /// As long as it takes.
    Forever,
    /// Until this time on the clock of [`Environment::now`](crate::storage::Environment::now) (`CLOCK_MONOTONIC`).
    Until(Duration),
}

impl Reactor {
    /// A reactor for the calling thread, whose ring takes `entries` submissions at a time. More operations than that may be under way.
    ///
    /// # Errors
    /// With an explanation, if the system forbids io_uring or its kernel is too old.
    pub fn new(entries: u32) -> io::Result<Self> {
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let ring = Rc::new(Ring::new(entries, Arc::clone(&wake))?);
        ring.arm_wake();
        Ok(Self { executor: Executor::new(WakeDescriptor(wake)), ring })
    }

    /// How this kernel delivers completions.
    pub fn tier(&self) -> Tier {
        self.ring.tier
    }

    /// The executor whose wakers end this reactor's waits.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Makes this the thread's current reactor, which files and environment use, until the answer is dropped.
    pub fn enter(&self) -> Entered<'_> {
        Entered { outer: CURRENT.replace(Some(Rc::clone(&self.ring))), reactor: PhantomData }
    }

    /// Reports `token` through [`take_events`](Self::take_events) whenever `fd` becomes readable, at first at once if it is already. The
    /// descriptor is never read: for an eventfd each signal is a new readiness, for others the owner reads until there is nothing left.
    ///
    /// A descriptor whose other end is closed, or that cannot be waited for, is reported a last time and then no more.
    pub fn watch(&self, fd: OwnedFd, token: u64) -> Watch {
        let key = self.ring.start(Work::Watch(WatchWork::new(fd, token)));
        Watch { handle: Handle { ring: Rc::clone(&self.ring), key } }
    }

    /// Appends the tokens of the watches that have become ready since the last call, each once.
    pub fn take_events(&self, into: &mut Vec<u64>) {
        self.ring.take_events(into);
    }

    /// Hands queued submissions to the kernel, waits as far as `wait` allows and nothing is ready (no task, no event, no completion), and
    /// processes the completions that have arrived. Returns early for signals and wake-ups.
    ///
    /// # Errors
    /// If the kernel does not accept the ring's submissions at all, which has no remedy.
    pub fn turn(&self, wait: Wait) -> io::Result<()> {
        self.turn_unless(wait, self.ring.has_events())
    }

    /// A turn that does not wait if `something_to_do`.
    fn turn_unless(&self, wait: Wait, something_to_do: bool) -> io::Result<()> {
        let sleeps = wait != Wait::No && !something_to_do && !self.ring.has_completions() && self.executor.prepare_park();
        let entered = self.ring.submit(if sleeps { wait } else { Wait::No });
        if sleeps {
            self.executor.end_park();
        }
        self.ring.dispatch();
        entered
    }

    /// Runs this thread's tasks and `future` until it ends, as the thread's current reactor.
    ///
    /// # Errors
    /// If the ring fails; the future then stays behind as a task.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> io::Result<T> {
        let _entered = self.enter();
        let result = Rc::new(Cell::new(None));
        let slot = Rc::clone(&result);
        self.executor.spawn(async move { slot.set(Some(future.await)) });
        loop {
            self.executor.run_ready();
            if let Some(value) = result.take() {
                return Ok(value);
            }
            // Events are for whoever calls `take_events` later.
            self.turn_unless(Wait::Forever, false)?;
        }
    }
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reactor({}, {:?})", self.ring.tier, self.executor)
    }
}

/// Keeps a reactor the current one of its thread.
#[derive(Debug)]
pub struct Entered<'a> {
    outer: Option<Rc<Ring>>,
    reactor: PhantomData<&'a Reactor>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Outside of the borrow: the last handle of a ring waits for its operations.
        let inner = CURRENT.replace(self.outer.take());
        drop(inner);
    }
}

/// A descriptor that is being watched. Dropping it ends that, and events of it that were not taken yet are forgotten.
#[derive(Debug)]
pub struct Watch {
    #[expect(dead_code, reason = "what counts is that it is dropped")]
    handle: Handle,
}

struct WakeDescriptor(Arc<OwnedFd>);

impl Unpark for WakeDescriptor {
    fn unpark(&self) {
        // It fails only if the counter is full, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// The ring behind a reactor, as futures hold it.
pub(super) struct Ring {
    tier: Tier,
    truncates: bool,
    wake: Arc<OwnedFd>,
    /// Never borrowed while foreign code runs (wakers, destructors of buffers).
    state: RefCell<State>,
}

struct State {
    uring: IoUring,
    operations: Slab<Operation>,
    generation: u32,
    /// Submissions that found the queue full, oldest first.
    backlog: VecDeque<squeue::Entry>,
    /// Slab keys of the watches to report.
    ready: Vec<usize>,
    /// Completions being processed; here only to keep its memory.
    batch: Vec<(u64, i32, u32)>,
}

struct Operation {
    generation: u32,
    stage: Stage,
    waker: Option<Waker>,
}

enum Stage {
    Running { work: Work, is_orphaned: bool },
    Done(Output),
}

/// The number of an operation and the right to its outcome. Dropping it leaves the operation alone until it has ended.
struct Handle {
    ring: Rc<Ring>,
    key: usize,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "operation {}", self.key)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.ring.abandon(self.key);
    }
}

/// An operation under way.
pub(super) struct Submitted(Option<Handle>);

impl Future for Submitted {
    type Output = Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Output> {
        let handle = self.0.as_ref().expect("a future is not polled after its end");
        match handle.ring.take_output(handle.key, context.waker()) {
            None => Poll::Pending,
            Some(output) => {
                // The number may belong to another operation from here on.
                if let Some(handle) = self.0.take() {
                    handle.forget();
                }
                Poll::Ready(output)
            }
        }
    }
}

impl Handle {
    /// Gives up the number without touching the operation.
    fn forget(mut self) {
        self.key = usize::MAX;
    }
}

/// The ring of the thread's current reactor.
///
/// # Panics
/// If the thread has entered none.
pub(super) fn current() -> Rc<Ring> {
    CURRENT.with_borrow(Clone::clone).expect("files are used on a thread that has entered a reactor")
}

impl Ring {
    fn new(entries: u32, wake: Arc<OwnedFd>) -> io::Result<Self> {
        let probe::Capable { uring, tier, truncates } = probe::build(entries)?;
        let state = State { uring, operations: Slab::new(), generation: 0, backlog: VecDeque::new(), ready: Vec::new(), batch: Vec::new() };
        Ok(Self { tier, truncates, wake, state: RefCell::new(state) })
    }

    /// Whether lengths can be set through the ring.
    pub(super) fn truncates(&self) -> bool {
        self.truncates
    }

    /// Starts a transfer.
    pub(super) fn transfer(self: &Rc<Self>, transfer: TransferWork) -> Submitted {
        let key = self.start(Work::Transfer(transfer));
        Submitted(Some(Handle { ring: Rc::clone(self), key }))
    }

    /// Starts an operation of one submission.
    ///
    /// # Safety
    /// Everything that `entry` points to, its file descriptor included, must stay valid and in place for as long as `keep` lives.
    pub(super) unsafe fn call(self: &Rc<Self>, entry: squeue::Entry, kind: CallKind, keep: Rc<dyn Any>) -> Submitted {
        // SAFETY: promised by our caller.
        let call = unsafe { CallWork::new(entry, kind, keep) };
        let key = self.start(Work::Call(call));
        Submitted(Some(Handle { ring: Rc::clone(self), key }))
    }

    fn start(&self, mut work: Work) -> usize {
        let mut state = self.state.borrow_mut();
        let generation = state.generation;
        state.generation = generation.wrapping_add(1);
        let entry = work.entry();
        let key = state.operations.insert(Operation { generation, stage: Stage::Running { work, is_orphaned: false }, waker: None });
        state.push(entry.user_data(user_data(key, generation)));
        key
    }

    fn arm_wake(&self) {
        let entry = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        self.state.borrow_mut().push(entry.user_data(WAKE));
    }

    fn has_events(&self) -> bool {
        !self.state.borrow().ready.is_empty()
    }

    fn has_completions(&self) -> bool {
        !self.state.borrow_mut().uring.completion().is_empty()
    }

    fn take_events(&self, into: &mut Vec<u64>) {
        let state = &mut *self.state.borrow_mut();
        for key in state.ready.drain(..) {
            if let Some(operation) = state.operations.get_mut(key) {
                match &mut operation.stage {
                    Stage::Running { work: Work::Watch(watch), .. } => {
                        watch.is_reported = false;
                        into.push(watch.token);
                    }
                    Stage::Done(Output::WatchEnded(token)) => into.push(*token),
                    Stage::Running { .. } | Stage::Done(_) => {}
                }
            }
        }
    }

    fn take_output(&self, key: usize, waker: &Waker) -> Option<Output> {
        let mut state = self.state.borrow_mut();
        let operation = state.operations.get_mut(key).expect("an operation stays until its outcome is taken");
        if matches!(operation.stage, Stage::Running { .. }) {
            match &mut operation.waker {
                Some(known) => known.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
            return None;
        }
        match state.operations.remove(key).stage {
            Stage::Done(output) => Some(output),
            Stage::Running { .. } => unreachable!("looked at just above"),
        }
    }

    /// Nobody waits for operation `key` any more.
    fn abandon(&self, key: usize) {
        let mut state = self.state.borrow_mut();
        let Some(operation) = state.operations.get_mut(key) else { return };
        let waker = operation.waker.take();
        let target = user_data(key, operation.generation);
        let mut finished = None;
        match &mut operation.stage {
            Stage::Running { work, is_orphaned } => {
                *is_orphaned = true;
                let is_watch = matches!(work, Work::Watch(_));
                if work.is_endless() {
                    state.push(opcode::AsyncCancel::new(target).build().user_data(IGNORED));
                }
                if is_watch {
                    state.ready.retain(|ready| *ready != key);
                }
            }
            Stage::Done(_) => {
                state.ready.retain(|ready| *ready != key);
                finished = Some(state.operations.remove(key));
            }
        }
        // Destructors may come back to us.
        drop(state);
        drop(finished);
        drop(waker);
    }

    /// Hands everything queued to the kernel and waits as told.
    fn submit(&self, wait: Wait) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        loop {
            state.refill();
            let is_last = state.backlog.is_empty();
            let answer = match wait {
                Wait::Forever if is_last => state.uring.submit_and_wait(1),
                Wait::Until(deadline) if is_last => match deadline.checked_sub(super::environment::monotonic()) {
                    Some(left) if !left.is_zero() => {
                        let timespec = types::Timespec::from(left);
                        state.uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
                    }
                    _ => state.uring.submit(),
                },
                Wait::No if is_last && !state.has_work_for_kernel() => return Ok(()),
                _ => state.uring.submit(),
            };
            match answer {
                Ok(_) if is_last => return Ok(()),
                Ok(_) => {}
                // Signals and deadlines end a wait; the other two pass when completions have been taken and memory is free again.
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Processes the completions that have arrived.
    fn dispatch(&self) {
        let mut batch = {
            let state = &mut *self.state.borrow_mut();
            let mut batch = std::mem::take(&mut state.batch);
            batch.extend(state.uring.completion().map(|completion| (completion.user_data(), completion.result(), completion.flags())));
            batch
        };
        for (user_data, result, flags) in batch.drain(..) {
            let more = io_uring::cqueue::more(flags);
            match user_data {
                IGNORED => {}
                WAKE if more => {}
                WAKE => self.arm_wake(),
                _ => self.complete(user_data, result, more),
            }
        }
        self.state.borrow_mut().batch = batch;
    }

    fn complete(&self, user_data: u64, result: i32, more: bool) {
        let (key, generation) = split_user_data(user_data);
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let Some(operation) = state.operations.get_mut(key).filter(|operation| operation.generation == generation) else {
            debug_assert!(false, "a completion of an operation that is gone");
            return;
        };
        let Stage::Running { work, is_orphaned } = &mut operation.stage else {
            debug_assert!(false, "a completion of an operation that has ended");
            return;
        };
        if let Work::Watch(watch) = work
            && !watch.is_reported
            && !*is_orphaned
        {
            watch.is_reported = true;
            state.ready.push(key);
        }
        let is_orphaned = *is_orphaned;
        match work.advance(result, more) {
            Next::Wait => {}
            Next::Again if is_orphaned && work.is_endless() => {
                let gone = state.operations.remove(key);
                drop(guard);
                drop(gone);
            }
            Next::Again => {
                let entry = work.entry();
                state.push(entry.user_data(user_data));
            }
            Next::Finished(output) => {
                let waker = operation.waker.take();
                let spent = std::mem::replace(&mut operation.stage, Stage::Done(output));
                let gone = is_orphaned.then(|| state.operations.remove(key));
                // Wakers and destructors may come back to us.
                drop(guard);
                drop((spent, gone));
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }
}

impl State {
    /// Queues a submission. Room is made if there is none; the kernel sees it with the next turn at the latest.
    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        if let Err(entry) = self.try_push(entry) {
            // Whatever goes wrong here goes wrong again at the next turn, which reports it.
            let _ = self.uring.submit();
            if let Err(entry) = self.try_push(entry) {
                self.backlog.push_back(entry);
            }
        }
    }

    fn try_push(&mut self, entry: squeue::Entry) -> Result<(), squeue::Entry> {
        // SAFETY: what the entry points to is owned by an operation in `operations` (or by the ring itself), which goes only after the
        // entry's last completion.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.map_err(|_| entry)
    }

    /// Moves as much of the backlog into the queue as has room.
    fn refill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if let Err(entry) = self.try_push(entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Whether there is something to submit, or completions that only a system call brings in.
    fn has_work_for_kernel(&mut self) -> bool {
        let submission = self.uring.submission();
        !submission.is_empty() || submission.taskrun() || submission.cq_overflow()
    }

    /// Whether the kernel may still touch memory that an operation owns.
    fn is_busy(&self) -> bool {
        self.operations.iter().any(|(_, operation)| matches!(operation.stage, Stage::Running { .. }))
    }
}

impl Drop for Ring {
    /// Waits for the kernel to be done with our memory. What a medium that hangs still holds is leaked rather than freed under it.
    fn drop(&mut self) {
        let targets: Vec<u64> = {
            let state = self.state.borrow();
            let is_endless = |operation: &Operation| matches!(&operation.stage, Stage::Running { work, .. } if work.is_endless());
            let endless = state.operations.iter().filter(|(_, operation)| is_endless(operation));
            endless.map(|(key, operation)| user_data(key, operation.generation)).collect()
        };
        for target in targets {
            self.state.borrow_mut().push(opcode::AsyncCancel::new(target).build().user_data(IGNORED));
        }
        let deadline = super::environment::monotonic() + LAST_WAIT;
        while self.state.borrow().is_busy() && super::environment::monotonic() < deadline {
            if self.submit(Wait::Until(deadline)).is_err() {
                break;
            }
            self.dispatch();
        }
        let state = self.state.get_mut();
        if state.is_busy() {
            let count = state.operations.len();
            tracing::warn!(count, "operations are still under way at the end of their thread; their memory is left to the kernel");
            std::mem::forget(std::mem::take(&mut state.operations));
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({}, wake {:?})", self.tier, self.wake.as_fd())
    }
}

fn user_data(key: usize, generation: u32) -> u64 {
    let key = u32::try_from(key).expect("fewer operations than would fill the memory");
    u64::from(generation) << 32 | u64::from(key)
}

fn split_user_data(user_data: u64) -> (usize, u32) {
    ((user_data & 0xffff_ffff) as usize, (user_data >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::runtime::{self, WaitQueue};
    use crate::storage::Environment;
    use crate::storage::uring::UringEnvironment;

    fn eventfd() -> OwnedFd {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
    }

    fn signal(fd: &OwnedFd) {
        rustix::io::write(fd, &1_u64.to_ne_bytes()).expect("an eventfd takes a signal");
    }

    fn events(reactor: &Reactor) -> Vec<u64> {
        let mut events = Vec::new();
        reactor.take_events(&mut events);
        events
    }

    #[test]
    fn a_waker_on_another_thread_ends_the_wait() {
        let reactor = Reactor::new(8).expect("a reactor");
        let shared = Arc::new((AtomicUsize::new(0), WaitQueue::new()));
        let other = Arc::clone(&shared);
        let setter = std::thread::spawn(move || {
            for _ in 0..1000 {
                other.0.fetch_add(1, Ordering::SeqCst);
                other.1.notify_all();
            }
        });
        let seen = reactor.block_on(async move {
            for count in 1..=1000 {
                shared.1.wait_until(|| (shared.0.load(Ordering::SeqCst) >= count).then_some(())).await;
            }
            shared.0.load(Ordering::SeqCst)
        });
        assert_eq!(seen.expect("the ring works"), 1000);
        setter.join().expect("the setter does not panic");
    }

    #[test]
    fn a_watched_eventfd_is_reported_for_each_signal_without_being_read() {
        let reactor = Reactor::new(8).expect("a reactor");
        let (kick, other) = (eventfd(), eventfd());
        let watch = reactor.watch(kick.try_clone().expect("a second descriptor"), 7);
        let _second = reactor.watch(other.try_clone().expect("a second descriptor"), 8);
        reactor.turn(Wait::No).expect("a turn");
        assert_eq!(events(&reactor), []);
        for _ in 0..100 {
            signal(&kick);
            while !reactor.ring.has_events() {
                reactor.turn(Wait::Forever).expect("a turn");
            }
            assert_eq!(events(&reactor), [7]);
        }
        signal(&other);
        signal(&kick);
        while reactor.ring.state.borrow().ready.len() < 2 {
            reactor.turn(Wait::No).expect("a turn");
        }
        // An event that nobody has taken keeps the thread awake, and dies with its watch.
        reactor.turn(Wait::Forever).expect("a turn");
        drop(watch);
        assert_eq!(events(&reactor), [8]);
        signal(&kick);
        signal(&other);
        while !reactor.ring.has_events() {
            reactor.turn(Wait::Forever).expect("a turn");
        }
        assert_eq!(events(&reactor), [8]);
        assert_eq!(reactor.ring.state.borrow().operations.len(), 1, "the dropped watch is gone");
    }

    #[test]
    fn a_descriptor_that_is_readable_already_is_reported_at_once() {
        let reactor = Reactor::new(8).expect("a reactor");
        let kick = eventfd();
        signal(&kick);
        let _watch = reactor.watch(kick, 3);
        while !reactor.ring.has_events() {
            reactor.turn(Wait::Forever).expect("a turn");
        }
        assert_eq!(events(&reactor), [3]);
    }

    #[test]
    fn a_closed_peer_is_reported_once_more_and_not_for_ever() {
        let reactor = Reactor::new(8).expect("a reactor");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        let watch = reactor.watch(ours.into(), 5);
        drop(theirs);
        while !reactor.ring.has_events() {
            reactor.turn(Wait::Forever).expect("a turn");
        }
        assert_eq!(events(&reactor), [5]);
        reactor.turn(Wait::Until(UringEnvironment.now() + Duration::from_millis(20))).expect("a turn");
        assert!(events(&reactor).is_empty());
        drop(watch);
        while !reactor.ring.state.borrow().operations.is_empty() {
            reactor.turn(Wait::Forever).expect("a turn");
        }
    }

    #[test]
    fn timers_end_in_the_order_of_their_deadlines() {
        let reactor = Reactor::new(8).expect("a reactor");
        let order = reactor.block_on(async {
            let order = Rc::new(RefCell::new(Vec::new()));
            let done = Rc::new(WaitQueue::new());
            let start = UringEnvironment.now();
            for number in [3_u64, 1, 2, 0] {
                let (order, done) = (Rc::clone(&order), Rc::clone(&done));
                let deadline = start + Duration::from_millis(10 * number);
                runtime::spawn(async move {
                    UringEnvironment.sleep_until(deadline).await;
                    assert!(UringEnvironment.now() >= deadline);
                    order.borrow_mut().push(number);
                    done.notify_all();
                });
            }
            done.wait_until(|| (order.borrow().len() == 4).then_some(())).await;
            order.take()
        });
        assert_eq!(order.expect("the ring works"), [0, 1, 2, 3]);
    }

    #[test]
    fn a_dropped_timer_is_cancelled() {
        let reactor = Reactor::new(8).expect("a reactor");
        let far = UringEnvironment.now() + Duration::from_secs(1 << 30);
        let ring = Rc::clone(&reactor.ring);
        reactor
            .block_on(async move {
                for _ in 0..100 {
                    let mut sleep = Box::pin(UringEnvironment.sleep_until(far));
                    std::future::poll_fn(|context| {
                        assert!(sleep.as_mut().poll(context).is_pending());
                        Poll::Ready(())
                    })
                    .await;
                }
                while !ring.state.borrow().operations.is_empty() {
                    UringEnvironment.sleep_until(UringEnvironment.now() + Duration::from_millis(1)).await;
                }
            })
            .expect("the ring works");
    }

    #[test]
    fn a_turn_until_a_deadline_ends_without_any_event() {
        let reactor = Reactor::new(8).expect("a reactor");
        let deadline = UringEnvironment.now() + Duration::from_millis(5);
        while UringEnvironment.now() < deadline {
            reactor.turn(Wait::Until(deadline)).expect("a turn");
        }
    }

    #[test]
    fn the_inner_reactor_is_current_until_its_guard_goes() {
        let (outer, inner) = (Reactor::new(8).expect("a reactor"), Reactor::new(8).expect("a reactor"));
        let _outer = outer.enter();
        {
            let _inner = inner.enter();
            assert!(Rc::ptr_eq(&current(), &inner.ring));
        }
        assert!(Rc::ptr_eq(&current(), &outer.ring));
    }
}

//! The ring of one thread and the operations that it carries.
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
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;

use super::environment::monotonic;
use super::operation::{CallKind, CallWork, Next, Output, WatchWork, Work};
use super::probe::{Capable, Tier};
use super::reactor::Wait;
use super::transfer::TransferWork;

/// User data of the poll on the wake-up descriptor. Operations use a slab key and a generation, which never reach these.
const WAKE: u64 = u64::MAX;
/// User data of submissions whose completion says nothing.
const IGNORED: u64 = u64::MAX - 1;
/// How long a thread that ends waits for the kernel to finish with its memory, before it leaves that memory to it for ever.
const LAST_WAIT: Duration = Duration::from_secs(10);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// The ring behind a reactor, as futures hold it.
pub(super) struct Ring {
    tier: Tier,
    truncates: bool,
    /// Watched without being read: each signal is a new completion.
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
pub(super) struct Handle {
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

/// Makes `ring` (or none) the one that this thread's files use; the answer is the one before.
pub(super) fn set_current(ring: Option<Rc<Ring>>) -> Option<Rc<Ring>> {
    CURRENT.replace(ring)
}

/// The ring of the thread's current reactor.
///
/// # Panics
/// If the thread has entered none.
pub(super) fn current() -> Rc<Ring> {
    CURRENT.with_borrow(Clone::clone).expect("files are used on a thread that has entered a reactor")
}

impl Ring {
    /// The ring of the calling thread, with the descriptor that ends its waits.
    pub(super) fn new(capable: Capable, wake: Arc<OwnedFd>) -> Self {
        let Capable { uring, tier, truncates } = capable;
        let state = State { uring, operations: Slab::new(), generation: 0, backlog: VecDeque::new(), ready: Vec::new(), batch: Vec::new() };
        let ring = Self { tier, truncates, wake, state: RefCell::new(state) };
        ring.arm_wake();
        ring
    }

    /// How this kernel delivers completions.
    pub(super) fn tier(&self) -> Tier {
        self.tier
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

    /// Starts watching a descriptor.
    pub(super) fn watch(self: &Rc<Self>, fd: OwnedFd, token: u64) -> Handle {
        let key = self.start(Work::Watch(WatchWork::new(fd, token)));
        Handle { ring: Rc::clone(self), key }
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

    pub(super) fn has_events(&self) -> bool {
        !self.state.borrow().ready.is_empty()
    }

    pub(super) fn has_completions(&self) -> bool {
        !self.state.borrow_mut().uring.completion().is_empty()
    }

    pub(super) fn take_events(&self, into: &mut Vec<u64>) {
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
            if operation.waker.as_ref().is_none_or(|known| !known.will_wake(waker)) {
                let outdated = operation.waker.replace(waker.clone());
                drop(state);
                drop(outdated);
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
    pub(super) fn submit(&self, wait: Wait) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        loop {
            state.refill();
            let is_last = state.backlog.is_empty();
            let answer = match wait {
                Wait::Forever if is_last => state.uring.submit_and_wait(1),
                Wait::Until(deadline) if is_last => match deadline.checked_sub(monotonic()) {
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
    pub(super) fn dispatch(&self) {
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
        let deadline = monotonic() + LAST_WAIT;
        while self.state.borrow().is_busy() && monotonic() < deadline {
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
impl Ring {
    /// Operations that the kernel has or whose outcome nobody has taken.
    pub(super) fn operation_count(&self) -> usize {
        self.state.borrow().operations.len()
    }

    /// Watches that wait to be reported.
    pub(super) fn event_count(&self) -> usize {
        self.state.borrow().ready.len()
    }
}

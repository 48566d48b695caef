//! The fence: how any number of stacks switch to new views at one point in time, while requests go on.
//!
//! A generation counter is shared by all queue threads (participants). Each shows in its mark what it knows: *parked*, it takes nothing from a
//! ring before it has looked at the counter again; or *running* with the generation whose views it has loaded. To switch, the new views are
//! published and then the generation advances. From then on a participant that is parked, or shows the new generation, can no longer take a
//! request into an old view. When all participants that serve the group are there, the fence is released.
//!
//! Completions of requests that belong to a new view are held until then. So no result of a request from after the cut is visible while a
//! request could still be taken before it, and the cut is consistent over all queues of all devices.
//!
//! States of a fence: `Held` → `Released` or `Expired`, once. A view made with a fence holds completions only while it is `Held`.
//!
//! Atomics are sequentially consistent throughout: a participant first shows itself as looking and then reads the counter, a fence first
//! advances the counter and then reads the marks, so at least one of the two sees the other.

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use crate::runtime::WaitQueue;
use crate::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Shown by a participant that takes nothing before its next look at the generation.
const PARKED: u64 = 0;
/// Shown between the end of parking and the look at the generation.
const LOOKING: u64 = 1;
/// The first generation.
const FIRST: u64 = 2;

const HELD: u8 = 0;
const RELEASED: u8 = 1;
const EXPIRED: u8 = 2;

/// What one queue thread shows to fences.
#[derive(Debug)]
struct Mark(AtomicU64);

impl Mark {
    /// Whether its thread can no longer take a request into a view older than `generation`.
    fn has_passed(&self, generation: u64) -> bool {
        let shown = self.0.load(SeqCst);
        shown == PARKED || shown >= generation
    }
}

/// The marks of the threads that serve one stack.
#[derive(Debug, Default)]
pub(super) struct Marks(Mutex<Vec<Arc<Mark>>>);

impl Marks {
    fn all_passed(&self, generation: u64) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().all(|mark| mark.has_passed(generation))
    }
}

/// All queue threads of one daemon, and the generation that they watch.
pub struct FenceDomain {
    generation: AtomicU64,
    /// Fences that are switching. The count beside it lets threads pass without the lock.
    pending: Mutex<Vec<Arc<Fence>>>,
    pending_count: AtomicUsize,
    /// There is a new one.
    has_pending: Condvar,
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
}

impl FenceDomain {
    /// A domain without threads. `clock` is a monotonic clock, for the figures that fences report.
    pub fn new(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(FIRST),
            pending: Mutex::default(),
            pending_count: AtomicUsize::new(0),
            has_pending: Condvar::new(),
            clock: Box::new(clock),
        })
    }

    /// Adds a queue thread, parked.
    pub fn join(self: &Arc<Self>) -> Participant {
        Participant { domain: Arc::clone(self), mark: Arc::new(Mark(AtomicU64::new(PARKED))), parked: true, seen: 0 }
    }

    /// A fence, held, for the stacks whose next views are prepared with it.
    pub fn fence(self: &Arc<Self>) -> Arc<Fence> {
        Arc::new(Fence {
            domain: Arc::clone(self),
            state: AtomicU8::new(HELD),
            generation: AtomicU64::new(u64::MAX),
            deadline: OnceLock::new(),
            members: Mutex::default(),
            ended: WaitQueue::new(),
            times: Mutex::default(),
        })
    }

    /// Lets every running participant load its views again at its next turn.
    pub(super) fn advance(&self) -> u64 {
        self.generation.fetch_add(1, SeqCst) + 1
    }

    /// Expires fences whose deadline has passed, for ever. For a thread of its own: whoever waits for a fence among other work may be held up by
    /// a file server that hangs, and guests must not wait for it.
    pub fn expire_overdue(&self) -> ! {
        loop {
            let now = (self.clock)();
            let (pending, next) = self.expire_due(now);
            let known = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if known.iter().any(|fence| !pending.iter().any(|looked_at| Arc::ptr_eq(looked_at, fence))) {
                continue;
            }
            drop(pending);
            match next {
                None => drop(self.has_pending.wait(known)),
                Some(deadline) => drop(self.has_pending.wait_timeout(known, deadline.saturating_sub(now))),
            }
        }
    }

    /// Expires the fences whose deadline is `now` or has passed. Returns all it has looked at, and the next deadline.
    pub(super) fn expire_due(&self, now: Duration) -> (Vec<Arc<Fence>>, Option<Duration>) {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let deadlines = pending.iter().filter_map(|fence| fence.deadline().map(|deadline| (deadline, fence)));
        let mut next = None;
        for (deadline, fence) in deadlines {
            if deadline <= now {
                fence.expire();
            } else {
                next = Some(next.map_or(deadline, |earlier: Duration| earlier.min(deadline)));
            }
        }
        (pending, next)
    }

    fn release_passed(&self) {
        if self.pending_count.load(SeqCst) == 0 {
            return;
        }
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for fence in pending {
            fence.release_if_passed();
        }
    }

    fn forget(&self, fence: &Fence) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.retain(|other| !std::ptr::eq(Arc::as_ptr(other), fence));
        self.pending_count.store(pending.len(), SeqCst);
    }
}

impl fmt::Debug for FenceDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FenceDomain(generation {})", self.generation.load(SeqCst))
    }
}

/// One queue thread. It starts parked.
#[derive(Debug)]
pub struct Participant {
    domain: Arc<FenceDomain>,
    mark: Arc<Mark>,
    parked: bool,
    seen: u64,
}

impl Participant {
    /// Call first in every turn of the thread's loop, before anything is taken from a ring. Calls `reload` if views may have changed since the
    /// last turn, or if the thread was parked: it must load every view that the thread uses again ([`Stack::view`](super::Stack::view)).
    pub fn begin_turn(&mut self, reload: impl FnOnce()) {
        if self.parked {
            self.mark.0.store(LOOKING, SeqCst);
        }
        let generation = self.domain.generation.load(SeqCst);
        if !self.parked && generation == self.seen {
            return;
        }
        reload();
        self.parked = false;
        self.seen = generation;
        self.mark.0.store(generation, SeqCst);
        self.domain.release_passed();
    }

    /// Whether views may have changed since the turn began. Ask after reading a ring's index and before taking what it shows: a thread that was
    /// held up meanwhile may find requests there that follow from the results of requests in newer views (a fence that has
    /// expired holds no results back), and those must not go to an older view.
    pub fn is_stale(&self) -> bool {
        self.domain.generation.load(SeqCst) != self.seen
    }

    /// Call before sleeping, after dropping every view that the thread keeps for itself (those of requests under way stay): a kept one would
    /// delay the freezing of layers for as long as the thread sleeps. Until the next [`begin_turn`](Self::begin_turn) nothing may be taken
    /// from a ring.
    pub fn park(&mut self) {
        if self.parked {
            return;
        }
        self.parked = true;
        self.mark.0.store(PARKED, SeqCst);
        self.domain.release_passed();
    }

    /// Announces that this thread takes requests for a stack, for as long as the attachment lives. Call before its first
    /// [`Stack::view`](super::Stack::view), while parked or in `reload`.
    pub(super) fn attach(&self, marks: &Arc<Marks>) -> Attachment {
        marks.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&self.mark));
        Attachment { domain: Arc::clone(&self.domain), marks: Arc::clone(marks), mark: Arc::clone(&self.mark) }
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.park();
    }
}

/// That a queue thread serves a stack; ends when dropped.
#[derive(Debug)]
#[must_use = "a thread that is not attached is not waited for by fences"]
pub struct Attachment {
    domain: Arc<FenceDomain>,
    marks: Arc<Marks>,
    mark: Arc<Mark>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut marks = self.marks.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(position) = marks.iter().position(|mark| Arc::ptr_eq(mark, &self.mark)) {
            marks.swap_remove(position);
        }
        drop(marks);
        self.domain.release_passed();
    }
}

/// How a fence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceOutcome {
    /// Every participant passed in time: the cut is one point in time.
    Released,
    /// The deadline came first: completions go on, and there is no snapshot.
    Expired,
}

/// What a fence measured, over all its members or of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FenceTimes {
    /// From the moment in which the first participant may pass the cut until the last one has.
    pub switch: Duration,
    /// The longest time for which a completion was held.
    pub longest_hold: Duration,
}

#[derive(Debug, Default)]
struct Times {
    began: Duration,
    measured: FenceTimes,
}

/// One stack's part in a fence.
#[derive(Debug)]
struct Part {
    marks: Arc<Marks>,
    measured: Mutex<PartTimes>,
}

#[derive(Debug, Default)]
struct PartTimes {
    /// When its participants had passed, since the switch began.
    passed: Option<Duration>,
    longest_hold: Duration,
}

impl Part {
    fn measured(&self) -> MutexGuard<'_, PartTimes> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all participants of this stack have passed; takes note of when. Who has passed once never takes into an old view again.
    fn has_passed(&self, generation: u64, since_began: Duration) -> bool {
        let passed = self.marks.all_passed(generation);
        if passed {
            self.measured().passed.get_or_insert(since_began);
        }
        passed
    }
}

/// A stack's membership in a fence, as its views have it.
#[derive(Clone, Debug)]
pub struct FenceMember {
    fence: Arc<Fence>,
    part: Arc<Part>,
}

impl FenceMember {
    /// The fence.
    pub fn fence(&self) -> &Arc<Fence> {
        &self.fence
    }

    /// What was measured of this stack alone; complete once the held completions have gone on.
    pub fn times(&self) -> FenceTimes {
        let whole = self.fence.times();
        let measured = self.part.measured();
        FenceTimes { switch: measured.passed.unwrap_or(whole.switch), longest_hold: measured.longest_hold }
    }

    /// Ends when a completion may be published, and measures how long it was held.
    pub(super) async fn hold_completion(&self) {
        if self.fence.state.load(SeqCst) != HELD {
            return;
        }
        let clock = &self.fence.domain.clock;
        let began = clock();
        self.fence.ended().await;
        let held = clock().saturating_sub(began);
        {
            let mut measured = self.part.measured();
            measured.longest_hold = measured.longest_hold.max(held);
        }
        let mut times = self.fence.lock_times();
        times.measured.longest_hold = times.measured.longest_hold.max(held);
    }
}

/// One switch of any number of stacks. See the module's description.
pub struct Fence {
    domain: Arc<FenceDomain>,
    state: AtomicU8,
    /// What participants must show; the maximum before the switch, so that nobody has passed yet.
    generation: AtomicU64,
    /// When it expires by itself, if somebody looks ([`FenceDomain::expire_overdue`]).
    deadline: OnceLock<Duration>,
    members: Mutex<Vec<Arc<Part>>>,
    ended: WaitQueue,
    times: Mutex<Times>,
}

impl Fence {
    pub(super) fn add_member(self: &Arc<Self>, marks: &Arc<Marks>) -> FenceMember {
        let part = Arc::new(Part { marks: Arc::clone(marks), measured: Mutex::default() });
        self.members.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&part));
        FenceMember { fence: Arc::clone(self), part }
    }

    fn lock_times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`switch`](Self::switch); expires once the domain's clock shows `deadline`.
    pub fn switch_until(self: &Arc<Self>, deadline: Duration) {
        // A fence is switched once.
        let _ = self.deadline.set(deadline);
        self.switch();
    }

    fn deadline(&self) -> Option<Duration> {
        self.deadline.get().copied()
    }

    /// Begins the switch. Call right after publishing the prepared view of every member. Releases at once if nobody needs to be waited for.
    pub fn switch(self: &Arc<Self>) {
        self.lock_times().began = (self.domain.clock)();
        // The generation advances before anybody can find the fence, and expire it: then completions go on, and threads must see that their
        // views are old. Threads that pass before it is found are seen below.
        self.generation.store(self.domain.advance(), SeqCst);
        {
            let mut pending = self.domain.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.push(Arc::clone(self));
            self.domain.pending_count.store(pending.len(), SeqCst);
        }
        self.release_if_passed();
        if self.outcome().is_none() {
            self.domain.has_pending.notify_all();
        }
    }

    /// Gives up waiting: completions go on, the outcome is [`FenceOutcome::Expired`] unless it was decided before. Also for a fence whose
    /// switch never began.
    pub fn expire(&self) -> FenceOutcome {
        self.end(EXPIRED);
        self.outcome().expect("it has just ended")
    }

    /// How it ended, or `None` while completions are held.
    pub fn outcome(&self) -> Option<FenceOutcome> {
        match self.state.load(SeqCst) {
            HELD => None,
            RELEASED => Some(FenceOutcome::Released),
            _ => Some(FenceOutcome::Expired),
        }
    }

    /// Ends when completions are no longer held.
    pub async fn ended(&self) -> FenceOutcome {
        self.ended.wait_until(|| self.outcome()).await
    }

    /// What was measured; complete once the held completions have gone on.
    pub fn times(&self) -> FenceTimes {
        self.lock_times().measured
    }

    fn release_if_passed(&self) {
        let generation = self.generation.load(SeqCst);
        if generation == u64::MAX {
            return;
        }
        // Nobody has to wait for a lock while the clock is read.
        let since_began = (self.domain.clock)().saturating_sub(self.lock_times().began);
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        // Each is asked, so that each has its time.
        let waiting = members.iter().filter(|part| !part.has_passed(generation, since_began)).count();
        drop(members);
        if waiting == 0 {
            self.end(RELEASED);
        }
    }

    fn end(&self, state: u8) {
        let now = (self.domain.clock)();
        // Locked before: whoever sees the new state finds the time that belongs to it.
        let mut times = self.lock_times();
        if self.state.compare_exchange(HELD, state, SeqCst, SeqCst).is_ok() {
            times.measured.switch = now.saturating_sub(times.began);
            drop(times);
            self.domain.forget(self);
            self.ended.notify_all();
        }
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence").field("outcome", &self.outcome()).finish_non_exhaustive()
    }
}

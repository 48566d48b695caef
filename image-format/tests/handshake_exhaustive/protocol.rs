//! The protocol, one access to shared memory at a time.

const DEVICES: usize = 2;
const QUEUES: usize = 2;
/// The most that a shape has.
const THREADS: usize = DEVICES * QUEUES;
/// The most requests that one thread takes.
const SLOTS: usize = 4;
const FENCES: usize = 2;

/// What a mark shows, and the generation: as in the code.
const PARKED: u8 = 0;
const LOOKING: u8 = 1;
const FIRST: u8 = 2;
/// The generation of a fence whose switch has not begun.
const NEVER: u8 = 7;
/// In the place of a view that a thread does not have.
const NO_VIEW: u8 = 7;

/// What happens to a fence beside its being passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Waits,
    /// It may expire at any time once it is pending.
    Expires,
    /// It is given up before the views are published.
    Aborted,
}

/// A mistake in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Defect {
    CompletionsAreNotHeld,
    AdvancesBeforePublishing,
    PendsBeforeAdvancing,
    DoesNotShowLooking,
    ChecksOneMark,
    ChecksOneDevice,
    PassedBeforeTheSwitch,
    SwitchDoesNotCheck,
    ParkingDoesNotRelease,
    FreezesWithoutWaiting,
    EndsMoreThanOnce,
}

/// What is explored.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// By queue thread, the devices of which it serves one queue.
    pub(crate) serves: &'static [&'static [usize]],
    /// Whether threads ask if their views are stale after reading what has completed.
    pub(crate) looks_twice: bool,
    /// Whether guest and storage may take their time: threads find nothing in their rings, or a request not yet written, and park.
    pub(crate) takes_time: bool,
    /// Requests per queue of each device.
    pub(crate) requests: u8,
    pub(crate) snapshots: Vec<Ending>,
    /// Whether transitions are left out that concern nobody ([`Shape::settle`]).
    pub(crate) settles: bool,
    pub(crate) defect: Option<Defect>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    Held,
    Released,
    Expired,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Fence {
    outcome: Outcome,
    generation: u8,
}

/// A request, with the layer of its view.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Request {
    Submitted,
    Taken(u8),
    Written(u8),
    Published,
}

/// Where a thread is in `release_passed`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Release {
    /// The pending fences that it has still to check, one bit each; it is at the lowest.
    rest: u8,
    at: Check,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Check {
    Count,
    Copy,
    Generation,
    /// A mark, by its place in [`Shape::marks`].
    Mark(u8),
    End,
    Forget,
}

/// The beginning.
const RELEASE: Release = Release { rest: 0, at: Check::Count };

/// What a queue thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum QueueAt {
    Sleeping,
    LoadGeneration,
    /// A view, by its place among those of the thread.
    Reload(u8),
    ShowGeneration,
    ReadRing,
    AskStale,
    Write(u8),
    AskHeld(u8),
    Publish(u8),
    Park,
    Detach(u8),
    Release(Release, After),
    Ended,
}

/// What a queue thread does after `release_passed`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum After {
    Turn,
    Sleep,
    Detach(u8),
    End,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Queue {
    at: QueueAt,
    mark: u8,
    /// The generation whose views it has.
    seen: u8,
    /// Their layers.
    views: [u8; DEVICES],
    /// By device, the newest layer in which something had completed when it read the ring.
    after: [u8; DEVICES],
    /// From how many of its devices it has detached.
    detached: u8,
    taken: u8,
    requests: [Request; SLOTS],
    /// Whether something has happened in this turn.
    moved: bool,
}

impl Queue {
    /// A thread drops its views before it parks or leaves, and forgets what it will not look at.
    fn without_idle_views(self) -> Self {
        match self.at {
            QueueAt::Park | QueueAt::Detach(_) => Self { views: [NO_VIEW; DEVICES], seen: 0, moved: false, ..self },
            _ => self,
        }
    }
}

/// What the control thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum ControlAt {
    GiveUp,
    ForgetGivenUp,
    Publish(u8),
    Push,
    Advance,
    SetGeneration,
    Release(Release),
    AwaitEnd,
    AwaitUsers(u8),
    Freeze(u8),
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct State {
    generation: u8,
    /// By device, the layer of the present view.
    present: [u8; DEVICES],
    /// By device, how many layers are frozen.
    frozen: [u8; DEVICES],
    fences: [Fence; FENCES],
    /// Which fences are pending, one bit each. Their count needs nothing beside it: it is stored at the end of the critical section.
    pending: u8,
    /// By device, the newest layer in which something has completed.
    newest: [u8; DEVICES],
    /// The fences whose cut has a request but not another, from which it follows, one bit each.
    torn: u8,
    /// The control thread, and its fence.
    control: ControlAt,
    fence: u8,
    /// The fences that the watch over deadlines has ended but has not forgotten, one bit each.
    overdue: u8,
    queues: [Queue; THREADS],
}

/// Who makes a transition.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Actor {
    Control,
    Overdue,
    Queue(usize),
    /// A queue thread, for which nothing has happened: its rings are empty, or a write goes on.
    InVain(usize),
}

/// What a transition did, and to which one, for whoever reads a path.
pub(crate) struct Step {
    pub(crate) what: &'static str,
    pub(crate) which: u8,
    pub(crate) violation: Option<&'static str>,
}

impl Step {
    pub(crate) fn describe(&self, actor: Actor) -> String {
        format!("{actor:?}: {} {}", self.what, self.which)
    }
}

fn step(what: &'static str, which: u8) -> Option<Step> {
    Some(Step { what, which, violation: None })
}

fn index(number: u8) -> usize {
    usize::from(number)
}

impl Shape {
    fn has(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    fn threads(&self) -> usize {
        self.serves.len()
    }

    /// How many requests a thread takes in all.
    fn slots(&self, thread: usize) -> u8 {
        self.requests * self.serves[thread].len() as u8
    }

    /// The device of a request. A thread takes one of each device, then the next of each.
    fn device_of(&self, thread: usize, slot: u8) -> usize {
        self.serves[thread][index(slot) % self.serves[thread].len()]
    }

    /// The threads whose marks are checked for a device, in this order.
    fn serving(&self, device: usize) -> impl Iterator<Item = usize> {
        (0..self.threads()).filter(move |thread| self.serves[*thread].contains(&device))
    }

    /// All marks that are checked, in this order: the devices and threads.
    fn marks(&self) -> impl Iterator<Item = (usize, usize)> {
        let devices = if self.has(Defect::ChecksOneDevice) { 1 } else { DEVICES };
        let per_device = if self.has(Defect::ChecksOneMark) { 1 } else { THREADS };
        (0..devices).flat_map(move |device| self.serving(device).take(per_device).map(move |thread| (device, thread)))
    }

    /// The fence with which layer `layer` was put on.
    fn fence_of(&self, layer: u8) -> Option<usize> {
        let switched = (0..self.snapshots.len()).filter(|fence| self.snapshots[*fence] != Ending::Aborted);
        layer.checked_sub(1).and_then(|before| switched.into_iter().nth(index(before)))
    }

    fn begins(&self, fence: u8) -> ControlAt {
        match self.snapshots.get(index(fence)) {
            None => ControlAt::Ended,
            Some(Ending::Aborted) => ControlAt::GiveUp,
            Some(_) => self.switch_order()[0],
        }
    }

    /// What the control thread does to switch, until it checks the fence for the first time. The generation advances before the fence is
    /// pending: one that expired in between would let completions go on while no thread can find out that its views are old.
    fn switch_order(&self) -> [ControlAt; 5] {
        let [first, second, advance, set, push] =
            [ControlAt::Publish(0), ControlAt::Publish(1), ControlAt::Advance, ControlAt::SetGeneration, ControlAt::Push];
        match self.defect {
            Some(Defect::AdvancesBeforePublishing) => [advance, first, second, set, push],
            Some(Defect::PendsBeforeAdvancing | Defect::PassedBeforeTheSwitch) => [first, second, push, advance, set],
            _ => [first, second, advance, set, push],
        }
    }

    fn after_switch_step(&self, done: ControlAt, fence: usize) -> ControlAt {
        let order = self.switch_order();
        let place = order.iter().position(|at| *at == done).expect("it is a part of the switch");
        match order.get(place + 1) {
            Some(next) => *next,
            None if self.has(Defect::SwitchDoesNotCheck) => ControlAt::AwaitEnd,
            None => ControlAt::Release(Release { rest: 1 << fence, at: Check::Generation }),
        }
    }

    pub(crate) fn initial(&self) -> State {
        let queue = |thread| Queue {
            at: if thread < self.threads() { QueueAt::Sleeping } else { QueueAt::Ended },
            mark: PARKED,
            seen: 0,
            views: [NO_VIEW; DEVICES],
            after: [0; DEVICES],
            detached: 0,
            taken: 0,
            requests: [Request::Submitted; SLOTS],
            moved: false,
        };
        let unborn = if self.has(Defect::PassedBeforeTheSwitch) { 0 } else { NEVER };
        State {
            generation: FIRST,
            present: [0; DEVICES],
            frozen: [0; DEVICES],
            fences: [Fence { outcome: Outcome::Held, generation: unborn }; FENCES],
            pending: 0,
            newest: [0; DEVICES],
            torn: 0,
            control: self.begins(0),
            fence: 0,
            overdue: 0,
            queues: std::array::from_fn(queue),
        }
    }

    pub(crate) fn actors(&self) -> impl Iterator<Item = Actor> {
        let queues = (0..self.threads()).flat_map(|thread| [Actor::Queue(thread), Actor::InVain(thread)]);
        [Actor::Control, Actor::Overdue].into_iter().chain(queues)
    }

    /// Lets `actor` make its next transition, if it has one now.
    pub(crate) fn advance(&self, actor: Actor, state: &mut State) -> Option<Step> {
        let before = state.fences;
        let mut step = match actor {
            Actor::Control => self.control(state),
            Actor::Overdue => self.overdue(state),
            Actor::Queue(thread) => self.queue(thread, state),
            Actor::InVain(thread) => self.look_in_vain(thread, state),
        }?;
        if self.settles {
            step.violation = step.violation.or(self.settle(state));
        }
        let changed = before.iter().zip(&state.fences).any(|(old, new)| old.outcome != Outcome::Held && old.outcome != new.outcome);
        let torn = (0..FENCES).any(|fence| state.torn & (1 << fence) != 0 && state.fences[fence].outcome == Outcome::Released);
        if changed {
            step.violation = Some("a fence ends twice");
        } else if torn {
            step.violation = Some("a cut has a request but not another, from which it follows");
        }
        Some(step)
    }

    /// Lets every thread go on as long as what it does next concerns nobody: it reads what does not change any more, or writes what nobody
    /// will read. Whenever it did that, everything else would happen as it does now.
    fn settle(&self, state: &mut State) -> Option<&'static str> {
        let mut violation = None;
        for thread in 0..self.threads() {
            while self.is_settled(thread, state) {
                violation = violation.or(self.queue(thread, state)?.violation);
            }
        }
        while matches!(state.control, ControlAt::Release(release) if self.is_futile(release, state)) {
            self.control(state)?;
        }
        violation
    }

    fn is_settled(&self, thread: usize, state: &State) -> bool {
        let queue = &state.queues[thread];
        let switches = self.snapshots.iter().filter(|ending| **ending != Ending::Aborted).count() as u8;
        let all_ended = state.fences[..self.snapshots.len()].iter().all(|fence| fence.outcome != Outcome::Held);
        match queue.at {
            QueueAt::LoadGeneration | QueueAt::AskStale => state.generation == FIRST + switches,
            QueueAt::Reload(_) => state.present == [switches; DEVICES],
            QueueAt::AskHeld(slot) => !self.is_held(queue, slot, state),
            QueueAt::Release(release, _) => self.is_futile(release, state) || all_ended && matches!(release.at, Check::Count | Check::Copy),
            QueueAt::Sleeping => all_ended && self.is_awake(thread, queue, state),
            QueueAt::ShowGeneration | QueueAt::Park | QueueAt::Detach(_) => all_ended,
            QueueAt::ReadRing | QueueAt::Write(_) | QueueAt::Publish(_) | QueueAt::Ended => false,
        }
    }

    /// Whether a fence is checked that has ended.
    fn is_futile(&self, release: Release, state: &State) -> bool {
        let checks = matches!(release.at, Check::Generation | Check::Mark(_) | Check::End);
        checks && state.fences[release.rest.trailing_zeros() as usize].outcome != Outcome::Held && !self.has(Defect::EndsMoreThanOnce)
    }

    /// What is wrong with a state from which nothing goes on.
    pub(crate) fn judge_end(&self, state: &State) -> Option<&'static str> {
        let ended = |thread| {
            let queue: &Queue = &state.queues[thread];
            queue.at == QueueAt::Ended && self.has_published_all(thread, queue)
        };
        if state.control != ControlAt::Ended || !(0..self.threads()).all(ended) {
            return Some("somebody is left waiting");
        }
        (state.pending != 0).then_some("a fence is pending for ever")
    }

    /// Ends `fence` if it is held. Gives whether it was.
    fn end(&self, state: &mut State, fence: usize, outcome: Outcome) -> bool {
        let ends = state.fences[fence].outcome == Outcome::Held || self.has(Defect::EndsMoreThanOnce);
        if ends {
            state.fences[fence].outcome = outcome;
        }
        ends
    }

    /// The watch over deadlines (`expire_overdue`).
    fn overdue(&self, state: &mut State) -> Option<Step> {
        if state.overdue != 0 {
            state.pending &= !state.overdue;
            return step("forgets fence", std::mem::take(&mut state.overdue).trailing_zeros() as u8);
        }
        let expires = |fence: &usize| self.snapshots[*fence] == Ending::Expires && state.pending & (1 << fence) != 0;
        let fence = (0..self.snapshots.len()).find(expires)?;
        if !self.end(state, fence, Outcome::Expired) {
            return None;
        }
        state.overdue = 1 << fence;
        step("expires fence", fence as u8)
    }

    /// One access of the control thread. What it does to prepare views, nobody sees.
    fn control(&self, state: &mut State) -> Option<Step> {
        let number = state.fence;
        let fence = index(number);
        let (next, done) = match state.control {
            ControlAt::GiveUp => {
                self.end(state, fence, Outcome::Expired);
                (ControlAt::ForgetGivenUp, step("gives up fence", number))
            }
            ControlAt::ForgetGivenUp => {
                state.pending &= !(1 << fence);
                state.fence += 1;
                (self.begins(state.fence), step("forgets fence", number))
            }
            at @ ControlAt::Publish(device) => {
                state.present[index(device)] += 1;
                (self.after_switch_step(at, fence), step("publishes the view of device", device))
            }
            at @ ControlAt::Push => {
                state.pending |= 1 << fence;
                (self.after_switch_step(at, fence), step("makes pending fence", number))
            }
            at @ ControlAt::Advance => {
                state.generation += 1;
                (self.after_switch_step(at, fence), step("advances the generation to", state.generation))
            }
            at @ ControlAt::SetGeneration => {
                // Nobody else advances.
                state.fences[fence].generation = state.generation;
                (self.after_switch_step(at, fence), step("sets the generation of fence", number))
            }
            ControlAt::Release(release) => {
                let (next, done) = self.release(release, state);
                (next.map_or(ControlAt::AwaitEnd, ControlAt::Release), done)
            }
            ControlAt::AwaitEnd => {
                let outcome = state.fences[fence].outcome;
                if outcome == Outcome::Held {
                    return None;
                }
                let wrong = self.snapshots[fence] == Ending::Waits && outcome != Outcome::Released;
                let violation = wrong.then_some("a fence that nobody gave up is not released");
                (ControlAt::AwaitUsers(0), Some(Step { what: "sees the end of fence", which: number, violation }))
            }
            ControlAt::AwaitUsers(device) => {
                if self.has_users(state, index(device)) && !self.has(Defect::FreezesWithoutWaiting) {
                    return None;
                }
                (ControlAt::Freeze(device), step("sees no user of the old view of device", device))
            }
            ControlAt::Freeze(device) => {
                state.frozen[index(device)] += 1;
                if index(device) + 1 < DEVICES {
                    (ControlAt::AwaitUsers(device + 1), step("freezes a layer of device", device))
                } else {
                    state.fence += 1;
                    (self.begins(state.fence), step("freezes a layer of device", device))
                }
            }
            ControlAt::Ended => return None,
        };
        state.control = next;
        done
    }

    /// Whether a queue thread has a view of `device` that is older than the present one.
    fn has_users(&self, state: &State, device: usize) -> bool {
        let is_old = |layer| layer < state.present[device];
        self.serving(device).any(|thread| {
            let queue = &state.queues[thread];
            let kept = is_old(queue.views[device]);
            let uses = |slot| matches!(queue.requests[index(slot)], Request::Taken(layer) | Request::Written(layer) if is_old(layer));
            kept || (0..self.slots(thread)).any(|slot| self.device_of(thread, slot) == device && uses(slot))
        })
    }

    /// One access of `release_passed`, and what is left of it.
    fn release(&self, release: Release, state: &mut State) -> (Option<Release>, Option<Step>) {
        let Release { rest, at } = release;
        let number = rest.trailing_zeros() as u8;
        let fence = index(number);
        let to = |at| Some(Release { rest, at });
        let checked = rest & rest.wrapping_sub(1);
        let other = (checked != 0).then_some(Release { rest: checked, at: Check::Generation });
        match at {
            Check::Count => (
                (state.pending != 0).then_some(Release { rest, at: Check::Copy }),
                step("counts the fences that are pending", state.pending.count_ones() as u8),
            ),
            Check::Copy => {
                let copied = (state.pending != 0).then_some(Release { rest: state.pending, at: Check::Generation });
                (copied, step("copies the fences that are pending", state.pending.count_ones() as u8))
            }
            Check::Generation => {
                let next = if state.fences[fence].generation == NEVER { other } else { to(Check::Mark(0)) };
                (next, step("loads the generation of fence", number))
            }
            Check::Mark(mark) => {
                let (device, thread) = self.marks().nth(index(mark)).expect("it is one of them");
                // What is looked at after one that has not passed is only measured.
                let passed = self.has_passed(&state.queues[thread], thread, device, state.fences[fence].generation);
                let is_last = index(mark) + 1 == self.marks().count();
                let next = match passed {
                    false => other,
                    true => to(if is_last { Check::End } else { Check::Mark(mark + 1) }),
                };
                (next, step("loads the mark of thread", thread as u8))
            }
            Check::End if self.end(state, fence, Outcome::Released) => (to(Check::Forget), step("releases fence", number)),
            Check::End => (other, step("finds ended fence", number)),
            Check::Forget => {
                state.pending &= !(1 << fence);
                (other, step("forgets fence", number))
            }
        }
    }

    fn has_passed(&self, queue: &Queue, thread: usize, device: usize, generation: u8) -> bool {
        let detached = self.serves[thread][..index(queue.detached)].contains(&device);
        detached || queue.mark == PARKED || queue.mark >= generation
    }

    fn look_in_vain(&self, thread: usize, state: &mut State) -> Option<Step> {
        let queue = state.queues[thread];
        let (from, done) = match queue.at {
            QueueAt::ReadRing if self.takes_time => (0, step("finds nothing in ring", 0)),
            QueueAt::Write(slot) if self.takes_time => (slot + 1, step("is still writing request", slot)),
            _ => return None,
        };
        state.queues[thread] = Queue { at: self.next_request(thread, &queue, from), ..queue }.without_idle_views();
        done
    }

    /// One access of a queue thread: its turns, `Host::serve` for each of its requests, and its end.
    fn queue(&self, thread: usize, state: &mut State) -> Option<Step> {
        let mut queue = state.queues[thread];
        let serves = self.serves[thread];
        let mut violation = None;
        let mut done = match queue.at {
            QueueAt::Sleeping => {
                if !self.is_awake(thread, &queue, state) {
                    return None;
                }
                if !self.has(Defect::DoesNotShowLooking) {
                    queue.mark = LOOKING;
                }
                queue.at = QueueAt::LoadGeneration;
                step("shows that it looks", 0)
            }
            QueueAt::LoadGeneration => {
                queue.moved = false;
                let was_parked = queue.mark == PARKED || queue.mark == LOOKING;
                let same = !was_parked && state.generation == queue.seen;
                queue.seen = state.generation;
                queue.at = if same { self.take_turn(thread, &queue) } else { QueueAt::Reload(0) };
                step("loads the generation", state.generation)
            }
            QueueAt::Reload(view) => {
                let device = serves[index(view)];
                queue.views[device] = state.present[device];
                queue.at = if index(view) + 1 < serves.len() { QueueAt::Reload(view + 1) } else { QueueAt::ShowGeneration };
                step("loads the view of device", device as u8)
            }
            QueueAt::ShowGeneration => {
                queue.mark = queue.seen;
                queue.at = QueueAt::Release(RELEASE, After::Turn);
                step("shows generation", queue.seen)
            }
            QueueAt::ReadRing => {
                queue.after = state.newest;
                queue.at = QueueAt::AskStale;
                if !self.looks_twice {
                    violation = self.take(thread, &mut queue, state);
                }
                step("reads its rings", 0)
            }
            QueueAt::AskStale if state.generation != queue.seen => {
                queue.after = [0; DEVICES];
                queue.at = QueueAt::LoadGeneration;
                step("finds its views stale", 0)
            }
            QueueAt::AskStale => {
                violation = self.take(thread, &mut queue, state);
                step("finds its views up to date", 0)
            }
            QueueAt::Write(slot) => {
                let Request::Taken(layer) = queue.requests[index(slot)] else { unreachable!("it has been taken and not written") };
                if layer < state.frozen[self.device_of(thread, slot)] {
                    violation = Some("a write reaches a frozen layer");
                }
                queue.requests[index(slot)] = Request::Written(layer);
                let holds = self.fence_of(layer).is_some() && !self.has(Defect::CompletionsAreNotHeld);
                queue.at = if holds { QueueAt::AskHeld(slot) } else { QueueAt::Publish(slot) };
                step("writes request", slot)
            }
            QueueAt::AskHeld(slot) => {
                queue.at =
                    if self.is_held(&queue, slot, state) { self.next_request(thread, &queue, slot + 1) } else { QueueAt::Publish(slot) };
                step("asks whether it must hold request", slot)
            }
            QueueAt::Publish(slot) => {
                let Request::Written(layer) = queue.requests[index(slot)] else { unreachable!("it has been written and not published") };
                let newest = &mut state.newest[self.device_of(thread, slot)];
                *newest = layer.max(*newest);
                queue.requests[index(slot)] = Request::Published;
                queue.moved = true;
                queue.at = self.next_request(thread, &queue, slot + 1);
                step("publishes request", slot)
            }
            QueueAt::Park => {
                queue.mark = PARKED;
                queue.at =
                    if self.has(Defect::ParkingDoesNotRelease) { QueueAt::Sleeping } else { QueueAt::Release(RELEASE, After::Sleep) };
                step("parks", 0)
            }
            QueueAt::Detach(view) => {
                queue.detached += 1;
                let after = if index(view) + 1 < serves.len() { After::Detach(view + 1) } else { After::End };
                queue.at = QueueAt::Release(RELEASE, after);
                step("detaches", view)
            }
            QueueAt::Release(release, after) => {
                let (next, done) = self.release(release, state);
                queue.at = match (next, after) {
                    (Some(release), _) => QueueAt::Release(release, after),
                    (None, After::Turn) => self.take_turn(thread, &queue),
                    (None, After::Sleep) => QueueAt::Sleeping,
                    (None, After::Detach(view)) => QueueAt::Detach(view),
                    (None, After::End) => QueueAt::Ended,
                };
                done
            }
            QueueAt::Ended => return None,
        }?;
        state.queues[thread] = queue.without_idle_views();
        done.violation = violation;
        Some(done)
    }

    fn take_turn(&self, thread: usize, queue: &Queue) -> QueueAt {
        if queue.taken < self.requests { QueueAt::ReadRing } else { self.next_request(thread, queue, 0) }
    }

    /// Takes one request from each ring into the view that the thread has.
    fn take(&self, thread: usize, queue: &mut Queue, state: &mut State) -> Option<&'static str> {
        let serves = self.serves[thread];
        let mut violation = None;
        for (view, own) in serves.iter().enumerate() {
            let layer = queue.views[*own];
            queue.requests[index(queue.taken) * serves.len() + view] = Request::Taken(layer);
            for (device, newest) in queue.after.into_iter().enumerate().filter(|(_, newest)| *newest > layer) {
                if device == *own {
                    violation = Some("a request went beneath one from which it follows");
                } else {
                    let torn = (layer + 1..=newest).filter_map(|layer| self.fence_of(layer));
                    torn.for_each(|fence| state.torn |= 1 << fence);
                }
            }
        }
        queue.taken += 1;
        queue.moved = true;
        queue.after = [0; DEVICES];
        queue.at = self.next_request(thread, queue, 0);
        violation
    }

    /// What the thread does about its requests from slot `from` on, or at the end of its turn.
    fn next_request(&self, thread: usize, queue: &Queue, from: u8) -> QueueAt {
        for slot in from..self.slots(thread) {
            match queue.requests[index(slot)] {
                Request::Taken(_) => return QueueAt::Write(slot),
                Request::Written(_) => return QueueAt::AskHeld(slot),
                Request::Submitted | Request::Published => {}
            }
        }
        match queue.moved {
            _ if self.has_published_all(thread, queue) => QueueAt::Detach(0),
            true => QueueAt::LoadGeneration,
            false => QueueAt::Park,
        }
    }

    fn has_published_all(&self, thread: usize, queue: &Queue) -> bool {
        queue.requests[..index(self.slots(thread))].iter().all(|request| *request == Request::Published)
    }

    fn is_held(&self, queue: &Queue, slot: u8, state: &State) -> bool {
        let Request::Written(layer) = queue.requests[index(slot)] else { return false };
        self.fence_of(layer).is_some_and(|fence| state.fences[fence].outcome == Outcome::Held)
    }

    fn is_awake(&self, thread: usize, queue: &Queue, state: &State) -> bool {
        let is_kept = |slot: &u8| matches!(queue.requests[index(*slot)], Request::Taken(_) | Request::Written(_));
        let mut kept = (0..self.slots(thread)).filter(is_kept);
        queue.taken < self.requests || kept.any(|slot| !self.is_held(queue, slot, state))
    }
}

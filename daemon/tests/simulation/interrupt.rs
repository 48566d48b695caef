//! Turns of threads are interrupted, and daemons end in the midst of them.
//!
//! Whenever a thread looks at the clock, asks the disk for something or makes its catalogue durable, others may have turns before it goes on, as if
//! it had been held up. Most of all the control thread in the middle of a switch, where a fence looks at the clock: the views of all members are
//! published, and no queue thread has been told. A thread that was parked takes requests into the new views then, and one that was running takes
//! them into the old ones. What holds the cut together is that completions are held. To see that, a queue thread is brought to work just before a
//! switch and held up in it, while the other one serves requests of the new views; then the guest asks for more on the first one's queues.
//!
//! A daemon that ends at such a moment has its medium and its catalogue as they were then. The others may have gone on just before. The turn goes on
//! and changes nothing any more.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak as WeakRc};
use std::sync::{Arc, Weak};
use std::time::Duration;

use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::simulated::{Moment, MomentWatch, SimulatedEnvironment, watch_moments};
use snapfence_image_format::storage::{Chance, Environment};

use super::guest::{ControlThread, Guest, QueueThread, guest_turn};
use super::support::CatalogueFile;

/// Turns of the others in the middle of a switch, at most.
const MOST_IN_SWITCH: u64 = 200;
/// While the catalogue is being made durable.
const MOST_IN_SYNC: u64 = 120;
/// Before an operation.
const MOST_IN_OPERATION: u64 = 12;
/// Turns that the control thread does not have after a switch, at most.
const MOST_HELD_UP: u64 = 100;
/// Before a switch, to bring a queue thread to work, and in it without that thread.
const TO_BE_BUSY: u64 = 12;
const MOST_WITHOUT_ONE: u64 = 150;
/// Time that passes during one interruption, at most: long deadlines are not missed.
const MOST_AT_ONCE: Duration = Duration::from_millis(100);
/// Requests that the guest has more wishes for meanwhile.
const WISHES_IN_SWITCH: u32 = 5;

/// The stacks whose views are watched, each with where its view was.
#[derive(Default)]
pub(crate) struct Watched {
    views: RefCell<Vec<(Weak<Stack<SimulatedEnvironment>>, usize)>>,
    switches: Cell<u64>,
}

impl Watched {
    pub(crate) fn add(&self, stack: &Arc<Stack<SimulatedEnvironment>>) {
        self.views.borrow_mut().push((Arc::downgrade(stack), Arc::as_ptr(&stack.view()) as usize));
    }

    /// Whether views have been published since the last call, of which a fence that is held is part.
    fn are_switching(&self) -> bool {
        let Ok(mut watched) = self.views.try_borrow_mut() else { return false };
        let mut switching = false;
        for (stack, before) in &mut *watched {
            let Some(stack) = stack.upgrade() else { continue };
            let view = stack.view();
            let now = Arc::as_ptr(&view) as usize;
            if std::mem::replace(before, now) != now {
                switching |= view.fence().is_some_and(|member| member.fence().outcome().is_none());
            }
        }
        self.switches.set(self.switches.get() + u64::from(switching));
        switching
    }

    /// How many there have been.
    pub(crate) fn switches(&self) -> u64 {
        self.switches.get()
    }
}

/// Where a daemon ends in the midst of a turn: at such a moment, after so many others, which count from the beginning or from a switch.
pub(crate) struct End {
    pub(crate) at: Moment,
    pub(crate) after: u64,
    pub(crate) after_switch: bool,
}

/// Everybody who can have a turn while somebody else is interrupted, and what there is to know about that.
pub(crate) struct Others {
    pub(crate) environment: SimulatedEnvironment,
    pub(crate) catalogue: CatalogueFile,
    pub(crate) control: ControlThread,
    pub(crate) threads: Vec<QueueThread>,
    pub(crate) guest: WeakRc<RefCell<Guest>>,
    pub(crate) watched: Rc<Watched>,
    pub(crate) end: RefCell<Option<End>>,
    /// How often a thread may still be brought to work before a switch: the guest has an end.
    pub(crate) delays: Cell<u32>,
}

impl Others {
    /// Gives them so many turns, the queue thread `held_up` none of the first ones.
    fn have_turns(&self, chance: &mut Chance, turns: u64, held_up: Option<(usize, u64)>) {
        let Some(guest) = self.guest.upgrade() else { return };
        let until = self.environment.now() + MOST_AT_ONCE;
        for turn in 0..turns {
            if self.environment.is_stopped() {
                break;
            }
            match chance.index(self.threads.len() + 3) {
                0 => self.let_time_pass(until),
                1 => guest_turn(&guest),
                2 => self.control.turn_if_free(),
                thread if held_up.is_some_and(|(held_up, until)| thread - 3 == held_up && turn < until) => {}
                thread => self.threads[thread - 3].turn_if_free(),
            }
        }
    }

    /// Lets a queue thread work, if it can.
    fn busy_one(&self, chance: &mut Chance) {
        let thread = &self.threads[chance.index(self.threads.len())];
        self.wish();
        for _ in 0..TO_BE_BUSY {
            self.guest_has_turn();
            thread.turn_at_once();
            if thread.is_busy() {
                break;
            }
        }
    }

    /// In the middle of a switch: the others serve the guest while a thread that has work is held up, and then it goes on.
    fn overtake_one(&self, chance: &mut Chance) {
        let Some(busy) = self.threads.iter().find(|thread| thread.is_busy()) else { return };
        self.wish();
        let until = self.environment.now() + MOST_AT_ONCE;
        for _ in 0..chance.below(MOST_WITHOUT_ONE) {
            match chance.index(3) {
                0 => self.let_time_pass(until),
                1 => self.guest_has_turn(),
                _ => self.threads.iter().filter(|thread| !thread.is_busy()).for_each(QueueThread::turn_at_once),
            }
        }
        self.wish();
        for _ in 0..TO_BE_BUSY {
            self.guest_has_turn();
        }
        busy.turn_at_once();
    }

    /// Up to the next event, unless that is later.
    fn let_time_pass(&self, until: Duration) {
        if self.environment.next_event().is_some_and(|at| at <= until) {
            self.environment.advance();
        }
    }

    fn guest_has_turn(&self) {
        if let Some(guest) = self.guest.upgrade() {
            guest_turn(&guest);
        }
    }

    /// Gives the guest more wishes.
    fn wish(&self) {
        if let Some(guest) = self.guest.upgrade()
            && let Ok(mut guest) = guest.try_borrow_mut()
        {
            guest.wishes += WISHES_IN_SWITCH;
        }
    }

    /// Whether a snapshot has been asked for and is not answered.
    fn snapshot_is_asked(&self) -> bool {
        self.guest.upgrade().is_some_and(|guest| guest.try_borrow().is_ok_and(|guest| guest.awaits_snapshot))
    }

    /// Ends the daemon if this is where.
    fn end_at(&self, moment: Moment, chance: &mut Chance) -> bool {
        let is_here = self.end.borrow_mut().as_mut().is_some_and(|end| {
            if end.at != moment || end.after_switch && self.watched.switches() == 0 {
                return false;
            }
            let is_here = end.after == 0;
            end.after = end.after.saturating_sub(1);
            is_here
        });
        if is_here {
            self.end.take();
            let turns = chance.below(MOST_IN_SYNC);
            self.have_turns(chance, turns, None);
            // The medium stays as it is; what comes of it is decided later.
            drop(self.environment.killed());
            self.catalogue.end();
        }
        is_here
    }
}

/// Interrupts turns for as long as what it returns lives.
pub(crate) fn interrupt_turns(others: Others) -> MomentWatch {
    let chance = RefCell::new(Chance::new(others.environment.seed() ^ 0x1_27e2));
    watch_moments(move |moment| {
        let chance = &mut *chance.borrow_mut();
        if others.environment.is_stopped() || others.end_at(moment, chance) {
            return;
        }
        match moment {
            Moment::Clock => {
                if !others.watched.are_switching() {
                    if others.delays.get() > 0 && others.snapshot_is_asked() && chance.happens(1, 2) {
                        others.delays.set(others.delays.get() - 1);
                        others.busy_one(chance);
                    }
                    return;
                }
                if chance.happens(1, 2) {
                    others.overtake_one(chance);
                }
                if chance.happens(1, 2) {
                    others.control.hold_up(chance.below(MOST_HELD_UP));
                }
                if chance.happens(3, 4) {
                    let turns = chance.below(MOST_IN_SWITCH);
                    let held_up = (chance.index(others.threads.len()), chance.below(turns + 1));
                    others.have_turns(chance, turns, Some(held_up));
                }
            }
            Moment::Operation if chance.happens(1, 16) => {
                let turns = chance.below(MOST_IN_OPERATION);
                others.have_turns(chance, turns, None);
            }
            Moment::Elsewhere if chance.happens(1, 4) => {
                let turns = chance.below(MOST_IN_SYNC);
                others.have_turns(chance, turns, None);
            }
            Moment::Operation | Moment::Elsewhere => {}
        }
    })
}

//! The control thread is held up in the middle of a switch: the views of all members are published, and no queue thread has been told.
//!
//! A fence looks at the clock there. Meanwhile the others have turns, one of them held up as well: a thread that was parked takes requests into
//! the new views, and one that was running takes them into the old ones. What holds the cut together then is that completions are held.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak as WeakRc};
use std::sync::{Arc, Weak};

use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{ClockWatch, SimulatedEnvironment, watch_clock};

use super::guest::{Guest, QueueThread, guest_turn};

/// Turns of the others, at most.
const MOST_TURNS: u64 = 200;

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

/// Interrupts switches for as long as what it returns lives.
pub(crate) fn interrupt_switches(
    environment: &SimulatedEnvironment,
    watched: Rc<Watched>,
    threads: Vec<QueueThread>,
    guest: &Rc<RefCell<Guest>>,
) -> ClockWatch {
    let chance = RefCell::new(Chance::new(environment.seed() ^ 0x1_27e2));
    let (environment, guest): (_, WeakRc<_>) = (environment.clone(), Rc::downgrade(guest));
    watch_clock(move || {
        let Some(guest) = guest.upgrade() else { return };
        let Ok(mut chance) = chance.try_borrow_mut() else { return };
        if !watched.are_switching() || chance.happens(1, 4) {
            return;
        }
        let turns = chance.below(MOST_TURNS);
        let (held_up, until) = (chance.index(threads.len()), chance.below(turns + 1));
        for turn in 0..turns {
            match chance.index(threads.len() + 2) {
                0 => drop(environment.advance()),
                1 => guest_turn(&guest),
                thread if turn >= until || thread - 2 != held_up => threads[thread - 2].turn_if_free(),
                _ => {}
            }
        }
    })
}

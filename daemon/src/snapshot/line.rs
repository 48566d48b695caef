//! Lines of those who want to change devices' stacks: one at a time per device.
//!
//! Whoever waits holds nothing. A place has its turn when none of its devices has another's turn, which it then has for all of them at once; of
//! those who could have it the one that came first does. So two groups never wait for one another in a circle, and a group that waits for a
//! device whose disk hangs keeps nobody from its other devices. In return later ones may pass it there, time and again if they are many.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use snapfence_image_format::runtime::WaitQueue;

/// The lines of all devices.
#[derive(Debug, Default)]
pub struct Lines {
    state: RefCell<State>,
    next_ticket: Cell<u64>,
    changed: WaitQueue,
}

#[derive(Debug, Default)]
struct State {
    /// Whose turn it is.
    held: BTreeMap<String, u64>,
    /// In the order of arrival.
    waiting: BTreeMap<u64, Vec<String>>,
}

/// A place in the lines of some devices. Dropping it leaves them.
#[derive(Debug)]
#[must_use = "a place that is dropped is given up"]
pub struct Place {
    lines: Rc<Lines>,
    ticket: u64,
}

impl State {
    /// Gives turns to those who can have one.
    fn advance(&mut self) {
        let held = &mut self.held;
        self.waiting.retain(|ticket, devices| {
            let must_wait = devices.iter().any(|device| held.contains_key(device));
            if !must_wait {
                held.extend(devices.drain(..).map(|device| (device, *ticket)));
            }
            must_wait
        });
    }
}

impl Lines {
    /// Takes the last place in the lines of `devices`.
    pub fn enter<'a>(self: &Rc<Self>, devices: impl IntoIterator<Item = &'a str>) -> Place {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        let devices: BTreeSet<String> = devices.into_iter().map(str::to_owned).collect();
        let mut state = self.state.borrow_mut();
        state.waiting.insert(ticket, devices.into_iter().collect());
        state.advance();
        Place { lines: Rc::clone(self), ticket }
    }

    /// How many stand in the line of `device`, the one whose turn it is included.
    pub fn length(&self, device: &str) -> usize {
        let state = self.state.borrow();
        let waiting = state.waiting.values().filter(|devices| devices.iter().any(|other| other == device)).count();
        waiting + usize::from(state.held.contains_key(device))
    }

    /// The devices whose line somebody stands in.
    pub fn busy(&self) -> Vec<String> {
        let state = self.state.borrow();
        state.held.keys().chain(state.waiting.values().flatten()).cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Ends when nobody stands in any line.
    pub async fn wait_empty(&self) {
        let is_empty = || {
            let state = self.state.borrow();
            state.held.is_empty() && state.waiting.is_empty()
        };
        self.changed.wait_until(|| is_empty().then_some(())).await;
    }
}

impl Place {
    /// Whether it is this place's turn.
    pub fn is_first(&self) -> bool {
        !self.lines.state.borrow().waiting.contains_key(&self.ticket)
    }

    /// Ends when it is this place's turn.
    pub async fn wait_first(&self) {
        self.lines.changed.wait_until(|| self.is_first().then_some(())).await;
    }

    /// Gives up the turn of all devices but these.
    pub fn keep_only(&self, devices: &BTreeSet<String>) {
        {
            let mut state = self.lines.state.borrow_mut();
            state.held.retain(|device, ticket| *ticket != self.ticket || devices.contains(device));
            state.advance();
        }
        self.lines.changed.notify_all();
    }

    /// The devices that another has the turn of, and which other it is. None if it is this place's turn.
    pub fn blockers(&self) -> Vec<(String, u64)> {
        let state = self.lines.state.borrow();
        let devices = state.waiting.get(&self.ticket).map(Vec::as_slice).unwrap_or_default();
        devices.iter().filter_map(|device| Some((device.clone(), *state.held.get(device)?))).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut state = self.lines.state.borrow_mut();
            state.waiting.remove(&self.ticket);
            state.held.retain(|_, ticket| *ticket != self.ticket);
            state.advance();
        }
        self.lines.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_wait_for_those_whose_turn_it_is_and_only_for_those() {
        let lines = Rc::new(Lines::default());
        let first = lines.enter(["a", "b"]);
        let second = lines.enter(["b", "c"]);
        let third = lines.enter(["c"]);
        let other = lines.enter(["d"]);
        assert_eq!([first.is_first(), second.is_first(), third.is_first(), other.is_first()], [true, false, true, true]);
        assert_eq!((lines.length("b"), lines.length("c"), lines.busy().len()), (2, 2, 4));
        let blockers = [first.blockers(), second.blockers()];
        assert_eq!(blockers, [vec![], vec![("b".to_owned(), first.ticket), ("c".to_owned(), third.ticket)]]);
        drop(first);
        assert!(!second.is_first(), "the third has passed it, and is not interrupted");
        drop(third);
        assert!(second.is_first());
        drop((second, other));
        assert_eq!((lines.length("c"), lines.busy()), (0, vec![]));
    }

    #[test]
    fn of_those_who_can_have_their_turn_the_first_to_come_does() {
        let lines = Rc::new(Lines::default());
        let first = lines.enter(["a", "b"]);
        let second = lines.enter(["a"]);
        let third = lines.enter(["a", "b"]);
        let fourth = lines.enter(["b"]);
        drop(first);
        assert_eq!([second.is_first(), third.is_first(), fourth.is_first()], [true, false, true]);
        drop((second, fourth));
        assert!(third.is_first());
    }

    #[test]
    fn a_turn_can_be_given_up_in_part() {
        let lines = Rc::new(Lines::default());
        let first = lines.enter(["a", "b"]);
        let (second, third) = (lines.enter(["a"]), lines.enter(["b"]));
        first.keep_only(&["b".to_owned()].into());
        assert_eq!([second.is_first(), third.is_first()], [true, false]);
        drop(first);
        assert!(third.is_first());
    }

    #[test]
    fn giving_up_in_the_middle_lets_the_next_move_up() {
        let lines = Rc::new(Lines::default());
        let first = lines.enter(["a"]);
        let second = lines.enter(["a"]);
        let third = lines.enter(["a"]);
        drop(second);
        assert!(!third.is_first());
        drop(first);
        assert!(third.is_first());
    }
}

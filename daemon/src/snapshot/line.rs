//! Lines of those who want to change devices' stacks: one at a time per device, in the order of arrival.
//!
//! A group enters the lines of all its devices at once, on the control thread, so two groups stand in the same order in every line that they
//! share and never wait for one another in a circle.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use snapfence_image_format::runtime::WaitQueue;

/// The lines of all devices.
#[derive(Debug, Default)]
pub struct Lines {
    waiting: RefCell<BTreeMap<String, VecDeque<u64>>>,
    next_ticket: Cell<u64>,
    changed: WaitQueue,
}

/// A place in the lines of some devices. Dropping it leaves them.
#[derive(Debug)]
#[must_use = "a place that is dropped is given up"]
pub struct Place {
    lines: Rc<Lines>,
    devices: Vec<String>,
    ticket: u64,
}

impl Lines {
    /// Takes the last place in the lines of `devices`.
    pub fn enter<'a>(self: &Rc<Self>, devices: impl IntoIterator<Item = &'a str>) -> Place {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        let devices: Vec<String> = devices.into_iter().map(str::to_owned).collect();
        let mut waiting = self.waiting.borrow_mut();
        for device in &devices {
            waiting.entry(device.clone()).or_default().push_back(ticket);
        }
        Place { lines: Rc::clone(self), devices, ticket }
    }

    /// How many stand in the line of `device`, the one whose turn it is included.
    pub fn length(&self, device: &str) -> usize {
        self.waiting.borrow().get(device).map_or(0, VecDeque::len)
    }

    /// Ends when nobody stands in any line.
    pub async fn wait_empty(&self) {
        self.changed.wait_until(|| self.waiting.borrow().is_empty().then_some(())).await;
    }
}

impl Place {
    /// Whether this place is the first in all its lines.
    pub fn is_first(&self) -> bool {
        let waiting = self.lines.waiting.borrow();
        self.devices.iter().all(|device| waiting.get(device).and_then(VecDeque::front) == Some(&self.ticket))
    }

    /// Ends when this place is the first in all its lines.
    pub async fn wait_first(&self) {
        self.lines.changed.wait_until(|| self.is_first().then_some(())).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut waiting = self.lines.waiting.borrow_mut();
            for device in &self.devices {
                if let Some(line) = waiting.get_mut(device) {
                    line.retain(|ticket| *ticket != self.ticket);
                    if line.is_empty() {
                        waiting.remove(device);
                    }
                }
            }
        }
        self.lines.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_wait_for_those_before_them_and_only_for_those() {
        let lines = Rc::new(Lines::default());
        let first = lines.enter(["a", "b"]);
        let second = lines.enter(["b", "c"]);
        let third = lines.enter(["c"]);
        let other = lines.enter(["d"]);
        assert_eq!([first.is_first(), second.is_first(), third.is_first(), other.is_first()], [true, false, false, true]);
        assert_eq!(lines.length("b"), 2);
        drop(first);
        assert_eq!([second.is_first(), third.is_first()], [true, false]);
        drop(second);
        assert!(third.is_first());
        drop((third, other));
        assert_eq!(lines.length("c"), 0);
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

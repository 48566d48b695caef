//! What was asked of the disks and answered, for people who look at a failure, and the order that the guest can have seen.

use std::cell::RefCell;
use std::fmt::Display;
use std::rc::Rc;

use crate::history::Clock;

/// One cut through a group of disks.
#[derive(Debug)]
struct GroupCut {
    /// Of each disk in the group: the first generation that is not in the snapshot.
    generations: Vec<Option<u64>>,
    /// When the last request began that belongs to it, and the first ended that does not.
    latest_inside: u64,
    earliest_outside: u64,
}

/// All disks of one test.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    clock: Clock,
    lines: RefCell<Vec<String>>,
    cuts: RefCell<Vec<GroupCut>>,
}

impl Journal {
    pub(crate) fn new(clock: Clock) -> Rc<Self> {
        Rc::new(Self { clock, ..Self::default() })
    }

    /// For disks that go on after a crash.
    pub(crate) fn after(before: &Self, clock: Clock) -> Rc<Self> {
        let lines = before.lines.clone();
        Rc::new(Self { clock, lines, ..Self::default() })
    }

    /// Takes note of something.
    pub(crate) fn note(&self, what: impl Display) {
        self.lines.borrow_mut().push(format!("{:>6} {what}", self.clock.now()));
    }

    /// Ends the test with what is wrong.
    pub(crate) fn fail(&self, seed: u64, what: impl Display) -> ! {
        for line in &*self.lines.borrow() {
            eprintln!("{line}");
        }
        panic!("seed {seed}: {what}")
    }

    /// A cut begins: it excludes, of each disk in the group, requests of the given generation and later ones. Returns its number.
    pub(crate) fn cut(&self, generations: Vec<Option<u64>>) -> usize {
        let mut cuts = self.cuts.borrow_mut();
        cuts.push(GroupCut { generations, latest_inside: 0, earliest_outside: u64::MAX });
        cuts.len() - 1
    }

    /// A request has ended, and the guest knows its result.
    pub(crate) fn ended(&self, disk: usize, generation: u64, began: u64) {
        let now = self.clock.tick();
        for cut in &mut *self.cuts.borrow_mut() {
            match cut.generations.get(disk).copied().flatten() {
                Some(first) if generation < first => cut.latest_inside = cut.latest_inside.max(began),
                Some(_) => cut.earliest_outside = cut.earliest_outside.min(now),
                None => {}
            }
        }
    }

    /// Whether a cut is one point in time: no request belongs to it that the guest began after it had seen the result of one that does not.
    pub(crate) fn is_one_point(&self, cut: usize) -> bool {
        let cut = &self.cuts.borrow()[cut];
        cut.latest_inside < cut.earliest_outside
    }
}

#[test]
fn a_cut_with_a_request_that_followed_one_outside_is_no_point_in_time() {
    let journal = Journal::new(Clock::default());
    let (one, other) = (journal.cut(vec![Some(1), Some(1)]), journal.cut(vec![Some(1), None]));
    let early = journal.clock.tick();
    journal.ended(0, 1, journal.clock.tick());
    journal.ended(1, 0, early);
    assert!(journal.is_one_point(one));
    journal.ended(1, 0, journal.clock.tick());
    assert!(!journal.is_one_point(one) && journal.is_one_point(other));
}

//! What was tried.

use std::fmt;
use std::ops::AddAssign;

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) histories: u64,
    /// Moments at which the power may go off.
    pub(crate) points: u64,
    /// Disks that it may leave, over all moments; each was compared with what must be found there then.
    pub(crate) states: u64,
    /// Moments that leave so many disks that only some were looked at.
    pub(crate) drawn_points: u64,
    /// Disks without those that came out before.
    pub(crate) distinct: u64,
    /// The same of power cuts during recovery.
    pub(crate) second_points: u64,
    pub(crate) second_states: u64,
    pub(crate) second_drawn_points: u64,
    /// Disks of `distinct` with leaks, and how many clusters they had lost.
    pub(crate) leaky: u64,
    pub(crate) leaks: u64,
    /// Disks at which QEMU has looked.
    pub(crate) foreign: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.histories += other.histories;
        self.points += other.points;
        self.states += other.states;
        self.drawn_points += other.drawn_points;
        self.distinct += other.distinct;
        self.second_points += other.second_points;
        self.second_states += other.second_states;
        self.second_drawn_points += other.second_drawn_points;
        self.leaky += other.leaky;
        self.leaks += other.leaks;
        self.foreign += other.foreign;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { histories, points, states, drawn_points, distinct, .. } = self;
        let Self { second_points, second_states, second_drawn_points, leaky, leaks, foreign, .. } = self;
        write!(f, "{histories} histories, {points} crash points ({drawn_points} of them with states drawn by chance), {states} states; ")?;
        write!(f, "in recovery {second_points} points ({second_drawn_points} drawn), {second_states} states; ")?;
        write!(f, "{distinct} distinct disks, {leaky} with {leaks} leaks, all repaired; {foreign} seen by qemu-img; 0 lost, 0 corrupt")
    }
}

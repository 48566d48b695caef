//! Which of the states that a crash may leave are tried.

use super::disk::Disk;
use crate::storage::Chance;

/// States that a crash may leave on the medium: all of them if they are no more than `limit`; else the extremes, all subsets of whole changes or
/// at least all prefixes, and chance for the rest.
#[derive(Debug)]
pub(super) struct CrashStates {
    disk: Disk,
    pieces: Vec<usize>,
    plan: Plan,
    next: u64,
    limit: u64,
    chance: Chance,
}

#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Every subset of all pieces.
    AllPieces,
    /// Every subset of whole changes, then chance.
    AllChanges,
    /// Every prefix of the changes, then chance.
    Prefixes,
    /// Nothing, everything, then chance.
    Samples,
}

impl CrashStates {
    pub(super) fn new(disk: Disk, limit: u64, chance: Chance) -> Self {
        let pieces = disk.waiting_pieces();
        let total: usize = pieces.iter().sum();
        let subsets = |count: usize| u32::try_from(count).ok().and_then(|count| 1_u64.checked_shl(count)).unwrap_or(u64::MAX);
        let (plan, limit) = if subsets(total) <= limit {
            (Plan::AllPieces, subsets(total))
        } else if subsets(pieces.len()) <= limit {
            (Plan::AllChanges, limit)
        } else if pieces.len() as u64 * 2 <= limit {
            (Plan::Prefixes, limit)
        } else {
            (Plan::Samples, limit)
        };
        Self { disk, pieces, plan, next: 0, limit, chance }
    }
}

impl Iterator for CrashStates {
    type Item = Disk;

    fn next(&mut self) -> Option<Disk> {
        if self.next == self.limit {
            return None;
        }
        let state = self.next;
        self.next += 1;
        let changes = self.pieces.len();
        Some(match self.plan {
            Plan::AllPieces => {
                let first = |count: &mut usize, pieces: &usize| Some(std::mem::replace(count, *count + pieces));
                let firsts: Vec<usize> = self.pieces.iter().scan(0, first).collect();
                self.disk.crashed(|change, piece| state >> (firsts[change] + piece) & 1 == 1)
            }
            Plan::AllChanges if state < 1 << changes => self.disk.crashed(|change, _| state >> change & 1 == 1),
            Plan::Prefixes if state <= changes as u64 => self.disk.crashed(|change, _| (change as u64) < state),
            Plan::Samples if state == 0 => self.disk.crashed(|_, _| false),
            Plan::Samples if state == 1 => self.disk.crashed(|_, _| true),
            _ => sample(&self.disk, &mut self.chance),
        })
    }
}

/// One state by chance. Which kind of damage it has is chosen first: uniformly drawn subsets would all look alike.
pub(super) fn sample(disk: &Disk, chance: &mut Chance) -> Disk {
    let pieces = disk.waiting_pieces();
    let changes = pieces.len() as u64;
    match chance.below(6) {
        // Only the newest changes are missing, and one is torn.
        0 => {
            let end = chance.below(changes + 1) as usize;
            disk.crashed(|change, _| change < end || change == end && chance.happens(1, 2))
        }
        // One change is missing or torn.
        1 => {
            let lost = chance.below(changes) as usize;
            let torn = chance.happens(1, 2);
            disk.crashed(|change, _| change != lost || torn && chance.happens(1, 2))
        }
        // Only one change is there.
        2 => {
            let kept = chance.below(changes) as usize;
            let torn = chance.happens(1, 2);
            disk.crashed(|change, _| change == kept && !(torn && chance.happens(1, 2)))
        }
        // Changes are there or not.
        3 | 4 => {
            let share = 1 + chance.below(7);
            let kept: Vec<bool> = pieces.iter().map(|_| chance.happens(share, 8)).collect();
            disk.crashed(|change, _| kept[change])
        }
        // Everything is torn.
        _ => {
            let share = 1 + chance.below(7);
            disk.crashed(|_, _| chance.happens(share, 8))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::super::disk::FileChange;
    use super::*;
    use crate::storage::sparse::SparseBytes;

    fn contents(sectors: usize, limit: u64) -> Vec<Vec<u8>> {
        let mut disk = Disk::default();
        disk.put(Path::new("/file"), SparseBytes::default());
        let inode = disk.names().file(Path::new("/file")).unwrap();
        disk.change(inode, FileChange::Grow(sectors as u64 * 512));
        disk.flush(inode, disk.next_change());
        for sector in 0..sectors {
            disk.change(inode, FileChange::Bytes { at: sector as u64 * 512, bytes: [1; 512].as_slice().into() });
        }
        let states = CrashStates::new(disk, limit, Chance::new(1));
        let content =
            |disk: Disk| (0..sectors).map(|sector| disk.visible(inode).to_vec(sector as u64 * 512..sector as u64 * 512 + 1)[0]).collect();
        states.map(content).collect()
    }

    #[test]
    fn few_pieces_give_every_subset() {
        let states = contents(4, 16);
        assert_eq!(states.len(), 16);
        assert_eq!(states.into_iter().collect::<BTreeSet<_>>().len(), 16);
    }

    #[test]
    fn many_pieces_give_prefixes_and_samples() {
        let states = contents(20, 60);
        assert_eq!(states.len(), 60);
        assert_eq!(states[0], [0; 20]);
        assert_eq!(states[20], [1; 20]);
        assert!(states.into_iter().collect::<BTreeSet<_>>().len() > 35);
    }
}

//! Everything that a crash may leave, as choices that do not depend on one another.
//!
//! Of the changes that wait in the volatile cache each piece survives a crash or not. Most of those subsets give the same disk: a sector that
//! was written twice has three contents and not four, zeros over zeros make no difference, and only the longest of several growths counts. So
//! the disks themselves are counted here: what the names are, how long each file is, and what each sector holds.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::SimulatedEnvironment;
use super::disk::{Disk, FileChange, SECTOR};
use crate::storage::Chance;
use crate::storage::names::{Entry, Names};
use crate::storage::sparse::SparseBytes;

type Sector = [u8; SECTOR as usize];

/// All disks that a crash at one moment may leave.
#[derive(Debug)]
pub struct CrashSpace {
    disk: Disk,
    now: Duration,
    frames: Vec<Frame>,
}

/// One of the disks of a [`CrashSpace`].
#[derive(Clone, Debug)]
pub struct CrashState {
    frame: usize,
    /// Of each sector that has a choice, in the order of [`Frame::choices`].
    picks: Vec<usize>,
    /// The same for the same files with the same bytes, wherever they come from.
    pub fingerprint: u64,
}

/// The disks with the same names and lengths.
#[derive(Debug)]
struct Frame {
    names: Names<u64>,
    files: Vec<Arc<FileStates>>,
    /// Of the disk with the first alternative of each choice.
    fingerprint: u64,
}

/// A file of one name and one length, and what its sectors may hold.
#[derive(Debug)]
struct FileStates {
    inode: u64,
    len: u64,
    /// Sectors that differ from the durable ones in one way only.
    fixed: Vec<(u64, Arc<Sector>)>,
    choices: Vec<Choice>,
    fingerprint: u64,
}

/// A sector with more than one possible content.
#[derive(Debug)]
struct Choice {
    at: u64,
    /// Oldest first.
    alternatives: Vec<Alternative>,
}

#[derive(Clone, Debug)]
struct Alternative {
    bytes: Arc<Sector>,
    /// The change that made it so; 0: it was durable.
    change: u64,
    mark: u64,
}

/// What the changes of length that survive come to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lengths {
    len: u64,
    /// Where bytes were cut off, and after how many of the changes.
    cuts: Vec<(usize, u64)>,
}

impl CrashSpace {
    pub(super) fn new(disk: Disk, now: Duration) -> Self {
        let mut frames = Vec::new();
        for names in disk.possible_names() {
            let mut combinations = vec![Vec::new()];
            let mut fingerprint = 0;
            for (path, entry) in names.iter() {
                match entry {
                    Entry::File(inode) => {
                        let states = file_states(&disk, path, *inode);
                        let with = |files: &Vec<Arc<FileStates>>| {
                            let files = files.clone();
                            states.clone().into_iter().map(move |state| files.iter().cloned().chain([state]).collect())
                        };
                        combinations = combinations.iter().flat_map(with).collect();
                    }
                    Entry::Link(target) => fingerprint ^= mark_of(&(path, target)),
                }
            }
            frames.extend(combinations.into_iter().map(|files: Vec<Arc<FileStates>>| {
                let fingerprint = files.iter().fold(fingerprint, |all, file| all ^ file.fingerprint);
                Frame { names: names.clone(), files, fingerprint }
            }));
        }
        Self { disk, now, frames }
    }

    /// How many disks there are; `u64::MAX` if they are more.
    pub fn count(&self) -> u64 {
        let of_frame = |frame: &Frame| frame.choices().fold(1_u64, |count, choice| count.saturating_mul(choice.alternatives.len() as u64));
        self.frames.iter().map(of_frame).fold(0, u64::saturating_add)
    }

    /// All of them, each once.
    pub fn all(&self) -> impl Iterator<Item = CrashState> {
        self.frames.iter().enumerate().flat_map(|(number, frame)| {
            let first = CrashState { frame: number, picks: vec![0; frame.choices().count()], fingerprint: frame.fingerprint };
            std::iter::successors(Some(first), |state| frame.after(state))
        })
    }

    /// One by chance. Which kind of damage it has is chosen first: uniformly drawn ones would all look alike.
    pub fn sample(&self, chance: &mut Chance) -> CrashState {
        // Later frames have more of the names and lengths.
        let last = self.frames.len() - 1;
        let number = if chance.happens(1, 2) { last } else { chance.index(last + 1) };
        let frame = &self.frames[number];
        let changes: Vec<u64> = frame.choices().flat_map(|choice| choice.alternatives.iter().map(|one| one.change)).collect();
        let kind = chance.below(4);
        let share = 1 + chance.below(7);
        let bound = if changes.is_empty() { 0 } else { changes[chance.index(changes.len())] };
        let mut pick = |choice: &Choice| {
            let most = choice.alternatives.len() - 1;
            let any = chance.index(most + 1);
            match kind {
                // What was written after some moment is missing.
                0 => choice.alternatives.iter().rposition(|one| one.change <= bound).unwrap_or(0),
                // A few sectors are old.
                1 if chance.happens(7, 8) => most,
                // A few sectors are new.
                2 if chance.happens(7, 8) => 0,
                3 if chance.happens(share, 8) => most,
                _ => any,
            }
        };
        let picks: Vec<usize> = frame.choices().map(&mut pick).collect();
        let marks = frame.choices().zip(&picks).map(|(choice, pick)| choice.alternatives[0].mark ^ choice.alternatives[*pick].mark);
        let fingerprint = marks.fold(frame.fingerprint, |all, mark| all ^ mark);
        CrashState { frame: number, picks, fingerprint }
    }

    /// The disk of one of the states.
    pub fn disk(&self, state: &CrashState) -> SimulatedEnvironment {
        let frame = &self.frames[state.frame];
        let mut picks = state.picks.iter();
        let files = frame.files.iter().map(|file| {
            let mut bytes = self.disk.durable(file.inode).clone();
            let chosen = file.choices.iter().zip(&mut picks).map(|(choice, pick)| (choice.at, &choice.alternatives[*pick].bytes));
            for (at, sector) in file.fixed.iter().map(|(at, sector)| (*at, sector)).chain(chosen) {
                bytes.write_bytes(at, &sector[..]).expect("a position that was admitted");
            }
            bytes.set_len(file.len).expect("a length that was admitted");
            (file.inode, bytes)
        });
        let disk = self.disk.with(frame.names.clone(), files.collect::<Vec<_>>().into_iter());
        SimulatedEnvironment::with_disk(state.fingerprint, disk, self.now)
    }
}

impl Frame {
    fn choices(&self) -> impl Iterator<Item = &Choice> {
        self.files.iter().flat_map(|file| &file.choices)
    }

    /// The state that follows, if it is not the last.
    fn after(&self, state: &CrashState) -> Option<CrashState> {
        let mut next = state.clone();
        for (choice, pick) in self.choices().zip(&mut next.picks) {
            let before = choice.alternatives[*pick].mark;
            *pick = (*pick + 1) % choice.alternatives.len();
            next.fingerprint ^= before ^ choice.alternatives[*pick].mark;
            if *pick != 0 {
                return Some(next);
            }
        }
        None
    }
}

/// What a crash may leave of a file: one element for each length.
fn file_states(disk: &Disk, path: &Path, inode: u64) -> Vec<Arc<FileStates>> {
    let (durable, changes) = (disk.durable(inode), disk.waiting(inode).collect::<Vec<_>>());
    let mut lengths = vec![Lengths { len: durable.len(), cuts: Vec::new() }];
    for (index, (_, change)) in changes.iter().enumerate() {
        for mut one in lengths.clone() {
            match change {
                FileChange::Grow(to) => one.len = one.len.max(*to),
                FileChange::Length(to) => {
                    if *to < one.len {
                        one.cuts.push((index, *to));
                    }
                    one.len = *to;
                }
                FileChange::Bytes { .. } | FileChange::Hole { .. } | FileChange::Space { .. } => continue,
            }
            if !lengths.contains(&one) {
                lengths.push(one);
            }
        }
    }
    lengths.into_iter().map(|lengths| Arc::new(states_of_length(durable, path, inode, &changes, &lengths))).collect()
}

fn states_of_length(durable: &SparseBytes, path: &Path, inode: u64, changes: &[(u64, &FileChange)], lengths: &Lengths) -> FileStates {
    let mut touched: BTreeMap<u64, Vec<Alternative>> = BTreeMap::new();
    let at_first = |at: u64| {
        let bytes = Arc::new(durable.to_vec(at..at + SECTOR).try_into().expect("a whole sector"));
        vec![Alternative { bytes, change: 0, mark: 0 }]
    };
    let mut cuts = lengths.cuts.iter().peekable();
    for (index, (number, change)) in changes.iter().enumerate() {
        if let FileChange::Bytes { at, bytes } = change {
            for sector in sectors(*at, bytes.len() as u64) {
                let alternatives = touched.entry(sector).or_insert_with(|| at_first(sector));
                may_change(alternatives, *number, |old| {
                    let (from, to) = ((*at).max(sector), (at + bytes.len() as u64).min(sector + SECTOR));
                    old[(from - sector) as usize..(to - sector) as usize].copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
                });
            }
        }
        if let FileChange::Hole { at, len } = change {
            for sector in sectors(*at, *len).filter(|sector| *sector < durable.len().max(lengths.len)) {
                let alternatives = touched.entry(sector).or_insert_with(|| at_first(sector));
                may_change(alternatives, *number, |old| {
                    let (from, to) = ((*at).max(sector), (at + len).min(sector + SECTOR));
                    old[(from - sector) as usize..(to - sector) as usize].fill(0);
                });
            }
        }
        if cuts.peek().is_some_and(|(after, _)| *after == index) {
            let (_, to) = cuts.next().expect("it was just looked at");
            cut_off(&mut touched, durable, *to, at_first);
        }
    }
    cut_off(&mut touched, durable, lengths.len, at_first);

    let mut states =
        FileStates { inode, len: lengths.len, fixed: Vec::new(), choices: Vec::new(), fingerprint: mark_of(&(path, lengths.len)) };
    for (start, page) in durable.filled_pages() {
        for (at, bytes) in (start..).step_by(SECTOR as usize).zip(page.chunks_exact(SECTOR as usize)) {
            let mark = mark(path, at, bytes);
            if mark != 0 && !touched.contains_key(&at) {
                states.fingerprint ^= mark;
            }
        }
    }
    for (at, mut alternatives) in touched {
        for one in &mut alternatives {
            one.mark = mark(path, at, &one.bytes[..]);
        }
        states.fingerprint ^= alternatives[0].mark;
        match alternatives.len() {
            1 => states.fixed.push((at, alternatives.swap_remove(0).bytes)),
            _ => states.choices.push(Choice { at, alternatives }),
        }
    }
    states
}

/// Takes into account that a change has taken place or not.
fn may_change(alternatives: &mut Vec<Alternative>, number: u64, change: impl Fn(&mut Sector)) {
    for before in alternatives.clone() {
        let mut bytes = *before.bytes;
        change(&mut bytes);
        if !alternatives.iter().any(|one| *one.bytes == bytes) {
            alternatives.push(Alternative { bytes: Arc::new(bytes), change: number, mark: 0 });
        }
    }
}

/// Zeros everything from a position on.
fn cut_off(touched: &mut BTreeMap<u64, Vec<Alternative>>, durable: &SparseBytes, to: u64, at_first: impl Fn(u64) -> Vec<Alternative>) {
    let first = to / SECTOR * SECTOR;
    for range in durable.allocated_ranges() {
        for at in sectors(range.start.max(first), range.end.saturating_sub(range.start.max(first))) {
            touched.entry(at).or_insert_with(|| at_first(at));
        }
    }
    for (at, alternatives) in touched.range_mut(first..) {
        let kept = to.saturating_sub(*at).min(SECTOR) as usize;
        let mut left: Vec<Alternative> = Vec::new();
        for mut one in alternatives.drain(..) {
            if one.bytes[kept..].iter().any(|byte| *byte != 0) {
                Arc::make_mut(&mut one.bytes)[kept..].fill(0);
            }
            if !left.iter().any(|other| other.bytes == one.bytes) {
                left.push(one);
            }
        }
        *alternatives = left;
    }
}

/// The positions of all sectors that a range touches.
fn sectors(at: u64, len: u64) -> impl Iterator<Item = u64> {
    let end = if len == 0 { at / SECTOR } else { (at + len).div_ceil(SECTOR) };
    (at / SECTOR..end).map(|sector| sector * SECTOR)
}

/// What a sector adds to a fingerprint. Zeros add nothing, whether there is space for them or not.
fn mark(path: &Path, at: u64, bytes: &[u8]) -> u64 {
    if bytes == [0; SECTOR as usize] { 0 } else { mark_of(&(path, at, bytes)) }
}

fn mark_of(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;

    const FILE: &str = "/file";

    /// A disk with changes of every kind that wait.
    fn busy_disk(seed: u64) -> Disk {
        let mut chance = Chance::new(seed);
        let mut disk = Disk::default();
        let mut sparse = SparseBytes::default();
        sparse.write_bytes(0, &[1; 1024]).unwrap();
        disk.put(Path::new(FILE), sparse);
        let inode = disk.names().file(Path::new(FILE)).unwrap();
        for value in 2..6 {
            let at = chance.below(6) * 256;
            match chance.below(6) {
                0 => disk.change(inode, FileChange::Hole { at, len: 512 }),
                1 => disk.change(inode, FileChange::Length(at)),
                2 => disk.change(inode, FileChange::Space { at, len: 512 }),
                3 if chance.happens(1, 2) => drop(disk.create(format!("/new{value}").into()).unwrap()),
                _ => {
                    let grows = at + 512 > disk.visible(inode).len();
                    disk.change(inode, FileChange::Bytes { at, bytes: [value; 512].as_slice().into() });
                    if grows {
                        disk.change(inode, FileChange::Grow(at + 512));
                    }
                }
            }
        }
        disk
    }

    fn content(environment: &SimulatedEnvironment) -> Vec<(PathBuf, Vec<u8>)> {
        environment.files().into_iter().map(|file| (file.clone(), environment.bytes(&file).unwrap())).collect()
    }

    #[test]
    fn its_disks_are_those_that_subsets_of_changes_leave() {
        for seed in 0..300 {
            let disk = busy_disk(seed);
            let pieces = disk.waiting_pieces();
            let total: usize = pieces.iter().sum();
            let firsts: Vec<usize> = pieces.iter().scan(0, |count, pieces| Some(std::mem::replace(count, *count + pieces))).collect();
            let by_subsets: BTreeSet<_> = (0..1_u32 << total)
                .map(|subset| disk.crashed(|change, piece| subset >> (firsts[change] + piece) & 1 == 1))
                .map(|disk| content(&SimulatedEnvironment::with_disk(0, disk, Duration::ZERO)))
                .collect();
            let space = CrashSpace::new(disk, Duration::ZERO);
            let states: Vec<_> = space.all().collect();
            let by_choices: Vec<_> = states.iter().map(|state| content(&space.disk(state))).collect();
            assert_eq!(space.count(), states.len() as u64, "seed {seed}");
            assert_eq!(by_choices.iter().cloned().collect::<BTreeSet<_>>(), by_subsets, "seed {seed}");
            let fingerprints: BTreeSet<u64> = states.iter().map(|state| state.fingerprint).collect();
            assert_eq!(fingerprints.len(), by_subsets.len(), "seed {seed}: the fingerprint tells disks apart, and nothing else");
            for state in &states {
                let again = space.disk(state).crash_space();
                assert_eq!((again.count(), again.all().next().unwrap().fingerprint), (1, state.fingerprint), "seed {seed}");
            }
            let mut chance = Chance::new(seed);
            assert!((0..20).all(|_| fingerprints.contains(&space.sample(&mut chance).fingerprint)), "seed {seed}");
        }
    }
}

//! What the guest and the client know, and what follows from it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use snapfence_image_format::units::SECTOR_BYTES;

/// Where guests write: three places, the second with a part of both clusters. First sectors.
const REGIONS: [u64; 3] = [0, 120, 240];
/// Sectors of each place.
const REGION_SECTORS: u64 = 12;
/// Sectors of a disk that are looked at.
pub(crate) const SECTORS: u64 = 256;
const CLUSTER_SECTORS: u64 = 128;

/// A change of one sector. Zeros are of write 0, whoever asked for them.
#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    submitted: u64,
    completed: Option<u64>,
    /// It may not have happened, although it is complete: a discard, or a write that failed.
    may_be_missing: bool,
}

/// What becomes of a change that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It is there.
    Complete,
    /// As that, and a power cut cannot take it away.
    Durable,
    /// It may be there.
    Unknown,
}

#[derive(Debug)]
struct Sector {
    /// In order: no change is submitted while another one of the sector is under way.
    history: Vec<Entry>,
    /// The first that a power cut may go back to.
    durable: usize,
}

/// A snapshot that was asked for.
#[derive(Debug)]
struct Cut {
    devices: Vec<usize>,
    asked: u64,
    answered: Option<u64>,
    /// Whether the client has seen that it is frozen.
    frozen: bool,
    /// What was in it when it was first looked at.
    contents: Option<Vec<Vec<u64>>>,
}

/// The disks of a guest. Every event has a number, so that of any two it is known which was first.
#[derive(Debug, Default)]
pub(crate) struct Model {
    events: u64,
    writes: u64,
    disks: Vec<BTreeMap<u64, Sector>>,
    cuts: BTreeMap<String, Cut>,
}

/// The sectors that guests write to.
pub(crate) fn sectors() -> impl Iterator<Item = u64> {
    REGIONS.into_iter().flat_map(|first| first..first + REGION_SECTORS)
}

/// Some sectors that follow one another, `place` and `from` being any numbers.
pub(crate) fn range(place: usize, from: u64, count: u64) -> Range<u64> {
    let from = from % REGION_SECTORS;
    let first = REGIONS[place % REGIONS.len()] + from;
    first..first + count.min(REGION_SECTORS - from)
}

/// All sectors of a cluster, most of which nobody writes to.
pub(crate) fn cluster(number: u64) -> Range<u64> {
    let first = number * CLUSTER_SECTORS % SECTORS;
    first..first + CLUSTER_SECTORS
}

/// The bytes of sectors that one write has filled.
pub(crate) fn filled(id: u64, sectors: u64) -> Vec<u8> {
    id.to_le_bytes().repeat(usize::try_from(sectors * SECTOR_BYTES / 8).expect("small"))
}

/// Which write each sector is of.
pub(crate) fn ids(bytes: &[u8]) -> Vec<u64> {
    let id = |sector: &[u8]| {
        assert!(sector.chunks(8).all(|word| word == &sector[..8]), "a sector is torn");
        u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"))
    };
    bytes.chunks(usize::try_from(SECTOR_BYTES).expect("small")).map(id).collect()
}

impl Sector {
    fn of(entry: Entry) -> Self {
        Self { history: vec![entry], durable: 0 }
    }

    /// Whether the sector can read as write `id` when this entry is the last.
    fn reads(&self, place: usize, id: u64) -> bool {
        let entry = &self.history[place];
        entry.id == id || entry.may_be_missing && place > 0 && self.reads(place - 1, id)
    }

    /// The last entries, newest first, after which the sector can read so.
    fn places(&self, id: u64) -> impl Iterator<Item = usize> {
        (0..self.history.len()).rev().filter(move |place| self.reads(*place, id))
    }

    fn last_completed(&self) -> usize {
        self.history.iter().rposition(|entry| entry.completed.is_some()).expect("zeros are complete")
    }

    /// The cuts that have it so, as the numbers of events after which they can be, each from one up to another: after what it has was submitted,
    /// before anything that it misses was complete.
    fn cuts(&self, id: u64) -> impl Iterator<Item = Range<u64>> {
        self.places(id).map(|place| {
            let missed = self.history[place + 1..].iter().filter_map(|entry| entry.completed).min();
            self.history[place].submitted..missed.unwrap_or(u64::MAX)
        })
    }
}

impl Model {
    pub(crate) fn new(disks: usize) -> Self {
        let zeros = Entry { id: 0, submitted: 0, completed: Some(0), may_be_missing: false };
        let disk = || sectors().map(|sector| (sector, Sector::of(zeros))).collect();
        Self { disks: (0..disks).map(|_| disk()).collect(), ..Self::default() }
    }

    fn next_event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    /// A write is submitted. Returns what it fills its sectors with.
    pub(crate) fn write_submitted(&mut self, disk: usize, sectors: Range<u64>) -> u64 {
        self.writes += 1;
        let id = self.writes;
        self.change_submitted(disk, sectors, id);
        id
    }

    /// Zeros are asked for.
    pub(crate) fn zeros_submitted(&mut self, disk: usize, sectors: Range<u64>) {
        self.change_submitted(disk, sectors, 0);
    }

    fn change_submitted(&mut self, disk: usize, sectors: Range<u64>, id: u64) {
        let submitted = self.next_event();
        let entry = Entry { id, submitted, completed: None, may_be_missing: false };
        for (_, sector) in self.disks[disk].range_mut(sectors) {
            sector.history.push(entry);
        }
    }

    pub(crate) fn change_completed(&mut self, disk: usize, sectors: Range<u64>, end: End) {
        let completed = self.next_event();
        for (_, sector) in self.disks[disk].range_mut(sectors) {
            let last = sector.history.last_mut().expect("submitted");
            assert!(last.completed.replace(completed).is_none(), "a write completes once");
            last.may_be_missing = end == End::Unknown;
            if end == End::Durable {
                sector.durable = sector.history.len() - 1;
            }
        }
    }

    /// What a flush that is submitted now makes durable: of each sector so many entries.
    pub(crate) fn flush_submitted(&mut self, disk: usize) -> Vec<(u64, usize)> {
        self.next_event();
        self.disks[disk].iter().map(|(number, sector)| (*number, sector.last_completed())).collect()
    }

    pub(crate) fn flush_completed(&mut self, disk: usize, covered: Vec<(u64, usize)>) {
        for (number, last) in covered {
            let sector = self.disks[disk].get_mut(&number).expect("a place for writes");
            sector.durable = sector.durable.max(last);
        }
    }

    /// The guest is told that a flush has failed: what was not durable by now never may be, although it can be seen until a power cut.
    pub(crate) fn may_have_lost(&mut self, disk: usize) {
        for sector in self.disks[disk].values_mut() {
            let not_durable = &mut sector.history[sector.durable + 1..];
            not_durable.iter_mut().filter(|entry| entry.completed.is_some()).for_each(|entry| entry.may_be_missing = true);
        }
    }

    /// Oracle 1: a read of sectors to which nothing is under way.
    pub(crate) fn read_completed(&self, disk: usize, sectors: Range<u64>, bytes: &[u8]) {
        for (number, id) in sectors.zip(ids(bytes)) {
            let sector = &self.disks[disk][&number];
            let history = &sector.history;
            assert!(sector.reads(history.len() - 1, id), "sector {number} of disk {disk}: read {id}, and last written {history:?}");
        }
    }

    /// Oracle 2: what a power cut has left. From here on it is all that there is.
    pub(crate) fn settle(&mut self, disk: usize, bytes: &[u8]) {
        let (found, now) = (ids(bytes), self.events);
        for (number, sector) in &mut self.disks[disk] {
            let id = found[usize::try_from(*number).expect("small")];
            let place = sector.places(id).next().filter(|place| *place >= sector.durable);
            let place = place.unwrap_or_else(|| {
                panic!(
                    "after a power cut sector {number} of disk {disk} is of write {id}; entry {} of its history had been flushed: {:?}",
                    sector.durable, sector.history
                )
            });
            let entry = sector.history[place];
            *sector = Sector::of(Entry { id, completed: Some(entry.completed.unwrap_or(now)), may_be_missing: false, ..entry });
        }
    }

    pub(crate) fn asked(&mut self, name: &str, devices: Vec<usize>) {
        let asked = self.next_event();
        self.cuts.insert(name.to_owned(), Cut { devices, asked, answered: None, frozen: false, contents: None });
    }

    pub(crate) fn answered(&mut self, name: &str) {
        let now = self.next_event();
        self.cuts.get_mut(name).expect("it was asked for").answered.get_or_insert(now);
    }

    /// The daemon is gone: nothing that is submitted from now on can be in a snapshot that was asked of it.
    pub(crate) fn daemon_gone(&mut self) {
        let now = self.next_event();
        for cut in self.cuts.values_mut() {
            cut.answered.get_or_insert(now);
        }
    }

    /// Snapshots that a client has seen frozen.
    pub(crate) fn frozen(&self) -> BTreeSet<String> {
        self.cuts.iter().filter(|(_, cut)| cut.frozen).map(|(name, _)| name.clone()).collect()
    }

    /// Oracles 3 and 4: what a frozen snapshot holds, a whole disk for each member.
    pub(crate) fn look_at(&mut self, name: &str, members: Vec<(usize, Vec<u8>)>) {
        let cut = self.cuts.get_mut(name).expect("it was asked for");
        cut.frozen = true;
        let of: Vec<usize> = members.iter().map(|(disk, _)| *disk).collect();
        assert_eq!(of, cut.devices, "the members of {name}");
        let contents: Vec<Vec<u64>> = members.iter().map(|(_, bytes)| ids(bytes)).collect();
        if let Some(before) = &cut.contents {
            assert!(*before == contents, "what is in {name} has changed");
            return;
        }
        // Each sector says when the cut can have been.
        let in_time = cut.asked..cut.answered.unwrap_or(u64::MAX);
        let mut possible = Vec::new();
        for (disk, contents) in of.iter().zip(&contents) {
            for (number, sector) in &self.disks[*disk] {
                let id = contents[usize::try_from(*number).expect("small")];
                let (cuts, history): (Vec<_>, _) = (sector.cuts(id).collect(), &sector.history);
                let fits = cuts.iter().any(|cut| cut.start < in_time.end && in_time.start < cut.end);
                assert!(fits, "in {name}, {in_time:?}, sector {number} of disk {disk} is of write {id}, too old or too new: {history:?}");
                possible.push(cuts);
            }
        }
        let begins = possible.iter().flatten().map(|cut| cut.start.max(in_time.start)).collect::<BTreeSet<_>>();
        let is_one_cut = |at: &u64| in_time.contains(at) && possible.iter().all(|cuts| cuts.iter().any(|cut| cut.contains(at)));
        assert!(
            begins.iter().any(is_one_cut),
            "{name} is no one cut: it has what was submitted after something that it misses was complete"
        );
        cut.contents = Some(contents);
    }
}

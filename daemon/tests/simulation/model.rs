//! What the guest and the client know, and what follows from it.

use std::collections::{BTreeMap, BTreeSet};

use snapfence_image_format::units::SECTOR_BYTES;

/// Where guests write: three places, the second with a part of both clusters. First sectors.
const REGIONS: [u64; 3] = [0, 120, 240];
/// Sectors of each place.
const REGION_SECTORS: u64 = 12;
/// Sectors of a disk that are looked at.
pub(crate) const SECTORS: u64 = 256;

/// A write to one sector.
#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    submitted: u64,
    completed: Option<u64>,
}

#[derive(Debug)]
struct Sector {
    /// In order: no write is submitted while another one of the sector is under way.
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
pub(crate) fn range(place: usize, from: u64, count: u64) -> std::ops::Range<u64> {
    let from = from % REGION_SECTORS;
    let first = REGIONS[place % REGIONS.len()] + from;
    first..first + count.min(REGION_SECTORS - from)
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

    fn place(&self, id: u64, what: &str) -> usize {
        let found = self.history.iter().rposition(|entry| entry.id == id);
        found.unwrap_or_else(|| panic!("{what} is of write {id}, which is not one of {:?}", self.history))
    }

    fn last_completed(&self) -> usize {
        self.history.iter().rposition(|entry| entry.completed.is_some()).expect("zeros are complete")
    }
}

impl Model {
    pub(crate) fn new(disks: usize) -> Self {
        let zeros = Entry { id: 0, submitted: 0, completed: Some(0) };
        let disk = || sectors().map(|sector| (sector, Sector::of(zeros))).collect();
        Self { disks: (0..disks).map(|_| disk()).collect(), ..Self::default() }
    }

    fn next_event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    /// A write is submitted. Returns what it fills its sectors with.
    pub(crate) fn write_submitted(&mut self, disk: usize, sectors: std::ops::Range<u64>) -> u64 {
        let submitted = self.next_event();
        self.writes += 1;
        let entry = Entry { id: self.writes, submitted, completed: None };
        for sector in sectors {
            self.disks[disk].get_mut(&sector).expect("a place for writes").history.push(entry);
        }
        self.writes
    }

    pub(crate) fn write_completed(&mut self, disk: usize, sectors: std::ops::Range<u64>) {
        let completed = self.next_event();
        for sector in sectors {
            let last = self.disks[disk].get_mut(&sector).and_then(|sector| sector.history.last_mut()).expect("submitted");
            assert!(last.completed.replace(completed).is_none(), "a write completes once");
        }
    }

    /// What a flush that is submitted now makes durable.
    pub(crate) fn flush_submitted(&mut self, disk: usize) -> Vec<(u64, u64)> {
        self.next_event();
        self.disks[disk].iter().map(|(number, sector)| (*number, sector.history[sector.last_completed()].id)).collect()
    }

    pub(crate) fn flush_completed(&mut self, disk: usize, covered: Vec<(u64, u64)>) {
        for (number, id) in covered {
            let sector = self.disks[disk].get_mut(&number).expect("a place for writes");
            sector.durable = sector.durable.max(sector.place(id, "what was flushed"));
        }
    }

    /// Oracle 1: a read of sectors to which nothing is under way.
    pub(crate) fn read_completed(&self, disk: usize, sectors: std::ops::Range<u64>, bytes: &[u8]) {
        for (number, id) in sectors.zip(ids(bytes)) {
            let sector = &self.disks[disk][&number];
            let expected = sector.history.last().expect("zeros").id;
            assert_eq!(id, expected, "sector {number} of disk {disk}: read, and last written");
        }
    }

    /// Oracle 2: what a power cut has left. From here on it is all that there is.
    pub(crate) fn settle(&mut self, disk: usize, bytes: &[u8]) {
        let found = ids(bytes);
        for (number, sector) in &mut self.disks[disk] {
            let what = format!("after a power cut sector {number} of disk {disk}");
            let place = sector.place(found[usize::try_from(*number).expect("small")], &what);
            assert!(place >= sector.durable, "{what} has lost write {} that a flush had covered", sector.history[sector.durable].id);
            let entry = sector.history[place];
            *sector = Sector::of(Entry { completed: Some(entry.completed.unwrap_or(self.events)), ..entry });
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
        let (mut latest_inside, mut first_outside) = (0, u64::MAX);
        for (disk, contents) in of.iter().zip(&contents) {
            for (number, sector) in &self.disks[*disk] {
                let what = format!("in snapshot {name} sector {number} of disk {disk}");
                let place = sector.place(contents[usize::try_from(*number).expect("small")], &what);
                let (inside, outside) = sector.history.split_at(place + 1);
                let submitted = inside[place].submitted;
                assert!(cut.answered.is_none_or(|answered| submitted < answered), "{what} was written after the answer");
                latest_inside = latest_inside.max(submitted);
                for completed in outside.iter().filter_map(|entry| entry.completed) {
                    assert!(completed > cut.asked, "{what} misses what was complete before it was asked for");
                    first_outside = first_outside.min(completed);
                }
            }
        }
        assert!(
            first_outside > latest_inside,
            "{name} is no one cut: it has what was submitted after something that it misses was complete"
        );
        cut.contents = Some(contents);
    }
}

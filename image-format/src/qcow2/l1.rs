//! The active L1 table, in memory as a whole.

use std::collections::{BTreeMap, BTreeSet};

use crate::buffer::AlignedBuffer;
use crate::units::HostOffset;

use super::entry::{COPIED, L1_RESERVED, OFFSET_MASK};
use super::geometry::{Geometry, SliceKey};

/// Bytes in which tables are written back: the medium writes them as one unit.
pub(super) const SECTOR: usize = 512;
const WORDS_PER_SECTOR: usize = SECTOR / 8;

/// The active L1 table and what is known of tables made since the image was opened.
///
/// An entry in here may be newer than the one in the file. It is written only after its table's first content and the table's refcount are
/// durable (docs/crash-order.md).
#[derive(Debug)]
pub(super) struct L1 {
    entries: Vec<u64>,
    /// Where the table is in the file.
    at: HostOffset,
    /// The table has been moved, and the header in the file still points to this place, with so many entries.
    moved_from: Option<(HostOffset, usize)>,
    /// Entries that are newer than the file's.
    dirty: BTreeSet<u32>,
    /// New tables whose zeros are not in the file yet; `true` if the file reads as zeros there anyway.
    unwritten: BTreeMap<u32, bool>,
    /// Slices of new tables that have never been dirty: zeros, known without reading.
    zero_slices: BTreeMap<u32, Box<[u64]>>,
}

/// What must be written for the L1 table by one write-back.
#[derive(Debug, Default)]
pub(super) struct L1Writes {
    /// New tables to be filled with zeros first.
    pub(super) zero_tables: Vec<HostOffset>,
    /// L1 indexes of all new tables whose zeros are in the file afterwards.
    pub(super) initialised: Vec<u32>,
    /// Sectors of the L1 table or, if it has moved, all of it.
    pub(super) sectors: Vec<(HostOffset, AlignedBuffer)>,
    /// The table has moved: what the header must say once the table is durable.
    pub(super) moved: Option<MovedL1>,
}

/// An L1 table that has got another place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MovedL1 {
    pub(super) to: HostOffset,
    pub(super) entries: u32,
    /// Where it was, and how long: free once the header is durable.
    pub(super) from: HostOffset,
    pub(super) from_bytes: u64,
}

/// Where one L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) at: HostOffset,
    /// Nothing else refers to it.
    pub(super) copied: bool,
}

/// Checks one L1 entry of an image file.
///
/// # Errors
/// What is wrong with it.
pub(super) fn decode_l1_entry(word: u64, geometry: &Geometry) -> Result<Option<Table>, &'static str> {
    if word & L1_RESERVED != 0 {
        return Err("reserved bits of an L1 entry are set");
    }
    let at = HostOffset::new(word & OFFSET_MASK);
    if !at.is_aligned(geometry.cluster_bytes()) {
        return Err("an L1 entry points between clusters");
    }
    let copied = word & COPIED != 0;
    if at == HostOffset::ZERO {
        return if copied { Err("an L1 entry points to the header") } else { Ok(None) };
    }
    Ok(Some(Table { at, copied }))
}

impl L1 {
    /// A table as it is in the file; entries have been checked.
    pub(super) fn new(at: HostOffset, entries: Vec<u64>) -> Self {
        Self { entries, at, moved_from: None, dirty: BTreeSet::new(), unwritten: BTreeMap::new(), zero_slices: BTreeMap::new() }
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Gives the table another place, where it has more entries. Until a write-back has told the header of it, the table in the file stays the
    /// one that it was before the first move. Returns the place and bytes of one in between, which the file has never known.
    pub(super) fn move_to(&mut self, at: HostOffset, entries: usize) -> Option<(HostOffset, u64)> {
        debug_assert!(entries > self.entries.len(), "a table moves when it is too short");
        let former = (self.at, self.entries.len());
        let between = self.moved_from.is_some().then_some((former.0, former.1 as u64 * 8));
        self.moved_from.get_or_insert(former);
        self.at = at;
        self.entries.resize(entries, 0);
        between
    }

    /// The L2 table of an entry, if there is one.
    pub(super) fn table(&self, l1_index: u32) -> Option<Table> {
        let word = *self.entries.get(l1_index as usize)?;
        let at = HostOffset::new(word & OFFSET_MASK);
        (at != HostOffset::ZERO).then_some(Table { at, copied: word & COPIED != 0 })
    }

    /// Every L2 table with its L1 index.
    pub(super) fn tables(&self) -> impl Iterator<Item = (u32, Table)> {
        (0_u32..).take(self.entries.len()).filter_map(|index| self.table(index).map(|table| (index, table)))
    }

    /// Whether a slice is known to be all zeros without reading it.
    pub(super) fn is_zero_slice(&self, key: SliceKey) -> bool {
        self.zero_slices.get(&key.l1_index).is_some_and(|bits| bits[key.slice as usize / 64] & (1 << (key.slice % 64)) != 0)
    }

    /// The slice is about to be written: it must be read from now on.
    pub(super) fn forget_zero_slice(&mut self, key: SliceKey) {
        if let Some(bits) = self.zero_slices.get_mut(&key.l1_index) {
            bits[key.slice as usize / 64] &= !(1 << (key.slice % 64));
            if bits.iter().all(|&word| word == 0) {
                self.zero_slices.remove(&key.l1_index);
            }
        }
    }

    /// Points an entry to a new table of zeros. `reads_zero`: the file has zeros there already.
    pub(super) fn set_zero_table(&mut self, l1_index: u32, at: HostOffset, reads_zero: bool, geometry: &Geometry) {
        self.set_table(l1_index, at);
        self.unwritten.insert(l1_index, reads_zero);
        let slices = geometry.slices_per_table() as usize;
        let bits = (0..slices.div_ceil(64)).map(|word| if slices - word * 64 >= 64 { u64::MAX } else { (1 << (slices % 64)) - 1 });
        self.zero_slices.insert(l1_index, bits.collect());
    }

    /// Points an entry to a new table that is in the file already.
    pub(super) fn set_table(&mut self, l1_index: u32, at: HostOffset) {
        self.entries[l1_index as usize] = at.get() | COPIED;
        self.dirty.insert(l1_index);
    }

    /// Takes everything that is newer than the file, for a write-back that will be the only one until it ends.
    pub(super) fn take_writes(&mut self, geometry: &Geometry) -> L1Writes {
        let mut writes = L1Writes::default();
        for (&l1_index, &reads_zero) in &self.unwritten {
            writes.initialised.push(l1_index);
            if let Some(table) = self.table(l1_index).filter(|_| !reads_zero) {
                writes.zero_tables.push(table.at);
            }
        }
        debug_assert!(geometry.cluster_len() >= SECTOR);
        if let Some((from, entries)) = self.moved_from.take() {
            self.dirty.clear();
            let len = (self.entries.len() * 8).next_multiple_of(geometry.cluster_len());
            writes.sectors.push((self.at, table_bytes(&self.entries, len)));
            let entries_now = u32::try_from(self.entries.len()).expect("an L1 table has at most 32 MiB");
            writes.moved = Some(MovedL1 { to: self.at, entries: entries_now, from, from_bytes: entries as u64 * 8 });
        }
        let sectors: BTreeSet<usize> = std::mem::take(&mut self.dirty).iter().map(|&index| index as usize / WORDS_PER_SECTOR).collect();
        for sector in sectors {
            let bytes = table_sector(&self.entries, sector);
            writes.sectors.push((self.at + (sector * SECTOR) as u64, bytes));
        }
        writes
    }

    /// The zeros of these tables are in the file.
    pub(super) fn mark_initialised(&mut self, l1_indexes: &[u32]) {
        for l1_index in l1_indexes {
            self.unwritten.remove(l1_index);
        }
    }
}

/// One sector of a table of words, with zeros after its end.
pub(super) fn table_sector(words: &[u64], sector: usize) -> AlignedBuffer {
    let mut bytes = AlignedBuffer::zeroed(SECTOR);
    let words = words.iter().skip(sector * WORDS_PER_SECTOR);
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// A whole table of words, with zeros up to the end of `len` bytes.
pub(super) fn table_bytes(words: &[u64], len: usize) -> AlignedBuffer {
    let mut bytes = AlignedBuffer::zeroed(len);
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// Words from their bytes in a file.
pub(super) fn words_from(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_entries_are_taken_by_sector_once() {
        let geometry = Geometry::new(16, false, 4);
        let mut l1 = L1::new(HostOffset::new(0x30000), vec![0; 200]);
        l1.set_table(3, HostOffset::new(0x40000));
        l1.set_zero_table(130, HostOffset::new(0x50000), false, &geometry);
        let writes = l1.take_writes(&geometry);
        assert_eq!(writes.zero_tables, [HostOffset::new(0x50000)]);
        let places: Vec<_> = writes.sectors.iter().map(|(at, _)| at.get()).collect();
        assert_eq!(places, [0x30000, 0x30400]);
        assert_eq!(words_from(&writes.sectors[0].1)[3], 0x40000 | COPIED);
        l1.mark_initialised(&writes.initialised);
        assert!(l1.take_writes(&geometry).zero_tables.is_empty());
    }

    #[test]
    fn a_moved_table_is_written_as_a_whole() {
        let geometry = Geometry::new(9, false, 4);
        let mut l1 = L1::new(HostOffset::new(0x600), vec![0; 64]);
        l1.set_table(3, HostOffset::new(0x800));
        assert_eq!(l1.move_to(HostOffset::new(0x1000), 100), None);
        let writes = l1.take_writes(&geometry);
        let (at, bytes) = &writes.sectors[0];
        assert_eq!((writes.sectors.len(), at.get(), bytes.len()), (1, 0x1000, 1024));
        assert_eq!(words_from(bytes)[3], 0x800 | COPIED);
        let moved = MovedL1 { to: HostOffset::new(0x1000), entries: 100, from: HostOffset::new(0x600), from_bytes: 512 };
        assert_eq!(writes.moved, Some(moved));
        assert!(l1.take_writes(&geometry).sectors.is_empty());
    }

    #[test]
    fn a_table_that_moves_twice_leaves_the_first_place() {
        let geometry = Geometry::new(9, false, 4);
        let mut l1 = L1::new(HostOffset::new(0x600), vec![0; 64]);
        assert_eq!(l1.move_to(HostOffset::new(0x1000), 100), None);
        assert_eq!(l1.move_to(HostOffset::new(0x2000), 200), Some((HostOffset::new(0x1000), 800)));
        let moved = MovedL1 { to: HostOffset::new(0x2000), entries: 200, from: HostOffset::new(0x600), from_bytes: 512 };
        assert_eq!(l1.take_writes(&geometry).moved, Some(moved));
        assert_eq!(l1.move_to(HostOffset::new(0x3000), 300), None);
    }

    #[test]
    fn slices_of_a_new_table_are_zero_until_written() {
        let geometry = Geometry::new(16, false, 4);
        let mut l1 = L1::new(HostOffset::new(0x30000), vec![0; 1]);
        l1.set_zero_table(0, HostOffset::new(0x50000), true, &geometry);
        let key = |slice| SliceKey { l1_index: 0, slice };
        assert!((0..16).all(|slice| l1.is_zero_slice(key(slice))));
        l1.forget_zero_slice(key(3));
        assert!(!l1.is_zero_slice(key(3)) && l1.is_zero_slice(key(4)));
    }
}

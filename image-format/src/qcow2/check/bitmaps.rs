//! Counting what persistent bitmaps take up. Their contents are not looked at.

use std::collections::BTreeMap;

use crate::error::Structure;
use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::super::entry::OFFSET_MASK;
use super::super::header::{BitmapsExtension, Fields};
use super::CheckError;
use super::report::Fault;
use super::walk::Walk;

/// Fixed part of a directory entry.
const ENTRY_BYTES: usize = 24;
/// Most entries of a bitmap table, as in QEMU.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Longest name, as in QEMU.
const MAX_NAME_BYTES: u16 = 1023;
/// Flags of a directory entry that have no meaning.
const RESERVED_FLAGS: u32 = 0xffff_fffc;
/// Bits of a table entry that have no meaning: all but 0 and the position.
const TABLE_RESERVED: u64 = !(OFFSET_MASK | 1);
/// Bytes of a table to read at a time.
const PIECE: u64 = 64 << 10;

impl<S: Storage> Walk<'_, S> {
    pub(super) async fn count_bitmaps(&mut self) -> Result<(), CheckError> {
        let Some(extension) = self.header.bitmaps() else { return Ok(()) };
        let what = Structure::Bitmaps;
        let BitmapsExtension { directory, directory_bytes, count } = extension;
        if !self.count(directory, directory_bytes, 1, what)? {
            return Ok(());
        }
        let len = usize::try_from(directory_bytes).expect("at most 64 MiB");
        let bytes = self.file.read_bytes(directory, len).await.map_err(|source| CheckError::io("read", what, directory, source))?;
        let tables = match tables(&bytes, count, self.geometry.cluster_bytes()) {
            Ok(tables) => tables,
            Err((skip, detail)) => {
                self.reporter.found(Fault::Bitmaps { at: directory + skip as u64, detail }, 1);
                return Ok(());
            }
        };
        let total: u64 = tables.keys().map(|(_, entries)| u64::from(*entries) * 8).sum();
        if total > self.file_len {
            self.reporter.found(Fault::Bitmaps { at: directory, detail: "the tables overlap or are outside the file" }, 1);
            return Ok(());
        }
        for ((at, entries), times) in tables {
            let len = u64::from(entries) * 8;
            if !self.count(at, len, times, what)? {
                continue;
            }
            for start in (0..len).step_by(PIECE as usize) {
                let piece = PIECE.min(len - start) as usize;
                let words = self.read_words(at + start, piece, what).await?;
                self.count_bitmap_entries(at + start, &words, times)?;
            }
        }
        Ok(())
    }

    fn count_bitmap_entries(&mut self, table: HostOffset, words: &[u64], times: u64) -> Result<(), CheckError> {
        for (index, &word) in words.iter().enumerate() {
            let host = HostOffset::new(word & OFFSET_MASK);
            let is_sound = word & TABLE_RESERVED == 0
                && (host == HostOffset::ZERO || (word & 1 == 0 && host.is_aligned(self.geometry.cluster_bytes())));
            if !is_sound {
                let detail = "it is neither a cluster nor a run of equal bits";
                let at = table + index as u64 * 8;
                self.reporter.found(Fault::Entry { what: Structure::Bitmaps, at, word, detail }, times);
            } else if host != HostOffset::ZERO {
                self.count(host, self.geometry.cluster_bytes(), times, Structure::Bitmaps)?;
            }
        }
        Ok(())
    }
}

/// Position and length of each table, and how many bitmaps name it.
type Tables = BTreeMap<(HostOffset, u32), u64>;

/// Takes a directory apart.
///
/// # Errors
/// Where it makes no sense, and why.
fn tables(bytes: &[u8], count: u32, cluster_bytes: u64) -> Result<Tables, (usize, &'static str)> {
    let mut tables = Tables::new();
    let mut at = 0;
    for _ in 0..count {
        let Some(fixed) = bytes.get(at..at + ENTRY_BYTES) else { return Err((at, "the directory ends too early")) };
        let fields = Fields(fixed);
        let (table, entries, flags) = (HostOffset::new(fields.u64(0)), fields.u32(8), fields.u32(12));
        let (kind, granularity_bits, name_len, extra_len) = (fixed[16], fixed[17], fields.u16(18), fields.u32(20));
        if table == HostOffset::ZERO || !table.is_aligned(cluster_bytes) {
            return Err((at, "a table is not on a cluster boundary"));
        }
        if entries == 0 || entries > MAX_TABLE_ENTRIES {
            return Err((at, "the size of a table is out of limits"));
        }
        if flags & RESERVED_FLAGS != 0 || kind != 1 || !(9..=31).contains(&granularity_bits) {
            return Err((at, "a bitmap has flags, a type or a granularity that are not known"));
        }
        if name_len == 0 || name_len > MAX_NAME_BYTES || extra_len != 0 {
            return Err((at, "a bitmap has no name, one that is too long, or extra data that is not known"));
        }
        *tables.entry((table, entries)).or_default() += 1;
        at += (ENTRY_BYTES + usize::from(name_len)).next_multiple_of(8);
    }
    if at == bytes.len() { Ok(tables) } else { Err((at.min(bytes.len()), "the directory does not end after its last entry")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(table: u64, entries: u32, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(table.to_be_bytes());
        bytes.extend(entries.to_be_bytes());
        bytes.extend([0, 0, 0, 2, 1, 16]);
        bytes.extend(u16::try_from(name.len()).expect("short").to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn directories_are_taken_apart_or_refused() {
        let good = [entry(0x10000, 1, "a"), entry(0x20000, 3, "longer name"), entry(0x10000, 1, "b")].concat();
        let found = tables(&good, 3, 0x10000).expect("sound");
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [((HostOffset::new(0x10000), 1), 2), ((HostOffset::new(0x20000), 3), 1)]);
        let refused = |bytes: &[u8], count| tables(bytes, count, 0x10000).expect_err("damaged");
        assert_eq!(refused(&good, 4), (good.len(), "the directory ends too early"));
        assert_eq!(refused(&good, 2).1, "the directory does not end after its last entry");
        assert_eq!(refused(&entry(0x10200, 1, "a"), 1).1, "a table is not on a cluster boundary");
        assert_eq!(refused(&entry(0x10000, 0, "a"), 1).1, "the size of a table is out of limits");
        assert_eq!(refused(&entry(0x10000, 1, ""), 1).1, "a bitmap has no name, one that is too long, or extra data that is not known");
        for (at, byte) in [(15, 4), (16, 2), (17, 40)] {
            let mut bytes = entry(0x10000, 1, "a");
            bytes[at] = byte;
            assert_eq!(refused(&bytes, 1).1, "a bitmap has flags, a type or a granularity that are not known");
        }
    }
}

//! The table of internal snapshots, for reading: so that what they refer to stays intact, and for people.

use std::io;

use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::geometry::MAX_L1_BYTES;
use super::header::{Fields, Header};

/// Longest snapshot table, as in QEMU.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Most extra data in an entry, as in QEMU.
const MAX_EXTRA_BYTES: u32 = 1024;
/// Fixed part of an entry.
const ENTRY_BYTES: usize = 40;

/// Why the snapshot table cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum SnapshotError {
    #[error("cannot read at {at}: {source}")]
    Read {
        at: HostOffset,
        #[source]
        source: io::Error,
    },
    #[error("entry {index} reaches past the end of the file")]
    Outside { index: u32 },
    #[error("entry {index} has {bytes} bytes of extra data, more than the limit of 1024")]
    ExtraTooLong { index: u32, bytes: u32 },
    #[error("it is longer than the limit of 64 MiB")]
    TooLong,
    #[error("the L1 table of snapshot {index} at {at} is not on a cluster boundary")]
    L1Unaligned { index: u32, at: HostOffset },
    #[error("the L1 table of snapshot {index} has {entries} entries, more than the limit of 32 MiB")]
    L1TooLarge { index: u32, entries: u32 },
    #[error("the L1 table of snapshot {index} at {at} is outside the file")]
    L1Outside { index: u32, at: HostOffset },
}

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// Its identifier.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Seconds since 1970 when it was taken.
    pub taken_seconds: u32,
    /// Size of the disk in it, if the image says so.
    pub virtual_size: Option<u64>,
    pub(super) l1_offset: HostOffset,
    pub(super) l1_entries: u32,
}

/// All internal snapshots of an image, and how long the table is.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<InternalSnapshot>,
    pub(super) table_bytes: u64,
}

impl Snapshots {
    /// Reads and checks the table.
    pub(super) async fn read(file: &impl Storage, header: &Header) -> Result<Self, SnapshotError> {
        let snapshots = Self::read_unchecked(file, header).await?;
        let file_len = file.length().await.map_err(|source| SnapshotError::Read { at: header.snapshots_offset, source })?;
        for (index, snapshot) in (0_u32..).zip(&snapshots.list) {
            check_l1(index, snapshot, header, file_len)?;
        }
        Ok(snapshots)
    }

    /// Reads the table, whatever the L1 tables that it names are worth.
    pub(super) async fn read_unchecked(file: &impl Storage, header: &Header) -> Result<Self, SnapshotError> {
        let mut snapshots = Self::default();
        if header.snapshot_count == 0 {
            return Ok(snapshots);
        }
        let start = header.snapshots_offset;
        let file_len = file.length().await.map_err(|source| SnapshotError::Read { at: start, source })?;
        let mut reader = TableReader { file, at: start, end: HostOffset::new(file_len), buffered: Vec::new(), taken: 0, index: 0 };
        for index in 0..header.snapshot_count {
            reader.index = index;
            let snapshot = reader.entry().await?;
            snapshots.list.push(snapshot);
            snapshots.table_bytes = reader.at - start;
            if snapshots.table_bytes > MAX_TABLE_BYTES {
                return Err(SnapshotError::TooLong);
            }
        }
        Ok(snapshots)
    }
}

fn check_l1(index: u32, snapshot: &InternalSnapshot, header: &Header, file_len: u64) -> Result<(), SnapshotError> {
    let at = snapshot.l1_offset;
    let bytes = u64::from(snapshot.l1_entries) * 8;
    if bytes > MAX_L1_BYTES {
        return Err(SnapshotError::L1TooLarge { index, entries: snapshot.l1_entries });
    }
    if !at.is_aligned(header.geometry.cluster_bytes()) {
        return Err(SnapshotError::L1Unaligned { index, at });
    }
    let file_end = file_len.next_multiple_of(header.geometry.cluster_bytes());
    if bytes > 0 && at.checked_add(bytes).is_none_or(|end| end.get() > file_end) {
        return Err(SnapshotError::L1Outside { index, at });
    }
    Ok(())
}

/// Reads the entries, whose length shows only on the way, in pieces of some size.
struct TableReader<'a, S> {
    file: &'a S,
    /// Position of the next byte to be taken.
    at: HostOffset,
    end: HostOffset,
    buffered: Vec<u8>,
    /// Bytes of `buffered` that have been taken already.
    taken: usize,
    index: u32,
}

impl<S: Storage> TableReader<'_, S> {
    async fn entry(&mut self) -> Result<InternalSnapshot, SnapshotError> {
        let fixed = self.take(ENTRY_BYTES).await?;
        let fields = Fields(&fixed);
        let (id_len, name_len, extra_len) = (fields.u16(12), fields.u16(14), fields.u32(36));
        if extra_len > MAX_EXTRA_BYTES {
            return Err(SnapshotError::ExtraTooLong { index: self.index, bytes: extra_len });
        }
        let extra = self.take(extra_len as usize).await?;
        let id = self.take(usize::from(id_len)).await?;
        let name = self.take(usize::from(name_len)).await?;
        let len = ENTRY_BYTES + extra.len() + id.len() + name.len();
        self.take(len.next_multiple_of(8) - len).await?;
        Ok(InternalSnapshot {
            id: String::from_utf8_lossy(&id).into_owned(),
            name: String::from_utf8_lossy(&name).into_owned(),
            taken_seconds: fields.u32(16),
            virtual_size: (extra.len() >= 16).then(|| Fields(&extra).u64(8)),
            l1_offset: HostOffset::new(fields.u64(0)),
            l1_entries: fields.u32(8),
        })
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, SnapshotError> {
        const PIECE: usize = 64 << 10;
        while self.buffered.len() - self.taken < len {
            // What is left is less than an entry.
            self.buffered.drain(..std::mem::take(&mut self.taken));
            let at = self.at + self.buffered.len() as u64;
            if at >= self.end {
                // The padding of the last entry need not be in the file.
                if self.at + len as u64 <= self.end.align_up(8) {
                    self.buffered.resize(len, 0);
                    break;
                }
                return Err(SnapshotError::Outside { index: self.index });
            }
            let piece = usize::try_from((self.end - at).min(PIECE as u64)).expect("at most 64 KiB");
            let bytes = self.file.read_bytes(at, piece).await.map_err(|source| SnapshotError::Read { at, source })?;
            self.buffered.extend_from_slice(&bytes);
        }
        self.at = self.at + len as u64;
        let start = self.taken;
        self.taken += len;
        Ok(self.buffered[start..self.taken].to_vec())
    }
}

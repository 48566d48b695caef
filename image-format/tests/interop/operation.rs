//! What is done to disks.

use std::collections::BTreeSet;
use std::ops::Range;

use snapfence_image_format::storage::Chance;

use crate::disk::SECTOR;

/// One operation on a range of bytes, whole sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Write {
        at: u64,
        len: u64,
        fill: Fill,
    },
    Zero {
        at: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    /// Only QEMU writes compressed clusters.
    Compress {
        at: u64,
        len: u64,
        byte: u8,
    },
    Flush,
}

/// The bytes that a write writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// The same one everywhere, as `qemu-io` writes.
    Byte(u8),
    /// Seeded ones.
    Seed(u64),
}

impl Fill {
    pub(crate) fn put(self, bytes: &mut [u8]) {
        match self {
            Self::Byte(byte) => bytes.fill(byte),
            Self::Seed(seed) => {
                let mut chance = Chance::new(seed);
                for word in bytes.chunks_exact_mut(8) {
                    word.copy_from_slice(&chance.number().to_le_bytes());
                }
            }
        }
    }
}

impl Operation {
    pub(crate) fn range(&self) -> Range<u64> {
        match *self {
            Self::Write { at, len, .. } | Self::Zero { at, len, .. } | Self::Discard { at, len } | Self::Compress { at, len, .. } => {
                at..at + len
            }
            Self::Flush => 0..0,
        }
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let (this, other) = (self.range(), other.range());
        this.start < other.end && other.start < this.end
    }
}

/// Where operations go: near one another, so that they meet, and near the edges of clusters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) disk: u64,
    pub(crate) cluster: u64,
    start: u64,
    len: u64,
}

impl Area {
    pub(crate) fn new(chance: &mut Chance, disk: u64, cluster: u64) -> Self {
        let len = disk.min((8 * cluster).max(1 << (16 + chance.below(7))));
        // Often at the very end of the disk.
        let start = if chance.happens(1, 4) { disk - len } else { chance.below((disk - len) / SECTOR as u64 + 1) * SECTOR as u64 };
        Self { disk, cluster, start, len }
    }

    /// A range of whole sectors, not empty.
    fn range(&self, chance: &mut Chance) -> (u64, u64) {
        let sector = SECTOR as u64;
        let somewhere = |chance: &mut Chance| self.start + chance.below(self.len / sector) * sector;
        let near_edge = |chance: &mut Chance, at: u64| {
            let edge = at / self.cluster * self.cluster;
            (edge + chance.below(5) * sector).saturating_sub(2 * sector)
        };
        let mut at = somewhere(chance);
        if chance.happens(1, 3) {
            at = near_edge(chance, at);
        }
        let longest = chance.below(12);
        let mut end = at + sector * (1 + chance.below(1 << longest));
        if chance.happens(1, 3) {
            end = near_edge(chance, end);
        }
        if chance.happens(1, 5) {
            (at, end) = (at / self.cluster * self.cluster, end.next_multiple_of(self.cluster));
        }
        at = at.min(self.disk - sector);
        (at, end.clamp(at + sector, self.disk) - at)
    }

    /// Operations as `qemu-io` can do them.
    pub(crate) fn for_qemu(&self, chance: &mut Chance) -> Vec<Operation> {
        (0..=chance.below(16)).map(|_| self.one_for_qemu(chance)).collect()
    }

    /// Compressed writes to different clusters. Nothing else beside them: QEMU 10.0 goes on filling a host cluster with compressed bytes after
    /// it was freed and used for something else, if both happen in one process.
    pub(crate) fn compressed_for_qemu(&self, chance: &mut Chance) -> Vec<Operation> {
        let clusters: BTreeSet<u64> = (0..=chance.below(8)).map(|_| self.range(chance).0 / self.cluster).collect();
        let whole = clusters.into_iter().filter(|cluster| (cluster + 1) * self.cluster <= self.disk);
        whole.map(|cluster| Operation::Compress { at: cluster * self.cluster, len: self.cluster, byte: chance.below(256) as u8 }).collect()
    }

    fn one_for_qemu(&self, chance: &mut Chance) -> Operation {
        let (at, len) = self.range(chance);
        let byte = 1 + chance.below(255) as u8;
        match chance.below(10) {
            0 | 1 => Operation::Zero { at, len, unmap: chance.happens(1, 2) },
            2 => Operation::Discard { at, len },
            _ => Operation::Write { at, len, fill: Fill::Byte(byte) },
        }
    }

    /// An operation as we can do it.
    pub(crate) fn for_us(&self, chance: &mut Chance) -> Operation {
        let (at, len) = self.range(chance);
        match chance.below(12) {
            0 | 1 => Operation::Zero { at, len, unmap: chance.happens(1, 2) },
            2 | 3 => Operation::Discard { at, len },
            4 => Operation::Flush,
            _ => Operation::Write { at, len, fill: Fill::Seed(chance.number()) },
        }
    }
}

//! Comparing the references with the refcounts in the file.

use std::ops::Range;

use crate::buffer::AlignedBuffer;
use crate::error::Structure;
use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::super::geometry::HostCluster;
use super::super::refcount::read_refcount;
use super::CheckError;
use super::report::Fault;
use super::walk::Walk;

/// Bits that must be clear in an entry of the refcount table.
const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;

impl<S: Storage> Walk<'_, S> {
    /// Reads the refcount table, and counts the references to the blocks. After everything else has been counted: nothing but its entry may
    /// refer to a block.
    pub(super) async fn count_refcount_blocks(&mut self) -> Result<(), CheckError> {
        let (table, what) = (self.header.refcount_table_offset, Structure::RefcountTable);
        let len = self.header.refcount_table_clusters as usize * self.geometry.cluster_len();
        let mut words = self.read_words(table, len, what).await?;
        for (index, word) in words.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            let whole = *word;
            let at = HostOffset::new(whole & !REFCOUNT_TABLE_RESERVED);
            let fault = |detail| Fault::Entry { what, at: table + index as u64 * 8, word: whole, detail };
            if !at.is_aligned(self.geometry.cluster_bytes()) {
                self.reporter.found(fault("it does not point to a whole cluster"), 1);
                *word = 0;
            } else if whole != at.get() {
                self.reporter.found(fault("reserved bits are set"), 1);
                // Where it points is most likely right: the refcounts there are compared all the same.
                *word = if at.get() < self.file_len { at.get() } else { 0 };
            } else if at.get() >= self.file_len {
                self.reporter.found(fault("it points past the end of the file"), 1);
                *word = 0;
            } else {
                self.count(at, self.geometry.cluster_bytes(), 1, Structure::RefcountBlock)?;
                let references = self.census.get(self.geometry.host_cluster(at).0).references;
                if references != 1 {
                    self.reporter.found(Fault::BlockShared { at, references }, 1);
                }
            }
        }
        self.refcount_table = words;
        Ok(())
    }

    /// Compares every refcount with the number of references.
    pub(super) async fn compare(&mut self) -> Result<(), CheckError> {
        let clusters = self.geometry.clusters(self.file_len).max(self.census.end());
        let per_block = self.geometry.refcounts_per_block();
        let mut used_end = 0;
        let mut block: Option<(u64, AlignedBuffer)> = None;
        for (index, covered) in blocks(clusters, per_block) {
            let at = self.block_position(index);
            let is_free = self.census.is_empty(covered.start, covered.end);
            if at == 0 && is_free {
                continue;
            }
            if at != 0 && block.as_ref().is_none_or(|(known, _)| *known != at) {
                block = Some((at, self.read_block(HostOffset::new(at)).await?));
            }
            let bytes = block.as_ref().filter(|_| at != 0).map(|(_, bytes)| &bytes[..]);
            if is_free && bytes.is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0)) {
                continue;
            }
            for cluster in covered {
                let refcount = bytes.map_or(0, |bytes| {
                    read_refcount(bytes, self.geometry.locate_refcount(HostCluster(cluster)).1, self.geometry.refcount_bits())
                });
                if self.compare_one(cluster, refcount) {
                    used_end = cluster + 1;
                }
            }
        }
        self.reporter.report.image_end = used_end * self.geometry.cluster_bytes();
        Ok(())
    }

    /// Compares one refcount. Whether the cluster is used or at least counted.
    fn compare_one(&mut self, cluster: u64, refcount: u64) -> bool {
        let count = self.census.get(cluster);
        let at = self.geometry.host_offset(HostCluster(cluster));
        let references = count.references;
        if refcount > references {
            self.reporter.found(Fault::Leak { at, refcount, references }, 1);
        } else if refcount < references {
            self.reporter.found(Fault::RefcountLow { at, refcount, references }, 1);
        }
        if refcount == 1 && count.shared > 0 {
            self.reporter.found(Fault::NotCopied { at }, count.shared);
        }
        if refcount != 1 && count.copied > 0 {
            self.reporter.found(Fault::WronglyCopied { at, refcount }, count.copied);
        }
        if count.owners.count_ones() > 1 {
            self.reporter.found(Fault::Overlap { at, owners: count.owners().collect() }, 1);
        }
        refcount > 0 || references > 0
    }

    /// Position of a refcount block; 0 for none that can be read.
    pub(super) fn block_position(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.refcount_table.get(index)).copied().unwrap_or(0)
    }

    pub(super) async fn read_block(&self, at: HostOffset) -> Result<AlignedBuffer, CheckError> {
        let read = self.file.read_bytes(at, self.geometry.cluster_len()).await;
        read.map_err(|source| CheckError::io("read", Structure::RefcountBlock, at, source))
    }
}

/// Numbers of the refcount blocks for so many clusters, and the clusters that each covers.
pub(super) fn blocks(clusters: u64, per_block: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    (0..clusters.div_ceil(per_block)).map(move |index| (index, index * per_block..((index + 1) * per_block).min(clusters)))
}

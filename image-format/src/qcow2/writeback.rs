//! Writing changed metadata, in the one order that leaves nothing worse than leaks wherever it is cut (docs/crash-order.md).
//!
//! 1. Refcount blocks, a refcount table that moved, zeros of new L2 tables. Device flush: it also makes guest data durable.
//! 2. New entries of the refcount table, or the header that points to its new place. Device flush.
//! 3. L2 slices and L1 entries. What an L1 entry newly points to has been a valid (empty or copied) table since step 1, so their order does
//!    not matter. An L1 table that moved is written as a whole. Device flush.
//! 4. The header that points to the new place of the L1 table. Device flush.
//!
//! Steps without anything to write cost nothing; the flush of step 3 always happens. Afterwards clusters that lost their last reference in
//! steps 2 to 4 may be freed.

use std::sync::{Arc, Mutex, PoisonError};

use crate::buffer::{AlignedBuffer, Buffer};
use crate::error::{LayerError, Structure};
use crate::storage::{Environment, Storage};
use crate::units::HostOffset;

use super::Inner;
use super::geometry::{HostCluster, SliceKey};
use super::l1::{L1Writes, table_bytes};
use super::l2::Slice;
use super::refcount::RefcountWrites;
use super::unmap::ClusterList;

/// Writes under way at the same time.
const PARALLEL_WRITES: usize = 32;

/// Slices of a round: kept in memory until they are written, because the file has older ones. If they never are, they count as dirty again, so
/// that reads go on seeing them.
struct HeldSlices<'a> {
    slices: Vec<Arc<Slice>>,
    dirty: &'a Mutex<Vec<Arc<Slice>>>,
}

impl HeldSlices<'_> {
    fn written(mut self) -> Vec<Arc<Slice>> {
        std::mem::take(&mut self.slices)
    }
}

impl Drop for HeldSlices<'_> {
    fn drop(&mut self) {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.slices);
    }
}

/// Everything that one round writes, copied at one time.
struct Batch<'a> {
    /// Free once the round is durable.
    pending: ClusterList,
    slices: Vec<(HostOffset, AlignedBuffer)>,
    held: HeldSlices<'a>,
    l1: L1Writes,
    refcounts: RefcountWrites,
}

impl<E: Environment> Inner<E> {
    /// Makes everything durable that was changed or written before the call.
    pub(super) async fn write_back(&self) -> Result<(), LayerError> {
        self.rounds.share(self.write_back_once()).await
    }

    /// Writes everything back, then does `work`, with no other round between or beside them.
    pub(super) async fn write_back_and(&self, work: impl AsyncFnOnce(&Self) -> Result<(), LayerError>) -> Result<(), LayerError> {
        let both = async {
            self.write_back_once().await?;
            work(self).await
        };
        self.rounds.alone(both).await
    }

    /// One round. Only in a round: its copies are not in the file before its end, and no longer marked as changed.
    pub(super) async fn write_back_once(&self) -> Result<(), LayerError> {
        let Batch { pending, slices, held, l1, refcounts } = self.take_batch();
        let RefcountWrites { blocks, entries, moved_to, retired } = refcounts;
        let L1Writes { zero_tables, initialised, sectors, moved } = l1;
        let table_changes = !entries.is_empty() || moved_to.is_some();
        let mapping_changes = !slices.is_empty() || !sectors.is_empty();

        self.write_all(blocks, Structure::RefcountBlock).await?;
        self.allocator().refcounts.blocks_written();
        self.zero_tables(zero_tables).await?;
        self.l1_mut().mark_initialised(&initialised);
        if table_changes || mapping_changes {
            self.flush_device().await?;
        }
        if table_changes {
            self.write_all(entries, Structure::RefcountTable).await?;
            if let Some((at, clusters)) = moved_to {
                self.header().move_refcount_table(at, clusters);
                self.write_header().await?;
            }
            if mapping_changes {
                self.flush_device().await?;
            }
        }
        self.write_all(slices, Structure::L2Table).await?;
        self.write_all(sectors, Structure::L1Table).await?;
        self.flush_device().await?;
        self.release_kept(&held.written());
        let geometry = &self.format.geometry;
        let mut old_l1 = 0..0;
        if let Some(moved) = moved {
            self.header().move_l1_table(moved.to, moved.entries);
            self.write_header().await?;
            self.flush_device().await?;
            old_l1 = geometry.cluster_numbers(moved.from, moved.from_bytes);
        }

        let mut unmapped = self.unmapped();
        unmapped.ready.append(pending);
        retired.into_iter().for_each(|HostCluster(cluster)| unmapped.ready.push(cluster..cluster + 1));
        unmapped.ready.push(old_l1);
        Ok(())
    }

    /// Copies everything that is newer than the file. The order matters: what is taken later may only be more than what belongs to the things
    /// taken before. Clusters to be freed first, then the entries that no longer point to them, then the tables with those entries, then the
    /// counts of all that the entries point to.
    fn take_batch(&self) -> Batch<'_> {
        let pending = std::mem::take(&mut self.unmapped().pending);
        let held = std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        let mut copies: Vec<(SliceKey, AlignedBuffer)> = Vec::with_capacity(held.len());
        for slice in &held {
            let mut state = slice.lock();
            state.dirty = false;
            copies.push((slice.key, table_bytes(state.words(), self.slices.slice_len())));
        }
        let mut l1 = self.l1_mut();
        let slices = copies.into_iter().filter_map(|(key, bytes)| {
            l1.forget_zero_slice(key);
            let table = l1.table(key.l1_index)?;
            Some((table.at + u64::from(key.slice) * self.slices.slice_len() as u64, bytes))
        });
        let slices = slices.collect();
        let l1_writes = l1.take_writes(&self.format.geometry);
        drop(l1);
        let refcounts = self.allocator().refcounts.take_writes();
        Batch { pending, slices, held: HeldSlices { slices: held, dirty: &self.dirty }, l1: l1_writes, refcounts }
    }

    /// Writes many pieces, some at a time.
    pub(super) async fn write_all(&self, mut writes: Vec<(HostOffset, AlignedBuffer)>, what: Structure) -> Result<(), LayerError> {
        writes.sort_by_key(|(at, _)| *at);
        let mut writes = writes.into_iter();
        loop {
            let group: Vec<_> = writes
                .by_ref()
                .take(PARALLEL_WRITES)
                .map(|(at, bytes)| async move { (at, self.file.write(at, Buffer::Owned(bytes)).await.0) })
                .collect();
            if group.is_empty() {
                return Ok(());
            }
            for (at, result) in futures_util::future::join_all(group).await {
                result.map_err(|error| LayerError::io("write", what, at, error))?;
            }
        }
    }

    async fn zero_tables(&self, tables: Vec<HostOffset>) -> Result<(), LayerError> {
        let len = self.format.geometry.cluster_len();
        // Tables can be large: a few at a time.
        for group in tables.chunks(4) {
            let writes = group.iter().map(|&at| (at, AlignedBuffer::zeroed(len))).collect();
            self.write_all(writes, Structure::L2Table).await?;
        }
        Ok(())
    }

    /// Writes the first sector of the header as it is in memory. Only in a round.
    pub(super) async fn write_header(&self) -> Result<(), LayerError> {
        let sector = AlignedBuffer::copy_of(&self.header().patched_sector());
        self.write_all(vec![(HostOffset::ZERO, sector)], Structure::Header).await
    }

    pub(super) async fn flush_device(&self) -> Result<(), LayerError> {
        self.rounds.flush(&self.file).await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;

    use crate::extent::{ExtentList, Mapping};
    use crate::qcow2::CreateOptions;
    use crate::qcow2::testing::{SimulatedImage, flushes_so_far, with_image, write};
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment};
    use crate::units::{GuestOffset, GuestRange};

    /// How many device flushes so many guest flushes take that are made at the same time.
    async fn device_flushes(disk: &SimulatedEnvironment, image: &SimulatedImage, flushes: usize) -> u64 {
        let before = flushes_so_far(disk);
        join_all((0..flushes).map(|_| image.flush())).await.into_iter().for_each(|flushed| flushed.expect("a sound disk"));
        flushes_so_far(disk) - before
    }

    #[test]
    fn a_flush_takes_no_more_device_flushes_than_the_order_needs() {
        // Small clusters, so that refcount blocks are needed soon.
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(64 << 20) };
        with_image(1, options, async |disk, image| {
            device_flushes(&disk, &image, 1).await;
            assert_eq!(device_flushes(&disk, &image, 1).await, 1, "with nothing to write but what the guest wrote in place");
            write(&image, 0, 512).await;
            device_flushes(&disk, &image, 1).await;
            // Counts, zeros of a new table and data before the mapping.
            write(&image, 512, 512).await;
            assert_eq!(device_flushes(&disk, &image, 1).await, 2);
            write(&image, 512, 512).await;
            assert_eq!(device_flushes(&disk, &image, 1).await, 1, "an overwrite");
            // More clusters than there were refcount blocks for: these before the refcount table, the table before the mapping.
            for sector in 2..9000 {
                write(&image, sector * 512, 512).await;
            }
            assert_eq!(device_flushes(&disk, &image, 1).await, 3);
            // The header points to an L1 table that has moved when this is durable, and to the new size after that.
            let before = flushes_so_far(&disk);
            image.grow(2 << 30, None).await.expect("space");
            assert_eq!(flushes_so_far(&disk) - before, 5);
        });
    }

    #[test]
    fn flushes_at_the_same_time_share_device_flushes() {
        with_image(2, CreateOptions::standalone(64 << 20), async |disk, image| {
            device_flushes(&disk, &image, 1).await;
            // The first is under way when the others come, which must not believe that it covers what they have written.
            assert_eq!(device_flushes(&disk, &image, 64).await, 2);
            write(&image, 0, 512).await;
            assert_eq!(device_flushes(&disk, &image, 64).await, 3);
        });
    }

    /// The file has older mappings then, and the cache of tables is small.
    #[test]
    fn what_a_failed_round_has_not_written_stays_in_memory() {
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(64 << 20) };
        with_image(3, options, async |disk, image| {
            // A table of 512 bytes stands for 32 KiB of the disk.
            for table in 0..500 {
                write(&image, table * 32_768, 512).await;
            }
            image.flush().await.expect("a sound disk");
            image.inner.slices.set_budget(1);
            write(&image, 512, 512).await;
            disk.inject(Fault::lasting(OperationKind::Flush, 0));
            image.flush().await.expect_err("a failed flush");
            let mapped = async |at: u64| {
                let mut extents = ExtentList::new();
                image.map(GuestRange::new(GuestOffset::new(at), 512), &mut extents).await.expect("readable");
                extents.as_slice()[0].mapping
            };
            for _ in 0..2 {
                for table in 1..500 {
                    assert!(matches!(mapped(table * 32_768).await, Mapping::Data { .. }));
                }
            }
            assert!(matches!(mapped(512).await, Mapping::Data { .. }), "the guest would see older bytes");
        });
    }
}

//! Making the disk larger.
//!
//! 1. What lies past the old end reads as zeros: the rest of the last mapping unit is overwritten, and everything behind it is unmapped, because
//!    something may be mapped there (the state of a machine that QEMU has saved, the rest of a larger disk). Clusters that would let a longer
//!    backing file show through become zero clusters.
//! 2. If the L1 table is too short, a longer one is written elsewhere, and the header is pointed to it (a write-back does both, see
//!    `writeback`). With more entries than the disk needs the image is as sound as before.
//! 3. The header says the new size.
//!
//! Each step is durable before the next, so wherever this is cut the disk has its old size and content, or the new ones.

use std::sync::atomic::Ordering;

use crate::error::{LayerError, Structure};
use crate::extent::{ExtentList, Mapping};
use crate::storage::{Environment, StorageExt};
use crate::units::{GuestOffset, GuestRange};

use super::unmap::Become;
use super::{Inner, Qcow2};

/// Why a disk cannot grow. Nothing has changed then, except after a failed write.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum GrowError {
    #[error("only qcow2 images can be made larger here; lengthen a raw image with `truncate -s`")]
    NotQcow2,
    #[error("the virtual size of {0} bytes is not a multiple of 512")]
    Ragged(u64),
    #[error("the disk has {size} bytes already, and can only become larger than that, not {new_size}")]
    NotLarger { size: u64, new_size: u64 },
    #[error("the virtual size of {size} bytes is more than the {limit} bytes that this cluster size allows")]
    VirtualSize { size: u64, limit: u64 },
    #[error("internal snapshot {id} does not say how large its disk is; delete it with `qemu-img snapshot -d` first")]
    SnapshotSize { id: String },
    #[error("the last cluster of the disk is not its own; write to the last sector first")]
    Tail,
    #[error("version 2 cannot hide what the longer backing file has there; upgrade the image with `qemu-img amend -o compat=1.1` first")]
    BackingInVersion2,
    #[error(transparent)]
    Layer(#[from] LayerError),
}

impl<E: Environment> Qcow2<E> {
    /// Whether the disk could become that large.
    ///
    /// # Errors
    /// Why it could not.
    pub fn admit_growth(&self, new_size: u64) -> Result<(), GrowError> {
        let inner = &self.inner;
        inner.admit_write()?;
        inner.admit_size(inner.virtual_size(), new_size)
    }

    /// Makes the disk `new_size` bytes large, durably. The new part reads as zeros, even where the image beneath, with `beneath` bytes, is
    /// longer than the disk was. Nobody may use the image meanwhile.
    ///
    /// # Errors
    /// If the size makes no sense, the image does not allow it, or the medium fails.
    pub async fn grow(&self, new_size: u64, beneath: Option<u64>) -> Result<(), GrowError> {
        self.admit_growth(new_size)?;
        let inner = &self.inner;
        let old_size = inner.virtual_size();
        let shows_through = beneath.is_some_and(|beneath| beneath > old_size);
        if shows_through && !inner.format.has_zero {
            return Err(GrowError::BackingInVersion2);
        }
        inner.clear_rest_of_last_unit(old_size, shows_through).await?;
        inner.lengthen_l1(new_size).await?;
        let [hidden, empty] = inner.unmapped_by_growth(old_size, new_size, beneath);
        inner.unmap_range(hidden, Become::Zero { keep_space: false }, &|_| {}).await?;
        inner.unmap_range(empty, Become::Unallocated, &|_| {}).await?;
        inner
            .write_back_and(async |inner: &Inner<E>| {
                inner.header().size = new_size;
                inner.write_header().await?;
                inner.flush_device().await
            })
            .await?;
        inner.virtual_size.store(new_size, Ordering::Release);
        Ok(())
    }
}

impl<E: Environment> Inner<E> {
    fn admit_size(&self, size: u64, new_size: u64) -> Result<(), GrowError> {
        if !new_size.is_multiple_of(512) {
            return Err(GrowError::Ragged(new_size));
        }
        if new_size <= size {
            return Err(GrowError::NotLarger { size, new_size });
        }
        let limit = self.format.geometry.max_virtual_size();
        if new_size > limit {
            return Err(GrowError::VirtualSize { size: new_size, limit });
        }
        // Without a size of its own a snapshot has that of the disk. In version 2 other programs need not look for it.
        let version = self.header().version;
        match self.snapshots.list.iter().find(|snapshot| version < 3 || snapshot.virtual_size.is_none()) {
            Some(snapshot) => Err(GrowError::SnapshotSize { id: snapshot.id.clone() }),
            None => Ok(()),
        }
    }

    /// The whole mapping units past the end of the disk: those that a longer image beneath would show through, and those after them.
    fn unmapped_by_growth(&self, size: u64, new_size: u64, beneath: Option<u64>) -> [GuestRange; 2] {
        let unit = self.format.geometry.subcluster_bytes();
        let [start, shown] = [size, beneath.unwrap_or(0).min(new_size)].map(|at| GuestOffset::new(at).align_up(unit));
        let shown = shown.max(start);
        let end = GuestOffset::new(new_size).align_up(self.format.geometry.cluster_bytes());
        [GuestRange::between(start, shown), GuestRange::between(shown, end)]
    }

    /// Sees to it that the part of the last mapping unit past the end of the disk, if there is one, reads as zeros.
    async fn clear_rest_of_last_unit(&self, size: u64, shows_through: bool) -> Result<(), GrowError> {
        let end = GuestOffset::new(size);
        if end.is_aligned(self.format.geometry.cluster_bytes()) {
            return Ok(());
        }
        let unit_end = end.align_up(self.format.geometry.subcluster_bytes());
        let last = GuestRange::new(GuestOffset::new(size - 512), 512);
        let mut extents = ExtentList::new();
        self.map(last, &mut extents).await?;
        match extents.as_slice().first().map(|extent| extent.mapping) {
            Some(Mapping::Compressed) => Err(GrowError::Tail),
            _ if unit_end == end => Ok(()),
            Some(Mapping::Data { host, in_place: true }) => {
                let at = host + last.len;
                let zeros = vec![0; usize::try_from(unit_end - end).expect("less than a cluster")];
                let written = self.file.write_bytes(at, &zeros).await;
                Ok(written.map_err(|error| LayerError::io("write", Structure::Data, at, error))?)
            }
            Some(Mapping::Zero) | None => Ok(()),
            Some(Mapping::Unallocated) if !shows_through => Ok(()),
            Some(Mapping::Unallocated | Mapping::Data { .. }) => Err(GrowError::Tail),
        }
    }

    /// Gives the L1 table enough entries for a disk of that size: in memory, and in the file with the next write-back.
    async fn lengthen_l1(&self, size: u64) -> Result<(), LayerError> {
        let geometry = &self.format.geometry;
        let entries = usize::try_from(geometry.l1_entries(size)).expect("an L1 table has at most 32 MiB");
        if entries <= self.l1().len() {
            return Ok(());
        }
        let turn = self.refcount_turn.take().await;
        let clusters = geometry.clusters(entries as u64 * 8);
        let first = self.append_clusters(clusters, 0, &turn).await?;
        self.allocator().refcounts.set_all(first.0..first.0 + clusters, 1);
        self.metadata_mut().add(first.0..first.0 + clusters);
        let between = self.l1_mut().move_to(geometry.host_offset(first), entries);
        if let Some((at, bytes)) = between {
            // Growing has failed before, after this step.
            self.unmapped().ready.push(geometry.cluster_numbers(at, bytes));
        }
        Ok(())
    }
}

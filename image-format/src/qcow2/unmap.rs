//! Making bytes read as zeros and giving up their space.
//!
//! A host cluster that loses its last reference is free for use again only after three steps: the cleared entry is durable, nobody can still be
//! writing to the cluster through a mapping learnt before, and its refcount has been lowered ([`Qcow2::release`]).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{LayerError, Structure};
use crate::extent::{Extent, Mapping};
use crate::layer::Unmapped;
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange, HostOffset};

use super::entry::{Entry, Standard};
use super::geometry::{GuestCluster, HostCluster};
use super::l2::Slice;
use super::turn::TurnGuard;
use super::{Inner, Qcow2};

/// Host clusters on their way to be free.
#[derive(Debug, Default)]
pub(super) struct UnmappedLists {
    /// Not referred to in memory any more; the file may still.
    pub(super) pending: Vec<HostOffset>,
    /// Not referred to in the file either.
    pub(super) ready: Vec<HostOffset>,
    /// As `ready`, by batch: those of which the stack has been told, and which it will release.
    told: HashMap<u64, Vec<HostOffset>>,
    next_batch: u64,
}

impl UnmappedLists {
    /// Whether anything is not referred to any more.
    pub(super) fn has_any(&self) -> bool {
        !self.ready.is_empty() || !self.told.is_empty()
    }

    /// Everything that is not referred to any more.
    pub(super) fn take_all_unmapped(&mut self) -> Vec<HostOffset> {
        let told = self.told.drain().flat_map(|(_, clusters)| clusters);
        told.chain(self.ready.drain(..)).collect()
    }
}

/// What a range becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Become {
    /// Zeros, whatever lies beneath. With `keep_space` the host cluster stays for later writes.
    Zero { keep_space: bool },
    /// Nothing.
    Unallocated,
}

impl Become {
    fn mapping(self) -> Mapping {
        match self {
            Self::Zero { .. } => Mapping::Zero,
            Self::Unallocated => Mapping::Unallocated,
        }
    }
}

impl<E: Environment> Qcow2<E> {
    pub(crate) async fn write_zeroes(&self, range: GuestRange, unmap: bool, changed: &dyn Fn(Extent)) -> Result<bool, LayerError> {
        let inner = &self.inner;
        inner.admit_unmapping(range)?;
        if !inner.format.has_zero || inner.cuts_compressed(range).await? {
            return Ok(false);
        }
        inner.unmap_range(range, Become::Zero { keep_space: !unmap }, changed).await?;
        Ok(true)
    }

    pub(crate) async fn discard(&self, range: GuestRange, beneath: bool, changed: &dyn Fn(Extent)) -> Result<(), LayerError> {
        let inner = &self.inner;
        inner.admit_unmapping(range)?;
        match (beneath, inner.format.has_zero) {
            (true, true) => inner.unmap_range(range, Become::Zero { keep_space: false }, changed).await,
            (true, false) => Ok(()),
            (false, _) => inner.unmap_range(range, Become::Unallocated, changed).await,
        }
    }

    pub(crate) fn take_unmapped(&self) -> Unmapped {
        let mut unmapped = self.inner.unmapped();
        if unmapped.ready.is_empty() {
            return Unmapped::default();
        }
        let batch = unmapped.next_batch;
        unmapped.next_batch += 1;
        let clusters = std::mem::take(&mut unmapped.ready);
        unmapped.told.insert(batch, clusters);
        Unmapped { batch: Some(batch) }
    }

    pub(crate) async fn release(&self, unmapped: Unmapped) -> Result<(), LayerError> {
        let Some(batch) = unmapped.batch else { return Ok(()) };
        let inner = &self.inner;
        inner.admit_flush()?;
        let turn = inner.refcount_turn.take().await;
        // Only in the turn: freezing takes the batches in its own, and afterwards the file must not change.
        let clusters = inner.unmapped().told.remove(&batch);
        inner.lower(clusters.unwrap_or_default(), &turn).await
    }
}

impl<E: Environment> Inner<E> {
    /// Whole mapping units only, but for the end of the disk.
    fn admit_unmapping(&self, range: GuestRange) -> Result<(), LayerError> {
        self.admit_write()?;
        let size = self.virtual_size();
        let unit = self.format.geometry.subcluster_bytes();
        let whole = range.start.is_aligned(unit) && (range.end().is_aligned(unit) || range.end().get() == size);
        if range.end().get() > size || !whole {
            return Err(LayerError::OutOfRange { range, size });
        }
        Ok(())
    }

    /// Whether the range ends inside a compressed cluster, of which a part cannot be unmapped.
    async fn cuts_compressed(&self, range: GuestRange) -> Result<bool, LayerError> {
        let geometry = &self.format.geometry;
        for edge in [range.start, range.end()] {
            if edge.is_aligned(geometry.cluster_bytes()) || edge.get() >= self.virtual_size() {
                continue;
            }
            let (key, index) = geometry.locate(edge);
            if let Some(slice) = self.slice(key).await? {
                let entry = self.writable_entry(key, &slice.lock(), index)?;
                if matches!(entry, Entry::Compressed(_)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Whole mapping units. Those past the end of the disk are allowed where the L1 table reaches.
    pub(super) async fn unmap_range(&self, range: GuestRange, become_what: Become, changed: &dyn Fn(Extent)) -> Result<(), LayerError> {
        let geometry = &self.format.geometry;
        let mut at = range.start;
        while at < range.end() {
            let (key, _) = geometry.locate(at);
            if become_what == Become::Unallocated && self.l1().table(key.l1_index).is_none() {
                at = (at + 1).align_up(geometry.table_reach()).min(range.end());
                continue;
            }
            self.bound_dirty().await?;
            let slice = self.slice_for_writing(key).await?;
            let end = (at + 1).align_up(geometry.slice_reach()).min(range.end());
            for piece in GuestRange::between(at, end).split_at_multiples(geometry.cluster_bytes()) {
                let shard = self.busy.shard(geometry.guest_cluster(piece.start));
                shard.ended.wait_until(|| self.try_unmap(&slice, piece, become_what, changed).transpose()).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// Unmaps a part of one cluster. `None`: a reservation is in the way.
    fn try_unmap(
        &self,
        slice: &Arc<Slice>,
        range: GuestRange,
        become_what: Become,
        changed: &dyn Fn(Extent),
    ) -> Result<Option<()>, LayerError> {
        let geometry = &self.format.geometry;
        let cluster = geometry.guest_cluster(range.start);
        let mask = self.whole_mask(cluster, range);
        let clusters = self.busy.shard(cluster).lock();
        let busy = clusters.get(&cluster);
        if busy.is_some_and(|busy| busy.mask & mask != 0) {
            return Ok(None);
        }
        let mut state = slice.lock();
        let (_, index) = geometry.locate(range.start);
        let old = self.writable_entry(slice.key, &state, index)?;
        let Some(new) = unmapped(old, mask, geometry.all_subclusters(), become_what, busy.is_some()) else {
            return Ok(Some(()));
        };
        state.set(index, new, &self.format);
        self.mark_dirty(slice, &mut state);
        drop(state);
        // The shard is still locked: nobody can map these bytes anew before this change is known.
        changed(Extent { range, mapping: become_what.mapping() });
        let keeps_host = matches!(old, Entry::Standard(standard) if standard.host == new.host);
        if !keeps_host {
            self.unmap_entry(old);
        }
        Ok(Some(()))
    }

    /// The mapping units that the range covers; at the end of the disk those past it as well, which nobody sees.
    fn whole_mask(&self, cluster: GuestCluster, range: GuestRange) -> u32 {
        let geometry = &self.format.geometry;
        let cluster_end = geometry.guest_offset(cluster) + geometry.cluster_bytes();
        let end = if range.end() == GuestOffset::new(self.virtual_size()) { cluster_end } else { range.end() };
        geometry.subcluster_mask(GuestRange::between(range.start, end))
    }

    /// Lowers the refcount of clusters that nothing refers to and nobody writes to. Those that reach zero are punched out of the file and may
    /// be used again. After an error the rest waits for the next call.
    pub(super) async fn lower(&self, mut clusters: Vec<HostOffset>, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let geometry = self.format.geometry;
        clusters.sort_unstable();
        let mut freed: Vec<Range<u64>> = Vec::new();
        let mut result = Ok(());
        let mut done = 0;
        for &at in &clusters {
            let cluster = geometry.host_cluster(at);
            match self.lower_one(cluster, turn).await {
                Ok(false) => {}
                Ok(true) => match freed.last_mut() {
                    Some(run) if run.end == cluster.0 => run.end += 1,
                    _ => freed.push(cluster.0..cluster.0 + 1),
                },
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            done += 1;
        }
        self.unmapped().ready.extend_from_slice(&clusters[done..]);
        for run in freed {
            let at = geometry.host_offset(HostCluster(run.start));
            // Space that cannot be given back is still free for us; nothing depends on the punch.
            let _ = self.file.punch(at, (run.end - run.start) * geometry.cluster_bytes()).await;
            self.allocator().add_free(run);
        }
        result
    }

    /// Takes one off a refcount. Whether it is zero now.
    async fn lower_one(&self, cluster: HostCluster, turn: &TurnGuard<'_>) -> Result<bool, LayerError> {
        let geometry = &self.format.geometry;
        self.load_refcounts(geometry.locate_refcount(cluster).0, turn).await?;
        let mut allocator = self.allocator();
        let count = allocator.refcounts.get(cluster).unwrap_or(0);
        if count == 0 {
            drop(allocator);
            let (what, at) = (Structure::RefcountBlock, geometry.host_offset(cluster));
            return Err(self.fail(LayerError::Corrupt { what, at, detail: "a cluster that was in use has the refcount zero" }));
        }
        allocator.refcounts.set(cluster, count - 1);
        drop(allocator);
        if count == 1 {
            self.metadata_mut().remove(cluster.0);
        }
        Ok(count == 1)
    }
}

/// The entry with the masked part unmapped, or `None` if nothing changes. `busy`: a reservation of other parts may be using the host cluster.
fn unmapped(old: Entry, mask: u32, all: u32, become_what: Become, busy: bool) -> Option<Standard> {
    let zero_bits = |zero: u32| match become_what {
        Become::Zero { .. } => zero | mask,
        Become::Unallocated => zero & !mask,
    };
    let keep_space = become_what == Become::Zero { keep_space: true };
    let standard = match old {
        // Only as a whole; a part stays as it was.
        Entry::Compressed(_) => {
            return (mask == all).then(|| Standard { zero: zero_bits(0), ..Standard::UNALLOCATED });
        }
        Entry::Standard(standard) => standard,
    };
    let mut new = Standard { allocated: standard.allocated & !mask, zero: zero_bits(standard.zero), ..standard };
    let keeps_host = new.allocated != 0 || (standard.copied && (keep_space || busy));
    if !keeps_host {
        new.host = None;
        new.copied = false;
    }
    (new != standard).then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Option<HostOffset> = Some(HostOffset::new(0x50000));

    fn standard(copied: bool, allocated: u32, zero: u32) -> Standard {
        Standard { host: HOST, copied, allocated, zero }
    }

    #[test]
    fn the_host_cluster_goes_with_its_last_subcluster() {
        let entry = Entry::Standard(standard(true, 0b11, 0));
        let zero = Become::Zero { keep_space: false };
        assert_eq!(unmapped(entry, 0b01, u32::MAX, zero, false), Some(standard(true, 0b10, 0b01)));
        let gone = Standard { host: None, copied: false, allocated: 0, zero: 0b11 };
        assert_eq!(unmapped(entry, 0b11, u32::MAX, zero, false), Some(gone));
        assert_eq!(unmapped(entry, 0b11, u32::MAX, Become::Unallocated, false), Some(Standard::UNALLOCATED));
        // Another part of the same cluster is being written.
        assert_eq!(unmapped(entry, 0b11, u32::MAX, zero, true), Some(standard(true, 0, 0b11)));
    }

    #[test]
    fn keeping_the_space_keeps_only_what_is_ours_alone() {
        let keep = Become::Zero { keep_space: true };
        assert_eq!(unmapped(Entry::Standard(standard(true, 1, 0)), 1, 1, keep, false), Some(standard(true, 0, 1)));
        let gone = Standard { host: None, copied: false, allocated: 0, zero: 1 };
        assert_eq!(unmapped(Entry::Standard(standard(false, 1, 0)), 1, 1, keep, false), Some(gone));
    }

    #[test]
    fn what_is_unmapped_already_stays() {
        let zero = Entry::Standard(Standard { zero: 1, ..Standard::UNALLOCATED });
        assert_eq!(unmapped(zero, 1, 1, Become::Zero { keep_space: false }, false), None);
        assert_eq!(unmapped(Entry::Standard(Standard::UNALLOCATED), 1, 1, Become::Unallocated, false), None);
    }
}

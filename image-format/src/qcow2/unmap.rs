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
use crate::runtime::next_turn;
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange};

use super::entry::{Entry, Standard};
use super::geometry::{GuestCluster, HostCluster};
use super::l2::Slice;
use super::turn::TurnGuard;
use super::unwritten::Ticket;
use super::{Inner, Qcow2};

/// Clusters whose refcounts are lowered before the thread does something else: counting them takes some hundred microseconds at most.
const LOWERED_AT_ONCE: usize = 4096;

/// Host clusters on their way to be free.
#[derive(Debug, Default)]
pub(super) struct UnmappedLists {
    /// Not referred to in memory any more; the file may still.
    pub(super) pending: ClusterList,
    /// Not referred to in the file either.
    pub(super) ready: ClusterList,
    /// As `ready`, by batch: those of which the stack has been told, and which it will release.
    told: HashMap<u64, ClusterList>,
    next_batch: u64,
}

/// Numbers of host clusters in the order in which they came, one for each reference that is gone. Neighbours take no more memory than one.
#[derive(Debug, Default)]
pub(super) struct ClusterList(Vec<Range<u64>>);

impl ClusterList {
    pub(super) fn push(&mut self, clusters: Range<u64>) {
        match self.0.last_mut() {
            _ if clusters.is_empty() => {}
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.0.push(clusters),
        }
    }

    pub(super) fn append(&mut self, other: Self) {
        if self.0.is_empty() {
            *self = other;
        } else {
            other.0.into_iter().for_each(|clusters| self.push(clusters));
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes `limit` of them, or all if there are no more, from the end.
    fn take(&mut self, limit: usize) -> Vec<u64> {
        let mut taken = Vec::new();
        while taken.len() < limit
            && let Some(last) = self.0.last_mut()
        {
            let start = last.end.saturating_sub((limit - taken.len()) as u64).max(last.start);
            taken.extend(start..last.end);
            last.end = start;
            if last.is_empty() {
                self.0.pop();
            }
        }
        taken
    }
}

impl UnmappedLists {
    /// Whether anything is not referred to any more.
    pub(super) fn has_any(&self) -> bool {
        !self.ready.is_empty() || !self.told.is_empty()
    }

    /// Everything that is not referred to any more.
    pub(super) fn take_all_unmapped(&mut self) -> ClusterList {
        let mut all = std::mem::take(&mut self.ready);
        self.told.drain().for_each(|(_, clusters)| all.append(clusters));
        all
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
        loop {
            inner.admit_flush()?;
            let turn = inner.refcount_turn.take().await;
            // Only in the turn: freezing takes the batches in its own, and afterwards the file must not change.
            let Some(mut clusters) = inner.unmapped().told.remove(&batch) else { return Ok(()) };
            let some = clusters.take(LOWERED_AT_ONCE);
            let lowered = inner.lower(some, &turn).await;
            if lowered.is_err() || clusters.is_empty() {
                inner.unmapped().ready.append(clusters);
                return lowered;
            }
            inner.unmapped().told.insert(batch, clusters);
            drop(turn);
            next_turn().await;
        }
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
                let mut ticket = self.ticket().await?;
                shard.ended.wait_until(|| self.try_unmap(&slice, piece, become_what, changed, &mut ticket).transpose()).await?;
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
        ticket: &mut Ticket,
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
        self.change(slice, &mut state, index, new, ticket);
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

    /// As [`lower`](Self::lower), for any number of clusters.
    pub(super) async fn lower_all(&self, mut clusters: ClusterList, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        while !clusters.is_empty() {
            if let Err(error) = self.lower(clusters.take(LOWERED_AT_ONCE), turn).await {
                self.unmapped().ready.append(clusters);
                return Err(error);
            }
            next_turn().await;
        }
        Ok(())
    }

    /// Lowers the refcount of clusters that nothing refers to and nobody writes to. Those that reach zero are punched out of the file and may
    /// be used again. After an error the rest waits for the next call.
    async fn lower(&self, mut clusters: Vec<u64>, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let geometry = self.format.geometry;
        clusters.sort_unstable();
        let mut freed: Vec<Range<u64>> = Vec::new();
        let mut result = Ok(());
        let mut done = 0;
        for &cluster in &clusters {
            match self.lower_one(HostCluster(cluster), turn).await {
                Ok(false) => {}
                Ok(true) => match freed.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => freed.push(cluster..cluster + 1),
                },
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            done += 1;
        }
        for &cluster in &clusters[done..] {
            self.unmapped().ready.push(cluster..cluster + 1);
        }
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
    use crate::qcow2::testing::{MemoryFile, MemoryOnly, run};
    use crate::qcow2::{CreateOptions, OpenOptions, Preallocate};
    use crate::units::HostOffset;

    #[test]
    fn lists_of_clusters_are_taken_in_parts() {
        let mut list = ClusterList::default();
        for clusters in [3..5, 5..9, 8..9, 20..20, 8..9, 1..2] {
            list.push(clusters);
        }
        assert_eq!(list.0, [3..9, 8..9, 8..9, 1..2]);
        let mut other = ClusterList::default();
        other.append(list);
        assert_eq!([2, 3, 9, 1].map(|limit| other.take(limit)), [vec![1, 8], vec![8, 7, 8], vec![3, 4, 5, 6], vec![]]);
        assert!(other.is_empty());
    }

    /// Counts how often the thread gets to do other things.
    #[test]
    fn releasing_a_large_trim_lets_others_go_on() {
        let polls = run(async {
            let file = MemoryFile::default();
            let options = CreateOptions { cluster_bits: 9, preallocate: Preallocate::Metadata, ..CreateOptions::standalone(16 << 20) };
            Qcow2::<MemoryOnly>::create(&file, &options).await.expect("created");
            let image = Qcow2::<MemoryOnly>::open(file, OpenOptions::writing()).await.expect("opens");
            for cluster in 0..32 << 10 {
                let cluster = GuestRange::new(GuestOffset::new(cluster * 512), 512);
                image.reserve(cluster).await.expect("reserved").commit(|| {});
            }
            image.discard(GuestRange::new(GuestOffset::ZERO, 16 << 20), false, &|_| {}).await.expect("discarded");
            image.flush().await.expect("flushed");
            let mut release = std::pin::pin!(image.release(image.take_unmapped()));
            let mut polls = 0;
            std::future::poll_fn(|context| {
                polls += 1;
                release.as_mut().poll(context)
            })
            .await
            .expect("released");
            image.freeze(std::future::ready(())).await.expect("frozen");
            polls
        });
        assert!(polls >= 8, "32,768 clusters without a pause: {polls}");
    }

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

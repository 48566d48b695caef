//! Reserving places for writes and mapping them.

use std::sync::{Arc, PoisonError};

use crate::error::{LayerError, Structure};
use crate::layer::Reservation;
use crate::storage::{Environment, StorageExt};
use crate::units::{GuestOffset, GuestRange, HostOffset};

use super::busy::{Busy, Fresh, end_reservation};
use super::entry::{Entry, Standard};
use super::geometry::{GuestCluster, HostCluster, SliceKey};
use super::l1::Table;
use super::l2::{Slice, SliceState};
use super::unwritten::Ticket;
use super::{Inner, Qcow2, SHARED_WITH_METADATA};

/// Bytes of dirty slices at which a writer first waits for a write-back.
const DIRTY_LIMIT_BYTES: usize = 16 << 20;

/// Leave to write new space, see [`crate::layer::Reservation`].
///
/// Write order: the data is written while this exists; `commit` makes the mapping in memory point to it; a write-back
/// makes data and refcounts durable before it writes that mapping.
///
/// Must not be dropped while a transfer to its place is in flight: a transfer goes on when its future is dropped, and then others may reserve
/// the same part of the cluster and write there first. Who gives up a write half-way waits for its transfers before (the stack: `all_ended`).
#[derive(Debug)]
pub struct Allocation<E: Environment> {
    inner: Arc<Inner<E>>,
    /// Holds the slice in memory.
    slice: Arc<Slice>,
    index: usize,
    cluster: GuestCluster,
    mask: u32,
    range: GuestRange,
    /// The whole host cluster.
    host: HostOffset,
    reads_zero: bool,
    committed: bool,
    /// No write is under way.
    is_quiet: bool,
    ticket: Ticket,
}

/// What looking at a cluster's entry came to.
enum Attempt<E: Environment> {
    InPlace(HostOffset),
    Reserved(Allocation<E>),
    /// No cluster was ready.
    NeedCluster,
}

/// What a reservation takes, before it is known whether others are in the way.
struct Claim {
    mask: u32,
    range: GuestRange,
    /// A host cluster of this guest cluster's own.
    own: Option<HostOffset>,
}

impl<E: Environment> Qcow2<E> {
    pub(crate) async fn reserve(&self, range: GuestRange) -> Result<Reservation<E>, LayerError> {
        let inner = &self.inner;
        inner.admit_write()?;
        let geometry = inner.format.geometry;
        if range.is_empty() || range.end().get() > inner.virtual_size() || !range.is_aligned(512) {
            return Err(LayerError::OutOfRange { range, size: inner.virtual_size() });
        }
        let cluster = geometry.guest_cluster(range.start);
        debug_assert!(range.end() <= geometry.guest_offset(cluster) + geometry.cluster_bytes(), "a reservation stays in one cluster");
        inner.bound_dirty().await?;
        let (key, index) = geometry.locate(range.start);
        let slice = inner.slice_for_writing(key).await?;
        let shard = inner.busy.shard(cluster);
        let mut ticket = inner.ticket().await?;
        loop {
            let attempt = shard.ended.wait_until(|| inner.try_reserve(&slice, index, cluster, range, &mut ticket).transpose()).await?;
            match attempt {
                Attempt::InPlace(host) => return Ok(Reservation::InPlace { host }),
                Attempt::NeedCluster => inner.fill_up().await?,
                Attempt::Reserved(allocation) => {
                    allocation.clear_tail().await?;
                    inner.top_up().await;
                    return Ok(Reservation::Qcow2(allocation));
                }
            }
        }
    }
}

impl<E: Environment> Inner<E> {
    /// `None`: others are in the way.
    fn try_reserve(
        self: &Arc<Self>,
        slice: &Arc<Slice>,
        index: usize,
        cluster: GuestCluster,
        range: GuestRange,
        ticket: &mut Ticket,
    ) -> Result<Option<Attempt<E>>, LayerError> {
        let shard = self.busy.shard(cluster);
        let mut clusters = shard.lock();
        let state = slice.lock();
        let entry = self.writable_entry(slice.key, &state, index)?;
        drop(state);
        let claim = self.claim(entry, range);
        let busy = clusters.get(&cluster).copied();
        if busy.is_some_and(|busy| busy.mask & claim.mask != 0) {
            return Ok(None);
        }
        if let (Some(host), Entry::Standard(standard)) = (claim.own, entry) {
            self.check_writable_place(slice.key, index, range.start, host)?;
            if standard.allocated & claim.mask == claim.mask {
                let cluster_start = self.format.geometry.guest_offset(cluster);
                return Ok(Some(Attempt::InPlace(host + (range.start - cluster_start))));
            }
        }
        let fresh = match (claim.own, busy.and_then(|busy| busy.fresh)) {
            (Some(_), _) => None,
            (None, Some(fresh)) => Some(fresh),
            (None, None) => match self.allocator().take() {
                Some(fresh) => Some(fresh),
                None => return Ok(Some(Attempt::NeedCluster)),
            },
        };
        let busy = clusters.entry(cluster).or_insert(Busy { mask: 0, holders: 0, fresh: None });
        busy.mask |= claim.mask;
        busy.holders += 1;
        busy.fresh = busy.fresh.or(fresh);
        let (host, reads_zero) = match (claim.own, fresh) {
            (Some(host), _) => (host, false),
            (None, Some(Fresh { host, reads_zero, .. })) => (host, reads_zero),
            (None, None) => unreachable!("without a place of its own the cluster has a fresh one"),
        };
        Ok(Some(Attempt::Reserved(Allocation {
            inner: Arc::clone(self),
            slice: Arc::clone(slice),
            index,
            cluster,
            mask: claim.mask,
            range: claim.range,
            host,
            reads_zero,
            committed: false,
            is_quiet: false,
            ticket: std::mem::take(ticket),
        })))
    }

    /// What a write to `range` must have for itself, given the entry of its cluster.
    fn claim(&self, entry: Entry, range: GuestRange) -> Claim {
        let geometry = &self.format.geometry;
        let mask = geometry.subcluster_mask(range);
        let disk = GuestRange::new(GuestOffset::ZERO, self.virtual_size());
        match entry {
            Entry::Standard(Standard { host: Some(host), copied: true, allocated, .. }) => {
                // Where the range ends inside a sub-cluster that has its bytes already, it must not be widened: others write there.
                let whole = range.widen(geometry.subcluster_bytes());
                let has_bytes = |bit: u32| allocated & (1 << bit) != 0;
                let start = if has_bytes(mask.trailing_zeros()) { range.start } else { whole.start };
                let end = if has_bytes(31 - mask.leading_zeros()) { range.end() } else { whole.end() };
                Claim { mask, range: GuestRange::between(start, end).intersection(disk), own: Some(host) }
            }
            Entry::Standard(Standard { host: None, .. }) => {
                Claim { mask, range: range.widen(geometry.subcluster_bytes()).intersection(disk), own: None }
            }
            // Shared with an internal snapshot, or compressed: all of the cluster moves.
            Entry::Standard(_) | Entry::Compressed(_) => {
                let range = range.widen(geometry.cluster_bytes()).intersection(disk);
                Claim { mask: geometry.all_subclusters(), range, own: None }
            }
        }
    }

    /// An entry that is about to be changed. One that makes no sense ends all writing.
    pub(super) fn writable_entry(&self, key: SliceKey, state: &SliceState, index: usize) -> Result<Entry, LayerError> {
        state.entry(index, &self.format).map_err(|detail| self.fail(self.corrupt_entry(key, index, detail)))
    }

    fn check_writable_place(&self, key: SliceKey, index: usize, guest: GuestOffset, host: HostOffset) -> Result<(), LayerError> {
        match self.check_place(guest, host) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.admit_write()?;
                Err(self.fail(self.corrupt_entry(key, index, "an entry points past the end of the file")))
            }
            Err(detail) => Err(self.fail(self.corrupt_entry(key, index, detail))),
        }
    }

    /// Puts a slice that has been changed, under its lock, on the list of those to be written.
    pub(super) fn mark_dirty(&self, slice: &Arc<Slice>, state: &mut SliceState) {
        if !state.dirty {
            state.dirty = true;
            self.dirty.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(slice));
        }
    }

    /// Waits for a write-back if too much is waiting for one.
    pub(super) async fn bound_dirty(&self) -> Result<(), LayerError> {
        let slices = self.dirty.lock().unwrap_or_else(PoisonError::into_inner).len();
        if slices * self.slices.slice_len() > DIRTY_LIMIT_BYTES { self.write_back().await } else { Ok(()) }
    }

    /// The slice, of a table that may be changed: made, or copied from one that an internal snapshot shares, if need be.
    pub(super) async fn slice_for_writing(&self, key: SliceKey) -> Result<Arc<Slice>, LayerError> {
        loop {
            let table = self.l1().table(key.l1_index);
            match table {
                Some(Table { copied: true, .. }) => {
                    if let Some(slice) = self.slice(key).await? {
                        return Ok(slice);
                    }
                }
                _ => self.make_table(key.l1_index).await?,
            }
        }
    }

    /// Gives an L1 entry a table of its own.
    pub(super) async fn make_table(&self, l1_index: u32) -> Result<(), LayerError> {
        let _turn = self.table_turn.take().await;
        let geometry = &self.format.geometry;
        let shared = match self.l1().table(l1_index) {
            Some(Table { copied: true, .. }) => return Ok(()),
            Some(Table { at, .. }) => Some(at),
            None => None,
        };
        let Fresh { host, reads_zero, .. } = self.allocate_metadata().await?;
        let cluster = geometry.host_cluster(host).0;
        let Some(old) = shared else {
            self.metadata_mut().add(cluster..cluster + 1);
            self.l1_mut().set_zero_table(l1_index, host, reads_zero, geometry);
            return Ok(());
        };
        let what = Structure::L2Table;
        let copied = async {
            let bytes =
                self.file.read_bytes(old, geometry.cluster_len()).await.map_err(|error| LayerError::io("read", what, old, error))?;
            self.file.write_bytes(host, &bytes).await.map_err(|error| LayerError::io("write", what, host, error))
        };
        if let Err(error) = copied.await {
            self.put_back(host);
            return Err(error);
        }
        self.metadata_mut().add(cluster..cluster + 1);
        let mut l1 = self.l1_mut();
        l1.set_table(l1_index, host);
        // Under the same lock: a write-back that takes the old place to be freed also takes the new entry.
        self.unmapped().pending.push(geometry.cluster_numbers(old, 1));
        Ok(())
    }

    /// A standard cluster that the mapping does not refer to any more, or bytes of compressed ones: to be freed once that is durable. Call
    /// with the cluster's shard locked, after the slice has been marked dirty and everybody has been told: once a write-back sees it here, who
    /// begins to look for these bytes must not be led to it any more.
    ///
    /// Clusters with metadata, to which no sound entry points, are never freed: they end all writing instead.
    pub(super) fn unmap_entry(&self, entry: Entry) {
        let geometry = &self.format.geometry;
        let numbers = match entry {
            Entry::Standard(Standard { host: Some(host), .. }) => geometry.cluster_numbers(host, 1),
            Entry::Standard(_) => return,
            Entry::Compressed(extent) => geometry.cluster_numbers(extent.at, extent.len),
        };
        let shared = numbers.clone().find(|&number| self.metadata().contains(number));
        if let Some(number) = shared {
            let at = geometry.host_offset(HostCluster(number));
            self.fail(LayerError::Corrupt { what: Structure::Data, at, detail: SHARED_WITH_METADATA });
            return;
        }
        self.unmapped().pending.push(numbers);
    }
}

impl<E: Environment> Allocation<E> {
    pub(crate) fn range(&self) -> GuestRange {
        self.range
    }

    pub(crate) fn host(&self) -> HostOffset {
        self.host + (self.range.start - self.inner.format.geometry.guest_offset(self.cluster))
    }

    pub(crate) fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    pub(crate) fn commit(mut self, publish: impl FnOnce()) {
        self.committed = true;
        let inner = Arc::clone(&self.inner);
        let shard = inner.busy.shard(self.cluster);
        let mut clusters = shard.lock();
        let mut state = self.slice.lock();
        match state.entry(self.index, &inner.format) {
            Ok(old) => {
                let new = self.mapped(old);
                inner.change(&self.slice, &mut state, self.index, new, &mut self.ticket);
                drop(state);
                // The shard is still locked: nobody can change the mapping of these bytes again before this change is known.
                publish();
                match old {
                    Entry::Standard(standard) if standard.host == new.host => {}
                    old => inner.unmap_entry(old),
                }
            }
            Err(detail) => {
                // It made sense when it was reserved, and only we change it.
                inner.fail(inner.corrupt_entry(self.slice.key, self.index, detail));
            }
        }
        if let Some(busy) = clusters.get_mut(&self.cluster) {
            busy.fresh = None;
        }
        end_reservation(&mut clusters, self.cluster, self.mask);
        drop(clusters);
        shard.ended.notify_all();
    }

    pub(crate) fn give_up(mut self) {
        self.is_quiet = true;
    }

    /// The entry with this reservation mapped.
    fn mapped(&self, old: Entry) -> Standard {
        let kept = match old {
            Entry::Standard(standard) if standard.host == Some(self.host) || standard.host.is_none() => standard,
            // All of the cluster is reserved.
            Entry::Standard(_) | Entry::Compressed(_) => Standard::UNALLOCATED,
        };
        Standard { host: Some(self.host), copied: true, allocated: kept.allocated | self.mask, zero: kept.zero & !self.mask }
    }

    /// Zeros in what is reserved past the end of the disk: it shows when the disk grows.
    async fn clear_tail(&self) -> Result<(), LayerError> {
        let geometry = &self.inner.format.geometry;
        let end = self.range.end();
        let units = u64::from(u32::BITS - self.mask.leading_zeros());
        let unit_end = geometry.guest_offset(self.cluster) + units * geometry.subcluster_bytes();
        if self.reads_zero || end >= unit_end || end.get() != self.inner.virtual_size() {
            return Ok(());
        }
        let at = self.host() + self.range.len;
        let zeros = vec![0; usize::try_from(unit_end - end).expect("less than a cluster")];
        self.inner.file.write_bytes(at, &zeros).await.map_err(|error| LayerError::io("write", Structure::Data, at, error))
    }
}

impl<E: Environment> Drop for Allocation<E> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let shard = self.inner.busy.shard(self.cluster);
        let mut clusters = shard.lock();
        if let Some(Busy { fresh: Some(shared), .. }) = clusters.get_mut(&self.cluster) {
            // Part of the data may be there by now.
            shared.reads_zero = false;
            shared.may_change |= !self.is_quiet;
        }
        let fresh = end_reservation(&mut clusters, self.cluster, self.mask);
        drop(clusters);
        match fresh {
            None => {}
            Some(Fresh { host, may_change: false, .. }) => self.inner.put_back(host),
            // It takes the way of all clusters that are not used any more.
            Some(Fresh { host, .. }) => self.inner.unmapped().ready.push(self.inner.format.geometry.cluster_numbers(host, 1)),
        }
        shard.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::CreateOptions;
    use crate::qcow2::testing::{SIMULATED_IMAGE, with_image, write};

    #[test]
    fn only_whole_sectors_of_the_disk_are_reserved() {
        with_image(1, CreateOptions::standalone(1 << 20), async |_, image| {
            for (at, len) in [(0, 0), (0, 511), (256, 512), ((1 << 20) - 512, 1024), (1 << 20, 512)] {
                let range = GuestRange::new(GuestOffset::new(at), len);
                let refused = image.reserve(range).await;
                assert!(matches!(refused, Err(LayerError::OutOfRange { .. })), "{range:?}: {refused:?}");
            }
            write(&image, (1 << 20) - 512, 512).await;
        });
    }

    #[test]
    fn what_has_its_bytes_already_is_not_widened_into() {
        let options = CreateOptions { extended_l2: true, ..CreateOptions::standalone(1 << 20) };
        with_image(2, options, async |_, image| {
            let standard = Standard { host: Some(HostOffset::new(7 << 16)), copied: true, allocated: 0b1100, zero: 0 };
            let subcluster = 2048;
            for (start, end, claimed) in [
                // Both ends are where the bytes are, one of them, and none.
                (2 * subcluster + 512, 3 * subcluster + 512, 2 * subcluster + 512..3 * subcluster + 512),
                (2 * subcluster + 512, 4 * subcluster + 512, 2 * subcluster + 512..5 * subcluster),
                (subcluster + 512, 3 * subcluster + 512, subcluster..3 * subcluster + 512),
                (subcluster + 512, 4 * subcluster + 512, subcluster..5 * subcluster),
            ] {
                let range = GuestRange::between(GuestOffset::new(start), GuestOffset::new(end));
                let claim = image.inner.claim(Entry::Standard(standard), range);
                assert_eq!(claim.range.start.get()..claim.range.end().get(), claimed, "of {range:?}");
                assert_eq!(claim.own, standard.host);
            }
        });
    }

    /// The disk ends in the midst of a cluster, which may be one that has been used before.
    #[test]
    fn what_shows_when_the_disk_grows_is_zero() {
        for (extended_l2, unit_bytes) in [(false, 1 << 16), (true, 2048)] {
            let options = CreateOptions { extended_l2, ..CreateOptions::standalone((4 << 16) + 512) };
            with_image(5, options, async move |disk, image| {
                let used = image.reserve(GuestRange::new(GuestOffset::ZERO, 1 << 16)).await.expect("space");
                let place = used.host();
                used.commit(|| {});
                image.discard(GuestRange::new(GuestOffset::ZERO, 1 << 16), false, &|_| {}).await.expect("nothing beneath");
                image.flush().await.expect("sound");
                image.release(image.take_unmapped()).await.expect("sound");
                image.inner.allocator().clear_ready();
                // As a medium leaves it that gives no space back.
                image.inner.file.write_bytes(place, &[7; 1 << 16]).await.expect("a sound disk");
                let last = image.reserve(GuestRange::new(GuestOffset::new(4 << 16), 512)).await.expect("space");
                assert_eq!((last.host(), last.reads_zero()), (place, false), "the cluster that was given up");
                image.inner.file.write_bytes(place, &[9; 512]).await.expect("a sound disk");
                last.commit(|| {});
                let start = usize::try_from(place.get()).expect("a small file");
                let bytes = &disk.bytes(SIMULATED_IMAGE).expect("there")[start..][..1 << 16];
                assert!(bytes[..512] == [9; 512] && bytes[512..unit_bytes].iter().all(|byte| *byte == 0));
                assert!(bytes[unit_bytes..].iter().all(|byte| *byte == 7), "more than the unit was written");
            });
        }
    }

    /// Only past the end of the disk there is nothing to be kept.
    #[test]
    fn bytes_behind_a_range_stay() {
        let options = CreateOptions { extended_l2: true, ..CreateOptions::standalone(1 << 20) };
        with_image(6, options, async |disk, image| {
            write(&image, 2048, 2048).await;
            let reserved = image.reserve(GuestRange::new(GuestOffset::ZERO, 2560)).await.expect("space");
            let start = usize::try_from(reserved.host().get()).expect("a small file");
            assert!(disk.bytes(SIMULATED_IMAGE).expect("there")[start + 2048..start + 4096] == [7; 2048]);
            reserved.commit(|| {});
        });
    }

    #[test]
    fn a_new_table_is_known_as_metadata() {
        with_image(3, CreateOptions::standalone(1 << 20), async |_, image| {
            write(&image, 0, 4096).await;
            let Some(Table { at, .. }) = image.inner.l1().table(0) else { panic!("a table") };
            assert!(image.inner.metadata().contains(image.inner.format.geometry.host_cluster(at).0));
        });
    }

    #[test]
    fn who_writes_waits_once_too_much_is_unwritten() {
        // A slice is a table here, and covers 2 MiB of the disk.
        let (options, limit) = (CreateOptions { cluster_bits: 12, ..CreateOptions::standalone(16 << 30) }, DIRTY_LIMIT_BYTES / 4096);
        with_image(4, options, async move |_, image| {
            let unwritten = || image.inner.dirty.lock().unwrap_or_else(PoisonError::into_inner).len();
            for slice in 0..limit {
                write(&image, (slice as u64) << 21, 4096).await;
            }
            image.inner.bound_dirty().await.expect("sound");
            assert_eq!(unwritten(), limit);
            write(&image, (limit as u64) << 21, 4096).await;
            assert_eq!(unwritten(), limit + 1);
            image.inner.bound_dirty().await.expect("sound");
            assert_eq!(unwritten(), 0);
        });
    }
}

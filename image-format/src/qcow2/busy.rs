//! Clusters of the guest's disk that somebody is about to map.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::runtime::WaitQueue;
use crate::units::HostOffset;

use super::geometry::GuestCluster;

const SHARDS: u64 = 16;

/// Reservations of parts of clusters. Two that overlap exclude one another; others of the same new cluster share its place.
///
/// Lock order: a shard, then a slice, then the lists of unmapped clusters and dirty slices or the allocator.
#[derive(Debug, Default)]
pub(super) struct BusyTable {
    shards: [Shard; SHARDS as usize],
}

/// The busy clusters with some numbers, and who waits for them.
#[derive(Debug, Default)]
pub(super) struct Shard {
    clusters: Mutex<HashMap<GuestCluster, Busy>>,
    /// Notified after a reservation ended.
    pub(super) ended: WaitQueue,
}

/// Reservations of one cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Busy {
    /// Sub-clusters that are reserved.
    pub(super) mask: u32,
    /// Number of reservations; never 0 in the table.
    pub(super) holders: u32,
    /// A place that was allocated for them and to which the mapping does not point yet.
    pub(super) fresh: Option<Fresh>,
}

/// A host cluster that nothing points to yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fresh {
    pub(super) host: HostOffset,
    /// The file reads as zeros there, but for what the reservations of it write.
    pub(super) reads_zero: bool,
    /// A write that was given up half-way may still reach it.
    pub(super) may_change: bool,
}

impl BusyTable {
    pub(super) fn shard(&self, cluster: GuestCluster) -> &Shard {
        let index = usize::try_from(cluster.0 % SHARDS).expect("a small number");
        &self.shards[index]
    }
}

impl Shard {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<GuestCluster, Busy>> {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends one reservation; returns the fresh place if it was the last and the place was never mapped.
pub(super) fn end_reservation(clusters: &mut HashMap<GuestCluster, Busy>, cluster: GuestCluster, mask: u32) -> Option<Fresh> {
    let busy = clusters.get_mut(&cluster)?;
    busy.mask &= !mask;
    busy.holders -= 1;
    if busy.holders > 0 {
        return None;
    }
    clusters.remove(&cluster).and_then(|busy| busy.fresh)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_busy_until_its_last_reservation_ends() {
        let table = BusyTable::default();
        let (cluster, other) = (GuestCluster(3), GuestCluster(4));
        assert!(std::ptr::eq(table.shard(cluster), table.shard(cluster)) && !std::ptr::eq(table.shard(cluster), table.shard(other)));
        let fresh = Fresh { host: HostOffset::new(0x5_0000), reads_zero: true, may_change: false };
        let mut clusters = table.shard(cluster).lock();
        clusters.insert(cluster, Busy { mask: 0b111, holders: 2, fresh: Some(fresh) });
        assert_eq!(end_reservation(&mut clusters, cluster, 0b011), None);
        assert_eq!(clusters.get(&cluster).map(|busy| (busy.mask, busy.holders, busy.fresh)), Some((0b100, 1, Some(fresh))));
        assert_eq!(end_reservation(&mut clusters, cluster, 0b100), Some(fresh));
        assert!(clusters.is_empty());
        clusters.insert(cluster, Busy { mask: 1, holders: 1, fresh: None });
        assert_eq!(end_reservation(&mut clusters, cluster, 1), None, "the mapping points to its place");
        assert!(clusters.is_empty());
    }
}

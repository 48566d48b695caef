//! Cluster size and table widths of one image, and every conversion between units.

use std::fmt;
use std::ops::Range;

use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Smallest cluster the format allows: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster that is supported here and in QEMU: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster with extended L2 entries: 16 KiB, so that a sub-cluster is a sector at least.
pub(super) const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// Refcounts are `1 << order` bits wide.
pub(super) const MAX_REFCOUNT_ORDER: u32 = 6;
/// Sub-clusters in a cluster with extended L2 entries.
pub(super) const SUBCLUSTERS: u32 = 32;
/// Largest L1 table in bytes, as in QEMU.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, as in QEMU.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// L2 tables are cached and written in slices of at most this many bytes.
const MAX_SLICE_BITS: u32 = 12;
/// Positions that tables can hold end here: bits 9 to 55.
pub(super) const HOST_LIMIT: u64 = 1 << 56;

/// Number of a cluster of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct GuestCluster(pub(super) u64);

/// Number of a cluster of the image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct HostCluster(pub(super) u64);

impl fmt::Display for HostCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cluster {}", self.0)
    }
}

/// Cluster size and table widths of one open image. The only place where units convert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
    refcount_order: u32,
}

/// A part of an L2 table: which L1 entry, and which slice of that table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SliceKey {
    /// Index into the L1 table.
    pub(super) l1_index: u32,
    /// Number of the slice in the table.
    pub(super) slice: u32,
}

impl Geometry {
    /// The caller has checked the three against the limits above.
    pub(super) fn new(cluster_bits: u32, extended_l2: bool, refcount_order: u32) -> Self {
        debug_assert!((MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) && refcount_order <= MAX_REFCOUNT_ORDER);
        Self { cluster_bits, extended_l2, refcount_order }
    }

    /// The cluster size as a power of two.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Allocation unit.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The cluster size as a length in memory: at most 2 MiB.
    pub(super) fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Whether each L2 entry has a bitmap of sub-clusters.
    pub fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Mapping unit: a 32nd of the cluster with extended L2 entries, else the cluster.
    pub fn subcluster_bytes(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Width of one refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// A mask with a bit for every mapping unit of a cluster.
    pub(super) fn all_subclusters(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// The mapping units of one cluster that `range`, inside that cluster, touches.
    pub(super) fn subcluster_mask(&self, range: GuestRange) -> u32 {
        let within = range.start - range.start.align_down(self.cluster_bytes());
        let first = within >> self.subcluster_bits();
        let last = (within + range.len - 1) >> self.subcluster_bits();
        let count = u32::try_from(last - first + 1).unwrap_or(SUBCLUSTERS);
        let ones = if count >= 32 { u32::MAX } else { (1 << count) - 1 };
        ones << first
    }

    fn subcluster_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - SUBCLUSTERS.ilog2() } else { self.cluster_bits }
    }

    /// 64-bit words in an L2 entry: 1 or 2.
    pub(super) fn entry_words(&self) -> usize {
        1 + usize::from(self.extended_l2)
    }

    fn entry_bits(&self) -> u32 {
        3 + u32::from(self.extended_l2)
    }

    fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    fn slice_bits(&self) -> u32 {
        self.cluster_bits.min(MAX_SLICE_BITS)
    }

    /// Bytes of one slice of an L2 table.
    pub(super) fn slice_bytes(&self) -> u64 {
        1 << self.slice_bits()
    }

    /// Entries in one slice.
    pub(super) fn slice_entries(&self) -> usize {
        1 << (self.slice_bits() - self.entry_bits())
    }

    /// Slices in one L2 table.
    pub(super) fn slices_per_table(&self) -> u32 {
        1 << (self.cluster_bits - self.slice_bits())
    }

    /// Bytes of the guest's disk that one L2 table maps.
    pub(super) fn table_reach(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Bytes of the guest's disk that one slice maps.
    pub(super) fn slice_reach(&self) -> u64 {
        self.cluster_bytes() * self.slice_entries() as u64
    }

    /// L1 entries that a disk of `virtual_size` bytes needs.
    pub(super) fn l1_entries(&self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.table_reach())
    }

    /// Largest disk that an L1 table of the largest size can map.
    pub fn max_virtual_size(&self) -> u64 {
        let entries = u128::from(MAX_L1_BYTES / 8);
        let bytes = entries * u128::from(self.table_reach());
        u64::try_from(bytes).unwrap_or(u64::MAX).min(i64::MAX as u64) & !511
    }

    /// The guest cluster around `at`.
    pub(super) fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.get() >> self.cluster_bits)
    }

    /// Where a guest cluster starts.
    pub(super) fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset::new(cluster.0 << self.cluster_bits)
    }

    /// The slice that maps `at`, and the number of its entry in there. `at` is inside a disk whose L1 table was checked.
    pub(super) fn locate(&self, at: GuestOffset) -> (SliceKey, usize) {
        let cluster = at.get() >> self.cluster_bits;
        let in_table = cluster & ((1 << self.l2_bits()) - 1);
        let slice_entry_bits = self.slice_bits() - self.entry_bits();
        let key = SliceKey {
            l1_index: u32::try_from(cluster >> self.l2_bits()).expect("an L1 table has at most 32 MiB"),
            slice: u32::try_from(in_table >> slice_entry_bits).expect("an L2 table has at most 2 MiB"),
        };
        let entry = in_table & ((1 << slice_entry_bits) - 1);
        (key, usize::try_from(entry).expect("a slice has at most 512 entries"))
    }

    /// What a slice maps.
    pub(super) fn mapped_by(&self, key: SliceKey) -> GuestRange {
        let start = u64::from(key.l1_index) * self.table_reach() + u64::from(key.slice) * self.slice_reach();
        GuestRange::new(GuestOffset::new(start), self.slice_reach())
    }

    /// The host cluster around `at`.
    pub(super) fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.get() >> self.cluster_bits)
    }

    /// Where a host cluster starts.
    pub(super) fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset::new(cluster.0 << self.cluster_bits)
    }

    /// Clusters that `bytes` take up.
    pub(super) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// Numbers of the host clusters that `len` bytes from `at` on touch.
    pub(super) fn cluster_numbers(&self, at: HostOffset, len: u64) -> Range<u64> {
        if len == 0 {
            return 0..0;
        }
        at.get() >> self.cluster_bits..(at.get().saturating_add(len - 1) >> self.cluster_bits) + 1
    }

    /// Refcounts in one refcount block.
    pub(super) fn refcounts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest refcount that fits.
    pub(super) fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Entry of the refcount table that covers a host cluster, and the number of its refcount in that block.
    pub(super) fn locate_refcount(&self, cluster: HostCluster) -> (u64, usize) {
        let per_block = self.refcounts_per_block();
        (cluster.0 / per_block, usize::try_from(cluster.0 % per_block).expect("a block has at most 2^24 refcounts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_convert_at_the_edges_of_every_geometry() {
        for cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            for extended in [false, true] {
                if extended && cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
                    continue;
                }
                let geometry = Geometry::new(cluster_bits, extended, 4);
                let last = GuestOffset::new(geometry.table_reach() - 1);
                let (key, entry) = geometry.locate(last);
                assert_eq!(key, SliceKey { l1_index: 0, slice: geometry.slices_per_table() - 1 });
                assert_eq!(entry, geometry.slice_entries() - 1);
                let (key, entry) = geometry.locate(GuestOffset::new(geometry.table_reach()));
                assert_eq!((key, entry), (SliceKey { l1_index: 1, slice: 0 }, 0));
                assert_eq!(geometry.slice_reach() * u64::from(geometry.slices_per_table()), geometry.table_reach());
                assert!(geometry.max_virtual_size() > 0);
            }
        }
    }

    #[test]
    fn largest_disks_are_those_of_the_specification() {
        assert_eq!(Geometry::new(9, false, 4).max_virtual_size(), 1 << 37);
        assert_eq!(Geometry::new(21, false, 4).max_virtual_size(), 1 << 61);
    }

    #[test]
    fn masks_cover_the_touched_subclusters() {
        let extended = Geometry::new(17, true, 4);
        let mask = |start, len| extended.subcluster_mask(GuestRange::new(GuestOffset::new(start), len));
        assert_eq!(mask(0, 131_072), u32::MAX);
        assert_eq!(mask(131_072 + 4096, 4096), 2);
        assert_eq!(mask(131_072 + 4095, 2), 3);
        assert_eq!(mask(131_072 * 2 - 512, 512), 1 << 31);
        let plain = Geometry::new(16, false, 4);
        assert_eq!(plain.subcluster_mask(GuestRange::new(GuestOffset::new(512), 1024)), 1);
    }

    #[test]
    fn refcounts_are_found_for_every_width() {
        for order in 0..=MAX_REFCOUNT_ORDER {
            let geometry = Geometry::new(9, false, order);
            let per_block = geometry.refcounts_per_block();
            assert_eq!(per_block, 4096 >> order);
            assert_eq!(geometry.locate_refcount(HostCluster(per_block)), (1, 0));
        }
        assert_eq!(Geometry::new(9, false, 6).max_refcount(), u64::MAX);
        assert_eq!(Geometry::new(9, false, 0).max_refcount(), 1);
    }
}

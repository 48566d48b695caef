//! Reference counts: the table in memory as a whole, blocks as they are needed. Changes stay in memory until a write-back takes them.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::buffer::AlignedBuffer;
use crate::units::HostOffset;

use super::geometry::{Geometry, HOST_LIMIT, HostCluster, MAX_REFCOUNT_TABLE_BYTES};
use super::l1::{SECTOR, table_bytes, table_sector};

/// Bytes of clean refcount blocks to keep in memory.
pub(super) const CACHE_BYTES: usize = 8 << 20;

/// Reference counts of all host clusters.
///
/// An entry of the table in here may be newer than the file's. It is written only after the block it points to is durable, and clusters that
/// the block covers are referred to only after the entry is durable (docs/crash-order.md).
#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    /// Positions of the blocks; 0 for none.
    table: Vec<u64>,
    table_at: HostOffset,
    table_clusters: u32,
    /// Entries newer than the file's table.
    dirty_entries: BTreeSet<usize>,
    /// The table is at a new place that the header in the file does not know yet; the old place, to be freed afterwards.
    moved_from: Vec<HostCluster>,
    blocks: HashMap<u64, Block>,
    /// Blocks of which something is newer than the file.
    dirty_blocks: BTreeSet<u64>,
    /// Blocks that a write-back is writing: the file has older ones until it has ended.
    being_written: BTreeSet<u64>,
}

/// A refcount block in memory.
#[derive(Debug)]
struct Block {
    bytes: Box<[u8]>,
    /// Bytes that are newer than the file's.
    dirty: Option<Range<usize>>,
}

/// Where the refcount block with some number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    /// Nowhere: all its refcounts are 0.
    Missing,
    /// In the file only.
    Unloaded(HostOffset),
    /// In memory.
    Loaded,
}

/// What must be written for the refcounts by one write-back.
#[derive(Debug, Default)]
pub(super) struct RefcountWrites {
    /// Parts of blocks and, if the table has moved, the table. First.
    pub(super) blocks: Vec<(HostOffset, AlignedBuffer)>,
    /// Entries of the table where it is. After the blocks are durable.
    pub(super) entries: Vec<(HostOffset, AlignedBuffer)>,
    /// The place that the header must point to. After the table there is durable.
    pub(super) moved_to: Option<(HostOffset, u32)>,
    /// Clusters of former tables, free once the header is durable.
    pub(super) retired: Vec<HostCluster>,
}

/// What appending some clusters to the file takes: a larger refcount table, then blocks, then the clusters, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AppendPlan {
    /// Clusters of a new refcount table, or 0.
    pub(super) table_clusters: u64,
    /// New refcount blocks.
    pub(super) block_clusters: u64,
    /// What was asked for.
    pub(super) clusters: u64,
}

impl AppendPlan {
    pub(super) fn total(&self) -> u64 {
        self.table_clusters + self.block_clusters + self.clusters
    }
}

impl Refcounts {
    /// The table as it is in the file; entries have been checked.
    pub(super) fn new(geometry: Geometry, table_at: HostOffset, table_clusters: u32, table: Vec<u64>) -> Self {
        Self {
            geometry,
            table,
            table_at,
            table_clusters,
            dirty_entries: BTreeSet::new(),
            moved_from: Vec::new(),
            blocks: HashMap::new(),
            dirty_blocks: BTreeSet::new(),
            being_written: BTreeSet::new(),
        }
    }

    /// Positions of all blocks with their numbers.
    pub(super) fn block_positions(&self) -> impl Iterator<Item = (u64, HostOffset)> {
        (0_u64..).zip(&self.table).filter(|&(_, &at)| at != 0).map(|(index, &at)| (index, HostOffset::new(at)))
    }

    pub(super) fn table_range(&self) -> Range<u64> {
        let first = self.geometry.host_cluster(self.table_at).0;
        first..first + u64::from(self.table_clusters)
    }

    pub(super) fn block_state(&self, index: u64) -> BlockState {
        if self.blocks.contains_key(&index) {
            return BlockState::Loaded;
        }
        match usize::try_from(index).ok().and_then(|index| self.table.get(index)) {
            None | Some(0) => BlockState::Missing,
            Some(&at) => BlockState::Unloaded(HostOffset::new(at)),
        }
    }

    /// Keeps a block that has been read from the file. Clean blocks may go, but for those that `keep` names.
    pub(super) fn insert(&mut self, index: u64, bytes: &[u8], keep: impl Fn(u64) -> bool) {
        let limit = (CACHE_BYTES >> self.geometry.cluster_bits()).max(4);
        if self.blocks.len() >= limit {
            let being_written = &self.being_written;
            self.blocks.retain(|&index, block| block.dirty.is_some() || being_written.contains(&index) || keep(index));
        }
        self.blocks.insert(index, Block { bytes: bytes.into(), dirty: None });
    }

    /// Lets go of everything in memory, for a file that does not change any more: nobody asks again.
    pub(super) fn let_go(&mut self) {
        debug_assert!(self.dirty_blocks.is_empty() && self.dirty_entries.is_empty() && self.being_written.is_empty());
        self.table = Vec::new();
        self.blocks = HashMap::new();
    }

    /// The refcount of a cluster; `None` if its block is not in memory.
    pub(super) fn get(&self, cluster: HostCluster) -> Option<u64> {
        let (index, entry) = self.geometry.locate_refcount(cluster);
        match self.block_state(index) {
            BlockState::Missing => Some(0),
            BlockState::Unloaded(_) => None,
            BlockState::Loaded => Some(read_refcount(&self.blocks[&index].bytes, entry, self.geometry.refcount_bits())),
        }
    }

    /// The end of the last cluster in use among these of one block, or their start if none is; `None` if the block is not in memory.
    pub(super) fn end_in_use(&self, clusters: Range<u64>) -> Option<u64> {
        let (index, first) = self.geometry.locate_refcount(HostCluster(clusters.start));
        debug_assert!(clusters.end <= (index + 1) * self.geometry.refcounts_per_block(), "{clusters:?} are of one block");
        let block = match self.block_state(index) {
            BlockState::Missing => return Some(clusters.start),
            BlockState::Unloaded(_) => return None,
            BlockState::Loaded => &self.blocks[&index],
        };
        let entries = first..first + usize::try_from(clusters.end - clusters.start).expect("a block has at most 2^24 refcounts");
        let last = entries.rev().find(|&entry| read_refcount(&block.bytes, entry, self.geometry.refcount_bits()) != 0);
        Some(clusters.start + last.map_or(0, |last| (last - first) as u64 + 1))
    }

    /// Sets a refcount. Its block must be in memory, and the value must fit.
    pub(super) fn set(&mut self, cluster: HostCluster, value: u64) {
        let bits = self.geometry.refcount_bits();
        debug_assert!(value <= self.geometry.max_refcount());
        let (index, entry) = self.geometry.locate_refcount(cluster);
        let block = self.blocks.get_mut(&index).expect("the caller has loaded the block");
        let touched = write_refcount(&mut block.bytes, entry, bits, value);
        block.mark_dirty(touched);
        self.dirty_blocks.insert(index);
    }

    /// Sets several refcounts. Their blocks must be in memory.
    pub(super) fn set_all(&mut self, clusters: Range<u64>, value: u64) {
        for cluster in clusters {
            self.set(HostCluster(cluster), value);
        }
    }

    /// Free clusters of a block in memory, as runs, from `from` on.
    pub(super) fn free_runs(&self, index: u64, from: u64, end: u64) -> Vec<Range<u64>> {
        let per_block = self.geometry.refcounts_per_block();
        let Some(block) = self.blocks.get(&index) else { return Vec::new() };
        let bits = self.geometry.refcount_bits();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in (index * per_block).max(from)..((index + 1) * per_block).min(end) {
            let entry = usize::try_from(cluster - index * per_block).expect("at most 2^24 refcounts");
            if read_refcount(&block.bytes, entry, bits) != 0 {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => runs.push(cluster..cluster + 1),
            }
        }
        runs
    }

    /// Makes a block that is missing between others, all zeros, at a cluster that it covers itself or whose block is in memory, and counts it.
    pub(super) fn make_block(&mut self, index: u64, at: HostCluster) {
        debug_assert!(self.block_state(index) == BlockState::Missing, "blocks are made once");
        self.add_block(index, at);
        self.set(at, 1);
    }

    /// A block of zeros, which the table must have room for.
    fn add_block(&mut self, index: u64, at: HostCluster) {
        let slot = usize::try_from(index).expect("the table has at most 2^20 entries");
        self.table[slot] = self.geometry.host_offset(at).get();
        self.dirty_entries.insert(slot);
        let len = self.geometry.cluster_len();
        self.blocks.insert(index, Block { bytes: vec![0; len].into(), dirty: Some(0..len) });
        self.dirty_blocks.insert(index);
    }

    /// What it takes to append `clusters` clusters from `end` on, or the largest that the format allows exceeded.
    pub(super) fn plan_append(&self, end: u64, clusters: u64) -> Result<AppendPlan, &'static str> {
        let per_block = self.geometry.refcounts_per_block();
        let entries_per_cluster = self.geometry.cluster_bytes() / 8;
        let mut plan = AppendPlan { table_clusters: 0, block_clusters: 0, clusters };
        // Each turn finds what the present plan lacks. More room only makes the need grow, and the need is bounded, so it ends.
        loop {
            let last = end + plan.total() - 1;
            if last >= HOST_LIMIT >> self.geometry.cluster_bits() {
                return Err("file positions");
            }
            let indexes = end / per_block..=last / per_block;
            let missing = indexes.clone().filter(|&index| self.block_state(index) == BlockState::Missing).count() as u64;
            let table_clusters = if *indexes.end() < self.table.len() as u64 {
                0
            } else {
                let limit = (MAX_REFCOUNT_TABLE_BYTES / self.geometry.cluster_bytes()).max(1);
                let least = (indexes.end() + 1).div_ceil(entries_per_cluster);
                if least > limit {
                    return Err("refcount table");
                }
                // Half as large again, so that it moves seldom; never smaller than in the turn before.
                (least + least / 2 + 1).min(limit).max(plan.table_clusters)
            };
            if (missing, table_clusters) == (plan.block_clusters, plan.table_clusters) {
                return Ok(plan);
            }
            (plan.block_clusters, plan.table_clusters) = (missing, table_clusters);
        }
    }

    /// Carries a plan out in memory: moves the table, makes the blocks, and counts both. Blocks that exist and cover the range must be in
    /// memory. Returns the first of the clusters that were asked for (their refcounts are still 0) and the clusters of new metadata.
    pub(super) fn append(&mut self, end: u64, plan: AppendPlan) -> (HostCluster, Range<u64>) {
        let per_block = self.geometry.refcounts_per_block();
        let metadata = end..end + plan.table_clusters + plan.block_clusters;
        if plan.table_clusters > 0 {
            let old = self.table_range();
            self.moved_from.extend(old.map(HostCluster));
            self.table_at = self.geometry.host_offset(HostCluster(end));
            self.table_clusters = u32::try_from(plan.table_clusters).expect("the table has at most 8 MiB");
            let entries = plan.table_clusters * self.geometry.cluster_bytes() / 8;
            self.table.resize(usize::try_from(entries).expect("the table has at most 8 MiB"), 0);
        }
        let mut next_block = end + plan.table_clusters;
        let last = end + plan.total() - 1;
        for index in end / per_block..=last / per_block {
            if self.block_state(index) == BlockState::Missing && next_block < metadata.end {
                self.add_block(index, HostCluster(next_block));
                next_block += 1;
            }
        }
        self.set_all(end..next_block, 1);
        (HostCluster(metadata.end), end..next_block)
    }

    /// Takes everything that is newer than the file, for a write-back that will be the only one until it ends. Follow with
    /// [`blocks_written`](Self::blocks_written).
    pub(super) fn take_writes(&mut self) -> RefcountWrites {
        let mut writes = RefcountWrites::default();
        self.being_written = std::mem::take(&mut self.dirty_blocks);
        for &index in &self.being_written {
            let block = self.blocks.get_mut(&index).expect("dirty blocks stay in memory");
            if let Some(dirty) = block.dirty.take() {
                let at = HostOffset::new(self.table[usize::try_from(index).expect("a loaded block is in the table")]);
                writes.blocks.push((at + dirty.start as u64, AlignedBuffer::copy_of(&block.bytes[dirty])));
            }
        }
        let entries = std::mem::take(&mut self.dirty_entries);
        if self.moved_from.is_empty() {
            let sectors: BTreeSet<usize> = entries.iter().map(|entry| entry * 8 / SECTOR).collect();
            for sector in sectors {
                writes.entries.push((self.table_at + (sector * SECTOR) as u64, table_sector(&self.table, sector)));
            }
        } else {
            writes.blocks.push((self.table_at, table_bytes(&self.table, self.table.len() * 8)));
            writes.moved_to = Some((self.table_at, self.table_clusters));
            writes.retired = std::mem::take(&mut self.moved_from);
        }
        writes
    }

    /// The blocks that were taken last are in the file.
    pub(super) fn blocks_written(&mut self) {
        self.being_written.clear();
    }
}

impl Block {
    fn mark_dirty(&mut self, bytes: Range<usize>) {
        let sectors = bytes.start / SECTOR * SECTOR..bytes.end.next_multiple_of(SECTOR);
        self.dirty = Some(match self.dirty.take() {
            Some(dirty) => dirty.start.min(sectors.start)..dirty.end.max(sectors.end),
            None => sectors,
        });
    }
}

/// Refcount number `entry` of a block, `bits` wide.
pub(super) fn read_refcount(block: &[u8], entry: usize, bits: u32) -> u64 {
    let bits = bits as usize;
    if bits < 8 {
        let byte = block[entry * bits / 8];
        return u64::from(byte >> (entry * bits % 8)) & ((1 << bits) - 1);
    }
    let bytes = &block[entry * bits / 8..(entry + 1) * bits / 8];
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Sets refcount number `entry`, and returns which bytes it is in.
pub(super) fn write_refcount(block: &mut [u8], entry: usize, bits: u32, value: u64) -> Range<usize> {
    let bits = bits as usize;
    let first = entry * bits / 8;
    if bits < 8 {
        let shift = entry * bits % 8;
        let mask = ((1_u8 << bits) - 1) << shift;
        block[first] = block[first] & !mask | ((value as u8) << shift) & mask;
        return first..first + 1;
    }
    let range = first..(entry + 1) * bits / 8;
    let bytes = value.to_be_bytes();
    block[range.clone()].copy_from_slice(&bytes[8 - range.len()..]);
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_survive_beside_each_other() {
        for order in 0..=6 {
            let bits = 1 << order;
            let max = u64::MAX >> (64 - bits);
            let mut block = vec![0; 512];
            let count = 4096 / bits as usize;
            let value = |entry: usize| (entry as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max;
            for entry in 0..count {
                write_refcount(&mut block, entry, bits, value(entry));
            }
            for entry in (0..count).step_by(3) {
                write_refcount(&mut block, entry, bits, 0);
            }
            for entry in 0..count {
                let expected = if entry % 3 == 0 { 0 } else { value(entry) };
                assert_eq!(read_refcount(&block, entry, bits), expected, "width {bits}, entry {entry}");
            }
        }
        let mut block = vec![0; 512];
        assert_eq!(write_refcount(&mut block, 1, 1, 1), 0..1);
        assert_eq!(write_refcount(&mut block, 1, 16, 0x1234), 2..4);
        assert_eq!(block[..4], [2, 0, 0x12, 0x34]);
    }

    fn empty(cluster_bits: u32, order: u32, table_entries: usize) -> Refcounts {
        Refcounts::new(Geometry::new(cluster_bits, false, order), HostOffset::new(1 << cluster_bits), 1, vec![0; table_entries])
    }

    #[test]
    fn new_blocks_count_themselves() {
        let mut refcounts = empty(9, 4, 64);
        // 256 refcounts in a block: the range from 250 on needs blocks 0 and 1.
        let plan = refcounts.plan_append(250, 100).expect("fits");
        assert_eq!(plan, AppendPlan { table_clusters: 0, block_clusters: 2, clusters: 100 });
        let (first, metadata) = refcounts.append(250, plan);
        assert_eq!((first, metadata), (HostCluster(252), 250..252));
        assert_eq!([250, 251, 252].map(|cluster| refcounts.get(HostCluster(cluster))), [Some(1), Some(1), Some(0)]);
        let writes = refcounts.take_writes();
        assert_eq!(writes.blocks.len(), 2);
        assert_eq!(writes.entries.len(), 1);
        let again = refcounts.take_writes();
        assert!(again.blocks.is_empty() && again.entries.is_empty() && again.moved_to.is_none());
    }

    #[test]
    fn what_is_in_use_ends_after_the_last_count_of_a_block_that_is_not_zero() {
        let mut refcounts = empty(9, 4, 64);
        // Block 2 is where nobody has looked.
        refcounts.table[2] = 512;
        refcounts.make_block(1, HostCluster(256));
        refcounts.set(HostCluster(300), 7);
        for (clusters, end) in [
            (0..256, Some(0)),
            (255..256, Some(255)),
            (256..512, Some(301)),
            (256..301, Some(301)),
            (256..300, Some(257)),
            (300..512, Some(301)),
            (301..512, Some(301)),
            (301..301, Some(301)),
            (512..700, None),
            (100 * 256..100 * 256 + 1, Some(100 * 256)),
        ] {
            assert_eq!(refcounts.end_in_use(clusters.clone()), end, "{clusters:?}");
        }
    }

    #[test]
    fn the_table_moves_when_it_is_full() {
        let mut refcounts = empty(9, 4, 64);
        let end = 64 * 256 - 1;
        let plan = refcounts.plan_append(end, 10).expect("fits");
        assert!(plan.table_clusters >= 2 && plan.block_clusters >= 2);
        let (first, _) = refcounts.append(end, plan);
        assert_eq!(first.0, end + plan.table_clusters + plan.block_clusters);
        for cluster in end..first.0 {
            assert_eq!(refcounts.get(HostCluster(cluster)), Some(1));
        }
        assert_eq!(refcounts.table.len() as u64, plan.table_clusters * 64);
        let writes = refcounts.take_writes();
        assert_eq!(writes.moved_to.map(|(at, _)| at.get()), Some(end * 512));
        assert_eq!(writes.retired, vec![HostCluster(1)]);
        assert!(writes.entries.is_empty());
    }

    #[test]
    fn only_sectors_are_written_in_which_something_has_changed() {
        // 64 entries in a sector of the table, 512 refcounts of 16 bits in a block of two sectors.
        let mut refcounts = empty(10, 4, 256);
        let end = 130 * 512;
        let plan = refcounts.plan_append(end, 10).expect("fits");
        refcounts.append(end, plan);
        let writes = refcounts.take_writes();
        assert_eq!(writes.blocks.iter().map(|(at, bytes)| (at.get(), bytes.len())).collect::<Vec<_>>(), [(end * 1024, 1024)]);
        let [(at, sector)] = &writes.entries[..] else { panic!("one entry is new") };
        assert_eq!((at.get(), sector.len()), (1024 + 2 * 512, 512));
        assert_eq!(sector[16..24], (end * 1024).to_be_bytes(), "entry 130 is the third of its sector");
        for (cluster, from, len) in [(300, 512, 512), (255, 0, 512), (256, 512, 512)] {
            refcounts.set(HostCluster(end + cluster), 1);
            let writes = refcounts.take_writes();
            let [(at, bytes)] = &writes.blocks[..] else { panic!("one block has changed") };
            assert_eq!((at.get(), bytes.len()), (end * 1024 + from, len), "cluster {cluster} of the block");
        }
        refcounts.set(HostCluster(end + 300), 2);
        refcounts.set(HostCluster(end + 20), 2);
        assert_eq!(refcounts.take_writes().blocks[0].1.len(), 1024, "from the first that has changed to the last");
    }

    #[test]
    fn the_largest_table_is_the_end() {
        let refcounts = empty(9, 6, 64);
        assert_eq!(refcounts.plan_append((8 << 20) / 8 * 64, 1), Err("refcount table"));
        assert_eq!(empty(21, 0, 64).plan_append(HOST_LIMIT >> 21, 1), Err("file positions"));
    }

    #[test]
    fn an_append_takes_what_it_needs_and_no_more() {
        let plan = |end, clusters| empty(9, 4, 64).plan_append(end, clusters).expect("fits");
        // 256 refcounts in a block: what ends with the last of a block needs no other one.
        assert_eq!(plan(256, 255), AppendPlan { table_clusters: 0, block_clusters: 1, clusters: 255 });
        assert_eq!(plan(256, 256), AppendPlan { table_clusters: 0, block_clusters: 2, clusters: 256 });
        // 64 entries in a cluster of the table: 65 blocks need two, and get half as many again and one.
        assert_eq!(plan(64 * 256 - 1, 10), AppendPlan { table_clusters: 4, block_clusters: 2, clusters: 10 });
        // The last block of the largest table can be filled to its end.
        let refcounts = empty(9, 6, 64);
        let end_of_all = (8 << 20) / 8 * 64;
        let plans = (end_of_all - 16_700..end_of_all).filter_map(|end| Some((end, refcounts.plan_append(end, 1).ok()?)));
        let filling: Vec<_> = plans.filter(|(end, plan)| end + plan.total() == end_of_all).collect();
        assert!(!filling.is_empty() && filling.iter().all(|(_, plan)| plan.table_clusters == 16_384), "{filling:?}");
    }

    #[test]
    fn clean_blocks_make_room_for_others() {
        let bytes = vec![0; 1 << 21];
        let mut refcounts = empty(21, 4, 64);
        refcounts.insert(0, &bytes, |_| false);
        refcounts.insert(1, &bytes, |_| false);
        refcounts.set(HostCluster(1 << 20), 1);
        refcounts.take_writes();
        refcounts.insert(2, &bytes, |_| false);
        refcounts.set(HostCluster(2 << 20), 1);
        refcounts.insert(3, &bytes, |_| false);
        let loaded = |refcounts: &Refcounts| (0..5).filter(|index| refcounts.block_state(*index) == BlockState::Loaded).collect::<Vec<_>>();
        assert_eq!(loaded(&refcounts), [0, 1, 2, 3]);
        // One is being written, one is newer than the file, and one is wanted.
        refcounts.insert(4, &bytes, |index| index == 3);
        assert_eq!(loaded(&refcounts), [1, 2, 3, 4]);
        let mut refcounts = empty(16, 4, 8192);
        (0..128).for_each(|index| refcounts.insert(index, &bytes[..1 << 16], |_| false));
        assert_eq!(refcounts.blocks.len(), 128);
        refcounts.insert(128, &bytes[..1 << 16], |_| false);
        assert_eq!(refcounts.blocks.len(), 1);
        refcounts.let_go();
        assert!(refcounts.blocks.is_empty() && refcounts.table.is_empty());
    }

    #[test]
    fn free_clusters_are_found_in_runs() {
        let mut refcounts = empty(9, 4, 64);
        refcounts.insert(1, &[0; 512], |_| false);
        for used in [256, 260, 261, 300] {
            refcounts.set(HostCluster(used), 1);
        }
        assert_eq!(refcounts.free_runs(1, 0, 1000), [257..260, 262..300, 301..512]);
        assert_eq!(refcounts.free_runs(1, 258, 299), [258..260, 262..299]);
        assert!(refcounts.free_runs(2, 0, 1000).is_empty(), "it is not in memory");
        refcounts.insert(2, &[0; 512], |_| false);
        refcounts.set(HostCluster(513), 1);
        assert_eq!(refcounts.free_runs(2, 0, 516), [512..513, 514..516]);
    }
}

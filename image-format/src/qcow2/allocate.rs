//! Finding space in the file.
//!
//! Allocating takes a cluster from a list and counts it in memory: no I/O. The list holds free clusters whose refcount block is in memory
//! and whose space the file system has promised; filling it up is done ahead of use, by one task at a time. Counts reach the file with the
//! next write-back, before anything there refers to the clusters, so a crash leaves at most clusters counted that nothing refers to.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use crate::error::{LayerError, Structure};
use crate::storage::{Environment, Storage, StorageExt};
use crate::units::HostOffset;

use super::Inner;
use super::busy::Fresh;
use super::geometry::{Geometry, HostCluster};
use super::refcount::{BlockState, Refcounts};
use super::turn::TurnGuard;

/// Space that is promised at a time: at first, and after it has doubled several times. A fuzzer wants many small images a second.
const FIRST_BATCH_BYTES: u64 = if cfg!(fuzzing) { 0 } else { 8 << 20 };
const LAST_BATCH_BYTES: u64 = 64 << 20;
/// Least and most clusters promised at a time.
const BATCH_CLUSTERS: std::ops::RangeInclusive<u64> = 8..=8192;
/// Refcount blocks that one filling-up looks through for free clusters, before it appends to the file.
const SCAN_BLOCKS: u32 = 4;
/// Free runs for which space is asked for at a time: each is a call to the file system.
const RUNS_AT_ONCE: usize = 64;

/// Free space, and the counts of what is used.
#[derive(Debug)]
pub(super) struct Allocator {
    geometry: Geometry,
    pub(super) refcounts: Refcounts,
    /// Ready to be used, lowest first.
    ready: VecDeque<ReadyRun>,
    ready_clusters: u64,
    /// Known to be free; by first cluster.
    free: BTreeMap<u64, u64>,
    /// Free as well, but the file system had no space for them when it was asked.
    hollow: Vec<Range<u64>>,
    /// Clusters from here up to `scan_end`, the first after all that were counted at opening, have not been looked at.
    scan: u64,
    scan_end: u64,
    /// First cluster after everything that is or may be used: appending goes on here, at first in what the file has there already.
    pub(super) end: u64,
    /// Clusters from here on were not in the file when it was opened, so they read as zeros.
    zero_from: u64,
    /// Clusters of a medium that cannot grow.
    limit: Option<u64>,
    batch_bytes: u64,
    /// The last attempt to fill up failed: only those who need a cluster try again.
    starved: bool,
    /// Refcount blocks of clusters that are being appended, or were last: they stay in memory.
    appending: Range<u64>,
}

#[derive(Clone, Debug)]
struct ReadyRun {
    clusters: Range<u64>,
    reads_zero: bool,
}

impl Allocator {
    /// `used_end`: first cluster after the last that is counted. `file_clusters`: clusters of the file now, the last perhaps in part.
    /// `limit`: those of a medium that cannot grow.
    pub(super) fn new(geometry: Geometry, refcounts: Refcounts, used_end: u64, file_clusters: u64, limit: Option<u64>) -> Self {
        Self {
            geometry,
            refcounts,
            ready: VecDeque::new(),
            ready_clusters: 0,
            free: BTreeMap::new(),
            hollow: Vec::new(),
            scan: 1,
            scan_end: limit.map_or(used_end, |limit| used_end.min(limit)),
            end: used_end,
            zero_from: file_clusters,
            limit,
            batch_bytes: FIRST_BATCH_BYTES,
            starved: false,
            appending: 0..0,
        }
    }

    /// Takes one cluster, if one is ready, and counts it.
    pub(super) fn take(&mut self) -> Option<Fresh> {
        let run = self.ready.front_mut()?;
        let cluster = HostCluster(run.clusters.start);
        let reads_zero = run.reads_zero;
        run.clusters.start += 1;
        if run.clusters.is_empty() {
            self.ready.pop_front();
        }
        self.ready_clusters -= 1;
        self.refcounts.set(cluster, 1);
        Some(Fresh { host: self.geometry.host_offset(cluster), reads_zero, may_change: false })
    }

    /// Takes back a cluster that nothing refers to and nobody writes to, to be the last that is taken again: who could not write there tries
    /// elsewhere first. `false` if its refcount block is not in memory.
    fn put_back(&mut self, cluster: HostCluster) -> bool {
        let (index, _) = self.geometry.locate_refcount(cluster);
        if !matches!(self.refcounts.block_state(index), BlockState::Loaded) {
            return false;
        }
        self.refcounts.set(cluster, 0);
        // Something may have been written there.
        self.push_ready(cluster.0..cluster.0 + 1, false);
        true
    }

    fn is_low(&self) -> bool {
        !self.starved && self.ready_clusters < (self.batch_clusters() / 4).max(1)
    }

    fn batch_clusters(&self) -> u64 {
        (self.batch_bytes >> self.geometry.cluster_bits()).clamp(*BATCH_CLUSTERS.start(), *BATCH_CLUSTERS.end())
    }

    fn push_ready(&mut self, clusters: Range<u64>, reads_zero: bool) {
        if !clusters.is_empty() {
            self.ready_clusters += clusters.end - clusters.start;
            self.ready.push_back(ReadyRun { clusters, reads_zero });
        }
    }

    /// Adds free clusters that may be used again. Those that have not been looked at yet are left for the scan, which would find them a
    /// second time.
    pub(super) fn add_free(&mut self, clusters: Range<u64>) {
        self.starved = false;
        self.add_free_run(clusters.start..clusters.end.min(self.scan));
        self.add_free_run(clusters.start.max(self.scan_end)..clusters.end);
    }

    fn add_free_run(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        let (mut start, mut end) = (clusters.start, clusters.end);
        if let Some((&before, &len)) = self.free.range(..start).next_back() {
            debug_assert!(before + len <= start, "clusters are freed once");
            if before + len == start {
                self.free.remove(&before);
                start = before;
            }
        }
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        self.free.insert(start, end - start);
    }

    /// The first run of known free clusters, at most `limit` of them and within one refcount block.
    fn take_free(&mut self, limit: u64) -> Option<Range<u64>> {
        let (start, len) = self.free.pop_first()?;
        let per_block = self.geometry.refcounts_per_block();
        let take = len.min(limit).min(per_block - start % per_block);
        if take < len {
            self.free.insert(start + take, len - take);
        }
        Some(start..start + take)
    }

    /// There is space again, so those for which there was none are as good as other free ones.
    fn retry_hollow(&mut self) {
        for run in std::mem::take(&mut self.hollow) {
            self.add_free_run(run);
        }
    }

    /// Clusters after all that are used which the file had when it was opened.
    fn left_over(&self) -> u64 {
        self.zero_from.saturating_sub(self.end)
    }

    /// Gives up all clusters that are ready: nothing will be written any more. Returns them.
    pub(super) fn clear_ready(&mut self) -> Vec<Range<u64>> {
        self.ready_clusters = 0;
        self.ready.drain(..).map(|run| run.clusters).collect()
    }
}

impl<E: Environment> Inner<E> {
    /// The allocator. Never held across an await.
    pub(super) fn allocator(&self) -> MutexGuard<'_, Allocator> {
        self.allocator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one cluster; fills up first if none is ready.
    pub(super) async fn allocate(&self) -> Result<Fresh, LayerError> {
        loop {
            if let Some(fresh) = self.allocator().take() {
                return Ok(fresh);
            }
            self.fill_up().await?;
        }
    }

    /// Takes back a cluster that was allocated for what did not come to be. Nothing refers to it, and nobody writes to it.
    pub(super) fn put_back(&self, host: HostOffset) {
        let cluster = self.format.geometry.host_cluster(host);
        if !self.allocator().put_back(cluster) {
            // The way of all clusters that are not used any more: its count is lowered with the next write-back.
            self.unmapped().ready.push(cluster.0..cluster.0 + 1);
        }
    }

    /// Sees to it that a cluster is ready.
    pub(super) async fn fill_up(&self) -> Result<(), LayerError> {
        let turn = self.refcount_turn.take().await;
        if self.allocator().ready_clusters > 0 {
            return Ok(());
        }
        self.fill_up_in_turn(&turn).await
    }

    /// Fills up ahead of need, unless somebody does already.
    pub(super) async fn top_up(&self) {
        if !self.allocator().is_low() {
            return;
        }
        if let Some(turn) = self.refcount_turn.try_take() {
            // The error is for whoever needs a cluster and finds none; `starved` is what is left of it here.
            let _ = self.fill_up_in_turn(&turn).await;
        }
    }

    async fn fill_up_in_turn(&self, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let filled = self.find_clusters(turn).await;
        self.allocator().starved = filled.is_err();
        filled
    }

    async fn find_clusters(&self, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let wanted = self.allocator().batch_clusters();
        let mut found = 0;
        for _ in 0..SCAN_BLOCKS {
            found += self.use_free(wanted - found, turn).await?;
            if found >= wanted || !self.scan_block(turn).await? {
                break;
            }
        }
        found += self.use_free(wanted - found, turn).await?;
        if found > 0 {
            return Ok(());
        }
        let refused = match self.append(wanted, turn).await {
            Err(error) if error.is_no_space() || matches!(error, LayerError::TooLarge { .. }) => error,
            result => return result,
        };
        // Nobody hears that there is no space before all of it has been looked through.
        loop {
            if self.use_free(wanted, turn).await? > 0 {
                return Ok(());
            }
            let all_tried = self.allocator().free.is_empty();
            if all_tried && !self.scan_block(turn).await? {
                break;
            }
        }
        if self.use_hollow(turn).await? { Ok(()) } else { Err(refused) }
    }

    /// Moves some known free clusters to the ready ones. Returns how many.
    async fn use_free(&self, wanted: u64, turn: &TurnGuard<'_>) -> Result<u64, LayerError> {
        let mut found = 0;
        for _ in 0..RUNS_AT_ONCE {
            if found >= wanted {
                break;
            }
            let Some(run) = self.allocator().take_free(wanted - found) else { break };
            let len = run.end - run.start;
            match self.make_ready(run.clone(), turn).await {
                Ok(()) => found += len,
                Err(error) if error.is_no_space() => self.allocator().hollow.push(run),
                Err(error) => {
                    self.allocator().add_free_run(run);
                    return Err(error);
                }
            }
        }
        Ok(found)
    }

    /// Free clusters are holes where they have been punched out, so they need space again before anybody may count on writing there.
    async fn make_ready(&self, run: Range<u64>, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let (index, _) = self.format.geometry.locate_refcount(HostCluster(run.start));
        self.load_refcounts(index, turn).await?;
        self.check_free(run.clone())?;
        self.extend(run.clone(), run.start).await?;
        self.allocator().push_ready(run, false);
        Ok(())
    }

    /// Tries one of the free clusters for which there was no space.
    async fn use_hollow(&self, turn: &TurnGuard<'_>) -> Result<bool, LayerError> {
        let Some(run) = self.allocator().hollow.pop() else { return Ok(false) };
        let first = run.start..run.start + 1;
        let outcome = self.make_ready(first.clone(), turn).await;
        let mut allocator = self.allocator();
        match outcome {
            Ok(()) => {
                allocator.add_free_run(first.end..run.end);
                allocator.retry_hollow();
                Ok(true)
            }
            Err(error) => {
                allocator.hollow.push(run);
                if error.is_no_space() { Ok(false) } else { Err(error) }
            }
        }
    }

    /// Looks through the next refcount block for free clusters, and makes it if it is missing between others: it takes the first of its own
    /// clusters. `false`: all have been looked through, or there is no space for a missing one.
    async fn scan_block(&self, turn: &TurnGuard<'_>) -> Result<bool, LayerError> {
        let per_block = self.format.geometry.refcounts_per_block();
        let (from, end) = {
            let allocator = self.allocator();
            (allocator.scan, allocator.scan_end)
        };
        if from >= end {
            return Ok(false);
        }
        let index = from / per_block;
        let state = self.allocator().refcounts.block_state(index);
        match state {
            BlockState::Missing => {
                let place = from..from + 1;
                self.check_free(place.clone())?;
                match self.extend(place.clone(), place.end).await {
                    Err(error) if error.is_no_space() => return Ok(false),
                    result => result?,
                }
                self.allocator().refcounts.make_block(index, HostCluster(from));
                self.metadata_mut().add(place);
            }
            BlockState::Unloaded(_) | BlockState::Loaded => self.load_refcounts(index, turn).await?,
        }
        let mut allocator = self.allocator();
        let runs = allocator.refcounts.free_runs(index, from, end);
        allocator.scan = ((index + 1) * per_block).min(end);
        for run in runs {
            allocator.add_free(run);
        }
        Ok(true)
    }

    /// Counted as free, but used by metadata: the counts are wrong, and writing there would destroy the image.
    fn check_free(&self, clusters: Range<u64>) -> Result<(), LayerError> {
        let metadata = self.metadata();
        for cluster in clusters {
            if metadata.contains(cluster) {
                let at = self.format.geometry.host_offset(HostCluster(cluster));
                let detail = "a cluster with metadata has the refcount zero";
                return Err(self.fail(LayerError::Corrupt { what: Structure::RefcountBlock, at, detail }));
            }
        }
        Ok(())
    }

    /// Takes `wanted` clusters after all others or, if there is no room, fewer. What the file has there already, because a crash has left it or
    /// the medium has a fixed size, is used up before the file grows.
    async fn append(&self, wanted: u64, turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let mut clusters = match self.allocator().left_over() {
            0 => wanted,
            left => wanted.min(left),
        };
        loop {
            match self.append_clusters(clusters, clusters, turn).await {
                Ok(first) => {
                    let mut allocator = self.allocator();
                    let reads_zero = first.0 >= allocator.zero_from;
                    allocator.push_ready(first.0..first.0 + clusters, reads_zero);
                    allocator.retry_hollow();
                    allocator.batch_bytes = (allocator.batch_bytes * 2).min(LAST_BATCH_BYTES);
                    return Ok(());
                }
                Err(error) if error.is_no_space() && clusters > 1 => clusters /= 2,
                Err(error) => return Err(error),
            }
        }
    }

    /// Adds `clusters` adjacent clusters, not counted yet, after all others, of which the last `data` are not for metadata; their refcount blocks are
    /// in memory afterwards.
    pub(super) async fn append_clusters(&self, clusters: u64, data: u64, turn: &TurnGuard<'_>) -> Result<HostCluster, LayerError> {
        let geometry = self.format.geometry;
        let (appended, plan, limit, zero_from) = {
            let allocator = self.allocator();
            let end = allocator.end;
            let plan = allocator.refcounts.plan_append(end, clusters).map_err(|limit| LayerError::TooLarge { limit })?;
            (end..end + plan.total(), plan, allocator.limit, allocator.zero_from)
        };
        if limit.is_some_and(|limit| appended.end > limit) {
            let at = geometry.host_offset(HostCluster(appended.start));
            return Err(LayerError::io("extend", Structure::File, at, io::ErrorKind::StorageFull.into()));
        }
        let per_block = geometry.refcounts_per_block();
        let blocks = appended.start / per_block..appended.end.div_ceil(per_block);
        self.allocator().appending = blocks.clone();
        for index in blocks {
            self.load_refcounts(index, turn).await?;
        }
        self.check_free(appended.start..appended.end.min(zero_from))?;
        self.extend(appended.clone(), appended.end - data).await?;
        let mut allocator = self.allocator();
        let (first, metadata) = allocator.refcounts.append(appended.start, plan);
        allocator.end = appended.end;
        self.data_limit.fetch_max(appended.end, Ordering::AcqRel);
        drop(allocator);
        self.metadata_mut().add(metadata);
        Ok(first)
    }

    /// Makes clusters part of the file, those before `data` for metadata, with space for all where the medium can. Where that is slow, those for data
    /// get theirs when they are written, which may fail: nothing refers to them before.
    async fn extend(&self, clusters: Range<u64>, data: u64) -> Result<(), LayerError> {
        if self.allocator().limit.is_some() {
            // All of it is there from the start, and only the counts say how far it is used.
            return Ok(());
        }
        let is_promised = match self.file.allocates_slowly() {
            false => self.promise_space(clusters.clone()).await?,
            true => self.promise_space(clusters.start..data).await? && data == clusters.end,
        };
        if is_promised {
            return Ok(());
        }
        let end = self.format.geometry.host_offset(HostCluster(clusters.end));
        let error = |error| LayerError::io("extend", Structure::File, end, error);
        if self.file.length().await.map_err(error)? < end.get() { self.file.set_len(end.get()).await.map_err(error) } else { Ok(()) }
    }

    /// Gets space for clusters, so that writing to them cannot fail for lack of it, where the medium can.
    async fn promise_space(&self, clusters: Range<u64>) -> Result<bool, LayerError> {
        if clusters.is_empty() {
            return Ok(true);
        }
        let [at, end] = [clusters.start, clusters.end].map(|cluster| self.format.geometry.host_offset(HostCluster(cluster)));
        match self.file.allocate(at, end - at).await {
            Ok(()) => Ok(true),
            Err(refused) if refused.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(LayerError::io("extend", Structure::File, at, error)),
        }
    }

    /// A cluster for metadata: written back later, when a lack of space can be nobody's error any more, so that it gets its space now.
    pub(super) async fn allocate_metadata(&self) -> Result<Fresh, LayerError> {
        let fresh = self.allocate().await?;
        if self.file.allocates_slowly() && self.allocator().limit.is_none() {
            let cluster = self.format.geometry.host_cluster(fresh.host).0;
            if let Err(error) = self.promise_space(cluster..cluster + 1).await {
                self.put_back(fresh.host);
                return Err(error);
            }
        }
        Ok(fresh)
    }

    /// Reads a refcount block into memory, if it exists and is not there.
    pub(super) async fn load_refcounts(&self, index: u64, _turn: &TurnGuard<'_>) -> Result<(), LayerError> {
        let BlockState::Unloaded(at) = self.allocator().refcounts.block_state(index) else { return Ok(()) };
        let what = Structure::RefcountBlock;
        let len = self.format.geometry.cluster_len();
        let bytes = self.file.read_bytes(at, len).await.map_err(|error| LayerError::io("read", what, at, error))?;
        let mut allocator = self.allocator();
        let Allocator { refcounts, ready, geometry, appending, .. } = &mut *allocator;
        let per_block = geometry.refcounts_per_block();
        // Taking a cluster that is ready must find its block in memory.
        let is_ready = |run: &ReadyRun, index| (run.clusters.start / per_block..run.clusters.end.div_ceil(per_block)).contains(&index);
        let needed = |index: u64| appending.contains(&index) || ready.iter().any(|run| is_ready(run, index));
        refcounts.insert(index, &bytes, needed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::extent::{ExtentList, Mapping};
    use crate::layer::Reservation;
    use crate::qcow2::refcount::CACHE_BYTES;
    use crate::qcow2::testing::{SIMULATED_IMAGE, SimulatedImage, with_image, write};
    use crate::qcow2::{CheckOptions, CreateOptions, OpenOptions, check};
    use crate::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment};
    use crate::storage::{Access, CacheMode, Location};
    use crate::units::{GuestOffset, GuestRange};

    /// One that has looked at all clusters, with clusters of 512 bytes and 256 counts in a block.
    fn allocator() -> Allocator {
        let geometry = Geometry::new(9, false, 4);
        let refcounts = Refcounts::new(geometry, HostOffset::new(512), 1, vec![0; 64]);
        Allocator::new(geometry, refcounts, 1, 1, None)
    }

    #[test]
    fn free_clusters_that_touch_are_one_run() {
        let mut allocator = allocator();
        for run in [10..12, 14..16, 20..21, 12..14, 21..25, 9..10] {
            allocator.add_free(run);
        }
        assert_eq!(allocator.free, BTreeMap::from([(9, 7), (20, 5)]));
        allocator.add_free(16..20);
        assert_eq!(allocator.free, BTreeMap::from([(9, 16)]));
    }

    #[test]
    fn free_clusters_are_taken_within_a_block_and_no_more_than_wanted() {
        let mut allocator = allocator();
        allocator.add_free(250..300);
        assert_eq!(allocator.take_free(100), Some(250..256));
        assert_eq!(allocator.free, BTreeMap::from([(256, 44)]));
        assert_eq!(allocator.take_free(10), Some(256..266));
        assert_eq!(allocator.take_free(34), Some(266..300));
        assert_eq!(allocator.take_free(1), None);
    }

    #[test]
    fn what_is_ready_is_low_below_a_quarter_of_a_batch() {
        let mut allocator = allocator();
        assert_eq!(allocator.batch_clusters(), 8192);
        allocator.refcounts.insert(1, &[0; 512], |_| false);
        allocator.push_ready(256..256, false);
        assert!(allocator.ready.is_empty() && allocator.is_low());
        allocator.push_ready(256..258, false);
        allocator.push_ready(1000..1000 + 2047, true);
        assert!(!allocator.is_low());
        assert!(!allocator.take().expect("ready").reads_zero);
        assert!(!allocator.is_low(), "a quarter is left");
        allocator.take().expect("ready");
        assert!(allocator.is_low());
        assert!(allocator.clear_ready().into_iter().eq(std::iter::once(1000..3047)));
        assert_eq!((allocator.ready_clusters, allocator.take().is_none()), (0, true));
    }

    async fn open(disk: &SimulatedEnvironment) -> SimulatedImage {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = disk.open(&at, Access::Write, CacheMode::Direct).await.expect("there");
        SimulatedImage::open(file, OpenOptions::writing()).await.expect("an image")
    }

    /// Opens it on a medium of so many bytes, no more.
    async fn open_on_fixed_medium(disk: &SimulatedEnvironment, bytes: u64) -> SimulatedImage {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        disk.open(&at, Access::Write, CacheMode::Direct).await.expect("there").set_len(bytes).await.expect("sound");
        disk.inject(Fault::lasting(OperationKind::SetLen, 0).with(FaultEffect::Error(libc::EOPNOTSUPP)));
        open(disk).await
    }

    /// An image full of data but for some clusters of the disk, which were discarded; opened again. Answers with the
    /// clusters of the file that nothing uses as well.
    async fn with_holes(disk: &SimulatedEnvironment, image: SimulatedImage, discarded: &[Range<u64>]) -> (SimulatedImage, Vec<u64>) {
        let bytes = image.geometry().cluster_bytes();
        let clusters = image.virtual_size() / bytes;
        for cluster in 0..clusters {
            write(&image, cluster * bytes, bytes).await;
        }
        for cluster in discarded.iter().cloned().flatten() {
            let range = GuestRange::new(GuestOffset::new(cluster * bytes), bytes);
            image.discard(range, false, &|_| {}).await.expect("nothing beneath");
        }
        image.freeze(async {}).await.expect("sound");
        drop(image);
        let image = open(disk).await;
        let mut extents = ExtentList::new();
        image.map(GuestRange::new(GuestOffset::ZERO, clusters * bytes), &mut extents).await.expect("readable");
        let mut used = BTreeSet::new();
        for extent in extents.as_slice() {
            if let Mapping::Data { host, .. } = extent.mapping {
                used.extend((0..extent.range.len / bytes).map(|cluster| host.get() / bytes + cluster));
            }
        }
        let end = image.inner.allocator().end;
        let free: Vec<_> = (0..end).filter(|cluster| !used.contains(cluster) && !image.inner.metadata().contains(*cluster)).collect();
        assert!(free.len() as u64 >= discarded.iter().map(|range| range.end - range.start).sum());
        (image, free)
    }

    /// 2,000 clusters.
    fn small_clusters(cluster_bits: u32) -> CreateOptions {
        CreateOptions { cluster_bits, ..CreateOptions::standalone(2000 << cluster_bits) }
    }

    async fn allocate(image: &SimulatedImage) -> Result<u64, LayerError> {
        image.inner.allocate().await.map(|fresh| {
            assert!(!fresh.reads_zero, "something was there before");
            image.geometry().host_cluster(fresh.host).0
        })
    }

    #[test]
    fn what_is_free_is_used_before_the_file_grows() {
        with_image(11, small_clusters(9), async |disk, image| {
            // In several refcount blocks.
            let (image, free) = with_holes(&disk, image, &[3..4, 10..60, 700..703, 1100..1101, 1500..1999]).await;
            let end = image.inner.allocator().end;
            let mut found = Vec::new();
            for _ in 0..free.len() {
                found.push(allocate(&image).await.expect("space"));
            }
            found.sort_unstable();
            assert!(
                found == free,
                "{} clusters are free, and {} of them were found",
                free.len(),
                found.iter().filter(|at| free.contains(at)).count()
            );
            assert_eq!(image.inner.allocator().end, end, "the file has grown");
            let next = image.inner.allocate().await.expect("space");
            assert!(next.reads_zero && image.geometry().host_cluster(next.host).0 >= end);
        });
    }

    #[test]
    fn no_more_is_made_ready_than_a_batch() {
        let runs: Vec<_> = (0..140).map(|number| number * 41 + 10..number * 41 + 50).collect();
        for discarded in [&[Range { start: 10, end: 5900 }][..], &runs] {
            let discarded = discarded.to_vec();
            let options = CreateOptions { cluster_bits: 12, ..CreateOptions::standalone(6000 << 12) };
            with_image(19, options, async move |disk, image| {
                let (image, _) = with_holes(&disk, image, &discarded).await;
                let batch = image.inner.allocator().batch_clusters();
                for _ in 0..2 {
                    image.inner.fill_up().await.expect("space");
                    assert_eq!(image.inner.allocator().ready_clusters, batch, "one filling-up is enough, and no more than was wanted");
                }
            });
        }
    }

    #[test]
    fn what_is_free_far_behind_is_found_where_the_file_cannot_grow() {
        with_image(20, small_clusters(9), async |disk, image| {
            let (image, free) = with_holes(&disk, image, &[1500..1600, 1700..1999]).await;
            let end = image.inner.allocator().end;
            drop(image);
            let image = open_on_fixed_medium(&disk, end * 512).await;
            let mut taken = take_all(&image).await;
            taken.sort_unstable();
            assert_eq!(taken, free);
            assert!(image.inner.allocate().await.is_err_and(|error| error.is_no_space()));
        });
    }

    #[test]
    fn a_failure_to_get_space_for_free_clusters_is_told_and_forgets_none() {
        with_image(21, small_clusters(12), async |disk, image| {
            let (image, free) = with_holes(&disk, image, &[3..4, 10..60, 700..703]).await;
            disk.inject(Fault::once(OperationKind::Allocate, 0).with(FaultEffect::Error(libc::EIO)));
            let told = image.inner.allocate().await.expect_err("a failure of the disk");
            assert!(!told.is_no_space(), "{told}");
            let mut found = Vec::new();
            for _ in 0..free.len() {
                found.push(allocate(&image).await.expect("space"));
            }
            found.sort_unstable();
            assert_eq!(found, free);
        });
    }

    #[test]
    fn free_clusters_without_space_are_tried_again_one_by_one() {
        with_image(12, small_clusters(12), async |disk, image| {
            let (image, free) = with_holes(&disk, image, &[3..4, 10..60, 700..703]).await;
            let allocated = disk.allocated(SIMULATED_IMAGE).expect("there");
            disk.set_space_limit(Some(allocated));
            let mut found = Vec::new();
            // Some have space.
            while let Ok(cluster) = allocate(&image).await {
                found.push(cluster);
            }
            let without = free.len() - found.len();
            assert!(without > 50, "most have none");
            for _ in 0..3 {
                allocate(&image).await.expect_err("a full disk");
                let hollow: u64 = image.inner.allocator().hollow.iter().map(|run| run.end - run.start).sum();
                assert_eq!(hollow, without as u64, "all have been tried, and none is forgotten");
            }
            disk.set_space_limit(Some(allocated + 4096));
            let turn = image.inner.refcount_turn.take().await;
            assert!(image.inner.use_hollow(&turn).await.expect("sound"), "there is space for one");
            drop(turn);
            found.push(allocate(&image).await.expect("ready"));
            allocate(&image).await.expect_err("and no more");
            assert_eq!(image.inner.allocator().hollow.iter().map(|run| run.end - run.start).sum::<u64>(), without as u64 - 1);
            disk.set_space_limit(None);
            let end = image.inner.allocator().end;
            // Growing is tried first where nothing else is known to be free, and then what had no space is as good as any.
            let appended = image.inner.allocate().await.expect("space");
            assert!(image.geometry().host_cluster(appended.host).0 >= end);
            while image.inner.allocator().ready_clusters > 0 {
                image.inner.allocate().await.expect("ready");
            }
            while found.len() < free.len() {
                found.push(allocate(&image).await.expect("space"));
            }
            found.sort_unstable();
            assert_eq!(found, free);
        });
    }

    #[test]
    fn what_the_file_has_after_all_that_is_used_is_used_before_it_grows() {
        with_image(13, small_clusters(9), async |disk, image| {
            let used = image.inner.allocator().end;
            drop(image);
            let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
            let file = disk.open(&at, Access::Write, CacheMode::Direct).await.expect("there");
            file.set_len((used + 20) * 512).await.expect("sound");
            drop(file);
            let image = open(&disk).await;
            let begin = image.inner.allocator().end;
            // The last may be a refcount block for them.
            for cluster in begin..used + 20 {
                assert_eq!(image.inner.allocator().left_over(), if cluster == begin { used + 20 - begin } else { 0 });
                assert_eq!(allocate(&image).await.expect("space"), cluster);
            }
            assert!(image.inner.allocate().await.expect("space").reads_zero);
        });
    }

    /// Takes clusters until there are no more.
    async fn take_all(image: &SimulatedImage) -> Vec<u64> {
        let mut taken = Vec::new();
        while let Ok(fresh) = image.inner.allocate().await {
            taken.push(image.geometry().host_cluster(fresh.host).0);
        }
        taken
    }

    #[test]
    fn a_full_disk_is_filled_to_its_last_cluster() {
        with_image(15, small_clusters(12), async |disk, image| {
            let end = image.inner.allocator().end;
            disk.set_space_limit(Some(disk.allocated(SIMULATED_IMAGE).expect("there") + 13 * 4096));
            assert_eq!(take_all(&image).await, (end..end + 13).collect::<Vec<_>>());
        });
    }

    #[test]
    fn a_medium_that_cannot_grow_is_used_to_its_end() {
        with_image(16, small_clusters(12), async |disk, image| {
            drop(image);
            let image = open_on_fixed_medium(&disk, 40 * 4096).await;
            let end = image.inner.allocator().end;
            assert!(end < 20);
            assert_eq!(take_all(&image).await, (end..40).collect::<Vec<_>>());
            assert!(image.inner.allocate().await.is_err_and(|error| error.is_no_space()));
        });
    }

    #[test]
    fn space_is_asked_for_in_ever_larger_parts() {
        with_image(17, small_clusters(12), async |_, image| {
            for batch in [2048, 4096, 8192, 8192] {
                assert_eq!(image.inner.allocator().batch_clusters(), batch);
                image.inner.allocate().await.expect("space");
                assert_eq!(image.inner.allocator().ready_clusters, batch - 1);
                image.inner.allocator().clear_ready();
            }
        });
    }

    #[test]
    fn the_file_covers_what_is_allocated_even_if_space_is_not_promised() {
        for slowly in [true, false] {
            with_image(18, small_clusters(12), async move |disk, image| {
                disk.set_slow_allocation(slowly);
                if !slowly {
                    disk.inject(Fault::lasting(OperationKind::Allocate, 0).with(FaultEffect::Error(libc::EOPNOTSUPP)));
                }
                let space = || disk.allocated(SIMULATED_IMAGE).expect("there");
                let before = space();
                image.inner.allocate().await.expect("space");
                let covered = image.inner.allocator().end * 4096;
                assert_eq!(image.inner.file.length().await.expect("sound"), covered);
                assert!(space() <= before + 4096, "no more than a refcount block");
                let before = space();
                image.inner.allocate_metadata().await.expect("space");
                assert_eq!(space() - before, if slowly { 4096 } else { 0 }, "metadata has its space at once, where that can be had");
                assert_eq!(image.inner.file.length().await.expect("sound"), covered);
            });
        }
    }

    #[test]
    fn metadata_that_is_not_counted_is_no_free_space() {
        with_image(14, small_clusters(9), async |_, image| {
            let end = image.inner.allocator().end;
            image.inner.check_free(end..end + 1000).expect("nothing is there");
            let refused = image.inner.check_free(end - 1..end + 1).expect_err("a table is there");
            assert!(matches!(refused, LayerError::Corrupt { .. }) && image.admit_write().is_err(), "{refused}");
        });
    }

    /// In memory only metadata gets its space before it is written, and that must be known for what it is.
    #[test]
    fn growing_on_a_full_disk_that_allocates_slowly_fails_and_harms_nothing() {
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(1 << 20) };
        with_image(2, options, async |disk, image| {
            disk.set_slow_allocation(true);
            disk.set_space_limit(Some(disk.allocated(SIMULATED_IMAGE).expect("a file")));
            image.grow(64 << 20, None).await.expect_err("a full disk");
            image.flush().await.expect("nothing has gone wrong that matters");
            disk.set_space_limit(None);
            image.grow(64 << 20, None).await.expect("there is room again");
        });
    }

    /// Writes that wait for space are tried again and again.
    #[test]
    fn what_cannot_be_written_takes_no_more_clusters_each_time_that_it_is_tried() {
        let options = CreateOptions { extended_l2: true, ..CreateOptions::standalone(64 << 20) };
        with_image(3, options, async |disk, image| {
            let [range, other_range] = [0, 8192].map(|at| GuestRange::new(GuestOffset::new(at), 4096));
            image.reserve(range).await.expect("space").give_up();
            let end = image.inner.allocator().end;
            for _ in 0..5000 {
                image.reserve(range).await.expect("space").give_up();
            }
            assert_eq!(image.inner.allocator().end, end, "the file has grown");
            assert!(!image.inner.unmapped().has_any(), "clusters wait to be counted down");
            let Reservation::Qcow2(allocation) = image.reserve(range).await.expect("space") else { panic!("nothing is written there") };
            assert!(!allocation.reads_zero(), "something may have been written there");
            drop(image.reserve(other_range).await.expect("space"));
            allocation.give_up();
            assert!(image.inner.unmapped().has_any(), "a write may still be under way to a part of it: nobody may use it at once");
            image.freeze(async {}).await.expect("sound");
            drop(image);
            let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
            let file = disk.open(&at, Access::Read, CacheMode::Direct).await.expect("there");
            let report = check(&file, &CheckOptions::default()).await.expect("readable");
            assert!(report.is_clean(), "{report:?}");
        });
    }

    /// Fills the memory for refcount blocks, so that the next one to be read drives out all that need not stay.
    fn crowd(image: &SimulatedImage) {
        let zeros = vec![0; image.geometry().cluster_len()];
        for index in 1..=CACHE_BYTES as u64 >> image.geometry().cluster_bits() {
            image.inner.allocator().refcounts.insert(index, &zeros, |_| true);
        }
    }

    #[test]
    fn counts_of_what_is_ready_or_being_appended_stay_in_memory() {
        with_image(31, small_clusters(9), async |_, image| {
            image.flush().await.expect("sound");
            let turn = image.inner.refcount_turn.take().await;
            let state = |index| image.inner.allocator().refcounts.block_state(index);
            image.inner.allocator().clear_ready();
            // One is there of clusters in two blocks, one of a block's first, and one of another's last.
            for run in [3 * 256 - 1..3 * 256 + 1, 6 * 256..6 * 256 + 1, 9 * 256 - 1..9 * 256] {
                image.inner.allocator().push_ready(run, false);
            }
            image.inner.allocator().appending = 11..12;
            crowd(&image);
            image.inner.load_refcounts(0, &turn).await.expect("sound");
            let in_memory: Vec<_> = (1..20).filter(|&index| state(index) == BlockState::Loaded).collect();
            assert_eq!(in_memory, [2, 3, 6, 8, 11]);
        });
    }

    #[test]
    fn what_is_put_back_when_its_count_is_not_in_memory_takes_the_way_of_what_is_freed() {
        with_image(32, small_clusters(9), async |_, image| {
            let taken = image.inner.allocate().await.expect("space").host;
            let cluster = image.geometry().host_cluster(taken).0;
            image.flush().await.expect("sound");
            crowd(&image);
            image.inner.allocator().refcounts.insert(1 << 20, &[0; 512], |_| false);
            assert_eq!(image.inner.allocator().refcounts.get(HostCluster(cluster)), None, "its count is not in memory");
            image.inner.put_back(taken);
            image.release(image.take_unmapped()).await.expect("sound");
            assert_eq!(image.inner.allocator().refcounts.get(HostCluster(cluster)), Some(0));
        });
    }

    /// Between blocks that exist, one is made in the first cluster that it counts.
    #[test]
    fn a_refcount_block_that_is_missing_between_others_is_metadata_with_space() {
        with_image(33, small_clusters(9), async |disk, image| {
            let turn = image.inner.refcount_turn.take().await;
            let (first, end) = (20 * 256, 21 * 256);
            let look = async || {
                (image.inner.allocator().scan, image.inner.allocator().scan_end) = (first, end);
                image.inner.scan_block(&turn).await
            };
            let allocated = disk.allocated(SIMULATED_IMAGE).expect("there");
            disk.set_space_limit(Some(allocated));
            assert!(!look().await.expect("others may have room"));
            disk.set_space_limit(None);
            disk.inject(Fault::once(OperationKind::Allocate, 0).with(FaultEffect::Error(libc::EIO)));
            assert!(!look().await.expect_err("a failure of the disk").is_no_space());
            assert!(!image.inner.metadata().contains(first));
            assert!(look().await.expect("sound"));
            assert!(image.inner.metadata().contains(first) && !image.inner.metadata().contains(first + 1));
            assert!(disk.allocated(SIMULATED_IMAGE).expect("there") > allocated);
            assert_eq!(image.inner.allocator().free, BTreeMap::from([(first + 1, 255)]));
        });
    }

    #[test]
    fn filling_up_ahead_of_need_goes_on_after_a_full_disk() {
        with_image(1, CreateOptions::standalone(64 << 20), async |disk, image| {
            let image = &image.inner;
            disk.set_space_limit(Some(0));
            image.top_up().await;
            assert!(image.allocator().starved && !image.allocator().is_low(), "nobody tries again ahead of need");
            image.allocate().await.expect_err("a full disk");
            disk.set_space_limit(None);
            image.allocate().await.expect("there is room again");
            assert!(!image.allocator().starved);
            while !image.allocator().is_low() {
                image.allocate().await.expect("a cluster is ready");
            }
            image.top_up().await;
            assert!(!image.allocator().is_low(), "nothing was filled up");
        });
    }
}

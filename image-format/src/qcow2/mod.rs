//! qcow2 images, version 2 and 3 (qemu's docs/interop/qcow2.rst; docs/formats/qcow2.md).

mod allocate;
mod busy;
mod check;
mod compressed;
mod create;
mod draft;
mod entry;
mod geometry;
mod grow;
mod header;
mod l1;
mod l2;
mod lifecycle;
mod map;
mod open;
mod overlap;
mod refcount;
mod snapshot;
#[cfg(test)]
pub(crate) mod testing;
mod turn;
mod unmap;
mod unwritten;
mod write;
mod writeback;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arc_swap::ArcSwapOption;

use crate::buffer::AlignedBuffer;
use crate::error::LayerError;
use crate::extent::ExtentList;
use crate::rounds::Rounds;
use crate::storage::Environment;
use crate::storage::kept::{Incarnation, MemoryKeeper};
use crate::units::{GuestOffset, GuestRange, HostOffset};

pub use check::{CheckError, CheckOptions, CheckReport, DEFAULT_MAX_FINDINGS, DEFAULT_MEMORY_LIMIT, Fault, Finding, Repair, check};
pub use create::{CreateError, CreateOptions, Preallocate};
pub use draft::{Draft, DraftError};
pub use geometry::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
pub use grow::GrowError;
pub use header::{Backing, BitmapsExtension, Compression, Header, HeaderError, MAGIC, MAX_BACKING_NAME};
pub use open::{OpenError, OpenOptions};
pub use snapshot::{InternalSnapshot, SnapshotError};
pub use write::Allocation;

use allocate::Allocator;
use busy::BusyTable;
use entry::EntryFormat;
use l1::L1;
use l2::{Slice, SliceCache};
use lifecycle::{Phase, PhaseCell};
use overlap::MetadataMap;
use refcount::Refcounts;
use snapshot::Snapshots;
use turn::Turn;
use unmap::UnmappedLists;
use unwritten::Unwritten;

/// Clean L2 slices that a layer keeps in memory by default. Layers that are only read need few: the stack remembers what they say.
const READ_CACHE_BYTES: usize = 16 << 10;
const WRITE_CACHE_BYTES: usize = 16 << 20;

/// What an entry is that points to metadata.
const SHARED_WITH_METADATA: &str = "guest data and metadata share a cluster";

/// An open qcow2 image. All methods may be called from any thread.
#[derive(Debug)]
pub struct Qcow2<E: Environment> {
    inner: Arc<Inner<E>>,
}

/// What is open of an image.
///
/// Lock order, first to last; none is held across an await: a shard of `busy`, a slice, `l1`, then any one of `dirty`, `unmapped`,
/// `allocator`, `metadata`, `header`. Turns (held across awaits): the `freeze_turn`, a round of `rounds` or the `table_turn`, then the `refcount_turn`.
#[derive(Debug)]
struct Inner<E: Environment> {
    file: E::File,
    data_file: Option<E::File>,
    format: EntryFormat,
    compression: Compression,
    virtual_size: AtomicU64,
    /// The header as it is in the file, but for changes that a round is about to write.
    header: Mutex<Header>,
    snapshots: Snapshots,
    l1: RwLock<L1>,
    slices: SliceCache,
    /// Slices newer than the file.
    dirty: Mutex<Vec<Arc<Slice>>>,
    /// Copies of these that outlive the process.
    unwritten: ArcSwapOption<Unwritten>,
    /// Changes must outlive the process, but the format has no room for the number of their copies: the file gets them at once.
    writes_at_once: AtomicBool,
    busy: BusyTable,
    unmapped: Mutex<UnmappedLists>,
    allocator: Mutex<Allocator>,
    /// Whoever reads or changes refcounts beyond taking a cluster that is ready.
    refcount_turn: Turn,
    /// Whoever makes an L2 table.
    table_turn: Turn,
    /// Whoever freezes the image.
    freeze_turn: Turn,
    metadata: RwLock<MetadataMap>,
    /// Number of the first cluster at which no guest data can be, because the file ends before.
    data_limit: AtomicU64,
    /// Clusters of the file when it was opened.
    opened_clusters: u64,
    /// Write-backs, and the first failure.
    rounds: Rounds,
    phase: PhaseCell,
}

impl<E: Environment> Inner<E> {
    fn new(file: E::File, header: Header, l1: L1, snapshots: Snapshots, options: OpenOptions<E>) -> Self {
        let geometry = header.geometry;
        let slice_len = usize::try_from(geometry.slice_bytes()).expect("at most 4 KiB");
        let default_cache = if options.writable { WRITE_CACHE_BYTES } else { READ_CACHE_BYTES };
        let no_refcounts = Refcounts::new(geometry, header.refcount_table_offset, header.refcount_table_clusters, Vec::new());
        Self {
            file,
            format: EntryFormat { geometry, has_zero: header.version >= 3, external_data: options.data_file.is_some() },
            data_file: options.data_file,
            compression: header.compression(),
            virtual_size: AtomicU64::new(header.virtual_size()),
            header: Mutex::new(header),
            snapshots,
            l1: RwLock::new(l1),
            slices: SliceCache::new(slice_len, options.l2_cache_bytes.unwrap_or(default_cache)),
            dirty: Mutex::default(),
            unwritten: ArcSwapOption::empty(),
            writes_at_once: AtomicBool::new(false),
            busy: BusyTable::default(),
            unmapped: Mutex::default(),
            allocator: Mutex::new(Allocator::new(geometry, no_refcounts, 0, 0, None)),
            refcount_turn: Turn::default(),
            table_turn: Turn::default(),
            freeze_turn: Turn::default(),
            metadata: RwLock::default(),
            data_limit: AtomicU64::new(0),
            opened_clusters: 0,
            rounds: Rounds::default(),
            phase: PhaseCell::new(if options.writable { Phase::Writing } else { Phase::ReadOnly }),
        }
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size.load(Ordering::Acquire)
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn l1(&self) -> RwLockReadGuard<'_, L1> {
        self.l1.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn l1_mut(&self) -> RwLockWriteGuard<'_, L1> {
        self.l1.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmapped(&self) -> MutexGuard<'_, UnmappedLists> {
        self.unmapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn metadata(&self) -> RwLockReadGuard<'_, MetadataMap> {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn metadata_mut(&self) -> RwLockWriteGuard<'_, MetadataMap> {
        self.metadata.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Failures to make the image durable are remembered in `keeper` from now on. Only the first call counts.
    fn remember_failures(&self, keeper: &Arc<dyn MemoryKeeper>) {
        let files = std::iter::once(&self.file).chain(&self.data_file);
        self.rounds.remember_in(keeper, files.map(Incarnation::of).collect());
    }

    /// Whether the guest's cluster that starts at `guest` may be overwritten where it is, at `host`, if nothing else refers to it. An error
    /// says why nothing sound can be there.
    fn check_place(&self, guest: GuestOffset, host: HostOffset) -> Result<bool, &'static str> {
        if self.format.external_data {
            return if host.get() == guest.get() { Ok(false) } else { Err("the position in the data file is not that on the disk") };
        }
        if self.phase.get() != Phase::Writing {
            return Ok(false);
        }
        let cluster = self.format.geometry.host_cluster(host).0;
        if self.metadata().contains(cluster) {
            return Err(SHARED_WITH_METADATA);
        }
        Ok(cluster < self.data_limit.load(Ordering::Acquire))
    }
}

impl<E: Environment> Qcow2<E> {
    fn from_inner(inner: Inner<E>) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Cluster size and table widths.
    pub fn geometry(&self) -> &Geometry {
        &self.inner.format.geometry
    }

    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.inner.virtual_size()
    }

    /// The image file.
    pub fn file(&self) -> &E::File {
        &self.inner.file
    }

    /// Where guest data is: the image file or its external data file.
    pub fn data_file(&self) -> &E::File {
        self.inner.data_file.as_ref().unwrap_or(&self.inner.file)
    }

    pub(crate) fn remember_failures(&self, keeper: &Arc<dyn MemoryKeeper>) {
        self.inner.remember_failures(keeper);
    }

    /// Flushes, and what is remembered of their failures.
    pub(crate) fn rounds(&self) -> &Rounds {
        &self.inner.rounds
    }

    pub(crate) async fn prefetch(&self, range: GuestRange) {
        self.inner.prefetch(range).await;
    }

    #[cfg(test)]
    pub(crate) fn slices_in_memory(&self) -> usize {
        self.inner.slices.len()
    }

    pub(crate) fn forget(&self, range: GuestRange) {
        self.inner.forget(range);
    }

    pub(crate) async fn map(&self, range: GuestRange, extents: &mut ExtentList) -> Result<(), LayerError> {
        self.inner.map(range, extents).await
    }

    pub(crate) async fn read_compressed(&self, at: GuestOffset) -> Result<Option<(GuestRange, AlignedBuffer)>, LayerError> {
        self.inner.read_compressed(at).await
    }
}

//! Opening an image: everything that the header points to is checked before it is used.

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{LayerError, Structure};
use crate::storage::kept::{Incarnation, MemoryKeeper};
use crate::storage::{Environment, Storage, StorageExt};
use crate::units::HostOffset;

use super::allocate::Allocator;
use super::check::{CheckError, Fault, repair_dirty};
use super::draft::Flushes;
use super::geometry::{Geometry, HostCluster};
use super::header::{Header, HeaderError};
use super::l1::{L1, decode_l1_entry, words_from};
use super::lifecycle::Phase;
use super::overlap::MetadataMap;
use super::refcount::{Refcounts, read_refcount};
use super::snapshot::{SnapshotError, Snapshots};
use super::unwritten::Unwritten;
use super::{Inner, Qcow2};

/// How to open an image.
#[derive(Debug)]
pub struct OpenOptions<E: Environment> {
    /// Whether it will be written to.
    pub writable: bool,
    /// The external data file, opened by the caller, if the image has one. Opening it is the caller's decision: the name in the header is a
    /// stranger's word.
    pub data_file: Option<E::File>,
    /// Bytes of clean L2 slices to keep in memory; `None` for the default.
    pub l2_cache_bytes: Option<usize>,
    /// Where to keep, while the image is written to, what must not be lost with the process, and to remember flushes that fail. Without one, a killed
    /// process is what a power cut is: what no flush covered may be gone.
    pub keeper: Option<Arc<dyn MemoryKeeper>>,
    /// Nothing is kept yet, but flushes that fail are remembered: [`Layer::keep`](crate::layer::Layer::keep) follows.
    pub keep_later: bool,
}

impl<E: Environment> OpenOptions<E> {
    /// For reading.
    pub fn reading() -> Self {
        Self { writable: false, data_file: None, l2_cache_bytes: None, keeper: None, keep_later: false }
    }

    /// For reading and writing.
    pub fn writing() -> Self {
        Self { writable: true, data_file: None, l2_cache_bytes: None, keeper: None, keep_later: false }
    }
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum OpenError {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("cannot read the {what} at {at}: {source}")]
    Read {
        what: Structure,
        at: HostOffset,
        #[source]
        source: io::Error,
    },
    #[error("the image is marked as corrupt, so it can be opened for reading only; repair it with `qemu-img check -r all`")]
    CorruptForWriting,
    #[error("the image keeps its data in an external data file{}, which must be allowed by name", name_note(.name.as_ref()))]
    DataFileMissing { name: Option<OsString> },
    #[error("an external data file was given, but the image has none")]
    DataFileUnexpected,
    #[error("images with an external data file can be opened for reading only")]
    DataFileForWriting,
    #[error("the refcounts are out of date, and counting anew has failed: {0}")]
    Recount(#[from] CheckError),
    #[error("the refcounts are out of date, and more is wrong: {fault}; repair the image with `qemu-img check -r all`")]
    BeyondRecount { fault: Fault },
    #[error("L1 entry {index}: {detail}")]
    L1Entry { index: u32, detail: &'static str },
    #[error("L1 entry {index} points to {at}, outside the file")]
    L1EntryOutside { index: u32, at: HostOffset },
    #[error("entry {index} of the refcount table, {word:#x}, is not the position of a cluster")]
    RefcountTableEntry { index: u64, word: u64 },
    #[error("entry {index} of the refcount table points to {at}, outside the file")]
    RefcountTableEntryOutside { index: u64, at: HostOffset },
    #[error("the {first} and the {second} overlap at {at}")]
    Overlap { first: &'static str, second: &'static str, at: HostOffset },
    #[error("what a killed process has left of the image in memory ({number:#x}) cannot be used: {detail}")]
    Left { number: u32, detail: String },
    #[error("the table of internal snapshots: {0}")]
    Snapshots(#[from] SnapshotError),
    #[error(transparent)]
    Layer(#[from] LayerError),
}

fn name_note(name: Option<&OsString>) -> String {
    name.map(|name| format!(" ({name:?})")).unwrap_or_default()
}

impl<E: Environment> Qcow2<E> {
    /// Opens the image in `file`. For writing, refcounts that another program has left out of date are counted anew, which reads all tables.
    ///
    /// # Errors
    /// If it cannot be read or makes no sense; for writing also if it may not be written to.
    pub async fn open(file: E::File, options: OpenOptions<E>) -> Result<Self, OpenError> {
        let header = Header::read(&file).await?;
        Self::open_with_header(file, header, options).await
    }

    /// As [`open`](Self::open), with the header that the caller has read already to look at the names in it.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub async fn open_with_header(file: E::File, header: Header, options: OpenOptions<E>) -> Result<Self, OpenError> {
        Self::open_as(file, header, options, Flushes::AsNeeded).await
    }

    /// As [`open_with_header`](Self::open_with_header), but perhaps as a draft: failures of flushes are not remembered then.
    pub(super) async fn open_as(file: E::File, mut header: Header, options: OpenOptions<E>, flushes: Flushes) -> Result<Self, OpenError> {
        admit(&header, &options)?;
        let (keeper, keep_later) = (options.keeper.clone(), options.keep_later);
        if options.writable && header.is_dirty() {
            // What can be seen and is lost looks right, and must be written like the rest.
            let had_failed = keeper.as_ref().is_some_and(|keeper| keeper.failure(Incarnation::of(&file)).is_some());
            let repaired = repair_dirty(&file, &mut header, had_failed).await.inspect_err(|error| {
                if let (Some(keeper), CheckError::Io { action: "flush", .. }) = (&keeper, error) {
                    keeper.note_failure(Incarnation::of(&file));
                }
            });
            if let Some(fault) = repaired? {
                return Err(OpenError::BeyondRecount { fault });
            }
        }
        let l1 = read_l1(&file, &header).await?;
        let snapshots = Snapshots::read(&file, &header).await?;
        let mut inner = Inner::new(file, header, l1, snapshots, options);
        match &keeper {
            _ if flushes == Flushes::AtTheEnd => inner.rounds.begin_draft(),
            Some(keeper) => inner.remember_failures(keeper),
            None => {}
        }
        if inner.phase.get() == Phase::Writing {
            inner.prepare_writing(keeper.filter(|_| !keep_later)).await?;
        }
        Ok(Self::from_inner(inner))
    }
}

/// Whether an image with such a header may be opened so.
fn admit<E: Environment>(header: &Header, options: &OpenOptions<E>) -> Result<(), OpenError> {
    if options.writable && header.is_corrupt() {
        return Err(OpenError::CorruptForWriting);
    }
    match (header.has_data_file(), &options.data_file) {
        (true, None) => Err(OpenError::DataFileMissing { name: header.data_file_name().map(ToOwned::to_owned) }),
        (false, Some(_)) => Err(OpenError::DataFileUnexpected),
        (true, Some(_)) if options.writable => Err(OpenError::DataFileForWriting),
        _ => Ok(()),
    }
}

/// Reads the active L1 table and checks each entry.
async fn read_l1(file: &impl Storage, header: &Header) -> Result<L1, OpenError> {
    let at = header.l1_offset;
    let len = header.l1_entries as usize * 8;
    let read_error = |source| OpenError::Read { what: Structure::L1Table, at, source };
    let file_len = file.length().await.map_err(read_error)?;
    let words = if len == 0 { Vec::new() } else { words_from(&file.read_bytes(at, len).await.map_err(read_error)?) };
    for (index, &word) in (0_u32..).zip(&words) {
        let table = decode_l1_entry(word, &header.geometry).map_err(|detail| OpenError::L1Entry { index, detail })?;
        if let Some(table) = table.filter(|table| table.at.get() >= file_len) {
            return Err(OpenError::L1EntryOutside { index, at: table.at });
        }
    }
    Ok(L1::new(at, words))
}

/// Most refcount blocks without any count that are passed over on the way to the last one with a count.
const EMPTY_BLOCKS: usize = 16;

impl<E: Environment> Inner<E> {
    /// What only writing needs: the counts, where metadata is, and a header without claims that will not be kept up.
    async fn prepare_writing(&mut self, keeper: Option<Arc<dyn MemoryKeeper>>) -> Result<(), OpenError> {
        let geometry = self.format.geometry;
        let header = self.header().clone();
        let read_error = |source| OpenError::Read { what: Structure::File, at: HostOffset::ZERO, source };
        let file_len = self.file.length().await.map_err(read_error)?;
        let table = read_refcount_table(&self.file, &header, file_len).await?;
        let refcounts = Refcounts::new(geometry, header.refcount_table_offset, header.refcount_table_clusters, table);
        let metadata = self.find_metadata(&header, &refcounts)?;
        *self.metadata_mut() = metadata;
        let used_end = used_end(&self.file, &refcounts, &geometry).await?;
        let file_clusters = geometry.clusters(file_len);
        let limit = fixed_clusters(&self.file, file_len, &geometry).await?;
        *self.allocator() = Allocator::new(geometry, refcounts, used_end, file_clusters, limit);
        self.data_limit.store(used_end.max(file_clusters), Ordering::Release);
        self.opened_clusters = file_clusters;
        *self.writes_at_once.get_mut() = keeper.is_some() && !header.has_feature_bits();
        self.rewrite_metadata().await?;
        let keeper = keeper.filter(|_| header.has_feature_bits());
        if let Some(keeper) = &keeper {
            self.restore_left(&**keeper, header.kept_number()).await?;
        }
        // Nothing that the bits promise is kept up here.
        let is_changed = std::mem::take(&mut self.header().autoclear) != 0;
        self.write_back_and(async |inner: &Self| match &keeper {
            Some(keeper) => inner.begin_keeping(keeper).await,
            None if is_changed => {
                inner.write_header().await?;
                inner.flush_device().await
            }
            None => Ok(()),
        })
        .await?;
        self.note_rewritten();
        Ok(())
    }

    /// Puts in place what a killed process has left in memory number `number`, if it is there.
    async fn restore_left(&self, keeper: &dyn MemoryKeeper, number: u32) -> Result<(), OpenError> {
        if number == 0 {
            return Ok(());
        }
        let unusable = |detail: String| OpenError::Left { number, detail };
        let Some(memory) = keeper.find(number).map_err(|error| unusable(error.to_string()))? else { return Ok(()) };
        let left = Unwritten::left(&*memory, self.slices.slice_len() / 8).map_err(|detail| unusable(detail.to_owned()))?;
        let (l1_entries, slices) = (self.l1().len() as u64, u64::from(self.format.geometry.slices_per_table()));
        if left.iter().any(|slice| u64::from(slice.key.l1_index) >= l1_entries || u64::from(slice.key.slice) >= slices) {
            return Err(unusable("it has parts of other tables".to_owned()));
        }
        self.restore(left).await?;
        Ok(())
    }

    fn find_metadata(&self, header: &Header, refcounts: &Refcounts) -> Result<MetadataMap, OpenError> {
        let geometry = &self.format.geometry;
        let run = |at: HostOffset, bytes: u64| geometry.cluster_numbers(at, bytes);
        let cluster = |at: HostOffset| run(at, 1);
        let mut parts = vec![
            (0..1, "header"),
            (run(header.l1_offset, u64::from(header.l1_entries) * 8), "L1 table"),
            (refcounts.table_range(), "refcount table"),
            (run(header.snapshots_offset, self.snapshots.table_bytes), "snapshot table"),
        ];
        parts.extend(refcounts.block_positions().map(|(_, at)| (cluster(at), "refcount block")));
        parts.extend(self.l1().tables().map(|(_, table)| (cluster(table.at), "L2 table")));
        for snapshot in &self.snapshots.list {
            parts.push((run(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8), "L1 table of a snapshot"));
        }
        MetadataMap::new(parts).map_err(|overlap| OpenError::Overlap {
            first: overlap.first,
            second: overlap.second,
            at: geometry.host_offset(HostCluster(overlap.cluster)),
        })
    }
}

/// Reads the refcount table and checks each entry.
async fn read_refcount_table(file: &impl Storage, header: &Header, file_len: u64) -> Result<Vec<u64>, OpenError> {
    let at = header.refcount_table_offset;
    let len = usize::try_from(header.refcount_table_clusters).expect("at most 8 MiB") * header.geometry.cluster_len();
    // What is not in the file would be appended to it. Reading alone does not need the table.
    if (at + len as u64).get() > file_len.next_multiple_of(header.geometry.cluster_bytes()) {
        return Err(HeaderError::RefcountTableOutside(at).into());
    }
    let read = file.read_bytes(at, len).await;
    let table = words_from(&read.map_err(|source| OpenError::Read { what: Structure::RefcountTable, at, source })?);
    for (index, &word) in (0_u64..).zip(&table) {
        let at = HostOffset::new(word);
        if word & 0x1ff != 0 || !at.is_aligned(header.geometry.cluster_bytes()) {
            return Err(OpenError::RefcountTableEntry { index, word });
        }
        if word >= file_len && word != 0 {
            return Err(OpenError::RefcountTableEntryOutside { index, at });
        }
    }
    Ok(table)
}

/// Whole clusters of a medium that cannot grow, a block device; `None` if it can.
async fn fixed_clusters(file: &impl Storage, file_len: u64, geometry: &Geometry) -> Result<Option<u64>, OpenError> {
    // Asking for the length that it has changes nothing where it can be changed.
    match file.set_len(file_len).await {
        Ok(()) => Ok(None),
        Err(refused) if refused.kind() == io::ErrorKind::Unsupported => Ok(Some(file_len >> geometry.cluster_bits())),
        Err(source) => Err(LayerError::io("set the length of", Structure::File, HostOffset::new(file_len), source).into()),
    }
}

/// The first cluster after all that are counted as used, or one further on.
async fn used_end(file: &impl Storage, refcounts: &Refcounts, geometry: &Geometry) -> Result<u64, OpenError> {
    let per_block = geometry.refcounts_per_block();
    let blocks: Vec<_> = refcounts.block_positions().collect();
    let Some(&(last, _)) = blocks.last() else { return Ok(1) };
    for &(index, at) in blocks.iter().rev().take(EMPTY_BLOCKS) {
        let read = file.read_bytes(at, geometry.cluster_len()).await;
        let block = read.map_err(|source| OpenError::Read { what: Structure::RefcountBlock, at, source })?;
        // Mostly zeros, which are passed over quickly.
        let Some(last_byte) = block.iter().rposition(|byte| *byte != 0) else { continue };
        let bits = geometry.refcount_bits();
        let entries = ((last_byte + 1) * 8).div_ceil(bits as usize);
        if let Some(entry) = (0..entries).rev().find(|&entry| read_refcount(&block, entry, bits) != 0) {
            return Ok(index * per_block + entry as u64 + 1);
        }
    }
    Ok((last + 1) * per_block)
}

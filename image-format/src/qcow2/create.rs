//! Making new images.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;

use crate::buffer::{AlignedBuffer, Buffer};
use crate::storage::{Environment, Storage};
use crate::units::HostOffset;

use super::Qcow2;
use super::draft::Flushes;
use super::entry::{COPIED, EntryFormat, Standard};
use super::geometry::{Geometry, HostCluster, MAX_CLUSTER_BITS, MAX_REFCOUNT_TABLE_BYTES, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS};
use super::header::{Compression, MAGIC, MAX_BACKING_NAME, V2_HEADER_BYTES, compatible, extension, incompatible};
use super::l1::table_bytes;
use super::refcount::write_refcount;

/// Length of the version 3 headers written here: up to and including the compression type.
const V3_WRITTEN_HEADER_BYTES: u32 = 112;
/// Clusters of our own overlays: 128 KiB, so that a sub-cluster is 4 KiB, the unit in which file systems write.
const OVERLAY_CLUSTER_BITS: u32 = 17;

/// What of a new image is allocated at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocate {
    /// Nothing but the header and empty first-level tables.
    #[default]
    None,
    /// A place for every cluster, so that writing changes no table. The file is as long as the disk, but sparse.
    Metadata,
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// The cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// Width of the refcounts, a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Whether clusters have sub-clusters.
    pub extended_l2: bool,
    /// Name and format of the backing file, as they are to be written.
    pub backing: Option<(OsString, String)>,
    /// Whether other programs may update refcounts late. We never do.
    pub lazy_refcounts: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// What is allocated at once.
    pub preallocate: Preallocate,
    /// A number that the image keeps, by which its maker knows it again.
    pub mark: Option<u64>,
}

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum CreateError {
    #[error("qcow2 version {0} is not supported, only 2 and 3 are")]
    Version(u32),
    #[error("the cluster size 2^{0} is outside 2^9 (512 bytes) to 2^21 (2 MiB)")]
    ClusterBits(u32),
    #[error("extended L2 entries need clusters of 2^14 bytes at least, not 2^{0}")]
    ExtendedL2ClusterBits(u32),
    #[error("a refcount width of {0} bits is not one of 1, 2, 4, 8, 16, 32 and 64")]
    RefcountBits(u32),
    #[error("version 2 has no {0}")]
    NotInVersion2(&'static str),
    #[error("the virtual size of {0} bytes is not a multiple of 512")]
    Ragged(u64),
    #[error("the virtual size of {size} bytes is more than the {limit} bytes that this cluster size allows")]
    VirtualSize { size: u64, limit: u64 },
    #[error("the name of the backing file is empty or contains a zero byte")]
    BackingName,
    #[error("the format of the backing file is empty or no plain text")]
    BackingFormat,
    #[error("the name of the backing file has {len} bytes, more than the {limit} that fit")]
    BackingLength { len: usize, limit: usize },
    #[error("with a backing file, allocating at once needs extended L2 entries")]
    PreallocateWithBacking,
    #[error("allocating at once needs a file that can grow")]
    PreallocateOnDevice,
    #[error("the refcount table would have more than 8 MiB; take larger clusters or narrower refcounts")]
    RefcountTable,
    #[error("cannot {action} the new image: {source}")]
    Io {
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

impl CreateOptions {
    /// An image of its own as qemu-img makes it by default: version 3, 64 KiB clusters.
    pub fn standalone(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            version: 3,
            cluster_bits: 16,
            refcount_bits: 16,
            extended_l2: false,
            backing: None,
            lazy_refcounts: false,
            compression: Compression::Deflate,
            preallocate: Preallocate::None,
            mark: None,
        }
    }

    /// Our own overlays: clusters of 128 KiB with sub-clusters of 4 KiB, so that a 4 KiB write copies nothing.
    pub fn overlay(virtual_size: u64, backing_name: impl Into<OsString>, backing_format: impl Into<String>) -> Self {
        Self {
            cluster_bits: OVERLAY_CLUSTER_BITS,
            extended_l2: true,
            backing: Some((backing_name.into(), backing_format.into())),
            ..Self::standalone(virtual_size)
        }
    }

    fn check(&self) -> Result<Geometry, CreateError> {
        if !(2..=3).contains(&self.version) {
            return Err(CreateError::Version(self.version));
        }
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&self.cluster_bits) {
            return Err(CreateError::ClusterBits(self.cluster_bits));
        }
        if self.extended_l2 && self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(CreateError::ExtendedL2ClusterBits(self.cluster_bits));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(CreateError::RefcountBits(self.refcount_bits));
        }
        if self.version == 2 {
            let missing = [
                (self.extended_l2, "extended L2 entries"),
                (self.lazy_refcounts, "lazy refcounts"),
                (self.compression != Compression::Deflate, "choice of compression"),
                (self.refcount_bits != 16, "choice of refcount width"),
            ];
            if let Some((_, what)) = missing.iter().find(|(wanted, _)| *wanted) {
                return Err(CreateError::NotInVersion2(what));
            }
        }
        let geometry = Geometry::new(self.cluster_bits, self.extended_l2, self.refcount_bits.ilog2());
        if !self.virtual_size.is_multiple_of(512) {
            return Err(CreateError::Ragged(self.virtual_size));
        }
        let limit = geometry.max_virtual_size();
        if self.virtual_size > limit {
            return Err(CreateError::VirtualSize { size: self.virtual_size, limit });
        }
        if self.preallocate == Preallocate::Metadata && self.backing.is_some() && !self.extended_l2 {
            return Err(CreateError::PreallocateWithBacking);
        }
        Ok(geometry)
    }
}

impl<E: Environment> Qcow2<E> {
    /// Makes a new image of everything in `file`, durable on return. Until it is complete the file has no valid header.
    ///
    /// # Errors
    /// If the options contradict one another or the format, or the file cannot be written.
    pub async fn create(file: &E::File, options: &CreateOptions) -> Result<(), CreateError> {
        Self::write_new(file, options, Flushes::AsNeeded).await
    }

    /// As [`create`](Self::create), but perhaps as a draft.
    pub(super) async fn write_new(file: &E::File, options: &CreateOptions, flushes: Flushes) -> Result<(), CreateError> {
        let geometry = options.check()?;
        let layout = Layout::new(&geometry, options)?;
        let header = header_cluster(options, &geometry, &layout)?;
        let is_device = empty(file).await?;
        if is_device && options.preallocate == Preallocate::Metadata {
            return Err(CreateError::PreallocateOnDevice);
        }
        let writer = Writer { file, geometry: &geometry, flushes };
        if is_device {
            // An old header must not stay valid while the tables beneath it change.
            writer.write(HostCluster(0), AlignedBuffer::zeroed(geometry.cluster_len())).await?;
            writer.flush().await?;
        }
        layout.write_refcounts(&writer).await?;
        layout.write_mapping(&writer, options).await?;
        if !is_device {
            let len = geometry.host_offset(HostCluster(layout.total)).get();
            file.set_len(len).await.map_err(|source| CreateError::Io { action: "extend", source })?;
        }
        writer.flush().await?;
        writer.write(HostCluster(0), header).await?;
        writer.flush().await
    }
}

/// Empties the file. `true` if it is a device, which cannot be.
async fn empty(file: &impl Storage) -> Result<bool, CreateError> {
    match file.set_len(0).await {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(true),
        Err(source) => Err(CreateError::Io { action: "empty", source }),
    }
}

/// Where everything is: header, refcount table, refcount blocks, L1 table, L2 tables, data, one after the other.
#[derive(Clone, Copy, Debug)]
struct Layout {
    table_clusters: u64,
    block_clusters: u64,
    l1_entries: u64,
    l1_clusters: u64,
    l2_tables: u64,
    total: u64,
}

impl Layout {
    fn new(geometry: &Geometry, options: &CreateOptions) -> Result<Self, CreateError> {
        // An L1 table without entries would have no place.
        let l1_entries = geometry.l1_entries(options.virtual_size).max(1);
        let l1_clusters = geometry.clusters(l1_entries * 8);
        let (l2_tables, data_clusters) = match options.preallocate {
            Preallocate::None => (0, 0),
            Preallocate::Metadata => (geometry.l1_entries(options.virtual_size), geometry.clusters(options.virtual_size)),
        };
        let others = 1 + l1_clusters + l2_tables + data_clusters;
        let (mut table_clusters, mut block_clusters) = (1, 1);
        // The counts count their own clusters too; more room only makes the need grow.
        loop {
            let total = others + table_clusters + block_clusters;
            let blocks = total.div_ceil(geometry.refcounts_per_block());
            let tables = geometry.clusters(blocks * 8);
            if (tables, blocks) == (table_clusters, block_clusters) {
                if table_clusters * geometry.cluster_bytes() > MAX_REFCOUNT_TABLE_BYTES.max(geometry.cluster_bytes()) {
                    return Err(CreateError::RefcountTable);
                }
                return Ok(Self { table_clusters, block_clusters, l1_entries, l1_clusters, l2_tables, total });
            }
            (table_clusters, block_clusters) = (tables.max(table_clusters), blocks.max(block_clusters));
        }
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn l1(&self) -> u64 {
        self.first_block() + self.block_clusters
    }

    fn first_l2(&self) -> u64 {
        self.l1() + self.l1_clusters
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }

    async fn write_refcounts<S: Storage>(&self, writer: &Writer<'_, S>) -> Result<(), CreateError> {
        let geometry = writer.geometry;
        let table: Vec<u64> = (0..self.block_clusters).map(|block| writer.position(self.first_block() + block)).collect();
        let table_len = usize::try_from(self.table_clusters).expect("at most 8 MiB") * geometry.cluster_len();
        writer.write(HostCluster(1), table_bytes(&table, table_len)).await?;
        let per_block = geometry.refcounts_per_block();
        for block in 0..self.block_clusters {
            let mut bytes = AlignedBuffer::zeroed(geometry.cluster_len());
            let used = (self.total - block * per_block).min(per_block);
            for entry in 0..usize::try_from(used).expect("at most 2^24 refcounts") {
                write_refcount(&mut bytes, entry, geometry.refcount_bits(), 1);
            }
            writer.write(HostCluster(self.first_block() + block), bytes).await?;
        }
        Ok(())
    }

    async fn write_mapping<S: Storage>(&self, writer: &Writer<'_, S>, options: &CreateOptions) -> Result<(), CreateError> {
        let geometry = writer.geometry;
        let l1: Vec<u64> = (0..self.l2_tables).map(|table| writer.position(self.first_l2() + table) | COPIED).collect();
        let l1_len = usize::try_from(self.l1_clusters).expect("at most 32 MiB") * geometry.cluster_len();
        writer.write(HostCluster(self.l1()), table_bytes(&l1, l1_len)).await?;
        let format = EntryFormat { geometry: *geometry, has_zero: options.version >= 3, external_data: false };
        // Above a backing file the clusters have places but no bytes yet.
        let allocated = if options.backing.is_some() { 0 } else { geometry.all_subclusters() };
        let per_table = geometry.table_reach() / geometry.cluster_bytes();
        let data_clusters = geometry.clusters(options.virtual_size);
        for table in 0..self.l2_tables {
            let clusters = table * per_table..((table + 1) * per_table).min(data_clusters);
            let words: Vec<u64> = clusters
                .flat_map(|cluster| {
                    let host = HostOffset::new(writer.position(self.first_data() + cluster));
                    let (word, bitmap) = format.encode(Standard { host: Some(host), copied: true, allocated, zero: 0 });
                    [word, bitmap].into_iter().take(geometry.entry_words())
                })
                .collect();
            writer.write(HostCluster(self.first_l2() + table), table_bytes(&words, geometry.cluster_len())).await?;
        }
        Ok(())
    }
}

struct Writer<'a, S> {
    file: &'a S,
    geometry: &'a Geometry,
    flushes: Flushes,
}

impl<S: Storage> Writer<'_, S> {
    fn position(&self, cluster: u64) -> u64 {
        self.geometry.host_offset(HostCluster(cluster)).get()
    }

    async fn write(&self, cluster: HostCluster, bytes: AlignedBuffer) -> Result<(), CreateError> {
        let (result, _) = self.file.write(self.geometry.host_offset(cluster), Buffer::Owned(bytes)).await;
        result.map_err(|source| CreateError::Io { action: "write", source })
    }

    async fn flush(&self) -> Result<(), CreateError> {
        if self.flushes == Flushes::AtTheEnd {
            return Ok(());
        }
        self.file.flush().await.map_err(|source| CreateError::Io { action: "flush", source })
    }
}

/// The first cluster.
fn header_cluster(options: &CreateOptions, geometry: &Geometry, layout: &Layout) -> Result<AlignedBuffer, CreateError> {
    let mut head = Vec::new();
    let v3 = options.version >= 3;
    head.extend(MAGIC);
    head.extend(options.version.to_be_bytes());
    head.extend([0; 12]); // backing file: filled in below
    head.extend(options.cluster_bits.to_be_bytes());
    head.extend(options.virtual_size.to_be_bytes());
    head.extend(0_u32.to_be_bytes()); // no encryption
    head.extend(u32::try_from(layout.l1_entries).expect("at most 32 MiB").to_be_bytes());
    let position = |cluster| geometry.host_offset(HostCluster(cluster)).get().to_be_bytes();
    head.extend(position(layout.l1()));
    head.extend(position(1));
    head.extend(u32::try_from(layout.table_clusters).expect("at most 8 MiB").to_be_bytes());
    head.extend([0; 12]); // no snapshots
    debug_assert_eq!(head.len(), V2_HEADER_BYTES as usize);
    if v3 {
        let mut features = 0;
        if options.compression != Compression::Deflate {
            features |= incompatible::COMPRESSION;
        }
        if options.extended_l2 {
            features |= incompatible::EXTENDED_L2;
        }
        head.extend(features.to_be_bytes());
        head.extend(if options.lazy_refcounts { compatible::LAZY_REFCOUNTS } else { 0 }.to_be_bytes());
        head.extend(0_u64.to_be_bytes());
        head.extend(geometry.refcount_bits().ilog2().to_be_bytes());
        head.extend(V3_WRITTEN_HEADER_BYTES.to_be_bytes());
        head.extend([u8::from(options.compression == Compression::Zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    // First, so that the sector with the magic has it.
    if let Some(mark) = options.mark {
        push_extension(&mut head, extension::MARK, &mark.to_be_bytes());
    }
    if let Some((_, format)) = &options.backing {
        if format.is_empty() || format.contains(char::is_control) {
            return Err(CreateError::BackingFormat);
        }
        push_extension(&mut head, extension::BACKING_FORMAT, format.as_bytes());
    }
    // The smallest clusters have no room to spare for names that only help people.
    if v3 && geometry.cluster_bytes() >= 4096 {
        push_extension(&mut head, extension::FEATURE_NAMES, &feature_names());
    }
    push_extension(&mut head, extension::END, &[]);
    if let Some((name, _)) = &options.backing {
        let name = name.as_bytes();
        if name.is_empty() || name.contains(&0) {
            return Err(CreateError::BackingName);
        }
        let limit = geometry.cluster_len().saturating_sub(head.len()).min(MAX_BACKING_NAME);
        if name.len() > limit {
            return Err(CreateError::BackingLength { len: name.len(), limit });
        }
        let offset = head.len() as u64;
        head[8..16].copy_from_slice(&offset.to_be_bytes());
        head[16..20].copy_from_slice(&u32::try_from(name.len()).expect("at most 1023").to_be_bytes());
        head.extend(name);
    }
    if head.len() > geometry.cluster_len() {
        return Err(CreateError::BackingLength { len: head.len(), limit: geometry.cluster_len() });
    }
    let mut cluster = AlignedBuffer::zeroed(geometry.cluster_len());
    cluster[..head.len()].copy_from_slice(&head);
    Ok(cluster)
}

fn push_extension(head: &mut Vec<u8>, kind: u32, data: &[u8]) {
    head.extend(kind.to_be_bytes());
    head.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
    head.extend(data);
    head.resize(head.len().next_multiple_of(8), 0);
}

/// Names of the feature bits, for programs that do not know them.
fn feature_names() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let entry = |&(kind, bit, name): &(u8, u8, &str)| {
        let mut entry = [0; 48];
        entry[..2].copy_from_slice(&[kind, bit]);
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        entry
    };
    NAMES.iter().flat_map(entry).collect()
}

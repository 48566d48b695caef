//! The header: parsed and checked before anything else is read, and changed in place only.
//!
//! A header is changed by overwriting known fields in the first sector, which the medium writes as one unit. Everything else in the first
//! cluster (fields and extensions that we do not know, the names) stays byte for byte as it was found.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use futures_util::future::join;

use crate::storage::{Storage, StorageExt};
use crate::units::HostOffset;

use super::geometry::{
    Geometry, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MAX_REFCOUNT_TABLE_BYTES, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS,
};

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
pub(super) const V2_HEADER_BYTES: u32 = 72;
/// Bytes of a version 3 header, at least.
pub(super) const V3_HEADER_BYTES: u32 = 104;
/// What is read of the first cluster at first: nearly every header, with its extensions and names, takes less.
const FIRST_BYTES: usize = 4096;
/// Longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// Most internal snapshots, as in QEMU.
pub(super) const MAX_SNAPSHOTS: u32 = 65_536;

/// Incompatible feature bits.
pub(super) mod incompatible {
    /// Refcounts may be wrong.
    pub(crate) const DIRTY: u64 = 1 << 0;
    /// Any table may be wrong.
    pub(crate) const CORRUPT: u64 = 1 << 1;
    /// Guest data is in another file.
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    /// Not deflate.
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    /// Sub-clusters.
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    /// All that this program knows.
    pub(crate) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bits.
pub(super) mod compatible {
    /// Refcounts may be updated late, with the dirty bit set.
    pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Auto-clear feature bits.
pub(super) mod autoclear {
    /// The bitmaps extension is up to date.
    pub(crate) const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image.
    pub(crate) const RAW_DATA_FILE: u64 = 1 << 1;
}

/// Header extension types.
pub(super) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const ENCRYPTION: u32 = 0x0537_be77;
    pub(crate) const DATA_FILE_NAME: u32 = 0x4441_5441;
    /// Ours: a number by which whoever made the image knows it again. "snfm".
    pub(crate) const MARK: u32 = 0x736e_666d;
}

/// Positions of the fields that are changed in place.
pub(super) mod field {
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_ENTRIES: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (QEMU says "zlib").
    #[default]
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// A backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name, literally. Never a URL or JSON, whatever it looks like.
    pub name: OsString,
    /// The format extension, if there is one. Without it whoever opens the chain must state the format: it is never probed.
    pub format: Option<String>,
}

/// Where the tables of persistent bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Length of the directory in bytes.
    pub directory_bytes: u64,
    /// Position of the directory.
    pub directory: HostOffset,
}

/// Why a file cannot be read as a qcow2 header.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum HeaderError {
    #[error("cannot read the header: {0}")]
    Read(#[source] io::Error),
    #[error("it is not a qcow2 image: it begins with {0:02x?} instead of \"QFI\\xfb\"")]
    Magic([u8; 4]),
    #[error("the file is empty or too short for a header: {0} bytes")]
    TooShort(u64),
    #[error("qcow2 version {0} is not supported, only 2 and 3 are")]
    Version(u32),
    #[error("the cluster size 2^{0} is outside 2^9 (512 bytes) to 2^21 (2 MiB)")]
    ClusterBits(u32),
    #[error("extended L2 entries need clusters of 2^14 bytes at least, not 2^{0}")]
    ExtendedL2ClusterBits(u32),
    #[error("the header length {length} is below 104, above the cluster size {cluster_bytes}, or not a multiple of 8")]
    HeaderLength { length: u32, cluster_bytes: u64 },
    #[error("the image uses incompatible features that this program does not know: {}", .0.join(", "))]
    UnknownFeatures(Vec<String>),
    #[error("refcounts of 2^{0} bits are wider than 64 bits")]
    RefcountOrder(u32),
    #[error("the image is encrypted (method {0}), which is not supported")]
    Encrypted(u32),
    #[error("compression type {kind} does not fit the compression feature bit, which is {}", if *.bit { "set" } else { "clear" })]
    CompressionMismatch { kind: u8, bit: bool },
    #[error("compression type {0} is not supported, only 0 (deflate) and 1 (zstd) are")]
    CompressionType(u8),
    #[error("the name of the backing file at {offset:#x} is not within the first cluster, after the header")]
    BackingOffset { offset: u64 },
    #[error("the name of the backing file has {0} bytes, which is more than 1023 or reaches past the first cluster")]
    BackingLength(u32),
    #[error("the name of the backing file is empty or contains a zero byte")]
    BackingName,
    #[error("a header extension of type {kind:#010x} with {length} bytes at {at:#x} reaches past the extension area")]
    ExtensionLength { kind: u32, length: u32, at: u64 },
    #[error("the header extension of type {0:#010x} is there twice")]
    ExtensionTwice(u32),
    #[error("the {0} in its header extension is empty, not text, or contains a zero byte")]
    ExtensionText(&'static str),
    #[error("the bitmaps extension makes no sense: {0}")]
    Bitmaps(&'static str),
    #[error("an encryption extension is there without encryption")]
    EncryptionExtension,
    #[error("the raw-data-file feature bit is set without an external data file")]
    RawWithoutDataFile,
    #[error("a raw external data file contradicts a backing file")]
    RawWithBacking,
    #[error("internal snapshots contradict an external data file")]
    SnapshotsWithDataFile,
    #[error("the virtual size of {size} bytes is more than the {limit} bytes that this cluster size allows")]
    VirtualSize { size: u64, limit: u64 },
    #[error("the L1 table has {entries} entries, more than the limit of 32 MiB")]
    L1TooLarge { entries: u32 },
    #[error("the L1 table has {entries} entries, but a disk of {size} bytes needs {needed}")]
    L1TooSmall { entries: u32, needed: u64, size: u64 },
    #[error("the L1 table at {0} is not on a cluster boundary")]
    L1Unaligned(HostOffset),
    #[error("the L1 table at {0} is outside the file")]
    L1Outside(HostOffset),
    #[error("the refcount table at {0} is not on a cluster boundary")]
    RefcountTableUnaligned(HostOffset),
    #[error("the refcount table at {0} is outside the file")]
    RefcountTableOutside(HostOffset),
    #[error("the refcount table has no clusters")]
    RefcountTableEmpty,
    #[error("the refcount table has {0} clusters, more than the limit of 8 MiB")]
    RefcountTableTooLarge(u32),
    #[error("the image says it has {0} internal snapshots, more than the limit of 65536")]
    TooManySnapshots(u32),
    #[error("the snapshot table at {0} is not on a cluster boundary")]
    SnapshotsUnaligned(HostOffset),
    #[error("the snapshot table at {0} is outside the file")]
    SnapshotsOutside(HostOffset),
    #[error("the {first} and the {second} overlap in the file")]
    Overlap { first: &'static str, second: &'static str },
}

/// A header that has been checked as far as it can be without reading anything else.
#[derive(Clone, Debug)]
pub struct Header {
    pub(super) version: u32,
    pub(super) geometry: Geometry,
    /// As the file says; the guest sees whole sectors of it.
    pub(super) size: u64,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: HostOffset,
    pub(super) refcount_table_offset: HostOffset,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshot_count: u32,
    pub(super) snapshots_offset: HostOffset,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    compression: Compression,
    backing: Option<Backing>,
    data_file_name: Option<OsString>,
    bitmaps: Option<BitmapsExtension>,
    mark: Option<u64>,
    /// The first 512 bytes as they are in the file, to patch and write back.
    first_sector: Box<[u8]>,
}

/// Big-endian fields of a byte string whose length has been checked.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("the slice has this length")
    }
}

impl Header {
    /// Reads and checks the header of an image, and opens nothing else: the names in it can be looked at before deciding about them.
    ///
    /// # Errors
    /// If the file cannot be read, is no qcow2 image, or its header makes no sense.
    pub async fn read(file: &impl Storage) -> Result<Self, HeaderError> {
        let (file_len, start) = join(file.length(), file.read_bytes(HostOffset::ZERO, FIRST_BYTES)).await;
        let (file_len, start) = (file_len.map_err(HeaderError::Read)?, start.map_err(HeaderError::Read)?);
        if file_len < u64::from(V2_HEADER_BYTES) {
            return Err(HeaderError::TooShort(file_len));
        }
        let cluster_len = 1 << Self::check_start(&start)?;
        if cluster_len <= FIRST_BYTES || is_complete(&start) {
            return Self::parse(&start[..cluster_len.min(FIRST_BYTES)], file_len);
        }
        let cluster = file.read_bytes(HostOffset::ZERO, cluster_len).await.map_err(HeaderError::Read)?;
        Self::parse(&cluster, file_len)
    }

    /// Checks magic, version and cluster size, and returns the last.
    fn check_start(start: &[u8]) -> Result<u32, HeaderError> {
        let fields = Fields(start);
        if start[..4] != MAGIC {
            return Err(HeaderError::Magic([start[0], start[1], start[2], start[3]]));
        }
        let version = fields.u32(4);
        if !(2..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let cluster_bits = fields.u32(20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(HeaderError::ClusterBits(cluster_bits));
        }
        Ok(cluster_bits)
    }

    /// Takes a whole first cluster, or what [`is_complete`], of a file of `file_len` bytes apart.
    fn parse(cluster: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let cluster_bits = Self::check_start(cluster)?;
        let fields = Fields(cluster);
        let version = fields.u32(4);
        let cluster_bytes = 1_u64 << cluster_bits;
        let v3 = version >= 3;
        let header_length = if v3 { fields.u32(100) } else { V2_HEADER_BYTES };
        if v3 && (header_length < V3_HEADER_BYTES || u64::from(header_length) > cluster_bytes || header_length % 8 != 0) {
            return Err(HeaderError::HeaderLength { length: header_length, cluster_bytes });
        }
        let feature_words = |at| if v3 { fields.u64(at) } else { 0 };
        let (incompatible, compatible, autoclear) = (feature_words(72), feature_words(80), feature_words(88));

        // The extensions come before the feature bits, because their names may be among them.
        let backing_range = backing_range(&fields, header_length, cluster_bytes)?;
        let area = header_length as usize..backing_range.as_ref().map_or(cluster.len(), |name| name.start);
        let extensions = Extensions::parse(cluster, area)?;
        let unknown = incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(HeaderError::UnknownFeatures(extensions.names_of(unknown)));
        }

        let extended_l2 = incompatible & incompatible::EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(HeaderError::ExtendedL2ClusterBits(cluster_bits));
        }
        let refcount_order = if v3 { fields.u32(96) } else { 4 };
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(HeaderError::RefcountOrder(refcount_order));
        }
        let encryption = fields.u32(32);
        if encryption != 0 {
            return Err(HeaderError::Encrypted(encryption));
        }
        if extensions.encryption {
            return Err(HeaderError::EncryptionExtension);
        }
        let compression_kind = if header_length > V3_HEADER_BYTES { cluster[104] } else { 0 };
        let compression_bit = incompatible & incompatible::COMPRESSION != 0;
        if compression_bit != (compression_kind != 0) {
            return Err(HeaderError::CompressionMismatch { kind: compression_kind, bit: compression_bit });
        }
        let compression = match compression_kind {
            0 => Compression::Deflate,
            1 => Compression::Zstd,
            other => return Err(HeaderError::CompressionType(other)),
        };
        let backing = match backing_range {
            Some(range) => Some(Backing { name: name_from(&cluster[range])?, format: extensions.backing_format.clone() }),
            None => None,
        };
        let has_data_file = incompatible & incompatible::DATA_FILE != 0;
        if autoclear & autoclear::RAW_DATA_FILE != 0 {
            if !has_data_file {
                return Err(HeaderError::RawWithoutDataFile);
            }
            if backing.is_some() {
                return Err(HeaderError::RawWithBacking);
            }
        }

        let header = Self {
            version,
            geometry: Geometry::new(cluster_bits, extended_l2, refcount_order),
            size: fields.u64(field::SIZE),
            l1_entries: fields.u32(field::L1_ENTRIES),
            l1_offset: HostOffset::new(fields.u64(field::L1_OFFSET)),
            refcount_table_offset: HostOffset::new(fields.u64(field::REFCOUNT_TABLE_OFFSET)),
            refcount_table_clusters: fields.u32(field::REFCOUNT_TABLE_CLUSTERS),
            snapshot_count: fields.u32(60),
            snapshots_offset: HostOffset::new(fields.u64(64)),
            incompatible,
            compatible,
            autoclear,
            compression,
            backing,
            data_file_name: extensions.data_file_name.clone(),
            mark: extensions.mark,
            // Without its feature bit the extension is out of date: somebody wrote who did not know it.
            bitmaps: if autoclear & autoclear::BITMAPS != 0 { extensions.checked_bitmaps(cluster_bytes)? } else { None },
            first_sector: cluster[..512].into(),
        };
        header.check_tables(file_len)?;
        Ok(header)
    }

    /// Sizes and places of everything that the header points to: protects the allocations made for them, and the header itself.
    fn check_tables(&self, file_len: u64) -> Result<(), HeaderError> {
        let geometry = &self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let limit = geometry.max_virtual_size();
        if self.size > limit {
            return Err(HeaderError::VirtualSize { size: self.size, limit });
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(HeaderError::L1TooLarge { entries: self.l1_entries });
        }
        let needed = geometry.l1_entries(self.size);
        if u64::from(self.l1_entries) < needed {
            return Err(HeaderError::L1TooSmall { entries: self.l1_entries, needed, size: self.size });
        }
        let inside = |at: HostOffset, len: u64| at.get() < file_len && at.checked_add(len).is_some_and(|end| end.get() < i64::MAX as u64);
        if self.l1_entries > 0 {
            if !self.l1_offset.is_aligned(cluster_bytes) {
                return Err(HeaderError::L1Unaligned(self.l1_offset));
            }
            if !inside(self.l1_offset, l1_bytes) || self.l1_offset.get() + l1_bytes > file_len.next_multiple_of(cluster_bytes) {
                return Err(HeaderError::L1Outside(self.l1_offset));
            }
        }
        if self.refcount_table_clusters == 0 {
            return Err(HeaderError::RefcountTableEmpty);
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster_bytes;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster_bytes) {
            return Err(HeaderError::RefcountTableTooLarge(self.refcount_table_clusters));
        }
        if !self.refcount_table_offset.is_aligned(cluster_bytes) {
            return Err(HeaderError::RefcountTableUnaligned(self.refcount_table_offset));
        }
        if !inside(self.refcount_table_offset, table_bytes) {
            return Err(HeaderError::RefcountTableOutside(self.refcount_table_offset));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(HeaderError::TooManySnapshots(self.snapshot_count));
        }
        if self.snapshot_count > 0 {
            if self.has_data_file() {
                return Err(HeaderError::SnapshotsWithDataFile);
            }
            if !self.snapshots_offset.is_aligned(cluster_bytes) {
                return Err(HeaderError::SnapshotsUnaligned(self.snapshots_offset));
            }
            // An entry has 40 bytes at least.
            if !inside(self.snapshots_offset, u64::from(self.snapshot_count) * 40) {
                return Err(HeaderError::SnapshotsOutside(self.snapshots_offset));
            }
        }
        self.check_overlaps()
    }

    fn check_overlaps(&self) -> Result<(), HeaderError> {
        let parts = [
            ("header", HostOffset::ZERO, 1),
            ("L1 table", self.l1_offset, u64::from(self.l1_entries) * 8),
            ("refcount table", self.refcount_table_offset, u64::from(self.refcount_table_clusters) * self.geometry.cluster_bytes()),
            ("snapshot table", self.snapshots_offset, u64::from(self.snapshot_count) * 40),
        ];
        for (index, &(first, at, len)) in parts.iter().enumerate() {
            let clusters = self.geometry.cluster_numbers(at, len);
            for &(second, other_at, other_len) in &parts[index + 1..] {
                let others = self.geometry.cluster_numbers(other_at, other_len);
                if clusters.start < others.end && others.start < clusters.end {
                    return Err(HeaderError::Overlap { first, second });
                }
            }
        }
        Ok(())
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Cluster size and table widths.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Size of the disk in bytes, whole sectors.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// How compressed clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The backing file that the image names.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Whether guest data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// The name of the external data file, if it has one and the image names it.
    pub fn data_file_name(&self) -> Option<&OsStr> {
        self.data_file_name.as_deref().filter(|_| self.has_data_file())
    }

    /// Whether the external data file is a complete raw image by itself.
    pub fn data_file_is_raw(&self) -> bool {
        self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    /// Whether there are feature bits: in version 3.
    pub(super) fn has_feature_bits(&self) -> bool {
        self.version >= 3
    }

    /// The number that whoever made the image has given it, as [`CreateOptions::mark`](super::CreateOptions::mark).
    pub fn mark(&self) -> Option<u64> {
        self.mark
    }

    /// The number of the memory in which a process keeps what the file does not have yet, or 0.
    pub fn kept_number(&self) -> u32 {
        // Truncation cuts the upper half out.
        (self.autoclear >> super::unwritten::KEPT_SHIFT) as u32
    }

    pub(super) fn forget_kept_number(&mut self) {
        self.autoclear &= (1 << super::unwritten::KEPT_SHIFT) - 1;
    }

    /// Whether refcounts may be wrong, because a program that updates them late did not end properly.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether a program has found the image to be corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether refcounts may be updated late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    /// Number of internal snapshots.
    pub fn snapshot_count(&self) -> u32 {
        self.snapshot_count
    }

    /// Persistent bitmaps that are up to date.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.bitmaps
    }

    /// The refcount table has a new place.
    pub(super) fn move_refcount_table(&mut self, at: HostOffset, clusters: u32) {
        self.refcount_table_offset = at;
        self.refcount_table_clusters = clusters;
    }

    /// The L1 table has a new place and length.
    pub(super) fn move_l1_table(&mut self, at: HostOffset, entries: u32) {
        self.l1_offset = at;
        self.l1_entries = entries;
    }

    /// Changes fields in the copy of the first sector, and returns what to write to the start of the file.
    pub(super) fn patched_sector(&mut self) -> Box<[u8]> {
        let mut put = |at: usize, bytes: &[u8]| self.first_sector[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::SIZE, &self.size.to_be_bytes());
        put(field::L1_ENTRIES, &self.l1_entries.to_be_bytes());
        put(field::L1_OFFSET, &self.l1_offset.get().to_be_bytes());
        put(field::REFCOUNT_TABLE_OFFSET, &self.refcount_table_offset.get().to_be_bytes());
        put(field::REFCOUNT_TABLE_CLUSTERS, &self.refcount_table_clusters.to_be_bytes());
        if self.version >= 3 {
            put(field::INCOMPATIBLE, &self.incompatible.to_be_bytes());
            put(field::AUTOCLEAR, &self.autoclear.to_be_bytes());
        }
        self.first_sector.clone()
    }
}

/// Whether the first bytes of a longer cluster have everything in it that means something: header, extensions and the name of the backing file.
fn is_complete(start: &[u8]) -> bool {
    let fields = Fields(start);
    let header_length = if fields.u32(4) >= 3 { fields.u32(100) } else { V2_HEADER_BYTES };
    let [mut at, start_len] = [u64::from(header_length), start.len() as u64];
    let name = Some((fields.u64(8), fields.u32(16))).filter(|(offset, _)| *offset != 0);
    let name_end = name.map_or(0, |(offset, len)| offset.saturating_add(u64::from(len)));
    if at > start_len || name_end > start_len {
        return false;
    }
    let end = name.map_or(u64::MAX, |(offset, _)| offset);
    while at + 8 <= end {
        if at + 8 > start_len {
            return false;
        }
        let extension = Fields(&start[usize::try_from(at).expect("below the length of a slice")..]);
        if extension.u32(0) == extension::END {
            return true;
        }
        at += 8 + u64::from(extension.u32(4)).next_multiple_of(8);
    }
    at <= start_len
}

/// Where in the first cluster the backing file's name is.
fn backing_range(fields: &Fields<'_>, header_length: u32, cluster_bytes: u64) -> Result<Option<Range<usize>>, HeaderError> {
    let (offset, len) = (fields.u64(8), fields.u32(16));
    if offset == 0 {
        return Ok(None);
    }
    if offset < u64::from(header_length) || offset >= cluster_bytes {
        return Err(HeaderError::BackingOffset { offset });
    }
    if u64::from(len) > (cluster_bytes - offset).min(MAX_BACKING_NAME as u64) {
        return Err(HeaderError::BackingLength(len));
    }
    let start = usize::try_from(offset).expect("below the cluster size");
    Ok(Some(start..start + len as usize))
}

fn name_from(bytes: &[u8]) -> Result<OsString, HeaderError> {
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(HeaderError::BackingName);
    }
    Ok(OsString::from_vec(bytes.to_vec()))
}

/// The extensions that are known; others stay in the file.
#[derive(Debug, Default)]
struct Extensions<'a> {
    backing_format: Option<String>,
    data_file_name: Option<OsString>,
    feature_names: &'a [u8],
    bitmaps: Option<&'a [u8]>,
    encryption: bool,
    mark: Option<u64>,
}

impl<'a> Extensions<'a> {
    fn parse(cluster: &'a [u8], area: Range<usize>) -> Result<Self, HeaderError> {
        let mut found = Self::default();
        let mut seen = BTreeSet::new();
        let mut at = area.start;
        while at + 8 <= area.end {
            let fields = Fields(&cluster[at..at + 8]);
            let (kind, length) = (fields.u32(0), fields.u32(4));
            if kind == extension::END {
                break;
            }
            let data_start = at + 8;
            if length as usize > area.end - data_start {
                return Err(HeaderError::ExtensionLength { kind, length, at: at as u64 });
            }
            let data = &cluster[data_start..data_start + length as usize];
            at = data_start + data.len().next_multiple_of(8);
            if !seen.insert(kind) {
                return Err(HeaderError::ExtensionTwice(kind));
            }
            match kind {
                extension::BACKING_FORMAT => found.backing_format = Some(text(data, "format of the backing file")?.to_owned()),
                extension::DATA_FILE_NAME => {
                    if data.is_empty() || data.contains(&0) {
                        return Err(HeaderError::ExtensionText("name of the data file"));
                    }
                    found.data_file_name = Some(OsStr::from_bytes(data).to_owned());
                }
                extension::FEATURE_NAMES => found.feature_names = data,
                extension::BITMAPS => found.bitmaps = Some(data),
                extension::ENCRYPTION => found.encryption = true,
                extension::MARK => found.mark = data.try_into().ok().map(u64::from_be_bytes),
                _ => {}
            }
        }
        Ok(found)
    }

    /// Names of incompatible features for an error message, from the image's own table where it has them.
    fn names_of(&self, bits: u64) -> Vec<String> {
        (0..64)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| {
                let entry = self.feature_names.chunks_exact(48).find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit);
                let name = entry.map(|entry| entry[2..].split(|&byte| byte == 0).next().unwrap_or_default());
                match name {
                    // The name is the image's word and goes to logs: printable characters only.
                    Some(name) if !name.is_empty() => {
                        let printable = String::from_utf8_lossy(name).replace(|c: char| c.is_control(), "?");
                        format!("\"{printable}\" (bit {bit})")
                    }
                    _ => format!("bit {bit}"),
                }
            })
            .collect()
    }

    fn checked_bitmaps(&self, cluster_bytes: u64) -> Result<Option<BitmapsExtension>, HeaderError> {
        let Some(data) = self.bitmaps else {
            return Err(HeaderError::Bitmaps("its feature bit is set, but it is missing"));
        };
        if data.len() != 24 {
            return Err(HeaderError::Bitmaps("it is not 24 bytes long"));
        }
        let fields = Fields(data);
        let bitmaps = BitmapsExtension { count: fields.u32(0), directory_bytes: fields.u64(8), directory: HostOffset::new(fields.u64(16)) };
        if fields.u32(4) != 0 {
            return Err(HeaderError::Bitmaps("its reserved field is not zero"));
        }
        if bitmaps.count == 0 || bitmaps.count > 65_535 {
            return Err(HeaderError::Bitmaps("the number of bitmaps is not 1 to 65535"));
        }
        if bitmaps.directory == HostOffset::ZERO || !bitmaps.directory.is_aligned(cluster_bytes) {
            return Err(HeaderError::Bitmaps("the directory is not on a cluster boundary"));
        }
        // 24 bytes is the least an entry takes, 64 MiB QEMU's limit.
        if bitmaps.directory_bytes < u64::from(bitmaps.count) * 24 || bitmaps.directory_bytes > 64 << 20 {
            return Err(HeaderError::Bitmaps("the size of the directory does not fit the number of bitmaps"));
        }
        if bitmaps.directory.get().checked_add(bitmaps.directory_bytes).is_none() {
            return Err(HeaderError::Bitmaps("the directory is outside the file"));
        }
        Ok(Some(bitmaps))
    }
}

fn text<'a>(data: &'a [u8], what: &'static str) -> Result<&'a str, HeaderError> {
    match std::str::from_utf8(data) {
        Ok(text) if !text.is_empty() && !text.contains(char::is_control) => Ok(text),
        _ => Err(HeaderError::ExtensionText(what)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::{MemoryFile, plain_header, run};

    /// A first cluster with an extension of so many bytes that means nothing to us, and the name of a backing file right after all extensions, by
    /// qemu's docs/interop/qcow2.rst.
    fn cluster(extension: usize, name: Option<&str>) -> Vec<u8> {
        let mut bytes = plain_header();
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(104, &0x1234_5678_u32.to_be_bytes());
        put(108, &u32::try_from(extension).expect("short").to_be_bytes());
        let at = 112 + extension.next_multiple_of(8);
        put(at, &self::extension::MARK.to_be_bytes());
        put(at + 4, &8_u32.to_be_bytes());
        put(at + 8, &7_u64.to_be_bytes());
        if let Some(name) = name {
            put(8, &(at as u64 + 24).to_be_bytes());
            put(16, &u32::try_from(name.len()).expect("short").to_be_bytes());
            put(at + 24, name.as_bytes());
        }
        bytes
    }

    #[test]
    fn a_header_means_the_same_wherever_its_parts_lie() {
        for name in [None, Some("base"), Some("a longer name of an image")] {
            for extension in [0, 1, 8, 3000, 5000, 60_000].into_iter().chain(3900..4000) {
                let cluster = cluster(extension, name);
                let end = 112 + extension.next_multiple_of(8) + 24 + name.map_or(0, str::len);
                let is_near = end <= FIRST_BYTES;
                assert_eq!(is_complete(&cluster[..FIRST_BYTES]), is_near, "an extension of {extension} bytes, {name:?}");
                let mut file = cluster;
                file.resize(4 << 16, 0);
                let header = run(async move { Header::read(&MemoryFile::from_bytes(file)).await }).expect("a header");
                assert_eq!(header.mark(), Some(7));
                assert_eq!(header.backing().map(|backing| backing.name.to_str()), name.map(Some));
            }
        }
    }

    #[test]
    fn an_extension_that_runs_into_the_name_is_found_wherever_it_lies() {
        for extension in [0, 3000, 3984, 3992, 5000] {
            let mut file = cluster(extension, Some("base"));
            let at = 112 + extension.next_multiple_of(8);
            file[at + 4..at + 8].copy_from_slice(&17_u32.to_be_bytes());
            file.resize(4 << 16, 0);
            let error = run(async move { Header::read(&MemoryFile::from_bytes(file)).await }).expect_err("no room");
            assert!(matches!(error, HeaderError::ExtensionLength { .. }), "{error}");
        }
    }
}

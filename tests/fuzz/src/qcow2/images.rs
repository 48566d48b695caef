//! Sound images to begin with, after qemu's docs/interop/qcow2.rst, and ways to damage them. They are small, so that many fit into a second.

use std::io::Write as _;

use crate::source::Source;

/// An entry says that its cluster has the refcount 1.
const COPIED: u64 = 1 << 63;
/// An entry is of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// Clusters of the images, in this order.
const REFCOUNT_TABLE: usize = 1;
const REFCOUNT_BLOCK: usize = 2;
const L1: usize = 3;
const L2: usize = 4;
const DATA: usize = 5;
const SNAPSHOTS: usize = 6;
const SNAPSHOT_L1: usize = 7;
const COMPRESSED_DATA: usize = 8;
const BITMAPS: usize = 9;
const BITMAP_TABLE: usize = 10;
const BITMAP: usize = 11;
const CLUSTERS: usize = 12;

/// Bytes of the disks.
const DISK: u64 = 24 << 10;
/// Where header extensions begin.
const EXTENSIONS: usize = 112;
/// The extensions of bitmaps, and of the backing file's format.
const BITMAPS_KIND: u32 = 0x2385_2875;
const FORMAT_KIND: u32 = 0xe279_2aca;
/// Where the backing file's name is.
const NAME_AT: usize = 240;

/// The bytes of an image file.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    cluster: usize,
}

/// All kinds.
pub(super) fn all() -> Vec<Image> {
    vec![
        Image::new(512, 3),
        Image::new(512, 2),
        Image::new(4096, 3),
        Image::new(512, 3).with_snapshot().with_compressed(),
        Image::new(512, 3).with_bitmap(),
        Image::new(512, 3).with_backing(),
        Image::new(16384, 3).extended(),
        Image::new(512, 3).with_backing().with_bitmap().with_snapshot(),
    ]
}

impl Image {
    /// The guest's first cluster is full of ones; the rest of the disk has no place in the file.
    fn new(cluster: usize, version: u32) -> Self {
        let mut image = Self { bytes: vec![0; CLUSTERS * cluster], cluster };
        image.put(0, b"QFI\xfb");
        image.put32(4, version).put32(20, cluster.trailing_zeros()).put64(24, DISK);
        let entries = (cluster / 8) as u64 * cluster as u64;
        let at = |number: usize| (number * cluster) as u64;
        image.put32(36, DISK.div_ceil(entries) as u32).put64(40, at(L1)).put64(48, at(REFCOUNT_TABLE)).put32(56, 1);
        if version == 3 {
            image.put32(96, 4).put32(100, EXTENSIONS as u32);
        }
        image.put64(REFCOUNT_TABLE * cluster, at(REFCOUNT_BLOCK));
        for used in [0, REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, DATA] {
            image.count(used);
        }
        image.put64(L1 * cluster, at(L2) | COPIED);
        image.put64(L2 * cluster, at(DATA) | COPIED);
        image.bytes[DATA * cluster..(DATA + 1) * cluster].fill(1);
        image
    }

    /// An internal snapshot of the empty disk.
    fn with_snapshot(mut self) -> Self {
        let (table, snapshots, l1) = (SNAPSHOTS * self.cluster, self.at(SNAPSHOTS), self.at(SNAPSHOT_L1));
        let l1_entries = self.bytes[36..40].to_vec();
        self.put32(60, 1).put64(64, snapshots).count(SNAPSHOTS).count(SNAPSHOT_L1).put64(table, l1).put(table + 8, &l1_entries);
        self.put(table + 12, &[0, 1, 0, 4]).put32(table + 36, 16).put64(table + 48, DISK).put(table + 56, b"1name");
        self
    }

    /// The guest's second cluster is compressed.
    fn with_compressed(mut self) -> Self {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&vec![7; self.cluster]).expect("writing to memory");
        let compressed = encoder.finish().expect("writing to memory");
        let (at, entry) = (self.at(COMPRESSED_DATA), L2 * self.cluster + 8);
        self.put(at as usize, &compressed).put64(entry, COMPRESSED | at).count(COMPRESSED_DATA);
        self
    }

    /// A persistent bitmap of another program.
    fn with_bitmap(mut self) -> Self {
        let (directory, table, bitmap) = (BITMAPS * self.cluster, BITMAP_TABLE * self.cluster, self.at(BITMAP));
        let extension = [&1_u32.to_be_bytes()[..], &[0; 4], &32_u64.to_be_bytes(), &self.at(BITMAPS).to_be_bytes()].concat();
        self.put64(88, 1).extend(BITMAPS_KIND, &extension);
        self.put64(directory, table as u64).put32(directory + 8, 1).put32(directory + 12, 2);
        self.put(directory + 16, &[1, 16, 0, 4]).put(directory + 24, b"name").put64(table, bitmap);
        self.count(BITMAPS).count(BITMAP_TABLE).count(BITMAP);
        self
    }

    /// A raw image beneath, which is shorter.
    fn with_backing(mut self) -> Self {
        const NAME: &[u8] = b"base.raw";
        self.put64(8, NAME_AT as u64).put32(16, NAME.len() as u32).put(NAME_AT, NAME).extend(FORMAT_KIND, b"raw");
        self
    }

    /// The same with sub-clusters.
    fn extended(mut self) -> Self {
        let bitmap = L2 * self.cluster + 8;
        self.put64(72, 1 << 4).put64(bitmap, 0xffff_ffff);
        self
    }

    /// Whether there are bitmaps that a program may rely on.
    pub(super) fn has_valid_bitmaps(&self) -> bool {
        self.bytes.get(95).is_some_and(|byte| byte & 1 != 0)
    }

    /// Adds a header extension after those that are there.
    fn extend(&mut self, kind: u32, data: &[u8]) {
        let word = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let mut at = EXTENSIONS;
        while word(&self.bytes, at) != 0 {
            at += 8 + (word(&self.bytes, at + 4) as usize).next_multiple_of(8);
        }
        self.put32(at, kind).put32(at + 4, data.len() as u32).put(at + 8, data);
    }

    fn at(&self, cluster: usize) -> u64 {
        (cluster * self.cluster) as u64
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn put32(&mut self, at: usize, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn put64(&mut self, at: usize, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Sets the refcount of a cluster to 1.
    fn count(&mut self, cluster: usize) -> &mut Self {
        let blocks = REFCOUNT_BLOCK * self.cluster;
        self.put(blocks + 2 * cluster, &[0, 1])
    }

    /// Changes one place as the input says.
    pub(super) fn damage(&mut self, source: &mut Source<'_>) {
        let kind = source.u8();
        // The header, or the beginning of another cluster.
        let cluster = usize::from(kind >> 4) % CLUSTERS;
        let offset = source.below(self.cluster.min(256));
        let place = cluster * self.cluster + offset;
        let (word, half) = ((place & !7), (place & !3));
        match kind & 15 {
            0..=2 => self.write(place, &[source.u8()]),
            3 => self.write(half, &source.bytes::<4>()),
            4 => self.write(word, &source.bytes::<8>()),
            5..=9 => {
                // As an entry: a cluster, and flags.
                let at = source.below(CLUSTERS + 4) * self.cluster;
                let flags = source.u8();
                let low = u64::from(flags & 7) << if flags & 8 != 0 { 0 } else { 9 };
                self.write(word, &(at as u64 | u64::from(flags >> 6) << 62 | low).to_be_bytes());
            }
            10 => {
                let bit = source.below(8);
                if let Some(byte) = self.bytes.get_mut(place) {
                    *byte ^= 1 << bit;
                }
            }
            11 => self.write(REFCOUNT_BLOCK * self.cluster + (place & !1) % 64, &u16::from(source.u8()).to_be_bytes()),
            12 => {
                // One entry where another is.
                let from = source.below(64) * 8 + cluster * self.cluster;
                if let Some(bytes) = self.bytes.get(from..from + 8).map(<[u8]>::to_vec) {
                    self.write(word, &bytes);
                }
            }
            13 => self.bytes.truncate(place),
            14 => self.bytes.resize(self.bytes.len() + offset * 16, 0),
            _ => self.write(word, &(u64::MAX >> source.below(64)).to_be_bytes()),
        }
    }

    /// Writes as far as the file goes.
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = self.bytes.len();
        for (place, byte) in (at..end).zip(bytes) {
            self.bytes[place] = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_are_sound() {
        use snapfence_image_format::qcow2::{CheckOptions, check};
        use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, MemoryEnvironment};

        for (number, image) in all().into_iter().enumerate() {
            let environment = MemoryEnvironment::new();
            environment.put("/image", &image.bytes);
            let inner = environment.clone();
            let report = environment.block_on(async move {
                let file = inner.open(&Location::Trusted("/image".into()), Access::Read, CacheMode::Direct).await.expect("a file");
                check(&file, &CheckOptions::default()).await.expect("a header that makes sense")
            });
            assert!(report.is_clean(), "{number}: {report:#?}");
        }
    }
}

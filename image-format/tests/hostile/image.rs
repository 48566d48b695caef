//! A small sound image, byte by byte after qemu's docs/interop/qcow2.rst, to be damaged.

use std::io::Write as _;

/// Bytes in a cluster.
pub(crate) const CLUSTER: usize = 64 << 10;
/// Size of the disk.
pub(crate) const SIZE: u64 = 1 << 20;
/// An entry says that its cluster has the refcount 1.
pub(crate) const COPIED: u64 = 1 << 63;
/// An entry is of a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;

/// Where everything is; one cluster each, in this order after the header.
pub(crate) const REFCOUNT_TABLE: usize = CLUSTER;
pub(crate) const REFCOUNT_BLOCK: usize = 2 * CLUSTER;
pub(crate) const L1: usize = 3 * CLUSTER;
pub(crate) const L2: usize = 4 * CLUSTER;
pub(crate) const DATA: usize = 5 * CLUSTER;
pub(crate) const SNAPSHOTS: usize = 6 * CLUSTER;
pub(crate) const SNAPSHOT_L1: usize = 7 * CLUSTER;
pub(crate) const COMPRESSED_DATA: usize = 8 * CLUSTER;
pub(crate) const CLUSTERS: usize = 9;

/// The bytes of an image file.
#[derive(Clone, Debug)]
pub(crate) struct Image(pub(crate) Vec<u8>);

impl Image {
    /// The guest's first cluster is full of ones, the second (compressed) of sevens, the third reads as zeros; there is one internal snapshot
    /// of an empty disk.
    pub(crate) fn sound() -> Self {
        let mut image = Self(vec![0; CLUSTERS * CLUSTER]);
        image.put(0, b"QFI\xfb");
        image.put32(4, 3).put32(20, 16).put64(24, SIZE);
        image.put32(36, 1).put64(40, L1 as u64).put64(48, REFCOUNT_TABLE as u64).put32(56, 1);
        image.put32(60, 1).put64(64, SNAPSHOTS as u64);
        image.put32(96, 4).put32(100, 112);
        image.put64(REFCOUNT_TABLE, REFCOUNT_BLOCK as u64);
        for cluster in 0..CLUSTERS {
            image.put(REFCOUNT_BLOCK + 2 * cluster, &[0, 1]);
        }
        image.put64(L1, L2 as u64 | COPIED);
        image.put64(L2, DATA as u64 | COPIED);
        let compressed = deflate(&[7; CLUSTER]);
        image.put64(L2 + 8, COMPRESSED | COMPRESSED_DATA as u64);
        image.put64(L2 + 16, 1);
        image.0[DATA..DATA + CLUSTER].fill(1);
        image.put64(SNAPSHOTS, SNAPSHOT_L1 as u64).put32(SNAPSHOTS + 8, 1);
        image.put(SNAPSHOTS + 12, &[0, 1, 0, 4]).put32(SNAPSHOTS + 36, 16).put64(SNAPSHOTS + 48, SIZE).put(SNAPSHOTS + 56, b"1name");
        image.put(COMPRESSED_DATA, &compressed);
        image
    }

    /// The same with sub-clusters.
    pub(crate) fn extended() -> Self {
        let mut image = Self::sound();
        image.put64(72, 1 << 4);
        image.0[L2..L2 + CLUSTER].fill(0);
        image.put64(L2, DATA as u64 | COPIED).put64(L2 + 8, 0xffff_ffff);
        image.put64(L2 + 16, COMPRESSED | COMPRESSED_DATA as u64);
        image.put64(L2 + 40, 0xffff_ffff << 32);
        image
    }

    /// The same in version 2, which has neither zero clusters nor feature bits.
    pub(crate) fn version_2() -> Self {
        let mut image = Self::sound();
        image.put32(4, 2);
        image.0[72..112].fill(0);
        image.put64(L2 + 16, 0);
        image
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn put32(&mut self, at: usize, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn put64(&mut self, at: usize, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Sets the refcount of the cluster at `at`.
    pub(crate) fn count(&mut self, at: usize, refcount: u16) -> &mut Self {
        self.put(REFCOUNT_BLOCK + at / CLUSTER * 2, &refcount.to_be_bytes())
    }

    /// Adds a header extension after those that are there, with `length` as its length whatever it has.
    pub(crate) fn extend(&mut self, kind: u32, data: &[u8], length: u32) -> &mut Self {
        let mut at = 112;
        while self.0[at..at + 4] != [0; 4] {
            let length = u32::from_be_bytes(self.0[at + 4..at + 8].try_into().expect("four bytes")) as usize;
            at += 8 + length.next_multiple_of(8);
        }
        self.put32(at, kind).put32(at + 4, length).put(at + 8, data)
    }

    /// Names a backing file, with its format in an extension.
    pub(crate) fn back(&mut self, name: &[u8], format: Option<&str>) -> &mut Self {
        if let Some(format) = format {
            self.extend(0xe279_2aca, format.as_bytes(), format.len() as u32);
        }
        self.put64(8, 0x1000).put32(16, name.len() as u32).put(0x1000, name)
    }

    pub(crate) fn truncate(&mut self, len: usize) -> &mut Self {
        self.0.truncate(len);
        self
    }
}

/// Raw deflate, as in qcow2.
pub(crate) fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).expect("writing to memory");
    encoder.finish().expect("writing to memory")
}

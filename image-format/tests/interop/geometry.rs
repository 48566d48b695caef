//! Layouts of images.

use snapfence_image_format::qcow2::{Compression, CreateOptions, Preallocate};
use snapfence_image_format::storage::Chance;

use crate::disk::SECTOR;

/// How a qcow2 image is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) refcount_bits: u32,
    pub(crate) lazy_refcounts: bool,
    pub(crate) zstd: bool,
    pub(crate) preallocates: bool,
}

impl Geometry {
    pub(crate) fn new(chance: &mut Chance, has_backing: bool) -> Self {
        let version = if chance.happens(1, 4) { 2 } else { 3 };
        let extended_l2 = version == 3 && chance.happens(1, 2);
        let cluster_bits = match chance.below(4) {
            0 => 16,
            1 => 9 + chance.below(13) as u32,
            _ => 9 + chance.below(9) as u32,
        };
        Self {
            version,
            cluster_bits: if extended_l2 { cluster_bits.max(14) } else { cluster_bits },
            extended_l2,
            refcount_bits: if version == 2 { 16 } else { [16, 16, 1, 2, 4, 8, 32, 64][chance.index(8)] },
            lazy_refcounts: version == 3 && chance.happens(1, 4),
            zstd: version == 3 && chance.happens(1, 2),
            preallocates: (!has_backing || extended_l2) && chance.happens(1, 6),
        }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// As `qemu-img create -o` takes it.
    pub(crate) fn for_qemu(&self) -> String {
        let switch = |on| if on { "on" } else { "off" };
        let mut options = format!("cluster_size={}", self.cluster());
        if self.version == 2 {
            options += ",compat=0.10";
        } else {
            options += &format!(
                ",compat=1.1,extended_l2={},refcount_bits={},lazy_refcounts={},compression_type={}",
                switch(self.extended_l2),
                self.refcount_bits,
                switch(self.lazy_refcounts),
                if self.zstd { "zstd" } else { "zlib" }
            );
        }
        if self.preallocates {
            options += ",preallocation=metadata";
        }
        options
    }

    pub(crate) fn for_us(&self, virtual_size: u64, backing: Option<(&str, &str)>) -> CreateOptions {
        CreateOptions {
            virtual_size,
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_bits: self.refcount_bits,
            extended_l2: self.extended_l2,
            backing: backing.map(|(name, format)| (name.into(), format.into())),
            lazy_refcounts: self.lazy_refcounts,
            compression: if self.zstd { Compression::Zstd } else { Compression::Deflate },
            preallocate: if self.preallocates { Preallocate::Metadata } else { Preallocate::None },
            // QEMU does not know it, and must not mind.
            mark: (self.cluster_bits >= 12).then_some(7),
        }
    }
}

/// A size for a disk: a few MiB, seldom many.
pub(crate) fn size(chance: &mut Chance) -> u64 {
    let most_bits = if chance.happens(1, 12) { 26 } else { 18 + chance.below(6) };
    let sectors = 1 + chance.below((1 << most_bits) / SECTOR as u64);
    if chance.happens(1, 3) { (sectors * SECTOR as u64).next_multiple_of(1 << 16) } else { sectors * SECTOR as u64 }
}

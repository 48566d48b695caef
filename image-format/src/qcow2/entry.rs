//! L2 entries: packed words on one side, what they mean on the other.

use crate::extent::Mapping;
use crate::units::HostOffset;

use super::geometry::{Geometry, HOST_LIMIT};

/// Refcount exactly one: the cluster may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// The entry is of a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros; not with extended L2 entries.
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55 of a table entry: a position in the file.
pub(super) const OFFSET_MASK: u64 = (HOST_LIMIT - 1) & !0x1ff;
/// Bits that must be clear in an L1 entry.
pub(super) const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
/// Bits that must be clear in the first word of an L2 entry for a standard cluster.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What an L2 entry says about one guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Standard cluster.
    Standard(Standard),
    /// Compressed bytes anywhere in the file.
    Compressed(CompressedExtent),
}

/// A standard cluster. Without extended L2 entries the masks have one bit only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standard {
    /// The host cluster, if there is one. It may be there without any sub-cluster being allocated.
    pub(super) host: Option<HostOffset>,
    /// Nothing else refers to the host cluster.
    pub(super) copied: bool,
    /// Sub-clusters whose bytes stand in the host cluster.
    pub(super) allocated: u32,
    /// Sub-clusters that read as zeros. Has no bit in common with `allocated`.
    pub(super) zero: u32,
}

/// Where the bytes of a compressed cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CompressedExtent {
    /// First byte; not aligned.
    pub(super) at: HostOffset,
    /// Bytes up to the end of the last sector, at most two clusters.
    pub(super) len: u64,
}

/// How to read L2 entries of one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryFormat {
    pub(super) geometry: Geometry,
    /// Version 3 has zero clusters.
    pub(super) has_zero: bool,
    /// Guest data is in an external file, where positions are those of the guest.
    pub(super) external_data: bool,
}

impl Standard {
    /// Nothing at all.
    pub(super) const UNALLOCATED: Self = Self { host: None, copied: false, allocated: 0, zero: 0 };

    /// What sub-cluster `index` maps to, from its first byte on.
    pub(super) fn mapping(&self, index: u32, subcluster_bytes: u64) -> Mapping {
        match self.host {
            Some(host) if self.allocated & (1 << index) != 0 => {
                Mapping::Data { host: host + u64::from(index) * subcluster_bytes, in_place: self.copied }
            }
            _ if self.zero & (1 << index) != 0 => Mapping::Zero,
            _ => Mapping::Unallocated,
        }
    }
}

impl EntryFormat {
    /// Takes an entry apart. `bitmap` is the second word with extended L2 entries, else 0.
    ///
    /// # Errors
    /// What is wrong with it, in a few words.
    pub(super) fn decode(&self, word: u64, bitmap: u64) -> Result<Entry, &'static str> {
        if word & COMPRESSED != 0 {
            return self.decode_compressed(word, bitmap).map(Entry::Compressed);
        }
        if word & L2_RESERVED != 0 {
            return Err("reserved bits of an entry are set");
        }
        let offset = HostOffset::new(word & OFFSET_MASK);
        if !offset.is_aligned(self.geometry.cluster_bytes()) {
            return Err("an entry points between clusters");
        }
        let copied = word & COPIED != 0;
        let host = (offset != HostOffset::ZERO || (copied && self.external_data)).then_some(offset);
        if host.is_none() && copied {
            return Err("an entry points to the header");
        }
        let zero_flag = word & ZERO != 0;
        let (allocated, zero) = if self.geometry.extended_l2() {
            if zero_flag {
                return Err("an extended entry has the zero flag of a plain one");
            }
            ((bitmap & u64::from(u32::MAX)) as u32, (bitmap >> 32) as u32)
        } else if zero_flag {
            if !self.has_zero {
                return Err("a zero cluster in a version 2 image");
            }
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        if allocated & zero != 0 {
            return Err("a sub-cluster is both allocated and zero");
        }
        if allocated != 0 && host.is_none() {
            return Err("a sub-cluster is allocated without a cluster");
        }
        Ok(Entry::Standard(Standard { host, copied, allocated, zero }))
    }

    fn decode_compressed(&self, word: u64, bitmap: u64) -> Result<CompressedExtent, &'static str> {
        if self.external_data {
            return Err("a compressed cluster in an image with an external data file");
        }
        if bitmap != 0 {
            return Err("a compressed cluster has a sub-cluster bitmap");
        }
        if word & COPIED != 0 {
            return Err("a compressed cluster claims to be writable in place");
        }
        let (at, len) = self.compressed_place(word);
        if at.get() >= HOST_LIMIT {
            return Err("a compressed cluster lies beyond all positions");
        }
        if at.get() < 512 {
            return Err("a compressed cluster lies in the header");
        }
        Ok(CompressedExtent { at, len })
    }

    /// Position and length of a compressed cluster, whatever they are.
    pub(super) fn compressed_place(&self, word: u64) -> (HostOffset, u64) {
        let offset_bits = 62 - (self.geometry.cluster_bits() - 8);
        let at = word & ((1 << offset_bits) - 1);
        let sectors = ((word & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        (HostOffset::new(at), sectors * 512 - (at & 511))
    }

    /// The words of an entry for a standard cluster; the second is 0 without extended L2 entries.
    pub(super) fn encode(&self, entry: Standard) -> (u64, u64) {
        let mut word = entry.host.map_or(0, HostOffset::get);
        if entry.copied && entry.host.is_some() {
            word |= COPIED;
        }
        if self.geometry.extended_l2() {
            return (word, u64::from(entry.allocated) | u64::from(entry.zero) << 32);
        }
        if entry.zero != 0 {
            word |= ZERO;
        }
        (word, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(cluster_bits: u32, extended_l2: bool) -> EntryFormat {
        EntryFormat { geometry: Geometry::new(cluster_bits, extended_l2, 4), has_zero: true, external_data: false }
    }

    #[test]
    fn entries_survive_a_round_trip() {
        let host = Some(HostOffset::new(0x50000));
        for (extended, entry) in [
            (false, Standard::UNALLOCATED),
            (false, Standard { host, copied: true, allocated: 1, zero: 0 }),
            (false, Standard { host, copied: false, allocated: 1, zero: 0 }),
            (false, Standard { host: None, copied: false, allocated: 0, zero: 1 }),
            (false, Standard { host, copied: true, allocated: 0, zero: 1 }),
            (true, Standard { host, copied: true, allocated: 0x8000_0001, zero: 0x7000_0000 }),
            (true, Standard { host: None, copied: false, allocated: 0, zero: u32::MAX }),
        ] {
            let format = format(16, extended);
            let (word, bitmap) = format.encode(entry);
            assert_eq!(format.decode(word, bitmap), Ok(Entry::Standard(entry)));
        }
    }

    #[test]
    fn compressed_extents_end_with_their_last_sector() {
        // 64 KiB clusters: 54 bits of position, then sectors beyond the first.
        let word = COMPRESSED | 2 << 54 | 0x12345;
        assert_eq!(
            format(16, false).decode(word, 0),
            Ok(Entry::Compressed(CompressedExtent { at: HostOffset::new(0x12345), len: 3 * 512 - 0x145 }))
        );
        // 512-byte clusters: bits 56 to 60 must be clear.
        assert!(format(9, false).decode(COMPRESSED | 1 << 57 | 0x1000, 0).is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        let plain = format(16, false);
        let extended = format(16, true);
        assert!(plain.decode(0x50002, 0).is_err());
        assert!(plain.decode(1 << 56 | 0x50000, 0).is_err());
        assert!(plain.decode(0x50200, 0).is_err());
        assert!(plain.decode(COPIED, 0).is_err());
        assert!(EntryFormat { has_zero: false, ..plain }.decode(1, 0).is_err());
        assert!(EntryFormat { external_data: true, ..plain }.decode(COMPRESSED | 0x50000, 0).is_err());
        assert!(extended.decode(0x50001, 0).is_err());
        assert!(extended.decode(0x50000, 1 << 32 | 1).is_err());
        assert!(extended.decode(0, 1).is_err());
        assert!(extended.decode(COMPRESSED | 0x50000, 1).is_err());
        assert!(plain.decode(COPIED | COMPRESSED | 0x50000, 0).is_err());
    }

    #[test]
    fn position_zero_with_copied_is_data_only_in_an_external_file() {
        let external = EntryFormat { external_data: true, ..format(16, false) };
        let expected = Standard { host: Some(HostOffset::ZERO), copied: true, allocated: 1, zero: 0 };
        assert_eq!(external.decode(COPIED, 0), Ok(Entry::Standard(expected)));
        assert_eq!(external.decode(0, 0), Ok(Entry::Standard(Standard::UNALLOCATED)));
    }
}

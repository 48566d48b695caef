//! Positions and lengths, each with the meaning that a bare integer would lose.
//!
//! All of them count bytes. The only sizes that count something else are clusters, and those convert in one place: the geometry of the image
//! that they belong to.

use std::fmt;
use std::ops::{Add, Sub};

/// Bytes in a sector, as virtio-blk counts them (VIRTIO 1.3, 5.2.6). Every guest request starts and ends on a sector.
pub const SECTOR_BYTES: u64 = 512;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The start.
            pub const ZERO: Self = Self(0);

            /// The position `bytes` after the start.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// Bytes from the start.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The position `bytes` further on, or `None` past the end of the number range.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// Whether this is a multiple of `alignment`, a power of two.
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }

            /// The next lower multiple of `alignment`, a power of two.
            #[must_use]
            pub const fn align_down(self, alignment: u64) -> Self {
                Self(self.0 & !(alignment - 1))
            }

            /// The next higher multiple of `alignment`, a power of two. Saturates at the last multiple.
            #[must_use]
            pub const fn align_up(self, alignment: u64) -> Self {
                Self(self.0.saturating_add(alignment - 1) & !(alignment - 1))
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        /// Bytes from `other` up to `self`.
        impl Sub for $name {
            type Output = u64;
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset! {
    /// Byte position on the disk that the guest sees. Says nothing about any image file.
    GuestOffset
}

offset! {
    /// Byte position in one image file (or block device).
    HostOffset
}

/// A run of bytes of the guest's disk: `start` up to, not including, `start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestOffset,
    /// Number of bytes.
    pub len: u64,
}

impl GuestRange {
    /// The `len` bytes from `start` on. `start + len` must fit in 64 bits, which whoever parsed the request has checked.
    pub const fn new(start: GuestOffset, len: u64) -> Self {
        Self { start, len }
    }

    /// The range from `start` up to `end`; empty when `end` is not after `start`.
    pub fn between(start: GuestOffset, end: GuestOffset) -> Self {
        Self { start, len: end.get().saturating_sub(start.get()) }
    }

    /// First byte after the range.
    pub fn end(self) -> GuestOffset {
        self.start + self.len
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether both have a byte in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The bytes that both have (possibly none).
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Whether start and end are multiples of `alignment`, a power of two.
    pub fn is_aligned(self, alignment: u64) -> bool {
        self.start.is_aligned(alignment) && self.end().is_aligned(alignment)
    }

    /// The smallest range of whole `alignment` units around this one.
    #[must_use]
    pub fn widen(self, alignment: u64) -> Self {
        Self::between(self.start.align_down(alignment), self.end().align_up(alignment))
    }

    /// The largest range of whole `alignment` units inside this one (possibly none).
    #[must_use]
    pub fn shrink(self, alignment: u64) -> Self {
        Self::between(self.start.align_up(alignment), self.end().align_down(alignment))
    }

    /// The same bytes cut at every multiple of `unit`, a power of two, in order.
    pub fn split_at_multiples(self, unit: u64) -> impl Iterator<Item = GuestRange> {
        let mut next = self.start;
        let end = self.end();
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let piece_end = (next + 1).align_up(unit).min(end);
            let piece = GuestRange::between(next, piece_end);
            next = piece_end;
            Some(piece)
        })
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), len)
    }

    #[test]
    fn ranges_split_at_every_multiple() {
        let pieces: Vec<_> = range(3, 10).split_at_multiples(4).collect();
        assert_eq!(pieces, [range(3, 1), range(4, 4), range(8, 4), range(12, 1)]);
        assert_eq!(range(8, 0).split_at_multiples(4).count(), 0);
    }

    #[test]
    fn shrinking_a_range_without_a_whole_unit_leaves_nothing() {
        assert!(range(5, 2).shrink(4).is_empty());
        assert_eq!(range(3, 10).shrink(4), range(4, 8));
        assert_eq!(range(3, 10).widen(4), range(0, 16));
    }

    #[test]
    fn aligning_up_saturates_instead_of_wrapping() {
        assert_eq!(HostOffset::new(u64::MAX).align_up(512), HostOffset::new(u64::MAX - 511));
    }
}

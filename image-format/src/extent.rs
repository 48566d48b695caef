//! What one layer says about a part of the guest's disk.

use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Where the bytes of an extent are, as far as one layer knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// This layer has nothing: the layer beneath decides, and where there is none the bytes are zero.
    Unallocated,
    /// The bytes are zero, whatever lies beneath.
    Zero,
    /// The bytes stand in the layer's file from `host` on.
    Data {
        /// Position of the extent's first byte.
        host: HostOffset,
        /// Whether the layer may overwrite them there: nothing else in the file (an internal snapshot) refers to them.
        in_place: bool,
    },
    /// The bytes are part of a compressed cluster.
    Compressed,
}

/// A run of bytes of the guest's disk with one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes.
    pub range: GuestRange,
    /// Where they are.
    pub mapping: Mapping,
}

impl Extent {
    /// The part of the extent inside `range`, with the mapping moved along.
    #[must_use]
    pub fn clip(self, range: GuestRange) -> Self {
        let clipped = self.range.intersection(range);
        let mapping = match self.mapping {
            Mapping::Data { host, in_place } if !clipped.is_empty() => {
                Mapping::Data { host: host + (clipped.start - self.range.start), in_place }
            }
            other => other,
        };
        Self { range: clipped, mapping }
    }

    /// Whether `next` goes on where this ends, in the guest's disk and in the file.
    pub fn continues_with(&self, next: &Extent) -> bool {
        self.range.end() == next.range.start
            && match (self.mapping, next.mapping) {
                (Mapping::Data { host, in_place }, Mapping::Data { host: next_host, in_place: next_in_place }) => {
                    host.checked_add(self.range.len) == Some(next_host) && in_place == next_in_place
                }
                (this, next) => this == next,
            }
    }
}

/// Extents in ascending order without gaps; neighbours that continue one another are merged.
#[derive(Clone, Debug, Default)]
pub struct ExtentList(Vec<Extent>);

impl ExtentList {
    /// No extents.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds an extent after the last one. Empty ones are ignored.
    pub fn push(&mut self, extent: Extent) {
        if extent.range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.continues_with(&extent) => last.range.len += extent.range.len,
            _ => self.0.push(extent),
        }
    }

    /// The extents so far.
    pub fn as_slice(&self) -> &[Extent] {
        &self.0
    }

    /// Where the next extent must start, or `None` while there is none.
    pub fn end(&self) -> Option<GuestOffset> {
        self.0.last().map(|last| last.range.end())
    }

    /// Forgets all extents and keeps the memory.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(start: u64, len: u64, host: u64) -> Extent {
        let range = GuestRange::new(GuestOffset::new(start), len);
        Extent { range, mapping: Mapping::Data { host: HostOffset::new(host), in_place: true } }
    }

    #[test]
    fn neighbours_merge_only_when_their_bytes_are_neighbours_in_the_file() {
        let mut list = ExtentList::new();
        list.push(data(0, 512, 4096));
        list.push(data(512, 512, 4608));
        list.push(data(1024, 512, 9000));
        assert_eq!(list.as_slice(), [data(0, 1024, 4096), data(1024, 512, 9000)]);
    }

    #[test]
    fn clipping_moves_the_host_position() {
        let range = GuestRange::new(GuestOffset::new(600), 100);
        assert_eq!(data(512, 512, 4096).clip(range), data(600, 100, 4184));
    }
}

//! An ordered counter as it lies on a disk, and the region of a disk that holds the counters.
//!
//! A *chain* is one writer. For n = 1, 2, 3 ... it writes counter n to the first device of its order, waits for the completion, writes n to the
//! second device, waits, and so on to the last, and only then begins n + 1. At every instant, therefore, and so in every snapshot that is one
//! cut through time,
//!
//! ```text
//! first >= second >= ... >= last >= first - 1
//! ```
//!
//! A chain owns [`Layout::slots`] consecutive records on each device and writes counter n into slot n mod slots. The newest counter is the greatest
//! in the slots; the older ones beside it must be exactly those that a writer which lost nothing leaves behind ([`Layout::expected_in_slot`]).

use serde::{Deserialize, Serialize};

/// Bytes of one record: the unit a chain writes at once, and the alignment direct I/O needs on any disk.
pub const RECORD_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"SFCOUNT1");

// Byte positions of the header's fields, all little-endian. The rest of the record is filled from the identity, so that a record mixed from two
// writes is recognised wherever the seam lies.
const AT_MAGIC: usize = 0;
const AT_CHAIN: usize = 8;
const AT_DEVICE: usize = 12;
const AT_COUNTER: usize = 16;
const AT_CHECKSUM: usize = 24;
const AT_FILL: usize = 32;

/// Which write a record comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    /// The chain that wrote it.
    pub chain: u32,
    /// Position of the device in the chain's order, from 0.
    pub device: u32,
    /// The counter, from 1.
    pub counter: u64,
}

/// What the bytes of a slot turn out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// All zeroes: never written.
    Empty,
    /// A whole record.
    Written(Identity),
    /// Neither; a record damaged, or mixed from several writes. Holds the counter its header names, if it has a header.
    Torn(Option<u64>),
}

/// A record's bytes, aligned as direct I/O needs them.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Record(pub [u8; RECORD_BYTES]);

impl Record {
    /// A record that no chain wrote.
    #[must_use]
    pub const fn zeroed() -> Self {
        Self([0; RECORD_BYTES])
    }

    /// The bytes that the write `identity` puts on the disk.
    #[must_use]
    pub fn encode(identity: Identity) -> Self {
        let mut record = Self::zeroed();
        record.put(AT_MAGIC, &MAGIC.to_le_bytes());
        record.put(AT_CHAIN, &identity.chain.to_le_bytes());
        record.put(AT_DEVICE, &identity.device.to_le_bytes());
        record.put(AT_COUNTER, &identity.counter.to_le_bytes());
        let mut state = identity.counter ^ (u64::from(identity.chain) << 40) ^ (u64::from(identity.device) << 56);
        for word in record.0[AT_FILL..].chunks_exact_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.copy_from_slice(&(mixed ^ (mixed >> 27)).to_le_bytes());
        }
        let sum = record.sum();
        record.put(AT_CHECKSUM, &sum.to_le_bytes());
        record
    }

    /// What `bytes`, a whole slot, holds.
    ///
    /// # Panics
    ///
    /// If `bytes` is not [`RECORD_BYTES`] long.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Slot {
        let bytes: &[u8; RECORD_BYTES] = bytes.try_into().expect("a slot is as long as a record");
        if bytes.iter().all(|&byte| byte == 0) {
            return Slot::Empty;
        }
        let record = Self(*bytes);
        if record.word(AT_MAGIC) != MAGIC {
            return Slot::Torn(None);
        }
        let identity = Identity { chain: record.half(AT_CHAIN), device: record.half(AT_DEVICE), counter: record.word(AT_COUNTER) };
        if record.word(AT_CHECKSUM) == record.sum() { Slot::Written(identity) } else { Slot::Torn(Some(identity.counter)) }
    }

    /// FNV-1a over the record's 64-bit words, the checksum taken as zero.
    fn sum(&self) -> u64 {
        (0..RECORD_BYTES).step_by(8).filter(|&at| at != AT_CHECKSUM).fold(0xcbf2_9ce4_8422_2325, |sum, at| {
            let mixed: u64 = (sum ^ self.word(at)).wrapping_mul(0x0100_0000_01b3);
            mixed ^ (mixed >> 29)
        })
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }

    fn half(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }
}

/// How the counters lie in a device's region: chain after chain, each with the same number of slots. The region's place is the caller's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// How many chains write at once.
    pub chains: u32,
    /// How many records each chain keeps on each device.
    pub slots: u32,
}

impl Layout {
    /// Length of the region in bytes.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        u64::from(self.chains) * u64::from(self.slots) * RECORD_BYTES as u64
    }

    /// Byte position of a slot, from the start of the region.
    #[must_use]
    pub fn slot_offset(&self, chain: u32, slot: u32) -> u64 {
        (u64::from(chain) * u64::from(self.slots) + u64::from(slot)) * RECORD_BYTES as u64
    }

    /// The slot that counter `counter` goes to.
    #[must_use]
    pub fn slot_of(&self, counter: u64) -> u32 {
        u32::try_from(counter % u64::from(self.slots)).expect("less than the number of slots")
    }

    /// The counter that `slot` must hold once `newest` has been written: the greatest one not above it that belongs there, or none.
    #[must_use]
    pub fn expected_in_slot(&self, newest: u64, slot: u32) -> Option<u64> {
        let slots = u64::from(self.slots);
        let behind = (newest + slots - u64::from(slot)) % slots;
        newest.checked_sub(behind).filter(|&counter| counter > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_survives_the_way_through_its_bytes() {
        let identity = Identity { chain: 3, device: 2, counter: 0x0102_0304_0506_0708 };
        assert_eq!(Record::decode(&Record::encode(identity).0), Slot::Written(identity));
        assert_eq!(Record::decode(&Record::zeroed().0), Slot::Empty);
    }

    #[test]
    fn record_mixed_from_two_writes_is_torn_at_every_seam() {
        let older = Record::encode(Identity { chain: 0, device: 1, counter: 41 });
        let newer = Record::encode(Identity { chain: 0, device: 1, counter: 42 });
        for seam in (512..RECORD_BYTES).step_by(512) {
            let mut mixed = newer.clone();
            mixed.0[seam..].copy_from_slice(&older.0[seam..]);
            assert_eq!(Record::decode(&mixed.0), Slot::Torn(Some(42)), "seam at {seam}");
        }
        let mut headless = newer;
        headless.0[..512].fill(0);
        assert_eq!(Record::decode(&headless.0), Slot::Torn(None));
    }

    #[test]
    fn slots_hold_what_a_ring_of_writes_leaves() {
        let layout = Layout { chains: 1, slots: 4 };
        let mut ring = [None; 4];
        for newest in 0..20 {
            if newest > 0 {
                ring[layout.slot_of(newest) as usize] = Some(newest);
            }
            let expected: Vec<_> = (0..4).map(|slot| layout.expected_in_slot(newest, slot)).collect();
            assert_eq!(expected, ring, "after {newest}");
        }
    }

    #[test]
    fn slots_of_different_chains_do_not_touch() {
        let layout = Layout { chains: 3, slots: 5 };
        let mut starts: Vec<_> = (0..3).flat_map(|chain| (0..5).map(move |slot| layout.slot_offset(chain, slot))).collect();
        starts.dedup();
        assert_eq!(starts.len(), 15);
        assert_eq!(starts.last().unwrap() + RECORD_BYTES as u64, layout.region_bytes());
    }
}

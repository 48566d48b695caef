//! The other side of a ring, for tests: a driver that can be told to do everything, right and wrong.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{GuestMemory, RingFeatures, RingLayout, Used};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where tests put data; below are the rings.
pub(crate) const DATA: u64 = 0x10_0000;
/// Guest memory ends here.
pub(crate) const MEMORY_BYTES: usize = 0x200_0000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(address: u64, len: u32) -> Piece {
    Piece { address, len, writable: false }
}

pub(crate) fn writable(address: u64, len: u32) -> Piece {
    Piece { address, len, writable: true }
}

/// A driver's view of one queue. Descriptors are used round and round: tests give them back before they come again.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) mmap: Arc<GuestMemoryMmap>,
    pub(crate) layout: RingLayout,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

impl Driver {
    /// A queue of `size` in memory of its own, with both indices at `index`.
    pub(crate) fn new(size: u16, index: u16) -> Self {
        let mmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("anonymous memory");
        Self::over(Arc::new(mmap), RingLayout { size, descriptors: 0x1000, available: 0x2_0000, used: 0x4_0000 }, index)
    }

    /// A queue at `layout` in the given memory.
    pub(crate) fn over(mmap: Arc<GuestMemoryMmap>, layout: RingLayout, index: u16) -> Self {
        let driver = Self { mmap, layout, next_descriptor: 0, avail: index, used: index };
        driver.store(layout.available + 2, index);
        driver.store(layout.used + 2, index);
        driver
    }

    pub(crate) fn memory(&self) -> GuestMemory {
        GuestMemory::new(&self.mmap)
    }

    pub(crate) fn ring(&self, features: RingFeatures) -> super::Ring {
        super::Ring::new(self.memory(), self.layout, features, self.avail, None).expect("a good layout")
    }

    pub(crate) fn store(&self, address: u64, value: u16) {
        self.mmap.write_obj(value.to_le(), GuestAddress(address)).expect("guest memory");
    }

    pub(crate) fn load(&self, address: u64) -> u16 {
        u16::from_le(self.mmap.read_obj(GuestAddress(address)).expect("guest memory"))
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.mmap.write_slice(bytes, GuestAddress(address)).expect("guest memory");
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mmap.read_slice(&mut bytes, GuestAddress(address)).expect("guest memory");
        bytes
    }

    /// Writes one descriptor of the table at `table`.
    pub(crate) fn descriptor(&self, table: u64, index: u16, piece: Piece, flags: u16, next: u16) {
        let flags = flags | if piece.writable { WRITE } else { 0 };
        let bits = u128::from(piece.address) | u128::from(piece.len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.write(table + u64::from(index) * 16, &bits.to_le_bytes());
    }

    /// Makes whatever starts at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.layout.size);
        self.store(self.layout.available + 4 + slot * 2, head);
        self.avail = self.avail.wrapping_add(1);
        self.store(self.layout.available + 2, self.avail);
    }

    /// Claims that many more chains than there are.
    pub(crate) fn jump(&self, by: u16) {
        self.store(self.layout.available + 2, self.avail.wrapping_add(by));
    }

    /// Makes a chain of buffers available. Returns its head.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (position, &piece) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.layout.size;
            let flags = if position + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(self.layout.descriptors, index, piece, flags, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// The same through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        for (index, &piece) in (0..).zip(pieces) {
            let flags = if usize::from(index) + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(table, index, piece, flags, index + 1);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.layout.size;
        let bytes = u32::try_from(pieces.len() * 16).expect("a small table");
        self.descriptor(self.layout.descriptors, head, readable(table, bytes), INDIRECT, 0);
        self.offer(head);
        head
    }

    /// What has come back since the last call.
    pub(crate) fn completed(&mut self) -> Vec<Used> {
        let mut completed = Vec::new();
        while self.used != self.load(self.layout.used + 2) {
            let at = self.layout.used + 4 + u64::from(self.used % self.layout.size) * 8;
            let bytes = self.read(at, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
            completed.push(Used { head: word(0).try_into().expect("a head"), written: word(4) });
            self.used = self.used.wrapping_add(1);
        }
        completed
    }

    /// What the device's index in the used ring is.
    pub(crate) fn used_index(&self) -> u16 {
        self.load(self.layout.used + 2)
    }

    /// Available chains that the device has not given back.
    pub(crate) fn outstanding(&self) -> u16 {
        self.avail.wrapping_sub(self.used_index())
    }

    /// With the event index: asks for an interrupt at this used index.
    pub(crate) fn want_interrupt_at(&self, index: u16) {
        self.store(self.layout.available + 4 + u64::from(self.layout.size) * 2, index);
    }

    /// With the event index: where the device wants a kick.
    pub(crate) fn kick_wanted_at(&self) -> u16 {
        self.load(self.layout.used + 4 + u64::from(self.layout.size) * 8)
    }

    /// Without: whether the driver wants interrupts.
    pub(crate) fn want_interrupts(&self, wanted: bool) {
        self.store(self.layout.available, u16::from(!wanted));
    }

    /// Without: whether the device wants kicks.
    pub(crate) fn kicks_wanted(&self) -> bool {
        self.load(self.layout.used) & 1 == 0
    }
}

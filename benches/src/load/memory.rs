//! Memory that the other side can reach, for the data of requests.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::Result;
use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

/// A mapping of a memory file, a block for each slot.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    map: GuestMemoryMmap,
    block: usize,
    slots: usize,
}

impl Memory {
    /// Memory for so many slots of `block` bytes each, none of which are zeros.
    ///
    /// # Errors
    /// If the system gives none.
    pub fn new(slots: usize, block: usize) -> Result<Self> {
        let file = rustix::fs::memfd_create("load", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, (slots * block) as u64)?;
        let offset = FileOffset::new(file.try_clone()?.into(), 0);
        let map = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), slots * block, Some(offset))])?;
        let memory = Self { file, map, block, slots };
        for slot in 0..slots {
            // Not zeros, which some would not store.
            // SAFETY: the block of a slot is within the mapping, and nobody else uses it yet.
            unsafe { memory.slot(slot).write_bytes(0x40 | (slot % 64) as u8, block) };
        }
        Ok(memory)
    }

    /// The file, to be sent.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where it is mapped.
    pub fn base(&self) -> *mut u8 {
        self.map.get_host_address(GuestAddress(0)).expect("the mapping begins there")
    }

    /// All its bytes.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.slots * self.block
    }

    /// Bytes of each block.
    pub(super) fn block(&self) -> usize {
        self.block
    }

    /// Where the block of a slot begins.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn slot(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.slots, "there is no slot {slot}");
        self.base().wrapping_add(slot * self.block)
    }
}

//! What a guest does, and what it may expect.

use std::collections::BTreeMap;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::MemoryEnvironment;
use snapfence_image_format::units::{GuestOffset, GuestRange, SECTOR_BYTES};

use crate::source::Source;

/// Bytes of a sector.
const SECTOR: usize = SECTOR_BYTES as usize;
/// Sectors at either end of the disk that are used.
const REACH: u64 = 64;
/// Most sectors of an operation.
const MAX_SECTORS: usize = 24;

type MemoryStack = Arc<Stack<MemoryEnvironment>>;

/// A disk, and what is known of its sectors.
#[derive(Debug)]
pub(super) struct Disk {
    /// Whether the image is sound, so that the disk has to keep what it is given.
    is_sound: bool,
    /// Whether an operation has failed: space may be lost then.
    has_failed: bool,
    known: BTreeMap<u64, [u8; SECTOR]>,
}

impl Disk {
    pub(super) fn new(is_sound: bool) -> Self {
        Self { is_sound, has_failed: false, known: BTreeMap::new() }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Reads both ends for the first time. A check does not look into compressed clusters: where these cannot be read, nothing is expected of the disk.
    pub(super) async fn explore(&mut self, stack: &MemoryStack) {
        if self.try_read_all(stack).await.is_err() {
            self.is_sound = false;
        }
    }

    /// Reads both ends.
    pub(super) async fn read_all(&mut self, stack: &MemoryStack) {
        let result = self.try_read_all(stack).await;
        self.note_read(result);
    }

    async fn try_read_all(&mut self, stack: &MemoryStack) -> Result<(), LayerError> {
        let sectors = stack.virtual_size() / SECTOR_BYTES;
        // As far as an operation reaches.
        let near = sectors.min(REACH + MAX_SECTORS as u64);
        self.read(stack, 0, near).await?;
        let far = (sectors - near).min(REACH);
        self.read(stack, sectors - far, far).await
    }

    /// One operation. Whether the image shall be opened again.
    pub(super) async fn operate(&mut self, stack: &MemoryStack, source: &mut Source<'_>) -> bool {
        let kind = source.u8();
        let sectors = stack.virtual_size() / SECTOR_BYTES;
        let near = sectors.min(REACH);
        if near == 0 {
            return false;
        }
        let mut at = source.below(REACH as usize) as u64 % near;
        if kind & 0x80 != 0 {
            at += sectors - near;
        }
        let count = (1 + source.below(MAX_SECTORS) as u64).min(sectors - at);
        let range = GuestRange::new(GuestOffset::new(at * SECTOR_BYTES), count * SECTOR_BYTES);
        match kind & 7 {
            0..=2 => {
                let value = source.u8();
                let bytes: Vec<u8> = (0..count).flat_map(|sector| [value.wrapping_add(sector as u8); SECTOR]).collect();
                let (result, _) = stack.view().write(range.start, AlignedBuffer::copy_of(&bytes).into()).await;
                self.changed(at, count, result, |sector| Some([value.wrapping_add(sector as u8); SECTOR]));
            }
            3 => {
                let result = self.read(stack, at, count).await;
                self.note_read(result);
            }
            4 => {
                let result = stack.view().write_zeroes(range, kind & 8 != 0).await;
                self.changed(at, count, result, |_| Some([0; SECTOR]));
            }
            5 => {
                let result = stack.view().discard(range).await;
                self.changed(at, count, result, |_| None);
            }
            6 => {
                let result = stack.view().flush().await;
                self.changed(at, 0, result, |_| None);
            }
            _ => return true,
        }
        false
    }

    pub(super) fn note_close(&mut self, result: Result<(), LayerError>) {
        self.changed(0, 0, result, |_| None);
    }

    /// Notes what an operation has made of `count` sectors from `at` on.
    fn changed(&mut self, at: u64, count: u64, result: Result<(), LayerError>, content: impl Fn(u64) -> Option<[u8; SECTOR]>) {
        if let Err(error) = result {
            assert!(!self.is_sound, "an operation on a sound image fails: {error}");
            self.has_failed = true;
        }
        for sector in 0..count {
            match content(sector) {
                Some(bytes) if !self.has_failed => drop(self.known.insert(at + sector, bytes)),
                _ => drop(self.known.remove(&(at + sector))),
            }
        }
    }

    fn note_read(&self, result: Result<(), LayerError>) {
        if let Err(error) = result {
            assert!(!self.is_sound, "reading a sound image fails: {error}");
        }
    }

    async fn read(&mut self, stack: &MemoryStack, at: u64, count: u64) -> Result<(), LayerError> {
        let buffer = AlignedBuffer::zeroed(count as usize * SECTOR).into();
        let (result, buffer) = stack.view().read(GuestOffset::new(at * SECTOR_BYTES), buffer).await;
        let Buffer::Owned(bytes) = buffer else { panic!("the buffer that was given") };
        result?;
        if !self.is_sound || self.has_failed {
            return Ok(());
        }
        for (sector, bytes) in (at..).zip(bytes.chunks_exact(SECTOR)) {
            let known = *self.known.entry(sector).or_insert_with(|| bytes.try_into().expect("a sector"));
            assert!(known == bytes, "sector {sector} reads as {:?}, not as {:?}", &bytes[..16], &known[..16]);
        }
        Ok(())
    }
}

//! The disk as plain bytes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::operation::Operation;

/// Bytes in a sector.
pub(crate) const SECTOR: usize = 512;

/// What the disk must read as. After a discard a sector may also read as zeros.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    bytes: Vec<u8>,
    /// Sectors that may be zero instead.
    discarded: Vec<Range<usize>>,
}

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        assert_eq!(bytes.len() % SECTOR, 0);
        Self { bytes, discarded: Vec::new() }
    }

    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The disk of an empty overlay of another size.
    pub(crate) fn overlaid(&self, size: u64) -> Self {
        assert!(self.discarded.is_empty());
        let mut bytes = self.bytes.clone();
        bytes.resize(size as usize, 0);
        Self::new(bytes)
    }

    /// The disk becomes larger; what is new reads as zeros.
    pub(crate) fn grow(&mut self, size: u64) {
        assert!(size >= self.len());
        self.bytes.resize(size as usize, 0);
    }

    pub(crate) fn apply(&mut self, operation: &Operation) {
        let range = operation.range();
        let range = range.start as usize..range.end as usize;
        match *operation {
            Operation::Write { fill, .. } => fill.put(&mut self.bytes[range.clone()]),
            Operation::Compress { byte, .. } => self.bytes[range.clone()].fill(byte),
            Operation::Zero { .. } => self.bytes[range.clone()].fill(0),
            Operation::Discard { .. } => {
                self.discarded.push(range);
                return;
            }
            Operation::Flush => return,
        }
        // What is written after a discard is certain again.
        self.discarded = std::mem::take(&mut self.discarded)
            .into_iter()
            .flat_map(|old| [old.start..old.end.min(range.start), old.start.max(range.end)..old.end])
            .filter(|rest| rest.start < rest.end)
            .collect();
    }

    /// Compares with what has been read; what discarded sectors read as is certain from then on.
    ///
    /// # Errors
    /// Which sectors differ.
    pub(crate) fn settle(&mut self, actual: &[u8]) -> Result<(), String> {
        if actual.len() != self.bytes.len() {
            return Err(format!("the disk has {} bytes instead of {}", actual.len(), self.bytes.len()));
        }
        for range in std::mem::take(&mut self.discarded) {
            for at in range.step_by(SECTOR) {
                let sector = at..at + SECTOR;
                if actual[sector.clone()].iter().all(|&byte| byte == 0) {
                    self.bytes[sector].fill(0);
                }
            }
        }
        if actual == self.bytes {
            return Ok(());
        }
        let mut wrong = (0..self.bytes.len()).step_by(SECTOR).filter(|&at| actual[at..at + SECTOR] != self.bytes[at..at + SECTOR]);
        let first = wrong.next().unwrap_or(0);
        let head = |bytes: &[u8]| format!("{:02x?}", &bytes[first..first + 8]);
        let (is, expected) = (head(actual), head(&self.bytes));
        Err(format!("byte {first:#x}: {is} instead of {expected}; {} more sectors differ", wrong.count()))
    }

    /// Writes the disk as a raw image with holes.
    pub(crate) fn store(&self, path: &Path) {
        assert!(self.discarded.is_empty());
        const PIECE: usize = 64 << 10;
        let file = File::create(path).expect("the folder is writable");
        file.set_len(self.len()).expect("a file can grow");
        for (index, piece) in self.bytes.chunks(PIECE).enumerate() {
            if piece.iter().any(|&byte| byte != 0) {
                file.write_all_at(piece, (index * PIECE) as u64).expect("written");
            }
        }
    }
}

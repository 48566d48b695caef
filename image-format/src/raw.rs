//! Raw images: the bytes of the file (or block device) are the bytes of the disk.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{LayerError, Structure};
use crate::extent::{Extent, ExtentList, Mapping};
use crate::layer::same_position;
use crate::rounds::Rounds;
use crate::storage::{Environment, Storage};
use crate::units::{GuestRange, HostOffset, SECTOR_BYTES};

/// An open raw image.
#[derive(Debug)]
pub struct Raw<E: Environment> {
    file: E::File,
    virtual_size: u64,
    /// Writes are refused: opened so, or frozen since.
    read_only: AtomicBool,
    /// Flushes, and the first that failed.
    rounds: Rounds,
}

/// Why a file cannot be a raw image.
#[derive(Debug, thiserror::Error)]
pub enum RawOpenError {
    /// The length could not be found out.
    #[error("cannot tell the length: {0}")]
    Length(#[source] io::Error),
    /// Guests see whole sectors only.
    #[error(
        "its length of {0} bytes is not a multiple of 512; extend it (for example with `truncate --size=%512`) before it is written to"
    )]
    Ragged(u64),
}

impl<E: Environment> Raw<E> {
    /// An image over the whole of `file`.
    ///
    /// # Errors
    /// If the length cannot be found out or, for writing, is not a number of whole sectors. For reading the last sector is filled with zeros.
    pub async fn open(file: E::File, writable: bool) -> Result<Self, RawOpenError> {
        let len = file.length().await.map_err(RawOpenError::Length)?;
        if writable && !len.is_multiple_of(SECTOR_BYTES) {
            return Err(RawOpenError::Ragged(len));
        }
        let virtual_size = len.next_multiple_of(SECTOR_BYTES);
        Ok(Self { file, virtual_size, read_only: AtomicBool::new(!writable), rounds: Rounds::default() })
    }

    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Flushes, and what is remembered of their failures.
    pub(crate) fn rounds(&self) -> &Rounds {
        &self.rounds
    }

    /// The file.
    pub fn file(&self) -> &E::File {
        &self.file
    }

    /// Where the bytes of `range` are, and whether they may be overwritten there; `None` if not all of them are on the disk.
    pub(crate) fn place_of(&self, range: GuestRange) -> Option<(HostOffset, bool)> {
        let in_place = !self.read_only.load(Ordering::Acquire);
        (range.end().get() <= self.virtual_size).then(|| (same_position(range.start), in_place))
    }

    pub(crate) fn map(&self, range: GuestRange, extents: &mut ExtentList) {
        let disk = GuestRange::new(crate::units::GuestOffset::ZERO, self.virtual_size);
        let inside = range.intersection(disk);
        if !inside.is_empty() {
            let in_place = !self.read_only.load(Ordering::Acquire);
            extents.push(Extent { range: inside, mapping: Mapping::Data { host: same_position(inside.start), in_place } });
        }
        let beyond = GuestRange::between(range.start.max(disk.end()), range.end());
        extents.push(Extent { range: beyond, mapping: Mapping::Unallocated });
    }

    pub(crate) fn place(&self, range: GuestRange) -> Result<HostOffset, LayerError> {
        self.admit_write()?;
        if range.end().get() > self.virtual_size {
            return Err(LayerError::OutOfRange { range, size: self.virtual_size });
        }
        Ok(same_position(range.start))
    }

    pub(crate) async fn write_zeroes(&self, range: GuestRange, unmap: bool) -> Result<bool, LayerError> {
        let at = self.place(range)?;
        if !unmap {
            return Ok(false);
        }
        match self.file.punch(at, range.len).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(LayerError::io("punch", Structure::Data, at, error)),
        }
    }

    pub(crate) async fn discard(&self, range: GuestRange) -> Result<(), LayerError> {
        // A discard is a hint: a medium that cannot do it leaves the bytes as they are, which is allowed without a layer beneath.
        self.write_zeroes(range, true).await.map(|_| ())
    }

    pub(crate) async fn flush(&self) -> Result<(), LayerError> {
        // Not each its own: two at the same time would share the one report that the kernel gives of lost pages.
        self.rounds.share(self.rounds.flush(&self.file)).await
    }

    pub(crate) async fn freeze(&self) -> Result<(), LayerError> {
        self.read_only.store(true, Ordering::Release);
        self.flush().await
    }

    pub(crate) fn admit_write(&self) -> Result<(), LayerError> {
        self.rounds.admit()?;
        if self.read_only.load(Ordering::Acquire) {
            return Err(LayerError::ReadOnly);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures_util::future::join_all;

    use super::*;
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Location};

    async fn open(environment: &SimulatedEnvironment) -> Raw<SimulatedEnvironment> {
        let at = Location::Trusted(Path::new("/a.raw").to_owned());
        let file = environment.open(&at, Access::Write, CacheMode::Direct).await.expect("the file is there");
        Raw::open(file, true).await.expect("whole sectors")
    }

    /// As Linux has it, one of two flushes that lose the same pages is told.
    #[test]
    fn no_flush_succeeds_beside_one_that_failed() {
        for seed in 0..50 {
            let environment = SimulatedEnvironment::new(seed);
            environment.put("/a.raw", &[0; 4096]);
            let inner = environment.clone();
            Simulation::on(environment).block_on(async move {
                let raw = open(&inner).await;
                inner.inject(Fault::once(OperationKind::Flush, 0));
                let results = join_all((0..2).map(|_| raw.flush())).await;
                assert!(results.iter().all(Result::is_err), "seed {seed}: {results:?}");
            });
        }
    }

    #[test]
    fn flushes_that_wait_share_one() {
        let environment = SimulatedEnvironment::new(1);
        environment.put("/a.raw", &[0; 4096]);
        let inner = environment.clone();
        Simulation::on(environment).block_on(async move {
            let raw = open(&inner).await;
            let results = join_all((0..8).map(|_| raw.flush())).await;
            assert!(results.iter().all(Result::is_ok), "{results:?}");
            assert_eq!(inner.counts()[&OperationKind::Flush], 2, "one for the first, and one for all that came later");
            drop(raw.flush());
            raw.flush().await.expect("a flush that never began has lost nothing");
        });
    }
}

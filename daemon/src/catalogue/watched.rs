//! What becomes of a file after a sync of it has failed.
//!
//! Linux says once that data did not reach the disk, and then takes it for clean: a later sync succeeds without it, while whoever reads sees it as if
//! it were there. So nothing is built on such a file before all of it has been written once more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::StorageBackend;

use super::trial::content;

/// The header's page: what makes the others count.
const HEADER_BYTES: usize = 4096;

/// A backend whose failed syncs are remembered.
#[derive(Debug)]
pub(super) struct Watched<B> {
    backend: B,
    sync_failed: Arc<AtomicBool>,
}

impl<B: StorageBackend> Watched<B> {
    /// What is in `backend`, written once more if a sync of it had failed, which `sync_failed` remembers between one opening and the next.
    ///
    /// # Errors
    /// If that does not succeed either; it is tried again then the next time.
    pub(super) fn new(backend: B, sync_failed: &Arc<AtomicBool>) -> io::Result<Self> {
        if sync_failed.load(Ordering::Relaxed) {
            write_again(&backend)?;
            sync_failed.store(false, Ordering::Relaxed);
        }
        Ok(Self { backend, sync_failed: Arc::clone(sync_failed) })
    }
}

/// Writes everything to where it is, in the order of a commit: after a crash at any moment the state before the failure or after it is there.
fn write_again(backend: &impl StorageBackend) -> io::Result<()> {
    let bytes = content(backend)?;
    let (header, pages) = bytes.split_at(bytes.len().min(HEADER_BYTES));
    if !pages.is_empty() {
        backend.write(header.len() as u64, pages)?;
        backend.sync_data()?;
    }
    backend.write(0, header)?;
    backend.sync_data()
}

impl<B: StorageBackend> StorageBackend for Watched<B> {
    fn len(&self) -> io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.backend.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.backend.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.backend.sync_data().inspect_err(|_| self.sync_failed.store(true, Ordering::Relaxed))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.backend.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.backend.close()
    }
}

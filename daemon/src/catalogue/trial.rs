//! What keeps a damaged file from doing harm.
//!
//! A file that is damaged can make redb panic, when it is opened or much later, or be repaired into something else. So what is there is first opened
//! and checked as a copy in memory: a file that fails stays as it is. A panic that comes nevertheless is an error of the one who asked.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use redb::{Database, DatabaseError, StorageBackend};

use super::store::{CACHE_BYTES, CatalogueError, Store};

/// All that a backend has.
pub(super) fn content(backend: &impl StorageBackend) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(backend.len()?).map_err(io::Error::other)?];
    backend.read(0, &mut bytes)?;
    Ok(bytes)
}

/// A copy of a database that may be changed.
#[derive(Debug)]
struct MemoryCopy(Mutex<Vec<u8>>);

impl MemoryCopy {
    fn access<T>(&self, offset: u64, len: usize, work: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(work(bytes.get_mut(start..end).ok_or(io::ErrorKind::UnexpectedEof)?))
    }
}

impl StorageBackend for MemoryCopy {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.access(offset, out.len(), |bytes| out.copy_from_slice(bytes))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = len.saturating_sub(bytes.len());
        bytes.try_reserve(more).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.access(offset, data.len(), |bytes| bytes.copy_from_slice(data))
    }
}

/// Opens a copy of what is there, if anything is, and follows every page.
///
/// # Errors
/// If it is damaged, or has a newer layout.
pub(super) fn try_copy(bytes: Vec<u8>) -> Result<(), CatalogueError> {
    if bytes.is_empty() {
        return Ok(());
    }
    contained(|| {
        let damaged = |error: DatabaseError| CatalogueError::Damaged { cause: error.to_string() };
        let copy = Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(MemoryCopy(Mutex::new(bytes)));
        let mut database = Store::initialise(copy.map_err(damaged)?)?;
        if database.check_integrity().map_err(damaged)? {
            Ok(())
        } else {
            Err(CatalogueError::Damaged { cause: "its pages do not fit together".to_owned() })
        }
    })
}

/// Does `work`, and takes a panic of the database for what it is.
pub(super) fn contained<T>(work: impl FnOnce() -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
    // What a panic leaves half done is the database, which nobody uses any more.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(CatalogueError::Damaged { cause: text.unwrap_or("a page makes no sense").to_owned() })
    })
}

#[cfg(test)]
mod tests {
    use super::super::records::DeviceRecord;
    use super::super::store::tests::layer;
    use super::*;

    #[test]
    fn a_damaged_file_is_refused_and_stays_as_it_is() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("catalogue");
        let mut store = Store::open(&path).expect("a new file");
        let device = DeviceRecord { name: "vda".into(), layers: vec![layer("/base"), layer("/top")] };
        store.put_device(&device).expect("a catalogue");
        drop(store);
        let sound = std::fs::read(&path).expect("a file");
        let used: Vec<usize> = (0..sound.len()).filter(|at| sound[*at] != 0).collect();
        let mut refused = 0;
        // Everywhere in what is not zero.
        for at in used.iter().step_by(used.len().div_ceil(200)) {
            let mut damaged = sound.clone();
            damaged[*at] ^= 0x55;
            std::fs::write(&path, &damaged).expect("a file");
            match Store::open(&path) {
                Ok(store) => {
                    assert_eq!(store.devices().expect("sound"), std::slice::from_ref(&device), "byte {at} matters, and nobody sees it")
                }
                Err(error) => {
                    refused += 1;
                    assert!(!matches!(error, CatalogueError::Record { .. }), "byte {at}: {error}");
                    assert!(std::fs::read(&path).expect("a file") == damaged, "byte {at}: {error}, and the file has changed");
                }
            }
        }
        assert!(refused > 20, "{refused} were refused");
    }
}

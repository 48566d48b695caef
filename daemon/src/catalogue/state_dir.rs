//! The directory in which the daemon keeps what outlives it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::CatalogueError;

/// The state directory, for as long as this value lives ours alone.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl StateDir {
    /// Makes the directory if need be, readable by its owner only, and locks it.
    ///
    /// # Errors
    /// If another daemon has it or it cannot be made or written.
    pub fn lock(path: &Path) -> Result<Self, CatalogueError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CatalogueError::StateDirectory { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make the state directory", path))?;
        let lock_path = path.join("lock");
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&lock_path).map_err(failed("open", &lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(CatalogueError::InUse(path.to_owned())),
            Err(error) => Err(failed("lock", &lock_path)(error.into())),
        }
    }

    /// Where the database is.
    pub fn database(&self) -> PathBuf {
        self.path.join("catalogue.redb")
    }
}

//! The directory in which the daemon keeps what outlives it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use snapfence_image_format::storage::uring::hold_while_in_flight;

use super::CatalogueError;

/// How often to look whether the daemon before has left.
const RETRY_PAUSE: Duration = Duration::from_millis(2);

/// Usually it is a matter of milliseconds, which nobody needs to know of.
const WAITS_BEFORE_SAYING_SO: u32 = 250;

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
    /// If another daemon has it or it cannot be made or written. For I/O of one that has ended this waits: until then it may still write to
    /// images, and read into guests' memory.
    pub fn lock(path: &Path) -> Result<Self, CatalogueError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CatalogueError::StateDirectory { action, path, source }
        };
        let missing: Vec<_> = path.ancestors().take_while(|directory| !directory.exists()).map(Path::to_owned).collect();
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make the state directory", path))?;
        // A name is durable once the directory that has it is.
        for made in &missing {
            let directory = made.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
            flush_directory(directory).map_err(failed("flush", directory))?;
        }
        let lock_path = path.join("lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(&lock_path).map_err(failed("open", &lock_path))?;
        let mut waits = 0_u32;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if holder(&lock).is_none_or(is_alive) => {
                    return Err(CatalogueError::InUse(path.to_owned()));
                }
                // The process is gone, but the kernel still works on what it has asked for.
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    waits = waits.saturating_add(1);
                    if waits == WAITS_BEFORE_SAYING_SO {
                        tracing::info!(event = "requests_awaited", directory = %path.display(), "waiting for I/O of the daemon before to end");
                    }
                    std::thread::sleep(RETRY_PAUSE);
                }
                Err(error) => return Err(failed("lock", &lock_path)(error.into())),
            }
        }
        let name = std::process::id().to_string();
        let written = lock.set_len(0).and_then(|()| lock.write_all_at(name.as_bytes(), 0));
        written.map_err(failed("write", &lock_path))?;
        // Rings hold it longer than the process lives.
        hold_while_in_flight(lock.try_clone().map_err(failed("open", &lock_path))?.into());
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where memory is kept that outlives the daemon.
    pub fn kept_memory(&self) -> PathBuf {
        self.path.join("kept")
    }

    /// Makes the names in it durable: call when the database is there, before anything depends on it. A start that finds it there does this
    /// too, for the one before may have ended in between.
    ///
    /// # Errors
    /// If the directory cannot be flushed.
    pub fn flush(&self) -> Result<(), CatalogueError> {
        let path = self.path.clone();
        flush_directory(&self.path).map_err(|source| CatalogueError::StateDirectory { action: "flush", path, source })
    }

    /// Where the database is.
    pub fn database(&self) -> PathBuf {
        self.path.join("catalogue.redb")
    }
}

fn flush_directory(path: &Path) -> io::Result<()> {
    match File::open(path) {
        // In it names can be made and not be listed; nobody but its owner can flush it then.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        opened => opened?.sync_all(),
    }
}

/// The process that has the lock, if it has said so.
fn holder(lock: &File) -> Option<u32> {
    let mut name = [0; 16];
    let len = lock.read_at(&mut name, 0).ok()?;
    std::str::from_utf8(&name[..len]).ok()?.trim().parse().ok()
}

/// Whether there is such a process that has not ended. One that waits for its parent to hear of its end has.
fn is_alive(process: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{process}/stat")) else { return false };
    // The state comes after the name, which is in parentheses and may contain anything.
    let state = status.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_have_ended_are_not_alive() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        let ended = || !is_alive(child.id());
        while !ended() {
            std::thread::yield_now();
        }
        child.wait().expect("a child");
    }
}

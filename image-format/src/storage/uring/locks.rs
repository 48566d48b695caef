//! The byte locks by which QEMU and its tools keep out of each other's way, so that they and we do.
//!
//! What a program does with an image (a *permission*) and what it does not let others do are shared (read) locks on single bytes far from
//! anything else: one byte per permission, and one per permission that is not shared. A program first takes its locks and then looks whether
//! others hold one that contradicts: two that come at the same time may both give up, but never both go on. The locks are advisory and belong
//! to the open file description (`F_OFD_SETLK`), so other descriptors of the same file, even of this process, neither share nor lose them.
//! The layout is that of QEMU's `file` driver (its option `locking`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use crate::storage::Sharing;

/// Byte of the first permission.
const PERMISSIONS: i64 = 100;
/// Byte of the first permission that is not shared.
const NOT_SHARED: i64 = 200;

/// Permissions by their distance from the two bases. (2 stands for writes that change nothing, which never bother us.)
const READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;
/// What people call them.
const NAMES: [(u8, &str); 3] = [(READ, "read"), (WRITE, "write"), (RESIZE, "resize")];

/// What a program does, and what it lets nobody else do.
struct Claims {
    uses: &'static [u8],
    excludes: &'static [u8],
}

fn claims(sharing: Sharing) -> Claims {
    match sharing {
        Sharing::None => Claims { uses: &[], excludes: &[] },
        Sharing::Reader => Claims { uses: &[READ], excludes: &[WRITE, RESIZE] },
        Sharing::Writer => Claims { uses: &[READ, WRITE, RESIZE], excludes: &[WRITE, RESIZE] },
    }
}

impl Claims {
    /// The bytes that stand for them.
    fn bytes(&self) -> impl Iterator<Item = i64> + Clone + '_ {
        let uses = self.uses.iter().map(|permission| PERMISSIONS + i64::from(*permission));
        uses.chain(self.excludes.iter().map(|permission| NOT_SHARED + i64::from(*permission)))
    }
}

/// Changes what the locks of `fd` say from `from` to `to`.
///
/// # Errors
/// `WouldBlock` if another program's locks contradict; ours then say `from` again. Where locks are not to be had it goes on without, warning.
pub(super) fn change(fd: BorrowedFd<'_>, path: &Path, from: Sharing, to: Sharing) -> io::Result<()> {
    let (old, new) = (claims(from), claims(to));
    let added = new.bytes().filter(|byte| !old.bytes().any(|other| other == *byte));
    let removed = old.bytes().filter(|byte| !new.bytes().any(|other| other == *byte));
    let taken = added.clone().try_for_each(|byte| set(fd, libc::F_RDLCK, byte)).and_then(|()| find_conflict(fd, &new));
    let failure = match taken {
        Ok(None) => {
            for byte in removed {
                set(fd, libc::F_UNLCK, byte)?;
            }
            return Ok(());
        }
        Ok(Some(conflict)) => {
            io::Error::new(io::ErrorKind::WouldBlock, format!("another program {conflict} {}: stop it first", path.display()))
        }
        Err(error) if is_unavailable(&error) => {
            tracing::warn!(path = %path.display(), %error, "the file system has no locks: nothing keeps other programs from this image");
            return Ok(());
        }
        Err(error) => error,
    };
    for byte in added {
        if let Err(error) = set(fd, libc::F_UNLCK, byte) {
            tracing::warn!(path = %path.display(), %error, "a lock could not be given up again");
        }
    }
    Err(failure)
}

/// What another program does or excludes that contradicts `claims`, as the middle of a sentence.
fn find_conflict(fd: BorrowedFd<'_>, claims: &Claims) -> io::Result<Option<String>> {
    for (permission, name) in NAMES {
        if claims.uses.contains(&permission) && is_held_by_others(fd, NOT_SHARED + i64::from(permission))? {
            return Ok(Some(format!("does not let others {name}")));
        }
        if claims.excludes.contains(&permission) && is_held_by_others(fd, PERMISSIONS + i64::from(permission))? {
            return Ok(Some(format!("may {name}")));
        }
    }
    Ok(None)
}

/// Whether the file system does without such locks.
fn is_unavailable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY))
}

fn set(fd: BorrowedFd<'_>, kind: i32, byte: i64) -> io::Result<()> {
    control(fd, libc::F_OFD_SETLK, kind, byte).map(drop)
}

fn is_held_by_others(fd: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
    Ok(i32::from(control(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?.l_type) != libc::F_UNLCK)
}

fn control(fd: BorrowedFd<'_>, command: i32, kind: i32, byte: i64) -> io::Result<libc::flock> {
    let narrow = |number: i32| libc::c_short::try_from(number).expect("lock kinds and origins are small numbers");
    let mut lock = libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: byte, l_len: 1, l_pid: 0 };
    loop {
        // SAFETY: both commands take a pointer to a lock, which they read and the second one writes.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) };
        if result == 0 {
            return Ok(lock);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

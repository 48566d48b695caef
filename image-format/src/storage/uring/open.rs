//! Opening a file and finding out what it is: calls that wait for whoever serves it, for threads of their own.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::retry_on_intr;

use super::file::UringFile;
use super::stat::{self, Medium};
use crate::storage::{Access, CacheMode, FileIdentity, Location};

/// Permissions of new images: for their owner only, as they hold what a guest holds. The umask takes its share of it.
const NEW_FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// What must be known of a file to use it.
pub(super) const FACTS: StatxFlags = StatxFlags::TYPE.union(StatxFlags::INO).union(StatxFlags::BTIME).union(StatxFlags::DIOALIGN);

/// Opens an image.
///
/// # Errors
/// Whatever the system reports; `InvalidInput` if it is neither a file nor a block device.
pub(super) fn file(at: &Location, access: Access, cache: CacheMode) -> io::Result<UringFile> {
    file_beneath(&mut None, at, access, cache)
}

/// Opens images, each as [`file()`] does, and a directory once for all in a row that lie beneath it.
pub(super) fn files(at: &[Location], access: Access, cache: CacheMode) -> Vec<io::Result<UringFile>> {
    let mut last = None;
    at.iter().map(|at| file_beneath(&mut last, at, access, cache)).collect()
}

/// As [`file()`], where `last` is the directory beneath which the last one was opened, by its name.
fn file_beneath<'a>(last: &mut Option<(&'a Path, OwnedFd)>, at: &'a Location, access: Access, cache: CacheMode) -> io::Result<UringFile> {
    let (flags, mode) = match access {
        Access::Read => (OFlags::RDONLY, Mode::empty()),
        Access::Write => (OFlags::RDWR, Mode::empty()),
        Access::CreateNew => (OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, NEW_FILE_MODE),
    };
    // Neither a FIFO without a writer nor a terminal may have an effect on us before we have seen what it is.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = match at {
        Location::Trusted(path) => open(path, flags, mode)?,
        Location::Beneath { directory, name } => {
            let directory = match last {
                Some((name, fd)) if *name == directory => fd,
                _ => &last.insert((directory, open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?)).1,
            };
            // It stays beneath the directory, and passes no link of any kind.
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            retry_on_intr(|| rustix::fs::openat2(directory, name, flags | OFlags::CLOEXEC, mode, resolve))?
        }
    };
    let facts = stat::look(&fd, FACTS)?;
    let medium = Medium::of(&fd);
    UringFile::adopt(fd, &facts, medium, &at.path(), cache)
}

/// Which file a path leads to, without opening it.
///
/// # Errors
/// As of [`file()`].
pub(super) fn identity(path: &Path) -> io::Result<FileIdentity> {
    let facts = retry_on_intr(|| rustix::fs::statx(CWD, path, AtFlags::empty(), FACTS))?;
    Ok(super::file::identify(&facts, path)?.1)
}

/// Opens a directory, to make it durable.
///
/// # Errors
/// Whatever the system reports.
pub(super) fn directory(path: &Path) -> io::Result<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
}

fn open(name: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    Ok(retry_on_intr(|| rustix::fs::openat(CWD, name, flags | OFlags::CLOEXEC, mode))?)
}

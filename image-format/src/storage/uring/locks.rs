//! The byte locks by which QEMU and its tools keep out of each other's way, so that they and we do.
//!
//! What a program does with an image (a *permission*) and what it does not let others do are shared (read) locks on single bytes far from
//! anything else: one byte per permission, and one per permission that is not shared. A program first takes its locks and then looks whether
//! others hold one that contradicts: two that come at the same time may both give up, but never both go on. The locks are advisory and belong
//! to the open file description (`F_OFD_SETLK`), so other descriptors of the same file, even of this process, neither share nor lose them.
//! The layout is that of QEMU's `file` driver (its option `locking`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

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

/// The name that an open file has now, or at least one that leads to it.
pub(super) fn name(fd: BorrowedFd<'_>) -> PathBuf {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::read_link(&link).unwrap_or_else(|_| link.into())
}

/// Changes what the locks of `fd` say from `from` to `to`.
///
/// # Errors
/// `WouldBlock` if another program's locks contradict; ours then say `from` again. Where locks are not to be had it goes on without, warning.
pub(super) fn change(fd: BorrowedFd<'_>, from: Sharing, to: Sharing) -> io::Result<()> {
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
            io::Error::new(io::ErrorKind::WouldBlock, format!("another program {conflict} {}: stop it first", name(fd).display()))
        }
        Err(error) if is_unavailable(&error) => {
            tracing::warn!(path = %name(fd).display(), %error, "the file system has no locks: nothing keeps other programs from this image");
            return Ok(());
        }
        Err(error) => error,
    };
    for byte in added {
        if let Err(error) = set(fd, libc::F_UNLCK, byte) {
            tracing::warn!(path = %name(fd).display(), %error, "a lock could not be given up again");
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsFd;
    use std::path::Path;
    use std::process::{Command, Output, Stdio};

    use super::super::skip::skipped;
    use super::super::{Reactor, UringEnvironment, UringFile};
    use super::*;
    use crate::storage::{Access, CacheMode, Environment, Location, Storage};

    /// The bytes on which anybody but the descriptor asked holds a lock.
    fn held_by_others(file: &File) -> Vec<i64> {
        (0..300).filter(|byte| is_held_by_others(file.as_fd(), *byte).expect("locks")).collect()
    }

    fn open(path: &Path, access: Access) -> UringFile {
        let at = Location::Trusted(path.to_owned());
        let open = async move { UringEnvironment.open(&at, access, CacheMode::Buffered).await };
        Reactor::new(8).expect("a reactor").block_on(open).expect("the ring works").expect("the image")
    }

    fn share(image: &UringFile, sharing: Sharing) -> io::Result<()> {
        futures_lite::future::block_on(image.set_sharing(sharing))
    }

    fn refusal(result: io::Result<()>) -> String {
        let error = result.expect_err("a conflict");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        error.to_string()
    }

    /// An image of 1 MiB, if there is a qemu-img to make it.
    fn image() -> Option<(tempfile::TempDir, PathBuf)> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        match qemu("qemu-img", &["create", "-q", "-f", "qcow2"], &path, &["1M"]) {
            Some(output) => {
                assert!(output.status.success(), "{output:?}");
                Some((directory, path))
            }
            None => {
                skipped("there is no qemu-img");
                None
            }
        }
    }

    fn qemu(program: &str, before: &[&str], path: &Path, after: &[&str]) -> Option<Output> {
        match Command::new(program).args(before).arg(path).args(after).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            output => Some(output.expect("the program runs")),
        }
    }

    fn succeeds(program: &str, before: &[&str], path: &Path, after: &[&str]) {
        let output = qemu(program, before, path, after).expect("the program is there");
        assert!(output.status.success(), "{program} {before:?} {after:?}: {output:?}");
    }

    fn is_locked_out(program: &str, before: &[&str], path: &Path, after: &[&str]) {
        let output = qemu(program, before, path, after).expect("the program is there");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains("lock"), "{program} {before:?} {after:?}: {output:?}");
    }

    #[test]
    fn each_role_locks_the_bytes_that_stand_for_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        let image = open(&path, Access::CreateNew);
        let witness = File::open(&path).expect("the image");
        let roles = [
            (Sharing::Writer, vec![100, 101, 103, 201, 203]),
            (Sharing::Reader, vec![100, 201, 203]),
            (Sharing::None, vec![]),
            (Sharing::Reader, vec![100, 201, 203]),
            (Sharing::Writer, vec![100, 101, 103, 201, 203]),
            (Sharing::None, vec![]),
        ];
        for (role, bytes) in roles {
            share(&image, role).expect("nobody else is there");
            assert_eq!(held_by_others(&witness), bytes, "{role:?}");
        }
        share(&image, Sharing::Writer).expect("nobody else is there");
        drop(image);
        assert_eq!(held_by_others(&witness), []);
    }

    #[test]
    fn a_refused_change_leaves_the_locks_as_they_were() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        let (one, other) = (open(&path, Access::CreateNew), open(&path, Access::Write));
        share(&one, Sharing::Reader).expect("nobody else is there");
        share(&other, Sharing::Reader).expect("two may read");
        let message = refusal(share(&one, Sharing::Writer));
        assert!(message.contains("does not let others write") && message.contains("image"), "{message}");
        let third = File::open(&path).expect("the image");
        share(&other, Sharing::None).expect("locks can always be given up");
        assert_eq!(held_by_others(&third), [100, 201, 203], "the first is a reader still");

        share(&one, Sharing::Writer).expect("nobody else is left");
        for role in [Sharing::Reader, Sharing::Writer] {
            let message = refusal(share(&other, role));
            assert!(message.contains("write"), "{message}");
        }
        drop(one);
        assert_eq!(held_by_others(&third), [], "the refused one holds nothing");
    }

    #[test]
    fn a_handle_without_locks_neither_minds_nor_loses_those_of_another() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        let image = open(&path, Access::CreateNew);
        share(&image, Sharing::Writer).expect("nobody else is there");
        drop(open(&path, Access::Read));
        drop(File::open(&path).expect("the image"));
        let witness = File::open(&path).expect("the image");
        assert_eq!(held_by_others(&witness), [100, 101, 103, 201, 203]);
    }

    #[test]
    fn qemu_keeps_its_hands_off_an_image_that_we_write() {
        let Some((directory, path)) = image() else { return };
        let image = open(&path, Access::Write);
        share(&image, Sharing::Writer).expect("nobody else is there");
        let copy = directory.path().join("copy");
        let copy = copy.to_str().expect("a readable name");
        is_locked_out("qemu-img", &["info"], &path, &[]);
        is_locked_out("qemu-img", &["check"], &path, &[]);
        is_locked_out("qemu-img", &["convert", "-O", "raw"], &path, &[copy]);
        is_locked_out("qemu-img", &["resize"], &path, &["2M"]);
        is_locked_out("qemu-io", &["-c", "write 0 512"], &path, &[]);
        is_locked_out("qemu-io", &["-r", "-c", "read 0 512"], &path, &[]);
        succeeds("qemu-img", &["info", "-U"], &path, &[]);
        succeeds("qemu-img", &["convert", "-U", "-O", "raw"], &path, &[copy]);
        share(&image, Sharing::None).expect("locks can always be given up");
        succeeds("qemu-io", &["-c", "write 0 512"], &path, &[]);
    }

    #[test]
    fn qemu_reads_but_does_not_write_an_image_that_we_read() {
        let Some((directory, path)) = image() else { return };
        let image = open(&path, Access::Read);
        share(&image, Sharing::Reader).expect("nobody else is there");
        let copy = directory.path().join("copy");
        let copy = copy.to_str().expect("a readable name");
        succeeds("qemu-img", &["info"], &path, &[]);
        succeeds("qemu-img", &["convert", "-O", "raw"], &path, &[copy]);
        is_locked_out("qemu-io", &["-c", "write 0 512"], &path, &[]);
        is_locked_out("qemu-img", &["resize"], &path, &["2M"]);
    }

    #[test]
    fn we_keep_our_hands_off_an_image_that_qemu_writes() {
        let Some((_directory, path)) = image() else { return };
        let mut qemu = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io comes with qemu-img");
        let mut commands = qemu.stdin.take().expect("a pipe");
        let mut answers = BufReader::new(qemu.stdout.take().expect("a pipe"));
        writeln!(commands, "write 0 512").expect("qemu-io listens");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("qemu-io answers");
        assert!(answer.contains("512"), "{answer}");

        let image = open(&path, Access::Write);
        for role in [Sharing::Reader, Sharing::Writer] {
            let message = refusal(share(&image, role));
            assert!(message.contains("write"), "{message}");
        }
        writeln!(commands, "quit").expect("qemu-io listens");
        drop((commands, answers));
        assert!(qemu.wait().expect("qemu-io ends").success());
        share(&image, Sharing::Writer).expect("qemu-io is gone");
    }
}

//! Listening sockets that have a path: whose it is, and when it may be taken.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// Why a path cannot be listened at.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// No socket can have it.
    #[error("the path has {bytes} bytes; a socket's path has at most 107")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Something else has it.
    #[error("there is something other than a socket; remove it, or give another path")]
    NotASocket,
    /// Somebody has it.
    #[error("somebody listens there already")]
    InUse,
    /// The system refuses.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl From<Errno> for BindError {
    fn from(error: Errno) -> Self {
        Self::System(error.into())
    }
}

/// The file of a socket that we listen at. Goes with this value, unless somebody else's has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            // The next daemon finds a socket that nobody listens at.
            tracing::warn!(event = "socket_left", path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Listens at `path`, without waiting for anybody. A socket file that nobody listens at any more, left by a daemon that was killed, is replaced.
///
/// # Errors
/// If the path is taken or cannot be used.
pub(crate) fn listen_at(path: &Path, mode: Mode, flags: SocketFlags, backlog: i32) -> Result<(UnixListener, SocketFile), BindError> {
    let address = SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => BindError::TooLong { bytes: path.as_os_str().len() },
        other => other.into(),
    })?;
    remove_stale(path, &address)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)?;
    // On Linux the file gets the mode of the unbound socket, less the umask: there is no moment at which others could connect.
    fchmod(&socket, mode)?;
    bind(&socket, &address)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path)? };
    listen(&socket, backlog)?;
    Ok((socket.into(), file))
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket),
        Ok(_) => {}
    }
    // Whoever listens may have more connections waiting than he takes, and would keep us waiting too.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, address) {
        // The last: it is a socket of another type, with somebody behind it.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse),
        Err(Errno::CONNREFUSED) => Ok(fs::remove_file(path)?),
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixDatagram;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const OWNER: Mode = Mode::RUSR.union(Mode::WUSR);

    fn take(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
        listen_at(path, OWNER, SocketFlags::empty(), 0)
    }

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_respected() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let taken = take(&path).expect("nothing is there");
        let mode = fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(take(&path), Err(BindError::InUse)));
        assert!(path.exists(), "the live one stays");
        drop(taken);
        assert!(!path.exists());
        // A daemon that was killed leaves its file.
        drop(UnixListener::bind(&path).expect("nothing is there"));
        assert!(path.exists());
        drop(take(&path).expect("nobody listens"));
        let _datagrams = UnixDatagram::bind(&path).expect("nothing is there");
        assert!(matches!(take(&path), Err(BindError::InUse)));
        let other = directory.path().join("file");
        fs::write(&other, b"precious").expect("a file");
        assert!(matches!(take(&other), Err(BindError::NotASocket)));
        assert_eq!(fs::read(&other).expect("a file"), b"precious");
        assert!(matches!(take(&directory.path().join("x".repeat(120))), Err(BindError::TooLong { .. })));
    }

    #[test]
    fn one_who_listens_and_does_not_accept_keeps_nobody_waiting() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let _busy = take(&path).expect("nothing is there");
        let address = SocketAddrUnix::new(&path).expect("a path");
        let mut waiting = Vec::new();
        loop {
            let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a socket");
            match connect(&client, &address) {
                Ok(()) => waiting.push(client),
                Err(error) => break assert_eq!(error, Errno::AGAIN),
            }
        }
        let (sender, answer) = channel();
        // On a thread, so that one who waits after all is found out.
        std::thread::spawn(move || sender.send(take(&path).map(drop)));
        assert!(matches!(answer.recv_timeout(Duration::from_secs(60)), Ok(Err(BindError::InUse))));
    }

    #[test]
    fn a_path_that_somebody_else_has_taken_is_left_to_him() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let first = take(&path).expect("nothing is there");
        fs::remove_file(&path).expect("a file");
        let second = take(&path).expect("nothing is there");
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}

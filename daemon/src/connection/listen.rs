//! The socket that front-ends connect to.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Permissions of a socket unless somebody says otherwise: its owner only, as whoever connects has the disk.
pub const SOCKET_MODE: u32 = 0o600;

/// Connections that may wait while one is being served.
const BACKLOG: i32 = 16;

/// A listening socket. Its file, if it is ours, goes with it.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Listening {
    /// Listens at `path`. A socket file that nobody listens at any more, left by a daemon that was killed, is replaced.
    ///
    /// # Errors
    /// `AddrInUse` if somebody listens there, `AlreadyExists` if something other than a socket is there, or whatever the system says.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        remove_stale(path)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Before it has a name: the file gets what the socket has, and is never open to more than that.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode))?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let listening = Self { listener: socket.into(), path: Some(path.to_owned()) };
        rustix::net::listen(&listening.listener, BACKLOG)?;
        Ok(listening)
    }

    /// Listens at a socket that somebody else has made, and removes no file.
    ///
    /// # Errors
    /// If it cannot be made blocking.
    pub fn given(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(false)?;
        Ok(Self { listener, path: None })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // If it fails, the next daemon finds a socket that nobody listens at.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something other than a socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there already")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_respected() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let listening = Listening::bind(&path, SOCKET_MODE).expect("nothing is there");
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        assert_eq!(Listening::bind(&path, SOCKET_MODE).expect_err("in use").kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists(), "the live one stays");
        drop(listening);
        assert!(!path.exists());
        // A daemon that was killed leaves its file.
        drop(UnixListener::bind(&path).expect("nothing is there"));
        assert!(path.exists());
        drop(Listening::bind(&path, SOCKET_MODE).expect("nobody listens"));
        std::fs::write(&path, b"precious").expect("a file");
        assert_eq!(Listening::bind(&path, SOCKET_MODE).expect_err("a file").kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).expect("a file"), b"precious");
    }
}

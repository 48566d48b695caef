//! The socket that front-ends connect to.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::SocketFlags;

pub use crate::socket::SOCKET_MODE;
use crate::socket::{BindError, SocketAccess, SocketFile, listen_at};

/// Connections that may wait while one is being served.
const BACKLOG: i32 = 16;

/// A listening socket. Its file, if it is ours, goes with it.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    _file: Option<SocketFile>,
}

impl Listening {
    /// [`Listening::bind_for`] the daemon's group, with these permissions.
    ///
    /// # Errors
    /// The same.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, BindError> {
        Self::bind_for(path, &SocketAccess { mode, group: None })
    }

    /// Listens at `path`, to those who have access. A socket file that nobody listens at any more, left by a daemon that was killed, is replaced.
    ///
    /// # Errors
    /// If the path is taken or cannot be used.
    pub fn bind_for(path: &Path, access: &SocketAccess) -> Result<Self, BindError> {
        let (listener, file) = listen_at(path, access, SocketFlags::empty(), BACKLOG)?;
        Ok(Self { listener, _file: Some(file) })
    }

    /// Listens at a socket that somebody else has made, and removes no file.
    ///
    /// # Errors
    /// If it cannot be made blocking.
    pub fn given(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(false)?;
        Ok(Self { listener, _file: None })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

//! Who is at the other end of a socket.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

/// Credentials of a process as they were when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// 0 if it is in another process namespace.
    pub(super) pid: i32,
    pub(super) uid: u32,
}

impl Peer {
    /// The peer of a connected socket.
    ///
    /// Not through `rustix`: its type cannot hold the process id 0, which the kernel gives for a process of another namespace.
    pub(super) fn of(stream: &UnixStream) -> io::Result<Self> {
        let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
        let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("it is 12");
        // SAFETY: the descriptor is open as long as `stream` is borrowed; the pointers are to two living variables, and `length` says how much the
        // first may be given. `ucred` is plain integers, for which any bytes are valid.
        let status = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast::<libc::c_void>(),
                &raw mut length,
            )
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pid: found.pid, uid: found.uid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!(peer, Peer { pid: i32::try_from(std::process::id()).unwrap(), uid: rustix::process::geteuid().as_raw() });
    }
}

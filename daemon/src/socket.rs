//! Listening sockets that have a path: whose it is, and when it may be taken.

use std::ffi::CString;
use std::fmt;
use std::fs::{self, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, chownat, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// Most memory for the members of a group.
const MAX_GROUP_BYTES: usize = 1 << 20;

/// Permissions of a socket unless somebody says otherwise: its owner only, as whoever connects has the disk.
pub const SOCKET_MODE: u32 = 0o600;
/// The same if a group is given.
pub const GROUP_MODE: u32 = 0o660;

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permissions of the file; writing is connecting.
    pub mode: u32,
    /// Its group, if not what the system gives it.
    pub group: Option<Group>,
}

impl Default for SocketAccess {
    fn default() -> Self {
        Self { mode: SOCKET_MODE, group: None }
    }
}

/// A group of users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// Its number.
    Id(u32),
    /// Its name.
    Name(String),
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

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
    /// No such group.
    #[error("there is no group '{0}' for the socket")]
    NoGroup(String),
    /// Not for us to give.
    #[error("the socket cannot be given to group '{group}': {source}; its user must be in that group, or root")]
    Group {
        /// Which group.
        group: Group,
        /// Why.
        #[source]
        source: io::Error,
    },
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
pub(crate) fn listen_at(
    path: &Path,
    access: &SocketAccess,
    flags: SocketFlags,
    backlog: i32,
) -> Result<(UnixListener, SocketFile), BindError> {
    let address = SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => BindError::TooLong { bytes: path.as_os_str().len() },
        other => other.into(),
    })?;
    let group = access.group.as_ref().map(Group::number).transpose()?;
    remove_stale(path, &address)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)?;
    // On Linux the file gets the mode of the unbound socket, less the umask.
    fchmod(&socket, Mode::from_raw_mode(access.mode & SOCKET_MODE))?;
    bind(&socket, &address)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path)? };
    if *access != SocketAccess::default() {
        give_access(path, access, group)?;
    }
    // Nobody could connect before.
    listen(&socket, backlog)?;
    Ok((socket.into(), file))
}

/// Gives a socket that nobody listens at yet its group and permissions, whatever the umask. A link that took its place is not followed.
fn give_access(path: &Path, access: &SocketAccess, group: Option<u32>) -> Result<(), BindError> {
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if let (Some(number), Some(group)) = (group, &access.group) {
        let given = chownat(&file, "", None, Some(Gid::from_raw(number)), AtFlags::EMPTY_PATH);
        given.map_err(|error| BindError::Group { group: group.clone(), source: error.into() })?;
    }
    // The way to change what a descriptor without access means.
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(fs::set_permissions(itself, Permissions::from_mode(access.mode))?)
}

impl Group {
    /// Its number, which may have to be looked up in the system's databases.
    fn number(&self) -> Result<u32, BindError> {
        let name = match self {
            Self::Id(number) => return Ok(*number),
            Self::Name(name) => name,
        };
        let unknown = || BindError::NoGroup(name.clone());
        let c_name = CString::new(name.as_bytes()).map_err(|_| unknown())?;
        let mut buffer = vec![0; 1 << 10];
        loop {
            let mut found = MaybeUninit::<libc::group>::uninit();
            let mut result = std::ptr::null_mut();
            // SAFETY: the name ends with NUL; the others are places of the right type that live through the call, the buffer with its length.
            let status =
                unsafe { libc::getgrnam_r(c_name.as_ptr(), found.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &raw mut result) };
            match status {
                0 if result.is_null() => return Err(unknown()),
                // SAFETY: the call has succeeded and found a group, which is in this place then.
                0 => return Ok(unsafe { found.assume_init() }.gr_gid),
                libc::ERANGE if buffer.len() < MAX_GROUP_BYTES => buffer.resize(2 * buffer.len(), 0),
                libc::ENOENT | libc::ESRCH => return Err(unknown()),
                other => return Err(io::Error::from_raw_os_error(other).into()),
            }
        }
    }
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
    use std::os::unix::net::UnixDatagram;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn take(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
        listen_at(path, &SocketAccess::default(), SocketFlags::empty(), 0)
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

    #[test]
    fn a_socket_is_for_whom_the_operator_says() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let take = |mode, group| listen_at(&path, &SocketAccess { mode, group }, SocketFlags::empty(), 1);
        let shown = || fs::metadata(&path).map(|file| (file.permissions().mode() & 0o7777, file.gid())).expect("a file");
        let own = rustix::process::getegid().as_raw();
        // Whatever the umask.
        for mode in [0o600, 0o660, 0o666, 0o777] {
            let _taken = take(mode, None).expect("ours");
            assert_eq!(shown().0, mode);
        }
        let name = fs::read_to_string("/etc/group").ok().and_then(|groups| {
            let has_number = |line: &&str| line.split(':').nth(2) == Some(own.to_string().as_str());
            groups.lines().find(has_number).and_then(|line| line.split(':').next().map(str::to_owned))
        });
        for group in [Some(Group::Id(own)), name.map(Group::Name)].into_iter().flatten() {
            let _taken = take(GROUP_MODE, Some(group)).expect("our own group");
            assert_eq!(shown(), (0o660, own));
        }
        if rustix::process::geteuid().is_root() {
            let _taken = take(GROUP_MODE, Some(Group::Id(own + 1))).expect("root may");
            assert_eq!(shown(), (0o660, own + 1));
        }
        let refused = take(GROUP_MODE, Some(Group::Name("no such group".to_owned()))).expect_err("unknown").to_string();
        assert!(refused.contains("no group 'no such group'"), "{refused}");
        assert!(!path.exists());
    }
}

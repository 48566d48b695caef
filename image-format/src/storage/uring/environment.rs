//! Names, time, chance and tasks of the real world.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use io_uring::{opcode, squeue, types};

use super::file::UringFile;
use super::operation::{CallKind, Output};
use super::reactor;
use crate::runtime;
use crate::storage::{Access, CacheMode, Environment, Location};

/// Permissions of new images: for their owner only, as they hold what a guest holds. The umask takes its share of it.
const NEW_FILE_MODE: u64 = 0o600;

/// The real world over the io_uring of the calling thread. Its futures belong into tasks of a [`Reactor`](super::Reactor), whose thread has
/// entered it.
#[derive(Clone, Copy, Debug, Default)]
pub struct UringEnvironment;

/// Time on the clock that all deadlines are on.
pub(super) fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The clock counts from the start of the machine, so it is never negative.
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What the kernel follows and how far, when it opens a name.
#[derive(Clone, Copy)]
enum Resolve {
    Anything,
    /// Stay beneath the directory, and pass no link of any kind.
    Beneath,
}

impl Resolve {
    fn flags(self) -> u64 {
        match self {
            Self::Anything => 0,
            Self::Beneath => libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS,
        }
    }
}

/// Memory of an opening under way.
struct Opening {
    name: CString,
    how: types::OpenHow,
    directory: Option<Rc<OwnedFd>>,
}

async fn open(directory: Option<Rc<OwnedFd>>, name: &Path, flags: i32, mode: u64, resolve: Resolve) -> io::Result<OwnedFd> {
    let flags = u64::from((flags | libc::O_CLOEXEC).unsigned_abs());
    let how = types::OpenHow::new().flags(flags).mode(mode).resolve(resolve.flags());
    let opening = Rc::new(Opening { name: c_string(name)?, how, directory });
    let base = types::Fd(opening.directory.as_ref().map_or(libc::AT_FDCWD, |directory| directory.as_raw_fd()));
    let entry = opcode::OpenAt2::new(base, opening.name.as_ptr(), &raw const opening.how).build();
    // SAFETY: name, how and directory lie in (or are owned by) `opening`, which does not move.
    let submitted = unsafe { reactor::current().call(entry, CallKind::Open, opening) };
    match submitted.await {
        Output::Descriptor(descriptor) => descriptor,
        _ => unreachable!("openings end with a descriptor"),
    }
}

/// Runs an operation for its success only.
///
/// # Safety
/// As for [`reactor::Ring::call`].
async unsafe fn call(entry: squeue::Entry, kind: CallKind, keep: Rc<dyn std::any::Any>) -> io::Result<()> {
    // SAFETY: promised by our caller.
    let submitted = unsafe { reactor::current().call(entry, kind, keep) };
    match submitted.await {
        Output::Value(result) => result.map(drop),
        _ => unreachable!("plain calls end with a value"),
    }
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a file name contains a zero byte"))
}

impl Environment for UringEnvironment {
    type File = UringFile;

    async fn open(&self, at: &Location, access: Access, cache: CacheMode) -> io::Result<UringFile> {
        let (flags, mode) = match access {
            Access::Read => (libc::O_RDONLY, 0),
            Access::Write => (libc::O_RDWR, 0),
            Access::CreateNew => (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, NEW_FILE_MODE),
        };
        // Neither a FIFO without a writer nor a terminal may have an effect on us before we have seen what it is.
        let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
        let fd = match at {
            Location::Trusted(path) => open(None, path, flags, mode, Resolve::Anything).await?,
            Location::Beneath { directory, name } => {
                let directory = open(None, directory, libc::O_PATH | libc::O_DIRECTORY, 0, Resolve::Anything).await?;
                open(Some(Rc::new(directory)), name, flags, mode, Resolve::Beneath).await?
            }
        };
        UringFile::adopt(fd, at.path(), cache)
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let names = Rc::new((c_string(from)?, c_string(to)?));
        let base = types::Fd(libc::AT_FDCWD);
        let entry = opcode::RenameAt::new(base, names.0.as_ptr(), base, names.1.as_ptr()).build();
        // SAFETY: both names are owned by what is kept.
        unsafe { call(entry, CallKind::Plain, names) }.await
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let name = Rc::new(c_string(path)?);
        let entry = opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), name.as_ptr()).build();
        // SAFETY: the name is owned by what is kept.
        unsafe { call(entry, CallKind::Plain, name) }.await
    }

    async fn flush_directory(&self, directory: &Path) -> io::Result<()> {
        let directory = Rc::new(open(None, directory, libc::O_RDONLY | libc::O_DIRECTORY, 0, Resolve::Anything).await?);
        let entry = opcode::Fsync::new(types::Fd(directory.as_raw_fd())).build();
        // SAFETY: the entry names the directory only, which what is kept owns.
        unsafe { call(entry, CallKind::Once, directory) }.await
    }

    fn now(&self) -> Duration {
        monotonic()
    }

    fn wall_clock(&self) -> Duration {
        // A clock set to before 1970 reads as 1970.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }

    async fn sleep_until(&self, deadline: Duration) {
        if monotonic() >= deadline {
            return;
        }
        let timespec = Rc::new(types::Timespec::from(deadline));
        let entry = opcode::Timeout::new(Rc::as_ptr(&timespec)).flags(types::TimeoutFlags::ABS).build();
        // SAFETY: the time is what is kept.
        if let Err(error) = unsafe { call(entry, CallKind::Timer, timespec) }.await {
            // Only a time that the kernel cannot represent; whoever waits that long does not mind waiting for ever.
            tracing::warn!(%error, ?deadline, "a timer could not be set");
            std::future::pending().await
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        runtime::spawn(task);
    }

    fn random(&self) -> u64 {
        let mut bytes = [0_u8; 8];
        // SAFETY: the pointer and length are those of `bytes`.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        assert_eq!(got, 8, "the kernel gives up to 256 random bytes without fail once it has started");
        u64::from_ne_bytes(bytes)
    }
}

//! Names, time, chance and tasks of the real world.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use io_uring::{opcode, squeue, types};

use super::file::{self, UringFile};
use super::operation::{CallKind, Output};
use super::{ring, stat};
use crate::runtime;
use crate::storage::{Access, CacheMode, Environment, Location};

/// Permissions of new images: for their owner only, as they hold what a guest holds. The umask takes its share of it.
const NEW_FILE_MODE: u64 = 0o600;

/// The real world over the io_uring of the calling thread. Its futures belong into tasks of a [`Reactor`](super::Reactor), whose thread has
/// entered it. New files are for their owner only (mode 0600).
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
    // Some kernels' first attempt asks file servers and waits for them: none is made.
    let entry = opcode::OpenAt2::new(base, opening.name.as_ptr(), &raw const opening.how).build().flags(squeue::Flags::ASYNC);
    // SAFETY: name, how and directory lie in (or are owned by) `opening`, which does not move.
    let submitted = unsafe { ring::current().call(entry, CallKind::Open, opening) };
    match submitted.await {
        Output::Descriptor(descriptor) => descriptor,
        _ => unreachable!("openings end with a descriptor"),
    }
}

/// Runs an operation for its success only.
///
/// # Safety
/// As for [`ring::Ring::call`].
pub(super) async unsafe fn call(entry: squeue::Entry, kind: CallKind, keep: Rc<dyn std::any::Any>) -> io::Result<()> {
    // SAFETY: promised by our caller.
    let submitted = unsafe { ring::current().call(entry, kind, keep) };
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
        let (fd, facts) = stat::examine(fd, file::FACTS).await?;
        let (fd, medium) = stat::medium(fd).await;
        UringFile::adopt(fd, &facts, medium, at.path(), cache)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::super::Reactor;
    use super::super::skip::skipped;
    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::storage::Storage;
    use crate::units::HostOffset;

    fn run<T: 'static>(task: impl Future<Output = T> + 'static) -> T {
        Reactor::new(8).expect("a reactor").block_on(task).expect("the ring works")
    }

    fn open(at: Location, access: Access) -> io::Result<UringFile> {
        run(async move { UringEnvironment.open(&at, access, CacheMode::Direct).await })
    }

    fn trusted(path: impl Into<PathBuf>, access: Access) -> io::Result<UringFile> {
        open(Location::Trusted(path.into()), access)
    }

    fn beneath(directory: &Path, name: impl Into<PathBuf>) -> io::Result<UringFile> {
        open(Location::Beneath { directory: directory.to_owned(), name: name.into() }, Access::Read)
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting_for_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a FIFO");
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        for (path, what) in [(fifo.as_path(), "a FIFO"), (Path::new("/dev/null"), "a character device"), (directory.path(), "a directory")]
        {
            let error = trusted(path, Access::Read).expect_err("no file");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
        assert!(beneath(directory.path(), "fifo").is_err());
        // A device node between the images, which only root can make; /dev/full stands for any.
        let node = directory.path().join("node");
        let device = rustix::fs::makedev(1, 7);
        match rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::RUSR, device) {
            Ok(()) => assert_eq!(beneath(directory.path(), "node").expect_err("no file").kind(), io::ErrorKind::InvalidInput),
            Err(error) => skipped(format_args!("no device node to be had: {error}")),
        }
        assert_eq!(trusted(&socket, Access::Read).expect_err("no file").raw_os_error(), Some(libc::ENXIO));
        assert_eq!(trusted(directory.path(), Access::Write).expect_err("no file").raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    fn a_new_file_must_be_new_and_is_for_its_owner_only() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        assert_eq!(trusted(&path, Access::Write).expect_err("nothing there").kind(), io::ErrorKind::NotFound);
        let file = trusted(&path, Access::CreateNew).expect("a new file");
        let (length, file) = run(async move { (file.length().await, file) });
        assert_eq!(length.expect("a length"), 0);
        assert_eq!(std::fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600);
        assert_eq!(trusted(&path, Access::CreateNew).expect_err("there already").kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(trusted("a\0b", Access::Read).expect_err("no name").kind(), io::ErrorKind::InvalidInput);
        assert_eq!(trusted(&path, Access::Read).expect("the file").identity(), file.identity());
    }

    #[test]
    fn a_file_opened_for_reading_takes_no_writes() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        std::fs::write(&path, [1; 512]).expect("a file");
        let file = trusted(&path, Access::Read).expect("the file");
        let (result, _) = run(async move { file.write(HostOffset::ZERO, AlignedBuffer::zeroed(512).into()).await });
        assert_eq!(result.expect_err("refused").raw_os_error(), Some(libc::EBADF));
        assert_eq!(std::fs::read(&path).expect("the file"), [1; 512]);
    }

    #[test]
    fn names_out_of_files_stay_beneath_their_directory() {
        let outside = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(outside.path().join("secret"), "secret").expect("a file");
        let allowed = outside.path().join("allowed");
        std::fs::create_dir_all(allowed.join("deep")).expect("directories");
        std::fs::write(allowed.join("deep/image"), "image").expect("a file");
        symlink(outside.path().join("secret"), allowed.join("absolute")).expect("a link");
        symlink("../secret", allowed.join("relative")).expect("a link");
        symlink("deep", allowed.join("inside")).expect("a link");
        symlink("/proc/self/fd/0", allowed.join("magic")).expect("a link");

        let image = beneath(&allowed, "deep/image").expect("beneath");
        assert_eq!(run(async move { image.length().await }).expect("a length"), 5);
        let errors = [libc::EXDEV, libc::ELOOP];
        for name in ["../secret", "deep/../../secret", "/etc/hostname", "absolute", "relative", "inside/image", "magic"] {
            let error = beneath(&allowed, name).expect_err(name).raw_os_error();
            assert!(error.is_some_and(|error| errors.contains(&error)), "{name}: {error:?}");
        }
        assert!(beneath(Path::new("/proc/self/fd"), "0").is_err(), "descriptors are magic links");
        // A directory that is swapped for a link after its name was resolved.
        std::fs::rename(allowed.join("deep"), allowed.join("gone")).expect("a rename");
        symlink(outside.path(), allowed.join("deep")).expect("a link");
        assert_eq!(beneath(&allowed, "deep/secret").expect_err("a link").raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn names_are_replaced_and_removed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        std::fs::write(&old, "old").expect("a file");
        std::fs::write(&new, "new").expect("a file");
        let (from, to, all) = (old.clone(), new.clone(), directory.path().to_owned());
        run(async move {
            UringEnvironment.rename(&from, &to).await.expect("a rename");
            UringEnvironment.flush_directory(&all).await.expect("a flush");
            assert_eq!(UringEnvironment.rename(&from, &to).await.expect_err("gone").kind(), io::ErrorKind::NotFound);
        });
        assert_eq!(std::fs::read_to_string(&new).expect("the file"), "old");
        run(async move {
            UringEnvironment.remove(&new).await.expect("a removal");
            assert_eq!(UringEnvironment.remove(&new).await.expect_err("gone").kind(), io::ErrorKind::NotFound);
        });
        let missing = directory.path().join("missing");
        assert!(run(async move { UringEnvironment.flush_directory(&missing).await }).is_err());
    }

    #[test]
    fn no_descriptor_is_left_behind() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        drop(trusted(&path, Access::CreateNew).expect("a new file"));
        let at = Location::Trusted(path);
        let name = at.path();
        run(async move {
            for _ in 0..50 {
                // Dropped while the kernel opens: the descriptor comes back all the same.
                let mut opening = Box::pin(UringEnvironment.open(&at, Access::Read, CacheMode::Buffered));
                std::future::poll_fn(|context| {
                    let _ = opening.as_mut().poll(context);
                    std::task::Poll::Ready(())
                })
                .await;
                drop(opening);
            }
            UringEnvironment.sleep_until(UringEnvironment.now() + Duration::from_millis(1)).await;
        });
        let is_ours = |link: &PathBuf| std::fs::read_link(link).is_ok_and(|target| target == name);
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("descriptors").filter_map(|entry| entry.ok().map(|entry| entry.path()));
        assert_eq!(descriptors.filter(is_ours).count(), 0);
    }

    #[test]
    fn chance_and_clocks_move() {
        assert_ne!(UringEnvironment.random(), UringEnvironment.random());
        assert!(UringEnvironment.now() <= UringEnvironment.now());
        assert!(UringEnvironment.wall_clock() > Duration::from_secs(1_700_000_000));
    }
}

//! Names, time, chance and tasks of the real world.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use io_uring::{opcode, squeue, types};

use super::file::UringFile;
use super::operation::{CallKind, Output};
use super::{open, ring};
use crate::runtime::{self, offload};
use crate::storage::{Access, CacheMode, Environment, FileIdentity, Location};

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

/// Finds `count` answers on one other thread: going to it takes longer than most of them. Without a thread that is the answer to all.
async fn offload_all<T: Send + 'static>(count: usize, job: impl FnOnce() -> Vec<io::Result<T>> + Send + 'static) -> Vec<io::Result<T>> {
    let answers = offload(job).await;
    answers.unwrap_or_else(|error| (0..count).map(|_| Err(io::Error::new(error.kind(), error.to_string()))).collect())
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a file name contains a zero byte"))
}

impl Environment for UringEnvironment {
    type File = UringFile;

    async fn open(&self, at: &Location, access: Access, cache: CacheMode) -> io::Result<UringFile> {
        let at = at.clone();
        // Each of the questions may go to a file server, which may take for ever.
        offload(move || open::file(&at, access, cache)).await?
    }

    async fn open_all(&self, at: &[Location], access: Access, cache: CacheMode) -> Vec<io::Result<UringFile>> {
        let (count, at) = (at.len(), at.to_vec());
        offload_all(count, move || open::files(&at, access, cache)).await
    }

    async fn identities(&self, paths: &[PathBuf]) -> Vec<io::Result<FileIdentity>> {
        let (count, paths) = (paths.len(), paths.to_vec());
        offload_all(count, move || paths.iter().map(|path| open::identity(path)).collect()).await
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
        let directory = directory.to_owned();
        let directory = Rc::new(offload(move || open::directory(&directory)).await??);
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
    use std::time::Instant;

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
    fn several_are_opened_each_as_it_is_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let [one, other] = ["one", "other"].map(|name| directory.path().join(name));
        for path in [&one, &other] {
            std::fs::create_dir(path).expect("a directory");
            std::fs::write(path.join("image"), path.as_os_str().as_bytes()).expect("a file");
        }
        symlink("image", one.join("link")).expect("a link");
        let beneath = |directory: &Path, name: &str| Location::Beneath { directory: directory.to_owned(), name: name.into() };
        let gone = directory.path().join("gone");
        let all = [
            beneath(&one, "image"),
            beneath(&gone, "image"),
            beneath(&one, "link"),
            beneath(&other, "image"),
            Location::Trusted(one.join("link")),
            beneath(&other, "none"),
            beneath(&one, "image"),
        ];
        let asked = all.clone();
        let opened = run(async move { UringEnvironment.open_all(&asked, Access::Read, CacheMode::Direct).await });
        let answer = |opened: io::Result<UringFile>| opened.map(|file| file.identity()).map_err(|error| error.raw_os_error());
        let alone: Vec<_> = all.map(|at| answer(open(at, Access::Read))).into();
        assert_eq!(alone.iter().filter(|answer| answer.is_ok()).count(), 4);
        assert_ne!(alone[0], alone[3]);
        assert_eq!(opened.into_iter().map(answer).collect::<Vec<_>>(), alone);
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
            // Those before it have been begun by then.
            drop(UringEnvironment.open(&at, Access::Read, CacheMode::Buffered).await.expect("there"));
        });
        let is_ours = |link: &PathBuf| std::fs::read_link(link).is_ok_and(|target| target == name);
        let left = || {
            let descriptors =
                std::fs::read_dir("/proc/self/fd").expect("descriptors").filter_map(|entry| entry.ok().map(|entry| entry.path()));
            descriptors.filter(is_ours).count()
        };
        // Nobody waits for the openings, which go on.
        let deadline = Instant::now() + Duration::from_secs(60);
        while left() > 0 {
            assert!(Instant::now() < deadline, "{} are left", left());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn chance_and_clocks_move() {
        assert_ne!(UringEnvironment.random(), UringEnvironment.random());
        assert!(UringEnvironment.now() <= UringEnvironment.now());
        assert!(UringEnvironment.wall_clock() > Duration::from_secs(1_700_000_000));
    }
}

//! Files in memory: every operation is complete at once and nothing is ever lost.
//!
//! For unit tests of what lies above the seam. Rules that the system has are kept, so that code which passes here does not fail there: alignment
//! of direct transfers, read-only handles, locks, names that leave their directory.

use std::collections::BTreeMap;
use std::future::{Future, Ready, ready};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant, SystemTime};

use super::names::{Entry, Names};
use super::sharing::SharingTable;
use super::sparse::SparseBytes;
use super::{Access, CacheMode, Chance, Environment, FileIdentity, Location, Sharing, Storage, Transferred};
use crate::buffer::Buffer;
use crate::runtime::{Executor, Unpark, spawn};
use crate::units::{HostOffset, SECTOR_BYTES};

/// How long [`MemoryEnvironment::block_on`] waits for other threads before it calls the wait a deadlock.
const DEADLOCK_AFTER: Duration = Duration::from_secs(60);

/// 2026-01-01 00:00 UTC, where the still clock begins.
pub(super) const STILL_WALL_CLOCK: Duration = Duration::from_secs(1_767_225_600);

/// Named files in memory, with a clock that either is the system's or stands still until it is moved. Clones are the same environment.
#[derive(Clone, Debug)]
pub struct MemoryEnvironment {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    names: Mutex<Names<Arc<Content>>>,
    next_number: AtomicU64,
    chance: Mutex<Chance>,
    clock: Clock,
    sleepers: Mutex<BTreeMap<(Duration, u64), Waker>>,
}

#[derive(Debug)]
enum Clock {
    Real { start: Instant },
    Still { now: Mutex<Duration> },
}

/// One file, whatever its names and handles.
#[derive(Debug)]
struct Content {
    inode: u64,
    bytes: Mutex<SparseBytes>,
    sharing: SharingTable,
}

/// An open file of a [`MemoryEnvironment`].
#[derive(Debug)]
pub struct MemoryFile {
    content: Arc<Content>,
    handle: u64,
    writable: bool,
    alignment: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for MemoryEnvironment {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryEnvironment {
    /// No files, and a clock that stands still. [`block_on`](Self::block_on) moves it to the next sleeper when nothing else can go on, and
    /// [`advance`](Self::advance) moves it by hand.
    pub fn new() -> Self {
        Self::with_clock(Clock::Still { now: Mutex::new(Duration::ZERO) })
    }

    /// No files, and the system's clock.
    pub fn with_real_clock() -> Self {
        Self::with_clock(Clock::Real { start: Instant::now() })
    }

    fn with_clock(clock: Clock) -> Self {
        let shared = Shared {
            names: Mutex::default(),
            next_number: AtomicU64::new(1),
            chance: Mutex::new(Chance::new(0)),
            clock,
            sleepers: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Runs `future` and the tasks that it spawns on this thread until `future` ends.
    ///
    /// # Panics
    /// If nothing can go on: no task is ready, nobody sleeps, and no other thread wakes anything for a minute.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        struct ThreadUnpark(Thread);
        impl Unpark for ThreadUnpark {
            fn unpark(&self) {
                self.0.unpark();
            }
        }
        let executor = Executor::new(ThreadUnpark(std::thread::current()));
        executor.clone().block_on(future, || {
            if executor.prepare_park() {
                self.idle(&executor);
                executor.end_park();
            }
        })
    }

    /// Waits until a sleeper is due or another thread has woken a task of `executor`.
    fn idle(&self, executor: &Executor) {
        let waiting_since = Instant::now();
        while !executor.has_ready() {
            let next = self.next_deadline();
            match (&self.shared.clock, next) {
                (Clock::Still { now }, Some(deadline)) => {
                    let mut now = lock(now);
                    *now = deadline.max(*now);
                }
                (Clock::Real { .. }, Some(deadline)) => std::thread::park_timeout(deadline.saturating_sub(self.now())),
                (_, None) => {
                    std::thread::park_timeout(DEADLOCK_AFTER);
                    assert!(waiting_since.elapsed() < DEADLOCK_AFTER || executor.has_ready(), "deadlock: nothing can go on");
                }
            }
            self.wake_sleepers();
        }
    }

    /// Moves the clock that stands still.
    ///
    /// # Panics
    /// If the environment has the system's clock.
    pub fn advance(&self, by: Duration) {
        match &self.shared.clock {
            Clock::Still { now } => *lock(now) += by,
            Clock::Real { .. } => panic!("the system's clock cannot be moved"),
        }
        self.wake_sleepers();
    }

    /// When the next sleeper is due: for threads with a loop of their own, which then call [`wake_sleepers`](Self::wake_sleepers).
    pub fn next_deadline(&self) -> Option<Duration> {
        lock(&self.shared.sleepers).first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Wakes every sleeper that is due.
    pub fn wake_sleepers(&self) {
        let now = self.now();
        let mut due = Vec::new();
        {
            let mut sleepers = lock(&self.shared.sleepers);
            while let Some(first) = sleepers.first_entry() {
                if first.key().0 > now {
                    break;
                }
                due.push(first.remove());
            }
        }
        for waker in due {
            waker.wake();
        }
    }

    /// Makes a file of `bytes`, replacing one of that name.
    ///
    /// # Panics
    /// If `path` cannot be a file's name.
    pub fn put(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let mut sparse = SparseBytes::default();
        sparse.write_bytes(0, bytes).expect("a slice is never longer than a file can be");
        self.put_sparse(path.as_ref(), sparse);
    }

    pub(super) fn put_sparse(&self, path: &Path, bytes: SparseBytes) {
        let mut names = lock(&self.shared.names);
        let path = names.resolve_name(path).expect("a name that a file can have");
        let content = Content { inode: self.next_number(), bytes: Mutex::new(bytes), sharing: SharingTable::default() };
        names.set(&path, Some(Entry::File(Arc::new(content))));
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// If there is none, or it is longer than 4 GiB (use [`export`](Self::export)).
    pub fn bytes(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let content = self.content(path.as_ref())?;
        let bytes = lock(&content.bytes);
        if bytes.len() > 4 << 30 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.to_vec(0..bytes.len()))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn symlink(&self, target: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
        let mut names = lock(&self.shared.names);
        let path = names.resolve_name(path.as_ref())?;
        names.insert_new(path, Entry::Link(target.as_ref().to_owned()))
    }

    /// All files' names.
    pub fn files(&self) -> Vec<PathBuf> {
        let names = lock(&self.shared.names);
        names.iter().filter(|(_, entry)| matches!(entry, Entry::File(_))).map(|(name, _)| name.clone()).collect()
    }

    /// Copies a file, holes kept, to a real one, for programs that know only those. What was there is overwritten.
    ///
    /// # Errors
    /// If either file cannot be used.
    pub fn export(&self, path: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
        let content = self.content(path.as_ref())?;
        let bytes = lock(&content.bytes).clone();
        export_sparse(&bytes, to.as_ref())
    }

    /// Copies a real file, holes kept, to one here, replacing one of that name.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn import(&self, from: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
        self.put_sparse(path.as_ref(), import_sparse(from.as_ref())?);
        Ok(())
    }

    fn content(&self, path: &Path) -> io::Result<Arc<Content>> {
        let names = lock(&self.shared.names);
        names.file(&names.resolve(&Location::Trusted(path.to_owned()))?)
    }

    fn next_number(&self) -> u64 {
        self.shared.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn open_now(&self, at: &Location, access: Access, cache: CacheMode) -> io::Result<MemoryFile> {
        let mut names = lock(&self.shared.names);
        let content = if access == Access::CreateNew {
            let path = names.resolve(at)?;
            let content = Content { inode: self.next_number(), bytes: Mutex::default(), sharing: SharingTable::default() };
            let content = Arc::new(content);
            names.insert_new(path, Entry::File(Arc::clone(&content)))?;
            content
        } else {
            names.file(&names.resolve(at)?)?
        };
        let alignment = match cache {
            CacheMode::Direct => SECTOR_BYTES,
            CacheMode::Buffered => 1,
        };
        Ok(MemoryFile { content, handle: self.next_number(), writable: access != Access::Read, alignment })
    }
}

/// Writes the parts that have space to a real file, and sets its length.
pub(super) fn export_sparse(bytes: &SparseBytes, to: &Path) -> io::Result<()> {
    let mut file = std::fs::File::create(to)?;
    for range in bytes.allocated_ranges() {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + (1 << 20));
            file.seek(SeekFrom::Start(start))?;
            file.write_all(&bytes.to_vec(start..end))?;
            start = end;
        }
    }
    file.set_len(bytes.len())
}

/// Reads the parts of a real file that have space.
pub(super) fn import_sparse(from: &Path) -> io::Result<SparseBytes> {
    let file = std::fs::File::open(from)?;
    let mut bytes = SparseBytes::default();
    bytes.set_len(file.metadata()?.len())?;
    let mut buffer = vec![0; 1 << 20];
    let mut next = 0;
    while next < bytes.len() {
        let start = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(next)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start))?;
        next = start;
        while next < end {
            let len = usize::try_from(end - next).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..len], next)?;
            bytes.write_bytes(next, &buffer[..len])?;
            next += len as u64;
        }
    }
    Ok(bytes)
}

impl MemoryFile {
    fn check_aligned(&self, at: HostOffset, buffer: &Buffer) -> io::Result<()> {
        if at.is_aligned(self.alignment) && (buffer.len() as u64).is_multiple_of(self.alignment) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBADF)) }
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        self.content.sharing.close(self.handle);
    }
}

impl Storage for MemoryFile {
    type Transfer = Ready<Transferred>;

    fn read(&self, at: HostOffset, mut into: Buffer) -> Self::Transfer {
        let result = self.check_aligned(at, &into).and_then(|()| lock(&self.content.bytes).read(at.get(), &mut into));
        ready((result, into))
    }

    fn write(&self, at: HostOffset, from: Buffer) -> Self::Transfer {
        let admitted = self.check_writable().and_then(|()| self.check_aligned(at, &from));
        let result = admitted.and_then(|()| lock(&self.content.bytes).write(at.get(), &from));
        ready((result, from))
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.check_writable()?;
        lock(&self.content.bytes).allocate(at.get(), len)
    }

    async fn punch(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.check_writable()?;
        lock(&self.content.bytes).punch(at.get(), len)
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(lock(&self.content.bytes).len())
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_writable()?;
        lock(&self.content.bytes).set_len(len)
    }

    async fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(lock(&self.content.bytes).allocated())
    }

    fn alignment(&self) -> u64 {
        self.alignment
    }

    fn identity(&self) -> FileIdentity {
        FileIdentity { device: 0, inode: self.content.inode }
    }

    async fn set_sharing(&self, sharing: Sharing) -> io::Result<()> {
        self.content.sharing.set(self.handle, sharing)
    }
}

impl Environment for MemoryEnvironment {
    type File = MemoryFile;

    async fn open(&self, at: &Location, access: Access, cache: CacheMode) -> io::Result<MemoryFile> {
        self.open_now(at, access, cache)
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = lock(&self.shared.names);
        let (from, to) = (names.resolve_name(from)?, names.resolve_name(to)?);
        names.rename(&from, &to)
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let mut names = lock(&self.shared.names);
        let path = names.resolve_name(path)?;
        names.remove(&path)
    }

    async fn flush_directory(&self, _directory: &Path) -> io::Result<()> {
        Ok(())
    }

    fn now(&self) -> Duration {
        match &self.shared.clock {
            Clock::Real { start } => start.elapsed(),
            Clock::Still { now } => *lock(now),
        }
    }

    fn wall_clock(&self) -> Duration {
        match &self.shared.clock {
            Clock::Real { .. } => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
            Clock::Still { now } => STILL_WALL_CLOCK + *lock(now),
        }
    }

    async fn sleep_until(&self, deadline: Duration) {
        let key = (deadline, self.next_number());
        let sleeper = Sleeper { shared: &self.shared, key };
        std::future::poll_fn(|context| {
            if self.now() >= deadline {
                return Poll::Ready(());
            }
            lock(&sleeper.shared.sleepers).insert(sleeper.key, context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        spawn(task);
    }

    fn random(&self) -> u64 {
        lock(&self.shared.chance).number()
    }
}

/// Takes its entry out of the list of sleepers when the sleep ends or is given up.
struct Sleeper<'a> {
    shared: &'a Shared,
    key: (Duration, u64),
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        let waker = lock(&self.shared.sleepers).remove(&self.key);
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::storage::StorageExt;

    fn trusted(path: &str) -> Location {
        Location::Trusted(path.into())
    }

    #[test]
    fn a_file_keeps_its_bytes_under_a_new_name() {
        let environment = MemoryEnvironment::new();
        let inner = environment.clone();
        environment.block_on(async move {
            let file = inner.open(&trusted("/a"), Access::CreateNew, CacheMode::Direct).await.unwrap();
            file.write_bytes(HostOffset::new(700), b"abc").await.unwrap();
            inner.rename(Path::new("/a"), Path::new("/b")).await.unwrap();
            let again = inner.open(&trusted("/b"), Access::Read, CacheMode::Direct).await.unwrap();
            assert_eq!(again.identity(), file.identity());
            assert_eq!(&*again.read_bytes(HostOffset::new(699), 5).await.unwrap(), b"\0abc\0");
            assert_eq!(inner.open(&trusted("/a"), Access::Read, CacheMode::Direct).await.unwrap_err().kind(), io::ErrorKind::NotFound);
            assert_eq!(
                inner.open(&trusted("/b"), Access::CreateNew, CacheMode::Direct).await.unwrap_err().kind(),
                io::ErrorKind::AlreadyExists
            );
        });
        assert_eq!(environment.bytes("/b").unwrap().len(), 1024);
        assert_eq!(environment.files(), [PathBuf::from("/b")]);
    }

    #[test]
    fn read_only_handles_and_ragged_transfers_are_refused() {
        let environment = MemoryEnvironment::new();
        environment.put("/a", &[1; 1024]);
        let inner = environment.clone();
        environment.block_on(async move {
            let reader = inner.open(&trusted("/a"), Access::Read, CacheMode::Direct).await.unwrap();
            let buffer = || Buffer::Owned(AlignedBuffer::zeroed(512));
            assert_eq!(reader.write(HostOffset::ZERO, buffer()).await.0.unwrap_err().raw_os_error(), Some(libc::EBADF));
            assert!(reader.set_len(0).await.is_err());
            assert_eq!(reader.read(HostOffset::new(1), buffer()).await.0.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            let buffered = inner.open(&trusted("/a"), Access::Write, CacheMode::Buffered).await.unwrap();
            buffered.write(HostOffset::new(1), buffer()).await.0.unwrap();
            buffered.set_sharing(Sharing::Writer).await.unwrap();
            assert!(reader.set_sharing(Sharing::Reader).await.is_err());
            drop(buffered);
            reader.set_sharing(Sharing::Reader).await.unwrap();
        });
        assert_eq!(environment.bytes("/a").unwrap()[..2], [1, 0]);
    }

    #[test]
    fn the_still_clock_moves_to_the_next_sleeper() {
        let environment = MemoryEnvironment::new();
        let inner = environment.clone();
        environment.block_on(async move {
            inner.sleep_until(Duration::from_secs(3600)).await;
            assert_eq!(inner.now(), Duration::from_secs(3600));
        });
    }

    #[test]
    fn the_real_clock_and_other_threads_wake() {
        let environment = MemoryEnvironment::with_real_clock();
        let inner = environment.clone();
        environment.block_on(async move {
            let deadline = inner.now() + Duration::from_millis(1);
            inner.sleep_until(deadline).await;
            assert!(inner.now() >= deadline);
            let state = Arc::new((AtomicU64::new(0), crate::runtime::WaitQueue::new()));
            let theirs = Arc::clone(&state);
            let thread = std::thread::spawn(move || {
                theirs.0.store(1, Ordering::SeqCst);
                theirs.1.notify_all();
            });
            state.1.wait_until(|| (state.0.load(Ordering::SeqCst) == 1).then_some(())).await;
            thread.join().unwrap();
        });
    }

    #[test]
    fn files_travel_to_the_system_and_back_with_their_length() {
        let directory = tempfile::tempdir().unwrap();
        let environment = MemoryEnvironment::new();
        environment.put("/a", b"abc");
        let inner = environment.clone();
        environment.block_on(async move {
            let file = inner.open(&trusted("/a"), Access::Write, CacheMode::Buffered).await.unwrap();
            file.set_len(1_000_000).await.unwrap();
        });
        let real = directory.path().join("real");
        environment.export("/a", &real).unwrap();
        environment.import(&real, "/b").unwrap();
        assert_eq!(environment.bytes("/a").unwrap(), environment.bytes("/b").unwrap());
    }
}

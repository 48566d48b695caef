//! The seam beneath every image: files as asynchronous storage, and the little else that the code needs of its surroundings.
//!
//! All I/O of the formats, the stack and the daemon goes through [`Storage`] and [`Environment`], and so do time, randomness and the spawning of
//! tasks. The same code then runs over io_uring, over plain memory, and on a simulated disk with a volatile write cache and a virtual clock,
//! where a run repeats to the byte from its seed.
//!
//! Futures are polled on the thread that made them and need not be `Send`; the objects themselves are shared between threads.

mod chance;
pub mod kept;
mod memory;
mod names;
mod sharing;
pub mod simulated;
mod sparse;
pub mod uring;

pub use chance::Chance;
pub use memory::{MemoryEnvironment, MemoryFile};

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;

use crate::buffer::{AlignedBuffer, Buffer};
use crate::units::HostOffset;

/// How a transfer ended, with its buffer given back.
pub type Transferred = (io::Result<()>, Buffer);

/// One open file or block device.
///
/// Operations may overlap and complete in any order. A completed write is visible to every later read, but durable only after a [`flush`]
/// that began after it completed. An operation runs to its end even when its future is dropped; its buffer lives until then.
///
/// [`flush`]: Storage::flush
pub trait Storage: std::fmt::Debug + Send + Sync + 'static {
    /// A read or a write under way.
    type Transfer: Future<Output = Transferred> + Unpin + 'static;

    /// Fills the whole buffer with the bytes from `at` on. Bytes past the end of the file read as zeros.
    ///
    /// `at` must be a multiple of [`alignment`](Storage::alignment), and so must the buffer's length; its address need not be.
    fn read(&self, at: HostOffset, into: Buffer) -> Self::Transfer;

    /// Writes the whole buffer at `at`, growing the file if it ends before. Alignment as for [`read`](Storage::read).
    ///
    /// After an error any part of the bytes may have been written.
    fn write(&self, at: HostOffset, from: Buffer) -> Self::Transfer;

    /// Makes every write, allocation, punch and length that completed before durable.
    ///
    /// After an error nothing can be said about what is durable, and flushing again proves nothing: the caller must not retry it into a success.
    fn flush(&self) -> impl Future<Output = io::Result<()>>;

    /// Gets space for `len` bytes from `at` on, growing the file if it ends before. Bytes that had none read as zeros afterwards; others stay.
    ///
    /// # Errors
    /// `Unsupported` where the medium cannot; the caller goes on without.
    fn allocate(&self, at: HostOffset, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Whether getting space takes as long as writing to it, as in memory: then what may never be written is better not allocated.
    fn allocates_slowly(&self) -> bool {
        false
    }

    /// Makes `len` bytes from `at` on read as zeros, gives their space back where the medium can, and keeps the length of the file.
    ///
    /// # Errors
    /// `Unsupported` where the medium cannot; nothing has changed then.
    fn punch(&self, at: HostOffset, len: u64) -> impl Future<Output = io::Result<()>>;

    /// The length in bytes now.
    ///
    /// # Errors
    /// Whatever the medium reports.
    fn length(&self) -> impl Future<Output = io::Result<u64>>;

    /// Sets the length; new bytes read as zeros. A block device's cannot change: `Unsupported`.
    fn set_len(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Bytes that the medium really occupies, for people.
    ///
    /// # Errors
    /// Whatever the medium reports.
    fn allocated_bytes(&self) -> impl Future<Output = io::Result<u64>>;

    /// What positions and lengths of transfers must be a multiple of: 512 or, where the medium takes any, 1. Media that ask for more are
    /// opened through the page cache instead.
    fn alignment(&self) -> u64;

    /// Which file this is, however it was reached.
    fn identity(&self) -> FileIdentity;

    /// What tells the file from one that had its identity before and is gone: when it was made, in nanoseconds since 1970, or a block device's place
    /// in the order of all disks since the machine was started. Zero where that is not known.
    fn born(&self) -> u64 {
        0
    }

    /// Takes, strengthens or gives up the locks by which programs that share image files keep out of each other's way.
    ///
    /// # Errors
    /// `WouldBlock` if another program holds what excludes this; the locks are then as before.
    fn set_sharing(&self, sharing: Sharing) -> impl Future<Output = io::Result<()>>;
}

/// Conveniences over [`Storage`] for metadata, which lives in memory of our own.
pub trait StorageExt: Storage {
    /// The `len` bytes from `at` on, zeros past the end of the file. Any alignment.
    fn read_bytes(&self, at: HostOffset, len: usize) -> impl Future<Output = io::Result<AlignedBuffer>> {
        async move {
            let alignment = self.alignment();
            let start = at.align_down(alignment);
            let end = (at + len as u64).align_up(alignment);
            let whole = AlignedBuffer::zeroed(usize::try_from(end - start).map_err(|_| io::ErrorKind::InvalidInput)?);
            let (result, buffer) = self.read(start, Buffer::Owned(whole)).await;
            result?;
            let buffer = buffer.into_owned();
            if start == at && buffer.len() == len {
                return Ok(buffer);
            }
            let skip = usize::try_from(at - start).map_err(|_| io::ErrorKind::InvalidInput)?;
            Ok(AlignedBuffer::copy_of(&buffer[skip..skip + len]))
        }
    }

    /// Writes `bytes` at `at`. Any alignment: a ragged start or end is read first and written back around them, so nobody else may write
    /// the same units meanwhile.
    fn write_bytes(&self, at: HostOffset, bytes: &[u8]) -> impl Future<Output = io::Result<()>> {
        async move {
            let alignment = self.alignment();
            let start = at.align_down(alignment);
            let end = (at + bytes.len() as u64).align_up(alignment);
            let whole = usize::try_from(end - start).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut buffer = if whole == bytes.len() { AlignedBuffer::zeroed(whole) } else { self.read_bytes(start, whole).await? };
            let skip = usize::try_from(at - start).map_err(|_| io::ErrorKind::InvalidInput)?;
            buffer[skip..skip + bytes.len()].copy_from_slice(bytes);
            self.write(start, Buffer::Owned(buffer)).await.0
        }
    }
}

impl<S: Storage> StorageExt for S {}

/// Which file something is: the same for every name and every descriptor of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIdentity {
    /// The file system or, for a device node, a mark of its own.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

impl FileIdentity {
    /// Stands in [`device`](Self::device) for block devices, which are told apart by their own number. No file system has it.
    pub const BLOCK_DEVICES: u64 = u64::MAX;

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.device == Self::BLOCK_DEVICES
    }
}

/// What this program does with an image file and what it lets others do meanwhile, as QEMU's image locks express it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// No locks at all.
    None,
    /// We read; nobody may write or resize.
    Reader,
    /// We read and write; others may only read what they know may change.
    Writer,
}

/// Where a file is, and how far its name is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A path that the operator gave.
    Trusted(PathBuf),
    /// A name that came out of a file: it must lie beneath `directory` and pass no symbolic link on the way.
    Beneath {
        /// An allowed directory, absolute.
        directory: PathBuf,
        /// The rest of the path, relative, without `..`.
        name: PathBuf,
    },
}

impl Location {
    /// The whole path, for messages.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Trusted(path) => path.clone(),
            Self::Beneath { directory, name } => directory.join(name),
        }
    }
}

/// Whether and how a file is opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    Read,
    /// Reads and writes of a file that exists.
    Write,
    /// Reads and writes of a file that must not exist yet.
    CreateNew,
}

/// Whether transfers pass the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Around it (`O_DIRECT`), where the medium can.
    #[default]
    Direct,
    /// Through it.
    Buffered,
}

/// What code needs of its surroundings beside files: names, time, chance, tasks.
pub trait Environment: std::fmt::Debug + Clone + Send + Sync + 'static {
    /// Files as this environment has them.
    type File: Storage;

    /// Opens a regular file or a block device.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, `PermissionDenied` and so on as the system says; `InvalidInput` for anything that is neither a file nor a
    /// block device; `ELOOP` or `EXDEV` for a name that leaves its allowed directory.
    fn open(&self, at: &Location, access: Access, cache: CacheMode) -> impl Future<Output = io::Result<Self::File>>;

    /// Opens several, each as [`open`](Environment::open) does, perhaps one after the other: one that hangs may keep back those behind it, and what is
    /// found of a directory then counts for all that lie beneath it in a row. Who opens many asks for some at a time.
    ///
    /// # Errors
    /// For each as [`open`](Environment::open) has them.
    fn open_all(&self, at: &[Location], access: Access, cache: CacheMode) -> impl Future<Output = Vec<io::Result<Self::File>>> {
        join_all(at.iter().map(move |at| self.open(at, access, cache)))
    }

    /// Which file each of these paths leads to, through links as well.
    ///
    /// # Errors
    /// For each as [`open`](Environment::open) has them.
    fn identities(&self, paths: &[PathBuf]) -> impl Future<Output = Vec<io::Result<FileIdentity>>> {
        async move {
            let mut identities = Vec::with_capacity(paths.len());
            for path in paths {
                let file = self.open(&Location::Trusted(path.clone()), Access::Read, CacheMode::Buffered).await;
                identities.push(file.map(|file| file.identity()));
            }
            identities
        }
    }

    /// Gives `from` the name `to`, replacing what had it. Durable after [`flush_directory`](Environment::flush_directory).
    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;

    /// Removes a file's name.
    fn remove(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

    /// Makes the names in `directory` durable.
    fn flush_directory(&self, directory: &Path) -> impl Future<Output = io::Result<()>>;

    /// Time since some fixed moment, never going backwards.
    fn now(&self) -> Duration;

    /// Time since 1970-01-01 00:00 UTC, for people.
    fn wall_clock(&self) -> Duration;

    /// Ends when [`now`](Environment::now) has reached `deadline`.
    fn sleep_until(&self, deadline: Duration) -> impl Future<Output = ()>;

    /// Runs a task on this thread's executor.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// An unpredictable (in simulation: seeded) number.
    fn random(&self) -> u64;
}

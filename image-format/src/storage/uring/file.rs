//! One open file or block device.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use io_uring::{opcode, squeue, types};
use rustix::fs::{FileType, OFlags, Statx, StatxFlags};

use super::locks;
use super::operation::{CallKind, Output};
use super::ring::{self, Submitted};
use super::stat::{self, Medium};
use super::transfer::{DIRECT_ALIGNMENT, Direction, TransferWork};
use crate::buffer::{BUFFER_ALIGNMENT, Buffer};
use crate::runtime::{offload, offload_detached};
use crate::storage::{CacheMode, FileIdentity, Sharing, Storage, Transferred};
use crate::units::HostOffset;

/// A file or block device whose operations go through the io_uring of the calling thread.
///
/// Operations are started and polled on threads that have entered a [`Reactor`](super::Reactor); a future stays on the thread that made it.
/// Starting one on another thread is a mistake of the program and panics. What no ring can do (opening with all that goes
/// with it, locks on served files, and changes of the length before Linux 6.9) is done on threads of its own: whatever hangs with a file server,
/// the calling thread does not.
#[derive(Debug)]
pub struct UringFile {
    file: Arc<OpenFile>,
}

/// What operations in flight keep alive of a file.
#[derive(Debug)]
pub(super) struct OpenFile {
    /// The locks belong to this descriptor, so they last until the last operation has ended. Taken only to be closed.
    fd: Option<OwnedFd>,
    medium: Medium,
    kind: Kind,
    /// For `O_DIRECT`: what addresses in memory must be a multiple of.
    direct: Option<usize>,
    identity: FileIdentity,
    /// As [`Storage::born`] has it.
    born: u64,
    /// What others have been told by our locks. The mutex also keeps two changes of it apart.
    sharing: Mutex<Sharing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    BlockDevice,
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("it is open for as long as it lives").as_fd()
    }
}

impl Drop for OpenFile {
    /// Closing tells a file server, and waits for its answer.
    fn drop(&mut self) {
        if self.medium == Medium::Served {
            let fd = self.fd.take();
            offload_detached(move || drop(fd));
        }
    }
}

impl OpenFile {
    /// Whether a submission may hold up the thread that makes it, unless the kernel is told to give it to another one.
    pub(super) fn holds_up(&self) -> bool {
        self.medium == Medium::Served
    }

    /// Changes what others are told by our locks. A file server is asked, and may take for ever.
    fn set_sharing(&self, sharing: Sharing) -> io::Result<()> {
        let mut current = self.sharing.lock().unwrap_or_else(PoisonError::into_inner);
        locks::change(self.as_fd(), *current, sharing)?;
        *current = sharing;
        Ok(())
    }

    /// What addresses in memory must be a multiple of, if transfers pass the page cache by.
    pub(super) fn direct_memory_alignment(&self) -> Option<usize> {
        self.direct
    }
}

impl UringFile {
    /// Takes over a descriptor that was opened with `O_NONBLOCK` and without `O_DIRECT`, if it is of a kind that can hold an image. `facts`
    /// are what the system says about its type, number and alignment.
    pub(super) fn adopt(fd: OwnedFd, facts: &Statx, medium: Medium, path: &Path, cache: CacheMode) -> io::Result<Self> {
        let (kind, identity) = identify(facts, path)?;
        let direct = match cache {
            CacheMode::Direct => direct_alignment(&fd, facts, kind).unwrap_or_else(|reason| {
                tracing::warn!(path = %path.display(), reason, "O_DIRECT is not possible here: transfers go through the page cache");
                None
            }),
            CacheMode::Buffered => None,
        };
        let mut flags = rustix::fs::fcntl_getfl(&fd)?;
        // O_NONBLOCK, which kept the opening of a FIFO from blocking, would make the ring give up instead of waiting for the medium. A file in
        // memory needs no waiting, but does not say so: without the flag the ring has each transfer done by another thread (since Linux 6.5).
        flags.set(OFlags::NONBLOCK, medium == Medium::Memory && kind == Kind::Regular);
        flags.set(OFlags::DIRECT, direct.is_some());
        let direct = match rustix::fs::fcntl_setfl(&fd, flags) {
            Ok(()) => direct,
            Err(rustix::io::Errno::INVAL) if direct.is_some() => {
                tracing::warn!(path = %path.display(), "the file system has no O_DIRECT: transfers go through the page cache");
                rustix::fs::fcntl_setfl(&fd, flags - OFlags::DIRECT)?;
                None
            }
            Err(error) => return Err(error.into()),
        };
        let born = match kind {
            Kind::Regular => time_of_birth(facts),
            Kind::BlockDevice => disk_sequence(&fd),
        };
        let file = OpenFile { fd: Some(fd), medium, kind, direct, identity, born, sharing: Mutex::new(Sharing::None) };
        Ok(Self { file: Arc::new(file) })
    }

    /// Whether transfers pass the host's page cache by.
    pub fn is_direct(&self) -> bool {
        self.file.direct.is_some()
    }

    /// The descriptor, for what the seam does not offer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    #[cfg(test)]
    pub(super) fn open_file(&self) -> Arc<OpenFile> {
        Arc::clone(&self.file)
    }

    fn transfer(&self, direction: Direction, at: HostOffset, buffer: Buffer) -> UringTransfer {
        if let Err(error) = self.check_range(at, buffer.len()) {
            return UringTransfer(TransferState::Ended(Some((Err(error), buffer))));
        }
        if buffer.is_empty() {
            return UringTransfer(TransferState::Ended(Some((Ok(()), buffer))));
        }
        let work = TransferWork::new(Arc::clone(&self.file), direction, at.get(), buffer);
        UringTransfer(TransferState::Running(ring::current().transfer(work)))
    }

    fn check_range(&self, at: HostOffset, len: usize) -> io::Result<()> {
        let end = at.checked_add(len as u64).filter(|end| i64::try_from(end.get()).is_ok());
        if end.is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{len} bytes at {at} reach past any file's end")));
        }
        let alignment = self.alignment();
        if !at.is_aligned(alignment) || !(len as u64).is_multiple_of(alignment) {
            let message = format!("{len} bytes at {at} are not on multiples of {alignment}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(())
    }

    /// Runs an operation on the descriptor that points to no memory.
    async fn call(&self, entry: squeue::Entry, kind: CallKind) -> io::Result<()> {
        // SAFETY: the caller's entry points to no memory, and the file that it names is kept open by the second handle.
        let submitted = unsafe { ring::current().call(entry, kind, Rc::new(Arc::clone(&self.file))) };
        match submitted.await {
            Output::Value(result) => result.map(drop),
            _ => unreachable!("plain calls end with a value"),
        }
    }

    async fn fallocate(&self, at: HostOffset, len: u64, mode: i32) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let entry = opcode::Fallocate::new(self.target(), len).offset(at.get()).mode(mode).build();
        self.call(entry, CallKind::Plain).await.map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => io::Error::new(io::ErrorKind::Unsupported, error),
            _ => error,
        })
    }

    fn target(&self) -> types::Fd {
        types::Fd(self.file.as_fd().as_raw_fd())
    }

    async fn stat(&self, mask: StatxFlags) -> io::Result<Statx> {
        if matches!(self.file.medium, Medium::Memory | Medium::Local) {
            // The kernel has that of an open file in memory; the ring would have one of its threads look there.
            return stat::look(&*self.file, mask);
        }
        Ok(stat::examine(Arc::clone(&self.file), mask).await?.1)
    }
}

impl Storage for UringFile {
    type Transfer = UringTransfer;

    fn read(&self, at: HostOffset, into: Buffer) -> UringTransfer {
        self.transfer(Direction::Read, at, into)
    }

    fn write(&self, at: HostOffset, from: Buffer) -> UringTransfer {
        self.transfer(Direction::Write, at, from)
    }

    async fn flush(&self) -> io::Result<()> {
        let entry = opcode::Fsync::new(self.target()).flags(types::FsyncFlags::DATASYNC).build();
        // A file server may say of its own what the kernel says of operations that it has not begun.
        let kind = if self.file.medium == Medium::Served { CallKind::Once } else { CallKind::OnceBegun };
        self.call(entry, kind).await
    }

    async fn allocate(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.fallocate(at, len, 0).await
    }

    fn allocates_slowly(&self) -> bool {
        self.file.medium == Medium::Memory && self.file.kind == Kind::Regular
    }

    async fn punch(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.fallocate(at, len, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).await
    }

    async fn length(&self) -> io::Result<u64> {
        match self.file.kind {
            Kind::Regular => Ok(self.stat(StatxFlags::SIZE).await?.stx_size),
            Kind::BlockDevice => block_device_length(self.file.as_fd()),
        }
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        if self.file.kind == Kind::BlockDevice {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the length of a block device cannot be changed"));
        }
        if i64::try_from(len).is_err() {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        if ring::current().truncates() {
            self.call(opcode::Ftruncate::new(self.target(), len).build(), CallKind::Plain).await
        } else {
            let file = Arc::clone(&self.file);
            offload(move || Ok(rustix::fs::ftruncate(&file, len)?)).await?
        }
    }

    async fn allocated_bytes(&self) -> io::Result<u64> {
        match self.file.kind {
            Kind::Regular => Ok(self.stat(StatxFlags::BLOCKS).await?.stx_blocks.saturating_mul(512)),
            Kind::BlockDevice => self.length().await,
        }
    }

    fn alignment(&self) -> u64 {
        if self.is_direct() { DIRECT_ALIGNMENT as u64 } else { 1 }
    }

    fn identity(&self) -> FileIdentity {
        self.file.identity
    }

    fn born(&self) -> u64 {
        self.file.born
    }

    async fn set_sharing(&self, sharing: Sharing) -> io::Result<()> {
        if self.file.medium != Medium::Served {
            return self.file.set_sharing(sharing);
        }
        let file = Arc::clone(&self.file);
        offload(move || file.set_sharing(sharing)).await?
    }
}

/// A read or write under way.
#[derive(Debug)]
pub struct UringTransfer(TransferState);

enum TransferState {
    Running(Submitted),
    Ended(Option<Transferred>),
}

impl std::fmt::Debug for TransferState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running(_) => "Running",
            Self::Ended(_) => "Ended",
        })
    }
}

impl Future for UringTransfer {
    type Output = Transferred;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Transferred> {
        match &mut self.0 {
            TransferState::Ended(outcome) => Poll::Ready(outcome.take().expect("a future is not polled after its end")),
            TransferState::Running(submitted) => Pin::new(submitted).poll(context).map(|output| match output {
                Output::Transfer(transferred) => transferred,
                _ => unreachable!("transfers end with their buffer"),
            }),
        }
    }
}

/// What a file is, and which one, by what the system says about it.
///
/// # Errors
/// `InvalidInput` if it is of a kind that cannot hold an image.
pub(super) fn identify(facts: &Statx, path: &Path) -> io::Result<(Kind, FileIdentity)> {
    match FileType::from_raw_mode(facts.stx_mode.into()) {
        FileType::RegularFile => {
            let device = rustix::fs::makedev(facts.stx_dev_major, facts.stx_dev_minor);
            Ok((Kind::Regular, FileIdentity { device, inode: facts.stx_ino }))
        }
        FileType::BlockDevice => {
            let number = rustix::fs::makedev(facts.stx_rdev_major, facts.stx_rdev_minor);
            Ok((Kind::BlockDevice, FileIdentity { device: FileIdentity::BLOCK_DEVICES, inode: number }))
        }
        other => {
            let what = describe(other);
            let message = format!("{} is {what}, neither a file nor a block device", path.display());
            Err(io::Error::new(io::ErrorKind::InvalidInput, message))
        }
    }
}

/// What `O_DIRECT` on this file asks of addresses in memory, or why it is not possible with our units.
fn direct_alignment(fd: &OwnedFd, facts: &Statx, kind: Kind) -> Result<Option<usize>, &'static str> {
    let (memory, offset) = if facts.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        (facts.stx_dio_mem_align, facts.stx_dio_offset_align)
    } else {
        // Linux before 6.1, or a file system that does not say.
        match kind {
            Kind::Regular => (512, 512),
            Kind::BlockDevice => rustix::fs::ioctl_blksszget(fd).map_or((512, 512), |sector| (sector, sector)),
        }
    };
    if memory == 0 || offset == 0 {
        return Err("the file system has no O_DIRECT for this file");
    }
    if offset as usize > DIRECT_ALIGNMENT {
        return Err("the medium wants more than 512 bytes of alignment");
    }
    if memory as usize > BUFFER_ALIGNMENT {
        return Err("the medium wants its memory aligned to more than a page");
    }
    Ok(Some(memory as usize))
}

fn block_device_length(fd: BorrowedFd<'_>) -> io::Result<u64> {
    type GetSize = rustix::ioctl::Getter<{ rustix::ioctl::opcode::read::<usize>(0x12, 114) }, u64>;
    // SAFETY: BLKGETSIZE64 (linux/fs.h) writes one 64-bit number, whatever its encoded size says.
    let request = unsafe { GetSize::new() };
    // SAFETY: the request only reads a property of the descriptor.
    let size = unsafe { rustix::ioctl::ioctl(fd, request) };
    Ok(size?)
}

/// Which disk since the machine was started has the number of a block device; zero if the kernel does not say (before Linux 5.15).
fn disk_sequence(fd: &OwnedFd) -> u64 {
    type GetSequence = rustix::ioctl::Getter<{ rustix::ioctl::opcode::read::<u64>(0x12, 128) }, u64>;
    // SAFETY: BLKGETDISKSEQ (linux/fs.h) writes one 64-bit number.
    let request = unsafe { GetSequence::new() };
    // SAFETY: the request only reads a property of the descriptor.
    let sequence = unsafe { rustix::ioctl::ioctl(fd, request) };
    sequence.unwrap_or(0)
}

/// In nanoseconds since 1970; zero if the file system does not say.
fn time_of_birth(facts: &Statx) -> u64 {
    if facts.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return 0;
    }
    let seconds = u64::try_from(facts.stx_btime.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(facts.stx_btime.tv_nsec.into())
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::RegularFile | FileType::BlockDevice => "a file or block device",
        FileType::Unknown => "of an unknown kind",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::path::Path;

    use super::super::probe::tests::every_tier;
    use super::super::skip::skipped;
    use super::super::{Reactor, UringEnvironment};
    use super::*;
    use crate::buffer::{AlignedBuffer, SharedVectors};
    use crate::storage::kept::Incarnation;
    use crate::storage::{Access, Environment, Location, StorageExt};

    /// A small generator of our own (splitmix64), so that a seed means the same run for ever.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            usize::try_from(self.next() % bound as u64).expect("below a usize")
        }

        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
        }
    }

    fn seed() -> u64 {
        let seed = std::env::var("SNAPFENCE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_123);
        println!("SNAPFENCE_SEED={seed}");
        seed
    }

    /// Where the files of the tests lie: the file system of the temporary directory and, if there is one, a tmpfs.
    fn directories() -> Vec<tempfile::TempDir> {
        let mut directories = vec![tempfile::tempdir().expect("a temporary directory")];
        directories.extend(Path::new("/dev/shm").is_dir().then(|| tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs")));
        directories
    }

    /// Runs `test` on a new file of each file system in each cache mode with each tier of rings.
    fn on_every_file<F: Future<Output = ()> + 'static>(test: impl Fn(UringFile) -> F) {
        for directory in directories() {
            let caches = [CacheMode::Direct, CacheMode::Buffered];
            for (cache, capable) in caches.into_iter().flat_map(|cache| every_tier(8).into_iter().map(move |capable| (cache, capable))) {
                let path = directory.path().join(format!("{cache:?} {}", capable.tier));
                let reactor = Reactor::over(capable).expect("a reactor");
                let at = Location::Trusted(path.clone());
                let file = reactor
                    .block_on(async move { UringEnvironment.open(&at, Access::CreateNew, cache).await })
                    .expect("the ring works")
                    .expect("a new file");
                println!("{}: alignment {}", path.display(), file.alignment());
                reactor.block_on(test(file)).expect("the ring works");
            }
        }
    }

    /// A buffer of the given kind: 0 our own, 1 shared and aligned, 2 shared in ragged pieces at ragged addresses.
    fn buffer_of(bytes: &[u8], kind: usize, random: &mut Random) -> Buffer {
        match kind {
            0 => AlignedBuffer::copy_of(bytes).into(),
            1 => AlignedBuffer::copy_of(bytes).into_shared().into(),
            _ => {
                let mut pieces = Vec::new();
                let mut rest = bytes;
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(1 + random.below(rest.len().min(3000)));
                    let shift = random.below(7);
                    let mut memory = vec![0xee; shift];
                    memory.extend_from_slice(piece);
                    pieces.push(AlignedBuffer::copy_of(&memory).into_shared().slice(shift..shift + piece.len()));
                    rest = after;
                }
                SharedVectors::join(pieces).into()
            }
        }
    }

    fn contents(buffer: &Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.len()];
        buffer.copy_out(0, &mut bytes);
        bytes
    }

    #[test]
    fn random_operations_agree_with_a_byte_vector() {
        const MAX: usize = 1 << 20;
        on_every_file(|file| async move {
            let mut random = Random(seed());
            let mut model: Vec<u8> = Vec::new();
            let unit = usize::try_from(file.alignment()).expect("a small number");
            for step in 0..1500 {
                let at = random.below(MAX / unit) * unit;
                let len = (random.below(64 << 10) / unit * unit).min(MAX - at);
                let kind = random.below(3);
                let position = HostOffset::new(at as u64);
                match random.below(20) {
                    0..8 => {
                        let bytes = random.bytes(len);
                        let buffer = buffer_of(&bytes, kind, &mut random);
                        let (result, buffer) = file.write(position, buffer).await;
                        result.unwrap_or_else(|error| panic!("step {step}: write: {error}"));
                        assert_eq!(contents(&buffer), bytes, "a write leaves its buffer as it was");
                        if len > 0 {
                            model.resize(model.len().max(at + len), 0);
                            model[at..at + len].copy_from_slice(&bytes);
                        }
                    }
                    8..17 => {
                        let junk = vec![0xaa; len];
                        let (result, buffer) = file.read(position, buffer_of(&junk, kind, &mut random)).await;
                        result.unwrap_or_else(|error| panic!("step {step}: read: {error}"));
                        let mut expected: Vec<u8> = model.iter().skip(at).take(len).copied().collect();
                        expected.resize(len, 0);
                        assert!(contents(&buffer) == expected, "step {step}: {len} bytes at {at} differ");
                    }
                    17 => {
                        file.set_len(at as u64 + random.next() % 512).await.expect("a length");
                        let length = usize::try_from(file.length().await.expect("a length")).expect("a small number");
                        model.resize(length, 0);
                    }
                    18 => {
                        file.punch(position, len as u64).await.expect("a hole");
                        let end = model.len().min(at + len);
                        if at < end {
                            model[at..end].fill(0);
                        }
                    }
                    _ => {
                        file.allocate(position, len as u64).await.expect("space");
                        if len > 0 {
                            model.resize(model.len().max(at + len), 0);
                        }
                        file.flush().await.expect("a flush");
                    }
                }
                assert_eq!(file.length().await.expect("a length"), model.len() as u64, "step {step}");
            }
        });
    }

    #[test]
    fn more_operations_than_the_ring_has_room_for_all_complete() {
        on_every_file(|file| async move {
            let pattern = |number: usize| AlignedBuffer::copy_of(&[u8::try_from(number % 251).expect("below 251"); 512]);
            let at = |number: usize| HostOffset::new(512 * number as u64);
            let writes: Vec<_> = (0..1000).map(|number| file.write(at(number), pattern(number).into())).collect();
            for write in writes {
                write.await.0.expect("a write");
            }
            let mut reads: VecDeque<_> = (0..1000).map(|number| file.read(at(number), AlignedBuffer::zeroed(512).into())).collect();
            let mut number = 0;
            while let Some(read) = reads.pop_front() {
                let (result, buffer) = read.await;
                result.expect("a read");
                assert_eq!(buffer.into_owned()[..], pattern(number)[..]);
                number += 1;
            }
        });
    }

    #[test]
    fn vectors_beyond_the_kernels_limit_are_transferred_in_parts() {
        on_every_file(|file| async move {
            let mut random = Random(seed());
            let bytes = random.bytes(3000 * 512);
            let pieces = bytes.chunks(512).map(|piece| AlignedBuffer::copy_of(piece).into_shared());
            let (result, _) = file.write(HostOffset::ZERO, SharedVectors::join(pieces).into()).await;
            result.expect("a write");
            let pieces = (0..3001).map(|_| AlignedBuffer::copy_of(&[0x55; 512]).into_shared());
            let (result, buffer) = file.read(HostOffset::ZERO, SharedVectors::join(pieces).into()).await;
            result.expect("a read");
            let read = contents(&buffer);
            assert!(read[..bytes.len()] == bytes);
            assert_eq!(read[bytes.len()..], [0; 512]);
        });
    }

    #[test]
    fn reads_past_a_ragged_end_give_zeros() {
        on_every_file(|file| async move {
            file.write_bytes(HostOffset::ZERO, &[7; 1500]).await.expect("a write");
            file.set_len(1400).await.expect("a length");
            let bytes = file.read_bytes(HostOffset::new(1024), 2048).await.expect("a read");
            assert_eq!(bytes[..376], [7; 376]);
            assert_eq!(bytes[376..], [0; 1672]);
            let far = file.read_bytes(HostOffset::new(1 << 40), 512).await.expect("a read");
            assert_eq!(far[..], [0; 512]);
            assert_eq!(file.length().await.expect("a length"), 1400);
        });
    }

    #[test]
    fn dropped_transfers_run_to_their_end_and_keep_their_memory() {
        struct Keep(#[expect(dead_code, reason = "kept alive")] SharedVectors, Arc<std::sync::atomic::AtomicUsize>);
        impl Drop for Keep {
            fn drop(&mut self) {
                self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
        on_every_file(|file| async move {
            let dropped = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            for number in 0..64_u64 {
                let shared = AlignedBuffer::copy_of(&[u8::try_from(number).expect("a byte") + 1; 4096]).into_shared();
                let vectors = shared.vectors().to_vec();
                // SAFETY: the handle keeps the memory, and nothing refers to it but these vectors.
                let watched = unsafe { SharedVectors::new(vectors.into(), Arc::new(Keep(shared, Arc::clone(&dropped)))) };
                drop(file.write(HostOffset::new(4096 * number), watched.into()));
            }
            while dropped.load(std::sync::atomic::Ordering::SeqCst) < 64 {
                UringEnvironment.sleep_until(UringEnvironment.now() + std::time::Duration::from_millis(1)).await;
            }
            for number in 0..64_u64 {
                let bytes = file.read_bytes(HostOffset::new(4096 * number), 4096).await.expect("a read");
                assert_eq!(bytes[..], [u8::try_from(number).expect("a byte") + 1; 4096]);
            }
        });
    }

    #[test]
    fn a_reactor_that_goes_waits_for_what_is_in_flight() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = Location::Trusted(directory.path().join("image"));
        let reactor = Reactor::new(8).expect("a reactor");
        let file = reactor
            .block_on(async move { UringEnvironment.open(&at, Access::CreateNew, CacheMode::Buffered).await })
            .expect("the ring works")
            .expect("a new file");
        {
            let _entered = reactor.enter();
            for number in 0..32 {
                drop(file.write(HostOffset::new(4096 * number), AlignedBuffer::copy_of(&[9; 4096]).into()));
            }
        }
        drop(reactor);
        assert_eq!(std::fs::read(directory.path().join("image")).expect("the file"), [9; 32 * 4096]);
    }

    #[test]
    fn a_file_is_shared_by_reactors_of_several_threads() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = Location::Trusted(directory.path().join("image"));
        let open = move || async move { UringEnvironment.open(&at, Access::CreateNew, CacheMode::Direct).await };
        let file = Reactor::new(8).expect("a reactor").block_on(open()).expect("the ring works").expect("a new file");
        let file = Arc::new(file);
        let threads: Vec<_> = (0..4_u8)
            .map(|thread| {
                let file = Arc::clone(&file);
                std::thread::spawn(move || {
                    let reactor = Reactor::new(8).expect("a reactor");
                    let task = async move {
                        for number in 0..50_u64 {
                            let at = HostOffset::new((4 * number + u64::from(thread)) * 4096);
                            file.write_bytes(at, &[thread + 1; 4096]).await.expect("a write");
                        }
                    };
                    reactor.block_on(task).expect("the ring works");
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no thread panics");
        }
        let bytes = std::fs::read(directory.path().join("image")).expect("the file");
        assert!(bytes.chunks(4096).enumerate().all(|(index, block)| block.iter().all(|byte| usize::from(*byte) == index % 4 + 1)));
    }

    #[test]
    fn what_is_not_on_sectors_is_refused_with_o_direct() {
        on_every_file(|file| async move {
            if file.is_direct() {
                for (at, len) in [(1, 512), (512, 100)] {
                    let (result, _) = file.read(HostOffset::new(at), AlignedBuffer::zeroed(len).into()).await;
                    assert_eq!(result.expect_err("refused").kind(), io::ErrorKind::InvalidInput);
                }
            }
            let (result, _) = file.read(HostOffset::new(u64::MAX - 511), AlignedBuffer::zeroed(512).into()).await;
            assert_eq!(result.expect_err("refused").kind(), io::ErrorKind::InvalidInput);
            let error = file.set_len(u64::MAX).await.expect_err("refused");
            assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        });
    }

    #[test]
    fn a_file_is_told_from_one_that_had_its_number_before() {
        on_every_file(|file| async move {
            let path = locks::name(file.fd());
            let open = async |access| {
                let at = Location::Trusted(path.clone());
                UringEnvironment.open(&at, access, CacheMode::Buffered).await.expect("a file")
            };
            assert_ne!(file.born(), 0, "every file system of today says it");
            assert_eq!(open(Access::Read).await.born(), file.born());
            UringEnvironment.remove(&path).await.expect("removed");
            // The clock of files has a coarse hand.
            UringEnvironment.sleep_until(UringEnvironment.now() + std::time::Duration::from_millis(20)).await;
            let next = open(Access::CreateNew).await;
            assert!(!Incarnation::of(&next).may_be(Incarnation { born: file.born(), ..Incarnation::of(&next) }));
        });
    }

    #[test]
    fn a_block_device_is_told_from_one_that_had_its_number_before() {
        let Some(device) = LoopDevice::new("512") else { return };
        let first = Incarnation::of(&device.open(CacheMode::Buffered));
        assert!(first.born != 0 && first == Incarnation::of(&device.open(CacheMode::Direct)));
        drop(device);
        let Some(device) = LoopDevice::new("512") else { return };
        let next = Incarnation::of(&device.open(CacheMode::Buffered));
        assert!(!next.may_be(Incarnation { file: next.file, ..first }));
    }

    /// A block device of one MiB, if this process may make one.
    struct LoopDevice {
        path: String,
        _directory: tempfile::TempDir,
    }

    impl LoopDevice {
        fn new(sector_size: &str) -> Option<Self> {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let backing = directory.path().join("backing");
            std::fs::write(&backing, vec![0x11; 1 << 20]).expect("a file");
            let output =
                std::process::Command::new("losetup").args(["--show", "--find", "--sector-size", sector_size]).arg(&backing).output();
            match output {
                Ok(output) if output.status.success() => {
                    let path = String::from_utf8(output.stdout).expect("a readable name").trim().to_owned();
                    Some(Self { path, _directory: directory })
                }
                other => {
                    skipped(format_args!("no loop device to be had: {other:?}"));
                    None
                }
            }
        }

        fn open(&self, cache: CacheMode) -> UringFile {
            let at = Location::Trusted(self.path.clone().into());
            let open = async move { UringEnvironment.open(&at, Access::Write, cache).await };
            Reactor::new(8).expect("a reactor").block_on(open).expect("the ring works").expect("the device")
        }
    }

    impl Drop for LoopDevice {
        fn drop(&mut self) {
            let detached = std::process::Command::new("losetup").args(["--detach", &self.path]).status();
            assert!(detached.is_ok_and(|status| status.success()), "the loop device {} stays behind", self.path);
        }
    }

    #[test]
    fn a_block_device_reads_writes_and_punches_within_its_fixed_length() {
        let Some(device) = LoopDevice::new("512") else { return };
        for cache in [CacheMode::Direct, CacheMode::Buffered] {
            let file = device.open(cache);
            assert_eq!(file.identity(), device.open(CacheMode::Buffered).identity());
            let asked = async move { (file.length().await, file.allocated_bytes().await, file) };
            let (length, allocated, file) = Reactor::new(8).expect("a reactor").block_on(asked).expect("the ring works");
            assert_eq!((file.is_direct(), length.expect("a length")), (cache == CacheMode::Direct, 1 << 20));
            assert_eq!(allocated.expect("a length"), 1 << 20);
            let task = async move {
                file.write_bytes(HostOffset::new(4096), &[0x22; 8192]).await.expect("a write");
                file.punch(HostOffset::new(8192), 4096).await.expect("a hole");
                file.flush().await.expect("a flush");
                let bytes = file.read_bytes(HostOffset::ZERO, 16384).await.expect("a read");
                assert!(bytes[4096..8192].iter().all(|byte| *byte == 0x22) && bytes[8192..12288].iter().all(|byte| *byte == 0));
                let tail = file.read_bytes(HostOffset::new((1 << 20) - 512), 1024).await.expect("a read");
                assert_eq!((tail[0], tail[511], tail[512], tail[1023]), (0x11, 0x11, 0, 0));
                assert!(file.write_bytes(HostOffset::new(1 << 20), &[1; 512]).await.is_err());
                assert_eq!(file.set_len(1 << 19).await.expect_err("fixed").kind(), io::ErrorKind::Unsupported);
                assert_eq!(file.allocate(HostOffset::ZERO, 4096).await.expect_err("fixed").kind(), io::ErrorKind::Unsupported);
            };
            Reactor::new(8).expect("a reactor").block_on(task).expect("the ring works");
        }
    }

    #[test]
    fn a_medium_with_large_sectors_is_used_through_the_page_cache() {
        let Some(device) = LoopDevice::new("4096") else { return };
        let file = device.open(CacheMode::Direct);
        assert_eq!((file.is_direct(), file.alignment()), (false, 1));
        let task = async move {
            file.write_bytes(HostOffset::new(100), &[0x33; 1000]).await.expect("a write");
            let bytes = file.read_bytes(HostOffset::new(99), 1002).await.expect("a read");
            assert_eq!((bytes[0], bytes[1], bytes[1000], bytes[1001]), (0x11, 0x33, 0x33, 0x11));
        };
        Reactor::new(8).expect("a reactor").block_on(task).expect("the ring works");
    }

    #[test]
    fn punching_gives_space_back_and_allocating_takes_it() {
        on_every_file(|file| async move {
            file.allocate(HostOffset::ZERO, 1 << 20).await.expect("space");
            assert_eq!(file.length().await.expect("a length"), 1 << 20);
            assert!(file.allocated_bytes().await.expect("a number") >= 1 << 20);
            file.punch(HostOffset::ZERO, 1 << 20).await.expect("a hole");
            assert_eq!(file.length().await.expect("a length"), 1 << 20);
            assert!(file.allocated_bytes().await.expect("a number") < 1 << 19);
        });
    }
}

//! A disk that behaves as badly as a disk may, the same way every time.
//!
//! Every operation takes some virtual time, so that operations overtake one another; what no flush has covered is, after a crash, there or not
//! there sector by sector; operations fail, hang and run out of space when a test asks for it. All of it follows from one seed. The clock jumps
//! to the next event when no thread has anything to do: see [`Simulation`].

mod crash;
mod disk;
mod fault;
mod moment;
mod simulation;
mod space;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

pub use fault::{Fault, FaultEffect, Operation, OperationKind};
pub use moment::{Moment, MomentWatch, reach, watch_moments};
pub use simulation::{SimulatedThread, Simulation};
pub use space::{CrashSpace, CrashState};

use self::crash::CrashStates;
use self::disk::Disk;
use self::world::{Action, Outcome, Slot, World};
use super::memory::{export_sparse, import_sparse};
use super::names::Entry;
use super::sharing::SharingTable;
use super::sparse::SparseBytes;
use super::{Access, CacheMode, Chance, Environment, FileIdentity, Location, Sharing, Storage, Transferred};
use crate::buffer::Buffer;
use crate::runtime::spawn;
use crate::units::{HostOffset, SECTOR_BYTES};

/// Files, time and chance of a simulation. Clones are the same environment. What lies beneath `/dev` passes for a block device.
#[derive(Clone)]
pub struct SimulatedEnvironment {
    seed: u64,
    world: Arc<Mutex<World>>,
    /// Drawn from by crashes only, so that looking at what a crash would leave changes nothing of what comes.
    crashes: Arc<Mutex<Chance>>,
}

/// An open file of a [`SimulatedEnvironment`].
#[derive(Debug)]
pub struct SimulatedFile {
    environment: SimulatedEnvironment,
    inode: u64,
    path: PathBuf,
    sharing: Arc<SharingTable>,
    handle: u64,
    writable: bool,
    alignment: u64,
}

/// A simulated read or write under way.
pub struct SimulatedTransfer {
    slot: Arc<Slot>,
    /// Refused before it began.
    refused: Option<Transferred>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes of a file at one moment. Two are the same if their bytes are, wherever there are holes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileContent(SparseBytes);

impl FileContent {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.len() == 0
    }
}

impl SimulatedEnvironment {
    /// No files yet.
    pub fn new(seed: u64) -> Self {
        Self::with_disk(seed, Disk::default(), Duration::ZERO)
    }

    fn with_disk(seed: u64, disk: Disk, now: Duration) -> Self {
        let crashes = Chance::new(seed ^ 0xc4a5_4e5d);
        Self { seed, world: Arc::new(Mutex::new(World::new(seed, disk, now))), crashes: Arc::new(Mutex::new(crashes)) }
    }

    /// What everything follows from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Makes a durable file of `bytes`, replacing one of that name.
    ///
    /// # Panics
    /// If `path` cannot be a file's name.
    pub fn put(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let mut sparse = SparseBytes::default();
        sparse.write_bytes(0, bytes).expect("a slice is never longer than a file can be");
        self.put_sparse(path.as_ref(), sparse);
    }

    fn put_sparse(&self, path: &Path, bytes: SparseBytes) {
        let mut world = lock(&self.world);
        let path = world.disk.names().resolve_name(path).expect("a name that a file can have");
        world.disk.put(&path, bytes);
    }

    /// Makes a durable symbolic link.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn symlink(&self, target: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
        let mut world = lock(&self.world);
        let path = world.disk.names().resolve_name(path.as_ref())?;
        world.disk.put_link(&path, target.as_ref().to_owned())
    }

    /// What is in a file, to be compared: that costs little where both come from the same writes.
    ///
    /// # Errors
    /// If there is none.
    pub fn content(&self, path: impl AsRef<Path>) -> io::Result<FileContent> {
        self.visible(path.as_ref()).map(FileContent)
    }

    /// The space that a file occupies, in bytes.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn allocated(&self, path: impl AsRef<Path>) -> io::Result<u64> {
        Ok(self.visible(path.as_ref())?.allocated())
    }

    /// The bytes of a file as readers see them.
    ///
    /// # Errors
    /// If there is none, or it is longer than 4 GiB (use [`export`](Self::export)).
    pub fn bytes(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let bytes = self.visible(path.as_ref())?;
        if bytes.len() > 4 << 30 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.to_vec(0..bytes.len()))
    }

    /// Copies a file as readers see it, holes kept, to a real one, for programs that know only those.
    ///
    /// # Errors
    /// If either file cannot be used.
    pub fn export(&self, path: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
        export_sparse(&self.visible(path.as_ref())?, to.as_ref())
    }

    /// Copies a real file, holes kept, to a durable one here, replacing one of that name.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn import(&self, from: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
        self.put_sparse(path.as_ref(), import_sparse(from.as_ref())?);
        Ok(())
    }

    /// Where a path leads, all symbolic links followed. The last part need not exist.
    ///
    /// # Errors
    /// If links go in a circle.
    pub fn real_path(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        lock(&self.world).disk.names().resolve(&Location::Trusted(path.as_ref().to_owned()))
    }

    /// All files' names.
    pub fn files(&self) -> Vec<PathBuf> {
        let world = lock(&self.world);
        world.disk.names().iter().filter(|(_, entry)| matches!(entry, Entry::File(_))).map(|(name, _)| name.clone()).collect()
    }

    /// Lets operations fail.
    pub fn inject(&self, fault: Fault) {
        lock(&self.world).faults.add(fault);
    }

    /// Forgets all faults that have not struck yet, and lasting ones.
    pub fn clear_faults(&self) {
        lock(&self.world).faults.clear();
    }

    /// How many operations have met a fault.
    pub fn faults_struck(&self) -> u64 {
        lock(&self.world).faults.struck()
    }

    /// Lets the operations go on that hang.
    pub fn release_hung(&self) {
        lock(&self.world).release_hung();
    }

    /// How much space all files together may occupy.
    pub fn set_space_limit(&self, bytes: Option<u64>) {
        lock(&self.world).space_limit = bytes;
    }

    /// Whether files say that they allocate slowly.
    pub fn set_slow_allocation(&self, is_slow: bool) {
        lock(&self.world).allocates_slowly = is_slow;
    }

    /// How much of it they may occupy by a quota, which is refused in other words than a full disk.
    pub fn set_quota(&self, bytes: Option<u64>) {
        lock(&self.world).quota = bytes;
    }

    /// Turns the power off after `effects` operations have changed the medium, counted from the beginning: nothing ends any more from there on.
    pub fn stop_after(&self, effects: u64) {
        lock(&self.world).stop_after = Some(effects);
    }

    /// Whether the power is off.
    pub fn is_stopped(&self) -> bool {
        lock(&self.world).stopped
    }

    /// How many operations have changed the medium.
    pub fn effects(&self) -> u64 {
        lock(&self.world).effects
    }

    /// How many operations of each kind have begun.
    pub fn counts(&self) -> BTreeMap<OperationKind, u64> {
        lock(&self.world).counts.clone()
    }

    /// The latest operations that have taken effect (65,536 at most), oldest first.
    pub fn log(&self) -> Vec<Operation> {
        lock(&self.world).log.iter().cloned().collect()
    }

    /// Turns the power off and gives the disk as it may be found afterwards. Nothing of this environment ends any more.
    #[must_use]
    pub fn crash(&self) -> Self {
        let mut world = lock(&self.world);
        world.stopped = true;
        let mut crashes = lock(&self.crashes);
        let disk = crash::sample(&world.disk_at_crash(), &mut crashes);
        Self::with_disk(crashes.number(), disk, world.now)
    }

    /// The disk as it is found after the program was killed: all that took effect is seen, operations under way have ended, and what no flush
    /// has covered is as volatile as before. Nobody holds a lock. Nothing of this environment ends any more.
    #[must_use]
    pub fn killed(&self) -> Self {
        let mut world = lock(&self.world);
        world.stopped = true;
        let seed = lock(&self.crashes).number();
        Self::with_disk(seed, world.disk_at_crash(), world.now)
    }

    /// Whether a flush has failed of which nobody knows yet, because the future that waits for it has not been polled since. A program that is
    /// killed now never will.
    pub fn has_untold_failure(&self) -> bool {
        lock(&self.world).has_untold_failure()
    }

    /// Disks as they may be found if the power went off now: every possible one if they are no more than `limit`, else `limit` of them, among
    /// them the extremes. This environment goes on undisturbed.
    pub fn crash_states(&self, limit: u64) -> impl Iterator<Item = Self> + use<> {
        let world = lock(&self.world);
        let mut chance = lock(&self.crashes).fork();
        let states = CrashStates::new(world.disk_at_crash(), limit, chance.fork());
        let now = world.now;
        states.map(move |disk| Self::with_disk(chance.number(), disk, now))
    }

    /// All disks that may be found if the power went off now. This environment goes on undisturbed.
    pub fn crash_space(&self) -> CrashSpace {
        let world = lock(&self.world);
        CrashSpace::new(world.disk_at_crash(), world.now)
    }

    /// The disk as it is found after an orderly end: everything that took effect is there.
    #[must_use]
    pub fn restarted(&self) -> Self {
        let mut world = lock(&self.world);
        world.stopped = true;
        let seed = lock(&self.crashes).number();
        Self::with_disk(seed, world.disk.crashed(|_, _| true), world.now)
    }

    /// When the next event is: an operation shows an effect or ends, or somebody who sleeps is woken.
    pub fn next_event(&self) -> Option<Duration> {
        lock(&self.world).next_time()
    }

    /// Moves the clock to the next event, as [`Simulation`] does by itself. `false` if there is none.
    pub fn advance(&self) -> bool {
        let mut world = lock(&self.world);
        if world.next_time().is_none() {
            return false;
        }
        let wakers = world.advance();
        drop(world);
        for waker in wakers {
            waker.wake();
        }
        true
    }

    fn visible(&self, path: &Path) -> io::Result<SparseBytes> {
        let world = lock(&self.world);
        let names = world.disk.names();
        let inode = names.file(&names.resolve(&Location::Trusted(path.to_owned()))?)?;
        Ok(world.disk.visible(inode).clone())
    }

    async fn perform(&self, action: Action, path: &Path) -> io::Result<Option<(u64, PathBuf)>> {
        reach(Moment::Operation);
        let slot = lock(&self.world).begin(action, path);
        std::future::poll_fn(|context| slot.poll(context.waker())).await.result
    }
}

impl fmt::Debug for SimulatedEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimulatedEnvironment(seed {})", self.seed)
    }
}

impl SimulatedFile {
    fn admit_transfer(&self, at: HostOffset, buffer: &Buffer) -> io::Result<()> {
        if !at.is_aligned(self.alignment) || !(buffer.len() as u64).is_multiple_of(self.alignment) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        world::admit(at.get(), buffer.len() as u64)
    }

    fn admit_change(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBADF)) }
    }

    async fn perform(&self, action: Action) -> io::Result<()> {
        self.environment.perform(action, &self.path).await.map(|_| ())
    }

    fn transfer(&self, admitted: io::Result<()>, buffer: Buffer, action: impl FnOnce(Buffer) -> Action) -> SimulatedTransfer {
        match admitted {
            Ok(()) => {
                reach(Moment::Operation);
                SimulatedTransfer { slot: lock(&self.environment.world).begin(action(buffer), &self.path), refused: None }
            }
            Err(error) => SimulatedTransfer { slot: Arc::default(), refused: Some((Err(error), buffer)) },
        }
    }
}

impl Drop for SimulatedFile {
    fn drop(&mut self) {
        self.sharing.close(self.handle);
    }
}

impl Future for SimulatedTransfer {
    type Output = Transferred;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Transferred> {
        if let Some(refused) = self.refused.take() {
            return Poll::Ready(refused);
        }
        self.slot.poll(context.waker()).map(|Outcome { result, buffer }| {
            let buffer = buffer.expect("transfers end with the buffer that they began with");
            (result.map(|_| ()), buffer)
        })
    }
}

impl fmt::Debug for SimulatedTransfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimulatedTransfer")
    }
}

impl Storage for SimulatedFile {
    type Transfer = SimulatedTransfer;

    fn read(&self, at: HostOffset, into: Buffer) -> Self::Transfer {
        self.transfer(self.admit_transfer(at, &into), into, |buffer| Action::Read { inode: self.inode, at: at.get(), buffer })
    }

    fn write(&self, at: HostOffset, from: Buffer) -> Self::Transfer {
        let admitted = self.admit_change().and_then(|()| self.admit_transfer(at, &from));
        self.transfer(admitted, from, |buffer| Action::Write { inode: self.inode, at: at.get(), buffer })
    }

    async fn flush(&self) -> io::Result<()> {
        self.perform(Action::Flush { inode: self.inode }).await
    }

    async fn allocate(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.admit_change()?;
        SparseBytes::admit_space(at.get(), len)?;
        self.perform(Action::Allocate { inode: self.inode, at: at.get(), len }).await
    }

    fn allocates_slowly(&self) -> bool {
        lock(&self.environment.world).allocates_slowly
    }

    async fn punch(&self, at: HostOffset, len: u64) -> io::Result<()> {
        self.admit_change()?;
        world::admit(at.get(), len)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.perform(Action::Punch { inode: self.inode, at: at.get(), len }).await
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(lock(&self.environment.world).disk.visible(self.inode).len())
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.admit_change()?;
        world::admit(len, 0)?;
        self.perform(Action::SetLen { inode: self.inode, len }).await
    }

    async fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(lock(&self.environment.world).disk.visible(self.inode).allocated())
    }

    fn alignment(&self) -> u64 {
        self.alignment
    }

    fn identity(&self) -> FileIdentity {
        let device = if self.path.starts_with("/dev") { FileIdentity::BLOCK_DEVICES } else { 1 };
        FileIdentity { device, inode: self.inode }
    }

    async fn set_sharing(&self, sharing: Sharing) -> io::Result<()> {
        self.sharing.set(self.handle, sharing)
    }
}

impl Environment for SimulatedEnvironment {
    type File = SimulatedFile;

    async fn open(&self, at: &Location, access: Access, cache: CacheMode) -> io::Result<SimulatedFile> {
        let action = Action::Open { at: at.clone(), create: access == Access::CreateNew };
        let opened = self.perform(action, &at.path()).await?;
        let (inode, path) = opened.expect("an opening ends with a file");
        let mut world = lock(&self.world);
        let (sharing, handle) = (world.sharing(inode), world.number());
        drop(world);
        let alignment = match cache {
            CacheMode::Direct => SECTOR_BYTES,
            CacheMode::Buffered => 1,
        };
        Ok(SimulatedFile { environment: self.clone(), inode, path, sharing, handle, writable: access != Access::Read, alignment })
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.perform(Action::Rename { from: from.to_owned(), to: to.to_owned() }, to).await.map(|_| ())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.perform(Action::Remove { path: path.to_owned() }, path).await.map(|_| ())
    }

    async fn flush_directory(&self, directory: &Path) -> io::Result<()> {
        self.perform(Action::FlushDirectory { path: directory.to_owned() }, directory).await.map(|_| ())
    }

    fn now(&self) -> Duration {
        reach(Moment::Clock);
        lock(&self.world).now
    }

    fn wall_clock(&self) -> Duration {
        super::memory::STILL_WALL_CLOCK + self.now()
    }

    async fn sleep_until(&self, deadline: Duration) {
        let key = (deadline, lock(&self.world).number());
        let sleeper = Sleeper { world: &self.world, key };
        std::future::poll_fn(|context| {
            let mut world = lock(sleeper.world);
            if world.now >= deadline {
                return Poll::Ready(());
            }
            world.sleepers.insert(sleeper.key, context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        spawn(task);
    }

    fn random(&self) -> u64 {
        lock(&self.world).program_chance.number()
    }
}

/// Takes its entry out of the list of sleepers when the sleep ends or is given up.
struct Sleeper<'a> {
    world: &'a Mutex<World>,
    key: (Duration, u64),
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        let waker = lock(self.world).sleepers.remove(&self.key);
        drop(waker);
    }
}

#[cfg(test)]
mod tests;

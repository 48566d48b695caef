//! Memory that outlives the process.
//!
//! What a program holds in memory is lost when it is killed, although the machine, and the guest that it serves, go on. What may not be lost then
//! stands in kept memory. It is no storage: when the machine stops, it is gone.
//!
//! So is what only the machine's memory shows of a file after a flush of it has failed: no later flush makes it durable, and every program sees it
//! until the power is cut. Which files that are is kept as well.

use std::collections::HashMap;
use std::fmt::Debug;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, slice};

use futures_util::future::LocalBoxFuture;
use rustix::mm::{self, MapFlags, ProtFlags};

use crate::runtime::next_turn;

use super::simulated::SimulatedEnvironment;
use super::{FileIdentity, Storage};

/// One file, told from those that had its identity before they were removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// Which file.
    pub file: FileIdentity,
    /// As [`Storage::born`] has it.
    pub born: u64,
}

impl Incarnation {
    /// That of an open file.
    pub fn of(file: &impl Storage) -> Self {
        Self { file: file.identity(), born: file.born() }
    }

    /// Whether both may be the same file: yes, if of one of them nothing more is known than its identity.
    pub fn may_be(self, other: Self) -> bool {
        self.file == other.file && (self.born == other.born || self.born == 0 || other.born == 0)
    }
}

/// What is known of a file since a flush of it failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// Those who write to it know: a flush of theirs has ended with an error.
    pub told: bool,
    /// All metadata in it has been written once more, and is durable.
    pub rewritten: bool,
}

/// Words that keep their values when the process ends, whatever ends it. One process uses them at a time.
pub trait KeptMemory: Debug + Send + Sync {
    /// As many words as there can be. Those that no room was made for are not accessed: that might end the process.
    fn words(&self) -> &[AtomicU64];

    /// Makes room for the first `words`, which are there without fail afterwards; the new ones are zeros. It goes on if the future is dropped.
    ///
    /// # Errors
    /// If there is no room. Then there is what there was.
    fn make_room(self: Arc<Self>, words: usize) -> LocalBoxFuture<'static, io::Result<()>>;
}

/// Makes kept memory, and finds it again by its number.
pub trait MemoryKeeper: Debug + Send + Sync {
    /// New memory of at most `words` for the file `owner`, and its number: not zero, and not that of other memory since the machine was started. There
    /// is room for the first `room` of them, all zeros.
    ///
    /// # Errors
    /// If there is no room.
    fn create(&self, owner: FileIdentity, words: usize, room: usize) -> io::Result<(u32, Arc<dyn KeptMemory>)>;

    /// The memory with this number, if there is such since the machine was started.
    ///
    /// # Errors
    /// If it is there and cannot be accessed.
    fn find(&self, number: u32) -> io::Result<Option<Arc<dyn KeptMemory>>>;

    /// The owner needs none but this, or none at all if it is zero. Whoever holds memory can go on using it.
    fn retain(&self, owner: FileIdentity, number: u32);

    /// Notes that a flush of `file` has failed, which nobody knows yet. Cannot fail itself, and does not block.
    fn note_failure(&self, file: Incarnation);

    /// The failure that was noted since the machine was started. If too much was noted to tell files apart, all have failed.
    fn failure(&self, file: Incarnation) -> Option<Failure>;

    /// Adds what has come to be known of a failure, if one was noted.
    fn add_to_failure(&self, file: Incarnation, news: Failure);
}

/// A keeper for tests: what it keeps outlives whatever the test takes for a process.
#[derive(Debug)]
pub struct TestKeeper {
    kept: Mutex<Kept>,
    /// Most words that room is made for.
    limit: Arc<AtomicUsize>,
    /// The environment of the present process.
    process: Mutex<Option<SimulatedEnvironment>>,
}

impl Default for TestKeeper {
    fn default() -> Self {
        Self { kept: Mutex::default(), limit: Arc::new(usize::MAX.into()), process: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct Kept {
    last_number: u32,
    memory: HashMap<u32, (FileIdentity, Arc<Words>)>,
    failed: Vec<(Incarnation, Failure)>,
}

/// Fresh from the system: of megabytes hardly anything is used, and an allocator fills with zeros what it has had before.
#[derive(Debug)]
struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
    limit: Arc<AtomicUsize>,
}

// SAFETY: the memory belongs to this value alone, and is reached through atomic words only.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn new(count: usize, limit: Arc<AtomicUsize>) -> io::Result<Self> {
        let bytes = count.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }?;
        Ok(Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?, count, limit })
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and whoever looks at it borrows this value.
        let unmapped = unsafe { mm::munmap(self.start.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

impl KeptMemory for Words {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped as long as this value is, aligned to a page, and zeros are valid words.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }

    fn make_room(self: Arc<Self>, words: usize) -> LocalBoxFuture<'static, io::Result<()>> {
        let is_there = words <= self.limit.load(Ordering::Relaxed);
        Box::pin(async move {
            next_turn().await;
            if is_there { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
        })
    }
}

impl TestKeeper {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process begins. Once its environment has stopped, because it was killed, it notes no failure any more: its tasks are dropped then, which
    /// those of a process that is killed are not.
    pub fn begin_process(&self, environment: &SimulatedEnvironment) {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).replace(environment.clone());
    }

    /// Memory gets room for so many words and no more.
    pub fn limit(&self, words: usize) {
        self.limit.store(words, Ordering::Relaxed);
    }

    /// The machine stops.
    pub fn forget(&self) {
        let mut kept = self.kept();
        kept.memory.clear();
        kept.failed.clear();
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.kept().memory.len()
    }
}

impl MemoryKeeper for TestKeeper {
    fn create(&self, owner: FileIdentity, words: usize, room: usize) -> io::Result<(u32, Arc<dyn KeptMemory>)> {
        if room > self.limit.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let memory = Arc::new(Words::new(words, Arc::clone(&self.limit))?);
        let mut kept = self.kept();
        kept.last_number += 1;
        let number = kept.last_number;
        kept.memory.insert(number, (owner, Arc::clone(&memory)));
        Ok((number, memory))
    }

    fn find(&self, number: u32) -> io::Result<Option<Arc<dyn KeptMemory>>> {
        Ok(self.kept().memory.get(&number).map(|(_, memory)| Arc::clone(memory) as Arc<dyn KeptMemory>))
    }

    fn retain(&self, owner: FileIdentity, number: u32) {
        self.kept().memory.retain(|&other, (its_owner, _)| *its_owner != owner || other == number);
    }

    fn note_failure(&self, file: Incarnation) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if !process.as_ref().is_some_and(SimulatedEnvironment::is_stopped) {
            let mut kept = self.kept();
            kept.failed.retain(|(failed, _)| !failed.may_be(file));
            kept.failed.push((file, Failure::default()));
        }
    }

    fn failure(&self, file: Incarnation) -> Option<Failure> {
        self.kept().failed.iter().find(|(failed, _)| failed.may_be(file)).map(|(_, failure)| *failure)
    }

    fn add_to_failure(&self, file: Incarnation, news: Failure) {
        if let Some((_, failure)) = self.kept().failed.iter_mut().find(|(failed, _)| failed.may_be(file)) {
            failure.told |= news.told;
            failure.rewritten |= news.rewritten;
        }
    }
}

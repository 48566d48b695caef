//! Memory that outlives the process.
//!
//! What a program holds in memory is lost when it is killed, although the machine, and the guest that it serves, go on. What may not be lost then
//! stands in kept memory. It is no storage: when the machine stops, it is gone.

use std::collections::HashMap;
use std::fmt::Debug;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::FromZeros;

use super::FileIdentity;

/// Words that keep their values when the process ends, whatever ends it. One process uses them at a time.
pub trait KeptMemory: Debug + Send + Sync {
    /// The words.
    fn words(&self) -> &[AtomicU64];
}

/// Makes kept memory, and finds it again by its number.
pub trait MemoryKeeper: Debug + Send + Sync {
    /// New memory of `words` zeros for the file `owner`, which are there without fail when they are accessed, and its number: not zero, and not
    /// that of other memory since the machine was started.
    ///
    /// # Errors
    /// If there is no room.
    fn create(&self, owner: FileIdentity, words: usize) -> io::Result<(u32, Arc<dyn KeptMemory>)>;

    /// The memory with this number, if there is such since the machine was started.
    ///
    /// # Errors
    /// If it is there and cannot be accessed.
    fn find(&self, number: u32) -> io::Result<Option<Arc<dyn KeptMemory>>>;

    /// The owner needs none but this, or none at all if it is zero. Whoever holds memory can go on using it.
    fn retain(&self, owner: FileIdentity, number: u32);
}

/// A keeper for tests: what it keeps outlives whatever the test takes for a process.
#[derive(Debug, Default)]
pub struct TestKeeper(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    last_number: u32,
    memory: HashMap<u32, (FileIdentity, Arc<Words>)>,
}

#[derive(Debug)]
struct Words(Box<[AtomicU64]>);

impl KeptMemory for Words {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl TestKeeper {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine stops.
    pub fn forget(&self) {
        self.kept().memory.clear();
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.kept().memory.len()
    }
}

impl MemoryKeeper for TestKeeper {
    fn create(&self, owner: FileIdentity, words: usize) -> io::Result<(u32, Arc<dyn KeptMemory>)> {
        let zeros = <[AtomicU64]>::new_box_zeroed_with_elems(words).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut kept = self.kept();
        kept.last_number += 1;
        let (number, memory) = (kept.last_number, Arc::new(Words(zeros)));
        kept.memory.insert(number, (owner, Arc::clone(&memory)));
        Ok((number, memory))
    }

    fn find(&self, number: u32) -> io::Result<Option<Arc<dyn KeptMemory>>> {
        Ok(self.kept().memory.get(&number).map(|(_, memory)| Arc::clone(memory) as Arc<dyn KeptMemory>))
    }

    fn retain(&self, owner: FileIdentity, number: u32) {
        self.kept().memory.retain(|&other, (its_owner, _)| *its_owner != owner || other == number);
    }
}

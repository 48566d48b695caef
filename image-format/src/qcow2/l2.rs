//! L2 tables in memory: slices of at most 4 KiB, loaded once however many wait for them, kept while anybody uses them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{LayerError, Structure};
use crate::runtime::WaitQueue;
use crate::storage::{Environment, StorageExt};
use crate::units::HostOffset;

use super::Inner;
use super::entry::{Entry, EntryFormat, Standard};
use super::geometry::SliceKey;
use super::l1::words_from;

/// Most parts of a cache, each with a lock of its own.
const MAX_SHARDS: usize = 16;
/// Slices for which a part is worth having.
const SLICES_PER_SHARD: usize = 4;

/// A part of an L2 table in memory. While it is newer than the file, the list of dirty slices holds it too.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) key: SliceKey,
    state: Mutex<SliceState>,
}

/// The entries of a slice.
#[derive(Debug)]
pub(super) struct SliceState {
    words: Box<[u64]>,
    /// Newer than the file, and in the list of dirty slices.
    pub(super) dirty: bool,
    /// Where its copy is that outlives the process, if it has one. Has one whenever it may be newer than the file.
    pub(super) kept: Option<u32>,
}

impl Slice {
    pub(super) fn new(key: SliceKey, words: Vec<u64>) -> Self {
        Self { key, state: Mutex::new(SliceState::new(words)) }
    }

    /// The entries. Lock order: a busy cluster's shard before this, the lists of dirty slices and of unmapped clusters after it.
    pub(super) fn lock(&self) -> MutexGuard<'_, SliceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SliceState {
    pub(super) fn new(words: Vec<u64>) -> Self {
        Self { words: words.into(), dirty: false, kept: None }
    }

    /// What entry number `index` says.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn entry(&self, index: usize, format: &EntryFormat) -> Result<Entry, &'static str> {
        if format.geometry.extended_l2() {
            format.decode(self.words[2 * index], self.words[2 * index + 1])
        } else {
            format.decode(self.words[index], 0)
        }
    }

    /// Replaces an entry, and returns which words it is. Only by [`change`](Inner::change), which sees to all that follows.
    pub(super) fn set(&mut self, index: usize, entry: Standard, format: &EntryFormat) -> Range<usize> {
        let (word, bitmap) = format.encode(entry);
        if format.geometry.extended_l2() {
            self.words[2 * index] = word;
            self.words[2 * index + 1] = bitmap;
            2 * index..2 * index + 2
        } else {
            self.words[index] = word;
            index..index + 1
        }
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }
}

/// Slices in memory.
#[derive(Debug)]
pub(super) struct SliceCache {
    shards: Box<[Shard]>,
    /// Bytes that clean slices may take up, all together.
    budget: AtomicUsize,
    slice_len: usize,
}

#[derive(Debug, Default)]
struct Shard {
    slots: Mutex<HashMap<SliceKey, Slot>>,
    loaded: WaitQueue,
}

#[derive(Debug)]
enum Slot {
    /// Somebody reads it from the file.
    Loading,
    Ready {
        slice: Arc<Slice>,
        /// Looked up since slices were last dropped.
        used: bool,
    },
}

/// The duty to load a slice. Dropped without [`ready`](Loading::ready), the next one who waits takes it over.
struct Loading<'a> {
    shard: &'a Shard,
    key: SliceKey,
    done: bool,
}

enum Lookup<'a> {
    Ready(Arc<Slice>),
    Load(Loading<'a>),
}

impl SliceCache {
    pub(super) fn new(slice_len: usize, budget: usize) -> Self {
        let shards = (budget / slice_len / SLICES_PER_SHARD).clamp(1, MAX_SHARDS);
        Self { shards: (0..shards).map(|_| Shard::default()).collect(), budget: AtomicUsize::new(budget), slice_len }
    }

    /// Changes how many bytes clean slices may take up, and drops those that are too many.
    pub(super) fn set_budget(&self, budget: usize) {
        self.budget.store(budget, Ordering::Relaxed);
        let limit = self.slots_per_shard();
        for shard in &self.shards {
            drop_unused(&mut shard.slots.lock().unwrap_or_else(PoisonError::into_inner), limit);
        }
    }

    /// Drops slices that `is_superfluous` says are, unless somebody holds them.
    pub(super) fn forget(&self, is_superfluous: impl Fn(SliceKey) -> bool) {
        for shard in &self.shards {
            let mut slots = shard.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.retain(|key, slot| slot.is_held() || !is_superfluous(*key));
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.slots.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// Bytes of one slice.
    pub(super) fn slice_len(&self) -> usize {
        self.slice_len
    }

    fn shard(&self, key: SliceKey) -> &Shard {
        let hash = key.l1_index.wrapping_mul(31).wrapping_add(key.slice);
        &self.shards[hash as usize % self.shards.len()]
    }

    /// Waits while another loads the slice.
    async fn lookup(&self, key: SliceKey) -> Lookup<'_> {
        let shard = self.shard(key);
        shard
            .loaded
            .wait_until(|| {
                let mut slots = shard.slots.lock().unwrap_or_else(PoisonError::into_inner);
                match slots.get_mut(&key) {
                    Some(Slot::Loading) => None,
                    Some(Slot::Ready { slice, used }) => {
                        *used = true;
                        Some(Lookup::Ready(Arc::clone(slice)))
                    }
                    None => {
                        slots.insert(key, Slot::Loading);
                        Some(Lookup::Load(Loading { shard, key, done: false }))
                    }
                }
            })
            .await
    }

    /// Slots of one shard that are within the budget.
    fn slots_per_shard(&self) -> usize {
        (self.budget.load(Ordering::Relaxed) / self.slice_len / self.shards.len()).max(1)
    }
}

impl Loading<'_> {
    fn ready(mut self, words: Vec<u64>, limit: usize) -> Arc<Slice> {
        let slice = Arc::new(Slice::new(self.key, words));
        let mut slots = self.shard.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() > limit {
            drop_unused(&mut slots, limit);
        }
        slots.insert(self.key, Slot::Ready { slice: Arc::clone(&slice), used: true });
        self.done = true;
        drop(slots);
        self.shard.loaded.notify_all();
        slice
    }
}

impl Slot {
    /// Whether somebody uses it. They hold a slice only through clones made under the shard's lock, so a count of one cannot grow meanwhile.
    fn is_held(&self) -> bool {
        match self {
            Self::Loading => true,
            Self::Ready { slice, .. } => Arc::strong_count(slice) > 1,
        }
    }
}

/// Drops slices that nobody holds: first those that have not been looked up since the last time, then any, until at most `limit` are left.
fn drop_unused(slots: &mut HashMap<SliceKey, Slot>, limit: usize) {
    slots.retain(|_, slot| {
        let was_used = match slot {
            Slot::Loading => true,
            Slot::Ready { used, .. } => std::mem::take(used),
        };
        was_used || slot.is_held()
    });
    let mut excess = slots.len().saturating_sub(limit);
    slots.retain(|_, slot| {
        let goes = excess > 0 && !slot.is_held();
        excess -= usize::from(goes);
        !goes
    });
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.shard.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
            self.shard.loaded.notify_all();
        }
    }
}

impl<E: Environment> Inner<E> {
    /// A slice for looking at, or `None` if its table does not exist.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) async fn slice(&self, key: SliceKey) -> Result<Option<Arc<Slice>>, LayerError> {
        if self.l1().table(key.l1_index).is_none() {
            return Ok(None);
        }
        let loading = match self.slices.lookup(key).await {
            Lookup::Ready(slice) => return Ok(Some(slice)),
            Lookup::Load(loading) => loading,
        };
        let limit = self.slices.slots_per_shard();
        loop {
            let (table, zero) = {
                let l1 = self.l1();
                (l1.table(key.l1_index), l1.is_zero_slice(key))
            };
            let Some(table) = table else { return Ok(None) };
            let len = self.slices.slice_len;
            if zero {
                return Ok(Some(loading.ready(vec![0; len / 8], limit)));
            }
            let at = table.at + u64::from(key.slice) * len as u64;
            let bytes = self.file.read_bytes(at, len).await.map_err(|error| LayerError::io("read", Structure::L2Table, at, error))?;
            // The table may have been copied elsewhere while we read, and its old place may be used for something else by now.
            if self.l1().table(key.l1_index).is_some_and(|now| now.at == table.at) {
                return Ok(Some(loading.ready(words_from(&bytes), limit)));
            }
        }
    }

    /// The error for an entry that makes no sense.
    pub(super) fn corrupt_entry(&self, key: SliceKey, index: usize, detail: &'static str) -> LayerError {
        let table = self.l1().table(key.l1_index).map_or(HostOffset::ZERO, |table| table.at);
        let in_slice = index as u64 * 8 * self.format.geometry.entry_words() as u64;
        let at = table + u64::from(key.slice) * self.slices.slice_len as u64 + in_slice;
        LayerError::Corrupt { what: Structure::L2Table, at, detail }
    }
}

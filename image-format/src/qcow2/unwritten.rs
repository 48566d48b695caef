//! Changes of the mapping that the file does not have yet, where they outlive the process.
//!
//! A write that got a new place has changed its L2 entry in memory only; the file gets it with a write-back, in the order that survives a power cut
//! (docs/crash-order.md). If the process is killed before, the guest goes on, and must find what it has written. So every slice that is newer
//! than the file has a copy in kept memory, made and changed together with it; opening the image the next time begins with
//! putting these copies in place (`restore`).
//!
//! ```text
//! kept memory:  kind, words of a slice, number of slots that there is room for, 5 unused | slot | slot | ...
//! slot:         in use (1), key, redo: index + 1, two words; 3 unused | the slice's words
//! ```
//!
//! The process may end between any two stores. A slot counts once `in use` is stored after all the rest. An entry of two words is changed by way of
//! the redo fields, so that it is found whole, old or new.
//!
//! Which memory belongs to an image is written in the image: its number is the upper half of the autoclear feature bits, which every program that
//! does not know them must clear before it writes (qemu's docs/interop/qcow2.rst, "Auto-clear feature bits"). If somebody else has written to
//! the image since, the copies are not used. Version 2 has no such bits: there, the file gets each change before the request that made it ends
//! ([`Qcow2::outlast_process`]).
//!
//! If a round of write-backs has failed since the machine was started (`rounds.rs`), whoever opens the image next may read metadata that no flush
//! will ever cover, because the kernel counts what it could not write as written. All of it is written again before anything is built on it
//! (`Inner::rewrite_metadata`), and so is the data to which the copies lead (`restore`): an entry that is durable must not lead to data that is not,
//! least of all where the data was copied from what had been durable for long.
//!
//! Who changes an entry holds a [`Ticket`], got before anything else is locked, so that there is a slot when it is needed. Memory begins with a few
//! slots and gets more as they are wanted, since most images want no more, and room for all of them has its price where files lie in memory.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::join_all;

use crate::error::{LayerError, Structure};
use crate::runtime::WaitQueue;
use crate::storage::Environment;
use crate::storage::kept::{Failure, KeptMemory, MemoryKeeper};
use crate::storage::{FileIdentity, Storage, StorageExt};
use crate::units::HostOffset;

use super::entry::{Entry, Standard};
use super::geometry::{HostCluster, SliceKey};
use super::l2::{Slice, SliceState};
use super::lifecycle::Phase;
use super::refcount::BlockState;
use super::{Inner, Qcow2};

/// What the first word says.
const KIND: u64 = u64::from_be_bytes(*b"qcow2 l2");
/// Which word says for how many slots there is room.
const SLOTS: usize = 2;
const HEADER_WORDS: usize = 8;
const SLOT_HEADER_WORDS: usize = 8;
const IN_USE: usize = 0;
const KEY: usize = 1;
const REDO: usize = 2;
const REDO_WORDS: usize = 3;
/// Where the number of the memory is among the autoclear feature bits.
pub(super) const KEPT_SHIFT: u32 = 32;
/// Bytes of slices for which there can be room.
const CAPACITY_BYTES: usize = 8 << 20;
/// Slots that there is room for at first, and how many are added at most at a time.
const FIRST_SLOTS: usize = 32;
const MOST_ADDED: usize = 256;
/// Clusters that are read and written once more at a time: they may have 2 MiB each.
const REWRITTEN_AT_ONCE: usize = 8;

/// The copies of one image that is written to.
#[derive(Debug)]
pub(super) struct Unwritten {
    keeper: Arc<dyn MemoryKeeper>,
    owner: FileIdentity,
    number: u32,
    memory: Arc<dyn KeptMemory>,
    slice_words: usize,
    slots: Mutex<Slots>,
    available: WaitQueue,
    /// That there is no room for more has been told.
    has_told: AtomicBool,
}

#[derive(Debug)]
struct Slots {
    free: Vec<u32>,
    /// Free slots that somebody has been promised.
    promised: usize,
    /// For how many there is room, and for how many there can be.
    there: usize,
    capacity: usize,
    /// Room is being made for more.
    is_growing: bool,
    /// There was no room for more. It is tried again once none is in use.
    is_full: bool,
}

impl Slots {
    fn new(there: usize, capacity: usize) -> Self {
        let mut slots = Self { free: Vec::new(), promised: 0, there: 0, capacity, is_growing: false, is_full: false };
        slots.grow(there);
        slots
    }

    /// There is room for so many. The lowest are used first: what is used again and again is little.
    fn grow(&mut self, there: usize) {
        let number = |slot| u32::try_from(slot).expect("less than 2^20 slots");
        self.free.splice(..0, (number(self.there)..number(there)).rev());
        self.there = there;
    }

    /// Whether a write-back would set slots free.
    fn is_used(&self) -> bool {
        self.free.len() < self.there
    }
}

/// What somebody does who wants to change an entry.
#[derive(Debug)]
enum Step {
    Change(Ticket),
    Grow(Growth),
    WriteBack,
}

/// Room is made for so many slots, by nobody else until this is dropped.
#[derive(Debug)]
struct Growth {
    unwritten: Arc<Unwritten>,
    there: usize,
}

impl Growth {
    async fn grow(self) {
        let Unwritten { memory, slice_words, .. } = &*self.unwritten;
        let made = Arc::clone(memory).make_room(Unwritten::words(*slice_words, self.there)).await;
        if made.is_ok() {
            // Zeros are slots that are not in use.
            memory.words()[SLOTS].store(self.there as u64, Ordering::Release);
        }
        let mut slots = self.unwritten.slots();
        match made {
            Ok(()) => slots.grow(self.there),
            Err(cause) => {
                slots.is_full = true;
                let Unwritten { owner, has_told, .. } = &*self.unwritten;
                if !has_told.swap(true, Ordering::Relaxed) {
                    let slots = slots.there;
                    tracing::warn!(event = "kept_memory_not_grown", image = ?owner, slots, %cause, "the image is written back more often");
                }
            }
        }
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        self.unwritten.slots().is_growing = false;
        self.unwritten.available.notify_all();
    }
}

/// The right to a slot. Given back when dropped.
#[derive(Debug, Default)]
pub(super) struct Ticket(Option<Arc<Unwritten>>);

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(unwritten) = self.0.take() {
            unwritten.slots().promised -= 1;
            unwritten.available.notify_all();
        }
    }
}

/// One slice as a process has left it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LeftSlice {
    pub(super) key: SliceKey,
    pub(super) words: Vec<u64>,
}

fn slot_words(slice_words: usize) -> usize {
    SLOT_HEADER_WORDS + slice_words
}

/// Says what is about to be stored where, for whoever comes after an end in the midst of it.
fn announce(slot: &[AtomicU64], at: usize, entry: &[u64]) {
    for (place, &word) in slot[REDO_WORDS..].iter().zip(entry) {
        place.store(word, Ordering::Relaxed);
    }
    slot[REDO].store(at as u64 + 1, Ordering::Release);
}

impl Unwritten {
    /// Room for slices of so many words, none in use.
    pub(super) fn create(keeper: Arc<dyn MemoryKeeper>, owner: FileIdentity, slice_words: usize) -> std::io::Result<Arc<Self>> {
        let capacity = CAPACITY_BYTES / (slice_words * 8);
        let there = capacity.min(FIRST_SLOTS);
        let (number, memory) = keeper.create(owner, Self::words(slice_words, capacity), Self::words(slice_words, there))?;
        let words = memory.words();
        words[1].store(slice_words as u64, Ordering::Relaxed);
        words[SLOTS].store(there as u64, Ordering::Relaxed);
        words[0].store(KIND, Ordering::Release);
        let slots = Mutex::new(Slots::new(there, capacity));
        Ok(Arc::new(Self {
            keeper,
            owner,
            number,
            memory,
            slice_words,
            slots,
            available: WaitQueue::new(),
            has_told: AtomicBool::new(false),
        }))
    }

    /// Words of memory with so many slots.
    fn words(slice_words: usize, slots: usize) -> usize {
        HEADER_WORDS + slots * slot_words(slice_words)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, slot: u32) -> &[AtomicU64] {
        let len = slot_words(self.slice_words);
        &self.memory.words()[HEADER_WORDS + slot as usize * len..][..len]
    }

    /// What who wants to change an entry does now: waits, if it is nothing.
    fn step(self: &Arc<Self>) -> Option<Step> {
        let mut slots = self.slots();
        if slots.promised < slots.free.len() {
            slots.promised += 1;
            Some(Step::Change(Ticket(Some(Arc::clone(self)))))
        } else if slots.is_growing {
            None
        } else if slots.there < slots.capacity && !slots.is_full {
            slots.is_growing = true;
            let there = slots.capacity.min(slots.there + slots.there.min(MOST_ADDED));
            Some(Step::Grow(Growth { unwritten: Arc::clone(self), there }))
        } else {
            // Those that are promised to others will be used or given back.
            slots.is_used().then_some(Step::WriteBack)
        }
    }

    /// Copies a whole slice.
    pub(super) fn put(&self, mut ticket: Ticket, key: SliceKey, words: &[u64]) -> u32 {
        let (slot, is_first) = {
            let mut slots = self.slots();
            if ticket.0.take().is_some() {
                slots.promised -= 1;
            }
            let is_first = !slots.is_used();
            (slots.free.pop().expect("every change has a ticket"), is_first)
        };
        if is_first {
            // A write-back helps those now who have found everything promised and nothing used.
            self.available.notify_all();
        }
        let place = self.slot(slot);
        for (place, &word) in place[SLOT_HEADER_WORDS..].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        place[KEY].store(u64::from(key.l1_index) << 32 | u64::from(key.slice), Ordering::Relaxed);
        place[REDO].store(0, Ordering::Relaxed);
        place[IN_USE].store(1, Ordering::Release);
        slot
    }

    /// Changes one entry, of one or two words, from word `at` of the slice on.
    pub(super) fn change(&self, slot: u32, at: usize, entry: &[u64]) {
        let place = self.slot(slot);
        if entry.len() > 1 {
            announce(place, at, entry);
        }
        for (place, &word) in place[SLOT_HEADER_WORDS + at..].iter().zip(entry) {
            place.store(word, Ordering::Release);
        }
        place[REDO].store(0, Ordering::Release);
    }

    /// The file has the slice.
    pub(super) fn release(&self, slot: u32) {
        self.slot(slot)[IN_USE].store(0, Ordering::Release);
        {
            let mut slots = self.slots();
            slots.free.push(slot);
            slots.is_full &= slots.is_used();
        }
        self.available.notify_all();
    }

    /// Everything that a process has left in `memory`, if that was made for slices of so many words.
    ///
    /// # Errors
    /// If it was not.
    pub(super) fn left(memory: &dyn KeptMemory, slice_words: usize) -> Result<Vec<LeftSlice>, &'static str> {
        let word = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let Some((header, slots)) = memory.words().split_at_checked(HEADER_WORDS) else { return Err("it is too short") };
        let there = usize::try_from(word(&header[SLOTS])).map_err(|_| "it has too many slots")?;
        if word(&header[0]) == 0 {
            // Its maker did not get so far as to use it.
            return Ok(Vec::new());
        }
        if word(&header[0]) != KIND || word(&header[1]) != slice_words as u64 {
            return Err("it was made for something else");
        }
        let mut left = Vec::new();
        for slot in slots.chunks_exact(slot_words(slice_words)).take(there).filter(|slot| word(&slot[IN_USE]) == 1) {
            let key = word(&slot[KEY]);
            let mut words: Vec<u64> = slot[SLOT_HEADER_WORDS..].iter().map(word).collect();
            if let Some(at) = word(&slot[REDO]).checked_sub(1) {
                let entry = usize::try_from(at).ok().and_then(|at| words.get_mut(at..at + 2)).ok_or("an entry is outside its slice")?;
                entry[0] = word(&slot[REDO_WORDS]);
                entry[1] = word(&slot[REDO_WORDS + 1]);
            }
            // Truncation cuts the two halves out.
            left.push(LeftSlice { key: SliceKey { l1_index: (key >> 32) as u32, slice: key as u32 }, words });
        }
        Ok(left)
    }
}

impl<E: Environment> Qcow2<E> {
    pub(crate) async fn keep(&self, keeper: &Arc<dyn MemoryKeeper>) -> Result<(), LayerError> {
        self.inner.remember_failures(keeper);
        self.keep_unremembered(keeper).await
    }

    /// As [`keep`](Self::keep), but flushes that fail are remembered only if they were before.
    pub(super) async fn keep_unremembered(&self, keeper: &Arc<dyn MemoryKeeper>) -> Result<(), LayerError> {
        let inner = &self.inner;
        inner.admit_write()?;
        let has_feature_bits = inner.header().has_feature_bits();
        inner.writes_at_once.store(!has_feature_bits, Ordering::Release);
        if !has_feature_bits && !inner.has_lost() {
            return Ok(());
        }
        inner
            .write_back_and(async |inner: &Inner<E>| {
                inner.rewrite_metadata().await?;
                if has_feature_bits { inner.begin_keeping(keeper).await } else { Ok(()) }
            })
            .await?;
        inner.note_rewritten();
        Ok(())
    }

    /// Ends when nothing that was written before the call can be lost with the process.
    pub(crate) async fn outlast_process(&self) -> Result<(), LayerError> {
        if self.outlasts_process() { Ok(()) } else { self.inner.write_back().await }
    }

    /// Whether nothing that was written before the call can be lost with the process.
    pub(crate) fn outlasts_process(&self) -> bool {
        let inner = &self.inner;
        if !inner.writes_at_once.load(Ordering::Acquire) || inner.phase.get() != Phase::Writing {
            return true;
        }
        // In this order: a round shows itself before it takes what the file does not have.
        let has_unwritten = !inner.dirty.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        !has_unwritten && !inner.rounds.is_running()
    }
}

impl<E: Environment> Inner<E> {
    /// The right to change one entry. Waits for a write-back if there is no room.
    pub(super) async fn ticket(&self) -> Result<Ticket, LayerError> {
        let Some(unwritten) = self.unwritten.load_full() else { return Ok(Ticket::default()) };
        loop {
            match unwritten.available.wait_until(|| unwritten.step()).await {
                Step::Change(ticket) => return Ok(ticket),
                Step::Grow(growth) => growth.grow().await,
                Step::WriteBack => self.write_back().await?,
            }
        }
    }

    /// Replaces an entry of a slice, which is locked as `state`, in memory that the process does not outlive and in memory that outlives it.
    pub(super) fn change(&self, slice: &Arc<Slice>, state: &mut SliceState, index: usize, entry: Standard, ticket: &mut Ticket) {
        let words = state.set(index, entry, &self.format);
        self.mark_dirty(slice, state);
        let unwritten = self.unwritten.load();
        let Some(unwritten) = &*unwritten else { return };
        match state.kept {
            Some(slot) => unwritten.change(slot, words.start, &state.words()[words]),
            None => state.kept = Some(unwritten.put(std::mem::take(ticket), slice.key, state.words())),
        }
    }

    /// The file has what these slices were when they were copied for it.
    pub(super) fn release_kept(&self, slices: &[Arc<Slice>]) {
        let unwritten = self.unwritten.load();
        let Some(unwritten) = &*unwritten else { return };
        for slice in slices {
            let mut state = slice.lock();
            if !state.dirty
                && let Some(slot) = state.kept.take()
            {
                unwritten.release(slot);
            }
        }
    }

    /// Whether a flush had failed before the image was opened, and what it may have lost has not been written since.
    fn has_lost(&self) -> bool {
        self.rounds.present_failure().is_some_and(|failure| !failure.rewritten)
    }

    /// Writes the metadata once more, as it reads, and makes it durable, if a failed flush may have lost some: all that may be lost was written after
    /// the last flush that had not failed, in one step of a round, so the order does not matter. Only while the file has everything, and before the
    /// first request.
    pub(super) async fn rewrite_metadata(&self) -> Result<(), LayerError> {
        if !self.has_lost() {
            return Ok(());
        }
        let clusters: Vec<_> = self.metadata().found().to_vec().into_iter().flatten().collect();
        self.rewrite(&clusters).await?;
        self.flush_device().await?;
        let clusters = clusters.len();
        tracing::warn!(event = "metadata_rewritten", clusters, "a flush of the image had failed before it was opened");
        Ok(())
    }

    /// Everything that a failed flush may have lost of the image's own is durable.
    pub(super) fn note_rewritten(&self) {
        self.rounds.add_to_failure(Failure { told: false, rewritten: true });
    }

    /// Writes clusters as they read, some at a time.
    async fn rewrite(&self, clusters: &[u64]) -> Result<(), LayerError> {
        let geometry = &self.format.geometry;
        for some in clusters.chunks(REWRITTEN_AT_ONCE) {
            let reads = some.iter().map(async |&cluster| {
                let at = geometry.host_offset(HostCluster(cluster));
                let read = self.file.read_bytes(at, geometry.cluster_len()).await;
                read.map(|bytes| (at, bytes)).map_err(|error| LayerError::io("read", Structure::File, at, error))
            });
            let writes = join_all(reads).await.into_iter().collect::<Result<Vec<_>, _>>()?;
            self.write_all(writes, Structure::File).await?;
        }
        Ok(())
    }

    /// Begins to keep what the file does not have, and writes into the header where it is.
    pub(super) async fn begin_keeping(&self, keeper: &Arc<dyn MemoryKeeper>) -> Result<(), LayerError> {
        let unwritten = Unwritten::create(Arc::clone(keeper), self.file.identity(), self.slices.slice_len() / 8)
            .map_err(|error| LayerError::io("keep memory for", Structure::L2Table, HostOffset::ZERO, error))?;
        self.write_kept_number(unwritten.number).await?;
        self.flush_device().await?;
        // What was restored, and what a process has left that was killed before it got here.
        keeper.retain(unwritten.owner, unwritten.number);
        self.unwritten.store(Some(unwritten));
        Ok(())
    }

    /// Takes out of the header where memory is kept, which the caller flushes before [`end_keeping`](Self::end_keeping). Only in a round, when the file
    /// has everything durably.
    pub(super) async fn leave_kept(&self) -> Result<Option<Arc<Unwritten>>, LayerError> {
        let unwritten = self.unwritten.load_full();
        if unwritten.is_some() {
            self.write_kept_number(0).await?;
        }
        Ok(unwritten)
    }

    /// Gives up memory that the header does not lead to any more, durably.
    pub(super) fn end_keeping(&self, kept: Option<Arc<Unwritten>>) {
        if let Some(unwritten) = kept {
            self.unwritten.store(None);
            unwritten.keeper.retain(unwritten.owner, 0);
        }
    }

    /// Only in a round, or before anything else is written. The caller flushes.
    async fn write_kept_number(&self, number: u32) -> Result<(), LayerError> {
        self.header().autoclear = u64::from(number) << KEPT_SHIFT;
        self.write_header().await
    }

    /// Puts slices in place that a process has left, and makes them durable: their clusters are counted first, so that nothing else can get
    /// them.
    pub(super) async fn restore(&self, left: Vec<LeftSlice>) -> Result<(), LayerError> {
        let geometry = self.format.geometry;
        let entries = geometry.slice_bytes() as usize / 8 / geometry.entry_words();
        let mut slices = Vec::new();
        let mut clusters = BTreeSet::new();
        for LeftSlice { key, words } in left {
            let state = SliceState::new(words);
            for index in 0..entries {
                let entry = state.entry(index, &self.format).map_err(|detail| self.fail(self.corrupt_entry(key, index, detail)))?;
                if let Entry::Standard(Standard { host: Some(host), .. }) = entry {
                    clusters.insert(geometry.host_cluster(host).0);
                }
            }
            slices.push((key, state));
        }
        self.count_left(clusters).await?;
        let mut places = BTreeSet::new();
        for (key, left) in slices {
            let slice = self.slice_for_writing(key).await?;
            let mut gone = Vec::new();
            {
                let mut state = slice.lock();
                for index in 0..entries {
                    let old = self.writable_entry(key, &state, index)?;
                    let Ok(Entry::Standard(new)) = left.entry(index, &self.format) else { continue };
                    if old == Entry::Standard(new) {
                        continue;
                    }
                    self.change(&slice, &mut state, index, new, &mut Ticket::default());
                    places.extend(new.host.map(|host| geometry.host_cluster(host).0));
                    if !matches!(old, Entry::Standard(old) if old.host == new.host) {
                        gone.push(old);
                    }
                }
            }
            gone.into_iter().for_each(|entry| self.unmap_entry(entry));
        }
        if self.has_lost() {
            // Durable before the entries are, as all data.
            self.rewrite(&places.into_iter().collect::<Vec<_>>()).await?;
        }
        self.write_back().await
    }

    /// Counts clusters that may not be counted yet, in order.
    async fn count_left(&self, clusters: BTreeSet<u64>) -> Result<(), LayerError> {
        let geometry = self.format.geometry;
        let Some(&last) = clusters.last() else { return Ok(()) };
        let turn = self.refcount_turn.take().await;
        {
            let mut allocator = self.allocator();
            allocator.end = allocator.end.max(last + 1);
        }
        for cluster in clusters.into_iter().map(HostCluster) {
            let (index, _) = geometry.locate_refcount(cluster);
            if self.allocator().refcounts.block_state(index) == BlockState::Missing {
                // The table has room for it afterwards, as it comes before the end.
                let at = self.append_clusters(1, 0, &turn).await?;
                let mut allocator = self.allocator();
                // Appending may have made just this block.
                if allocator.refcounts.block_state(index) == BlockState::Missing {
                    allocator.refcounts.make_block(index, at);
                    drop(allocator);
                    self.metadata_mut().add(at.0..at.0 + 1);
                } else {
                    allocator.add_free(at.0..at.0 + 1);
                }
            }
            self.load_refcounts(index, &turn).await?;
            let mut allocator = self.allocator();
            if allocator.refcounts.get(cluster) == Some(0) {
                allocator.refcounts.set(cluster, 1);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::extent::{Extent, ExtentList};
    use crate::qcow2::testing::{SIMULATED_IMAGE, SimulatedImage, with_image, write};
    use crate::qcow2::{CheckOptions, CreateOptions, OpenOptions, check};
    use crate::storage::kept::TestKeeper;
    use crate::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, SimulatedFile, Simulation};
    use crate::storage::{Access, CacheMode, Location};
    use crate::units::{GuestOffset, GuestRange};

    const WORDS: usize = 8;
    const OWNER: FileIdentity = FileIdentity { device: 1, inode: 2 };

    fn key(slice: u32) -> SliceKey {
        SliceKey { l1_index: 3, slice }
    }

    fn promised(unwritten: &Arc<Unwritten>) -> Ticket {
        let Some(Step::Change(ticket)) = unwritten.step() else { panic!("no slot is free") };
        ticket
    }

    fn left(unwritten: &Unwritten) -> Vec<LeftSlice> {
        Unwritten::left(&*unwritten.memory, WORDS).expect("made for it")
    }

    #[test]
    fn what_is_put_and_changed_is_found_until_it_is_released() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let unwritten = Unwritten::create(Arc::clone(&keeper), OWNER, WORDS).expect("room");
        let found = keeper.find(unwritten.number).expect("no error").expect("just made");
        assert_eq!(found.words().len(), HEADER_WORDS + CAPACITY_BYTES / (WORDS * 8) * slot_words(WORDS), "each slot has its place");
        let (first, second) = (promised(&unwritten), promised(&unwritten));
        let slot = unwritten.put(first, key(1), &[1; WORDS]);
        let other = unwritten.put(second, key(2), &[2; WORDS]);
        unwritten.change(slot, 3, &[7]);
        unwritten.change(other, 6, &[8, 9]);
        let announced = |slot| [REDO_WORDS, REDO_WORDS + 1].map(|at| unwritten.slot(slot)[at].load(Ordering::Relaxed));
        assert_eq!((announced(slot), announced(other)), ([0, 0], [8, 9]), "one word is stored whole");
        let expected = [
            LeftSlice { key: key(1), words: vec![1, 1, 1, 7, 1, 1, 1, 1] },
            LeftSlice { key: key(2), words: vec![2, 2, 2, 2, 2, 2, 8, 9] },
        ];
        assert_eq!(Unwritten::left(&*found, WORDS).expect("made for it"), expected);
        unwritten.release(slot);
        assert_eq!(left(&unwritten), expected[1..]);
        assert!(Unwritten::left(&*found, WORDS * 2).is_err());
        keeper.retain(OWNER, 0);
        assert!(keeper.find(unwritten.number).expect("no error").is_none());
    }

    #[test]
    fn entries_of_two_words_are_found_whole() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let unwritten = Unwritten::create(keeper, OWNER, WORDS).expect("room");
        let slot = unwritten.put(promised(&unwritten), key(0), &[1; WORDS]);
        // Ended between the two stores of an entry.
        let place = unwritten.slot(slot);
        announce(place, 6, &[5, 6]);
        place[SLOT_HEADER_WORDS + 6].store(5, Ordering::Relaxed);
        assert_eq!(left(&unwritten)[0].words, [1, 1, 1, 1, 1, 1, 5, 6]);
        place[REDO].store(0, Ordering::Relaxed);
        assert_eq!(left(&unwritten)[0].words, [1, 1, 1, 1, 1, 1, 5, 1], "not before all is announced");
        place[REDO].store(WORDS as u64, Ordering::Relaxed);
        assert!(Unwritten::left(&*unwritten.memory, WORDS).is_err(), "outside");
    }

    /// Opens the image with the keeper, or gives it that `later`, as one is opened of which nothing is left.
    async fn open(disk: &SimulatedEnvironment, keeper: &Arc<dyn MemoryKeeper>, later: bool) -> SimulatedImage {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = disk.open(&at, Access::Write, CacheMode::Direct).await.expect("there");
        let image = SimulatedImage::open(file, OpenOptions { keeper: (!later).then(|| Arc::clone(keeper)), ..OpenOptions::writing() });
        let image = image.await.expect("sound");
        if later {
            image.keep(keeper).await.expect("sound");
        }
        image
    }

    /// The image's file, in which nothing is corrupt.
    async fn sound(disk: &SimulatedEnvironment, which: &str) -> SimulatedFile {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = disk.open(&at, Access::Write, CacheMode::Direct).await.expect("there");
        let report = check(&file, &CheckOptions::default()).await.expect("an image");
        assert_eq!(report.corruptions, 0, "{which}: {:?}", report.findings);
        file
    }

    #[test]
    fn an_image_keeps_what_it_can_say_the_place_of_and_writes_the_rest_at_once() {
        for version in [2, 3] {
            with_image(22, CreateOptions { version, ..CreateOptions::standalone(64 << 20) }, async move |_, image| {
                assert!(image.inner.unwritten.load().is_none());
                let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
                image.keep(&keeper).await.expect("sound");
                let number = image.inner.unwritten.load().as_ref().map(|unwritten| unwritten.number);
                assert_eq!(image.inner.header().autoclear >> KEPT_SHIFT, number.unwrap_or_default().into(), "version {version}");
                assert_eq!(number.is_some(), version == 3);
                assert_eq!(image.inner.writes_at_once.load(Ordering::Acquire), version == 2);
            });
        }
    }

    /// The counts of clusters have been written and can be seen, and the flush after that has failed. Whoever comes next finds nothing to be
    /// changed there; if they are not written once more, a power cut takes them away, but not the mapping.
    #[test]
    fn metadata_that_a_failed_flush_may_have_lost_is_written_once_more() {
        for (seed, version, later) in (0..40).flat_map(|seed| [(seed, 3, false), (seed, 2, false), (seed, 2, true)]) {
            let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
            let disk = SimulatedEnvironment::new(seed);
            let (first, kept) = (disk.clone(), Arc::clone(&keeper));
            Simulation::on(disk.clone()).block_on(async move {
                let image = create(&first, &kept, &CreateOptions { version, ..CreateOptions::standalone(64 << 20) }, later).await;
                assert!(!image.inner.has_lost());
                // It gets a table, which the next one has as well.
                write(&image, 0, 4096).await;
                image.flush().await.expect("sound");
                write(&image, 1 << 16, 4096).await;
                first.inject(Fault::once(OperationKind::Flush, 0));
                image.flush().await.expect_err("a failed flush");
            });
            let disk = disk.killed();
            let second = disk.clone();
            Simulation::on(disk.clone()).block_on(async move {
                let image = open(&second, &keeper, later).await;
                assert!(!image.inner.has_lost(), "it has been written once more");
                image.flush().await.expect("sound");
            });
            let disk = disk.crash();
            let third = disk.clone();
            Simulation::on(disk).block_on(async move {
                sound(&third, &format!("seed {seed}, version {version}")).await;
            });
        }
    }

    /// A new image on this disk, opened with the keeper, or given it later.
    async fn create(disk: &SimulatedEnvironment, keeper: &Arc<dyn MemoryKeeper>, options: &CreateOptions, later: bool) -> SimulatedImage {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = disk.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        SimulatedImage::create(&file, options).await.expect("created");
        file.flush().await.expect("sound");
        disk.flush_directory(Path::new("/")).await.expect("sound");
        drop(file);
        open(disk, keeper, later).await
    }

    /// What the image says of its first bytes.
    async fn mapped(image: &SimulatedImage, bytes: u64) -> Vec<Extent> {
        let mut extents = ExtentList::new();
        image.map(GuestRange::new(GuestOffset::ZERO, bytes), &mut extents).await.expect("readable");
        extents.as_slice().to_vec()
    }

    fn slices_left(image: &SimulatedImage) -> usize {
        let unwritten = image.inner.unwritten.load_full().expect("it keeps what the file does not have");
        let slice_words = unwritten.slice_words;
        Unwritten::left(&*unwritten.memory, slice_words).expect("made for it").len()
    }

    /// A process is killed before it has written any mapping. The next one has the same, durably, and each cluster is counted once.
    #[test]
    fn what_a_killed_process_has_left_is_in_the_file_once_the_image_is_open() {
        let small = CreateOptions { cluster_bits: 9, ..CreateOptions::standalone(4 << 20) };
        let extended = CreateOptions { extended_l2: true, cluster_bits: 14, ..CreateOptions::standalone(4 << 20) };
        // Of clusters of 512 bytes 256 are counted in one block, so that there are blocks and tables that the file does not have.
        for (options, unit, count, flushed) in
            [(small.clone(), 512, 3000, 750), (small.clone(), 512, 40, 10), (small, 512, 8000, 0), (extended, 512, 300, 75)]
        {
            let virtual_size = options.virtual_size;
            let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
            let disk = SimulatedEnvironment::new(29);
            let (first, kept) = (disk.clone(), Arc::clone(&keeper));
            let before = Simulation::on(disk.clone()).block_on(async move {
                let image = create(&first, &kept, &options, false).await;
                // Some of it is in the file, and mapped anew afterwards.
                if flushed > 0 {
                    for number in 0..flushed {
                        write(&image, number * 2 * unit, unit).await;
                    }
                    image.flush().await.expect("sound");
                    let range = GuestRange::new(GuestOffset::ZERO, flushed / 2 * unit);
                    image.discard(range, false, &|_| {}).await.expect("nothing beneath");
                }
                for number in (0..count).rev() {
                    write(&image, number * unit, unit).await;
                }
                assert!(slices_left(&image) > 0);
                mapped(&image, virtual_size).await
            });
            let disk = disk.killed();
            let second = disk.clone();
            let after = Simulation::on(disk.clone()).block_on(async move {
                let image = open(&second, &keeper, false).await;
                assert_eq!(slices_left(&image), 0);
                let mapped = mapped(&image, virtual_size).await;
                let blocks: Vec<_> = image.inner.allocator().refcounts.block_positions().map(|(_, at)| at).collect();
                let is_metadata = |at: &HostOffset| image.inner.metadata().contains(image.inner.format.geometry.host_cluster(*at).0);
                assert!(blocks.iter().all(is_metadata), "blocks that are not known as metadata");
                // What was replaced is free, and nothing else.
                image.flush().await.expect("sound");
                image.release(image.take_unmapped()).await.expect("sound");
                image.flush().await.expect("sound");
                mapped
            });
            assert!(before == after, "clusters of which something else is said");
            let disk = disk.crash();
            let third = disk.clone();
            Simulation::on(disk).block_on(async move {
                let file = sound(&third, &format!("{count} pieces of {unit} bytes")).await;
                let image = SimulatedImage::open(file, OpenOptions::writing()).await.expect("sound");
                assert!(mapped(&image, virtual_size).await == before, "not durable");
            });
        }
    }

    #[test]
    fn nothing_is_kept_of_what_the_file_has() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let disk = SimulatedEnvironment::new(30);
        Simulation::on(disk.clone()).block_on(async move {
            let image = create(&disk, &keeper, &CreateOptions::standalone(1 << 30), false).await;
            let unwritten = image.inner.unwritten.load_full().expect("it keeps what the file does not have");
            for slice in 0..2 {
                write(&image, slice << 29, 4096).await;
            }
            assert_eq!((slices_left(&image), unwritten.slots().is_used()), (2, true));
            image.flush().await.expect("sound");
            assert_eq!((slices_left(&image), unwritten.slots().is_used()), (0, false));
            image.freeze(async {}).await.expect("sound");
            assert!(image.inner.unwritten.load().is_none() && image.inner.header().kept_number() == 0);
            assert!(keeper.find(unwritten.number).expect("no error").is_none());
        });
    }

    #[test]
    fn who_writes_waits_for_room_to_keep_it() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let disk = SimulatedEnvironment::new(31);
        Simulation::on(disk.clone()).block_on(async move {
            // A slice is a table here, and covers 2 MiB of the disk.
            let options = CreateOptions { cluster_bits: 12, ..CreateOptions::standalone(8 << 30) };
            let image = create(&disk, &keeper, &options, false).await;
            let capacity = CAPACITY_BYTES / 4096;
            for slice in 0..capacity {
                write(&image, (slice as u64) << 21, 4096).await;
            }
            assert_eq!(slices_left(&image), capacity);
            write(&image, (capacity as u64) << 21, 4096).await;
            assert_eq!(slices_left(&image), 1);
        });
    }

    #[test]
    fn an_image_without_a_place_for_it_outlasts_the_process_once_all_is_written() {
        for version in [2, 3] {
            let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
            let disk = SimulatedEnvironment::new(32);
            Simulation::on(disk.clone()).block_on(async move {
                let image = create(&disk, &keeper, &CreateOptions { version, ..CreateOptions::standalone(1 << 20) }, false).await;
                let is_dirty = || !image.inner.dirty.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
                assert!(image.outlasts_process() && !is_dirty());
                write(&image, 0, 4096).await;
                assert_eq!((image.outlasts_process(), is_dirty()), (version == 3, true));
                image.outlast_process().await.expect("sound");
                assert_eq!((image.outlasts_process(), is_dirty()), (true, version == 3));
                // Not while a round has taken what it has not written yet.
                let in_round = image.inner.write_back_and(async |_| {
                    assert_eq!(image.outlasts_process(), version == 3);
                    Ok(())
                });
                in_round.await.expect("sound");
                assert!(image.outlasts_process());
                write(&image, 1 << 16, 4096).await;
                image.freeze(async {}).await.expect("sound");
                assert!(image.outlasts_process());
            });
        }
    }

    #[test]
    fn slots_are_promised_once() {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let unwritten = Unwritten::create(keeper, OWNER, CAPACITY_BYTES / 8 / 2).expect("room");
        let mut tickets: Vec<_> = (0..2).map(|_| promised(&unwritten)).collect();
        assert!(unwritten.step().is_none() && !unwritten.slots().is_used());
        drop(tickets.pop());
        let slot = unwritten.put(promised(&unwritten), key(0), &[]);
        assert!(matches!(unwritten.step(), Some(Step::WriteBack)));
        unwritten.release(slot);
        promised(&unwritten);
    }

    #[test]
    fn room_is_made_for_more_slots_until_there_is_none() {
        let keeper = Arc::new(TestKeeper::default());
        // One page for each slot and its header.
        let slice_words = 512 - SLOT_HEADER_WORDS;
        keeper.limit(Unwritten::words(slice_words, FIRST_SLOTS) - 1);
        Unwritten::create(Arc::clone(&keeper) as Arc<dyn MemoryKeeper>, OWNER, slice_words).expect_err("too little for the first");
        keeper.limit(Unwritten::words(slice_words, FIRST_SLOTS * 8));
        Simulation::on(SimulatedEnvironment::new(33)).block_on(async move {
            let unwritten = Unwritten::create(Arc::clone(&keeper) as Arc<dyn MemoryKeeper>, OWNER, slice_words).expect("room");
            let says = || unwritten.memory.words()[SLOTS].load(Ordering::Relaxed) as usize;
            let growth = || match unwritten.step() {
                Some(Step::Grow(growth)) => growth,
                other => panic!("it can grow: {other:?}"),
            };
            let mut sizes = vec![0];
            while unwritten.slots().there > sizes[sizes.len() - 1] {
                let there = says();
                for number in sizes[sizes.len() - 1]..there {
                    assert_eq!(unwritten.put(promised(&unwritten), key(0), &[number as u64]) as usize, number, "the lowest first");
                }
                sizes.push(there);
                let first = growth();
                assert!(unwritten.step().is_none(), "others wait");
                drop(first);
                assert!(growth().grow().now_or_never().is_none(), "given up in the midst of it, and others want it as well");
                growth().grow().await;
            }
            assert_eq!((sizes, says()), (vec![0, 32, 64, 128, 256], 256), "512 do not fit");
            assert!(matches!(unwritten.step(), Some(Step::WriteBack)), "it is not tried again at once");
            let found = Unwritten::left(&*unwritten.memory, slice_words).expect("made for it");
            assert!(found.iter().map(|slice| slice.words[0]).eq(0..256));
            (0..256).for_each(|slot| unwritten.release(slot));
            keeper.limit(usize::MAX);
            for _ in 0..256 {
                unwritten.put(promised(&unwritten), key(0), &[7]);
            }
            growth().grow().await;
            assert_eq!(says(), 512, "there is room again");
            unwritten.memory.words()[SLOTS].store(255, Ordering::Relaxed);
            let found = Unwritten::left(&*unwritten.memory, slice_words).expect("made for it");
            assert_eq!(found.len(), 255, "none that there is no room for");
        });
    }

    /// All slots are promised to some of them and none is used, so the others wait for what these do.
    #[test]
    fn writes_together_go_on_without_room_for_all_of_them() {
        let keeper = Arc::new(TestKeeper::default());
        let disk = SimulatedEnvironment::new(34);
        Simulation::on(disk.clone()).block_on(async move {
            let options = CreateOptions { cluster_bits: 12, ..CreateOptions::standalone(8 << 30) };
            let image = create(&disk, &(Arc::clone(&keeper) as Arc<dyn MemoryKeeper>), &options, false).await;
            keeper.limit(0);
            for round in 0..3 {
                join_all((0..FIRST_SLOTS as u64 * 2).map(|slice| write(&image, slice << 21 | round << 12, 4096))).await;
            }
            assert!(slices_left(&image) <= FIRST_SLOTS);
        });
    }
}

//! The record of what is in flight that outlives this process (vhost-user, "Inflight I/O tracking", split virtqueues).
//!
//! The front-end keeps a piece of shared memory while back-ends come and go. A queue marks each chain there when it takes it, and removes the
//! mark when the chain has been given back, so a back-end that finds the memory knows what one before it has left undone:
//!
//! ```text
//!  taken:       counter of the chain, then its mark
//!  given back:  for each of a batch: next = last batch head, last batch head = it
//!               used elements and the used index, in the ring
//!               the marks of the batch are removed, then the record's used index follows
//! ```
//!
//! A process may end between any two stores. Whatever is marked then has not been given back, but for the last batch if the record's used index
//! is not that of the ring; its members are found through the last batch head, and their number is the difference of the indices. As chains are
//! taken in order, used index plus marks is where taking goes on. Tested by ending after every single store, and again in what follows.
//!
//! The front-end can write here at any time, as it can to guest memory: each value is read once and checked.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};

use super::memory::{Area, SharedRegion};

/// Bytes before the descriptors' entries: features (8), version (2), entries (2), last batch head (2), used index (2).
const HEADER_BYTES: usize = 16;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
/// One descriptor's entry: mark (1), padding (5), next of the batch (2), counter (8).
const ENTRY_BYTES: usize = 16;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
/// The only version there is. Zero is memory that nobody has used yet.
const VERSION: u16 = 1;
/// Each queue's part begins at a multiple of this many bytes, as in QEMU's library.
const ALIGNMENT: usize = 64;

/// How `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD` describe the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    /// Bytes.
    pub bytes: u64,
    /// Where they begin in the file: a multiple of the page size.
    pub offset: u64,
    /// Number of virtqueues, each with a part of its own.
    pub queues: u16,
    /// Entries of each part: at least as many as the queue has descriptors.
    pub queue_size: u16,
}

/// Why the record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// More queues or larger ones than the device has, or none.
    #[error("record of requests in flight for {queues} queues of {queue_size}: the device has at most {max_queues} of {max_queue_size}")]
    Queues {
        /// Queues asked for.
        queues: u16,
        /// Their size.
        queue_size: u16,
        /// Queues of the device.
        max_queues: u16,
        /// The size of its largest.
        max_queue_size: u16,
    },
    /// Too small for what it should hold.
    #[error("record of requests in flight has {bytes} bytes, and {needed} are needed")]
    Size {
        /// What it has.
        bytes: u64,
        /// What its queues need.
        needed: u64,
    },
    /// It cannot be made, or is not in the file that was given.
    #[error("record of requests in flight cannot be mapped: {0}")]
    Map(#[from] io::Error),
}

impl InflightLayout {
    /// Bytes from one queue's part to the next.
    fn stride(self) -> usize {
        (HEADER_BYTES + usize::from(self.queue_size) * ENTRY_BYTES).next_multiple_of(ALIGNMENT)
    }

    fn needed(self) -> usize {
        usize::from(self.queues) * self.stride()
    }

    fn admit(self, max_queues: u16, max_queue_size: u16) -> Result<(), InflightError> {
        let Self { queues, queue_size, .. } = self;
        if (1..=max_queues).contains(&queues) && (1..=max_queue_size).contains(&queue_size) {
            return Ok(());
        }
        Err(InflightError::Queues { queues, queue_size, max_queues, max_queue_size })
    }
}

/// The record of all queues of a device.
#[derive(Debug)]
pub struct InflightLog {
    layout: InflightLayout,
    region: SharedRegion,
}

impl InflightLog {
    /// Makes an empty record, as a front-end asks for that has none yet, for at most `limits` (queues, queue size). Returns what to tell it.
    ///
    /// # Errors
    /// If the device has no such queues, or the system no memory.
    pub fn create(queues: u16, queue_size: u16, limits: (u16, u16)) -> Result<(InflightLayout, File), InflightError> {
        let mut layout = InflightLayout { bytes: 0, offset: 0, queues, queue_size };
        layout.admit(limits.0, limits.1)?;
        layout.bytes = layout.needed() as u64;
        let file = rustix::fs::memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&file, layout.bytes).map_err(io::Error::from)?;
        // Nobody can pull it away beneath us afterwards.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(io::Error::from)?;
        Ok((layout, file.into()))
    }

    /// The record that a front-end has kept.
    ///
    /// # Errors
    /// If it does not fit the device (`limits`: queues, queue size), itself, or the file.
    pub fn map(layout: InflightLayout, file: OwnedFd, limits: (u16, u16)) -> Result<Self, InflightError> {
        layout.admit(limits.0, limits.1)?;
        let needed = layout.needed();
        if layout.bytes < needed as u64 {
            return Err(InflightError::Size { bytes: layout.bytes, needed: needed as u64 });
        }
        Ok(Self { layout, region: SharedRegion::map(file.into(), layout.offset, needed)? })
    }

    /// The part of queue `index`, if it has one.
    pub fn queue(&self, index: u16) -> Option<InflightQueue> {
        if index >= self.layout.queues {
            return None;
        }
        let stride = self.layout.stride();
        let area = self.region.area(usize::from(index) * stride, stride)?;
        Some(InflightQueue { area, entries: self.layout.queue_size, counter: 0 })
    }
}

/// The record of one queue.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    area: Area,
    entries: u16,
    /// Of the next chain. Only the order counts, of what is in flight at one time.
    counter: u64,
}

impl InflightQueue {
    /// Largest size of a queue that fits in.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.entries, "heads are below the queue size, and that is not above the entries");
        HEADER_BYTES + usize::from(head) * ENTRY_BYTES
    }

    fn set_mark(&self, head: u16, mark: bool) {
        self.area.store_u8(self.entry(head), u8::from(mark), Ordering::Release);
    }

    /// Begins to keep the record of a queue of `size` whose used index is `used_index`: puts the last batch right. Returns the heads of chains
    /// that were taken and not given back, in the order in which they were taken, and whether there was a record at all.
    pub(super) fn recover(&mut self, size: u16, used_index: u16) -> (Vec<u16>, bool) {
        let has_past = self.area.load_u16(VERSION_AT, Ordering::Relaxed) == VERSION;
        if !has_past {
            self.forget(used_index);
            return (Vec::new(), false);
        }
        let batch = used_index.wrapping_sub(self.area.load_u16(USED_INDEX_AT, Ordering::Relaxed));
        // A batch never has more than the queue; a larger difference comes from a ring that has been set up anew, and whose marks are checked
        // by whoever asks.
        if batch != 0 && batch <= size {
            let mut head = self.area.load_u16(LAST_BATCH_HEAD_AT, Ordering::Relaxed);
            for _ in 0..batch {
                if head >= self.entries {
                    break;
                }
                self.set_mark(head, false);
                head = self.area.load_u16(self.entry(head) + NEXT_AT, Ordering::Relaxed);
            }
        }
        self.area.store_u16(USED_INDEX_AT, used_index, Ordering::Release);
        let mut marked: Vec<(u64, u16)> = (0..size.min(self.entries))
            .filter(|&head| self.area.load_u8(self.entry(head)) != 0)
            .map(|head| (self.area.load_u64(self.entry(head) + COUNTER_AT), head))
            .collect();
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        (marked.into_iter().map(|(_, head)| head).collect(), true)
    }

    /// Makes an empty record: nothing is in flight.
    pub(super) fn forget(&mut self, used_index: u16) {
        for head in 0..self.entries {
            self.set_mark(head, false);
        }
        self.counter = 0;
        self.area.store_u16(ENTRIES_AT, self.entries, Ordering::Relaxed);
        self.area.store_u16(USED_INDEX_AT, used_index, Ordering::Relaxed);
        // Whoever finds the version finds the rest.
        self.area.store_u16(VERSION_AT, VERSION, Ordering::Release);
    }

    /// A chain has been taken. Before anything is done about it.
    pub(super) fn taken(&mut self, head: u16) {
        self.area.store_u64(self.entry(head) + COUNTER_AT, self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.set_mark(head, true);
    }

    /// A chain is about to be given back. Before the used index covers it, with the others of its batch.
    pub(super) fn giving_back(&self, head: u16) {
        let last = self.area.load_u16(LAST_BATCH_HEAD_AT, Ordering::Relaxed);
        self.area.store_u16(self.entry(head) + NEXT_AT, last, Ordering::Relaxed);
        self.area.store_u16(LAST_BATCH_HEAD_AT, head, Ordering::Release);
    }

    /// The batch has been given back: the ring's used index is `used_index`.
    pub(super) fn given_back(&self, heads: impl Iterator<Item = u16>, used_index: u16) {
        heads.for_each(|head| self.set_mark(head, false));
        self.area.store_u16(USED_INDEX_AT, used_index, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::vring::driver::{Driver, writable};
    use crate::vring::memory::OBSERVER;
    use crate::vring::{Ring, RingFeatures, RingLayout, Used};

    const LIMITS: (u16, u16) = (4, 256);
    const SIZE: u16 = 8;
    const FEATURES: RingFeatures = RingFeatures { event_idx: true, indirect: true };

    /// What the other side still has when a process has ended: ring and record, and where the driver is.
    #[derive(Clone)]
    struct Left {
        rings: Vec<u8>,
        record: Vec<u8>,
        /// Chains that the driver has offered and not got back, by the used index.
        outstanding: Vec<u16>,
        available: u16,
    }

    /// A driver with a front-end that keeps the record.
    struct Outside {
        driver: Driver,
        layout: InflightLayout,
        file: File,
        /// Offered, and not seen in the used ring yet.
        offered: Vec<u16>,
        seen: u16,
    }

    /// A page with the three parts of the ring, and one with buffers.
    const RING: RingLayout = RingLayout { size: SIZE, descriptors: 0, available: 0x100, used: 0x200 };
    const RING_BYTES: usize = 0x300;
    const BUFFER: u64 = 0x1000;

    fn driver(index: u16) -> Driver {
        let mmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).expect("anonymous memory");
        Driver::over(std::sync::Arc::new(mmap), RING, index)
    }

    impl Outside {
        fn new(index: u16) -> Self {
            let (layout, file) = InflightLog::create(1, SIZE, LIMITS).expect("memory");
            Self { driver: driver(index), layout, file, offered: Vec::new(), seen: index }
        }

        fn restored(left: &Left) -> Self {
            let mut outside = Self::new(left.available);
            outside.driver.write(0, &left.rings);
            rustix::io::pwrite(&outside.file, &left.record, 0).expect("a file");
            outside.offered.clone_from(&left.outstanding);
            outside.seen = outside.driver.used_index();
            outside
        }

        fn ring(&self) -> Ring {
            let file = self.file.try_clone().expect("a descriptor").into();
            let record = InflightLog::map(self.layout, file, LIMITS).expect("a good record").queue(0);
            // What Cloud Hypervisor names as the base.
            let base = self.driver.load(self.driver.layout.available + 2);
            Ring::new(self.driver.memory(), self.driver.layout, FEATURES, base, record).expect("a good layout")
        }

        fn offer(&mut self) {
            let Some(head) = (0..SIZE).find(|head| !self.offered.contains(head)) else { return };
            self.driver.descriptor(self.driver.layout.descriptors, head, writable(BUFFER, 1), 0, 0);
            self.offered.push(head);
            self.driver.offer(head);
        }

        /// Looks at the used ring as the driver does: what is there must have been offered, and comes once.
        fn collect(&mut self) -> Result<(), TestCaseError> {
            while self.seen != self.driver.used_index() {
                let at = self.driver.layout.used + 4 + u64::from(self.seen % SIZE) * 8;
                let head = self.driver.load(at);
                let position = self.offered.iter().position(|&offered| offered == head);
                prop_assert!(position.is_some(), "chain {} comes back twice", head);
                self.offered.remove(position.expect("just checked"));
                self.seen = self.seen.wrapping_add(1);
            }
            Ok(())
        }
    }

    /// Memory as it is now.
    fn left(mmap: &GuestMemoryMmap, file: &File, layout: InflightLayout) -> Left {
        let mut rings = vec![0; RING_BYTES];
        mmap.read_slice(&mut rings, GuestAddress(0)).expect("guest memory");
        let mut record = vec![0; layout.bytes as usize];
        rustix::io::pread(file, &mut record, 0).expect("a file");
        let available = u16::from_le(mmap.read_obj(GuestAddress(RING.available + 2)).expect("guest memory"));
        Left { rings, record, outstanding: Vec::new(), available }
    }

    /// Runs `work` and keeps what is left after each store of the device, from the first on.
    fn each_end(outside: &mut Outside, work: impl FnOnce(&mut Outside) -> Result<(), TestCaseError>) -> Result<Vec<Left>, TestCaseError> {
        let ends = Rc::new(RefCell::new(Vec::new()));
        let (mmap, file) = (std::sync::Arc::clone(&outside.driver.mmap), outside.file.try_clone().expect("a descriptor"));
        let layout = outside.layout;
        let into = Rc::clone(&ends);
        OBSERVER.set(Some(Box::new(move || into.borrow_mut().push(left(&mmap, &file, layout)))));
        let outcome = work(outside);
        OBSERVER.set(None);
        outcome?;
        Ok(ends.take())
    }

    /// What the driver misses in a state: all it has offered but what the used ring shows.
    fn miss(before: &[u16], seen: u16, left: &mut Left) {
        let at = |offset: u64| (RING.used + offset) as usize;
        let word = |offset: u64| u16::from_le_bytes([left.rings[at(offset)], left.rings[at(offset) + 1]]);
        let mut missed = before.to_vec();
        let mut index = seen;
        while index != word(2) {
            let head = word(4 + u64::from(index % SIZE) * 8);
            missed.retain(|&offered| offered != head);
            index = index.wrapping_add(1);
        }
        left.outstanding = missed;
    }

    /// Serves everything from `left` on, and checks that each chain comes back once. Returns what would be left after each store on the way.
    fn resume(left: &Left, batch: usize) -> Result<Vec<Left>, TestCaseError> {
        let mut outside = Outside::restored(left);
        let (before, seen) = (outside.offered.clone(), outside.seen);
        let mut ends = each_end(&mut outside, |outside| {
            let mut ring = outside.ring();
            let mut taken = Vec::new();
            while ring.waiting().expect("not broken") > 0 {
                taken.push(ring.take().expect("not broken").expect("one waits").head);
            }
            // Last come, first served.
            taken.reverse();
            for heads in taken.chunks(batch) {
                let used: Vec<Used> = heads.iter().map(|&head| Used { head, written: 1 }).collect();
                let _ = ring.publish(&used);
            }
            Ok(())
        })?;
        outside.collect()?;
        prop_assert!(outside.offered.is_empty(), "chains {:?} do not come back", outside.offered);
        ends.iter_mut().for_each(|end| miss(&before, seen, end));
        Ok(ends)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The process ends after any store, and the next one again after any of its own; also across the wrap of the indices.
        #[test]
        fn every_chain_comes_back_once_whenever_the_process_ends(
            start in prop_oneof![Just(0_u16), 65_530..=65_535_u16],
            steps in prop::collection::vec((0..4_usize, 0..4_usize, 1..4_usize), 1..12),
            pick in any::<u64>(),
        ) {
            let mut outside = Outside::new(start);
            let mut ring = outside.ring();
            let mut taken = Vec::new();
            let mut all = Vec::new();
            for (offers, takes, gives) in steps {
                (0..offers).for_each(|_| outside.offer());
                let (before, seen) = (outside.offered.clone(), outside.seen);
                let mut ends = each_end(&mut outside, |_| {
                    ring.waiting().expect("not broken");
                    for _ in 0..takes {
                        taken.extend(ring.take().expect("not broken").map(|chain| chain.head));
                    }
                    let mut used = Vec::new();
                    for _ in 0..gives.min(taken.len()) {
                        let head = taken.remove((pick % taken.len() as u64) as usize);
                        used.push(Used { head, written: 1 });
                    }
                    let _ = ring.publish(&used);
                    Ok(())
                })?;
                ends.iter_mut().for_each(|end| miss(&before, seen, end));
                all.append(&mut ends);
                outside.collect()?;
            }
            for (number, end) in all.iter().enumerate() {
                let again = resume(end, 1 + number % 3)?;
                // Each of these is a second end; a third follows from one of them.
                for end in &again {
                    resume(end, 8)?;
                }
            }
        }
    }

    #[test]
    fn a_record_of_another_ring_is_forgotten() {
        let mut outside = Outside::new(0);
        let mut ring = outside.ring();
        (0..3).for_each(|_| outside.offer());
        ring.waiting().expect("not broken");
        while ring.take().expect("not broken").is_some() {}
        // The guest has been reset while no daemon was there, and has set up its queue anew.
        let mut outside = Outside { driver: driver(0), offered: Vec::new(), ..outside };
        outside.offer();
        let mut ring = outside.ring();
        assert_eq!((ring.left_over(), ring.waiting()), (0, Ok(1)));
    }

    #[test]
    fn a_new_record_is_sealed_and_empty_and_has_a_part_for_each_queue() {
        let (layout, file) = InflightLog::create(3, 128, LIMITS).expect("memory");
        assert_eq!((layout.bytes, layout.offset, layout.queues, layout.queue_size), (3 * 2112, 0, 3, 128), "as QEMU's library lays it out");
        for other in [0, layout.bytes + 4096] {
            assert!(rustix::fs::ftruncate(&file, other).is_err(), "nobody can make it shorter or longer");
        }
        assert!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).is_err(), "nor seal it against the daemon");
        let log = InflightLog::map(layout, file.into(), LIMITS).expect("what was just made");
        assert!(log.queue(3).is_none());
        for index in 0..3 {
            let mut queue = log.queue(index).expect("one of three");
            assert_eq!(queue.recover(128, 7), (vec![], false));
            queue.taken(127);
            queue.taken(5);
            queue.taken(0);
        }
        for index in 0..3 {
            assert_eq!(log.queue(index).expect("one of three").recover(128, 7), (vec![127, 5, 0], true));
        }
    }

    #[test]
    fn only_as_many_chains_as_the_ring_has_were_given_back_in_one_batch() {
        let (layout, file) = InflightLog::create(1, 8, LIMITS).expect("memory");
        let log = InflightLog::map(layout, file.into(), LIMITS).expect("just made");
        for (used_index, left) in [(8, vec![]), (9, vec![0, 1])] {
            let mut queue = log.queue(0).expect("the only one");
            queue.forget(0);
            for head in 0..2 {
                queue.taken(head);
                queue.giving_back(head);
            }
            assert_eq!(queue.recover(8, used_index), (left, true), "a used index of {used_index}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (queues, size) in [(0, 128), (5, 128), (1, 0), (1, 257)] {
            assert!(matches!(InflightLog::create(queues, size, LIMITS), Err(InflightError::Queues { .. })));
        }
        let (layout, file) = InflightLog::create(2, 128, LIMITS).expect("memory");
        let map = |layout| InflightLog::map(layout, file.try_clone().expect("a descriptor").into(), LIMITS);
        assert!(map(layout).is_ok());
        assert!(matches!(map(InflightLayout { bytes: layout.bytes - 1, ..layout }), Err(InflightError::Size { .. })));
        assert!(matches!(map(InflightLayout { queues: 3, ..layout }), Err(InflightError::Size { .. })));
        for refused in [
            InflightLayout { offset: 1, ..layout },
            InflightLayout { offset: 1 << 20, ..layout },
            InflightLayout { offset: u64::MAX - 4095, ..layout },
            InflightLayout { bytes: 1 << 30, queues: 4, queue_size: 256, ..layout },
        ] {
            assert!(matches!(map(refused), Err(InflightError::Map(_))), "{refused:?}");
        }
    }

    #[test]
    fn a_record_full_of_nonsense_is_survived() {
        let (layout, file) = InflightLog::create(1, 16, LIMITS).expect("memory");
        let log = InflightLog::map(layout, file.try_clone().expect("a descriptor").into(), LIMITS).expect("just made");
        let mut bytes = vec![0xff; layout.bytes as usize];
        bytes[VERSION_AT..VERSION_AT + 2].copy_from_slice(&VERSION.to_ne_bytes());
        rustix::io::pwrite(&file, &bytes, 0).expect("a file");
        let mut queue = log.queue(0).expect("the only one");
        let (heads, has_past) = queue.recover(16, 3);
        assert!(has_past && heads.len() == 16);
        // A loop in the last batch.
        bytes[LAST_BATCH_HEAD_AT..LAST_BATCH_HEAD_AT + 4].fill(0);
        bytes[HEADER_BYTES + NEXT_AT..][..2].fill(0);
        rustix::io::pwrite(&file, &bytes, 0).expect("a file");
        assert_eq!(queue.recover(16, 16).0.len(), 15);
        queue.taken(0);
    }
}

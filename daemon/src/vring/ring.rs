//! One split virtqueue (VIRTIO 1.3, 2.7).
//!
//! The areas are resolved to checked addresses once per memory table. Available indices are read once per batch, used elements are published
//! together with one release store and one decision about the interrupt.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use snapfence_image_format::buffer::SharedVectors;

use super::inflight::InflightQueue;
use super::memory::{Area, Gather, GuestMemory};

/// Most data buffers of one request: what one vectored system call takes (`IOV_MAX`).
pub const MAX_SEGMENTS: usize = 1024;

/// Most buffers of one chain in an indirect table: the data, the header and the status byte. Drivers size indirect tables by `seg_max`, not
/// by the queue size, whatever 2.7.5.3.1 says; without a table the queue size limits the chain.
const MAX_INDIRECT_BUFFERS: usize = MAX_SEGMENTS + 2;

/// Most bytes one way in one chain, the header and the status byte included. Drivers ask for some MiB at most; filling or copying more would take
/// the time of all queues on the thread.
const MAX_CHAIN_BYTES: u64 = (64 << 20) + 4096;

const DESCRIPTOR_BYTES: usize = 16;
const USED_ELEMENT_BYTES: usize = 8;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
/// Where both rings have their flags, their index, and their first element.
const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const ELEMENTS_AT: usize = 4;
/// In the available ring: the driver wants no interrupts. In the used ring: the device wants no kicks. Both without the event index only.
const FLAG_NO_NOTIFICATION: u16 = 1;

/// Where the front-end has put a ring, in guest addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors: a power of two, at most 32768.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
}

/// What the driver has negotiated about its rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`: notifications are suppressed by index, not by flag.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`: descriptors may refer to tables.
    pub indirect: bool,
}

/// Why a ring cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is no power of two.
    #[error("queue size {0} is not a power of two of at most 32768")]
    Size(u16),
    /// A part is not where it can be used.
    #[error("the {part} at guest address {address:#x} is misaligned or not within one region of guest memory")]
    Area {
        /// Which part.
        part: &'static str,
        /// Where it should be.
        address: u64,
    },
    /// The front-end keeps a record of what is in flight, but not of so much.
    #[error("queue size {size} is above the {entries} entries of the record of requests in flight")]
    Record {
        /// Queue size.
        size: u16,
        /// What there is room for.
        entries: u16,
    },
}

/// What a driver can do to make its whole ring senseless. Nothing is taken from it any more until the front-end restarts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The driver claims more chains than the ring has room for.
    #[error("available index went from {taken} to {index} in a ring of {size}")]
    AvailableIndex {
        /// Taken up to here.
        taken: u16,
        /// What the driver says.
        index: u16,
        /// Queue size.
        size: u16,
    },
    /// A chain that starts nowhere cannot even be given back.
    #[error("head {head} is outside the descriptor table of {size}")]
    Head {
        /// Where the chain should start.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// The front-end has made a file of the guest's memory shorter.
    #[error("guest memory was taken away")]
    MemoryLost,
}

/// What is wrong with one chain: why its end was not reached or, if it was, the first thing found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// More descriptors than there can be: above all a loop.
    #[error("chain is longer than {0} descriptors, or a loop")]
    TooLong(usize),
    /// A descriptor that does not exist comes next.
    #[error("next descriptor {next} is outside the table of {entries}")]
    Next {
        /// Its number.
        next: u16,
        /// Descriptors in the table.
        entries: usize,
    },
    /// An indirect descriptor inside an indirect table, with a next one, or without the feature.
    #[error("indirect descriptor {0}")]
    Indirect(&'static str),
    /// An indirect table of no or of half descriptors, or more than can be numbered.
    #[error("indirect table of {0} bytes")]
    TableLength(u32),
    /// An indirect table outside guest memory.
    #[error("indirect table at guest address {0:#x} is not guest memory")]
    Table(u64),
    /// Buffers of no bytes are not allowed.
    #[error("buffer of zero length")]
    Empty,
    /// Buffers for the device to read come before those to write.
    #[error("device-readable buffer after a device-writable one")]
    Order,
    /// A buffer that is not (all) guest memory.
    #[error("buffer at guest address {address:#x} of {len} bytes is not guest memory")]
    Buffer {
        /// Where it should be.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// More bytes than a request can have.
    #[error("more than {MAX_CHAIN_BYTES} bytes in one direction")]
    Bytes,
}

/// A descriptor chain, read and checked. Must be given back as [`Used`], whatever is in it.
#[derive(Debug)]
pub struct Chain {
    /// What names the chain.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: SharedVectors,
    /// Where the device may answer. Empty also where the end of the chain could not be made out.
    pub writable: SharedVectors,
    /// What is wrong with it.
    pub fault: Option<ChainFault>,
}

impl Chain {
    /// Bytes of its buffers, both ways.
    pub fn bytes(&self) -> u64 {
        // Each is limited by what a chain may have.
        (self.readable.len() + self.writable.len()) as u64
    }
}

/// A chain on its way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub head: u16,
    /// Bytes written from the start of its writable part on.
    pub written: u32,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        // Truncation cuts out the fields: 64 bits of address, 32 of length, 16 of flags, 16 of next.
        Self { address: bits as u64, len: (bits >> 64) as u32, flags: (bits >> 96) as u16, next: (bits >> 112) as u16 }
    }
}

/// What the driver has been told about kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kicks {
    /// Whatever guest memory says.
    Unknown,
    /// To kick for a chain at this index (0 without the event index: for any).
    Wanted(u16),
    /// Not to kick (without the event index only).
    Unwanted,
}

/// The device side of one running virtqueue.
#[derive(Debug)]
pub struct Ring {
    layout: RingLayout,
    features: RingFeatures,
    memory: GuestMemory,
    descriptors: Area,
    available: Area,
    used: Area,
    /// Taken up to here.
    next_avail: u16,
    /// The driver's index when it was last read.
    seen_avail: u16,
    /// Given back up to here.
    next_used: u16,
    /// The front-end's record of what is in flight, if it keeps one.
    record: Option<InflightQueue>,
    /// Chains that an earlier process has taken and not given back, to be taken first.
    left_over: VecDeque<u16>,
    /// Heads of the chains that have been taken and not given back, a bit each.
    outstanding: Box<[u64]>,
    /// Whether chains may have been given back before, by whoever had the ring, without an interrupt.
    has_past: bool,
    kicks: Kicks,
    /// Whether an interrupt decision has been made before, from which the next one counts.
    decided: bool,
}

impl Ring {
    /// Sets up the ring at `layout`. What it goes on from is in memory:
    ///
    /// - With a `record` of what is in flight, that names the chains which an earlier process has left undone. They are taken first, and after
    ///   them what follows their number and that of the chains which were given back.
    /// - Without one, or with one that does not fit the ring, chains are taken from where they have been given back: our rings stop only with
    ///   nothing in flight, so both indices are the same then.
    ///
    /// `base` is what the front-end thinks, and counts if neither makes sense: Cloud Hypervisor names the driver's index when it connects again,
    /// and so would lose all chains that nobody has taken yet.
    ///
    /// # Errors
    /// If the size makes no sense, a part is not in guest memory, or the record is too small.
    pub fn new(
        memory: GuestMemory,
        layout: RingLayout,
        features: RingFeatures,
        base: u16,
        mut record: Option<InflightQueue>,
    ) -> Result<Self, RingError> {
        let (descriptors, available, used) = Self::areas(&memory, layout, features)?;
        let next_used = used.load_u16(INDEX_AT, Ordering::Relaxed);
        let waiting = available.load_u16(INDEX_AT, Ordering::Relaxed).wrapping_sub(next_used);
        let mut has_past = next_used != 0;
        let mut left_over = VecDeque::new();
        if let Some(record) = &mut record {
            if record.entries() < layout.size {
                return Err(RingError::Record { size: layout.size, entries: record.entries() });
            }
            let (heads, is_kept) = record.recover(layout.size, next_used);
            has_past |= is_kept;
            if heads.len() <= usize::from(waiting.min(layout.size)) {
                left_over = heads.into();
            } else {
                // More in flight than the driver has made available: the record of another ring, set up anew since.
                record.forget(next_used);
            }
        }
        // At most the queue size.
        let taken = left_over.len() as u16;
        let next_avail = if waiting <= layout.size { next_used.wrapping_add(taken) } else { base };
        let mut ring = Self {
            layout,
            features,
            memory,
            descriptors,
            available,
            used,
            next_avail,
            seen_avail: next_avail,
            next_used,
            record,
            left_over,
            outstanding: vec![0; usize::from(layout.size).div_ceil(64)].into(),
            has_past,
            kicks: Kicks::Unknown,
            decided: false,
        };
        ring.suppress_kicks();
        Ok(ring)
    }

    fn areas(memory: &GuestMemory, layout: RingLayout, features: RingFeatures) -> Result<(Area, Area, Area), RingError> {
        if !layout.size.is_power_of_two() {
            return Err(RingError::Size(layout.size));
        }
        let size = usize::from(layout.size);
        let event_bytes = if features.event_idx { 2 } else { 0 };
        let area = |part, address, len, alignment| memory.area(address, len, alignment).ok_or(RingError::Area { part, address });
        Ok((
            area("descriptor table", layout.descriptors, size * DESCRIPTOR_BYTES, 16)?,
            area("available ring", layout.available, ELEMENTS_AT + size * 2 + event_bytes, 2)?,
            area("used ring", layout.used, ELEMENTS_AT + size * USED_ELEMENT_BYTES + event_bytes, 4)?,
        ))
    }

    /// Goes over to another memory table, in which the ring has the same addresses. Chains taken before keep the memory that they have.
    ///
    /// # Errors
    /// If the ring is not in it.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), RingError> {
        (self.descriptors, self.available, self.used) = Self::areas(&memory, self.layout, self.features)?;
        self.memory = memory;
        self.kicks = Kicks::Unknown;
        Ok(())
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Where the ring is.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The index from which on nothing has been taken.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The index up to which chains have been given back.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Whether the driver may have missed an interrupt for chains that were given back before this ring was set up.
    pub fn has_past(&self) -> bool {
        self.has_past
    }

    /// Chains that an earlier process has left undone and that have not been taken again yet.
    pub fn left_over(&self) -> usize {
        self.left_over.len()
    }

    /// Whether a front-end keeps a record of what is in flight.
    pub fn has_record(&self) -> bool {
        self.record.is_some()
    }

    fn set_outstanding(&mut self, head: u16, outstanding: bool) {
        let (word, bit) = (&mut self.outstanding[usize::from(head) / 64], 1 << (head % 64));
        *word = if outstanding { *word | bit } else { *word & !bit };
    }

    /// Chains that have been taken and not given back, read anew.
    pub fn outstanding(&self) -> impl Iterator<Item = Chain> {
        let is_outstanding = |head: &u16| self.outstanding[usize::from(*head) / 64] >> (head % 64) & 1 != 0;
        (0..self.layout.size).filter(is_outstanding).map(|head| self.read_chain(head))
    }

    /// Reads how many chains wait to be taken, those included that were left over.
    ///
    /// # Errors
    /// If there cannot be so many.
    pub fn waiting(&mut self) -> Result<u16, Broken> {
        let index = self.available.load_u16(INDEX_AT, Ordering::Acquire);
        // After the look, which may be what has found out.
        if self.memory.is_lost() {
            return Err(Broken::MemoryLost);
        }
        let waiting = index.wrapping_sub(self.next_avail);
        if waiting > self.layout.size {
            return Err(Broken::AvailableIndex { taken: self.next_avail, index, size: self.layout.size });
        }
        self.seen_avail = index;
        // Both are at most the queue size, which is at most 32768.
        Ok(waiting.saturating_add(self.left_over.len() as u16))
    }

    /// Chains that [`waiting`](Self::waiting) has seen and nobody has taken, but for those that were left over.
    pub fn left_to_take(&self) -> u16 {
        self.seen_avail.wrapping_sub(self.next_avail)
    }

    /// Takes the next of the chains that [`waiting`](Self::waiting) has seen; the driver's index is not read again.
    ///
    /// # Errors
    /// If it starts outside the table.
    pub fn take(&mut self) -> Result<Option<Chain>, Broken> {
        if let Some(head) = self.left_over.pop_front() {
            // It is marked already.
            self.set_outstanding(head, true);
            return Ok(Some(self.read_chain(head)));
        }
        if self.next_avail == self.seen_avail {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & (self.layout.size - 1));
        let head = self.available.load_u16(ELEMENTS_AT + slot * 2, Ordering::Relaxed);
        if head >= self.layout.size {
            return Err(Broken::Head { head, size: self.layout.size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(record) = &mut self.record {
            record.taken(head);
        }
        self.set_outstanding(head, true);
        Ok(Some(self.read_chain(head)))
    }

    fn read_chain(&self, head: u16) -> Chain {
        let mut walk = Walk { readable: self.memory.gather(), writable: self.memory.gather(), answerable: false, fault: None };
        let ended = self.walk(head, &mut walk);
        let answerable = ended.is_ok() && walk.answerable;
        let writable = if answerable { walk.writable.finish() } else { self.memory.gather().finish() };
        Chain { head, readable: walk.readable.finish(), writable, fault: ended.err().or(walk.fault) }
    }

    /// Visits all descriptors of a chain. An error means that its end was not reached.
    fn walk(&self, head: u16, walk: &mut Walk<'_>) -> Result<(), ChainFault> {
        let size = usize::from(self.layout.size);
        let mut index = head;
        for _ in 0..size {
            let descriptor = Descriptor::parse(self.descriptors.copy_out(usize::from(index) * DESCRIPTOR_BYTES));
            if descriptor.flags & FLAG_INDIRECT != 0 {
                return self.walk_table(descriptor, walk);
            }
            walk.visit(descriptor);
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(());
            }
            if usize::from(descriptor.next) >= size {
                return Err(ChainFault::Next { next: descriptor.next, entries: size });
            }
            index = descriptor.next;
        }
        Err(ChainFault::TooLong(size))
    }

    fn walk_table(&self, table: Descriptor, walk: &mut Walk<'_>) -> Result<(), ChainFault> {
        if !self.features.indirect {
            return Err(ChainFault::Indirect("without the feature"));
        }
        if table.flags & FLAG_NEXT != 0 {
            return Err(ChainFault::Indirect("with a next one"));
        }
        let bytes = usize::try_from(table.len).map_err(|_| ChainFault::TableLength(table.len))?;
        let entries = bytes / DESCRIPTOR_BYTES;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) || entries > usize::from(u16::MAX) + 1 {
            return Err(ChainFault::TableLength(table.len));
        }
        let mut index = 0_u16;
        let run = self.memory.run(table.address, bytes);
        for _ in 0..entries.min(MAX_INDIRECT_BUFFERS) {
            let bytes = match &run {
                Some(run) => run.copy_out(usize::from(index) * DESCRIPTOR_BYTES),
                // A table of which only a part is guest memory, or that lies in two regions: what is used of it may be sound.
                None => {
                    let address = table.address.checked_add(u64::from(index) * DESCRIPTOR_BYTES as u64);
                    address.and_then(|address| self.memory.copy_out(address)).ok_or(ChainFault::Table(table.address))?
                }
            };
            let descriptor = Descriptor::parse(bytes);
            if descriptor.flags & FLAG_INDIRECT != 0 {
                return Err(ChainFault::Indirect("inside an indirect table"));
            }
            walk.visit(descriptor);
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(());
            }
            if usize::from(descriptor.next) >= entries {
                return Err(ChainFault::Next { next: descriptor.next, entries });
            }
            index = descriptor.next;
        }
        Err(ChainFault::TooLong(entries.min(MAX_INDIRECT_BUFFERS)))
    }

    /// Gives chains back, in this order, all visible at once. Returns whether the driver wants an interrupt.
    #[must_use = "a driver that waits for the interrupt would wait for ever"]
    pub fn publish(&mut self, chains: &[Used]) -> bool {
        if chains.is_empty() {
            return false;
        }
        let before = self.next_used;
        for chain in chains {
            let slot = usize::from(self.next_used & (self.layout.size - 1));
            let at = ELEMENTS_AT + slot * USED_ELEMENT_BYTES;
            self.used.store_u32(at, u32::from(chain.head));
            self.used.store_u32(at + 4, chain.written);
            if let Some(record) = &self.record {
                record.giving_back(chain.head);
            }
            self.set_outstanding(chain.head, false);
            self.next_used = self.next_used.wrapping_add(1);
        }
        self.used.store_u16(INDEX_AT, self.next_used, Ordering::Release);
        if let Some(record) = &self.record {
            record.given_back(chains.iter().map(|chain| chain.head), self.next_used);
        }
        // The index must be visible before the driver's wish is read: the driver writes its wish first and then looks at the index.
        fence(Ordering::SeqCst);
        let first = !std::mem::replace(&mut self.decided, true);
        if self.features.event_idx {
            let event = self.available.load_u16(ELEMENTS_AT + usize::from(self.layout.size) * 2, Ordering::Relaxed);
            // 2.7.7.2: the index `event` is among those that have just become visible. The first time, what the driver asked for may be
            // about a time before this ring ran.
            first || self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before)
        } else {
            self.available.load_u16(FLAGS_AT, Ordering::Relaxed) & FLAG_NO_NOTIFICATION == 0
        }
    }

    /// Asks the driver to kick when it adds a chain, and then looks again. `true`: a chain has come before the driver could know.
    ///
    /// # Errors
    /// As for [`waiting`](Self::waiting).
    pub fn ask_for_kick(&mut self) -> Result<bool, Broken> {
        let wanted = if self.features.event_idx { self.next_avail } else { 0 };
        if self.kicks != Kicks::Wanted(wanted) {
            if self.features.event_idx {
                let event = ELEMENTS_AT + usize::from(self.layout.size) * USED_ELEMENT_BYTES;
                self.used.store_u16(event, wanted, Ordering::Relaxed);
            } else {
                self.used.store_u16(FLAGS_AT, 0, Ordering::Relaxed);
            }
            self.kicks = Kicks::Wanted(wanted);
            // The wish must be visible before the index is read: the driver writes its index first and then looks for the wish.
            fence(Ordering::SeqCst);
        }
        Ok(self.waiting()? > 0)
    }

    /// Tells the driver that kicks are not needed while the ring is being looked at anyway. A hint: the driver may kick nevertheless.
    pub fn suppress_kicks(&mut self) {
        // With the event index the old wish, for an index that has passed, does it by itself.
        if !self.features.event_idx && self.kicks != Kicks::Unwanted {
            self.used.store_u16(FLAGS_AT, FLAG_NO_NOTIFICATION, Ordering::Relaxed);
            self.kicks = Kicks::Unwanted;
        }
    }
}

struct Walk<'m> {
    readable: Gather<'m>,
    writable: Gather<'m>,
    /// Whether the last writable buffer is guest memory: its last byte is where the status goes.
    answerable: bool,
    fault: Option<ChainFault>,
}

impl Walk<'_> {
    fn note(&mut self, fault: ChainFault) {
        self.fault.get_or_insert(fault);
    }

    fn visit(&mut self, descriptor: Descriptor) {
        let writable = descriptor.flags & FLAG_WRITE != 0;
        if descriptor.len == 0 {
            self.note(ChainFault::Empty);
            return;
        }
        if !writable && !self.writable.is_empty() {
            self.note(ChainFault::Order);
        }
        let side = if writable { &mut self.writable } else { &mut self.readable };
        // Too many bytes are a fault of the chain, but the place of the status byte is still wanted: it is all that is kept.
        if side.len() + u64::from(descriptor.len) > MAX_CHAIN_BYTES {
            *side = side.emptied();
            self.fault.get_or_insert(ChainFault::Bytes);
        }
        let mapped = side.push(descriptor.address, descriptor.len);
        if writable {
            self.answerable = mapped;
        }
        if !mapped {
            self.note(ChainFault::Buffer { address: descriptor.address, len: descriptor.len });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::vring::driver::{DATA, Driver, INDIRECT, MEMORY_BYTES, NEXT, Piece, WRITE, readable, writable};

    const FLAGS: RingFeatures = RingFeatures { event_idx: false, indirect: true };
    const EVENTS: RingFeatures = RingFeatures { event_idx: true, indirect: true };

    fn used(head: u16) -> Used {
        Used { head, written: u32::from(head) + 1 }
    }

    /// The buffers of a chain as guest addresses.
    fn pieces(driver: &Driver, chain: &Chain) -> Vec<Piece> {
        let base = driver.mmap.get_host_address(GuestAddress(0)).expect("memory starts at 0") as u64;
        let side = |vectors: &SharedVectors, writable| -> Vec<Piece> {
            let piece = |v: &libc::iovec| Piece { address: v.iov_base as u64 - base, len: v.iov_len as u32, writable };
            vectors.vectors().iter().map(piece).collect()
        };
        [side(&chain.readable, false), side(&chain.writable, true)].concat()
    }

    fn take_all(ring: &mut Ring) -> Vec<Chain> {
        ring.waiting().expect("not broken");
        std::iter::from_fn(|| ring.take().expect("not broken")).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add { readable: usize, writable: usize, indirect: bool },
        Take(usize),
        Give(usize),
        WantInterrupt(u16),
        AskForKick,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..4_usize, 1..4_usize, any::<bool>())
                .prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
            3 => (1..4_usize).prop_map(Step::Take),
            3 => (1..4_usize).prop_map(Step::Give),
            1 => (0..4_u16).prop_map(Step::WantInterrupt),
            1 => Just(Step::AskForKick),
        ]
    }

    proptest! {
        /// Two drivers do the same; one has our ring on the other side, one that of crate virtio-queue. All that drivers and devices see of one
        /// another is the same, across the wrap of the indices.
        #[test]
        fn agrees_with_virtio_queue(start in prop_oneof![Just(0_u16), 65_500..=65_535_u16], steps in prop::collection::vec(step(), 1..200)) {
            let size = 16;
            let (mut ours, mut theirs) = (Driver::new(size, start), Driver::new(size, start));
            let mut ring = ours.ring(EVENTS);
            let mut queue = Queue::new(size).expect("a good size");
            queue.set_size(size);
            queue.try_set_desc_table_address(GuestAddress(theirs.layout.descriptors)).expect("aligned");
            queue.try_set_avail_ring_address(GuestAddress(theirs.layout.available)).expect("aligned");
            queue.try_set_used_ring_address(GuestAddress(theirs.layout.used)).expect("aligned");
            queue.set_next_avail(start);
            queue.set_next_used(start);
            queue.set_event_idx(true);
            queue.set_ready(true);
            let mut held = Vec::new();
            let mut given = false;
            let mut address = DATA;
            for step in steps {
                match step {
                    // At most three direct descriptors per chain, so that a ring of 16 descriptors cannot reuse one that is out.
                    Step::Add { readable: r, writable: w, indirect } if ours.outstanding() < 3 => {
                        let mut chain = Vec::new();
                        for index in 0..r + w {
                            let len = 512 + index as u32;
                            chain.push(Piece { address, len, writable: index >= r });
                            address += 0x1000;
                        }
                        if indirect {
                            ours.add_indirect(address, &chain);
                            theirs.add_indirect(address, &chain);
                            address += 0x1000;
                        } else {
                            chain.truncate(5);
                            ours.add(&chain);
                            theirs.add(&chain);
                        }
                        if address > MEMORY_BYTES as u64 - 0x1_0000 {
                            address = DATA;
                        }
                    }
                    Step::Add { .. } => {}
                    Step::Take(count) => {
                        ring.waiting().expect("not broken");
                        for _ in 0..count {
                            let chain = ring.take().expect("not broken");
                            let reference = queue.pop_descriptor_chain(&*theirs.mmap);
                            prop_assert_eq!(chain.as_ref().map(|chain| chain.head), reference.as_ref().map(|chain| chain.head_index()));
                            let (Some(chain), Some(reference)) = (chain, reference) else { break };
                            prop_assert_eq!(chain.fault, None);
                            let expected: Vec<Piece> = reference
                                .map(|d| Piece { address: d.addr().0, len: d.len(), writable: d.is_write_only() })
                                .collect();
                            prop_assert_eq!(pieces(&ours, &chain), expected);
                            held.push(chain.head);
                        }
                        prop_assert_eq!(ring.next_avail(), queue.next_avail());
                    }
                    Step::Give(count) if !held.is_empty() => {
                        // Newest first: completions need not be in order.
                        let batch: Vec<Used> = held.split_off(held.len().saturating_sub(count)).into_iter().rev().map(used).collect();
                        for chain in &batch {
                            queue.add_used(&*theirs.mmap, chain.head, chain.written).expect("a good head");
                        }
                        let wanted = queue.needs_notification(&*theirs.mmap).expect("a good ring");
                        // virtio-queue trusts what the driver asked of an earlier device.
                        let first = !std::mem::replace(&mut given, true);
                        prop_assert_eq!(ring.publish(&batch), wanted || first);
                        prop_assert_eq!(ours.completed(), batch.clone());
                        prop_assert_eq!(theirs.completed(), batch);
                    }
                    Step::Give(_) => {}
                    Step::WantInterrupt(ahead) => {
                        let at = ours.load(ours.layout.used + 2).wrapping_add(ahead);
                        ours.want_interrupt_at(at);
                        theirs.want_interrupt_at(at);
                    }
                    Step::AskForKick => {
                        let expected = queue.enable_notification(&*theirs.mmap).expect("a good ring");
                        prop_assert_eq!(ring.ask_for_kick().expect("not broken"), expected);
                        prop_assert_eq!(ours.kick_wanted_at(), theirs.kick_wanted_at());
                    }
                }
            }
        }
    }

    #[test]
    fn without_event_index_the_flags_are_honoured_both_ways() {
        let mut driver = Driver::new(8, 0);
        let mut ring = driver.ring(FLAGS);
        assert!(!driver.kicks_wanted(), "while the ring is being looked at");
        assert!(!ring.ask_for_kick().expect("not broken"));
        assert!(driver.kicks_wanted());
        let head = driver.add(&[readable(DATA, 16), writable(DATA, 1)]);
        assert!(ring.ask_for_kick().expect("not broken"), "it came meanwhile");
        ring.suppress_kicks();
        assert!(!driver.kicks_wanted());
        assert_eq!(take_all(&mut ring).len(), 1);
        driver.want_interrupts(false);
        assert!(!ring.publish(&[used(head)]));
        driver.want_interrupts(true);
        let head = driver.add(&[readable(DATA, 16), writable(DATA, 1)]);
        take_all(&mut ring);
        assert!(ring.publish(&[used(head)]));
        assert!(!ring.publish(&[]), "nothing new, nothing to tell");
    }

    #[test]
    fn a_batch_is_one_interrupt_at_most() {
        let mut driver = Driver::new(8, 0);
        let mut ring = driver.ring(EVENTS);
        assert!(!ring.publish(&[]));
        for _ in 0..2 {
            driver.add(&[writable(DATA, 1)]);
        }
        take_all(&mut ring);
        driver.want_interrupt_at(1);
        assert!(ring.publish(&[used(0), used(1)]), "passes index 1");
        driver.add(&[writable(DATA, 1)]);
        take_all(&mut ring);
        assert!(!ring.publish(&[used(2)]), "index 1 has passed");
    }

    #[test]
    fn a_driver_that_jumps_breaks_its_ring() {
        let mut driver = Driver::new(8, 65_530);
        let mut ring = driver.ring(FLAGS);
        driver.jump(9);
        let broken = Broken::AvailableIndex { taken: 65_530, index: 3, size: 8 };
        assert_eq!(ring.waiting(), Err(broken));
        assert_eq!(ring.ask_for_kick(), Err(broken));
        driver.jump(u16::MAX);
        assert!(ring.waiting().is_err(), "backwards");
        driver.offer(8);
        assert_eq!(ring.waiting(), Ok(1));
        assert_eq!(ring.take().map(|_| ()), Err(Broken::Head { head: 8, size: 8 }));
    }

    #[test]
    fn a_ring_goes_on_where_it_was_whatever_the_base() {
        let mut driver = Driver::new(8, 65_535);
        for _ in 0..2 {
            driver.add(&[writable(DATA, 1)]);
        }
        // As Cloud Hypervisor does it, which names the driver's index.
        let mut ring = Ring::new(driver.memory(), driver.layout, EVENTS, 1, None).expect("a good layout");
        assert_eq!(ring.next_avail(), 65_535);
        assert_eq!(take_all(&mut ring).len(), 2);
        // Indices too far apart say nothing.
        driver.store(driver.layout.used + 2, 100);
        let ring = Ring::new(driver.memory(), driver.layout, EVENTS, 7, None).expect("a good layout");
        assert_eq!(ring.next_avail(), 7);
    }

    #[test]
    fn rings_outside_memory_or_of_odd_size_are_refused() {
        let driver = Driver::new(8, 0);
        let good = driver.layout;
        let end = MEMORY_BYTES as u64;
        let refused = |layout| Ring::new(driver.memory(), layout, EVENTS, 0, None).expect_err("a bad layout");
        for size in [0, 3, 24] {
            assert_eq!(refused(RingLayout { size, ..good }), RingError::Size(size));
        }
        for address in [end - 64, end, !15, 0x1008, u64::MAX] {
            assert!(matches!(refused(RingLayout { descriptors: address, ..good }), RingError::Area { part: "descriptor table", .. }));
        }
        for address in [end - 20, 0x1001] {
            assert!(matches!(refused(RingLayout { available: address, ..good }), RingError::Area { part: "available ring", .. }));
        }
        for address in [end - 64, 0x1002] {
            assert!(matches!(refused(RingLayout { used: address, ..good }), RingError::Area { part: "used ring", .. }));
        }
        // The last byte of memory may be the last byte of the ring, which without the event index is shorter.
        assert!(Ring::new(driver.memory(), RingLayout { used: end - 68, ..good }, FLAGS, 0, None).is_ok());
        assert!(Ring::new(driver.memory(), RingLayout { used: end - 68, ..good }, EVENTS, 0, None).is_err());
    }

    #[test]
    fn malformed_chains_come_back_with_their_fault() {
        type Build = fn(&mut Driver);
        let table = 0x8_0000;
        let cases: &[(&str, Build, Option<ChainFault>, usize)] = &[
            (
                "nothing wrong",
                |d| {
                    d.add(&[readable(DATA, 16), writable(DATA, 9)]);
                },
                None,
                9,
            ),
            (
                "only readable",
                |d| {
                    d.add(&[readable(DATA, 16)]);
                },
                None,
                0,
            ),
            (
                "itself next",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, writable(DATA, 1), NEXT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TooLong(8)),
                0,
            ),
            (
                "loop of two",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(DATA, 16), NEXT, 1);
                    d.descriptor(d.layout.descriptors, 1, writable(DATA, 1), NEXT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TooLong(8)),
                0,
            ),
            (
                "next outside the table",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(DATA, 16), NEXT, 8);
                    d.offer(0);
                },
                Some(ChainFault::Next { next: 8, entries: 8 }),
                0,
            ),
            (
                "readable after writable",
                |d| {
                    d.add(&[readable(DATA, 16), writable(DATA, 512), readable(DATA, 4), writable(DATA, 1)]);
                },
                Some(ChainFault::Order),
                513,
            ),
            (
                "status not last",
                |d| {
                    d.add(&[writable(DATA, 1), readable(DATA, 16)]);
                },
                Some(ChainFault::Order),
                1,
            ),
            (
                "zero length",
                |d| {
                    d.add(&[readable(DATA, 16), writable(DATA, 0), writable(DATA, 1)]);
                },
                Some(ChainFault::Empty),
                1,
            ),
            (
                "data outside memory",
                |d| {
                    d.add(&[readable(DATA, 16), writable(MEMORY_BYTES as u64 - 511, 512), writable(DATA, 1)]);
                },
                Some(ChainFault::Buffer { address: MEMORY_BYTES as u64 - 511, len: 512 }),
                1,
            ),
            (
                "data at the end of the address space",
                |d| {
                    d.add(&[readable(DATA, 16), writable(u64::MAX - 1, 512), writable(DATA, 1)]);
                },
                Some(ChainFault::Buffer { address: u64::MAX - 1, len: 512 }),
                1,
            ),
            (
                "status outside memory",
                |d| {
                    d.add(&[readable(DATA, 16), writable(DATA, 512), writable(1 << 40, 1)]);
                },
                Some(ChainFault::Buffer { address: 1 << 40, len: 1 }),
                0,
            ),
            (
                "more than two gigabytes",
                |d| {
                    d.add(&[readable(DATA, 16), writable(0, u32::MAX), writable(DATA, 1)]);
                },
                Some(ChainFault::Bytes),
                1,
            ),
            (
                "indirect table of half a descriptor",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 24), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TableLength(24)),
                0,
            ),
            (
                "empty indirect table",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 0), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TableLength(0)),
                0,
            ),
            (
                "huge indirect table",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 0xffff_fff0), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TableLength(0xffff_fff0)),
                0,
            ),
            (
                "indirect table outside memory",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(u64::MAX - 8, 32), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::Table(u64::MAX - 8)),
                0,
            ),
            (
                "indirect with next",
                |d| {
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 32), INDIRECT | NEXT, 1);
                    d.offer(0);
                },
                Some(ChainFault::Indirect("with a next one")),
                0,
            ),
            (
                "nested indirect",
                |d| {
                    d.descriptor(0x8_0000, 0, readable(0x8_0000, 16), INDIRECT, 0);
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 16), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::Indirect("inside an indirect table")),
                0,
            ),
            (
                "loop in an indirect table",
                |d| {
                    d.descriptor(0x8_0000, 0, readable(DATA, 16), NEXT, 1);
                    d.descriptor(0x8_0000, 1, writable(DATA, 1), NEXT, 0);
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 32), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::TooLong(2)),
                0,
            ),
            (
                "next outside an indirect table",
                |d| {
                    d.descriptor(0x8_0000, 0, readable(DATA, 16), NEXT, 2);
                    d.descriptor(d.layout.descriptors, 0, readable(0x8_0000, 32), INDIRECT, 0);
                    d.offer(0);
                },
                Some(ChainFault::Next { next: 2, entries: 2 }),
                0,
            ),
            (
                "direct buffers before an indirect table, whose write flag is ignored",
                |d| {
                    d.descriptor(0x8_0000, 0, writable(DATA, 9), 0, 0);
                    d.descriptor(d.layout.descriptors, 0, readable(DATA, 16), NEXT, 1);
                    d.descriptor(d.layout.descriptors, 1, readable(0x8_0000, 16), INDIRECT | WRITE, 0);
                    d.offer(0);
                },
                None,
                9,
            ),
        ];
        for (name, build, fault, answer_bytes) in cases {
            let mut driver = Driver::new(8, 0);
            let mut ring = driver.ring(FLAGS);
            build(&mut driver);
            let chains = take_all(&mut ring);
            assert_eq!(chains.len(), 1, "{name}");
            assert_eq!(chains[0].fault, *fault, "{name}");
            assert_eq!(chains[0].writable.len(), *answer_bytes, "{name}");
            let _ = ring.publish(&[used(chains[0].head)]);
            assert_eq!(driver.completed(), [used(chains[0].head)], "{name}");
        }
        let mut driver = Driver::new(8, 0);
        let mut ring = driver.ring(RingFeatures { indirect: false, ..FLAGS });
        driver.add_indirect(table, &[writable(DATA, 1)]);
        assert_eq!(take_all(&mut ring)[0].fault, Some(ChainFault::Indirect("without the feature")));
    }

    #[test]
    fn indirect_tables_may_be_longer_than_the_queue_but_not_endless() {
        let mut driver = Driver::new(4, 0);
        let mut ring = driver.ring(FLAGS);
        let most: Vec<Piece> = (0..MAX_INDIRECT_BUFFERS as u64).map(|index| writable(DATA + index * 512, 512)).collect();
        driver.add_indirect(0x8_0000, &most);
        assert_eq!(take_all(&mut ring)[0].fault, None);
        driver.add_indirect(0x8_0000, &[&most[..], &most[..1]].concat());
        assert_eq!(take_all(&mut ring)[0].fault, Some(ChainFault::TooLong(MAX_INDIRECT_BUFFERS)));
    }
}

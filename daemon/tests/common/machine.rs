//! A virtual machine without a guest: its memory, the queues of one disk in it, and the front-end that shares them with the daemon.
//!
//! Crate `vhost` speaks the protocol; the queues are written by the test driver, so that each can be filled with what no real driver does.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vmm_sys_util::eventfd::EventFd;

use super::driver::{DATA, Driver, Piece, readable, writable};
use super::{PATIENCE, RingLayout, SharedMemory};

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// What no device ever writes as a status.
pub(crate) const NO_STATUS: u8 = 0x5a;

/// Descriptors of a queue.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Requests that a queue has memory for; each has three descriptors of its own.
pub(crate) const SLOTS: usize = 64;
/// Most data of a request.
pub(crate) const SLOT_DATA: usize = 64 << 10;
/// Memory of a slot: a page for header and status, and the data.
const SLOT_BYTES: usize = 4096 + SLOT_DATA;
/// Memory of a ring.
const RING_BYTES: u64 = 0x4000;

/// Everything but the event index: the test driver wants every interrupt.
pub(crate) const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// What outlives connections.
pub(crate) struct Machine {
    pub(crate) memory: Arc<SharedMemory>,
    pub(crate) queues: Vec<Queue>,
    /// The record of requests in flight, which the first back-end makes.
    record: OnceLock<(VhostUserInflight, File)>,
}

/// One queue, as the guest sees it.
pub(crate) struct Queue {
    pub(crate) driver: Driver,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    /// Where its slots are.
    slots: u64,
    /// The used index up to which completions have been fetched.
    collected: u16,
}

/// A request that has come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) slot: usize,
    pub(crate) status: u8,
    pub(crate) written: u32,
}

/// The data of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    None,
    /// Room for so many bytes.
    In(usize),
    Out(&'a [u8]),
}

impl Machine {
    pub(crate) fn new(queues: usize) -> Self {
        let memory = Arc::new(SharedMemory::new(DATA as usize + queues * SLOTS * SLOT_BYTES));
        let queues = (0..queues as u64)
            .map(|index| {
                let ring = 0x1000 + index * RING_BYTES;
                assert!(ring + RING_BYTES <= DATA);
                let layout = RingLayout { size: QUEUE_SIZE, descriptors: ring, available: ring + 0x1000, used: ring + 0x2000 };
                Queue {
                    driver: Driver::over(Arc::clone(&memory.mmap), layout, 0),
                    kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
                    call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
                    slots: DATA + index * (SLOTS * SLOT_BYTES) as u64,
                    collected: 0,
                }
            })
            .collect();
        Self { memory, queues, record: OnceLock::new() }
    }

    /// Connects and starts all queues, in exactly Cloud Hypervisor's order.
    pub(crate) fn connect(&self, socket: &Path) -> Link {
        let mut link = Link::new(socket, self.queues.len());
        link.activate(self, FEATURES);
        link
    }
}

/// A connection.
pub(crate) struct Link {
    pub(crate) frontend: Frontend,
    pub(crate) offered: u64,
}

impl Link {
    /// What a front-end does before the guest's driver has said anything.
    pub(crate) fn new(socket: &Path, queues: usize) -> Self {
        let mut frontend = Frontend::connect(socket, queues as u64).expect("a daemon that listens");
        frontend.set_owner().expect("an answer");
        let offered = frontend.get_features().expect("features");
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE;
        let accepted = frontend.get_protocol_features().expect("protocol features") & wanted;
        assert!(accepted.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        assert!(!accepted.contains(VhostUserProtocolFeatures::LOG_SHMFD), "not honoured");
        frontend.set_protocol_features(accepted).expect("an answer");
        assert!(frontend.get_queue_num().expect("a number") >= queues as u64);
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Self { frontend, offered }
    }

    pub(crate) fn config(&mut self, len: usize) -> Vec<u8> {
        let (config, payload) = self
            .frontend
            .get_config(0, len as u32, VhostUserConfigFlags::WRITABLE, &vec![0; len])
            .expect("a configuration space of the size that was asked for");
        assert_eq!((config.offset, config.size as usize, payload.len()), (0, len, len));
        payload
    }

    /// Features, memory, then the queues, each to go on from the driver's index.
    pub(crate) fn activate(&mut self, machine: &Machine, features: u64) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(self.offered & features | protocol).expect("an answer");
        self.frontend.set_mem_table(&[region(&machine.memory)]).expect("an answer");
        for (index, queue) in machine.queues.iter().enumerate() {
            self.frontend.set_vring_num(index, queue.driver.layout.size).expect("an answer");
        }
        let queues = machine.queues.len() as u16;
        let (inflight, file) = machine
            .record
            .get_or_init(|| self.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, QUEUE_SIZE)).expect("a record"));
        self.frontend.set_inflight_fd(inflight, file.as_raw_fd()).expect("an answer");
        for (index, queue) in machine.queues.iter().enumerate() {
            self.start_queue(machine, index, queue.available_index());
        }
        self.set_enabled(machine.queues.len(), true);
    }

    /// `SET_VRING_ADDR`, `BASE`, `CALL`, `KICK`.
    pub(crate) fn start_queue(&mut self, machine: &Machine, index: usize, base: u16) {
        let queue = &machine.queues[index];
        let layout = queue.driver.layout;
        let here = |address: u64| machine.memory.base() as u64 + address;
        let config = VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: here(layout.descriptors),
            used_ring_addr: here(layout.used),
            avail_ring_addr: here(layout.available),
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &config).expect("an answer");
        self.frontend.set_vring_base(index, base).expect("an answer");
        self.frontend.set_vring_call(index, &borrowed(&queue.call)).expect("an answer");
        self.frontend.set_vring_kick(index, &borrowed(&queue.kick)).expect("an answer");
    }

    /// How Cloud Hypervisor pauses and resumes.
    pub(crate) fn set_enabled(&mut self, queues: usize, enabled: bool) {
        for index in 0..queues {
            self.frontend.set_vring_enable(index, enabled).expect("an answer");
        }
    }

    pub(crate) fn add_memory(&mut self, memory: &SharedMemory) {
        self.frontend.add_mem_region(&region(memory)).expect("an answer");
    }

    pub(crate) fn remove_memory(&mut self, memory: &SharedMemory) {
        self.frontend.remove_mem_region(&region(memory)).expect("an answer");
    }
}

pub(crate) fn region(memory: &SharedMemory) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: memory.start,
        memory_size: memory.len as u64,
        userspace_addr: memory.base() as u64,
        mmap_offset: 0,
        mmap_handle: memory.file.as_raw_fd(),
    }
}

/// Any descriptor, as the crate wants to have it to send it.
pub(crate) fn borrowed(fd: &OwnedFd) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let copy = fd.try_clone().expect("a descriptor");
    // SAFETY: a descriptor of its own, just made.
    unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) }
}

impl Queue {
    pub(crate) fn header_at(&self, slot: usize) -> u64 {
        assert!(slot < SLOTS);
        self.slots + (slot * SLOT_BYTES) as u64
    }

    pub(crate) fn status_at(&self, slot: usize) -> u64 {
        self.header_at(slot) + 16
    }

    pub(crate) fn data_at(&self, slot: usize) -> u64 {
        self.header_at(slot) + 4096
    }

    pub(crate) fn data(&self, slot: usize, len: usize) -> Vec<u8> {
        self.driver.read(self.data_at(slot), len)
    }

    pub(crate) fn status(&self, slot: usize) -> u8 {
        self.driver.read(self.status_at(slot), 1)[0]
    }

    /// Where the driver is in the available ring.
    pub(crate) fn available_index(&self) -> u16 {
        self.driver.load(self.driver.layout.available + 2)
    }

    /// Requests whose completion has not been fetched.
    pub(crate) fn uncollected(&self) -> usize {
        self.available_index().wrapping_sub(self.collected).into()
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).expect("room");
    }

    /// Makes a request available: header, data and status in a descriptor each. Does not kick.
    pub(crate) fn submit(&mut self, slot: usize, kind: u32, sector: u64, data: Data<'_>) {
        let at = self.data_at(slot);
        let data = match data {
            Data::None => None,
            Data::In(len) => Some(writable(at, len as u32)),
            Data::Out(bytes) => {
                self.driver.write(at, bytes);
                Some(readable(at, bytes.len() as u32))
            }
        };
        self.submit_at(slot, kind, sector, data);
    }

    /// The same with the data anywhere.
    pub(crate) fn submit_at(&mut self, slot: usize, kind: u32, sector: u64, data: Option<Piece>) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.driver.write(self.header_at(slot), &header);
        let pieces = [Some(readable(self.header_at(slot), 16)), data, Some(writable(self.status_at(slot), 1))];
        self.submit_pieces(slot, &pieces.into_iter().flatten().collect::<Vec<_>>());
    }

    /// Makes a chain of at most three pieces available, in the slot's own descriptors.
    pub(crate) fn submit_pieces(&mut self, slot: usize, pieces: &[Piece]) {
        assert!((1..=3).contains(&pieces.len()));
        self.driver.write(self.status_at(slot), &[NO_STATUS]);
        let first = slot as u16 * 3;
        for (index, &piece) in (first..).zip(pieces) {
            let flags = if usize::from(index - first) + 1 < pieces.len() { super::driver::NEXT } else { 0 };
            self.driver.descriptor(self.driver.layout.descriptors, index, piece, flags, index + 1);
        }
        self.driver.offer(first);
    }

    /// What has come back since the last call.
    pub(crate) fn completed(&mut self) -> Vec<Done> {
        let used = self.driver.completed();
        self.collected = self.collected.wrapping_add(used.len() as u16);
        used.into_iter()
            .map(|used| {
                let slot = usize::from(used.head / 3);
                Done { slot, status: self.status(slot), written: used.written }
            })
            .collect()
    }

    /// Waits until `count` requests have come back, all that have not been fetched before included.
    pub(crate) fn wait(&mut self, count: usize) -> Vec<Done> {
        let mut done = self.completed();
        while done.len() < count {
            let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
            let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            let ready = poll(&mut fds, Some(&patience)).expect("a poll");
            assert!(ready > 0, "{} of {count} requests have come back, and no more come", done.len());
            self.clear_call();
            done.extend(self.completed());
        }
        done
    }

    /// Forgets interrupts so far. Whether there were any.
    pub(crate) fn clear_call(&self) -> bool {
        rustix::io::read(&self.call, &mut [0; 8]).is_ok()
    }

    /// One request from beginning to end.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: Data<'_>) -> Done {
        self.submit(0, kind, sector, data);
        self.kick();
        let done = self.wait(1);
        assert_eq!(done.len(), 1);
        done[0]
    }
}

/// One range of a discard or write-zeroes request.
pub(crate) fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

//! Descriptor chains in memory that changes while it is read.
//!
//! The ring, the requests and the worker are the real ones; the disk is simulated, so that requests overlap. An input is a script of the driver:
//! descriptors, headers, heads, kicks, and changes that happen before the n-th load that the device does (in the fuzzer's programs only: others have
//! no such place). Nothing panics; the device touches nothing but the guest's memory, which lies on the heap so that the address sanitizer sees what
//! is around it; it ends; and unless it says that the ring is broken, it gives back as many chains as it was offered.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::retry_on_intr;
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::simulated::Simulation;
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::vring::{EventDescriptor, GuestMemory, RingFeatures, RingLayout, Signal};
use snapfenced::worker::{QueueHandle, Start};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::queue_thread::QueueThread;
use crate::source::Source;

const DISK_BYTES: usize = 64 << 10;
const QUEUE_SIZE: u16 = 16;
/// Two regions that adjoin, a hole, and one where only the used ring is, which no descriptor reaches: what comes back stays known.
const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x6000), (0x1_0000, 0x1000)];
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x200;
const INDIRECT: u64 = 0x300;
const HEADERS: u64 = 0x600;
const USED: u64 = 0x1_0000;
/// Most actions of a run, steps of the simulation after an action, and steps until nothing is left to do.
const MAX_ACTIONS: usize = 200;
const STEPS: u8 = 32;
const MAX_STEPS: usize = 100_000;

/// The guest's memory.
struct Memory(Arc<GuestMemoryMmap>);

impl Memory {
    /// Made once for each thread.
    fn new() -> Self {
        let region = |&(start, len): &(u64, usize)| {
            let layout = std::alloc::Layout::from_size_align(len, 4096).expect("whole pages");
            // SAFETY: the size is not zero.
            let bytes = unsafe { std::alloc::alloc_zeroed(layout) };
            assert!(!bytes.is_null(), "memory");
            // SAFETY: `len` bytes from `bytes` on are ours, aligned to a page, and are never freed.
            let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(bytes) };
            GuestRegionMmap::new(builder.build().expect("a region"), GuestAddress(start)).expect("a region")
        };
        Self(Arc::new(GuestMemoryMmap::from_regions(REGIONS.iter().map(region).collect()).expect("regions that do not overlap")))
    }

    /// As the guest writes, as far as there is memory.
    fn write(&self, at: u64, bytes: &[u8]) {
        // The rest would be in a hole.
        let _ = self.0.write(bytes, GuestAddress(at));
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.0.read_obj(GuestAddress(at)).expect("guest memory"))
    }
}

/// How the device says that a ring is broken. Made once for each thread, as it takes longer than a run.
struct Alarm {
    descriptor: OwnedFd,
    signal: Arc<Signal>,
}

impl Alarm {
    fn new() -> Self {
        let descriptor = event();
        let told = EventDescriptor::try_from(descriptor.try_clone().expect("a descriptor")).expect("an eventfd");
        Self { descriptor, signal: Arc::new(Signal::new(told).expect("a ring")) }
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

thread_local! {
    static MEMORY: Rc<Memory> = Rc::new(Memory::new());
    static ALARM: Rc<Alarm> = Rc::new(Alarm::new());
}

/// A change that is to come before a load of the device.
struct Change {
    loads: u8,
    at: u64,
    bytes: Vec<u8>,
}

struct Machine {
    memory: Rc<Memory>,
    simulation: Simulation,
    queue: QueueHandle,
    awake: Rc<Cell<bool>>,
    alarm: Rc<Alarm>,
    changes: Rc<RefCell<Vec<Change>>>,
    available: u16,
    steps: usize,
}

/// One run.
///
/// # Panics
/// If a promise is broken.
pub fn run(input: &[u8]) {
    let mut source = Source::new(input);
    let mut machine = Machine::new(&mut source);
    for _ in 0..MAX_ACTIONS {
        if source.is_empty() {
            break;
        }
        machine.act(&mut source);
    }
    machine.end();
}

impl Machine {
    fn new(source: &mut Source<'_>) -> Self {
        let flags = source.u8();
        let memory = MEMORY.with(Rc::clone);
        for (start, len) in REGIONS {
            memory.write(start, &vec![0; len]);
        }
        let mut simulation = Simulation::new(u64::from(source.u8()));
        let environment = simulation.environment().clone();
        environment.put("/disk", &[0xd1; DISK_BYTES]);
        let (inner, location) = (environment.clone(), Location::Trusted("/disk".into()));
        let image = simulation.block_on(async move {
            let file = inner.open(&location, Access::Write, CacheMode::Direct).await.expect("a file");
            Raw::open(file, true).await.expect("an image")
        });
        let domain = FenceDomain::new(|| std::time::Duration::ZERO);
        let layers = vec![Arc::new(Layer::Raw(image))];
        let read_only = flags & 4 != 0;
        let stack = Stack::new(environment, &domain, layers, read_only);
        let options = DeviceOptions {
            name: "vda".into(),
            serial: "serial".into(),
            read_only,
            queues: 1,
            queue_size: QUEUE_SIZE,
            on_no_space: NoSpacePolicy::Report,
        };
        let device = Device::new(options, stack).expect("good options");
        let awake = Rc::default();
        let (thread, handle) = QueueThread::new(simulation.new_executor(), &domain, &awake);
        simulation.add_thread(thread);
        let queue = handle.attach(&device, 0);
        let alarm = ALARM.with(Rc::clone);
        // What was signalled in the run before, if anything was.
        let _ = rustix::io::read(&alarm.descriptor, &mut [0; 8]);
        let started = queue.start(Start {
            layout: RingLayout { size: QUEUE_SIZE, descriptors: TABLE, available: AVAILABLE, used: USED },
            features: RingFeatures { event_idx: flags & 1 != 0, indirect: flags & 2 != 0 },
            base: 0,
            memory: GuestMemory::new(&memory.0),
            record: None,
            kick: event().try_into().expect("an eventfd"),
            call: None,
            error: Some(Arc::clone(&alarm.signal)),
            enabled: true,
        });
        simulation.run_until_stalled();
        started.try_recv().expect("an answer").expect("a ring");
        let changes = Rc::default();
        let machine = Self { memory, simulation, queue, awake, alarm, changes, available: 0, steps: 0 };
        machine.observe();
        machine
    }

    /// Lets the changes come when their time has come.
    fn observe(&self) {
        let (memory, changes) = (Rc::clone(&self.memory), Rc::clone(&self.changes));
        let before_load = move || {
            changes.borrow_mut().retain_mut(|change: &mut Change| {
                change.loads = change.loads.saturating_sub(1);
                if change.loads == 0 {
                    memory.write(change.at, &change.bytes);
                }
                change.loads > 0
            });
        };
        #[cfg(fuzzing)]
        snapfenced::vring::memory::BEFORE_LOAD.set(Some(Box::new(before_load)));
        #[cfg(not(fuzzing))]
        drop(before_load);
    }

    fn act(&mut self, source: &mut Source<'_>) {
        let kind = source.u8();
        let (at, bytes) = match kind & 7 {
            0 | 1 => self.descriptor(source),
            2 => {
                // A header.
                let at = HEADERS + source.below(8) as u64 * 16;
                let request = [0, 1, 4, 8, 11, 13, source.u8()][source.below(7)];
                let sector = u64::from(source.u8()) << if kind & 0x80 != 0 { 50 } else { 0 };
                (at, [&u32::from(request).to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat())
            }
            3 => {
                // A range of a discard.
                let flags = source.u8() & 3;
                let sector = u64::from(source.u8());
                let count = u32::from(source.u8()) << if kind & 0x80 != 0 { 24 } else { 0 };
                (HEADERS + 0x100, [&sector.to_le_bytes()[..], &count.to_le_bytes(), &u32::from(flags).to_le_bytes()].concat())
            }
            4 => return self.offer(u16::from(source.u8() & if kind & 0x80 != 0 { 0x1f } else { 0xf })),
            5 => {
                // Bytes anywhere but in the used ring, and in the part of the available ring that says how many chains there are.
                let at = u64::from(source.u16() & 0x7fff);
                (if (AVAILABLE + 1..AVAILABLE + 4).contains(&at) { at + 4 } else { at }, vec![source.u8()])
            }
            6 => {
                if kind & 0x80 != 0 {
                    let paused = self.queue.disable();
                    self.run(usize::MAX);
                    paused.try_recv().expect("a queue that drains");
                    self.queue.enable();
                }
                self.awake.set(true);
                return self.run(usize::from(source.u8() % STEPS));
            }
            _ => {
                // The index of the available ring, which the guest lets jump.
                if source.u8() & 7 == 0 {
                    self.available = self.available.wrapping_add(u16::from(source.u8()));
                    self.memory.write(AVAILABLE + 2, &self.available.to_le_bytes());
                }
                return;
            }
        };
        if kind & 0x40 != 0 {
            self.changes.borrow_mut().push(Change { loads: 1 + source.u8() % 64, at, bytes });
        } else {
            self.memory.write(at, &bytes);
        }
    }

    /// A descriptor, and where it is written.
    fn descriptor(&self, source: &mut Source<'_>) -> (u64, Vec<u8>) {
        let place = source.u8();
        let table = if place & 0x80 != 0 { INDIRECT } else { TABLE };
        let at = table + u64::from(place & 15) * 16;
        let address = match source.u8() {
            choice @ 0..=63 => HEADERS + u64::from(choice & 7) * 16,
            choice @ 64..=127 => 0x1000 + u64::from(choice & 15) * 0x200,
            choice @ 128..=159 => INDIRECT + u64::from(choice & 1) * 16,
            160..=191 => HEADERS + 0x100,
            192..=223 => 0x7fff,
            // Never in the used ring: below the hole, or beyond everything.
            _ => u64::from(source.u16() & 0x7fff) | if place & 0x40 != 0 { 0xffff_0000_0000_0000 } else { 0 },
        };
        let len = match source.below(8) {
            0 => 16,
            1 => 1,
            2 => 512,
            3 => 1024,
            4 => 32,
            5 => u32::from(source.u16()) % (0x8000 - address.min(0x7fff) as u32),
            6 => u32::MAX - u32::from(source.u8()),
            _ => 4096,
        };
        let flags = u16::from(source.u8() & 7);
        let next = u16::from(source.u8() & 0x1f);
        let bits = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        (at, bits.to_le_bytes().to_vec())
    }

    fn offer(&mut self, head: u16) {
        if self.available.wrapping_sub(self.memory.load(USED + 2)) >= QUEUE_SIZE {
            return;
        }
        let slot = u64::from(self.available % QUEUE_SIZE);
        self.memory.write(AVAILABLE + 4 + slot * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.memory.write(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    /// Lets so many things happen, or all.
    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.steps += 1;
            assert!(self.steps < MAX_STEPS, "the device does not come to rest");
            if !self.simulation.step() {
                break;
            }
        }
    }

    /// Whether the device has said that it goes on no more.
    fn is_broken(&self) -> bool {
        let mut fds = [PollFd::new(&self.alarm.descriptor, PollFlags::IN)];
        // libFuzzer has a timer, whose signals interrupt it.
        retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))).expect("a poll") > 0
    }

    /// All that was offered comes back, as often as it was offered.
    fn end(mut self) {
        self.changes.borrow_mut().clear();
        #[cfg(fuzzing)]
        snapfenced::vring::memory::BEFORE_LOAD.set(None);
        // What the device was made to write there does not count.
        self.memory.write(AVAILABLE + 2, &self.available.to_le_bytes());
        self.awake.set(true);
        self.run(usize::MAX);
        let used = self.memory.load(USED + 2);
        if !self.is_broken() {
            assert_eq!(used, self.available, "chains come back as often as they are offered");
        }
        for slot in 0..u64::from(QUEUE_SIZE.min(used)) {
            assert!(self.memory.load(USED + 4 + slot * 8) < QUEUE_SIZE, "a head");
        }
        let stopped = self.queue.stop();
        self.run(usize::MAX);
        stopped.try_recv().expect("a queue that stops");
    }
}

//! A queue thread on a simulated disk: what completes under which cache mode is what a crash leaves; requests that fail inside, or hang, come back
//! or are given up, and never half; requests to other clusters wait for none that hangs; a thread that has nothing to do holds no view back;
//! a full disk makes requests wait.

mod common;
#[path = "simulated_queue/no_space.rs"]
mod no_space;
#[path = "simulated_queue/space_faults.rs"]
mod space_faults;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

use common::driver::{DATA, Driver, Piece, readable, writable};
use common::machine::{DISCARD, FLUSH, IN, OUT, WRITE_ZEROES, range};
use common::queue_thread::QueueThread;
use common::seed;
use rustix::event::{EventfdFlags, eventfd};
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::runtime::Executor;
use snapfence_image_format::stack::{FenceDomain, FenceOutcome, Stack};
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::vring::{GuestMemory, InflightLog, InflightQueue, RingFeatures, RingLayout};
use snapfenced::worker::{QueueHandle, Start};

const DISK_BYTES: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 256;
/// Memory of a request: header, status, and data behind.
const SLOT_BYTES: u64 = 0x3000;
const SLOTS: u16 = 64;

struct Setting {
    simulation: Simulation,
    environment: SimulatedEnvironment,
    domain: Arc<FenceDomain>,
    device: Arc<Device<SimulatedEnvironment>>,
    queue: QueueHandle,
    driver: Driver,
    awake: Rc<Cell<bool>>,
}

fn open(simulation: &mut Simulation, path: &str, access: Access) -> <SimulatedEnvironment as Environment>::File {
    let (environment, location) = (simulation.environment().clone(), Location::Trusted(path.into()));
    simulation.block_on(async move { environment.open(&location, access, CacheMode::Direct).await }).expect("a file")
}

fn create_qcow2(simulation: &mut Simulation, path: &str, options: CreateOptions) {
    let file = open(simulation, path, Access::CreateNew);
    simulation.block_on(async move { Qcow2::<SimulatedEnvironment>::create(&file, &options).await }).expect("an image");
    let environment = simulation.environment().clone();
    simulation.block_on(async move { environment.flush_directory(Path::new("/")).await }).expect("a durable name");
}

fn open_raw(simulation: &mut Simulation, path: &str, access: Access) -> Arc<Layer<SimulatedEnvironment>> {
    let file = open(simulation, path, access);
    Arc::new(Layer::Raw(simulation.block_on(Raw::open(file, access == Access::Write)).expect("an image")))
}

fn open_qcow2(simulation: &mut Simulation, path: &str) -> Arc<Layer<SimulatedEnvironment>> {
    let file = open(simulation, path, Access::Write);
    Arc::new(Layer::Qcow2(simulation.block_on(Qcow2::open(file, OpenOptions::writing())).expect("an image")))
}

impl Setting {
    /// A device over a raw image, or a qcow2 image, whose only queue runs.
    fn new(seed: u64, qcow2: bool) -> Self {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        let layer = if qcow2 {
            create_qcow2(&mut simulation, "/disk", CreateOptions::standalone(DISK_BYTES));
            open_qcow2(&mut simulation, "/disk")
        } else {
            environment.put("/disk", &vec![0; DISK_BYTES as usize]);
            open_raw(&mut simulation, "/disk", Access::Write)
        };
        Self::over(simulation, vec![layer])
    }

    /// A device over these layers, base first, whose only queue runs.
    fn over(simulation: Simulation, layers: Vec<Arc<Layer<SimulatedEnvironment>>>) -> Self {
        Self::with_policy(simulation, layers, NoSpacePolicy::Hold)
    }

    fn with_policy(mut simulation: Simulation, layers: Vec<Arc<Layer<SimulatedEnvironment>>>, on_no_space: NoSpacePolicy) -> Self {
        let environment = simulation.environment().clone();
        let domain = FenceDomain::new(|| std::time::Duration::ZERO);
        let stack = Stack::new(environment.clone(), &domain, layers, false);
        let options =
            DeviceOptions { name: "vda".into(), serial: String::new(), read_only: false, queues: 1, queue_size: QUEUE_SIZE, on_no_space };
        let device = Device::new(options, stack).expect("good options");
        let awake = Rc::default();
        let (thread, handle) = QueueThread::new(Executor::new(NoUnpark), &domain, &awake);
        simulation.add_thread(thread);
        let queue = handle.attach(&device, 0);
        let driver = Driver::new(QUEUE_SIZE, 0);
        let mut setting = Self { simulation, environment, domain, device, queue, driver, awake };
        setting.start();
        setting
    }

    fn start(&mut self) {
        self.restart(None);
    }

    /// Runs the ring, with the front-end's record if it keeps one.
    fn restart(&mut self, record: Option<InflightQueue>) {
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let started = self.queue.start(Start {
            layout: self.driver.layout,
            features: RingFeatures { event_idx: false, indirect: true },
            base: 0,
            memory: self.driver.memory(),
            record,
            kick: kick.try_into().expect("an eventfd"),
            call: None,
            error: None,
            enabled: true,
        });
        self.simulation.run_until_stalled();
        started.try_recv().expect("an answer").expect("a ring");
    }

    fn status_at(slot: u16) -> u64 {
        DATA + u64::from(slot) * SLOT_BYTES + 16
    }

    /// Makes a request available and kicks. `data` is written by the driver, or is room for so many bytes.
    fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: Result<&[u8], usize>) {
        assert!(slot < SLOTS);
        let at = DATA + u64::from(slot) * SLOT_BYTES;
        self.driver.write(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.driver.write(Self::status_at(slot), &[0x5a]);
        let piece: Option<Piece> = match data {
            Ok(bytes) if !bytes.is_empty() => {
                self.driver.write(at + 0x1000, bytes);
                Some(readable(at + 0x1000, bytes.len() as u32))
            }
            Err(len) => Some(writable(at + 0x1000, len as u32)),
            Ok(_) => None,
        };
        let pieces = [Some(readable(at, 16)), piece, Some(writable(Self::status_at(slot), 1))];
        for (index, &piece) in (slot * 3..).zip(pieces.iter().flatten()) {
            let last = pieces.iter().flatten().count() as u16 - 1 + slot * 3;
            let flags = if index < last { common::driver::NEXT } else { 0 };
            self.driver.descriptor(self.driver.layout.descriptors, index, piece, flags, index + 1);
        }
        self.driver.offer(slot * 3);
        self.awake.set(true);
    }

    fn completed(&mut self) -> Vec<(u16, u8)> {
        let used = self.driver.completed();
        used.into_iter().map(|used| (used.head / 3, self.driver.read(Self::status_at(used.head / 3), 1)[0])).collect()
    }

    fn request(&mut self, kind: u32, sector: u64, data: Result<&[u8], usize>) -> u8 {
        self.submit(0, kind, sector, data);
        self.simulation.run_until_stalled();
        let done = self.completed();
        assert_eq!(done.len(), 1, "it comes back once");
        done[0].1
    }
}

struct NoUnpark;

impl snapfence_image_format::runtime::Unpark for NoUnpark {
    fn unpark(&self) {}
}

/// What the image in `environment` shows.
fn contents(environment: SimulatedEnvironment, qcow2: bool) -> Vec<u8> {
    if !qcow2 {
        return environment.bytes("/disk").expect("an image");
    }
    let mut simulation = Simulation::on(environment.clone());
    let layer = open_qcow2(&mut simulation, "/disk");
    let domain = FenceDomain::new(|| std::time::Duration::ZERO);
    let stack = Stack::new(environment, &domain, vec![layer], false);
    let buffer = snapfence_image_format::buffer::AlignedBuffer::zeroed(DISK_BYTES as usize).into();
    let view = stack.view();
    let (result, buffer) = simulation.block_on(async move { view.read(snapfence_image_format::units::GuestOffset::ZERO, buffer).await });
    result.expect("an image that can be read");
    let snapfence_image_format::buffer::Buffer::Owned(bytes) = buffer else { panic!("the buffer that was given") };
    bytes.to_vec()
}

/// Writes sectors in the given cache mode, and turns the power off after the last has completed. Returns what is left, and what was written.
fn written_and_left(seed: u64, qcow2: bool, write_through: bool, flush: bool) -> (Vec<u8>, Vec<u8>) {
    let mut setting = Setting::new(seed, qcow2);
    let mut chance = Chance::new(seed);
    setting.device.cache().set_features(1 << 9 | 1 << 11);
    setting.device.cache().set_write_back(!write_through);
    let mut model = vec![0; DISK_BYTES as usize];
    for number in 1..=20_u8 {
        let (sector, count) = (chance.below(2000), 1 + chance.below(8));
        let at = sector as usize * 512..(sector + count) as usize * 512;
        if chance.below(4) == 0 {
            assert_eq!(setting.request(WRITE_ZEROES, 0, Ok(&range(sector, count as u32, chance.below(2) as u32))), 0);
            model[at].fill(0);
        } else {
            assert_eq!(setting.request(OUT, sector, Ok(&vec![number; count as usize * 512])), 0);
            model[at].fill(number);
        }
    }
    if flush {
        assert_eq!(setting.request(FLUSH, 0, Ok(&[])), 0);
    }
    (contents(setting.environment.crash(), qcow2), model)
}

#[test]
fn what_completes_under_write_through_or_is_flushed_survives_a_crash() {
    let seed = seed();
    let mut lost = 0;
    for round in 0..10 {
        for qcow2 in [false, true] {
            for (write_through, flush) in [(true, false), (false, true)] {
                let (left, written) = written_and_left(seed + round, qcow2, write_through, flush);
                assert!(left == written, "round {round}, qcow2 {qcow2}, write-through {write_through}, flushed {flush}");
            }
            let (left, written) = written_and_left(seed + round, qcow2, false, false);
            lost += usize::from(left != written);
        }
    }
    assert!(lost > 0, "the simulated disk never loses anything, and so proves nothing");
}

#[test]
fn requests_that_fail_inside_come_back_once_with_an_error() {
    let seed = seed();
    for kind in [OperationKind::Read, OperationKind::Write, OperationKind::Flush, OperationKind::Allocate, OperationKind::Punch] {
        for after in 0..12 {
            for qcow2 in [false, true] {
                let mut setting = Setting::new(seed + after, qcow2);
                setting.environment.inject(Fault::once(kind, after));
                let mut chance = Chance::new(seed + after);
                for slot in 0..SLOTS {
                    let sector = chance.below(2000);
                    match chance.below(5) {
                        0 => setting.submit(slot, FLUSH, 0, Ok(&[])),
                        1 => setting.submit(slot, OUT, sector, Ok(&[1; 4096])),
                        2 => setting.submit(slot, DISCARD, 0, Ok(&range(sector, 8, 0))),
                        3 => setting.submit(slot, WRITE_ZEROES, 0, Ok(&range(sector, 8, 1))),
                        _ => setting.submit(slot, IN, sector, Err(4096)),
                    }
                }
                setting.simulation.run_until_stalled();
                let mut slots: Vec<u16> = setting
                    .completed()
                    .iter()
                    .map(|(slot, status)| {
                        assert!(*status <= 1, "{kind:?} {after}: status {status}");
                        *slot
                    })
                    .collect();
                slots.sort_unstable();
                assert_eq!(slots, (0..SLOTS).collect::<Vec<_>>(), "{kind:?} {after}, qcow2 {qcow2}");
                setting.environment.clear_faults();
                assert_eq!(setting.request(IN, 0, Err(512)), 0, "reads go on whatever failed");
            }
        }
    }
}

#[test]
fn a_ring_that_cannot_drain_can_be_given_up_and_started_again() {
    let mut setting = Setting::new(seed(), false);
    setting.environment.inject(Fault::lasting(OperationKind::Read, 0).with(FaultEffect::Hang));
    setting.submit(0, IN, 0, Err(512));
    setting.submit(1, OUT, 0, Ok(&[1; 512]));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(1, 0)]);
    let (paused, stopped) = (setting.queue.disable(), setting.queue.stop());
    setting.simulation.run_until_stalled();
    assert_eq!(paused.try_recv(), Err(TryRecvError::Disconnected), "the stop has taken its place");
    assert_eq!(stopped.try_recv(), Err(TryRecvError::Empty), "the read is still under way");
    let abandoned = setting.queue.abandon();
    setting.simulation.run_until_stalled();
    assert_eq!(abandoned.try_recv(), Ok(2), "two were taken");
    assert_eq!(setting.completed(), [(0, 1)], "what was given up is given back as failed");
    setting.environment.clear_faults();
    setting.start();
    setting.submit(2, OUT, 0, Ok(&[2; 512]));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [], "nothing is taken while the read may still reach guest memory");
    setting.environment.release_hung();
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(2, 0)], "and the read does not come back again");
    assert_eq!(setting.driver.read(Setting::status_at(0), 1), [1]);
}

#[test]
fn a_ring_with_a_record_serves_again_what_was_given_up() {
    let mut setting = Setting::new(seed(), false);
    let (layout, file) = InflightLog::create(1, QUEUE_SIZE, (1, QUEUE_SIZE)).expect("memory");
    let log = InflightLog::map(layout, file.into(), (1, QUEUE_SIZE)).expect("just made");
    setting.restart(log.queue(0));
    setting.environment.inject(Fault::once(OperationKind::Read, 0).with(FaultEffect::Hang));
    setting.submit(0, IN, 0, Err(512));
    setting.submit(1, OUT, 0, Ok(&[1; 512]));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(1, 0)]);
    let abandoned = setting.queue.abandon();
    setting.simulation.run_until_stalled();
    assert_eq!(abandoned.try_recv(), Ok(2));
    assert_eq!(setting.completed(), []);
    setting.restart(log.queue(0));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [], "it has not ended yet");
    setting.environment.release_hung();
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(0, 0)]);
    assert_eq!(setting.driver.read(DATA + 0x1000, 512), [1; 512]);
}

#[test]
fn pausing_waits_for_what_hangs_and_no_longer() {
    let mut setting = Setting::new(seed(), false);
    setting.environment.inject(Fault::once(OperationKind::Read, 0).with(FaultEffect::Hang));
    setting.submit(0, IN, 0, Err(512));
    setting.simulation.run_until_stalled();
    let paused = setting.queue.disable();
    setting.simulation.run_until_stalled();
    // What comes while it drains is left where it is.
    setting.submit(1, FLUSH, 0, Ok(&[]));
    setting.simulation.run_until_stalled();
    assert_eq!(paused.try_recv(), Err(TryRecvError::Empty));
    assert!(setting.completed().is_empty());
    setting.environment.release_hung();
    setting.simulation.run_until_stalled();
    assert_eq!(paused.try_recv(), Ok(()));
    assert_eq!(setting.completed().iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [0]);
    setting.queue.enable();
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(1, 0)], "no kick is needed");
}

/// Two sectors that are mapped by different parts of a table, and in different pages of the chain map.
const FAR_APART: [u64; 2] = [0, (40 << 20) / 512];
const LARGE_DISK_BYTES: u64 = 64 << 20;

/// With the first read of `file` hanging, `kind` at one place waits, and everything at the other is done, whatever it is.
fn others_do_not_wait(mut setting: Setting, file: &str, kind: u32, expected: u8) {
    let [here, there] = FAR_APART;
    setting.environment.inject(Fault::once(OperationKind::Read, 0).on(file).with(FaultEffect::Hang));
    // A part of a cluster: what is around it must be read.
    match kind {
        OUT => setting.submit(0, OUT, here + 1, Ok(&[9; 512])),
        _ => setting.submit(0, kind, here, Err(512)),
    }
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [], "kind {kind} needs what hangs");
    setting.submit(1, IN, there, Err(4096));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(1, 0)], "a read elsewhere");
    assert_eq!(setting.driver.read(DATA + SLOT_BYTES + 0x1000, 4096), [expected; 4096]);
    setting.submit(2, OUT, there + 1, Ok(&[7; 512]));
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(2, 0)], "a write elsewhere");
    setting.submit(3, DISCARD, 0, Ok(&range(there + 128, 128, 0)));
    setting.submit(4, WRITE_ZEROES, 0, Ok(&range(there + 256, 8, 1)));
    setting.simulation.run_until_stalled();
    let mut done = setting.completed();
    done.sort_unstable();
    assert_eq!(done, [(3, 0), (4, 0)], "discarding and zeroing elsewhere");
    setting.environment.release_hung();
    setting.simulation.run_until_stalled();
    assert_eq!(setting.completed(), [(0, 0)], "what hung comes back in the end");
    assert_eq!(setting.request(IN, there, Err(1024)), 0);
    assert_eq!(setting.driver.read(DATA + 0x1000, 1024), [[expected; 512], [7; 512]].concat());
    if kind == OUT {
        assert_eq!(setting.request(IN, here, Err(1024)), 0);
        assert_eq!(setting.driver.read(DATA + 0x1000, 1024), [[expected; 512], [9; 512]].concat());
    }
}

#[test]
fn requests_elsewhere_do_not_wait_for_a_mapping_table() {
    let seed = seed();
    for kind in [IN, OUT] {
        let mut simulation = Simulation::new(seed);
        create_qcow2(&mut simulation, "/disk", CreateOptions::standalone(LARGE_DISK_BYTES));
        let layer = open_qcow2(&mut simulation, "/disk");
        let mut setting = Setting::over(simulation, vec![layer]);
        for place in FAR_APART {
            for cluster in 0..3 {
                assert_eq!(setting.request(OUT, place + cluster * 128, Ok(&[1; 8192])), 0);
            }
        }
        assert_eq!(setting.request(FLUSH, 0, Ok(&[])), 0);
        // Nothing is in memory after a start.
        let mut simulation = Simulation::on(setting.environment.crash());
        let layer = open_qcow2(&mut simulation, "/disk");
        others_do_not_wait(Setting::over(simulation, vec![layer]), "/disk", kind, 1);
    }
}

#[test]
fn requests_elsewhere_do_not_wait_for_a_fill_from_below() {
    let mut simulation = Simulation::new(seed());
    simulation.environment().put("/base", &vec![3; LARGE_DISK_BYTES as usize]);
    let base = open_raw(&mut simulation, "/base", Access::Read);
    create_qcow2(&mut simulation, "/overlay", CreateOptions::overlay(LARGE_DISK_BYTES, "/base", "raw"));
    let overlay = open_qcow2(&mut simulation, "/overlay");
    others_do_not_wait(Setting::over(simulation, vec![base, overlay]), "/base", OUT, 3);
}

#[test]
fn memory_is_given_back_when_nothing_in_flight_uses_it() {
    let mut setting = Setting::new(seed(), false);
    setting.environment.inject(Fault::once(OperationKind::Read, 0).with(FaultEffect::Hang));
    setting.submit(0, IN, 0, Err(512));
    setting.simulation.run_until_stalled();
    let before = Arc::downgrade(&setting.driver.mmap);
    // Another table with the ring, but without the request's data.
    let layout: RingLayout = setting.driver.layout;
    let small = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), DATA as usize)]).expect("memory");
    let small = Driver::over(Arc::new(small), layout, 0);
    let changed = setting.queue.set_memory(small.memory());
    setting.simulation.run_until_stalled();
    assert_eq!(changed.try_recv(), Err(TryRecvError::Empty), "the read still uses the old one");
    setting.environment.release_hung();
    setting.simulation.run_until_stalled();
    assert_eq!(changed.try_recv(), Ok(()));
    setting.driver = small;
    assert_eq!(setting.driver.completed().len(), 1, "given back where the ring is now");
    assert!(before.upgrade().is_none(), "nobody holds the old memory");
    // A table without the ring breaks it, and is answered all the same.
    let none = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(1 << 30), 4096)]).expect("memory");
    let changed = setting.queue.set_memory(GuestMemory::new(&Arc::new(none)));
    let paused = setting.queue.disable();
    setting.simulation.run_until_stalled();
    assert_eq!((changed.try_recv(), paused.try_recv()), (Ok(()), Ok(())));
}

#[test]
fn what_is_in_flight_is_limited_in_bytes() {
    let mut setting = Setting::new(seed(), false);
    setting.environment.inject(Fault::lasting(OperationKind::Read, 0).with(FaultEffect::Hang));
    // 1 MiB each: the whole disk, into memory that the requests share.
    let table = DATA + 0x8_0000;
    let big = [readable(DATA, 16), writable(DATA + 0x10_0000, 1 << 20), writable(DATA + 16, 1)];
    setting.driver.write(DATA, &[0; 16]);
    let head = setting.driver.add_indirect(table, &big);
    for _ in 1..200 {
        setting.driver.offer(head);
    }
    setting.awake.set(true);
    setting.simulation.run_until_stalled();
    let reads = setting.environment.counts().get(&OperationKind::Read).copied().unwrap_or_default();
    let stopped = setting.queue.abandon();
    setting.simulation.run_until_stalled();
    let taken = stopped.try_recv().expect("an answer");
    assert!((60..=64).contains(&taken), "{taken} requests of 1 MiB were taken, {reads} reads");
}

#[test]
fn an_idle_thread_holds_up_no_snapshot() {
    let mut setting = Setting::new(seed(), false);
    assert_eq!(setting.request(OUT, 0, Ok(&[1; 4096])), 0);
    create_qcow2(&mut setting.simulation, "/overlay", CreateOptions::overlay(DISK_BYTES, "/disk", "raw"));
    let overlay = open_qcow2(&mut setting.simulation, "/overlay");
    // The thread gets no turn from here on.
    let stack = Arc::clone(setting.device.stack());
    let fence = setting.domain.fence();
    let view = stack.prepare_overlay(overlay, &fence);
    let before = stack.publish(view);
    fence.switch();
    assert_eq!(fence.outcome(), Some(FenceOutcome::Released), "a parked thread has switched already");
    let ended = Rc::new(RefCell::new(None));
    let slot = Rc::clone(&ended);
    setting.simulation.executor().spawn(async move {
        let result = stack.freeze_below(before).await;
        slot.replace(Some(result));
    });
    setting.simulation.run_until_stalled();
    ended.take().expect("nobody holds the old view").expect("a layer that is brought to rest");
    assert_eq!(setting.request(OUT, 0, Ok(&[2; 4096])), 0);
    assert_eq!(setting.environment.bytes("/disk").expect("an image")[..4096], [1; 4096], "the old layer stays");
}

//! A guest with two or three disks of two queues each, and the threads of the daemon that serve them.

use std::cell::{Cell, RefCell};
use std::fmt::Write;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use snapfence_image_format::runtime::Executor;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, SimulatedThread};
use snapfence_image_format::units::SECTOR_BYTES;
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::vring::{InflightLog, RingFeatures, RingLayout};
use snapfenced::worker::{QueueHandle, Start, WorkerHandle};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::driver::{Driver, NEXT, Piece, readable, writable};
use super::model::{End, Model, cluster, filled, range};
use super::queue_thread;
use super::support::Answer;

/// Names of the disks. Not every guest has the last one.
pub(crate) const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 16;
const LAYOUT: RingLayout = RingLayout { size: QUEUE_SIZE, descriptors: 0x1000, available: 0x2000, used: 0x3000 };
/// Requests that a queue has descriptors and memory for.
const SLOTS: u16 = 5;
const SLOTS_AT: u64 = 0x10000;
const SLOT_BYTES: u64 = 0x3000;
const MEMORY_BYTES: usize = 0x40000;
/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// What no device ever writes as a status.
const NO_STATUS: u8 = 0x5a;

/// All that has happened, as one number.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    shown: bool,
}

impl Trace {
    pub(crate) fn new(shown: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, shown }
    }

    pub(crate) fn note(&mut self, what: std::fmt::Arguments<'_>) {
        if self.shown {
            eprintln!("{what}");
        }
        self.write_fmt(what).expect("it takes everything");
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}

impl Write for Trace {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for byte in text.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        Ok(())
    }
}

/// A request under way.
#[derive(Debug)]
enum Request {
    Write(Range<u64>),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Read(Range<u64>),
    Flush(Vec<(u64, usize)>),
}

struct Queue {
    driver: Driver,
    slots: [Option<Request>; SLOTS as usize],
    /// Of the thread that serves it.
    awake: Rc<Cell<bool>>,
}

struct Disk {
    queues: Vec<Queue>,
    log: InflightLog,
    /// Of the daemon that runs.
    handles: Vec<QueueHandle>,
    /// Whether the guest has chosen that writes are durable when they complete.
    write_through: bool,
}

/// What outlives daemons, and power cuts in part.
pub(crate) struct Guest {
    disks: Vec<Disk>,
    pub(crate) model: Model,
    pub(crate) chance: Chance,
    pub(crate) trace: Trace,
    /// Requests that it still wants to make.
    pub(crate) wishes: u32,
    /// Commands whose answers the client has not seen.
    pub(crate) asked: Vec<(String, Answer)>,
    /// Whether a snapshot is asked for and not answered yet.
    pub(crate) awaits_snapshot: bool,
    pub(crate) completed: u64,
    /// Requests that have failed.
    pub(crate) errors: u64,
    /// Whether requests may fail: the disk does.
    pub(crate) disk_fails: bool,
    /// Whether it may have failed since the power was cut last.
    pub(crate) flush_has_failed: bool,
    /// Whether it mostly takes clusters away and writes to others, and seldom flushes.
    pub(crate) churns: bool,
}

fn new_disk(chance: &mut Chance) -> Disk {
    // Indices wrap round soon, or late.
    let first = if chance.happens(1, 2) { 0 } else { u16::MAX - u16::try_from(chance.below(24)).expect("few") };
    let limits = (QUEUES, QUEUE_SIZE);
    let (layout, file) = InflightLog::create(QUEUES, QUEUE_SIZE, limits).expect("memory");
    let queue = |_| {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("anonymous memory");
        Queue { driver: Driver::over(Arc::new(memory), LAYOUT, first), slots: Default::default(), awake: Rc::default() }
    };
    let log = InflightLog::map(layout, file.into(), limits).expect("just made");
    Disk { queues: (0..QUEUES).map(queue).collect(), log, handles: Vec::new(), write_through: chance.happens(1, 4) }
}

impl Guest {
    pub(crate) fn new(disks: usize, seed: u64, shown: bool) -> Self {
        let mut chance = Chance::new(seed ^ 0x9_0e57);
        Self {
            disks: (0..disks).map(|_| new_disk(&mut chance)).collect(),
            model: Model::new(disks),
            chance,
            trace: Trace::new(shown),
            wishes: 0,
            asked: Vec::new(),
            awaits_snapshot: false,
            completed: 0,
            errors: 0,
            disk_fails: false,
            flush_has_failed: false,
            churns: false,
        }
    }

    /// The machine of the guest is gone, and comes again.
    pub(crate) fn power_cut(&mut self) {
        self.daemon_gone();
        self.disks = (0..self.disks.len()).map(|_| new_disk(&mut self.chance)).collect();
    }

    /// The daemon is gone. The guest sees nothing of that, and finds what has come back before.
    pub(crate) fn killed(&mut self) {
        for disk in 0..self.disks.len() {
            (0..usize::from(QUEUES)).for_each(|queue| self.reap(disk, queue));
        }
        self.daemon_gone();
    }

    fn daemon_gone(&mut self) {
        self.asked.clear();
        self.awaits_snapshot = false;
        self.model.daemon_gone();
        for disk in &mut self.disks {
            disk.handles.clear();
        }
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.disks.iter().flat_map(|disk| &disk.queues)
    }

    /// Whether nothing is under way and nothing wanted.
    pub(crate) fn is_done(&self) -> bool {
        self.wishes == 0 && self.queues().all(|queue| queue.slots.iter().all(Option::is_none))
    }

    fn has_work(&self) -> bool {
        let in_flight = |queue: &Queue| queue.slots.iter().flatten().count();
        let come_back = |queue: &Queue| in_flight(queue) > usize::from(queue.driver.outstanding());
        self.queues().any(|queue| come_back(queue) || self.wishes > 0 && in_flight(queue) < usize::from(SLOTS))
    }

    /// Looks at a queue, and perhaps asks for something there.
    fn turn(&mut self) {
        let (disk, queue) = (self.chance.index(self.disks.len()), self.chance.index(usize::from(QUEUES)));
        self.reap(disk, queue);
        let answered = self.asked.iter().filter(|(_, answer)| answer.is_there()).map(|(name, _)| name.clone()).collect::<Vec<_>>();
        for name in &answered {
            self.model.answered(name);
        }
        self.asked.retain(|(name, _)| !answered.contains(name));
        if self.wishes > 0 {
            self.submit(disk, queue);
        }
    }

    fn reap(&mut self, disk: usize, number: usize) {
        let write_through = self.disks[disk].write_through;
        let complete = if write_through { End::Durable } else { End::Complete };
        let queue = &mut self.disks[disk].queues[number];
        for used in queue.driver.completed() {
            let slot = used.head / 3;
            let request = queue.slots[usize::from(slot)].take().expect("what comes back is under way, and comes once");
            let at = SLOTS_AT + u64::from(slot) * SLOT_BYTES;
            let status = queue.driver.read(at + 16, 1)[0];
            // Of flushes that failed before the guest is told when it flushes, or writes what is made durable at once.
            let is_told = self.flush_has_failed && (write_through || matches!(request, Request::Flush(_)));
            assert!(status == 0 || status == 1 && (self.disk_fails || is_told), "{request:?} of disk {disk} ends with {status}");
            self.trace.note(format_args!("{disk}.{number}: done {request:?}, {status}"));
            self.completed += 1;
            if status != 0 {
                self.errors += 1;
                match request {
                    Request::Write(sectors) | Request::Zero(sectors) | Request::Discard(sectors) => {
                        self.model.change_completed(disk, sectors, End::Unknown);
                    }
                    Request::Flush(_) => self.model.may_have_lost(disk),
                    Request::Read(_) => {}
                }
                continue;
            }
            match request {
                Request::Write(sectors) | Request::Zero(sectors) => self.model.change_completed(disk, sectors, complete),
                // The blocks may keep what is in them.
                Request::Discard(sectors) => self.model.change_completed(disk, sectors, End::Unknown),
                Request::Flush(covered) => self.model.flush_completed(disk, covered),
                Request::Read(sectors) => {
                    let len = usize::try_from((sectors.end - sectors.start) * SECTOR_BYTES).expect("small");
                    self.model.read_completed(disk, sectors, &queue.driver.read(at + 0x1000, len));
                }
            }
        }
    }

    /// Whether a request to these sectors would meet another one, reads among themselves excepted.
    fn is_taken(&self, disk: usize, sectors: &Range<u64>, for_reading: bool) -> bool {
        let meets = |other: &Range<u64>| other.start < sectors.end && sectors.start < other.end;
        self.disks[disk].queues.iter().flat_map(|queue| queue.slots.iter().flatten()).any(|request| match request {
            Request::Write(other) | Request::Zero(other) | Request::Discard(other) => meets(other),
            Request::Read(other) => !for_reading && meets(other),
            Request::Flush(_) => false,
        })
    }

    fn submit(&mut self, disk: usize, number: usize) {
        let Some(slot) = self.disks[disk].queues[number].slots.iter().position(Option::is_none) else { return };
        let [writes, reads, discards, zeros] = if self.churns { [7, 8, 12, 15] } else { [8, 11, 12, 14] };
        let kind = match self.chance.below(16) {
            kind if kind < writes => OUT,
            kind if kind < reads => IN,
            kind if kind < discards => DISCARD,
            kind if kind < zeros => WRITE_ZEROES,
            _ => FLUSH,
        };
        let sectors = if matches!(kind, DISCARD | WRITE_ZEROES) && self.chance.happens(1 + 2 * u64::from(self.churns), 4) {
            cluster(self.chance.below(64))
        } else {
            range(self.chance.index(3), self.chance.below(64), 1 + self.chance.below(8))
        };
        if kind != FLUSH && self.is_taken(disk, &sectors, kind == IN) {
            return;
        }
        self.wishes -= 1;
        let at = SLOTS_AT + slot as u64 * SLOT_BYTES;
        let (first, count) = (sectors.start, sectors.end - sectors.start);
        let len = u32::try_from(count * SECTOR_BYTES).expect("small");
        let driver = &mut self.disks[disk].queues[number].driver;
        let (data, request) = match kind {
            OUT => {
                let id = self.model.write_submitted(disk, sectors.clone());
                driver.write(at + 0x1000, &filled(id, count));
                self.trace.note(format_args!("{disk}.{number}: write {id} to {sectors:?}"));
                (Some(readable(at + 0x1000, len)), Request::Write(sectors))
            }
            IN => (Some(writable(at + 0x1000, len)), Request::Read(sectors)),
            DISCARD | WRITE_ZEROES => {
                self.model.zeros_submitted(disk, sectors.clone());
                let unmap = u32::from(kind == WRITE_ZEROES && self.chance.happens(1, 2));
                let count = u32::try_from(count).expect("small");
                driver.write(at + 0x1000, &[&first.to_le_bytes()[..], &count.to_le_bytes(), &unmap.to_le_bytes()].concat());
                let request = if kind == DISCARD { Request::Discard } else { Request::Zero };
                (Some(readable(at + 0x1000, 16)), request(sectors))
            }
            _ => (None, Request::Flush(self.model.flush_submitted(disk))),
        };
        self.trace.note(format_args!("{disk}.{number}: submit {request:?}"));
        let first = if matches!(kind, IN | OUT) { first } else { 0 };
        driver.write(at, &[&kind.to_le_bytes()[..], &[0; 4], &first.to_le_bytes()].concat());
        driver.write(at + 16, &[NO_STATUS]);
        let pieces: Vec<Piece> = [Some(readable(at, 16)), data, Some(writable(at + 16, 1))].into_iter().flatten().collect();
        let head = u16::try_from(slot).expect("few") * 3;
        for (index, &piece) in (head..).zip(&pieces) {
            let flags = if usize::from(index - head) + 1 < pieces.len() { NEXT } else { 0 };
            driver.descriptor(LAYOUT.descriptors, index, piece, flags, index + 1);
        }
        driver.offer(head);
        let queue = &mut self.disks[disk].queues[number];
        queue.slots[slot] = Some(request);
        queue.awake.set(true);
    }
}

/// The guest's processor, for as long as there is a daemon.
pub(crate) struct Processor(pub(crate) Rc<RefCell<Guest>>, pub(crate) SimulatedEnvironment);

impl SimulatedThread for Processor {
    fn has_work(&self) -> bool {
        !self.1.is_stopped() && self.0.borrow().has_work()
    }

    fn turn(&mut self) {
        self.0.borrow_mut().turn();
    }
}

/// As [`Processor`], in the middle of a turn of another thread.
pub(crate) fn guest_turn(guest: &Rc<RefCell<Guest>>) {
    if let Ok(mut guest) = guest.try_borrow_mut()
        && guest.has_work()
    {
        guest.turn();
    }
}

/// The daemon's control thread.
#[derive(Clone)]
pub(crate) struct ControlThread {
    executor: Executor,
    environment: SimulatedEnvironment,
    is_running: Rc<Cell<bool>>,
    /// Turns that it does not have, although it has work.
    held_up: Rc<Cell<u64>>,
}

impl ControlThread {
    pub(crate) fn new(executor: Executor, environment: SimulatedEnvironment) -> Self {
        let (is_running, held_up) = Default::default();
        Self { executor, environment, is_running, held_up }
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.executor.spawn(task);
    }

    /// Takes its next turns from it.
    pub(crate) fn hold_up(&self, turns: u64) {
        self.held_up.set(turns);
    }

    /// Has a turn in the middle of one of another thread, if there is something to do.
    pub(crate) fn turn_if_free(&self) {
        if !self.is_running.get() && self.has_work() {
            self.clone().turn();
        }
    }
}

impl SimulatedThread for ControlThread {
    fn has_work(&self) -> bool {
        !self.environment.is_stopped() && self.executor.has_ready()
    }

    fn turn(&mut self) {
        if self.held_up.get() > 0 {
            self.held_up.set(self.held_up.get() - 1);
            return;
        }
        self.is_running.set(true);
        self.executor.run_ready();
        self.is_running.set(false);
    }
}

/// A queue thread of the daemon that begins with the first device, and is held up at times.
#[derive(Clone)]
pub(crate) struct QueueThread {
    executor: Executor,
    environment: SimulatedEnvironment,
    /// Whether there is something to do: a kick, or what the last turn has left.
    awake: Rc<Cell<bool>>,
    /// Borrowed while it has a turn.
    thread: Rc<RefCell<Option<queue_thread::QueueThread>>>,
    worker: Rc<RefCell<Option<WorkerHandle<SimulatedEnvironment>>>>,
    /// Turns that it does not have, although it has work and has loaded its views.
    held_up: Rc<Cell<u64>>,
    busy: Rc<Cell<bool>>,
    chance: Rc<RefCell<Chance>>,
}

/// Turns for which a thread is held up, at most.
const MOST_HELD_UP: u64 = 48;

impl QueueThread {
    pub(crate) fn new(executor: Executor, environment: SimulatedEnvironment, chance: Chance) -> Self {
        let (awake, thread, worker, held_up, busy) = Default::default();
        Self { executor, environment, awake, thread, worker, held_up, busy, chance: Rc::new(RefCell::new(chance)) }
    }

    /// Has a turn in the middle of one of another thread, if there is something to do.
    pub(crate) fn turn_if_free(&self) {
        if self.thread.try_borrow_mut().is_ok() && self.has_work() {
            self.clone().turn();
        }
    }

    /// As that, even if it was to be held up.
    pub(crate) fn turn_at_once(&self) {
        self.held_up.set(0);
        self.turn_if_free();
    }

    /// Whether its last turn has left work: it is not parked, and keeps its views.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.get()
    }

    fn attach(&self, device: &Arc<Device<SimulatedEnvironment>>, index: u16, domain: &Arc<FenceDomain>) -> QueueHandle {
        let mut worker = self.worker.borrow_mut();
        let worker = worker.get_or_insert_with(|| {
            let (thread, worker) = queue_thread::QueueThread::new(self.executor.clone(), domain, &self.awake);
            *self.thread.borrow_mut() = Some(thread);
            worker
        });
        self.awake.set(true);
        worker.attach(device, index)
    }
}

impl SimulatedThread for QueueThread {
    fn has_work(&self) -> bool {
        !self.environment.is_stopped() && self.thread.borrow().as_ref().is_some_and(SimulatedThread::has_work)
    }

    fn turn(&mut self) {
        if self.held_up.get() > 0 {
            self.held_up.set(self.held_up.get() - 1);
            return;
        }
        self.thread.borrow_mut().as_mut().expect("it has work").turn();
        let is_busy = self.awake.get();
        self.busy.set(is_busy);
        let chance = &mut *self.chance.borrow_mut();
        if is_busy && chance.happens(1, 2) {
            self.held_up.set(chance.below(MOST_HELD_UP));
        }
    }
}

/// Runs the rings of a device that the daemon begins to serve, each on a thread of its own.
pub(crate) fn serve(
    guest: &Rc<RefCell<Guest>>,
    threads: &[QueueThread],
    options: &snapfenced::options::DeviceOptions,
    stack: &Arc<Stack<SimulatedEnvironment>>,
    domain: &Arc<FenceDomain>,
) {
    let number = DISKS.iter().position(|disk| *disk == options.name).expect("a disk of the guest");
    let shown = DeviceOptions {
        name: options.name.clone(),
        serial: options.serial.clone(),
        read_only: options.read_only,
        queues: QUEUES,
        queue_size: QUEUE_SIZE,
        on_no_space: options.on_no_space,
    };
    let device = Device::new(shown, Arc::clone(stack)).expect("good options");
    // What the driver of a guest with a write-back cache accepts: FLUSH, CONFIG_WCE.
    device.cache().set_features(1 << 9 | 1 << 11);
    let disk = &mut guest.borrow_mut().disks[number];
    device.cache().set_write_back(!disk.write_through);
    for (index, queue) in (0..QUEUES).zip(&mut disk.queues) {
        let thread = &threads[usize::from(index) % threads.len()];
        let handle = thread.attach(&device, index, domain);
        queue.awake = Rc::clone(&thread.awake);
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let _started = handle.start(Start {
            layout: LAYOUT,
            features: RingFeatures { event_idx: false, indirect: true },
            base: queue.driver.used_index(),
            memory: queue.driver.memory(),
            record: disk.log.queue(index),
            kick: kick.try_into().expect("an eventfd"),
            call: None,
            error: None,
            enabled: true,
        });
        disk.handles.push(handle);
    }
}

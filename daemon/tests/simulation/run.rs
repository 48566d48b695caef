//! One run: lives of a daemon, each ended by a power cut or a kill, but for the last, which ends well.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::{CheckOptions, CreateOptions, check};
use snapfence_image_format::storage::kept::TestKeeper;
use snapfence_image_format::storage::simulated::{
    Fault, FaultEffect, FileContent, Moment, MomentWatch, OperationKind, SimulatedEnvironment, Simulation,
};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location};
use snapfence_image_format::units::SECTOR_BYTES;

use super::guest::{ControlThread, DISKS, Guest, Processor, QueueThread, serve};
use super::interrupt::{End, Others, Watched, interrupt_turns};
use super::model::SECTORS;
use super::support::{CatalogueFile, FOLDER, OnServe, World};

/// Turns of all threads and the disk, at most, before a daemon is ended.
const MOST_STEPS: u64 = 4000;
/// Snapshots in one life, at most.
const MOST_ROUNDS: u64 = 4;
/// Requests of the guest before each, less four.
const MOST_WISHES: u64 = 12;
/// How often the guest has more wishes while a snapshot is being taken.
const MOST_MEANWHILE: u32 = 16;
/// Turns of that after which a snapshot is cancelled, at most.
const MOST_BEFORE_CANCEL: u64 = 4;
/// Turns after a switch at which a daemon may be ended.
const AFTER_SWITCH: u64 = 100;
/// Microseconds before each.
const MOST_NAP: u64 = 2000;
/// Operations that a disk does before it fails, at most.
const MOST_GOOD: u64 = 60;
/// Operations before one hangs, and microseconds until it goes on, at most.
const MOST_BEFORE_HANG: u64 = 40;
const MOST_HANG: u64 = 20_000;
/// Halves of syncs of the catalogue, and operations on the disk, after which a daemon ends in the midst of a turn, at most.
const MOST_SYNCS: u64 = 60;
const MOST_OPERATIONS: u64 = 600;
/// The same halves from a switch on.
const MOST_SYNCS_AFTER_SWITCH: u64 = 8;

/// How often a queue thread is brought to work before a switch, in one life.
const MOST_DELAYS: u32 = 6;

/// What one run has come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Of everything that has happened.
    pub(crate) trace: u64,
    pub(crate) requests: u64,
    pub(crate) frozen: u64,
    /// Why snapshots have failed, and how often.
    pub(crate) failed: BTreeMap<String, u64>,
    pub(crate) power_cuts: u64,
    pub(crate) kills: u64,
    pub(crate) simulated: Duration,
    /// Requests that have failed because the disk has.
    pub(crate) errors: u64,
}

/// What is there between daemons.
struct Run {
    guest: Rc<RefCell<Guest>>,
    catalogue: CatalogueFile,
    keeper: Arc<TestKeeper>,
    /// Which disks are qcow2 images; as many as there are disks.
    qcow2: Vec<bool>,
    /// Whether a power cut has taken from the disks what the model still has.
    unsettled: Rc<Cell<bool>>,
    /// Oracle 5: what is in frozen layers.
    layers: Rc<RefCell<BTreeMap<String, FileContent>>>,
    snapshots: Rc<Cell<u32>>,
    failed: Rc<RefCell<BTreeMap<String, u64>>>,
}

/// A daemon's threads.
struct Threads {
    simulation: Simulation,
    control: ControlThread,
    _interruptions: MomentWatch,
    watched: Rc<Watched>,
}

impl Threads {
    /// Runs what must end on the control thread.
    fn block_on(&mut self, future: impl Future<Output = ()> + 'static) {
        let has_ended = Rc::new(Cell::new(false));
        let ended = Rc::clone(&has_ended);
        self.control.spawn(async move {
            future.await;
            ended.set(true);
        });
        while !has_ended.get() {
            assert!(self.simulation.step(), "deadlock, nothing can go on");
        }
    }
}

/// One life of a daemon, as its control thread needs it.
#[derive(Clone)]
struct Life {
    world: World,
    guest: Rc<RefCell<Guest>>,
    qcow2: Vec<bool>,
    unsettled: Rc<Cell<bool>>,
    layers: Rc<RefCell<BTreeMap<String, FileContent>>>,
    snapshots: Rc<Cell<u32>>,
    failed: Rc<RefCell<BTreeMap<String, u64>>>,
}

fn job_of(snapshot: u32) -> String {
    format!("j{snapshot}")
}

/// Why something failed without what is different every time: names, paths, numbers.
fn kind_of(why: &str) -> String {
    let word =
        |word: &str| if word.contains(|c: char| c.is_ascii_digit() || "/'".contains(c)) { "…".to_owned() } else { word.to_owned() };
    why.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

fn image(disk: usize, qcow2: bool) -> String {
    format!("{FOLDER}/{}.{}", DISKS[disk], if qcow2 { "qcow2" } else { "raw" })
}

fn format_of(path: &str) -> Format {
    if path.ends_with(".raw") { Format::Raw } else { Format::Qcow2 }
}

impl Life {
    async fn create(&self) {
        for (disk, &qcow2) in self.qcow2.iter().enumerate() {
            let path = image(disk, qcow2);
            if qcow2 {
                self.world.create(&path, &CreateOptions::standalone(SECTORS * SECTOR_BYTES)).await;
            } else {
                self.world.environment.put(&path, &vec![0; usize::try_from(SECTORS * SECTOR_BYTES).expect("small")]);
            }
        }
    }

    /// Recovery, and then so many snapshots while the guest goes on, perhaps with a disk that `fails`. What a failed flush has lost can be seen
    /// until the power is cut.
    async fn live(self, rounds: u64, looks: bool, fails: bool) {
        self.world.manager.recover().await.unwrap_or_else(|error| panic!("recovery: {error}"));
        for (disk, &qcow2) in self.qcow2.iter().enumerate() {
            let (name, path, format) = (DISKS[disk], image(disk, qcow2), if qcow2 { "qcow2" } else { "raw" });
            let specification = format!("name={name},image={path},format={format},socket=/run/{name},queues=2,queue-size=16");
            self.world.serve(&specification).await.unwrap_or_else(|error| panic!("{error}"));
        }
        self.look_at_snapshots(looks).await;
        if self.unsettled.get() {
            self.settle().await;
        }
        if fails {
            self.let_disk_fail();
        }
        for _ in 0..rounds {
            let nap = {
                let guest = &mut *self.guest.borrow_mut();
                guest.wishes += 4 + u32::try_from(guest.chance.below(MOST_WISHES)).expect("few");
                Duration::from_micros(guest.chance.below(MOST_NAP))
            };
            let is_full = self.guest.borrow_mut().chance.happens(1, 8);
            if is_full {
                self.world.environment.set_space_limit(Some(0));
            }
            self.world.environment.sleep_until(self.world.environment.now() + nap).await;
            if !fails {
                self.let_something_hang();
            }
            self.snapshot(is_full).await;
            self.world.environment.set_space_limit(None);
        }
        while !self.guest.borrow().is_done() {
            self.world.pause().await;
        }
    }

    fn let_disk_fail(&self) {
        let guest = &mut *self.guest.borrow_mut();
        let chance = &mut guest.chance;
        let kind = [OperationKind::Write, OperationKind::Read, OperationKind::Flush, OperationKind::Flush][chance.index(4)];
        let after = chance.below(MOST_GOOD);
        let fault = if chance.happens(2, 3) { Fault::once(kind, after) } else { Fault::lasting(kind, after) };
        guest.trace.note(format_args!("the disk will fail: {fault:?}"));
        guest.disk_fails = true;
        self.world.environment.inject(fault);
    }

    /// Now and then an operation hangs for a while, so that others overtake it that come much later.
    fn let_something_hang(&self) {
        let chance = &mut self.guest.borrow_mut().chance;
        if chance.happens(2, 3) {
            return;
        }
        let kind = [OperationKind::Write, OperationKind::Write, OperationKind::Read, OperationKind::Flush][chance.index(4)];
        let environment = self.world.environment.clone();
        environment.inject(Fault::once(kind, chance.below(MOST_BEFORE_HANG)).with(FaultEffect::Hang));
        let until = environment.now() + Duration::from_micros(chance.below(MOST_HANG));
        environment.clone().spawn(async move {
            environment.sleep_until(until).await;
            environment.clear_faults();
            environment.release_hung();
        });
    }

    async fn settle(&self) {
        let mut found = Vec::new();
        for disk in &DISKS[..self.qcow2.len()] {
            let view = self.world.manager.device(disk).expect("a device").stack.view();
            let room = snapfence_image_format::buffer::AlignedBuffer::zeroed(usize::try_from(SECTORS * SECTOR_BYTES).expect("small"));
            let (result, buffer) = view.read(snapfence_image_format::units::GuestOffset::ZERO, room.into()).await;
            result.expect("readable");
            found.push(buffer.into_owned());
        }
        let guest = &mut *self.guest.borrow_mut();
        for (disk, bytes) in found.iter().enumerate() {
            guest.model.settle(disk, bytes);
        }
        self.unsettled.set(false);
        guest.trace.note(format_args!("settled"));
    }

    /// With a disk that is full nothing that needs space goes on: the answer shall come nevertheless.
    async fn snapshot(&self, is_full: bool) {
        let number = self.snapshots.get() + 1;
        self.snapshots.set(number);
        let name = format!("s{number}");
        let members = self.members();
        let deadline_ms = if self.guest.borrow_mut().chance.happens(1, 8) { 1 } else { 10_000 };
        let devices: Vec<Value> = members.iter().map(|disk| json!({ "device": DISKS[*disk] })).collect();
        let answer = {
            let guest = &mut *self.guest.borrow_mut();
            guest.trace.note(format_args!("{name} of {members:?} is asked for"));
            guest.model.asked(&name, members);
            let arguments = json!({ "name": name, "devices": devices, "deadline-ms": deadline_ms, "job-id": job_of(number) });
            let answer = self.world.begin("snapshot-create", arguments);
            guest.asked.push((name.clone(), answer.clone()));
            guest.awaits_snapshot = true;
            answer
        };
        let mut cancelled_at = {
            let chance = &mut self.guest.borrow_mut().chance;
            chance.happens(1, 12).then(|| u32::try_from(chance.below(MOST_BEFORE_CANCEL)).expect("few"))
        };
        let mut is_cancelled = None;
        // The guest is busy meanwhile.
        for turn in 0..MOST_MEANWHILE {
            if cancelled_at.take_if(|at| *at <= turn).is_some() {
                is_cancelled = Some(self.world.begin("job-cancel", json!({ "id": job_of(number) })));
            }
            if answer.is_there() {
                break;
            }
            let nap = {
                let guest = &mut *self.guest.borrow_mut();
                guest.wishes += u32::try_from(guest.chance.below(5)).expect("few");
                Duration::from_micros(guest.chance.below(MOST_NAP))
            };
            self.world.environment.sleep_until(self.world.environment.now() + nap).await;
        }
        let answered = answer.wait().await;
        {
            let guest = &mut *self.guest.borrow_mut();
            guest.awaits_snapshot = false;
            guest.model.answered(&name);
        }
        if is_full {
            self.world.environment.set_space_limit(None);
        }
        let is_cancelled = match is_cancelled {
            Some(answer) => answer.wait().await.is_ok(),
            None => false,
        };
        if let Err(failure) = answered {
            self.has_failed(&name, &failure.desc);
            return;
        }
        let info = self.world.settled(&name).await;
        assert!(!is_cancelled || info["state"] == "failed", "{name} was cancelled, and is {}", info["state"]);
        if info["state"] == "frozen" {
            // Whoever looks has no disk that fails.
            self.world.environment.clear_faults();
            self.look_at(&name, &info).await;
        } else {
            self.has_failed(&name, info["error"].as_str().expect("why"));
        }
        self.guest.borrow_mut().trace.note(format_args!("{name} is {}", info["state"]));
    }

    /// All disks mostly, or some of them.
    fn members(&self) -> Vec<usize> {
        let chance = &mut self.guest.borrow_mut().chance;
        let all = 0..self.qcow2.len();
        if chance.happens(1, 3) {
            let some: Vec<usize> = all.clone().filter(|_| chance.happens(1, 2)).collect();
            if !some.is_empty() {
                return some;
            }
        }
        all.collect()
    }

    fn has_failed(&self, name: &str, why: &str) {
        self.guest.borrow_mut().trace.note(format_args!("{name}: {why}"));
        *self.failed.borrow_mut().entry(kind_of(why)).or_default() += 1;
    }

    async fn look_at(&self, name: &str, info: &Value) {
        let mut members = Vec::new();
        for member in info["devices"].as_array().expect("a list") {
            let layer = member["frozen_layer"].as_str().expect("a path");
            let disk = DISKS.iter().position(|disk| member["device"] == *disk).expect("a disk");
            members.push((disk, self.world.read_file_bytes(layer, format_of(layer), SECTORS * SECTOR_BYTES).await));
            let content = self.world.environment.content(layer).expect("a file");
            let mut layers = self.layers.borrow_mut();
            let before = layers.entry(layer.to_owned()).or_insert_with(|| content.clone());
            assert!(*before == content, "{layer} has changed since {name} was frozen");
        }
        self.guest.borrow_mut().model.look_at(name, members);
    }

    /// After a start, and at the end: what was frozen is so, and what it was.
    async fn look_at_snapshots(&self, all: bool) {
        let listed = self.world.done("snapshot-list", json!({})).await;
        let mut missing = self.guest.borrow().model.frozen();
        for info in listed.as_array().expect("a list") {
            let name = info["name"].as_str().expect("a name");
            let info = self.world.settled(name).await;
            if info["state"] == "frozen" {
                let seen = missing.remove(name);
                if all || !seen {
                    self.look_at(name, &info).await;
                }
            }
        }
        assert!(missing.is_empty(), "these were frozen and are not: {missing:?}");
    }

    /// Everything is looked at, the daemon stops, and oracle 6 has the images.
    async fn end(self) {
        self.look_at_snapshots(true).await;
        self.world.manager.stop().await.expect("everything is durable");
        let environment = &self.world.environment;
        for path in environment.files() {
            let is_image = path.extension().is_some_and(|extension| extension == "qcow2");
            if !is_image || path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            if environment.content(&path).expect("a file").is_empty() {
                continue; // An overlay that was being made.
            }
            check_image(environment, &path).await;
        }
    }
}

async fn check_image(environment: &SimulatedEnvironment, path: &Path) {
    let file = environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Direct).await.expect("a file");
    let report = check(&file, &CheckOptions::default()).await.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!((report.corruptions, report.contradictions), (0, 0), "{}: {:?}", path.display(), report.findings);
}

impl Run {
    /// A daemon and the guest on this disk. It ends at `end`, if that comes.
    fn begin(&self, environment: SimulatedEnvironment, end: Option<End>) -> (Threads, Life) {
        let mut simulation = Simulation::on(environment.clone());
        let control = ControlThread::new(simulation.new_executor(), environment.clone());
        simulation.add_thread(control.clone());
        let queue_thread = |number| {
            let chance = Chance::new(environment.seed() ^ number);
            QueueThread::new(simulation.new_executor(), environment.clone(), chance)
        };
        let threads: Vec<QueueThread> = (0..2).map(queue_thread).collect();
        for thread in &threads {
            simulation.add_thread(thread.clone());
        }
        simulation.add_thread(Processor(Rc::clone(&self.guest), environment.clone()));
        let (guest, watched) = (Rc::clone(&self.guest), Rc::<Watched>::default());
        let others = Others {
            environment: environment.clone(),
            catalogue: self.catalogue.clone(),
            control: control.clone(),
            threads: threads.clone(),
            guest: Rc::downgrade(&self.guest),
            watched: Rc::clone(&watched),
            end: RefCell::new(end),
            delays: Cell::new(MOST_DELAYS),
        };
        let seen = Rc::clone(&watched);
        let on_serve: OnServe = Rc::new(move |options, stack, domain| {
            seen.add(stack);
            serve(&guest, &threads, options, stack, domain);
        });
        let world = World::start_with(environment, self.catalogue.clone(), &[], Arc::clone(&self.keeper), Some(on_serve));
        let life = Life {
            world,
            guest: Rc::clone(&self.guest),
            qcow2: self.qcow2.clone(),
            unsettled: Rc::clone(&self.unsettled),
            layers: Rc::clone(&self.layers),
            snapshots: Rc::clone(&self.snapshots),
            failed: Rc::clone(&self.failed),
        };
        (Threads { simulation, control, _interruptions: interrupt_turns(others), watched }, life)
    }
}

/// Whether a daemon ends in the midst of a turn, and where.
fn end_in_turn(chance: &mut Chance) -> Option<End> {
    let (at, most, after_switch) = match chance.below(6) {
        0 => (Moment::Elsewhere, MOST_SYNCS, false),
        1 => (Moment::Operation, MOST_OPERATIONS, false),
        2 => (Moment::Elsewhere, MOST_SYNCS_AFTER_SWITCH, true),
        _ => return None,
    };
    Some(End { at, after: chance.below(most), after_switch })
}

/// Runs a seed to its end.
pub(crate) fn run(seed: u64, shown: bool) -> Outcome {
    let mut chance = Chance::new(seed);
    let disks = if chance.happens(1, 3) { 3 } else { 2 };
    let mut run = Run {
        guest: Rc::new(RefCell::new(Guest::new(disks, seed, shown))),
        catalogue: CatalogueFile::default(),
        keeper: Arc::default(),
        qcow2: (0..disks).map(|_| chance.happens(2, 3)).collect(),
        unsettled: Rc::default(),
        layers: Rc::default(),
        snapshots: Rc::default(),
        failed: Rc::default(),
    };
    let mut outcome = Outcome::default();
    let mut environment = SimulatedEnvironment::new(chance.number());
    {
        let (mut threads, life) = run.begin(environment.clone(), None);
        threads.block_on(async move { life.create().await });
    }
    for _ in 0..1 + chance.below(2) {
        let end = end_in_turn(&mut chance);
        let ends_after_switch = end.as_ref().is_some_and(|end| end.after_switch);
        let (mut threads, life) = run.begin(environment.clone(), end);
        let fails = chance.happens(1, 4);
        run.guest.borrow_mut().churns = chance.happens(1, 3);
        threads.control.spawn(life.live(1 + chance.below(MOST_ROUNDS), false, fails));
        // Now and then in the middle of the recovery.
        let most = if chance.happens(1, 4) { MOST_STEPS / 10 } else { MOST_STEPS };
        let mut steps = chance.below(most);
        // Or soon after a switch.
        let last_switch = chance.happens(1, 3).then(|| chance.below(2));
        let after_switch = chance.below(AFTER_SWITCH);
        if last_switch.is_some() || ends_after_switch {
            steps = MOST_STEPS;
        }
        while steps > 0 && threads.simulation.step() {
            steps -= 1;
            if last_switch.is_some_and(|last| threads.watched.switches() > last) {
                steps = steps.min(after_switch);
            }
        }
        // That a flush has failed nobody can know who is killed before the answer is there.
        let disk_fails = run.guest.borrow().disk_fails;
        let is_power_cut = chance.happens(1, 2) || disk_fails && chance.happens(1, 2) || environment.has_untold_failure();
        environment = if is_power_cut { environment.crash() } else { environment.killed() };
        // Not before: a process that ends so does not drop its tasks.
        drop(threads);
        let guest = &mut *run.guest.borrow_mut();
        guest.wishes = 0;
        if is_power_cut {
            run.catalogue = run.catalogue.after_power_cut();
            run.keeper.forget();
            guest.power_cut();
            run.unsettled.set(true);
            outcome.power_cuts += 1;
        } else {
            run.catalogue = run.catalogue.after_kill();
            guest.killed();
            outcome.kills += 1;
        }
        guest.flush_has_failed = !is_power_cut && (guest.flush_has_failed || disk_fails);
        guest.disk_fails = false;
        guest.trace.note(format_args!("the daemon is gone; unsettled {}, at {:?}", run.unsettled.get(), environment.now()));
    }
    let (mut threads, life) = run.begin(environment.clone(), None);
    threads.block_on(async move {
        life.clone().live(1, true, false).await;
        life.end().await;
    });
    let guest = run.guest.borrow();
    outcome.trace = guest.trace.hash();
    (outcome.requests, outcome.errors) = (guest.completed, guest.errors);
    outcome.frozen = guest.model.frozen().len() as u64;
    outcome.failed = run.failed.take();
    outcome.simulated = environment.now();
    outcome
}

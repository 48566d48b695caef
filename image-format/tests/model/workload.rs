//! One disk, its clients, and crashes at every step.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, Simulation};
use snapfence_image_format::units::GuestOffset;

use crate::clients::{Shared, client};
use crate::disk::{Disk, Subject};
use crate::history::{Clock, History};
use crate::journal::Journal;
use crate::pattern::{SECTOR, Value};

/// How much is done, and what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Everything follows from it.
    pub(crate) seed: u64,
    /// Size of the disk.
    pub(crate) sectors: u64,
    /// Clients at the same time.
    pub(crate) clients: u64,
    /// Threads that they are spread over.
    pub(crate) threads: usize,
    /// Operations of each client.
    pub(crate) operations: u64,
    /// A crash is tried after one in so many effects; 0: never.
    pub(crate) crash_every: u64,
    /// How many states that it may leave are looked at.
    pub(crate) crash_states: u64,
    /// One in so many of those states is used further, and crashes again.
    pub(crate) second_crash_every: u64,
    /// Other programs look at one in so many of those states; 0: at none.
    pub(crate) check_every: u64,
}

impl Plan {
    /// Mostly short histories that are cut now and then, some that are cut at every effect, and some long ones.
    pub(crate) fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x91a4);
        // Sizes that are no multiple of what images are made of, too.
        let sectors = [512, 512, 333, 1024, 129][chance.index(5)];
        let (threads, clients) = (1 + chance.index(2), 1 + chance.below(4));
        let plan = Self {
            seed,
            sectors,
            clients,
            threads,
            operations: 4,
            crash_every: 96,
            crash_states: 2,
            second_crash_every: 16,
            check_every: 64,
        };
        match chance.below(64) {
            0..2 => Self { crash_every: 1, ..plan },
            2..8 => Self { operations: 40, crash_every: 256, crash_states: 4, ..plan },
            _ => plan,
        }
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    /// Operations that succeeded.
    pub(crate) operations: u64,
    /// Operations that failed.
    pub(crate) failures: u64,
    /// States after a crash that were opened and compared.
    pub(crate) crash_states: u64,
    /// Images that other programs have checked.
    pub(crate) checks: u64,
    /// Snapshots that were compared.
    pub(crate) snapshots: u64,
    /// Tells whether two runs did the same, operation by operation.
    pub(crate) fingerprint: u64,
}

impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.failures += other.failures;
        self.crash_states += other.crash_states;
        self.checks += other.checks;
        self.snapshots += other.snapshots;
        self.fingerprint ^= other.fingerprint;
    }
}

/// Runs a subject under the plan, without faults.
pub(crate) fn run<S: Subject>(subject: S, plan: Plan) -> Report {
    run_with(subject, plan, |_| false)
}

/// Runs a subject under the plan. `prepare` may ask for faults when the disk is open, and says whether it has.
///
/// # Panics
/// If the oracle finds anything wrong.
pub(crate) fn run_with<S: Subject>(subject: S, plan: Plan, prepare: impl FnOnce(&SimulatedEnvironment) -> bool) -> Report {
    let subject = Rc::new(subject);
    let mut simulation = Simulation::new(plan.seed);
    let environment = simulation.environment().clone();
    environment.set_slow_allocation(plan.seed.is_multiple_of(3));
    subject.create(&environment, plan.sectors);
    let disk = simulation.block_on(Rc::clone(&subject).open(environment.clone()));
    let disk = Arc::new(disk.unwrap_or_else(|error| panic!("seed {}: cannot open the new disk: {error}", plan.seed)));
    assert_eq!(disk.size(), plan.sectors * SECTOR as u64);
    let faults = prepare(&environment);
    let history = History::new(Clock::default(), vec![Value::ZERO; plan.sectors as usize]);
    let shared = Shared::new(plan.seed, history, faults);

    start_clients(&mut simulation, &disk, &shared, &plan);
    drive(&mut simulation, &subject, &shared, &plan);

    environment.clear_faults();
    let end = simulation.block_on(Rc::clone(&subject).close(Arc::clone(&disk)));
    if let Err(error) = end
        && !faults
    {
        shared.fail(format_args!("closing failed: {error}"));
    }
    drop(disk);
    if !faults {
        let flushing = shared.history.borrow_mut().begin_flush();
        shared.history.borrow_mut().end_flush(flushing, true);
        check_crash(&subject, &shared, &environment.crash(), &plan, Ending::Orderly);
    }
    shared.report.borrow_mut().fingerprint = fingerprint(&environment);
    check_crash(&subject, &shared, &environment.restarted(), &plan, if faults { Ending::Crash } else { Ending::Orderly });
    *shared.report.borrow()
}

/// Spawns the clients, spread over the simulation's threads.
fn start_clients<D: Disk>(simulation: &mut Simulation, disk: &Arc<D>, shared: &Rc<Shared>, plan: &Plan) {
    let executors: Vec<_> = (0..plan.threads).map(|_| simulation.add_executor()).collect();
    let mut chance = Chance::new(plan.seed ^ 0xc11e_4275);
    for number in 0..plan.clients {
        let task = client(vec![(Arc::clone(disk), Rc::clone(shared))], chance.fork(), plan.operations, 0);
        executors[number as usize % executors.len()].spawn(task);
    }
}

/// Goes on until nothing is left to do, with looks at what a crash would leave.
fn drive<S: Subject>(simulation: &mut Simulation, subject: &Rc<S>, shared: &Rc<Shared>, plan: &Plan) {
    let environment = simulation.environment().clone();
    let mut chance = Chance::new(plan.seed ^ 0x00c4_a54e);
    let mut effects = environment.effects();
    while simulation.step() {
        if plan.crash_every == 0 || effects == environment.effects() {
            continue;
        }
        effects = environment.effects();
        if !chance.happens(1, plan.crash_every) {
            continue;
        }
        for state in environment.crash_states(plan.crash_states) {
            let again = plan.second_crash_every > 0 && chance.happens(1, plan.second_crash_every);
            check_crash(subject, shared, &state, plan, if again { Ending::CrashAndOn } else { Ending::Crash });
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Orderly,
    Crash,
    /// A crash after which the disk is used again, and crashes again.
    CrashAndOn,
}

/// Opens the disk that a crash has left, and compares.
fn check_crash<S: Subject>(subject: &Rc<S>, shared: &Rc<Shared>, state: &SimulatedEnvironment, plan: &Plan, ending: Ending) {
    let context = |what: String| format!("{ending:?}, state {:#x}: {what}", state.seed());
    if ending == Ending::Orderly || plan.check_every > 0 && state.seed().is_multiple_of(plan.check_every) {
        let checked = subject.check(state, ending != Ending::Orderly).unwrap_or_else(|error| shared.fail(context(error)));
        shared.report.borrow_mut().checks += u64::from(checked);
    }
    let mut simulation = Simulation::on(state.clone());
    let disk = simulation
        .block_on(Rc::clone(subject).open(state.clone()))
        .unwrap_or_else(|error| shared.fail(context(format!("cannot open: {error}"))));
    let disk = Arc::new(disk);
    let content = simulation.block_on(read_all(Arc::clone(&disk))).unwrap_or_else(|error| shared.fail(context(error)));
    let values = shared.history.borrow().check_crash(&content).unwrap_or_else(|error| shared.fail(context(error)));
    shared.report.borrow_mut().crash_states += 1;
    if ending != Ending::CrashAndOn {
        return;
    }
    let plan = Plan { seed: plan.seed ^ state.seed(), operations: 8, crash_every: 4, crash_states: 2, second_crash_every: 0, ..*plan };
    let clock = Clock::default();
    let history = RefCell::new(shared.history.borrow().recovered(clock.clone(), values));
    let again =
        Rc::new(Shared { report: Rc::default(), journal: Journal::after(&shared.journal, clock), history, faults: false, ..**shared });
    again.journal.note(format_args!("goes on after the crash to state {:#x}", state.seed()));
    start_clients(&mut simulation, &disk, &again, &plan);
    drive(&mut simulation, subject, &again, &plan);
    simulation.block_on(Rc::clone(subject).close(Arc::clone(&disk))).unwrap_or_else(|error| again.fail(context(error)));
    let looked_at = *again.report.borrow();
    *shared.report.borrow_mut() += looked_at;
}

/// A number for everything that has happened on a medium.
pub(crate) fn fingerprint(environment: &SimulatedEnvironment) -> u64 {
    let mut hasher = DefaultHasher::new();
    for operation in environment.log() {
        format!("{operation:?}").hash(&mut hasher);
    }
    hasher.finish()
}

/// All bytes of a disk.
pub(crate) async fn read_all<D: Disk>(disk: Arc<D>) -> Result<AlignedBuffer, String> {
    let len = usize::try_from(disk.size()).expect("small");
    let (result, buffer) = disk.read(GuestOffset::ZERO, Buffer::Owned(AlignedBuffer::zeroed(len))).await;
    result.map(|()| buffer.into_owned()).map_err(|error| format!("cannot read: {error}"))
}

//! Several stacks with their queue threads, snapshots of the group, and crashes at every step.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::chain::Format;
use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};

use crate::catalogue::{Catalogue, domain, make_disk, open_stack};
use crate::clients::{Shared, client};
use crate::history::{Clock, History};
use crate::journal::Journal;
use crate::pattern::Value;
use crate::qemu;
use crate::queues::{Port, QueueThread, SimulatedStack, read_stack};
use crate::snapshots::{Snapshots, check_frozen, count};
use crate::workload::{Report, fingerprint};

/// How much is done, and what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupPlan {
    /// Everything follows from it.
    pub(crate) seed: u64,
    pub(crate) disks: usize,
    /// Queue threads; each serves all disks.
    pub(crate) threads: usize,
    /// Clients at the same time.
    pub(crate) clients: u64,
    /// Operations of each client.
    pub(crate) operations: u64,
    /// Rounds of the client that counts; 0: there is none.
    pub(crate) rounds: u64,
    pub(crate) snapshots: u64,
    /// A crash is tried after one in so many effects; 0: never.
    pub(crate) crash_every: u64,
    /// How many states that it may leave are looked at.
    pub(crate) crash_states: u64,
    /// One in so many of those states is used further, and crashes again.
    pub(crate) second_crash_every: u64,
    /// Other programs look at one in so many of those states.
    pub(crate) check_every: u64,
    /// Memory for the chain map, in bytes.
    pub(crate) map_budget: usize,
}

impl GroupPlan {
    /// Mostly short histories that are cut now and then, some that are cut at every effect, and some long ones.
    pub(crate) fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x6f00);
        let plan = Self {
            seed,
            disks: 1 + chance.index(3),
            threads: 1 + chance.index(3),
            clients: 1 + chance.below(4),
            operations: 4,
            rounds: 4,
            snapshots: 1 + chance.below(2),
            crash_every: 48,
            crash_states: 2,
            second_crash_every: 16,
            check_every: 128,
            map_budget: if chance.happens(1, 4) { 1 } else { 1 << 20 },
        };
        match chance.below(64) {
            0 => Self { operations: 60, rounds: 40, snapshots: 6, crash_every: 64, crash_states: 3, ..plan },
            1 => Self { crash_every: 1, ..plan },
            2..16 => Self { operations: 20, rounds: 10, snapshots: 3, crash_every: 200, ..plan },
            _ => plan,
        }
    }
}

/// A group in use.
struct Group {
    plan: GroupPlan,
    stacks: Vec<Arc<SimulatedStack>>,
    shared: Vec<Rc<Shared>>,
    catalogue: Rc<RefCell<Catalogue>>,
    domain: Arc<FenceDomain>,
    /// A crash before has left its leaks.
    recovered: bool,
}

/// Makes a group and uses it under the plan. `prepare` may ask for faults when the disks are open, and says whether it has.
///
/// # Panics
/// If the oracle finds anything wrong.
pub(crate) fn run_group(plan: GroupPlan, prepare: impl FnOnce(&SimulatedEnvironment) -> bool) -> Report {
    let mut simulation = Simulation::new(plan.seed);
    let environment = simulation.environment().clone();
    environment.set_slow_allocation(plan.seed.is_multiple_of(3));
    let mut chance = Chance::new(plan.seed ^ 0xd15c);
    let clock = Clock::default();
    let journal = Journal::new(clock.clone());
    let mut catalogue = Catalogue::new();
    let mut histories = Vec::new();
    for disk in 0..plan.disks {
        let sectors = [512, 333, 1024, 129][chance.index(4)];
        let (record, values) = make_disk(&environment, disk, sectors, &mut chance);
        catalogue.push(record);
        histories.push(History::new(clock.clone(), values));
    }
    let report = Rc::default();
    let mut group = Group::open(&mut simulation, plan, catalogue, histories, (&report, &journal)).unwrap_or_else(|error| {
        panic!("seed {}: {error}", plan.seed);
    });
    let faults = prepare(&environment);
    for shared in &mut group.shared {
        Rc::get_mut(shared).expect("nothing runs yet").faults = faults;
    }
    group.use_it(&mut simulation, true);
    *report.borrow()
}

impl Group {
    /// Opens all disks as the catalogue has them.
    fn open(
        simulation: &mut Simulation,
        plan: GroupPlan,
        catalogue: Catalogue,
        histories: Vec<History>,
        (report, journal): (&Rc<RefCell<Report>>, &Rc<Journal>),
    ) -> Result<Self, String> {
        let environment = simulation.environment().clone();
        let domain = domain(&environment);
        let mut stacks = Vec::new();
        for record in &catalogue {
            let opening = open_stack(environment.clone(), Arc::clone(&domain), record.top.clone(), true, plan.map_budget);
            stacks.push(simulation.block_on(opening)?);
        }
        let shared = histories.into_iter().enumerate().map(|(disk, history)| {
            let history = RefCell::new(history);
            Rc::new(Shared { history, report: Rc::clone(report), journal: Rc::clone(journal), disk, faults: false, seed: plan.seed })
        });
        Ok(Self { plan, stacks, shared: shared.collect(), catalogue: Rc::new(RefCell::new(catalogue)), domain, recovered: false })
    }

    fn fail(&self, what: impl std::fmt::Display) -> ! {
        self.shared[0].journal.fail(self.plan.seed, what)
    }

    /// Runs clients and snapshots to their end, with looks at what a crash would leave, and closes everything.
    fn use_it(self, simulation: &mut Simulation, counters: bool) {
        let environment = simulation.environment().clone();
        let faults = self.shared[0].faults;
        self.start(simulation, counters);
        self.drive(simulation);
        environment.clear_faults();
        environment.set_space_limit(None);
        environment.release_hung();
        self.drive(simulation);
        for stack in &self.stacks {
            let closing = Arc::clone(stack);
            if let Err(error) = simulation.block_on(async move { closing.close().await })
                && !faults
            {
                self.fail(format_args!("closing failed: {error}"));
            }
        }
        simulation.run_until_stalled();
        self.shared[0].report.borrow_mut().fingerprint ^= fingerprint(&environment);
        if !faults {
            for shared in &self.shared {
                let flushing = shared.history.borrow_mut().begin_flush();
                shared.history.borrow_mut().end_flush(flushing, true);
            }
        }
        self.check_crash(&environment.crash(), !faults, false);
    }

    fn start(&self, simulation: &mut Simulation, counters: bool) {
        let plan = &self.plan;
        let mut chance = Chance::new(plan.seed ^ 0x57a7);
        let mut executors = Vec::new();
        let mut ports: Vec<Vec<Arc<Port>>> = Vec::new();
        for _ in 0..plan.threads {
            let executor = simulation.new_executor();
            let thread = QueueThread::new(executor.clone(), &self.domain, &self.stacks, chance.fork());
            ports.push(thread.ports().to_vec());
            executors.push(executor);
            simulation.add_thread(thread);
        }
        let disks =
            |thread: usize| ports[thread].iter().cloned().zip(self.shared.iter().cloned()).collect::<Vec<(Arc<Port>, Rc<Shared>)>>();
        for number in 0..plan.clients {
            let thread = number as usize % plan.threads;
            executors[thread].spawn(client(disks(thread), chance.fork(), plan.operations, 1));
        }
        if counters {
            let thread = chance.index(plan.threads);
            executors[thread].spawn(count(disks(thread), plan.rounds, chance.fork()));
        }
        let snapshots = Snapshots {
            environment: simulation.environment().clone(),
            domain: Arc::clone(&self.domain),
            stacks: self.stacks.clone(),
            shared: self.shared.clone(),
            catalogue: Rc::clone(&self.catalogue),
            counters,
        };
        simulation.executor().spawn(snapshots.take(plan.snapshots, chance.fork()));
    }

    /// Goes on until nothing is left to do.
    fn drive(&self, simulation: &mut Simulation) {
        let plan = &self.plan;
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
                self.check_crash(&state, false, again);
            }
        }
    }

    /// Opens what a crash (or an orderly end) has left, and compares; `again`: uses it, too.
    fn check_crash(&self, state: &SimulatedEnvironment, orderly: bool, again: bool) {
        let context = |what: String| format!("state {:#x} (orderly: {orderly}): {what}", state.seed());
        let catalogue = self.catalogue.borrow().clone();
        if orderly && !self.recovered && self.plan.seed.is_multiple_of(4) || state.seed().is_multiple_of(self.plan.check_every) {
            self.check_images(state, &catalogue, orderly).unwrap_or_else(|error| self.fail(context(error)));
        }
        if orderly || state.seed().is_multiple_of(8) {
            let checking = check_frozen(state.clone(), catalogue.clone());
            Simulation::on(state.clone()).block_on(checking).unwrap_or_else(|error| self.fail(context(error)));
        }
        if !orderly && state.seed().is_multiple_of(4) {
            open_with_fault(state, &catalogue);
        }
        let mut simulation = Simulation::on(state.clone());
        let domain = domain(state);
        let mut values = Vec::new();
        for (record, shared) in catalogue.iter().zip(&self.shared) {
            let opening = open_stack(state.clone(), Arc::clone(&domain), record.top.clone(), true, self.plan.map_budget);
            let content = simulation.block_on(async move { read_stack(opening.await?).await });
            let content = content.unwrap_or_else(|error| shared.fail(context(error)));
            let found: Vec<Value> = shared.history.borrow().check_crash(&content).unwrap_or_else(|error| shared.fail(context(error)));
            values.push(found);
        }
        let report = &self.shared[0].report;
        report.borrow_mut().crash_states += 1;
        if !again {
            return;
        }
        let journal = &self.shared[0].journal;
        journal.note(format_args!("goes on after the crash to state {:#x}", state.seed()));
        let clock = Clock::default();
        let journal = Journal::after(journal, clock.clone());
        let histories = self.shared.iter().zip(values).map(|(shared, values)| shared.history.borrow().recovered(clock.clone(), values));
        let plan = GroupPlan { operations: 6, snapshots: 1, crash_every: 16, second_crash_every: 0, ..self.plan };
        let group = Self::open(&mut simulation, plan, catalogue, histories.collect(), (report, &journal));
        let mut group = group.unwrap_or_else(|error| self.fail(context(error)));
        group.recovered = true;
        group.use_it(&mut simulation, false);
    }

    /// Lets other programs look at all images.
    fn check_images(&self, state: &SimulatedEnvironment, catalogue: &Catalogue, orderly: bool) -> Result<(), String> {
        for record in catalogue {
            let frozen = record.frozen.iter().map(|frozen| (&frozen.image, self.recovered));
            for (image, may_leak) in frozen.chain([(&record.top, self.recovered || !orderly)]) {
                if image.format == Format::Qcow2 {
                    qemu::check(state, &[&image.path], may_leak)?;
                    self.shared[0].report.borrow_mut().checks += 1;
                }
            }
        }
        Ok(())
    }
}

/// Opens the disks, or tries to, while operations fail. Whatever comes of it, nothing may be lost by it.
fn open_with_fault(state: &SimulatedEnvironment, catalogue: &Catalogue) {
    let mut chance = Chance::new(state.seed() ^ 0x0fa1);
    state.inject(some_fault(&mut chance, 8));
    let mut simulation = Simulation::on(state.clone());
    let domain = domain(state);
    for record in catalogue {
        let opening = open_stack(state.clone(), Arc::clone(&domain), record.top.clone(), true, 1 << 20);
        if let Ok(stack) = simulation.block_on(opening) {
            // Failing is as good as not failing: what counts is what is found afterwards.
            let _ = simulation.block_on(async move { stack.close().await });
        }
    }
    state.clear_faults();
}

/// Some operation after `most` others of its kind at the latest that fails once, or from then on.
pub(crate) fn some_fault(chance: &mut Chance, most: u64) -> Fault {
    let kind = OperationKind::ALL[chance.index(OperationKind::ALL.len())];
    let after = chance.below(most + 1);
    if chance.happens(1, 2) { Fault::once(kind, after) } else { Fault::lasting(kind, after) }
}

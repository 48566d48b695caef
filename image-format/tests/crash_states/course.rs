//! One history: what is asked of a stack, step by step, and the power going off at every moment.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, Simulation};

use crate::expected::Expected;
use crate::layout::{Layout, Opened, image_path, range, read_all, write};
use crate::pattern::Value;
use crate::recovery::{Changes, Recoveries};
use crate::tally::Tally;

/// One thing that is asked of the stack. Ranges are of sectors.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write(Range<u64>),
    Discard(Range<u64>),
    Zero(Range<u64>),
    Flush,
    /// A new overlay takes over; what was the top is frozen meanwhile.
    Snapshot,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) layout: &'static Layout,
    pub(crate) steps: Vec<Step>,
    pub(crate) seed: u64,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A moment that leaves more disks than this is one of those that are drawn from.
    pub(crate) all: u64,
    /// How many are drawn then.
    pub(crate) drawn: u64,
    /// Whether only moments after the beginning of the last step count: the others belong to the history without that step.
    pub(crate) last_step_only: bool,
    /// One moment in so many is looked at.
    pub(crate) every: u64,
}

impl Limits {
    /// For short histories: everything.
    pub(crate) const SHORT: Self = Self { all: 1 << 14, drawn: 1 << 10, last_step_only: true, every: 1 };
    /// For long ones, of which most moments resemble one another.
    pub(crate) const LONG: Self = Self { all: 1 << 5, drawn: 1 << 4, last_step_only: false, every: 32 };
}

/// What the steps change.
struct Machine {
    environment: SimulatedEnvironment,
    layout: &'static Layout,
    expected: Expected,
    /// Number of the topmost image, as the catalogue has it.
    top: usize,
    /// Frozen images as they were then.
    frozen: Vec<(String, Vec<u8>)>,
    begun: usize,
    ended: bool,
}

/// Says which history it was when a test fails.
struct Named<'a>(&'a Course);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: {:?} on {}, SNAPFENCE_SEED={}", self.0.steps, self.0.layout.name, self.0.seed);
        }
    }
}

impl Course {
    /// A long one by chance, of writes above all.
    pub(crate) fn random(layout: &'static Layout, seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x10_4e);
        let mut snapshots = 0;
        let steps = (0..20 + chance.index(40)).map(|_| {
            let start = chance.below(layout.sectors);
            let sectors = start..(start + 1 + chance.below(12)).min(layout.sectors);
            match chance.below(20) {
                0..10 => Step::Write(sectors),
                10..12 => Step::Discard(sectors),
                12..14 => Step::Zero(sectors),
                // Half of them have none, and none so many that there is nothing but overlays.
                14 if seed.is_multiple_of(2) && snapshots < 3 => {
                    snapshots += 1;
                    Step::Snapshot
                }
                _ => Step::Flush,
            }
        });
        Self { layout, steps: steps.collect(), seed }
    }

    /// Runs it and looks at what power cuts leave.
    ///
    /// # Panics
    /// If anything is found that may not be.
    pub(crate) fn run(&self, limits: Limits, recoveries: &Recoveries) -> Tally {
        let _named = Named(self);
        let environment = SimulatedEnvironment::new(self.seed);
        let made = environment.clone();
        let layout = self.layout;
        Simulation::on(environment.clone()).block_on(async move { layout.make(&made).await });
        let environment = environment.restarted();
        let machine = Rc::new(RefCell::new(Machine {
            environment: environment.clone(),
            layout,
            expected: Expected::new(layout.values()),
            top: 0,
            frozen: Vec::new(),
            begun: 0,
            ended: false,
        }));
        let mut simulation = Simulation::on(environment.clone());
        simulation.executor().spawn(serve(Rc::clone(&machine), self.steps.clone()));
        let mut tally = Tally { histories: 1, ..Tally::default() };
        let mut chance = Chance::new(self.seed ^ 0xc0a5);
        let mut seen = None;
        loop {
            let moment = (Changes::of(&environment), machine.borrow().expected.time(), machine.borrow().top);
            let counts = !limits.last_step_only || machine.borrow().begun == self.steps.len();
            if seen.replace(moment) != Some(moment) && counts && chance.happens(1, limits.every) {
                machine.borrow().look(limits, recoveries, &mut chance, &mut tally);
            }
            if !simulation.step() {
                break;
            }
        }
        assert!(machine.borrow().ended, "it stopped in step {}", machine.borrow().begun);
        tally
    }
}

impl Machine {
    /// Looks at all that a power cut now may leave.
    fn look(&self, limits: Limits, recoveries: &Recoveries, chance: &mut Chance, tally: &mut Tally) {
        for (path, bytes) in &self.frozen {
            assert!(self.environment.bytes(path).expect("it is there") == *bytes, "{path} has changed since it was frozen");
        }
        let space = self.environment.crash_space();
        tally.points += 1;
        // Contents that have been compared.
        let mut met = HashSet::new();
        let mut look_at = |state| {
            tally.states += 1;
            let recovered = recoveries.recover(&space, &state, self.top);
            if met.insert(Arc::as_ptr(&recovered)) {
                let result = self.expected.meet_crash(&recovered.contents);
                result.unwrap_or_else(|error| panic!("power cut after {} effects, {state:?}: {error}", self.environment.effects()));
            }
        };
        if space.count() <= limits.all {
            space.all().for_each(&mut look_at);
        } else {
            (0..limits.drawn).map(|_| space.sample(chance)).for_each(&mut look_at);
            tally.drawn_points += 1;
        }
    }
}

/// Does all steps.
async fn serve(machine: Rc<RefCell<Machine>>, steps: Vec<Step>) {
    let (environment, top) = (machine.borrow().environment.clone(), machine.borrow().top);
    let opened = Rc::new(Opened::open(&environment, top).await.unwrap_or_else(|error| panic!("it does not open: {error}")));
    for (number, step) in (0..).zip(steps) {
        machine.borrow_mut().begun += 1;
        let value = Value(10 + number);
        match step {
            Step::Write(sectors) => {
                let change = machine.borrow_mut().expected.begin(sectors.clone(), value, false);
                write(&opened.stack, sectors, value).await.expect("written");
                machine.borrow_mut().expected.end(change);
            }
            Step::Discard(sectors) => {
                let change = machine.borrow_mut().expected.begin(sectors.clone(), Value::ZERO, true);
                opened.stack.view().discard(range(&sectors)).await.expect("discarded");
                machine.borrow_mut().expected.end(change);
            }
            Step::Zero(sectors) => {
                let change = machine.borrow_mut().expected.begin(sectors.clone(), Value::ZERO, false);
                opened.stack.view().write_zeroes(range(&sectors), true).await.expect("zeroed");
                machine.borrow_mut().expected.end(change);
            }
            Step::Flush => flush(&machine, &opened).await,
            Step::Snapshot => snapshot(&machine, &opened).await,
        }
        let content = read_all(&opened.stack).await.unwrap_or_else(|error| panic!("step {number}: {error}"));
        machine.borrow().expected.meet_read(&content).unwrap_or_else(|error| panic!("step {number}: {error}"));
    }
    machine.borrow_mut().ended = true;
}

/// What has ended when it begins is durable when it ends.
async fn flush(machine: &RefCell<Machine>, opened: &Opened) {
    let began = machine.borrow().expected.time();
    opened.stack.view().flush().await.expect("flushed");
    machine.borrow_mut().expected.durable(began);
}

/// Puts an overlay on the stack, and lets what was the top be frozen.
async fn snapshot(machine: &Rc<RefCell<Machine>>, opened: &Rc<Opened>) {
    let (environment, layout, old) = {
        let machine = machine.borrow();
        (machine.environment.clone(), machine.layout, machine.top)
    };
    let overlay = layout.make_overlay(&environment, old + 1, &opened.keeper).await.expect("an overlay");
    // The intent is recorded, and the fence passed: nobody else takes requests.
    machine.borrow_mut().top = old + 1;
    let fence = opened.domain.fence();
    let view = opened.stack.prepare_overlay(overlay, &fence);
    let cut = machine.borrow_mut().expected.cut(layout.layer(old));
    let before = opened.stack.publish(view);
    fence.switch();
    let (machine, opened) = (Rc::clone(machine), Rc::clone(opened));
    use snapfence_image_format::storage::Environment as _;
    environment.clone().spawn(async move {
        opened.stack.freeze_below(before).await.expect("frozen");
        let path = image_path(old);
        let bytes = environment.bytes(&path).expect("it is there");
        let mut machine = machine.borrow_mut();
        machine.expected.frozen(cut);
        machine.frozen.push((path, bytes));
    });
}

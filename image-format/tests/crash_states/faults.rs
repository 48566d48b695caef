//! The N-th operation of a kind fails, once or from then on, for every N until a run has none left that does: while a stack is opened, written to,
//! discarded from, flushed, snapshotted and closed, and while one is recovered. Then
//!
//! - no flush, freeze or close succeeds after one for which a write or a flush of the medium has failed, until the stack is opened again;
//! - readers see what was written last, or what has failed since;
//! - whatever power cut follows, all is found that was acknowledged, and nothing is corrupt;
//! - a transfer that stops short and is resumed makes no difference.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};

use crate::course::Step;
use crate::expected::Expected;
use crate::layout::{LAYOUTS, Layout, Opened, range, read_all, write};
use crate::pattern::Value;
use crate::recovery::{look_and_repair, recover_once};

/// More operations of a kind than a run has.
const MAX_OPERATIONS: u64 = 2000;
/// Disks that are recovered after each run.
const STATES: u64 = 4;

/// What happens to the operations that are struck.
const BLOWS: [(FaultEffect, bool); 4] = [
    (FaultEffect::Error(libc::EIO), false),
    (FaultEffect::Error(libc::EIO), true),
    (FaultEffect::Short, false),
    (FaultEffect::Short, true),
];

/// A stack that may fail, and what it has acknowledged.
struct Sufferer {
    environment: SimulatedEnvironment,
    layout: &'static Layout,
    expected: RefCell<Expected>,
    top: Cell<usize>,
    /// Whether operations fail after which it is unknown what the medium has.
    changes_fail: bool,
    /// Whether a flush has failed then.
    undurable: Cell<bool>,
    /// How many requests have failed.
    errors: Cell<u64>,
}

impl Sufferer {
    fn new(environment: SimulatedEnvironment, layout: &'static Layout, changes_fail: bool) -> Rc<Self> {
        let expected = RefCell::new(Expected::new(layout.values()));
        let (undurable, errors) = (Cell::new(false), Cell::new(0));
        Rc::new(Self { environment, layout, expected, top: Cell::new(0), changes_fail, undurable, errors })
    }

    /// Whether a request was successful.
    fn took<T, E>(&self, result: Result<T, E>) -> Option<T> {
        self.errors.set(self.errors.get() + u64::from(result.is_err()));
        result.ok()
    }

    /// What a flush, or what flushes among other things, has answered.
    fn flushed<E>(&self, began: u64, result: Result<(), E>) {
        if self.took(result).is_some() {
            assert!(!self.undurable.get(), "a flush succeeds after one that has failed");
            self.expected.borrow_mut().durable(began);
        } else {
            self.undurable.set(self.changes_fail);
        }
    }

    async fn change(&self, opened: &Opened, step: &Step, value: Value) {
        let view = opened.stack.view();
        let begin = |sectors, value, may_stay| self.expected.borrow_mut().begin(sectors, value, may_stay);
        let (change, result) = match step {
            Step::Write(sectors) => (begin(sectors.clone(), value, false), write(&opened.stack, sectors.clone(), value).await),
            Step::Discard(sectors) => (begin(sectors.clone(), Value::ZERO, true), view.discard(range(sectors)).await),
            Step::Zero(sectors) => (begin(sectors.clone(), Value::ZERO, false), view.write_zeroes(range(sectors), true).await),
            other => unreachable!("{other:?} changes nothing"),
        };
        if self.took(result).is_some() {
            self.expected.borrow_mut().end(change);
        }
    }

    async fn snapshot(&self, opened: &Opened) {
        let old = self.top.get();
        let overlay = self.layout.make_overlay(&self.environment, old + 1, &opened.keeper).await;
        let Some(overlay) = self.took(overlay) else { return };
        self.top.set(old + 1);
        let fence = opened.domain.fence();
        let view = opened.stack.prepare_overlay(overlay, &fence);
        let cut = self.expected.borrow_mut().cut(self.layout.layer(old));
        let before = opened.stack.publish(view);
        fence.switch();
        let began = self.expected.borrow().time();
        let result = opened.stack.freeze_below(before).await;
        let frozen = result.is_ok();
        self.flushed(began, result);
        if frozen {
            self.expected.borrow_mut().frozen(cut);
        }
    }

    /// All steps, then a last write and flush, and the end.
    async fn serve(&self, steps: &[Step]) {
        let opened = Opened::open(&self.environment, 0).await;
        let Some(opened) = self.took(opened) else { return };
        let last = [Step::Write(0..1), Step::Flush];
        for (number, step) in (0..).zip(steps.iter().chain(&last)) {
            match step {
                Step::Flush => {
                    let began = self.expected.borrow().time();
                    self.flushed(began, opened.stack.view().flush().await);
                }
                Step::Snapshot => self.snapshot(&opened).await,
                other => self.change(&opened, other, Value(10 + number)).await,
            }
            if let Some(content) = self.took(read_all(&opened.stack).await) {
                self.expected.borrow().meet_read(&content).unwrap_or_else(|error| panic!("step {number}: {error}"));
            }
        }
        let began = self.expected.borrow().time();
        self.flushed(began, opened.stack.close().await);
    }
}

/// What is done: new clusters near and far, others given up and used again, an overlay, the same there.
fn steps(layout: &Layout) -> Vec<Step> {
    let cluster = 0..(1_u64 << layout.cluster_bits) / 512;
    let changes = [
        Step::Write(layout.new.clone()),
        Step::Flush,
        Step::Write(layout.far.clone()),
        Step::Discard(cluster),
        Step::Flush,
        Step::Write(layout.filled.clone()),
        Step::Zero(0..layout.new.end),
        Step::Flush,
        Step::Write(layout.filled.clone()),
    ];
    [&changes[..], &[Step::Snapshot], &changes[..]].concat()
}

/// Lets `run` meet every fault of every kind, and `judge` look at what it leaves. Returns how many operations of each kind were struck.
fn strike_all(
    disk: &SimulatedEnvironment,
    run: impl Fn(SimulatedEnvironment, OperationKind, FaultEffect) -> Rc<Sufferer>,
    judge: impl Fn(&Sufferer),
) -> BTreeMap<OperationKind, u64> {
    let mut struck = BTreeMap::new();
    for kind in OperationKind::ALL {
        for (effect, lasting) in BLOWS {
            if effect == FaultEffect::Short && !matches!(kind, OperationKind::Read | OperationKind::Write) {
                continue;
            }
            for after in 0..MAX_OPERATIONS {
                let _named = Named { kind, effect, lasting, after };
                let space = disk.crash_space();
                let environment = space.disk(&space.all().next().expect("one"));
                let fault = Fault { lasting, ..Fault::once(kind, after) };
                environment.inject(fault.with(effect));
                let sufferer = run(environment, kind, effect);
                if sufferer.environment.faults_struck() == 0 {
                    break;
                }
                *struck.entry(kind).or_default() += 1;
                judge(&sufferer);
            }
        }
    }
    struck
}

/// Says which fault it was when a test fails.
struct Named {
    kind: OperationKind,
    effect: FaultEffect,
    lasting: bool,
    after: u64,
}

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { kind, effect, lasting, after } = self;
            eprintln!("failed: {kind:?} after {after} others: {effect:?}, lasting: {lasting}");
        }
    }
}

/// Recovers some of the disks that a power cut may leave now, among them the one with everything.
fn recover_some(sufferer: &Sufferer, meet: impl Fn(&[Vec<Value>]) -> Result<(), String>) {
    let environment = &sufferer.environment;
    environment.clear_faults();
    let space = environment.crash_space();
    let mut chance = Chance::new(environment.effects());
    let drawn = (0..STATES).map(|_| space.disk(&space.sample(&mut chance)));
    for disk in drawn.chain([environment.restarted()]) {
        let recovered = recover_once(&disk, sufferer.top.get());
        meet(&recovered.contents).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// A disk with a stack as it is at first.
fn new_disk(layout: &'static Layout) -> SimulatedEnvironment {
    let environment = SimulatedEnvironment::new(crate::seed());
    let made = environment.clone();
    Simulation::on(environment.clone()).block_on(async move { layout.make(&made).await });
    environment.restarted()
}

#[test]
fn whichever_operation_fails_nothing_acknowledged_is_lost() {
    for layout in &LAYOUTS {
        let disk = new_disk(layout);
        let run = |environment: SimulatedEnvironment, kind, effect| {
            let changes_fail = matches!(kind, OperationKind::Write | OperationKind::Flush);
            let sufferer = Sufferer::new(environment.clone(), layout, changes_fail);
            let inner = Rc::clone(&sufferer);
            Simulation::on(environment).block_on(async move { inner.serve(&steps(layout)).await });
            if effect == FaultEffect::Short {
                assert_eq!((sufferer.errors.get(), sufferer.top.get()), (0, 1), "a transfer that is resumed is no failure");
            }
            sufferer
        };
        let struck = strike_all(&disk, run, |sufferer| {
            recover_some(sufferer, |contents| sufferer.expected.borrow().meet_crash(contents));
        });
        eprintln!("{}: {struck:?} runs with a failure", layout.name);
        use OperationKind::{Allocate, Create, Flush, FlushDirectory, Open, Read, SetLen, Write};
        for kind in [Open, Create, Read, Write, Flush, Allocate, SetLen, FlushDirectory] {
            assert!(struck.contains_key(&kind), "no {kind:?} has failed");
        }
    }
}

#[test]
fn whichever_operation_of_a_recovery_fails_the_next_one_finds_everything() {
    for layout in &LAYOUTS {
        // It ends when clusters have just been given up, which are still counted.
        let sufferer = Sufferer::new(new_disk(layout), layout, false);
        let inner = Rc::clone(&sufferer);
        let mut steps = steps(layout);
        steps.truncate(steps.len() - 1);
        let mut simulation = Simulation::on(sufferer.environment.clone());
        let opened = simulation.block_on(async move {
            let opened = Opened::open(&inner.environment, 0).await.expect("it opens");
            for step in &steps {
                match step {
                    Step::Flush => opened.stack.view().flush().await.expect("flushed"),
                    Step::Snapshot => inner.snapshot(&opened).await,
                    other => inner.change(&opened, other, Value(10)).await,
                }
            }
            opened
        });
        let (disk, top) = (sufferer.environment.restarted(), sufferer.top.get());
        drop(opened);
        let leaks = Rc::new(Cell::new(0));
        let recovered = recover_once(&disk.crash_space().disk(&disk.crash_space().all().next().expect("one")), top);
        let run = |environment: SimulatedEnvironment, _, effect| {
            let sufferer = Sufferer::new(environment.clone(), layout, false);
            sufferer.top.set(top);
            let (inner, found) = (Rc::clone(&sufferer), Rc::clone(&leaks));
            Simulation::on(environment).block_on(async move {
                let result = look_and_repair(&inner.environment, top).await;
                assert!(result.is_ok() || effect != FaultEffect::Short, "{result:?}");
                found.set(found.get() + result.map_or(0, |(_, leaks)| leaks));
            });
            sufferer
        };
        let struck = strike_all(&disk, run, |sufferer| {
            recover_some(sufferer, |contents| {
                if contents == recovered.contents { Ok(()) } else { Err(format!("{contents:?} and not {:?}", recovered.contents)) }
            });
        });
        eprintln!("recovery, {}: {struck:?} runs with a failure", layout.name);
        assert!(leaks.get() > 0, "{}: there was nothing to repair", layout.name);
        for kind in [OperationKind::Open, OperationKind::Read, OperationKind::Write, OperationKind::Flush] {
            assert!(struck.contains_key(&kind), "no {kind:?} has failed");
        }
    }
}

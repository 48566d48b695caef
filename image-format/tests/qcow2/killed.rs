//! The process is killed at any effect that it has on the medium, again and again, also while it puts in place what the one before it has left. The
//! guest goes on: it finds every byte that was acknowledged, flushed or not, and QEMU finds nothing worse than leaks.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{Header, OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::kept::{MemoryKeeper, TestKeeper};
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Model, Request, SECTOR, open_file, read, span};
use crate::tools::{Scratch, Verdict};

const SEEDS: u64 = 8;
const KILLS: usize = 8;
/// Effects after which a process is killed at the latest.
const LIFE: u64 = 150;
const IMAGE: &str = "/a.qcow2";
const BASE: &str = "/base.raw";

/// What the guest may find.
#[derive(Default)]
struct Expected {
    /// Acknowledged.
    bytes: Vec<u8>,
    /// Begun and not acknowledged: any of their sectors may be there or not.
    under_way: Vec<Request>,
}

impl Expected {
    /// Compares with what is there, which is what counts from now on.
    fn meet(&mut self, found: Vec<u8>) -> Result<(), String> {
        for (sector, bytes) in found.chunks_exact(SECTOR as usize).enumerate() {
            let at = sector * SECTOR as usize;
            let range = GuestRange::new(GuestOffset::new(at as u64), SECTOR);
            let is_new = |request: &&Request| request.range.overlaps(range) && request.leaves(range, bytes);
            if bytes != &self.bytes[at..at + bytes.len()] && !self.under_way.iter().any(|request| is_new(&request)) {
                return Err(format!("sector {sector} has lost what was acknowledged"));
            }
        }
        self.bytes = found;
        self.under_way.clear();
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Layout {
    options: &'static str,
    size: u64,
    backed: bool,
    /// Whether there is an internal snapshot that shares all clusters.
    shared: bool,
}

const LAYOUTS: [Layout; 9] = [
    Layout { options: "compat=1.1", size: 4 << 20, backed: false, shared: false },
    Layout { options: "compat=1.1,cluster_size=512", size: 200 << 10, backed: false, shared: false },
    Layout { options: "compat=1.1,cluster_size=512,refcount_bits=64", size: 300 << 10, backed: true, shared: false },
    Layout { options: "compat=1.1,cluster_size=4k,refcount_bits=1", size: 1 << 20, backed: true, shared: false },
    Layout { options: "compat=1.1,cluster_size=16k,extended_l2=on", size: 2 << 20, backed: true, shared: false },
    Layout { options: "compat=1.1,cluster_size=128k,extended_l2=on", size: 8 << 20, backed: false, shared: false },
    Layout { options: "compat=1.1,cluster_size=4k", size: 1 << 20, backed: false, shared: true },
    // Version 2 has no place for the number of kept memory.
    Layout { options: "compat=0.10,cluster_size=4k", size: 1 << 20, backed: false, shared: true },
    Layout { options: "compat=0.10,cluster_size=512", size: 300 << 10, backed: true, shared: false },
];

impl Layout {
    /// The image, as a guest has it at first.
    fn make(&self, scratch: &Scratch, environment: &SimulatedEnvironment) -> Vec<u8> {
        let size = self.size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", self.options];
        if self.backed {
            let bytes: Vec<u8> = (0..self.size).map(|at| (at / SECTOR) as u8 | 1).collect();
            std::fs::write(scratch.path("base.raw"), bytes).expect("the folder is writable");
            environment.import(scratch.path("base.raw"), BASE).expect("imported");
            arguments.extend(["-b", "base.raw", "-F", "raw"]);
        }
        arguments.extend(["a.qcow2", &size]);
        scratch.qemu_img(&arguments);
        if self.shared {
            scratch.qemu_io("a.qcow2", "qcow2", &["write -P 5 100k 500k"]);
            scratch.qemu_img(&["snapshot", "-c", "before", "a.qcow2"]);
        }
        environment.import(scratch.path("a.qcow2"), IMAGE).expect("imported");
        scratch.content("a.qcow2", &[])
    }

    async fn open(&self, environment: &SimulatedEnvironment, keeper: Option<Arc<dyn MemoryKeeper>>) -> Arc<Stack<SimulatedEnvironment>> {
        let mut layers = Vec::new();
        if self.backed {
            let file = open_file(environment, Path::new(BASE), Access::Read).await;
            layers.push(Arc::new(Layer::Raw(Raw::open(file, false).await.expect("whole sectors"))));
        }
        let file = open_file(environment, Path::new(IMAGE), Access::Write).await;
        let image = Qcow2::open(file, OpenOptions { keeper, ..OpenOptions::writing() }).await;
        layers.push(Arc::new(Layer::Qcow2(image.unwrap_or_else(|error| panic!("the image opens: {error}")))));
        Stack::new(environment.clone(), &FenceDomain::new(|| Duration::ZERO), layers, false)
    }
}

/// Serves random requests of the guest until the end of the world.
async fn serve(stack: Arc<Stack<SimulatedEnvironment>>, expected: Rc<RefCell<Expected>>, chance: Chance, unit: u64) {
    let mut model = Model { bytes: expected.borrow().bytes.clone(), chance };
    loop {
        let mut requests: Vec<Request> = Vec::new();
        for _ in 0..1 + model.chance.below(8) {
            let request = model.request(unit);
            if !requests.iter().any(|other| other.range.overlaps(request.range)) {
                requests.push(request);
            }
        }
        expected.borrow_mut().under_way.clone_from(&requests);
        let one = |request: Request| {
            let (stack, expected) = (&stack, &expected);
            async move {
                request.send(stack).await;
                // What a discard leaves is looked at, and may be lost before.
                let mut bytes = expected.borrow().bytes.clone();
                request.apply(stack, &mut bytes).await;
                let mut expected = expected.borrow_mut();
                expected.bytes[span(request.range)].copy_from_slice(&bytes[span(request.range)]);
                expected.under_way.retain(|other| other.range != request.range);
            }
        };
        join_all(requests.into_iter().map(one)).await;
        if model.chance.happens(1, 12) {
            stack.view().flush().await.expect("flushed");
        }
    }
}

/// Kills and restarts on one image. An error says what the guest has lost.
fn ordeal(layout: &Layout, seed: u64, keeper: Option<&Arc<TestKeeper>>) -> Result<(), String> {
    let scratch = Scratch::new();
    let mut chance = Chance::new(seed);
    let mut environment = SimulatedEnvironment::new(seed);
    let bytes = layout.make(&scratch, &environment);
    let unit = 4096.max(bytes.len() as u64 / 256).next_power_of_two().min(128 << 10);
    let expected = Rc::new(RefCell::new(Expected { bytes, under_way: Vec::new() }));
    let keep = || keeper.map(|keeper| Arc::clone(keeper) as Arc<dyn MemoryKeeper>);
    for kill in 0..KILLS {
        let context = format!("{}, seed {seed}, kill {kill}", layout.options);
        let life = if chance.happens(1, 4) { 12 } else { LIFE };
        environment.stop_after(environment.effects() + chance.below(life));
        let (world, options, shared) = (environment.clone(), keep(), Rc::clone(&expected));
        if let Some(keeper) = keeper {
            keeper.begin_process(&environment);
        }
        let mut simulation = Simulation::on(environment.clone());
        let opened = *layout;
        let outcome = Rc::new(RefCell::new(Ok(())));
        let (report, requests) = (Rc::clone(&outcome), Chance::new(chance.number()));
        let _ = simulation.run(async move {
            let stack = opened.open(&world, options).await;
            let found = read(&stack, GuestRange::new(GuestOffset::ZERO, stack.virtual_size())).await;
            let met = shared.borrow_mut().meet(found);
            if met.is_err() {
                return *report.borrow_mut() = met;
            }
            serve(stack, shared, requests, unit).await;
        });
        outcome.borrow().clone().map_err(|lost| format!("{context}: {lost}"))?;
        assert!(environment.is_stopped(), "{context}: it was not killed");
        drop(simulation);
        environment = environment.restarted();
        environment.export(IMAGE, scratch.path("killed.qcow2")).expect("exported");
        let (verdict, text) = scratch.check("killed.qcow2");
        assert_ne!(verdict, Verdict::Corrupt, "{context}: {text}");
    }
    let context = format!("{}, seed {seed}, in the end", layout.options);
    let (world, options) = (environment.clone(), keep());
    let opened = *layout;
    let found = Simulation::on(environment.clone()).block_on(async move {
        let stack = opened.open(&world, options).await;
        let found = read(&stack, GuestRange::new(GuestOffset::ZERO, stack.virtual_size())).await;
        stack.close().await.expect("closed");
        found
    });
    expected.borrow_mut().meet(found).map_err(|lost| format!("{context}: {lost}"))?;
    environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
    let (verdict, text) = scratch.check("a.qcow2");
    assert_ne!(verdict, Verdict::Corrupt, "{context}: {text}");
    scratch.expect_content("a.qcow2", &expected.borrow().bytes, &context);
    let inner = environment.clone();
    let number = Simulation::on(environment).block_on(async move {
        let file = open_file(&inner, Path::new(IMAGE), Access::Read).await;
        Header::read(&file).await.expect("a header").kept_number()
    });
    assert_eq!(number, 0, "{context}: nothing is kept of an image that was closed");
    Ok(())
}

#[test]
fn what_was_acknowledged_survives_the_process() {
    for layout in &LAYOUTS {
        for seed in 0..SEEDS {
            let keeper = Arc::new(TestKeeper::default());
            ordeal(layout, seed, Some(&keeper)).unwrap_or_else(|lost| panic!("{lost}"));
            assert_eq!(keeper.count(), 0, "seed {seed}: memory that nobody needs is given back");
        }
    }
}

/// The kills above are such that without kept memory something is lost.
#[test]
fn without_kept_memory_kills_lose_data() {
    let lost = (0..SEEDS).filter(|&seed| ordeal(&LAYOUTS[0], seed, None).is_err()).count();
    assert!(lost > 0, "none of {SEEDS} ordeals loses anything");
}

/// An image that somebody else has written to after the kill is what that one has made of it.
#[test]
fn what_was_left_is_not_used_after_others_have_written() {
    let scratch = Scratch::new();
    let keeper = Arc::new(TestKeeper::default());
    let environment = SimulatedEnvironment::new(1);
    let layout = &LAYOUTS[0];
    layout.make(&scratch, &environment);
    let (world, options) = (environment.clone(), Arc::clone(&keeper) as Arc<dyn MemoryKeeper>);
    Simulation::on(environment.clone()).block_on(async move {
        let stack = LAYOUTS[0].open(&world, Some(options)).await;
        let mut chance = Chance::new(1);
        Request::new(Kind::Write, GuestRange::new(GuestOffset::ZERO, 1 << 20), &mut chance).send(&stack).await;
    });
    let environment = environment.restarted();
    environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
    scratch.qemu_io("a.qcow2", "qcow2", &["write -P 9 64k 64k"]);
    let bytes = scratch.content("a.qcow2", &[]);
    let imported = PathBuf::from("/b.qcow2");
    environment.import(scratch.path("a.qcow2"), &imported).expect("imported");
    let (world, options) = (environment.clone(), Arc::clone(&keeper) as Arc<dyn MemoryKeeper>);
    let found = Simulation::on(environment).block_on(async move {
        let file = open_file(&world, &imported, Access::Write).await;
        let image = Qcow2::open(file, OpenOptions { keeper: Some(options), ..OpenOptions::writing() }).await.expect("the image opens");
        let layer = Arc::new(Layer::Qcow2(image));
        let stack = Stack::new(world.clone(), &FenceDomain::new(|| Duration::ZERO), vec![layer], false);
        let found = read(&stack, GuestRange::new(GuestOffset::ZERO, stack.virtual_size())).await;
        stack.close().await.expect("closed");
        found
    });
    assert!(found == bytes);
}

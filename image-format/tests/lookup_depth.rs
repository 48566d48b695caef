//! Depth is free: over one overlay and over 499, the same reads of a guest need as many reads of files, one each, none for finding the place, and
//! the chain map takes as much memory. What the guest reads is what was written last.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::simulated::{OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location};
use snapfence_image_format::units::{GuestOffset, GuestRange};

/// More than a page of the chain map.
const DISK_BYTES: u64 = 40 << 20;
const BLOCK: u64 = 4096;
const WRITES: u64 = 2000;
const READS: u64 = 3000;
/// What the base is full of.
const BASE: u8 = 0xba;

/// What was measured.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    /// Reads of files for finding all places of the disk again.
    lookup_reads: u64,
    /// Reads of files for `READS` reads of the guest.
    reads: u64,
    map_bytes: usize,
}

async fn open(environment: &SimulatedEnvironment, path: &str, access: Access) -> <SimulatedEnvironment as Environment>::File {
    environment.open(&Location::Trusted(path.into()), access, CacheMode::Direct).await.expect("a file")
}

fn reads(environment: &SimulatedEnvironment) -> u64 {
    environment.counts().get(&OperationKind::Read).copied().unwrap_or_default()
}

/// Writes the same blocks at any number of overlays, by turns to each, and reads them.
async fn cost(environment: SimulatedEnvironment, overlays: u64, seed: u64) -> Cost {
    let mut chance = Chance::new(seed);
    environment.put("/0", &vec![BASE; DISK_BYTES as usize]);
    let domain = FenceDomain::new(|| Duration::ZERO);
    let written: Vec<(u64, u8)> = (0..WRITES).map(|_| (chance.below(DISK_BYTES / BLOCK), 1 + chance.below(100) as u8)).collect();
    for number in 1..=overlays {
        let path = format!("/{number}");
        let file = open(&environment, &path, Access::CreateNew).await;
        let options = CreateOptions::overlay(DISK_BYTES, format!("{}", number - 1), if number == 1 { "raw" } else { "qcow2" });
        Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("an image");
        let layer = Layer::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("an image"));
        // What lies beneath does not matter for whole blocks.
        let stack = Stack::new(environment.clone(), &domain, vec![Arc::new(layer)], false);
        for (block, byte) in written.iter().skip(number as usize - 1).step_by(overlays as usize) {
            let bytes = AlignedBuffer::copy_of(&[*byte; BLOCK as usize]);
            stack.view().write(GuestOffset::new(block * BLOCK), bytes.into()).await.0.expect("a write");
        }
        stack.close().await.expect("a layer that is brought to rest");
    }
    // A later layer covers an earlier one, whatever the order of writing was.
    let mut model = BTreeMap::new();
    for (turn, (block, byte)) in written.iter().enumerate() {
        let layer = turn as u64 % overlays;
        let newest = model.entry(*block).or_insert((layer, *byte));
        if layer >= newest.0 {
            *newest = (layer, *byte);
        }
    }

    let mut layers = Vec::new();
    for number in 0..=overlays {
        let file = open(&environment, &format!("/{number}"), Access::Read).await;
        layers.push(Arc::new(match number {
            0 => Layer::Raw(Raw::open(file, false).await.expect("an image")),
            _ => Layer::Qcow2(Qcow2::open(file, OpenOptions::reading()).await.expect("an image")),
        }));
    }
    let stack = Stack::new(environment.clone(), &domain, layers, true);
    let view = stack.view();
    let whole = GuestRange::new(GuestOffset::ZERO, DISK_BYTES);
    view.map(whole).await.expect("places");
    let before = reads(&environment);
    view.map(whole).await.expect("places");
    let lookup_reads = reads(&environment) - before;
    let before = reads(&environment);
    for turn in 0..READS {
        let block = if turn < WRITES { written[turn as usize].0 } else { chance.below(DISK_BYTES / BLOCK) };
        let (result, buffer) = view.read(GuestOffset::new(block * BLOCK), AlignedBuffer::zeroed(BLOCK as usize).into()).await;
        result.expect("a read");
        let expected = model.get(&block).map_or(BASE, |(_, byte)| *byte);
        assert!(buffer.into_owned().iter().all(|byte| *byte == expected), "block {block} over {overlays} overlays");
    }
    Cost { lookup_reads, reads: reads(&environment) - before, map_bytes: view.map_bytes() }
}

#[test]
fn lookups_cost_the_same_at_any_depth() {
    let seed = std::env::var("SNAPFENCE_SEED").map_or_else(|_| std::process::id().into(), |seed| seed.parse().expect("a number"));
    println!("SNAPFENCE_SEED={seed}");
    let measure = |overlays| {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        simulation.block_on(cost(environment, overlays, seed))
    };
    let (shallow, deep) = (measure(1), measure(499));
    assert_eq!(shallow, deep);
    assert_eq!((shallow.lookup_reads, shallow.reads), (0, READS));
}

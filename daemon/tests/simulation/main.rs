//! The whole daemon in a simulation, many times: the manager with its catalogue, queue threads with their rings, stacks, and a guest that writes,
//! reads and flushes on two or three disks while group snapshots are taken. A power cut or a kill ends the daemon at any instant, and another
//! one goes on. One seed is one run, in one thread. What must hold:
//!
//! 1. A read gives what was last written.
//! 2. What a flush has covered survives a power cut; what was acknowledged survives a kill, and what was in flight then completes, once.
//! 3. A frozen snapshot holds all that was complete when it was asked for, and nothing that was submitted after its answer.
//! 4. It is one cut through all its disks: if it misses something, it has nothing that was submitted after that was complete.
//! 5. Frozen layers do not change, nor does what is frozen become anything else.
//! 6. No image is corrupt.
//!
//! `SNAPFENCE_SEEDS`: how many; `SNAPFENCE_SEED`: this one, with all that happens in it.

#[path = "../../src/vring/driver.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod driver;
mod guest;
mod interrupt;
mod model;
#[path = "../common/queue_thread.rs"]
mod queue_thread;
mod run;
#[path = "../manager/support.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use snapfenced::vring::{GuestMemory, Ring, RingFeatures, RingLayout, Used};

/// Seeds where nobody asks for another number.
const SEEDS: u64 = 20_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|error| panic!("{variable}: {error}")))
}

#[test]
fn nothing_is_lost_and_every_snapshot_is_one_cut() {
    if let Some(seed) = number("SNAPFENCE_SEED") {
        eprintln!("{:?}", run::run(seed, true));
        return;
    }
    let seeds = number("SNAPFENCE_SEEDS").unwrap_or(SEEDS);
    let (next, failures, simulated) = (AtomicU64::new(0), Mutex::new(Vec::new()), Mutex::new(Duration::ZERO));
    let counts: [AtomicU64; 5] = Default::default();
    let failed = Mutex::new(BTreeMap::<String, u64>::new());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let Ok(outcome) = catch_unwind(|| run::run(seed, false)) else {
                        eprintln!("seed {seed} fails: SNAPFENCE_SEED={seed} cargo test -p snapfenced --test simulation -- --nocapture");
                        failures.lock().expect("no panics").push(seed);
                        continue;
                    };
                    let found = [outcome.requests, outcome.frozen, outcome.power_cuts, outcome.kills, outcome.errors];
                    for (count, more) in counts.iter().zip(found) {
                        count.fetch_add(more, Ordering::Relaxed);
                    }
                    for (why, times) in outcome.failed {
                        *failed.lock().expect("no panics").entry(why).or_default() += times;
                    }
                    *simulated.lock().expect("no panics") += outcome.simulated;
                }
            });
        }
    });
    let (real, simulated) = (began.elapsed().as_secs_f64(), simulated.lock().expect("no panics").as_secs_f64());
    let [requests, frozen, power_cuts, kills, errors] = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    eprintln!("{seeds} seeds, {:.0} seeds per second, {:.3} simulated seconds per real second", seeds as f64 / real, simulated / real);
    let failed = failed.into_inner().expect("no panics");
    let not = failed.values().sum::<u64>();
    eprintln!("{requests} requests, {errors} of them failed, {frozen} snapshots frozen, {not} not, {power_cuts} power cuts, {kills} kills");
    for (why, times) in failed {
        eprintln!("{times} snapshots failed: {why}");
    }
    let mut failures = failures.lock().expect("no panics").clone();
    failures.sort_unstable();
    assert!(failures.is_empty(), "{} of {seeds} seeds fail: {:?}", failures.len(), &failures[..failures.len().min(20)]);
    assert!(seeds < 100 || (frozen > seeds && power_cuts > seeds / 3 && kills > seeds / 3), "too little happens");
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in 0..20 {
        assert_eq!(run::run(seed, false), run::run(seed, false), "seed {seed}");
    }
}

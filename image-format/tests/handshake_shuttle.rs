//! The handshake of the fence in chosen and random interleavings of a larger host (shuttle).
//!
//! Compiles the files of the library that the handshake consists of over shuttle's primitives, which are sequentially consistent. Schedules are
//! random, or chosen so that bugs of a small depth are found with a known probability (PCT). A failing schedule is printed by shuttle, which
//! replays it.
//!
//! `SNAPFENCE_SEED` chooses the schedules, `SNAPFENCE_SEEDS` how many of each kind.

#[allow(dead_code, unreachable_pub, reason = "part of the library, of which the handshake uses a part")]
#[path = "../src/stack/fence.rs"]
mod fence;
#[path = "handshake/model.rs"]
mod model;
#[allow(dead_code, unreachable_pub, reason = "part of the library, of which the handshake uses a part")]
#[path = "../src/stack/retire.rs"]
mod retire;
#[allow(dead_code, unreachable_pub, reason = "part of the library, of which the handshake uses a part")]
#[path = "../src/runtime/wait.rs"]
mod wait;

mod runtime {
    pub(crate) use crate::wait::WaitQueue;
}

mod primitives {
    pub(crate) use shuttle::future::block_on;
    pub(crate) use shuttle::thread::spawn;
}

mod sync {
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
}

use std::time::Instant;

use model::{Ending, Shape};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

/// How many switches at the right places PCT looks for.
const PCT_DEPTH: usize = 4;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn explore(name: &str, schedules: usize, shape: Shape) {
    let seed = number("SNAPFENCE_SEED").unwrap_or(1);
    let schedules = number("SNAPFENCE_SEEDS").map_or(schedules, |seeds| usize::try_from(seeds).expect("fits"));
    println!("{name}: seed {seed}");
    let began = Instant::now();
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let (mut config, shape) = (Config::new(), shape.clone());
        config.stack_size = 1 << 17;
        Runner::new(scheduler, config).run(move || model::run(&shape))
    };
    let random = run(Box::new(RandomScheduler::new_from_seed(seed, schedules)));
    let pct = run(Box::new(PctScheduler::new_from_seed(seed, PCT_DEPTH, schedules)));
    println!("{name}: {random} random and {pct} PCT schedules, {:.1} s", began.elapsed().as_secs_f64());
}

#[test]
fn four_devices_with_four_queues_are_cut_at_one_point() {
    explore(
        "4x4, two snapshots",
        3_000,
        Shape {
            devices: 4,
            queues: 4,
            shared_threads: false,
            looks_twice: true,
            requests: 3,
            snapshots: vec![Ending::Waits, Ending::Waits],
        },
    );
}

#[test]
fn holding_completions_makes_the_cut_consistent() {
    let snapshots = vec![Ending::Waits, Ending::Waits];
    explore(
        "4x4, holding alone",
        3_000,
        Shape { devices: 4, queues: 4, shared_threads: false, looks_twice: false, requests: 3, snapshots },
    );
}

#[test]
fn fences_that_expire_or_are_given_up_leave_nobody_waiting() {
    let snapshots = vec![Ending::Expires, Ending::Waits, Ending::Aborted, Ending::Expires];
    explore("4x4, expiry", 2_000, Shape { devices: 4, queues: 4, shared_threads: false, looks_twice: true, requests: 3, snapshots });
}

#[test]
fn two_devices_with_two_queues_are_cut_at_one_point() {
    explore(
        "2x2, three snapshots",
        10_000,
        Shape {
            devices: 2,
            queues: 2,
            shared_threads: true,
            looks_twice: true,
            requests: 4,
            snapshots: vec![Ending::Waits, Ending::Expires, Ending::Waits],
        },
    );
}

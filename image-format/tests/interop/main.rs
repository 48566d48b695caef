//! Images pass between QEMU's tools and us: what one writes the other reads, byte for byte, on the same file and in turns.
//!
//! Every case makes a chain of images with a random geometry, by `qemu-img` or by us, and writes to each layer while it is the top: a list of
//! operations by `qemu-io`, one by our stack over io_uring, and so on; sometimes `qemu-io` is killed with refcounts out of date, and the disk
//! becomes larger. A model of plain bytes says what must be read. After each turn our
//! stack reads the whole disk and our check finds nothing; after each of ours, and at the end, `qemu-img compare` and `qemu-img check` agree
//! that the bytes are those of the model and that nothing has leaked. Internal snapshots are compared at the end.
//!
//! Every case follows from its seed, which a failure names. Half of the cases of a run are always the same, the others new ones each time, whose
//! seeds are printed. `SNAPFENCE_SEED=n` repeats one, `SNAPFENCE_SEEDS=n` tries so many (with both: so many from that one on) instead of the usual
//! number.

mod case;
mod disk;
mod geometry;
mod operation;
mod ours;
mod qemu;

use std::any::Any;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// Cases in a run.
const CASES: u64 = 500;
/// Cases at a time.
const THREADS: usize = 2;
/// After so many failed cases no more are tried.
const MAX_FAILURES: usize = 5;

#[test]
fn images_pass_between_qemu_and_us() {
    let number = |variable| std::env::var(variable).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds: Vec<u64> = match number("SNAPFENCE_SEED") {
        Some(seed) => (seed..seed + number("SNAPFENCE_SEEDS").unwrap_or(1)).collect(),
        None => {
            let count = number("SNAPFENCE_SEEDS").unwrap_or(CASES);
            let (fixed, new) = (count.div_ceil(2), count / 2);
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set");
            // Far from the fixed ones, and short enough to be typed.
            let first = since_1970.as_secs() * 1000;
            // Past the harness, which keeps what a passing test prints: a run that hangs or is killed is to be repeated as well.
            let _ = writeln!(std::io::stderr(), "new cases of this run: SNAPFENCE_SEED={first} SNAPFENCE_SEEDS={new}");
            (0..fixed).chain(first..first + new).collect()
        }
    };
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new(case::Totals::default());
    let work = || {
        let mut mine = case::Totals::default();
        while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failures.lock().expect("no panics").len() >= MAX_FAILURES {
                break;
            }
            match catch_unwind(AssertUnwindSafe(|| case::run(seed))) {
                Ok(totals) => mine += totals,
                Err(panic) => failures.lock().expect("no panics").push(format!("SNAPFENCE_SEED={seed}: {}", message(&*panic))),
            }
        }
        *totals.lock().expect("no panics") += mine;
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
    println!("{:?}", totals.lock().expect("no panics"));
    let failures = failures.into_inner().expect("no panics");
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n\n"));
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

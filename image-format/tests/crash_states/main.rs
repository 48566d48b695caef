//! The power goes off at every step of short histories, and every disk that it may leave is looked at: all histories of up to three operations
//! from a small alphabet, snapshots among them, on stacks so small that nothing has to be left out, and longer ones by chance. From each disk the
//! stack is recovered (leaks are repaired, it is opened and closed), and the power goes off at every step of that as well, again and again until
//! no disk comes out that was not seen before.
//!
//! What must be found: all that a flush has acknowledged; of the rest, old or new, sector by sector; frozen layers as they were cut; no
//! corruption, by our own check and, for a share of the disks, by QEMU's; leaks at worst, which are gone after the repair.
//!
//! Recovering depends on what is on the disk and on nothing else, so a disk that comes out twice is recovered once, and compared each time with
//! what must be found there. Where too many disks are possible some are drawn by chance, and counted. `SNAPFENCE_SEED` gives another order of
//! completions and other draws. `SNAPFENCE_SEEDS=n` looks at so many long histories only, `SNAPFENCE_LENGTH=n` only at histories of up to n
//! operations, and does not ask then whether much was seen: for runs with many changed programs.

mod course;
mod expected;
mod faults;
mod foreign;
mod layout;
#[path = "../model/pattern.rs"]
mod pattern;
#[path = "../model/qemu.rs"]
mod qemu;
mod recovery;
mod tally;

use std::sync::atomic::{AtomicUsize, Ordering};

use course::{Course, Limits};
use layout::LAYOUTS;
use recovery::Recoveries;
use tally::Tally;

/// Operations of the histories of which none is left out.
const LENGTH: usize = 3;
/// How many long histories there are.
const LONG: u64 = 200;
/// One disk in so many is shown to QEMU.
const SHORT_FOREIGN_EVERY: u64 = 160;
const LONG_FOREIGN_EVERY: u64 = 256;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn seed() -> u64 {
    number("SNAPFENCE_SEED").unwrap_or(1)
}

/// Lets no course begin any more when one has failed.
struct StopAll<'a>(&'a AtomicUsize);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(usize::MAX / 2, Ordering::Relaxed);
        }
    }
}

/// Runs all courses, on as many threads as there are processors.
fn run_all(name: &str, courses: &[Course], limits: Limits, foreign_every: u64) -> Tally {
    let recoveries = Recoveries::new(foreign_every);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let mut tally = std::thread::scope(|scope| {
        let run = || {
            let _stop = StopAll(&next);
            let mut tally = Tally::default();
            while let Some(course) = courses.get(next.fetch_add(1, Ordering::Relaxed)) {
                tally += course.run(limits, &recoveries);
            }
            tally
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let mut all = Tally::default();
        for worker in workers {
            all += worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        all
    });
    tally += recoveries.tally();
    eprintln!("{name}, seed {}: {tally}", seed());
    tally
}

#[test]
fn no_crash_of_a_short_history_loses_anything() {
    let less = number("SNAPFENCE_LENGTH");
    let mut courses = Vec::new();
    for layout in &LAYOUTS {
        for length in 0..=less.map_or(LENGTH, |length| length as usize) {
            let letters = layout.letters();
            for number in 0..letters.len().pow(length as u32) {
                let steps = (0..length as u32).map(|place| letters[number / letters.len().pow(place) % letters.len()].clone()).collect();
                courses.push(Course { layout, steps, seed: seed() });
            }
        }
    }
    let tally = run_all("short histories", &courses, Limits::SHORT, SHORT_FOREIGN_EVERY);
    assert_eq!(tally.histories, courses.len() as u64);
    if less.is_some() {
        return;
    }
    // So that it does not get less unnoticed. What is lost or corrupt has failed already.
    assert!(tally.states + tally.second_states >= 1_000_000 && tally.distinct >= 50_000, "{tally}");
    assert_eq!((tally.drawn_points, tally.second_drawn_points), (0, 0), "everything was looked at: {tally}");
    assert!(tally.foreign >= 200 && tally.leaky > 5000, "{tally}");
}

#[test]
fn no_crash_of_a_long_history_loses_anything() {
    let less = number("SNAPFENCE_SEEDS");
    let courses: Vec<_> = (0..less.unwrap_or(LONG))
        .map(|number| Course::random(&LAYOUTS[number as usize / 2 % LAYOUTS.len()], seed().wrapping_mul(LONG) + number))
        .collect();
    let tally = run_all("long histories", &courses, Limits::LONG, LONG_FOREIGN_EVERY);
    assert_eq!(tally.histories, courses.len() as u64);
    assert!(less.is_some() || tally.states > 1000 && tally.leaky > 0 && tally.second_states > 0, "{tally}");
}

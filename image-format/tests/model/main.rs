//! Random operations of several clients beside a model of what each sector may hold, on a simulated disk that crashes at every step.
//!
//! What it proves: no read ever gives what no write explains, nothing is lost that a successful flush had covered, and after every crash the
//! image opens, checks and goes on. The oracles are in `history.rs`. Every run follows from its seed, which a failure names;
//! `SNAPFENCE_SEED=n` repeats that one, `SNAPFENCE_SEEDS=n` tries so many instead of the usual number, both together so many from that one on.

mod catalogue;
mod clients;
mod disk;
mod file;
mod group;
mod history;
mod journal;
mod layer;
mod pattern;
mod qcow2;
mod qemu;
mod queues;
mod snapshots;
mod stack;
mod workload;

use workload::Report;

/// Runs a test with many seeds.
fn for_seeds(name: &str, usual: u64, mut test: impl FnMut(u64) -> Report) {
    let number = |variable| std::env::var(variable).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match (number("SNAPFENCE_SEED"), number("SNAPFENCE_SEEDS")) {
        (Some(first), how_many) => first..first + how_many.unwrap_or(1),
        (None, how_many) => 0..how_many.unwrap_or(usual),
    };
    struct Named<'a>(&'a str, u64);
    impl Drop for Named<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("{}: failed with SNAPFENCE_SEED={}", self.0, self.1);
            }
        }
    }
    let mut total = Report::default();
    for seed in seeds.clone() {
        let _named = Named(name, seed);
        total += test(seed);
    }
    eprintln!("{name}: seeds {seeds:?}: {total:?}");
}

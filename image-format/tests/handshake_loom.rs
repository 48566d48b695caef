//! The handshake of the fence in every interleaving of a small host (loom).
//!
//! Compiles the files of the library that the handshake consists of over loom's primitives. Loom treats sequentially consistent accesses as
//! acquire and release, which is weaker; so each such access stands between two sequentially consistent fences here, which loom knows. A program
//! all of whose accesses are sequentially consistent means the same with them. Weaker accesses stay as weak as they are written.

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
    pub(crate) use loom::future::block_on;
    pub(crate) use loom::thread::spawn;
}

mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) mod atomic {
        pub(crate) use loom::sync::atomic::Ordering;
        use loom::sync::atomic::fence;

        fn ordered<T>(ordering: Ordering, access: impl FnOnce() -> T) -> T {
            if ordering != Ordering::SeqCst {
                return access();
            }
            fence(Ordering::SeqCst);
            let result = access();
            fence(Ordering::SeqCst);
            result
        }

        macro_rules! atomic {
            ($name:ident, $value:ty) => {
                #[derive(Debug)]
                pub(crate) struct $name(loom::sync::atomic::$name);

                #[allow(dead_code, reason = "not every type needs every access")]
                impl $name {
                    pub(crate) fn new(value: $value) -> Self {
                        Self(loom::sync::atomic::$name::new(value))
                    }

                    pub(crate) fn load(&self, ordering: Ordering) -> $value {
                        ordered(ordering, || self.0.load(ordering))
                    }

                    pub(crate) fn store(&self, value: $value, ordering: Ordering) {
                        ordered(ordering, || self.0.store(value, ordering));
                    }

                    pub(crate) fn compare_exchange(
                        &self,
                        current: $value,
                        new: $value,
                        success: Ordering,
                        failure: Ordering,
                    ) -> Result<$value, $value> {
                        ordered(success, || self.0.compare_exchange(current, new, success, failure))
                    }
                }
            };
        }

        atomic!(AtomicBool, bool);
        atomic!(AtomicU8, u8);
        atomic!(AtomicU64, u64);
        atomic!(AtomicUsize, usize);

        impl AtomicU64 {
            pub(crate) fn fetch_add(&self, value: u64, ordering: Ordering) -> u64 {
                ordered(ordering, || self.0.fetch_add(value, ordering))
            }

            pub(crate) fn fetch_or(&self, value: u64, ordering: Ordering) -> u64 {
                ordered(ordering, || self.0.fetch_or(value, ordering))
            }
        }
    }
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use model::{Ending, Shape};

/// Explores what the shape can do with at most `preemptions` switches away from a thread that could go on; those away from threads that wait are
/// not counted. `SNAPFENCE_PREEMPTIONS` sets another bound, or `none`. Each further preemption costs some seventyfold.
fn explore(name: &str, preemptions: usize, shape: Shape) {
    let preemptions = match std::env::var("SNAPFENCE_PREEMPTIONS") {
        Ok(bound) if bound == "none" => None,
        Ok(bound) => Some(bound.parse().expect("SNAPFENCE_PREEMPTIONS is a number, or none")),
        Err(_) => Some(preemptions),
    };
    let began = Instant::now();
    let executions = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model::run(&shape);
    });
    let bound = preemptions.map_or("all there are".to_owned(), |bound| format!("all with at most {bound} preemptions"));
    println!("{name}: {} executions ({bound}), {:.1} s", executions.load(Relaxed), began.elapsed().as_secs_f64());
}

fn two_by_two(snapshots: Vec<Ending>) -> Shape {
    Shape { devices: 2, queues: 2, shared_threads: true, looks_twice: true, requests: 1, snapshots }
}

#[test]
fn two_devices_with_two_queues_are_cut_at_one_point() {
    explore("2x2", 2, two_by_two(vec![Ending::Waits]));
}

#[test]
fn holding_completions_makes_the_cut_consistent() {
    explore("2x2, holding alone", 2, Shape { looks_twice: false, ..two_by_two(vec![Ending::Waits]) });
    explore("2x2, holding alone, four threads", 1, Shape { looks_twice: false, shared_threads: false, ..two_by_two(vec![Ending::Waits]) });
}

#[test]
fn four_threads_are_cut_at_one_point() {
    explore("2x2, four threads", 1, Shape { shared_threads: false, ..two_by_two(vec![Ending::Waits]) });
}

#[test]
fn a_second_snapshot_follows_the_first() {
    explore("2x2, two snapshots", 2, two_by_two(vec![Ending::Waits, Ending::Waits]));
}

#[test]
fn a_fence_that_expires_leaves_nobody_waiting() {
    explore("2x2, expiry", 2, two_by_two(vec![Ending::Expires]));
    explore("2x2, a snapshot after expiry", 2, two_by_two(vec![Ending::Expires, Ending::Waits]));
}

#[test]
fn a_fence_that_is_given_up_leaves_nobody_waiting() {
    explore("2x2, a snapshot after one given up", 2, two_by_two(vec![Ending::Aborted, Ending::Waits]));
}

#[test]
fn requests_in_flight_end_before_their_layer_is_frozen() {
    explore("2x2, two requests each", 2, Shape { requests: 2, ..two_by_two(vec![Ending::Waits]) });
}

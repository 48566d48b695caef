//! The protocol of the fence, explored completely: every state that a small host can reach, with any number of preemptions.
//!
//! `handshake_loom.rs` runs the code itself, but with few preemptions. This is a model of it, written down a second time and only as good
//! as it is faithful; to be read beside `stack/fence.rs` and `handshake/model.rs`, whose words it uses. It has the control thread, queue
//! threads with one queue of one device or of each, and the watch over deadlines.
//!
//! One transition is one access to shared memory: a load, a store, a read-modify-write, or a critical section of which nobody sees the
//! inside. What a thread then does for itself belongs to the transition. Where the model is not as the code, it has more interleavings
//! rather than fewer: several threads may check a fence at once (the lock around its members is left out), a view is dropped as soon as its
//! user has no need of it, a deadline may pass as soon as the fence is pending, and whoever waits goes on whenever its condition holds.
//! What concerns nobody any more is done along with the transition before (`Shape::settle`), which leaves out no outcome; two shapes are
//! explored without that too.
//!
//! Not modelled: memory that is weaker than sequentially consistent (the code asks for nothing weaker; loom looks at what it asks for), the
//! queues in which sleepers are woken (loom has the real ones), threads that join or attach while a fence is switching, the order in which
//! they attached (marks are checked in one order), a completed fence's times, and clocks.
//!
//! What is checked:
//! - what was taken after a completion had been seen never lies in an older layer than the request that completed: on one device always,
//!   over all devices if the fence was released;
//! - no write reaches a layer that is frozen; what has become of a fence is final, and it is released if nothing else ends it;
//! - a state without a successor is one in which every thread has ended, every request is published (once: its slot is used up) and no
//!   fence is pending. So nobody is left waiting.
//!
//! Mistakes that are planted in the protocol must be found, which shows that these checks can fail.

mod explore;
mod protocol;

use Ending::{Aborted, Expires, Waits};
use protocol::{Defect, Ending, Shape};

/// Two threads, each of which serves one queue of both devices.
const SHARED: &[&[usize]] = &[&[0, 1], &[0, 1]];
/// Three threads with one queue of one device each, of which a run of the tests explores all. A fourth makes it some sixty times as much: minutes,
/// and gigabytes of memory. It is explored too if `SNAPFENCE_FOUR_THREADS` is set.
const TWO_AND_ONE: &[&[usize]] = &[&[0], &[0], &[1]];
const ONE_AND_TWO: &[&[usize]] = &[&[0], &[1], &[1]];
const FOUR: &[&[usize]] = &[&[0], &[0], &[1], &[1]];

fn shape(serves: &'static [&'static [usize]], snapshots: &[Ending]) -> Shape {
    Shape { serves, looks_twice: true, takes_time: false, requests: 1, snapshots: snapshots.to_vec(), settles: true, defect: None }
}

#[test]
fn two_devices_with_two_queues_are_cut_at_one_point() {
    shape(SHARED, &[Waits]).holds("2x2");
    Shape { takes_time: true, ..shape(SHARED, &[Waits]) }.holds("2x2, guest and storage slow");
    Shape { requests: 2, ..shape(SHARED, &[Waits]) }.holds("2x2, two requests each");
}

#[test]
fn holding_completions_makes_the_cut_consistent() {
    let alone = Shape { looks_twice: false, ..shape(SHARED, &[Waits]) };
    alone.holds("2x2, holding alone");
    Shape { takes_time: true, ..alone.clone() }.holds("2x2, holding alone, guest and storage slow");
    Shape { requests: 2, ..alone.clone() }.holds("2x2, holding alone, two requests each");
    Shape { serves: ONE_AND_TWO, ..alone }.holds("1+2 threads, holding alone");
}

#[test]
fn threads_with_a_queue_each_are_cut_at_one_point() {
    shape(TWO_AND_ONE, &[Waits]).holds("2+1 threads");
    if std::env::var_os("SNAPFENCE_FOUR_THREADS").is_some() {
        shape(FOUR, &[Expires]).holds("2x2, four threads, expiry");
        shape(FOUR, &[Waits]).holds("2x2, four threads");
    }
}

#[test]
fn a_second_snapshot_follows_the_first() {
    shape(SHARED, &[Waits, Waits]).holds("2x2, two snapshots");
    Shape { looks_twice: false, ..shape(SHARED, &[Waits, Waits]) }.holds("2x2, holding alone, two snapshots");
}

#[test]
fn a_fence_that_expires_leaves_nobody_waiting() {
    shape(SHARED, &[Expires]).holds("2x2, expiry");
    Shape { takes_time: true, ..shape(SHARED, &[Expires]) }.holds("2x2, expiry, guest and storage slow");
    Shape { requests: 2, ..shape(SHARED, &[Expires]) }.holds("2x2, expiry, two requests each");
    shape(TWO_AND_ONE, &[Expires]).holds("2+1 threads, expiry");
    shape(SHARED, &[Expires, Waits]).holds("2x2, a snapshot after expiry");
}

#[test]
fn a_fence_that_is_given_up_leaves_nobody_waiting() {
    shape(SHARED, &[Aborted, Waits]).holds("2x2, a snapshot after one given up");
    Shape { looks_twice: false, ..shape(SHARED, &[Aborted, Waits]) }.holds("2x2, holding alone, after one given up");
}

#[test]
fn nothing_hides_in_transitions_that_are_left_out() {
    Shape { settles: false, looks_twice: false, ..shape(SHARED, &[Waits]) }.holds("2x2, holding alone, every transition");
    Shape { settles: false, ..shape(SHARED, &[Expires]) }.holds("2x2, expiry, every transition");
}

#[test]
fn planted_defects_are_found() {
    let waits = Shape { looks_twice: false, ..shape(SHARED, &[Waits]) };
    let expires = shape(SHARED, &[Expires]);
    let own_queues = Shape { serves: TWO_AND_ONE, ..waits.clone() };
    let slow = Shape { takes_time: true, ..waits.clone() };
    let (overtaken, torn) =
        ("a request went beneath one from which it follows", "a cut has a request but not another, from which it follows");
    let cases = [
        (&waits, Defect::CompletionsAreNotHeld, overtaken),
        (&waits, Defect::AdvancesBeforePublishing, torn),
        (&expires, Defect::PendsBeforeAdvancing, overtaken),
        (&waits, Defect::DoesNotShowLooking, torn),
        (&waits, Defect::ChecksOneMark, torn),
        (&own_queues, Defect::ChecksOneDevice, torn),
        (&waits, Defect::PassedBeforeTheSwitch, torn),
        (&waits, Defect::SwitchDoesNotCheck, "somebody is left waiting"),
        (&waits, Defect::ParkingDoesNotRelease, "somebody is left waiting"),
        (&slow, Defect::FreezesWithoutWaiting, "a write reaches a frozen layer"),
        (&expires, Defect::EndsMoreThanOnce, "a fence ends twice"),
    ];
    for (shape, defect, expected) in cases {
        let shape = Shape { defect: Some(defect), settles: false, ..shape.clone() };
        assert_eq!(shape.violation(&format!("{defect:?}")), Some(expected), "{defect:?}");
    }
    let unasked = Shape { looks_twice: false, settles: false, ..expires };
    assert_eq!(unasked.violation("expiry, is_stale not asked"), Some(overtaken));
}

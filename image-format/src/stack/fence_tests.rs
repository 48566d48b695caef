//! What a fence does, step by step; its interleavings are for `tests/handshake_loom.rs` and `tests/handshake_shuttle.rs`.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Context, Waker};
use std::time::Duration;

use super::fence::{Fence, FenceDomain, FenceOutcome, Marks};

fn domain() -> Arc<FenceDomain> {
    FenceDomain::new(|| Duration::ZERO)
}

fn fence_over(domain: &Arc<FenceDomain>, marks: &[&Arc<Marks>]) -> Arc<Fence> {
    let fence = domain.fence();
    for marks in marks {
        let _ = fence.add_member(marks);
    }
    fence
}

#[test]
fn a_fence_waits_for_running_threads_and_not_for_parked_ones() {
    let domain = domain();
    let marks = Arc::new(Marks::default());
    let (mut running, parked) = (domain.join(), domain.join());
    let _attachments = [running.attach(&marks), parked.attach(&marks)];
    running.begin_turn(|| {});
    let fence = fence_over(&domain, &[&marks]);
    fence.switch();
    assert_eq!(fence.outcome(), None);
    let mut reloaded = false;
    running.begin_turn(|| reloaded = true);
    assert!(reloaded);
    assert_eq!(fence.outcome(), Some(FenceOutcome::Released));
}

#[test]
fn parking_ending_and_detaching_release_as_well() {
    let domain = domain();
    for way in 0..3 {
        let marks = Arc::new(Marks::default());
        let mut running = domain.join();
        let attachment = running.attach(&marks);
        running.begin_turn(|| {});
        let fence = fence_over(&domain, &[&marks]);
        fence.switch();
        assert_eq!(fence.outcome(), None);
        match way {
            0 => running.park(),
            1 => drop(running),
            _ => drop(attachment),
        }
        assert_eq!(fence.outcome(), Some(FenceOutcome::Released), "way {way}");
    }
}

#[test]
fn threads_of_other_stacks_are_not_waited_for() {
    let domain = domain();
    let (ours, others) = (Arc::new(Marks::default()), Arc::new(Marks::default()));
    let mut stuck = domain.join();
    let _attachment = stuck.attach(&others);
    stuck.begin_turn(|| {});
    let fence = fence_over(&domain, &[&ours]);
    fence.switch();
    assert_eq!(fence.outcome(), Some(FenceOutcome::Released));
}

#[test]
fn an_expired_fence_is_never_released_late() {
    let domain = domain();
    let marks = Arc::new(Marks::default());
    let mut running = domain.join();
    let _attachment = running.attach(&marks);
    running.begin_turn(|| {});
    let fence = fence_over(&domain, &[&marks]);
    fence.switch();
    assert_eq!(fence.expire(), FenceOutcome::Expired);
    running.begin_turn(|| {});
    assert_eq!(fence.outcome(), Some(FenceOutcome::Expired));
}

#[test]
fn a_deadline_passes_although_nobody_who_waits_can_move() {
    let start = std::time::Instant::now();
    let looks = Arc::new(AtomicU64::new(0));
    let looked = Arc::clone(&looks);
    let domain = FenceDomain::new(move || {
        looked.fetch_add(1, SeqCst);
        start.elapsed()
    });
    let watched = Arc::clone(&domain);
    std::thread::spawn(move || watched.expire_overdue());
    let marks = Arc::new(Marks::default());
    let mut running = domain.join();
    let _attachment = running.attach(&marks);
    for deadlines_ms in [&[30_u64][..], &[200, 20], &[20, 200]] {
        running.begin_turn(|| {});
        let fences: Vec<_> =
            deadlines_ms.iter().map(|deadline| (fence_over(&domain, &[&marks]), Duration::from_millis(*deadline))).collect();
        let began = start.elapsed();
        for (fence, deadline) in &fences {
            fence.switch_until(began + *deadline);
        }
        for (fence, deadline) in &fences {
            while fence.outcome().is_none() {
                assert!(start.elapsed() - began < Duration::from_secs(60), "it does not expire");
                std::thread::yield_now();
            }
            assert_eq!(fence.outcome(), Some(FenceOutcome::Expired));
            assert!(start.elapsed() - began >= *deadline, "too early");
        }
    }
    let quick = fence_over(&domain, &[]);
    quick.switch_until(Duration::MAX);
    assert_eq!(quick.outcome(), Some(FenceOutcome::Released));
    assert!(looks.load(SeqCst) < 1000, "it sleeps until the next deadline instead of looking all the time");
}

#[test]
fn each_stack_is_measured_for_itself() {
    let now = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now);
    let domain = FenceDomain::new(move || Duration::from_micros(clock.load(SeqCst)));
    let (quick, slow) = (Arc::new(Marks::default()), Arc::new(Marks::default()));
    let mut threads = [domain.join(), domain.join()];
    let _attachments = [threads[0].attach(&quick), threads[1].attach(&slow)];
    threads.iter_mut().for_each(|thread| thread.begin_turn(|| {}));
    let fence = domain.fence();
    let members = [&quick, &slow].map(|marks| fence.add_member(marks));
    fence.switch();
    for (thread, time) in threads.iter_mut().zip([3, 50]) {
        now.store(time, SeqCst);
        thread.begin_turn(|| {});
    }
    assert_eq!(members.map(|member| member.times().switch.as_micros()), [3, 50]);
    assert_eq!((fence.outcome(), fence.times().switch.as_micros()), (Some(FenceOutcome::Released), 50));
}

#[test]
fn a_thread_that_was_parked_loads_its_views_again() {
    let domain = domain();
    let mut thread = domain.join();
    let mut loads = 0;
    thread.begin_turn(|| loads += 1);
    thread.begin_turn(|| loads += 1);
    thread.park();
    thread.begin_turn(|| loads += 1);
    assert_eq!(loads, 2);
}

#[test]
fn views_are_stale_from_a_switch_to_the_next_turn() {
    let domain = domain();
    let mut thread = domain.join();
    thread.begin_turn(|| {});
    assert!(!thread.is_stale());
    fence_over(&domain, &[]).switch();
    assert!(thread.is_stale());
    thread.begin_turn(|| {});
    assert!(!thread.is_stale());
}

#[test]
fn a_fence_that_has_ended_is_forgotten_and_others_are_not() {
    let domain = domain();
    let marks = [Arc::new(Marks::default()), Arc::new(Marks::default())];
    let mut threads = [domain.join(), domain.join()];
    let _attachments = [threads[0].attach(&marks[0]), threads[1].attach(&marks[1])];
    threads.iter_mut().for_each(|thread| thread.begin_turn(|| {}));
    let fences = [fence_over(&domain, &[&marks[0]]), fence_over(&domain, &[&marks[1]])];
    fences.iter().for_each(Fence::switch);
    let [first, second] = fences;
    threads[0].park();
    assert_eq!((first.outcome(), second.outcome()), (Some(FenceOutcome::Released), None));
    let kept = Arc::downgrade(&first);
    drop(first);
    assert!(kept.upgrade().is_none(), "nobody keeps it");
    threads[1].park();
    assert_eq!(second.outcome(), Some(FenceOutcome::Released));
}

#[test]
fn what_is_held_is_let_go_when_its_fence_ends_and_not_held_afterwards() {
    let now = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now);
    let domain = FenceDomain::new(move || Duration::from_micros(clock.load(SeqCst)));
    let fence = domain.fence();
    let members = [(); 2].map(|()| fence.add_member(&Arc::default()));
    let mut context = Context::from_waker(Waker::noop());
    let mut held = pin!(members[0].hold_completion());
    assert!(held.as_mut().poll(&mut context).is_pending());
    now.store(7, SeqCst);
    assert!(held.as_mut().poll(&mut context).is_pending());
    assert_eq!(fence.expire(), FenceOutcome::Expired);
    assert!(held.poll(&mut context).is_ready());
    assert!(pin!(members[1].hold_completion()).poll(&mut context).is_ready());
    assert_eq!([0, 1].map(|which: usize| members[which].times().longest_hold.as_micros()), [7, 0]);
    assert_eq!(fence.times().longest_hold.as_micros(), 7);
}

#[test]
fn logs_tell_how_a_fence_has_ended() {
    let domain = domain();
    let fence = domain.fence();
    assert_eq!(format!("{domain:?} {fence:?}"), "FenceDomain(generation 2) Fence { outcome: None, .. }");
    fence.switch();
    assert_eq!(format!("{domain:?} {fence:?}"), "FenceDomain(generation 3) Fence { outcome: Some(Released), .. }");
}

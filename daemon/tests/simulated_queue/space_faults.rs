//! Space, or quota, that is missing at every place where some is needed, for once or until somebody makes some: what is held is done in the end, and
//! the image neither loses, nor mixes up, nor leaks anything.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use snapfence_image_format::qcow2::{CheckOptions, check};

use super::*;

const BYTES: u64 = 2 << 20;
const REQUESTS: usize = 60;
const AT_ONCE: usize = 6;

/// One request for bytes that no other has in flight.
#[derive(Clone, Copy, Debug)]
struct Step {
    kind: u32,
    sector: u64,
    sectors: u64,
    byte: u8,
}

fn steps(chance: &mut Chance) -> VecDeque<Step> {
    let step = |number: usize| {
        let kind = [OUT, OUT, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH][chance.index(7)];
        // Requests of a batch have a part of the disk each.
        let part = BYTES / 512 / AT_ONCE as u64;
        let sectors = 1 + chance.below(16);
        let sector = (number % AT_ONCE) as u64 * part + chance.below(part - sectors);
        Step { kind, sector, sectors, byte: number as u8 + 1 }
    };
    (0..REQUESTS).map(step).collect()
}

/// How a run with missing space went.
struct Run {
    /// How often the device has told of it.
    told: usize,
    /// Requests that the guest has as failed.
    failed: usize,
    /// Whether the image refuses writes since, or cannot be closed in good order.
    is_dead: bool,
}

/// Runs all steps. `limit`: all but so many bytes of space, or of a quota, are taken, until the device tells that it waits. `fault`: one operation
/// is refused.
fn run(seed: u64, cluster_bits: u32, slow: bool, limit: Option<(u64, bool)>, fault: Option<Fault>) -> Run {
    let what = format!("seed {seed}, clusters of 2^{cluster_bits}, allocates slowly: {slow}, {limit:?}, {fault:?}");
    let mut simulation = Simulation::new(seed);
    simulation.environment().set_slow_allocation(slow);
    // Wide counts and small clusters: every kind of table grows.
    create_qcow2(&mut simulation, "/disk", CreateOptions { cluster_bits, refcount_bits: 64, ..CreateOptions::standalone(BYTES) });
    let layer = open_qcow2(&mut simulation, "/disk");
    let mut setting = Setting::over(simulation, vec![layer]);
    let environment = setting.environment.clone();
    let told = Arc::new(AtomicUsize::new(0));
    let (count, disk) = (Arc::clone(&told), environment.clone());
    setting.device.space().report_to(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        disk.set_space_limit(None);
        disk.set_quota(None);
    });
    if let Some((left, is_quota)) = limit {
        let limit = Some(environment.allocated("/disk").expect("a file") + left);
        if is_quota {
            environment.set_quota(limit);
        } else {
            environment.set_space_limit(limit);
        }
    }
    fault.into_iter().for_each(|fault| environment.inject(fault));

    let mut model = vec![Some(0_u8); BYTES as usize];
    let mut chance = Chance::new(seed);
    let mut steps = steps(&mut chance);
    let mut failed = 0;
    while !steps.is_empty() {
        let batch: Vec<Step> = steps.drain(..AT_ONCE.min(steps.len())).collect();
        for (slot, step) in (0..).zip(&batch) {
            match step.kind {
                OUT => setting.submit(slot, OUT, step.sector, Ok(&vec![step.byte; step.sectors as usize * 512])),
                FLUSH => setting.submit(slot, FLUSH, 0, Ok(&[])),
                kind => setting.submit(slot, kind, 0, Ok(&range(step.sector, step.sectors as u32, u32::from(kind == WRITE_ZEROES)))),
            }
        }
        setting.simulation.run_until_stalled();
        let completed = setting.completed();
        assert_eq!(completed.len(), batch.len(), "{what}: some do not come back");
        for (slot, status) in completed {
            let step = batch[usize::from(slot)];
            let place = &mut model[step.sector as usize * 512..(step.sector + step.sectors) as usize * 512];
            failed += usize::from(status != 0);
            match step.kind {
                FLUSH => {}
                _ if status != 0 => place.fill(None),
                OUT => place.fill(Some(step.byte)),
                WRITE_ZEROES => place.fill(Some(0)),
                // Anything may be there.
                _ => place.fill(None),
            }
        }
    }
    let has_failed = setting.device.stack().failure().is_some();
    assert!(has_failed || failed == 0, "{what}: {failed} requests have failed, and the image has not");
    for first in (0..BYTES / 512).step_by(16) {
        assert_eq!(setting.request(IN, first, Err(8192)), 0, "{what}");
        let read = setting.driver.read(DATA + 0x1000, 8192);
        let expected = &model[first as usize * 512..][..8192];
        let wrong = read.iter().zip(expected).position(|(read, expected)| expected.is_some_and(|expected| expected != *read));
        assert_eq!(wrong, None, "{what}: in the 8 KiB from sector {first}");
    }
    let stopped = setting.queue.stop();
    setting.simulation.run_until_stalled();
    stopped.try_recv().expect("nothing is in flight");
    environment.set_space_limit(None);
    environment.set_quota(None);
    let stack = Arc::clone(setting.device.stack());
    let closed = setting.simulation.block_on(async move { stack.close().await });
    let is_dead = has_failed || closed.is_err();
    let mut simulation = Simulation::on(environment.restarted());
    let file = open(&mut simulation, "/disk", Access::Read);
    let report = simulation.block_on(async move { check(&file, &CheckOptions::default()).await });
    let report = report.expect("an image");
    assert!(!report.is_corrupt() && report.contradictions == 0, "{what}: {report:?}");
    assert!(is_dead || report.leaks == 0, "{what}: {report:?}");
    Run { told: told.load(Ordering::Relaxed), failed, is_dead }
}

#[test]
fn a_disk_that_is_full_at_any_point_makes_requests_wait_only() {
    let seed = seed();
    for (cluster_bits, slow, is_quota) in [(9, false, false), (9, false, true), (9, true, false), (12, false, false), (12, true, false)] {
        let (mut waited, mut dead) = (0, 0);
        let mut left = 0;
        loop {
            let run = run(seed, cluster_bits, slow, Some((left, is_quota)), None);
            waited += usize::from(run.told > 0);
            dead += usize::from(run.is_dead);
            if run.told == 0 && !run.is_dead {
                break;
            }
            left += 4096;
        }
        let what = if is_quota { "quota" } else { "disk" };
        eprintln!(
            "{what}, clusters of 2^{cluster_bits}, allocates slowly: {slow}: {waited} runs have waited, {dead} images refused writes"
        );
        assert!(waited > 5 && dead == 0, "{waited} runs have waited, {dead} images refused writes");
    }
}

/// Asking for space again in smaller pieces hides a refusal of it; refused writes of data wait, and refused writes of tables end all writing.
#[test]
fn an_operation_that_finds_no_space_once_harms_nothing() {
    let seed = seed();
    let kinds = [
        (OperationKind::Allocate, libc::ENOSPC),
        (OperationKind::SetLen, libc::ENOSPC),
        (OperationKind::Write, libc::ENOSPC),
        (OperationKind::Write, libc::EDQUOT),
    ];
    for (kind, errno) in kinds {
        let (mut waited, mut failed, mut dead) = (0, 0, 0);
        let mut runs = 0;
        for after in 0.. {
            let fault = Fault::once(kind, after).with(FaultEffect::Error(errno));
            let run = run(seed, 9, after % 2 == 1, None, Some(fault));
            (waited, failed, dead) = (waited + run.told, failed + run.failed, dead + usize::from(run.is_dead));
            runs += 1;
            if run.told == 0 && !run.is_dead && after > 150 {
                break;
            }
        }
        let expected = kind == OperationKind::Write;
        assert!((waited > 50, failed > 0) == (expected, expected), "{kind:?}: {waited} waits, {failed} failed requests");
        eprintln!("{kind:?}: {runs} runs, {waited} waits, {failed} failed requests, {dead} images refused writes");
    }
}

//! Stacks of layers, with overlays put on them while everything goes on.

use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind};

use crate::for_seeds;
use crate::group::{GroupPlan, run_group, some_fault};

#[test]
fn stacks_keep_what_was_flushed_and_snapshots_are_one_point_in_time() {
    for_seeds("stacks", 200, |seed| run_group(GroupPlan::new(seed), |_| false));
}

#[test]
fn stacks_whose_operations_fail_keep_what_was_flushed() {
    for_seeds("stacks with faults", 200, |seed| {
        run_group(GroupPlan::new(seed), |environment| {
            let mut chance = Chance::new(seed ^ 0xfa17);
            environment.inject(some_fault(&mut chance, 30));
            if chance.happens(1, 4) {
                environment.inject(some_fault(&mut chance, 200));
            }
            true
        })
    });
}

#[test]
fn stacks_on_a_full_disk_keep_what_was_flushed() {
    for_seeds("full disk", 60, |seed| {
        run_group(GroupPlan::new(seed), |environment| {
            environment.set_space_limit(Some(Chance::new(seed ^ 0xf011).below(24 << 20)));
            true
        })
    });
}

#[test]
fn operations_that_hang_hold_up_no_snapshot_for_ever() {
    for_seeds("hanging", 60, |seed| {
        run_group(GroupPlan::new(seed), |environment| {
            let mut chance = Chance::new(seed ^ 0x4a26);
            let kind = [OperationKind::Read, OperationKind::Write, OperationKind::Flush][chance.index(3)];
            environment.inject(Fault::once(kind, chance.below(40)).with(FaultEffect::Hang));
            // They end well in the end.
            false
        })
    });
}

#[test]
fn a_seed_repeats_to_the_byte() {
    for seed in [3, 11, 50] {
        let [first, second] = [(); 2].map(|()| run_group(GroupPlan::new(seed), |_| false));
        assert_eq!(format!("{first:?}"), format!("{second:?}"));
    }
}

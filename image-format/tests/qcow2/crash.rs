//! The power goes off at every step of what is done to an image as a whole: making it, counting its refcounts anew, making it larger, freezing
//! it. The image then is what it was before or what it should become, QEMU finds nothing worse than leaks, and it can be used again.
//! (Crashes between random requests are tried by the `model` test.)

use std::path::Path;

use snapfence_image_format::qcow2::{CreateOptions, Header, Preallocate, Qcow2};
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Request, open_file, open_stack, read};
use crate::tools::{Scratch, Verdict};

/// Disks that are tried for one point at which the power goes off.
const STATES: u64 = 6;

const IMAGE: &str = "/a.qcow2";

/// Runs `operation` on a disk with these bytes in the image once for every effect that it has on the medium, turning the power off there, and
/// lets `judge` look at what may be left. Returns at how many points.
fn cut_everywhere<F: Future<Output = ()> + 'static>(
    bytes: Option<&[u8]>,
    operation: impl Fn(SimulatedEnvironment) -> F,
    judge: impl Fn(&SimulatedEnvironment, &str),
) -> u64 {
    let prepared = |seed| {
        let environment = SimulatedEnvironment::new(seed);
        if let Some(bytes) = bytes {
            environment.put(IMAGE, bytes);
        }
        environment
    };
    let whole = prepared(0);
    let before = whole.effects();
    Simulation::on(whole.clone()).block_on(operation(whole.clone()));
    let effects = whole.effects() - before;
    judge(&whole.restarted(), "without a cut");
    for cut in 0..effects {
        let environment = prepared(cut);
        environment.stop_after(environment.effects() + cut);
        assert!(Simulation::on(environment.clone()).run(operation(environment.clone())).is_none(), "the power went off too late");
        for (number, state) in environment.crash_states(STATES).enumerate() {
            judge(&state, &format!("seed {cut}, after {cut} of {effects} effects, state {number}"));
        }
    }
    effects
}

/// The whole disk of an image that can be opened for writing, which is closed again in an orderly way.
fn reopen(environment: &SimulatedEnvironment) -> Vec<u8> {
    let inner = environment.clone();
    Simulation::on(environment.clone()).block_on(async move {
        let stack = open_stack(&inner, Path::new(IMAGE), None).await;
        let bytes = read(&stack, GuestRange::new(GuestOffset::ZERO, stack.virtual_size())).await;
        stack.close().await.expect("closed");
        bytes
    })
}

fn is_dirty(environment: &SimulatedEnvironment) -> bool {
    environment.bytes(IMAGE).expect("the image exists")[79] & 1 != 0
}

/// Expects that QEMU finds no corruption.
fn expect_no_corruption(scratch: &Scratch, environment: &SimulatedEnvironment, context: &str) {
    environment.export(IMAGE, scratch.path("crashed.qcow2")).expect("exported");
    let (verdict, text) = scratch.check("crashed.qcow2");
    assert_ne!(verdict, Verdict::Corrupt, "{context}: {text}");
}

fn bytes(scratch: &Scratch) -> Vec<u8> {
    std::fs::read(scratch.path("a.qcow2")).expect("the image exists")
}

#[test]
fn growing_leaves_the_old_disk_or_the_new_one() {
    for (options, new_size) in [("cluster_size=512", 600 << 10), ("cluster_size=512,refcount_bits=64", 200 << 10), ("compat=1.1", 1 << 20)]
    {
        let scratch = Scratch::new();
        scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "70144"]);
        scratch.qemu_io("a.qcow2", "qcow2", &["write -P 7 1k 67k"]);
        let old = scratch.content("a.qcow2", &[]);
        let mut new = old.clone();
        new.resize(new_size, 0);
        let points = cut_everywhere(
            Some(&bytes(&scratch)),
            |environment| async move {
                let stack = open_stack(&environment, Path::new(IMAGE), None).await;
                stack.grow(new_size as u64).await.expect("grown");
            },
            |environment, context| {
                let context = format!("{options}, {context}");
                expect_no_corruption(&scratch, environment, &context);
                let disk = reopen(environment);
                assert!(disk == old || disk == new, "{context}: a disk of {} bytes", disk.len());
                expect_no_corruption(&scratch, environment, &context);
            },
        );
        assert!(points >= 5, "{options}: {points} effects are too few");
    }
}

#[test]
fn counting_anew_can_be_begun_anew() {
    for options in ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512"] {
        let scratch = Scratch::new();
        scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "256k"]);
        scratch.abandon("a.qcow2", &["write -P 7 1k 200k", "flush", "discard 64k 64k", "flush"]);
        let old = scratch.content("a.qcow2", &[]);
        let points = cut_everywhere(
            Some(&bytes(&scratch)),
            |environment| async move {
                let stack = open_stack(&environment, Path::new(IMAGE), None).await;
                stack.close().await.expect("closed");
            },
            |environment, context| {
                let context = format!("{options}, {context}");
                if !is_dirty(environment) {
                    expect_no_corruption(&scratch, environment, &context);
                }
                assert!(reopen(environment) == old, "{context}: the content has changed");
                expect_no_corruption(&scratch, environment, &context);
            },
        );
        assert!(points >= 3, "{options}: {points} effects are too few");
    }
}

#[test]
fn an_image_in_the_making_is_no_image_or_whole() {
    let layout = |cluster_bits, preallocate| CreateOptions { cluster_bits, preallocate, ..CreateOptions::standalone(100 << 10) };
    for options in [layout(9, Preallocate::None), layout(9, Preallocate::Metadata), layout(16, Preallocate::None)] {
        let scratch = Scratch::new();
        let (made, judged) = (options.clone(), options.clone());
        cut_everywhere(
            None,
            move |environment| {
                let options = made.clone();
                async move {
                    let file = open_file(&environment, Path::new(IMAGE), Access::CreateNew).await;
                    Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
                }
            },
            |environment, context| {
                let inner = environment.clone();
                // Nobody has flushed the directory, so there may be no file at all.
                let header = environment.files().contains(&IMAGE.into()).then(|| {
                    Simulation::on(environment.clone()).block_on(async move {
                        let file = open_file(&inner, Path::new(IMAGE), Access::Read).await;
                        Header::read(&file).await.is_ok()
                    })
                });
                if header == Some(true) {
                    let context = format!("{judged:?}, {context}");
                    expect_no_corruption(&scratch, environment, &context);
                    assert!(reopen(environment) == vec![0; 100 << 10], "{context}: the disk is not empty");
                } else {
                    assert_ne!(context, "without a cut", "the image is not there");
                }
            },
        );
    }
}

#[test]
fn freezing_keeps_everything_that_was_flushed() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,refcount_bits=64", "a.qcow2", "256k"]);
    scratch.qemu_io("a.qcow2", "qcow2", &["write -P 7 0 128k"]);
    let mut new = scratch.content("a.qcow2", &[]);
    let range = |start, len| GuestRange::new(GuestOffset::new(start), len);
    let discarded = range(16 << 10, 32 << 10);
    new[16 << 10..48 << 10].fill(0);
    cut_everywhere(
        Some(&bytes(&scratch)),
        |environment| async move {
            let stack = open_stack(&environment, Path::new(IMAGE), None).await;
            let mut chance = Chance::new(1);
            for request in [
                Request::new(Kind::Discard, discarded, &mut chance),
                Request::new(Kind::Write, range(200 << 10, 6 << 10), &mut chance),
                Request::new(Kind::Zero { unmap: true }, range(200 << 10, 8 << 10), &mut chance),
            ] {
                request.send(&stack).await;
            }
            stack.close().await.expect("closed");
        },
        |environment, context| {
            expect_no_corruption(&scratch, environment, context);
            let disk = reopen(environment);
            let (head, rest) = disk.split_at(200 << 10);
            for (at, (found, expected)) in head.chunks(4096).zip(new.chunks(4096)).enumerate() {
                let is_discarded = discarded.overlaps(range(at as u64 * 4096, 4096));
                assert!(found == expected || (is_discarded && found == [7; 4096]), "{context}: cluster {at}");
            }
            if context == "without a cut" {
                assert!(rest.iter().all(|&byte| byte == 0), "what was zeroed last");
            }
            expect_no_corruption(&scratch, environment, context);
        },
    );
}

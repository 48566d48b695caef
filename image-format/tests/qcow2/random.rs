//! Random requests of one thread, over every layout that qcow2 has. After each orderly end the image is judged by `qemu-img check` (nothing
//! wrong, nothing leaked) and `qemu-img compare`; after an end that is not orderly there may be leaks.

use std::path::PathBuf;
use std::rc::Rc;

use snapfence_image_format::qcow2::{CreateOptions, Preallocate, Qcow2};
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::storage::{Access, Chance};

use crate::disk::{Model, expect_disk, on_a_ring, open_file, open_real};
use crate::tools::{Scratch, Verdict};

const BATCHES: u32 = 25;

/// Where an image comes from.
#[derive(Clone, Debug)]
enum Maker {
    /// `qemu-img create -o` with these options.
    Qemu(String),
    Ourselves(CreateOptions),
}

/// One layout.
#[derive(Clone, Debug)]
struct Case {
    maker: Maker,
    cluster_bits: u32,
    /// Format of the backing file and its size, which may differ from that of the image.
    backing: Option<(&'static str, u64)>,
    size: u64,
}

/// An odd size with some clusters, some L2 tables, and a last cluster that the end of the disk cuts.
fn size_for(cluster_bits: u32) -> u64 {
    (3 << cluster_bits).clamp(1 << 20, 6 << 20) + 5 * 512
}

fn qemu(options: &str, cluster_bits: u32, backing: Option<(&'static str, u64)>) -> Case {
    let options = format!("{options},cluster_size={}", 1_u64 << cluster_bits);
    Case { maker: Maker::Qemu(options), cluster_bits, backing, size: size_for(cluster_bits) }
}

fn backing_bytes(len: u64, seed: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let byte = u8::try_from(chance.below(256)).expect("below 256");
        // Some of it is zero, so that an image of it has holes.
        let byte = if chance.happens(1, 3) { 0 } else { byte };
        bytes.resize((bytes.len() + 512 * (1 + chance.index(200))).min(len as usize), byte);
    }
    bytes
}

impl Case {
    fn make(&self, scratch: &Scratch, seed: u64) -> Vec<u8> {
        let backing = self.backing.map(|(format, len)| {
            let bytes = backing_bytes(len, seed);
            std::fs::write(scratch.path("base.raw"), &bytes).expect("the folder is writable");
            if format == "qcow2" {
                scratch.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "base.qcow2"]);
            }
            (format, bytes)
        });
        match &self.maker {
            Maker::Qemu(options) => {
                let size = self.size.to_string();
                let name = backing.as_ref().map(|(format, _)| format!("base.{format}"));
                let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
                if let (Some(name), Some((format, _))) = (&name, &backing) {
                    arguments.extend(["-b", name, "-F", format]);
                }
                arguments.extend(["a.qcow2", &size]);
                scratch.qemu_img(&arguments);
            }
            Maker::Ourselves(options) => {
                let path = scratch.path("a.qcow2");
                let options = CreateOptions {
                    virtual_size: self.size,
                    backing: backing.as_ref().map(|(format, _)| (format!("base.{format}").into(), (*format).to_owned())),
                    ..options.clone()
                };
                on_a_ring(async move {
                    let file = open_file(&UringEnvironment, &path, Access::CreateNew).await;
                    Qcow2::<UringEnvironment>::create(&file, &options).await.expect("created");
                });
            }
        }
        scratch.expect_sound("a.qcow2", "just made");
        let mut bytes = backing.map(|(_, bytes)| bytes).unwrap_or_default();
        bytes.resize(self.size as usize, 0);
        bytes
    }

    fn backing_path(&self, scratch: &Scratch) -> Option<(PathBuf, &'static str)> {
        self.backing.map(|(format, _)| (scratch.path(&format!("base.{format}")), format))
    }
}

/// Opens the image some times, sends random requests each time, and ends in an orderly way or not.
fn run(case: &Case, seed: u64) {
    let context = format!("seed {seed}, {case:?}");
    println!("{context}");
    let scratch = Scratch::new();
    let bytes = case.make(&scratch, seed);
    let mut model = Model { bytes, chance: Chance::new(seed) };
    for session in 0..3 {
        let orderly = session != 1;
        let (top, backing) = (scratch.path("a.qcow2"), case.backing_path(&scratch));
        let (unit, context) = (1 << case.cluster_bits, Rc::new(format!("session {session}, {context}")));
        let inner = Rc::clone(&context);
        model = on_a_ring(async move {
            let stack = open_real(&top, backing).await;
            for _ in 0..BATCHES {
                model.batch(&stack, unit).await;
            }
            expect_disk(&stack, &model.bytes, &inner).await;
            if orderly {
                stack.close().await.expect("closed");
                expect_disk(&stack, &model.bytes, &inner).await;
            } else {
                stack.view().flush().await.expect("flushed");
            }
            model
        });
        if !orderly {
            let (verdict, text) = scratch.check("a.qcow2");
            assert_ne!(verdict, Verdict::Corrupt, "{context}: {text}");
            if verdict == Verdict::Leaks {
                scratch.qemu_img(&["check", "-q", "-f", "qcow2", "-r", "leaks", "a.qcow2"]);
            }
        }
        scratch.expect_sound("a.qcow2", &context);
        scratch.expect_content("a.qcow2", &model.bytes, &context);
    }
}

#[test]
fn images_of_every_cluster_size_and_refcount_width_hold_what_was_written() {
    for cluster_bits in 9..=21 {
        let refcount_bits = 1 << (cluster_bits % 7);
        run(&qemu(&format!("refcount_bits={refcount_bits}"), cluster_bits, None), u64::from(cluster_bits));
    }
    // The narrowest clusters with the widest counts move the refcount table most.
    run(&qemu("refcount_bits=64", 9, None), 100);
}

#[test]
fn overlays_of_every_cluster_size_hold_what_was_written() {
    for cluster_bits in 9..=21 {
        let size = size_for(cluster_bits);
        let backing = match cluster_bits % 4 {
            0 => ("raw", size),
            1 => ("qcow2", size),
            2 => ("raw", size / 1024 * 512),
            _ => ("qcow2", 2 * size),
        };
        run(&qemu("lazy_refcounts=on", cluster_bits, Some(backing)), u64::from(cluster_bits));
    }
}

#[test]
fn images_with_subclusters_hold_what_was_written() {
    for cluster_bits in 14..=21 {
        let backing = [None, Some(("raw", size_for(cluster_bits))), Some(("qcow2", size_for(cluster_bits) / 1024 * 512))];
        run(&qemu("extended_l2=on", cluster_bits, backing[cluster_bits as usize % 3]), u64::from(cluster_bits));
    }
}

#[test]
fn version_2_images_hold_what_was_written() {
    for cluster_bits in [9, 12, 16, 21] {
        run(&qemu("compat=0.10", cluster_bits, None), u64::from(cluster_bits));
        run(&qemu("compat=0.10", cluster_bits, Some(("raw", size_for(cluster_bits)))), u64::from(cluster_bits));
    }
}

#[test]
fn images_allocated_at_once_hold_what_was_written() {
    for preallocation in ["metadata", "falloc", "full"] {
        run(&qemu(&format!("preallocation={preallocation}"), 16, None), 1);
    }
    run(&qemu("extended_l2=on,preallocation=metadata", 16, Some(("raw", size_for(16)))), 2);
}

#[test]
fn our_own_images_hold_what_was_written() {
    let case = |options: CreateOptions, backing| {
        let cluster_bits = options.cluster_bits;
        Case { maker: Maker::Ourselves(options), cluster_bits, backing, size: size_for(cluster_bits) }
    };
    let size = size_for(17);
    let overlay = CreateOptions::overlay(size, "base.raw", "raw");
    run(&case(overlay.clone(), Some(("raw", size))), 1);
    run(&case(CreateOptions { preallocate: Preallocate::Metadata, ..overlay }, Some(("qcow2", size))), 2);
    for (cluster_bits, refcount_bits) in [(9, 64), (12, 1), (16, 16), (21, 8)] {
        for preallocate in [Preallocate::None, Preallocate::Metadata] {
            let options = CreateOptions { cluster_bits, refcount_bits, preallocate, ..CreateOptions::standalone(0) };
            run(&case(options, None), u64::from(cluster_bits));
        }
    }
    run(&case(CreateOptions { version: 2, ..CreateOptions::standalone(0) }, None), 3);
}

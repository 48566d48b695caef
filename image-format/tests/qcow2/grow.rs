//! A disk that has been made larger keeps its content, reads as zeros where it is new, and takes writes there.

use snapfence_image_format::storage::Chance;

use crate::disk::{Model, expect_disk, on_a_ring, open_real};
use crate::tools::Scratch;

/// Makes the disk of `a.qcow2` larger.
fn grow(scratch: &Scratch, backing: Option<&'static str>, new_size: usize) -> Result<(), String> {
    let (top, backing) = (scratch.path("a.qcow2"), backing.map(|format| (scratch.path(&format!("base.{format}")), format)));
    on_a_ring(async move {
        let stack = open_real(&top, backing).await;
        let result = stack.grow(new_size as u64).await.map_err(|error| error.to_string());
        if result.is_err() {
            stack.close().await.expect("closed");
        }
        result
    })
}

fn write_randomly(scratch: &Scratch, backing: Option<&'static str>, mut model: Model, unit: u64) -> Model {
    let (top, backing) = (scratch.path("a.qcow2"), backing.map(|format| (scratch.path(&format!("base.{format}")), format)));
    let model = on_a_ring(async move {
        let stack = open_real(&top, backing).await;
        expect_disk(&stack, &model.bytes, "as opened").await;
        for _ in 0..20 {
            model.batch(&stack, unit).await;
        }
        stack.close().await.expect("closed");
        model
    });
    scratch.expect_sound("a.qcow2", "after random requests");
    scratch.expect_content("a.qcow2", &model.bytes, "after random requests");
    model
}

/// Grows an image made with these options step by step, with random requests between.
fn grow_in_steps(options: &str, cluster_bits: u32, backing: Option<(&'static str, usize)>) {
    println!("{options}, {cluster_bits}, {backing:?}");
    let scratch = Scratch::new();
    let sizes = [3 * 512, 70_144, 70_656, 1 << 20, (5 << 20) + 512, 16 << 20];
    let size = sizes[0].to_string();
    let options = format!("{options},cluster_size={}", 1_u64 << cluster_bits);
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    let mut bytes = vec![0; sizes[0]];
    let name = backing.map(|(format, len)| {
        std::fs::write(scratch.path("base.raw"), vec![0x77; len]).expect("the folder is writable");
        if format == "qcow2" {
            scratch.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
        }
        bytes.fill(0x77);
        (format!("base.{format}"), format)
    });
    if let Some((name, format)) = &name {
        arguments.extend(["-b", name, "-F", format]);
    }
    arguments.extend(["a.qcow2", &size]);
    scratch.qemu_img(&arguments);
    let format = backing.map(|(format, _)| format);
    let mut model = Model { bytes, chance: Chance::new(u64::from(cluster_bits)) };
    for new_size in &sizes[1..] {
        grow(&scratch, format, *new_size).unwrap_or_else(|error| panic!("{options} to {new_size}: {error}"));
        scratch.expect_sound("a.qcow2", &options);
        model.bytes.resize(*new_size, 0);
        scratch.expect_content("a.qcow2", &model.bytes, &options);
        model = write_randomly(&scratch, format, model, 1 << cluster_bits);
    }
}

#[test]
fn disks_of_every_kind_grow() {
    grow_in_steps("compat=1.1", 9, None);
    grow_in_steps("refcount_bits=64", 9, None);
    grow_in_steps("compat=0.10", 9, None);
    grow_in_steps("refcount_bits=1", 12, None);
    grow_in_steps("compat=1.1", 16, None);
    grow_in_steps("extended_l2=on", 14, None);
}

#[test]
fn longer_backing_files_do_not_show_through() {
    for len in [3 * 512, 70_144 + 300 * 512, 9 << 20] {
        grow_in_steps("compat=1.1", 9, Some(("raw", len)));
        grow_in_steps("compat=1.1", 16, Some(("qcow2", len)));
        grow_in_steps("extended_l2=on", 17, Some(("raw", len)));
    }
}

/// Such as the state of a machine that QEMU has saved, or what going back to a snapshot of a larger disk has brought back.
#[test]
fn what_is_mapped_past_the_end_never_shows() {
    for (options, size, new_size, beneath) in [
        ("cluster_size=512", 70_144, 600 << 10, None),
        ("cluster_size=512", 70_144, 600 << 10, Some(200_704)),
        ("compat=0.10", 70_144, 1 << 20, None),
        ("extended_l2=on,cluster_size=16k", 70_144, 1 << 20, Some(300 << 10)),
        ("compat=1.1", 1 << 20, 3 << 20, Some(2 << 20)),
    ] {
        let scratch = Scratch::new();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if let Some(len) = beneath {
            std::fs::write(scratch.path("base.raw"), vec![0x77; len]).expect("the folder is writable");
            arguments.extend(["-b", "base.raw", "-F", "raw"]);
        }
        arguments.extend(["a.qcow2", "4M"]);
        scratch.qemu_img(&arguments);
        scratch.qemu_io("a.qcow2", "qcow2", &["write -P 7 0 4M"]);
        // A smaller disk with the same tables.
        let mut image = std::fs::read(scratch.path("a.qcow2")).expect("the image exists");
        image[24..32].copy_from_slice(&(size as u64).to_be_bytes());
        std::fs::write(scratch.path("a.qcow2"), image).expect("the folder is writable");
        scratch.expect_sound("a.qcow2", options);
        grow(&scratch, beneath.map(|_| "raw"), new_size).expect("grown");
        scratch.expect_sound("a.qcow2", options);
        let mut bytes = vec![7; size];
        bytes.resize(new_size, 0);
        scratch.expect_content("a.qcow2", &bytes, options);
        write_randomly(&scratch, beneath.map(|_| "raw"), Model { bytes, chance: Chance::new(1) }, 64 << 10);
    }
}

#[test]
fn internal_snapshots_keep_their_size() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a.qcow2", "100k"]);
    let bytes = vec![0; 100 << 10];
    let mut model = write_randomly(&scratch, None, Model { bytes, chance: Chance::new(1) }, 512);
    scratch.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
    let before = model.bytes.clone();
    grow(&scratch, None, 2 << 20).expect("grown");
    model.bytes.resize(2 << 20, 0);
    write_randomly(&scratch, None, model, 512);
    scratch.qemu_img(&["snapshot", "-a", "one", "a.qcow2"]);
    scratch.expect_sound("a.qcow2", "after going back");
    let mut model = Model { bytes: before, chance: Chance::new(2) };
    model = write_randomly(&scratch, None, model, 512);
    assert_eq!(model.bytes.len(), 100 << 10);
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "1M"]);
    let refused = |new_size, backing, words: &str| {
        let before = std::fs::read(scratch.path("a.qcow2")).expect("the image exists");
        let error = grow(&scratch, backing, new_size).expect_err(words);
        assert!(error.contains(words), "{error}");
        assert!(std::fs::read(scratch.path("a.qcow2")).expect("the image exists") == before, "{error}: but the file has changed");
    };
    refused(1 << 20, None, "larger");
    refused((1 << 20) - 512, None, "larger");
    refused((1 << 20) + 100, None, "multiple of 512");
    refused(1 << 62, None, "cluster size");
    std::fs::write(scratch.path("base.raw"), vec![1; 2 << 20]).expect("the folder is writable");
    refused(3 << 20, Some("raw"), "version 2");
    scratch.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
    refused(3 << 20, None, "snapshot");
}

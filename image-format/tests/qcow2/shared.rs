//! Clusters that something else in the file refers to, and compressed ones: they are copied before they are written, and stay as they were
//! for the others.

use std::path::PathBuf;

use snapfence_image_format::storage::Chance;

use crate::disk::{Model, expect_disk, on_a_ring, open_real};
use crate::tools::Scratch;

/// Random requests through a stack that ends in an orderly way.
fn write_randomly(scratch: &Scratch, backing: Option<(PathBuf, &'static str)>, mut model: Model, unit: u64) -> Model {
    let top = scratch.path("a.qcow2");
    let model = on_a_ring(async move {
        let stack = open_real(&top, backing).await;
        expect_disk(&stack, &model.bytes, "as opened").await;
        for _ in 0..30 {
            model.batch(&stack, unit).await;
        }
        stack.close().await.expect("closed");
        model
    });
    scratch.expect_sound("a.qcow2", "after random requests");
    scratch.expect_content("a.qcow2", &model.bytes, "after random requests");
    model
}

#[test]
fn internal_snapshots_stay_as_they_were() {
    for (options, cluster_bits) in [
        ("refcount_bits=16,cluster_size=512", 9),
        ("refcount_bits=2,cluster_size=4k", 12),
        ("refcount_bits=16,cluster_size=64k", 16),
        ("compat=0.10,cluster_size=4k", 12),
        ("extended_l2=on,cluster_size=16k", 14),
        ("refcount_bits=64,cluster_size=2M", 21),
    ] {
        let scratch = Scratch::new();
        let size = (1 << 20) + 7 * 512;
        scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", &size.to_string()]);
        let mut model = Model { bytes: vec![0; size], chance: Chance::new(cluster_bits) };
        let mut snapshots = Vec::new();
        for name in ["one", "two"] {
            model = write_randomly(&scratch, None, model, 1 << cluster_bits);
            scratch.qemu_img(&["snapshot", "-c", name, "a.qcow2"]);
            snapshots.push((name, model.bytes.clone()));
        }
        model = write_randomly(&scratch, None, model, 1 << cluster_bits);
        for (name, bytes) in &snapshots {
            let found = scratch.content("a.qcow2", &["-l", &format!("snapshot.name={name}")]);
            assert!(found == *bytes, "{options}: snapshot {name} has changed");
        }
        // What only a snapshot used is free when it is deleted; what it shares stays.
        scratch.qemu_img(&["snapshot", "-d", "one", "a.qcow2"]);
        scratch.expect_sound("a.qcow2", options);
        model = write_randomly(&scratch, None, model, 1 << cluster_bits);
        scratch.qemu_img(&["snapshot", "-a", "two", "a.qcow2"]);
        scratch.expect_sound("a.qcow2", options);
        model.bytes.clone_from(&snapshots[1].1);
        write_randomly(&scratch, None, model, 1 << cluster_bits);
    }
}

#[test]
fn compressed_clusters_are_overwritten() {
    for (options, cluster_bits) in [
        ("cluster_size=512", 9),
        ("cluster_size=4k,compression_type=zstd", 12),
        ("cluster_size=64k", 16),
        ("cluster_size=2M,compression_type=zstd", 21),
        ("compat=0.10,cluster_size=64k", 16),
        ("extended_l2=on,cluster_size=64k", 16),
    ] {
        let scratch = Scratch::new();
        let bytes: Vec<u8> = (0..(2_u64 << 20) + 512).map(|at| if (at >> 18) & 1 == 0 { ((at * at) >> 15) as u8 } else { 0 }).collect();
        std::fs::write(scratch.path("a.raw"), &bytes).expect("the folder is writable");
        scratch.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2"]);
        let mut model = Model { bytes, chance: Chance::new(cluster_bits) };
        model = write_randomly(&scratch, None, model, 1 << cluster_bits);
        // Compressed clusters that a snapshot shares as well.
        scratch.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
        let before = model.bytes.clone();
        write_randomly(&scratch, None, model, 1 << cluster_bits);
        assert!(scratch.content("a.qcow2", &["-l", "snapshot.name=one"]) == before, "{options}: the snapshot has changed");
    }
}

#[test]
fn zero_clusters_with_a_place_are_written_there_again() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    scratch.qemu_io("a.qcow2", "qcow2", &["write -P 7 0 1M", "write -z 0 512k"]);
    let mut bytes = vec![0; 512 << 10];
    bytes.resize(1 << 20, 7);
    write_randomly(&scratch, None, Model { bytes, chance: Chance::new(1) }, 1 << 16);
}

//! Clusters that something else in the file refers to, and compressed ones: they are copied before they are written, and stay as they were
//! for the others.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance, Environment};
use snapfence_image_format::units::GuestOffset;

use crate::disk::{Model, expect_disk, on_a_ring, open_file, open_real};
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

/// A request of the view after a cut reads a cluster where it was before the last write of the view before the cut. Freezing the layer must not
/// punch that place out under it.
#[test]
fn freezing_waits_for_those_who_read_old_places() {
    const CLUSTER: usize = 64 << 10;
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    scratch.qemu_io("a.qcow2", "qcow2", &["write -P 7 0 64k"]);
    let mut image = std::fs::read(scratch.path("a.qcow2")).expect("the image exists");
    // Without the mark that it is nobody else's the cluster is copied before it is written.
    let word = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"));
    let l2 = (word(&image, word(&image, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    image[l2] &= 0x7f;
    let environment = SimulatedEnvironment::new(1);
    environment.put("/a.qcow2", &image);
    let inner = environment.clone();
    Simulation::on(environment).block_on(async move {
        let open = async |name: &str, access| {
            let file = open_file(&inner, Path::new(name), access).await;
            if access == Access::CreateNew {
                let options = CreateOptions::overlay(1 << 20, "a.qcow2", "qcow2");
                Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
            }
            Arc::new(Layer::<SimulatedEnvironment>::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("opens")))
        };
        let moment = async || inner.sleep_until(inner.now() + Duration::from_secs(1)).await;
        let domain = FenceDomain::new(|| Duration::ZERO);
        let stack = Stack::new(inner.clone(), &domain, vec![open("/a.qcow2", Access::Write).await], false);
        let fence = domain.fence();
        let overlaid = stack.prepare_overlay(open("/b.qcow2", Access::CreateNew).await, &fence);
        let old = stack.publish(Arc::clone(&overlaid));
        fence.switch();

        overlaid.read(GuestOffset::ZERO, AlignedBuffer::zeroed(CLUSTER).into()).await.0.expect("tables are in memory now");
        inner.inject(Fault::once(OperationKind::Read, 0).on("/a.qcow2").with(FaultEffect::Hang));
        let found = Rc::new(RefCell::new(None));
        let answer = Rc::clone(&found);
        inner.spawn(async move {
            let (result, buffer) = overlaid.read(GuestOffset::ZERO, AlignedBuffer::zeroed(CLUSTER).into()).await;
            *answer.borrow_mut() = Some(result.map(|()| buffer.into_owned().to_vec()));
        });
        moment().await;
        old.write(GuestOffset::ZERO, AlignedBuffer::copy_of(&[9; CLUSTER]).into()).await.0.expect("written");
        let frozen = Rc::new(Cell::new(false));
        let (done, frozen_stack) = (Rc::clone(&frozen), Arc::clone(&stack));
        inner.spawn(async move {
            frozen_stack.freeze_below(old).await.expect("frozen");
            done.set(true);
        });
        moment().await;
        inner.release_hung();
        for _ in 0..20 {
            if found.borrow().is_none() {
                moment().await;
            }
        }
        let bytes = found.take().expect("the read has ended").expect("the read has succeeded");
        assert!(bytes == [7; CLUSTER] || bytes == [9; CLUSTER], "neither what was there before nor after: {:?}", &bytes[..4]);
        // Time may go on while threads have work to do.
        for _ in 0..20 {
            if !frozen.get() {
                moment().await;
            }
        }
        assert!(frozen.get(), "nobody reads any more");
        stack.close().await.expect("closed");
    });
}

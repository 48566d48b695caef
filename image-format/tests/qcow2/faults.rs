//! A medium that fails or is full: what was acknowledged stays readable, nothing is called durable that is not, and a full disk is no end.

use std::path::Path;
use std::sync::Arc;

use snapfence_image_format::error::LayerError;
use snapfence_image_format::extent::{ExtentList, Mapping};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Preallocate, Qcow2};
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Model, Request, expect_disk, open_file, open_stack};
use crate::tools::{Scratch, Verdict};

const IMAGE: &str = "/a.qcow2";

/// A new image, open for writing as the only layer.
async fn new_layer(environment: &SimulatedEnvironment, options: CreateOptions) -> Arc<Layer<SimulatedEnvironment>> {
    let file = open_file(environment, Path::new(IMAGE), Access::CreateNew).await;
    Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
    let options = OpenOptions { l2_cache_bytes: Some(0), ..OpenOptions::writing() };
    Arc::new(Layer::Qcow2(Qcow2::open(file, options).await.expect("opens")))
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), len)
}

#[test]
fn what_a_failed_flush_has_not_written_can_still_be_read() {
    let environment = SimulatedEnvironment::new(1);
    let options = CreateOptions { cluster_bits: 9, preallocate: Preallocate::Metadata, ..CreateOptions::standalone(4 << 20) };
    let inner = environment.clone();
    Simulation::on(environment).block_on(async move {
        let layer = new_layer(&inner, options).await;
        layer.discard(range(0, 512), false, &|_| {}).await.expect("discarded");
        inner.inject(Fault::lasting(OperationKind::Write, 0));
        layer.flush().await.expect_err("the medium fails");
        // Looks at all tables, far more than the cache holds.
        let mut extents = ExtentList::new();
        layer.map(range(0, 4 << 20), &mut extents).await.expect("reads go on");
        extents.clear();
        layer.map(range(0, 512), &mut extents).await.expect("reads go on");
        assert_eq!(extents.as_slice()[0].mapping, Mapping::Unallocated, "the discarded cluster has come back");
    });
}

#[test]
fn nothing_is_durable_after_a_failed_flush() {
    for kind in [OperationKind::Write, OperationKind::Flush] {
        let environment = SimulatedEnvironment::new(1);
        let inner = environment.clone();
        Simulation::on(environment).block_on(async move {
            let layer = new_layer(&inner, CreateOptions::standalone(1 << 20)).await;
            layer.reserve(range(0, 1 << 16)).await.expect("reserved").commit(|| {});
            inner.inject(Fault::once(kind, 0));
            layer.flush().await.expect_err("the medium fails");
            for result in [layer.flush().await, layer.freeze().await, layer.flush().await, layer.freeze().await] {
                assert!(matches!(result, Err(LayerError::Failed(_))), "{kind:?}: {result:?}");
            }
            let reserved = layer.reserve(range(0, 1 << 16)).await;
            assert!(reserved.is_err(), "{kind:?}: a write was admitted");
        });
    }
}

#[test]
fn what_a_crash_leaves_behind_the_last_cluster_is_used_again() {
    let mut environment = SimulatedEnvironment::new(1);
    let mut lengths = Vec::new();
    for session in 0..6 {
        let inner = environment.clone();
        lengths.push(Simulation::on(environment.clone()).block_on(async move {
            if session == 0 {
                let layer = new_layer(&inner, CreateOptions::standalone(4 << 20)).await;
                layer.freeze().await.expect("frozen");
            }
            let stack = open_stack(&inner, Path::new(IMAGE), None).await;
            let request = Request::new(Kind::Write, range(session << 16, 1 << 16), &mut Chance::new(session));
            request.send(&stack).await;
            stack.view().flush().await.expect("flushed");
            stack.view().top().file().length().await.expect("a length")
        }));
        environment = environment.restarted();
    }
    assert!(lengths[0] > 1 << 20 && lengths.iter().all(|length| *length == lengths[0]), "the file grows: {lengths:?}");
}

/// As above, where a crash has come before any flush: the counts of the space that it leaves are in no refcount block of the file.
#[test]
fn what_a_crash_leaves_uncounted_is_used_again() {
    let mut environment = SimulatedEnvironment::new(1);
    let mut lengths = Vec::new();
    for session in 0..6 {
        let inner = environment.clone();
        lengths.push(Simulation::on(environment.clone()).block_on(async move {
            if session == 0 {
                let options = CreateOptions { cluster_bits: 9, refcount_bits: 64, ..CreateOptions::standalone(4 << 20) };
                new_layer(&inner, options).await.freeze().await.expect("frozen");
            }
            let stack = open_stack(&inner, Path::new(IMAGE), None).await;
            let request = Request::new(Kind::Write, range(session << 16, 1 << 16), &mut Chance::new(session));
            request.send(&stack).await;
            stack.view().top().file().length().await.expect("a length")
        }));
        environment = environment.restarted();
    }
    assert!(lengths[0] > 1 << 20 && lengths.iter().all(|length| *length == lengths[0]), "the file grows: {lengths:?}");
}

/// A file whose length cannot change, as that of a block device.
#[test]
fn an_image_lives_on_a_medium_that_cannot_grow() {
    for (cluster_bits, refcount_bits) in [(9, 64), (12, 16), (16, 16)] {
        let mut environment = SimulatedEnvironment::new(1);
        environment.put(IMAGE, &vec![0xee; 5 << 20]);
        let mut model = Model { bytes: vec![0; 3 << 20], chance: Chance::new(cluster_bits) };
        for session in 0..5 {
            for kind in [OperationKind::Allocate, OperationKind::SetLen] {
                environment.inject(Fault::lasting(kind, 0).with(FaultEffect::Error(libc::EOPNOTSUPP)));
            }
            let inner = environment.clone();
            model = Simulation::on(environment.clone()).block_on(async move {
                if session == 0 {
                    let options = CreateOptions { cluster_bits: cluster_bits as u32, refcount_bits, ..CreateOptions::standalone(3 << 20) };
                    let file = open_file(&inner, Path::new(IMAGE), Access::Write).await;
                    Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
                }
                let stack = open_stack(&inner, Path::new(IMAGE), None).await;
                for _ in 0..20 {
                    model.batch(&stack, 1 << cluster_bits).await;
                }
                expect_disk(&stack, &model.bytes, "on a device").await;
                if session % 2 == 0 {
                    stack.close().await.expect("closed");
                } else {
                    stack.view().flush().await.expect("flushed");
                }
                model
            });
            environment = environment.restarted();
            let scratch = Scratch::new();
            environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
            let (verdict, text) = scratch.check("a.qcow2");
            assert!(verdict == Verdict::Sound || (verdict == Verdict::Leaks && session > 0), "session {session}: {text}");
            scratch.expect_content("a.qcow2", &model.bytes, "on a device");
        }
    }
}

/// A device of several refcount blocks' reach, of which only the first block exists at the beginning.
#[test]
fn a_device_is_used_up_to_its_end() {
    const CLUSTER: u64 = 64 << 10;
    for refcount_bits in [16, 64] {
        let per_block = CLUSTER * 8 / u64::from(refcount_bits);
        let clusters = 5 * per_block + per_block / 2;
        let scratch = Scratch::new();
        std::fs::File::create(scratch.path("device"))
            .and_then(|file| file.set_len(clusters * CLUSTER + 512))
            .expect("a long file of holes");
        let mut environment = SimulatedEnvironment::new(1);
        environment.import(scratch.path("device"), IMAGE).expect("imported");
        let mut written = 0;
        for session in 0.. {
            for kind in [OperationKind::Allocate, OperationKind::SetLen] {
                environment.inject(Fault::lasting(kind, 0).with(FaultEffect::Error(libc::EOPNOTSUPP)));
            }
            let inner = environment.clone();
            let before = written;
            written = Simulation::on(environment.clone()).block_on(async move {
                let file = open_file(&inner, Path::new(IMAGE), Access::Write).await;
                if session == 0 {
                    let options = CreateOptions { cluster_bits: 16, refcount_bits, ..CreateOptions::standalone(2 * clusters * CLUSTER) };
                    Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
                }
                let layer = Layer::<SimulatedEnvironment>::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("opens"));
                let mut written = before;
                // More than a block's reach in some sessions, less in others.
                while written < before + per_block * (1 + session % 3) / 2 {
                    match layer.reserve(range(written * CLUSTER, CLUSTER)).await {
                        Ok(reservation) => reservation.commit(|| {}),
                        Err(error) => {
                            assert!(error.is_no_space(), "{error}");
                            break;
                        }
                    }
                    written += 1;
                }
                if session % 2 == 0 {
                    layer.freeze().await.expect("frozen")
                } else {
                    layer.flush().await.expect("flushed")
                }
                written
            });
            environment = environment.restarted();
            if written == before {
                break;
            }
        }
        // Header, L1 table, refcount table, six refcount blocks; L2 tables.
        let tables = 9 + written.div_ceil(CLUSTER / 8);
        assert!(written + tables >= clusters - 2, "{written} clusters and {tables} tables on a device of {clusters}");
        environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
        scratch.expect_sound("a.qcow2", "a full device");
    }
}

/// The only free cluster is many refcount blocks away from where the search begins.
#[test]
fn a_device_is_full_only_when_all_of_it_has_been_looked_through() {
    let environment = SimulatedEnvironment::new(1);
    environment.put(IMAGE, &[0; 1 << 20]);
    for kind in [OperationKind::Allocate, OperationKind::SetLen] {
        environment.inject(Fault::lasting(kind, 0).with(FaultEffect::Error(libc::EOPNOTSUPP)));
    }
    let inner = environment.clone();
    Simulation::on(environment).block_on(async move {
        let options = CreateOptions { cluster_bits: 9, refcount_bits: 64, ..CreateOptions::standalone(4 << 20) };
        let file = open_file(&inner, Path::new(IMAGE), Access::Write).await;
        Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
        let layer = Layer::<SimulatedEnvironment>::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("opens"));
        let mut written = 0;
        while let Ok(reservation) = layer.reserve(range(written * 512, 512)).await {
            reservation.commit(|| {});
            written += 1;
        }
        assert!(written > 1000, "{written} clusters");
        layer.freeze().await.expect("frozen");
        drop(layer);
        let file = open_file(&inner, Path::new(IMAGE), Access::Write).await;
        let layer = Layer::<SimulatedEnvironment>::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("opens"));
        layer.discard(range((written - 1) * 512, 512), false, &|_| {}).await.expect("discarded");
        layer.flush().await.expect("flushed");
        layer.release(layer.take_unmapped()).await.expect("released");
        layer.reserve(range((written - 1) * 512, 512)).await.expect("one cluster is free").commit(|| {});
        let error = layer.reserve(range(written * 512, 512)).await.map(drop).expect_err("full");
        assert!(error.is_no_space(), "{error}");
    });
}

/// Blocks between others that are missing are made when their clusters are used.
#[test]
fn holes_in_the_refcount_table_are_filled() {
    let environment = SimulatedEnvironment::new(1);
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "a.qcow2", "4M"]);
    // One L2 table for every 32 KiB: all of them come first.
    let tables: Vec<String> = (0..64).map(|table| format!("write -P 1 {} 512", table << 15)).collect();
    let commands = ["write -P 1 0 2M", "discard 64k 1800k", "flush"];
    scratch.abandon("a.qcow2", &tables.iter().map(String::as_str).chain(commands).collect::<Vec<_>>());
    let mut image = std::fs::read(scratch.path("a.qcow2")).expect("the image exists");
    // Takes the blocks out of the table that count nothing but themselves.
    let word = |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes")) as usize;
    let (table, entries) = (word(&image, 48), image[59] as usize * 64);
    let mut holes = 0;
    for index in 0..entries {
        let (entry, block) = (table + index * 8, word(&image, table + index * 8));
        let own = block / (64 * 512) == index;
        if block != 0 && own && (0..64).all(|count| (word(&image, block + count * 8) != 0) == (count == block / 512 % 64)) {
            image[entry..entry + 8].fill(0);
            holes += 1;
        }
    }
    assert!(holes > 20, "{holes} blocks that count only themselves");
    std::fs::write(scratch.path("a.qcow2"), &image).expect("the folder is writable");
    scratch.expect_sound("a.qcow2", "with holes in the refcount table");
    environment.put(IMAGE, &image);
    let inner = environment.clone();
    let mut bytes = vec![1; 2 << 20];
    bytes[64 << 10..1864 << 10].fill(0);
    bytes.resize(4 << 20, 0);
    let len = image.len() as u64;
    let bytes = Simulation::on(environment.clone()).block_on(async move {
        let stack = open_stack(&inner, Path::new(IMAGE), None).await;
        let request = Request::new(Kind::Write, range(2 << 20, 1500 << 10), &mut Chance::new(1));
        request.send(&stack).await;
        request.apply(&stack, &mut bytes).await;
        expect_disk(&stack, &bytes, "in the holes").await;
        stack.close().await.expect("closed");
        assert!(stack.view().top().file().length().await.expect("a length") < len + (200 << 10), "the holes were not used");
        bytes
    });
    environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
    scratch.expect_sound("a.qcow2", "in the holes");
    scratch.expect_content("a.qcow2", &bytes, "in the holes");
}

/// Clusters that were punched out have no space of their own: a table that is to lie in one must not be promised it.
#[test]
fn clusters_that_were_punched_out_get_space_before_they_are_used() {
    let environment = SimulatedEnvironment::new(1);
    let scratch = Scratch::new();
    let inner = environment.clone();
    Simulation::on(environment.clone()).block_on(async move {
        const FAR: u64 = 600 << 20;
        let layer = new_layer(&inner, CreateOptions::standalone(2 << 30)).await;
        for cluster in 0..64 {
            layer.reserve(range(cluster << 16, 1 << 16)).await.expect("reserved").commit(|| {});
        }
        layer.freeze().await.expect("frozen");
        drop(layer);
        let file = open_file(&inner, Path::new(IMAGE), Access::Write).await;
        let layer = Layer::<SimulatedEnvironment>::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("opens"));
        layer.discard(range(0, 4 << 20), false, &|_| {}).await.expect("discarded");
        layer.flush().await.expect("flushed");
        layer.release(layer.take_unmapped()).await.expect("released");
        inner.set_space_limit(Some(0));
        for _ in 0..3 {
            let error = layer.reserve(range(FAR, 1 << 16)).await.map(drop).expect_err("a full disk");
            assert!(error.is_no_space(), "{error}");
            layer.flush().await.expect("a full disk is no failure");
        }
        inner.set_space_limit(None);
        layer.reserve(range(FAR, 1 << 16)).await.expect("there is room again").commit(|| {});
        let length = layer.file().length().await.expect("a length");
        for cluster in 1..100 {
            layer.reserve(range(FAR + (cluster << 16), 1 << 16)).await.expect("there is room again").commit(|| {});
        }
        assert_eq!(layer.file().length().await.expect("a length"), length, "the clusters were not used again");
        layer.freeze().await.expect("frozen");
    });
    environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
    scratch.expect_sound("a.qcow2", "after the disk was full");
}

#[test]
fn writes_go_on_when_a_full_disk_has_room_again() {
    let environment = SimulatedEnvironment::new(1);
    let scratch = Scratch::new();
    let inner = environment.clone();
    let mut bytes = vec![0; 4 << 20];
    let bytes = Simulation::on(environment.clone()).block_on(async move {
        let layer = new_layer(&inner, CreateOptions::standalone(4 << 20)).await;
        layer.freeze().await.expect("frozen");
        drop(layer);
        inner.set_space_limit(Some(1 << 20));
        let stack = open_stack(&inner, Path::new(IMAGE), None).await;
        let mut chance = Chance::new(1);
        let mut refused = 0;
        for step in 0..64_u64 {
            if step == 32 {
                assert!(refused > 0, "the disk should have been full");
                inner.set_space_limit(None);
            }
            let request = Request::new(Kind::Write, range(step * (64 << 10) + 512, 32 << 10), &mut chance);
            match request.try_send(&stack).await {
                Ok(()) => request.apply(&stack, &mut bytes).await,
                Err(error) => {
                    assert!(error.is_no_space() && step < 32, "{error}");
                    refused += 1;
                }
            }
            if step % 8 == 7 {
                // With the disk full this may fail only for lack of space.
                stack.view().flush().await.expect("flushed");
            }
        }
        expect_disk(&stack, &bytes, "after the disk was full").await;
        stack.close().await.expect("closed");
        bytes
    });
    environment.export(IMAGE, scratch.path("a.qcow2")).expect("exported");
    scratch.expect_sound("a.qcow2", "after the disk was full");
    scratch.expect_content("a.qcow2", &bytes, "after the disk was full");
}

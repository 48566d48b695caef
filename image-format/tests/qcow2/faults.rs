//! A medium that fails or is full: what was acknowledged stays readable, nothing is called durable that is not, and a full disk is no end.

use std::path::Path;
use std::sync::Arc;

use snapfence_image_format::error::LayerError;
use snapfence_image_format::extent::{ExtentList, Mapping};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Preallocate, Qcow2};
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Request, expect_disk, open_file, open_stack};
use crate::tools::Scratch;

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

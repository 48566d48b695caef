//! What a start removes of overlays that were being made when the last run ended, and what it leaves alone: everything that may be somebody else's,
//! or of use.

use std::path::PathBuf;

use serde_json::json;
use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, Simulation};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Sharing, Storage};
use snapfence_image_format::units::HostOffset;
use snapfenced::catalogue::Making;

use super::support::{DISK, World};

/// By which the daemon knows what it has made.
const MARK: u64 = 0x1234_5678_9abc_def0;
const IMAGE: &str = "/strange/disk.qcow2";
const OVERLAY: &str = "/strange/disk.s.qcow2";
const TEMPORARY: &str = "/strange/.disk.s.qcow2.9abcdef0";

fn overlay_of(backing: &str, mark: u64) -> CreateOptions {
    CreateOptions { mark: Some(mark), ..CreateOptions::overlay(DISK, backing, "qcow2") }
}

async fn put(world: &World, path: &str, bytes: &[u8]) {
    let file = world.environment.open(&Location::Trusted(path.into()), Access::CreateNew, CacheMode::Direct).await.expect("a new file");
    if !bytes.is_empty() {
        let (result, _) = file.write(HostOffset::ZERO, AlignedBuffer::copy_of(bytes).into()).await;
        result.expect("written");
    }
}

async fn is_recorded(world: &World) -> bool {
    !world.manager.catalogue().run(|store| store.making()).await.expect("a catalogue").is_empty()
}

/// A run has ended while the overlay was being made, and `leave` has come to files since. What is left of them after the next start, beside the
/// image, and whether the start after that is to look again.
fn left_of(leave: impl AsyncFn(&World) + 'static) -> (Vec<String>, bool) {
    let mut simulation = Simulation::new(61);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.create(IMAGE, &CreateOptions::standalone(DISK)).await;
        let making = Making { mark: MARK, overlays: vec![PathBuf::from(OVERLAY)] };
        world.manager.catalogue().run(move |store| store.begin_making(&making)).await.expect("a catalogue");
        leave(&world).await;
        world.manager.recover().await.expect("a catalogue");
        let mut left = world.files();
        left.retain(|file| file != IMAGE);
        (left, is_recorded(&world).await)
    })
}

#[test]
fn what_was_being_made_is_removed() {
    assert_eq!(left_of(async |_| {}), (vec![], false));
    assert_eq!(left_of(async |world| put(world, TEMPORARY, &[]).await), (vec![], false), "nothing is in it yet");
    assert_eq!(left_of(async |world| put(world, TEMPORARY, &[0; 4096]).await), (vec![], false), "its header is not there yet");
    let whole = async |world: &World| {
        world.create(TEMPORARY, &overlay_of("disk.qcow2", MARK)).await;
        put(world, OVERLAY, &[]).await;
    };
    assert_eq!(left_of(whole), (vec![], false), "it was about to get its name");
    assert_eq!(left_of(async |world| world.create(OVERLAY, &overlay_of("disk.qcow2", MARK)).await), (vec![], false));
}

#[test]
fn what_somebody_else_may_have_made_stays() {
    let stays = (vec![OVERLAY.to_owned()], false);
    assert_eq!(left_of(async |world| put(world, OVERLAY, &[]).await), stays, "an empty file");
    assert_eq!(left_of(async |world| put(world, OVERLAY, &[7; 4096]).await), stays, "no image");
    let unmarked = async |world: &World| world.create(OVERLAY, &CreateOptions::overlay(DISK, "disk.qcow2", "qcow2")).await;
    assert_eq!(left_of(unmarked), stays, "as a user makes it");
    let other = async |world: &World| world.create(OVERLAY, &overlay_of("disk.qcow2", MARK + 1)).await;
    assert_eq!(left_of(other), stays, "made for another snapshot");
    let beside = async |world: &World| world.create(TEMPORARY, &CreateOptions::overlay(DISK, "disk.qcow2", "qcow2")).await;
    assert_eq!(left_of(beside), (vec![TEMPORARY.to_owned()], false), "an image of somebody's under the temporary name");
}

#[test]
fn what_has_become_of_use_stays() {
    let made = async |world: &World| world.create(OVERLAY, &overlay_of("disk.qcow2", MARK)).await;
    let written = async move |world: &World| {
        made(world).await;
        world.serve(&format!("name=vda,image={OVERLAY},format=qcow2,socket=/run/vda")).await.expect("served");
        world.write("vda", 3, 1).await;
        world.manager.stop().await.expect("durable");
        // As if another program had done it.
        world.manager.catalogue().run(|store| store.forget_device("vda")).await.expect("a catalogue");
    };
    assert_eq!(left_of(written), (vec![OVERLAY.to_owned()], false), "it has data");
    let served = async move |world: &World| {
        made(world).await;
        world.serve(&format!("name=vda,image={OVERLAY},format=qcow2,socket=/run/vda")).await.expect("served");
        world.manager.stop().await.expect("durable");
    };
    assert_eq!(left_of(served), (vec![OVERLAY.to_owned()], false), "a record names it");
    let covered = async move |world: &World| {
        made(world).await;
        world.create("/strange/other.qcow2", &CreateOptions::overlay(DISK, "disk.s.qcow2", "qcow2")).await;
    };
    let used = async move |world: &World| {
        made(world).await;
        let file = world.environment.open(&Location::Trusted(OVERLAY.into()), Access::Read, CacheMode::Direct).await.expect("a file");
        file.set_sharing(Sharing::Reader).await.expect("nobody writes");
        // It stays open.
        std::mem::forget(file);
    };
    assert_eq!(left_of(used), (vec![OVERLAY.to_owned()], false), "another program reads it");
    assert_eq!(left_of(covered), (vec![OVERLAY.to_owned(), "/strange/other.qcow2".to_owned()], false), "it lies beneath another");
}

#[test]
fn what_cannot_be_looked_at_is_looked_at_again() {
    let mut simulation = Simulation::new(62);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.create(IMAGE, &CreateOptions::standalone(DISK)).await;
        world.create(OVERLAY, &overlay_of("disk.qcow2", MARK)).await;
        let making = Making { mark: MARK, overlays: vec![PathBuf::from(OVERLAY)] };
        world.manager.catalogue().run(move |store| store.begin_making(&making)).await.expect("a catalogue");
        environment.inject(Fault::once(OperationKind::Remove, 0));
        world.manager.recover().await.expect("a catalogue");
        assert_eq!((world.files().len(), is_recorded(&world).await), (2, true));
        world.manager.recover().await.expect("a catalogue");
        assert_eq!((world.files(), is_recorded(&world).await), (vec![IMAGE.to_owned()], false));
        // The name is free again.
        world.serve(&format!("name=vda,image={IMAGE},format=qcow2,socket=/run/vda")).await.expect("served");
        let asked = json!({ "name": "s", "devices": [{ "device": "vda" }] });
        world.done("snapshot-create", asked).await;
        assert_eq!(world.settled("s").await["state"], "frozen");
        assert_eq!(world.layers("vda").await, [OVERLAY, IMAGE]);
        assert!(!is_recorded(&world).await, "it is the snapshot's");
    });
}

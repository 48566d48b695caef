//! A flush of a disk has failed, and the daemon is killed. The next one serves the disk, and takes no snapshot of it that would be called durable.

use std::sync::Arc;

use futures_util::future::join;
use serde_json::json;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::kept::TestKeeper;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::units::SECTOR_BYTES;

use super::support::{BLOCK, CatalogueFile, DISK, World};

const DISKS: [(&str, &str); 3] = [("vda", "qcow2"), ("vdb", "raw"), ("vdc", "qcow2")];

async fn serve(world: &World) {
    for (name, format) in DISKS {
        world.serve(&format!("name={name},image=/vm/{name}.{format},format={format},socket=/run/{name}")).await.expect("served");
    }
}

/// Two disks of which nothing else is known, and one for comparison.
async fn make(world: &World) {
    for (name, format) in DISKS {
        let path = format!("/vm/{name}.{format}");
        match format {
            "raw" => world.environment.put(&path, &vec![0; usize::try_from(DISK).expect("small")]),
            _ => world.create(&path, &CreateOptions::standalone(DISK)).await,
        }
    }
    world.environment.flush_directory(std::path::Path::new("/vm")).await.expect("durable");
}

async fn state_of_layers(world: &World, device: &str) -> Vec<(String, String)> {
    let stack = world.done("stack-show", json!({ "device": device })).await;
    let text = |value: &serde_json::Value| value.as_str().expect("a word").to_owned();
    stack["layers"].as_array().expect("a list").iter().map(|layer| (text(&layer["file"]), text(&layer["state"]))).collect()
}

/// Each sector of each block has one of these values.
async fn assert_blocks(world: &World, device: &str, allowed: &[&[u8]]) {
    for (sector, value) in (0_u64..).zip(world.read_sectors(device, allowed.len() as u64).await) {
        let block = sector * SECTOR_BYTES / BLOCK;
        assert!(allowed[usize::try_from(block).expect("small")].contains(&value), "block {block} of {device} has {value}");
    }
}

/// Whether the guest hears of a failure from before when it flushes, `None` if it may have been told before. It does for a while, and then not again.
async fn is_told(world: &World, device: &str, told: impl Into<Option<bool>>) {
    let flush = async || world.manager.device(device).expect("a device").stack.view().flush().await;
    let both = join(flush(), flush()).await;
    let both = [both.0.is_err(), both.1.is_err()];
    assert_eq!(both, [told.into().unwrap_or(both[0]); 2], "{device}");
    for _ in 0..20 {
        world.pause().await;
    }
    flush().await.unwrap_or_else(|error| panic!("{device}: {error}"));
}

async fn refused(world: &World, devices: &[&str]) -> String {
    let members: Vec<_> = devices.iter().map(|device| json!({ "device": device })).collect();
    world.ask("snapshot-create", json!({ "name": "again", "devices": members })).await.expect_err("it would not be durable").desc
}

fn message(device: &str, layer: &str) -> String {
    format!(
        "no snapshot of device '{device}' would be durable: a flush of {layer} has failed, and a power cut may take away what had \
         been written to it until then; copy the disk to a new image, or restart the host"
    )
}

/// Makes the disks and serves them in each of three lives: runs `life` and then, with what is left of it after a kill, `next`, and with what is left of
/// that after a power cut, `last`.
fn three_lives(
    seed: u64,
    life: impl AsyncFnOnce(World) + 'static,
    next: impl AsyncFnOnce(World) + 'static,
    last: impl AsyncFnOnce(World) + 'static,
) {
    let keeper = Arc::new(TestKeeper::default());
    let mut simulation = Simulation::new(seed);
    let (mut environment, mut catalogue) = (simulation.environment().clone(), CatalogueFile::default());
    let start = |environment: &SimulatedEnvironment, catalogue: &CatalogueFile| {
        World::start_with(environment.clone(), catalogue.clone(), &[], Arc::clone(&keeper), None)
    };
    let world = start(&environment, &catalogue);
    simulation.block_on(async move {
        make(&world).await;
        serve(&world).await;
        life(world).await;
    });
    (environment, catalogue) = (environment.killed(), catalogue.after_kill());
    let world = start(&environment, &catalogue);
    Simulation::on(environment.clone()).block_on(async move {
        world.manager.recover().await.expect("a catalogue");
        serve(&world).await;
        next(world).await;
    });
    (environment, catalogue) = (environment.crash(), catalogue.after_power_cut());
    keeper.forget();
    let world = start(&environment, &catalogue);
    Simulation::on(environment).block_on(async move {
        world.manager.recover().await.expect("a catalogue");
        serve(&world).await;
        last(world).await;
    });
}

#[test]
fn a_disk_of_which_a_flush_had_failed_has_no_snapshots_until_the_machine_restarts() {
    let life = async |world: World| {
        let environment = world.environment.clone();
        for (device, _) in DISKS {
            world.write(device, 0, 1).await;
            world.flush(device).await;
            world.write(device, 1, 2).await;
        }
        for device in ["vda", "vdb"] {
            environment.inject(Fault::once(OperationKind::Flush, 0));
            let view = world.manager.device(device).expect("a device").stack.view();
            view.flush().await.expect_err("a failed flush");
        }
    };
    let next = async |world: World| {
        for (device, _) in DISKS {
            assert_eq!(world.read(device, 2).await, [1, 2], "it can be seen until the power goes off");
            world.write(device, 2, 3).await;
            // The answer of the first life may have been there long enough.
            is_told(&world, device, if device == "vdc" { Some(false) } else { None }).await;
            world.flush(device).await;
        }
        assert_eq!(refused(&world, &["vdc", "vda"]).await, message("vda", "/vm/vda.qcow2"));
        assert_eq!(refused(&world, &["vdb"]).await, message("vdb", "/vm/vdb.raw"));
        assert_eq!(state_of_layers(&world, "vdb").await, [("/vm/vdb.raw".to_owned(), "active".to_owned())]);
        assert_eq!(world.snapshot("other", &["vdc"]).await["state"], "frozen");
        // Also if it has been opened again in good order; the guest has been told by now.
        world.done("device-remove", json!({ "name": "vdb" })).await;
        world.serve("name=vdb,image=/vm/vdb.raw,format=raw,socket=/run/vdb").await.expect("served");
        is_told(&world, "vdb", false).await;
        assert_eq!(refused(&world, &["vdb"]).await, message("vdb", "/vm/vdb.raw"));
    };
    let last = async |world: World| {
        for (device, _) in DISKS {
            assert_blocks(&world, device, &[&[1], &[0, 2], &[3]]).await;
        }
        assert_eq!(world.snapshot("last", &["vda", "vdb", "vdc"]).await["state"], "frozen", "what is there now stays");
    };
    for seed in 0..20 {
        three_lives(seed, life, next, last);
    }
}

/// The flush that fails is that of the layer which a snapshot covers: by the next start it lies beneath.
#[test]
fn nothing_that_lies_on_a_layer_that_could_not_be_frozen_is_called_durable() {
    let life = async |world: World| {
        let environment = world.environment.clone();
        for (device, _) in DISKS {
            world.write(device, 0, 1).await;
        }
        for (device, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            environment.inject(Fault::once(OperationKind::Flush, 0).on(format!("/vm/{device}.{format}")));
            assert_eq!(world.snapshot(&format!("of-{device}"), &[device]).await["state"], "failed");
        }
    };
    let next = async |world: World| {
        for (device, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            let base = format!("/vm/{device}.{format}");
            let states: Vec<_> = state_of_layers(&world, device).await.into_iter().map(|(_, state)| state).collect();
            assert_eq!(states, ["active", "failed"]);
            world.write(device, 1, 2).await;
            is_told(&world, device, true).await;
            world.flush(device).await;
            assert_eq!(refused(&world, &[device]).await, message(device, &base));
        }
    };
    let last = async |world: World| {
        for (device, _) in DISKS {
            // What no flush has covered, and the guest's after that.
            let second: &[u8] = if device == "vdc" { &[0] } else { &[2] };
            assert_blocks(&world, device, &[&[0, 1], second]).await;
        }
        assert_eq!(world.snapshot("last", &["vda", "vdb", "vdc"]).await["state"], "frozen", "what is there now stays");
    };
    for seed in 0..20 {
        three_lives(seed, life, next, last);
    }
}

/// The disk lies on one with data that has been durable for long. A write to a part of a cluster has the rest copied; what a failed flush loses of that
/// may not be missed after a power cut, least of all by way of a mapping that has become durable since.
#[test]
fn what_was_durable_beneath_survives_a_failed_flush_of_its_copy() {
    let life = async |world: World| {
        let environment = world.environment.clone();
        for (device, _) in DISKS {
            world.write(device, 0, 1).await;
            world.flush(device).await;
        }
        let mut members = Vec::new();
        for (device, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            let overlay = format!("/vm/{device}.s.qcow2");
            // Without sub-clusters, of which a block would fill several.
            let options = CreateOptions { extended_l2: false, ..CreateOptions::overlay(DISK, format!("{device}.{format}"), format) };
            world.create(&overlay, &options).await;
            members.push(json!({ "device": device, "overlay": overlay }));
        }
        world.done("snapshot-create", json!({ "name": "s", "devices": members })).await;
        assert_eq!(world.settled("s").await["state"], "frozen");
        for device in ["vda", "vdb"] {
            world.write(device, 1, 2).await;
            environment.inject(Fault::once(OperationKind::Flush, 0).on(format!("/vm/{device}.s.qcow2")));
            let view = world.manager.device(device).expect("a device").stack.view();
            view.flush().await.expect_err("a failed flush");
        }
    };
    let next = async |world: World| {
        for device in ["vda", "vdb"] {
            is_told(&world, device, None).await;
            world.write(device, 3, 3).await;
            world.flush(device).await;
        }
    };
    let last = async |world: World| {
        for device in ["vda", "vdb"] {
            assert_blocks(&world, device, &[&[1], &[0, 2], &[0], &[3]]).await;
        }
    };
    for seed in 0..40 {
        three_lives(seed, life, next, last);
    }
}

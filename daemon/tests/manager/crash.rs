//! The power goes off at some instant while two disks are written to and snapshotted as a group. After the start that follows:
//!
//! - what was flushed is there, and nothing that was never written;
//! - both disks have switched, or neither has;
//! - a snapshot that counts holds exactly what had been written at one point in time between its command and its answer.
//!
//! Or the daemon is killed at some instant, started again, and the power goes off only then: what the guest found after the start and flushed,
//! and what a snapshot took of it, must be there, although the kernel's cache was all that held it when the daemon began.
//!
//! The guest writes block `n % BLOCKS` of one disk, then of the other, with the value `n`, one after the other: so a state of both disks at one
//! point in time is known from its highest values alone.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::process::Command;
use std::rc::Rc;

use serde_json::json;
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment, Simulation};
use snapfence_image_format::units::{GuestOffset, SECTOR_BYTES};
use snapfenced::catalogue::{DeviceTimes, LayerRecord, SnapshotDevice, SnapshotRecord, SnapshotState};
use snapfenced::manager::DeviceOpenError;

use super::support::{Answer, BLOCK, CatalogueFile, DISK, World};

/// Blocks of each disk that the guest uses.
const BLOCKS: u64 = 6;
/// Rounds of the guest.
const ROUNDS: u8 = 60;
/// The guest flushes after so many rounds.
const FLUSH_EVERY: u8 = 7;
/// Rounds in which a snapshot is asked for.
const SNAPSHOTS: [(u8, &str); 2] = [(20, "s1"), (40, "s2")];
/// How many instants are tried.
const CRASHES: u64 = 120;

/// What the guest and the client know.
#[derive(Debug, Default)]
struct Known {
    /// Operations that had changed the medium when the guest began.
    begun: u64,
    /// The last round whose writes a flush has covered.
    durable: u8,
    /// The last round of which a write has begun.
    issued: u8,
    cuts: Vec<Cut>,
}

#[derive(Debug)]
struct Cut {
    name: &'static str,
    /// The last round that was complete when the command was given.
    after: u8,
    /// The last round of which a write had begun when the answer came.
    before: Option<u8>,
}

struct Run {
    environment: SimulatedEnvironment,
    catalogue: CatalogueFile,
    known: Rc<RefCell<Known>>,
}

/// The guest and the snapshots, with the power going off after `effects` changes of the medium.
fn run(seed: u64, effects: Option<u64>) -> Run {
    let mut simulation = Simulation::new(seed);
    let environment = simulation.environment().clone();
    if let Some(effects) = effects {
        environment.stop_after(effects);
    }
    let catalogue = CatalogueFile::default();
    let world = World::start(environment.clone(), catalogue.clone(), &[]);
    let known = Rc::new(RefCell::new(Known::default()));
    let told = Rc::clone(&known);
    let ended = simulation.run(async move {
        for device in ["vda", "vdb"] {
            world.serve_new(device).await;
        }
        told.borrow_mut().begun = world.environment.effects();
        let mut answers: Vec<Answer> = Vec::new();
        for round in 1..=ROUNDS {
            told.borrow_mut().issued = round;
            world.write("vda", u64::from(round) % BLOCKS, round).await;
            world.write("vdb", u64::from(round) % BLOCKS, round).await;
            if round % FLUSH_EVERY == 0 {
                world.flush("vda").await;
                world.flush("vdb").await;
                told.borrow_mut().durable = round;
            }
            if let Some((_, name)) = SNAPSHOTS.into_iter().find(|(at, _)| *at == round) {
                told.borrow_mut().cuts.push(Cut { name, after: round, before: None });
                let devices = json!([{ "device": "vda" }, { "device": "vdb" }]);
                answers.push(world.begin("snapshot-create", json!({ "name": name, "devices": devices })));
            }
            for (answer, cut) in answers.iter().zip(&mut told.borrow_mut().cuts) {
                if answer.is_there() && cut.before.is_none() {
                    cut.before = Some(round);
                }
            }
        }
        for (_, name) in SNAPSHOTS {
            assert_eq!(world.settled(name).await["state"], "frozen");
        }
        world.manager.stop().await.expect("everything is durable");
    });
    assert_eq!(ended.is_some(), !environment.is_stopped(), "seed {seed}: it ends unless the power goes off");
    Run { environment, catalogue, known }
}

/// The value of each block after `round` rounds.
fn after_round(round: u8) -> Vec<u8> {
    (0..BLOCKS).map(|block| (0..=round).rev().find(|value| u64::from(*value) % BLOCKS == block).unwrap_or(0)).collect()
}

/// Starts again after the crash and looks. Answers with the states of the snapshots.
fn examine(crashed: Run, what: &str) -> Vec<String> {
    let environment = crashed.environment.crash();
    let catalogue = crashed.catalogue.after_power_cut();
    let known = crashed.known;
    let mut simulation = Simulation::on(environment.clone());
    let what = what.to_owned();
    simulation.block_on(async move {
        let world = World::start(environment, catalogue, &[]);
        world.manager.recover().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        for device in ["vda", "vdb"] {
            let specification = format!("name={device},image=/vm/{device}.qcow2,format=qcow2,socket=/run/{device}");
            world.serve(&specification).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let known = known.take();
        for device in ["vda", "vdb"] {
            let (least, most) = (after_round(known.durable), after_round(known.issued));
            for (sector, value) in (0_u64..).zip(world.read_sectors(device, BLOCKS).await) {
                let block = sector * SECTOR_BYTES / BLOCK;
                let index = usize::try_from(block).expect("small");
                let possible = (least[index]..=most[index]).contains(&value) && (value == 0 || u64::from(value) % BLOCKS == block);
                assert!(possible, "{what}: block {block} of {device} has {value}, not {} to {}", least[index], most[index]);
            }
        }
        let depths = [world.layers("vda").await.len(), world.layers("vdb").await.len()];
        assert_eq!(depths[0], depths[1], "{what}: one has switched and the other has not");
        let listed = world.done("snapshot-list", json!({})).await;
        let listed = listed.as_array().expect("a list");
        assert_eq!(listed.len() + 1, depths[0], "{what}: each layer has a snapshot, valid or failed");
        let mut states = Vec::new();
        for info in listed {
            let state = info["state"].as_str().expect("a word").to_owned();
            let cut = known.cuts.iter().find(|cut| info["name"] == cut.name).expect("it was asked for");
            if state == "frozen" {
                let mut seen = Vec::new();
                for member in info["devices"].as_array().expect("a list") {
                    let layer = member["frozen_layer"].as_str().expect("a path");
                    let values = world.read_file(layer, Format::Qcow2, BLOCKS).await;
                    let round = values.iter().copied().max().unwrap_or(0);
                    assert_eq!(values, after_round(round), "{what}: {layer} is no state that the disk was in");
                    assert!(round >= cut.after, "{what}: {layer} misses what was complete before the command");
                    assert!(round <= cut.before.unwrap_or(known.issued), "{what}: {layer} has what was written after the answer");
                    seen.push(round);
                }
                assert!(seen[0] == seen[1] || seen[0] == seen[1] + 1, "{what}: not one point in time: {seen:?}");
            } else {
                assert_eq!((state.as_str(), info["error"].is_string()), ("failed", true), "{what}");
            }
            states.push(state);
        }
        // It goes on from here.
        for device in ["vda", "vdb"] {
            world.write(device, 0, 200).await;
        }
        assert_eq!(world.snapshot("later", &["vda", "vdb"]).await["state"], "frozen", "{what}");
        world.manager.stop().await.expect("everything is durable");
        states
    })
}

/// Has QEMU look at every image.
fn check(environment: &SimulatedEnvironment) {
    let folder = tempfile::tempdir().expect("a folder");
    for file in environment.files() {
        environment.export(&file, folder.path().join(file.file_name().expect("a name"))).expect("exported");
    }
    for file in environment.files().iter().filter(|file| file.extension().is_some_and(|extension| extension == "qcow2")) {
        let name = file.file_name().expect("a name");
        let held = environment.bytes(file).expect("a file");
        if name.as_encoded_bytes().starts_with(b".") || held.is_empty() {
            continue; // An overlay that was being made.
        }
        let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(folder.path().join(name)).output().expect("qemu-img");
        // 3: nothing but leaks.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {}", file.display(), String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn every_crash_leaves_disks_and_snapshots_that_make_sense() {
    for seed in [101, 102] {
        let whole = run(seed, None);
        let (from, to) = (whole.known.borrow().begun, whole.environment.effects());
        assert!(to - from > CRASHES / 2, "seed {seed}: only {} changes of the medium", to - from);
        let mut seen = BTreeSet::new();
        for step in 0..CRASHES / 2 {
            let effects = from + (to - from) * step / (CRASHES / 2);
            let crashed = run(seed, Some(effects));
            if step % 20 == 0 {
                check(&crashed.environment.crash());
            }
            seen.insert(examine(crashed, &format!("seed {seed}, power off after {effects} changes")));
        }
        let words: Vec<Vec<&str>> = seen.iter().map(|states| states.iter().map(String::as_str).collect()).collect();
        for expected in [vec![], vec!["failed"], vec!["frozen"], vec!["frozen", "failed"]] {
            assert!(words.contains(&expected), "seed {seed}: no crash left {expected:?}: {words:?}");
        }
    }
}

/// Starts again after the daemon was killed, flushes what is found, takes a snapshot of it, and turns the power off.
fn go_on(killed: Run, what: &str) {
    let environment = killed.environment.killed();
    let catalogue = killed.catalogue.after_kill();
    let known = killed.known.take();
    let mut simulation = Simulation::on(environment.clone());
    let (second, told) = (catalogue.clone(), what.to_owned());
    let found = simulation.block_on(async move {
        let world = World::start(environment, second, &[]);
        world.manager.recover().await.unwrap_or_else(|error| panic!("{told}: {error}"));
        let mut found = Vec::new();
        for device in ["vda", "vdb"] {
            serve(&world, device).await.unwrap_or_else(|error| panic!("{told}: {error}"));
            let values = world.read(device, BLOCKS).await;
            let (least, most) = (after_round(known.durable), after_round(known.issued));
            let possible = values.iter().zip(least.iter().zip(&most)).all(|(value, (least, most))| (least..=most).contains(&value));
            assert!(possible, "{told}: {device} has {values:?}, not {least:?} to {most:?}");
            world.flush(device).await;
            found.push(values);
        }
        assert_eq!(world.snapshot("after", &["vda", "vdb"]).await["state"], "frozen", "{told}");
        found
    });
    let environment = simulation.environment().crash();
    let mut simulation = Simulation::on(environment.clone());
    let what = what.to_owned();
    simulation.block_on(async move {
        let world = World::start(environment, catalogue.after_power_cut(), &[]);
        world.manager.recover().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let info = world.done("snapshot-show", json!({ "name": "after" })).await;
        assert_eq!(info["state"], "frozen", "{what}");
        for (at, device) in ["vda", "vdb"].into_iter().enumerate() {
            serve(&world, device).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(world.read(device, BLOCKS).await, found[at], "{what}: {device} has lost what was flushed after the kill");
            let layer = info["devices"][at]["frozen_layer"].as_str().expect("a path");
            assert_eq!(world.read_file(layer, Format::Qcow2, BLOCKS).await, found[at], "{what}: {layer} has changed");
        }
    });
}

#[test]
fn what_a_killed_daemon_left_in_the_cache_is_made_durable_by_the_next() {
    let seed = 103;
    let whole = run(seed, None);
    let (from, to) = (whole.known.borrow().begun, whole.environment.effects());
    for step in 0..CRASHES / 2 {
        let effects = from + (to - from) * step / (CRASHES / 2);
        go_on(run(seed, Some(effects)), &format!("seed {seed}, killed after {effects} changes"));
    }
}

#[test]
fn a_base_that_cannot_be_made_durable_fails_flushes_and_snapshots() {
    let mut simulation = Simulation::new(114);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.serve_new("vda").await;
        world.snapshot("s1", &["vda"]).await;
        let world = world.restart().await;
        environment.inject(Fault::once(OperationKind::Flush, 0).on("/vm/vda.qcow2"));
        serve(&world, "vda").await.expect("served");
        let view = world.manager.device("vda").expect("a device").stack.view();
        for _ in 0..2 {
            view.flush().await.expect_err("the base is not durable, and no second flush makes it so");
        }
        assert_eq!(world.done("device-list", json!({})).await[0]["state"], "failed");
        drop(view);
        let refused =
            world.ask("snapshot-create", json!({ "name": "s2", "devices": [{ "device": "vda" }] })).await.expect_err("not durable").desc;
        assert!(refused.starts_with("no snapshot of device 'vda' would be durable: a flush of /vm/vda.qcow2 has failed"), "{refused}");
    });
}

#[test]
fn a_layer_that_cannot_be_made_durable_fails_the_snapshot_and_stays_known() {
    let mut simulation = Simulation::new(110);
    let environment = simulation.environment().clone();
    let world = World::new(&environment);
    let first = world.clone();
    simulation.block_on(async move {
        for device in ["vda", "vdb"] {
            first.serve_new(device).await;
            first.write(device, 0, 1).await;
            first.flush(device).await;
        }
        first.environment.inject(Fault::lasting(OperationKind::Flush, 0).on("/vm/vda.qcow2"));
        let devices = json!([{ "device": "vda" }, { "device": "vdb" }]);
        first.done("snapshot-create", json!({ "name": "s1", "devices": devices })).await;
        let info = first.settled("s1").await;
        assert!(info["error"].as_str().expect("a reason").starts_with("device 'vda': the layer beneath is not durable: "), "{info}");
        first.concluded("job1").await;
        assert_eq!(first.event_names().last().map(String::as_str), Some("job1 concluded"));
        let stack = first.done("stack-show", json!({ "device": "vdb" })).await;
        assert_eq!(stack["layers"][1]["snapshot"], json!(null), "a snapshot of which a member failed has frozen nothing");
        let states = async |device: &str| {
            let stack = first.done("stack-show", json!({ "device": device })).await;
            [stack["layers"][0]["state"].clone(), stack["layers"][1]["state"].clone()]
        };
        assert_eq!([states("vda").await, states("vdb").await], [["active", "failed"], ["active", "frozen"]]);
        let devices = first.done("device-list", json!({})).await;
        assert_eq!([&devices[0]["state"], &devices[1]["state"]], ["failed", "ready"], "no flush of vda succeeds any more");
    });
    let environment = environment.crash();
    let mut simulation = Simulation::on(environment.clone());
    simulation.block_on(async move {
        let world = World::start(environment, world.catalogue.after_power_cut(), &[]);
        world.manager.recover().await.expect("a catalogue");
        for device in ["vda", "vdb"] {
            let specification = format!("name={device},image=/vm/{device}.qcow2,format=qcow2,socket=/run/{device}");
            world.serve(&specification).await.expect("served");
            assert_eq!(world.layers(device).await.len(), 2, "the overlay stays on top");
            assert_eq!(world.read(device, 1).await, [1]);
        }
        assert_eq!(world.done("snapshot-show", json!({ "name": "s1" })).await["state"], "failed");
    });
}

/// The power goes off while `vda` and `vdb` switch as a group; only `vdb`'s guest has written to its overlay, and made that durable.
fn half_switched(seed: u64) -> (SimulatedEnvironment, CatalogueFile) {
    let mut simulation = Simulation::new(seed);
    let environment = simulation.environment().clone();
    let world = World::new(&environment);
    let first = world.clone();
    simulation.block_on(async move {
        for device in ["vda", "vdb", "vdc"] {
            first.serve_new(device).await;
        }
        first.occupy("vda");
        let devices = json!([{ "device": "vda" }, { "device": "vdb" }]);
        let asked = first.begin("snapshot-create", json!({ "name": "s1", "devices": devices, "deadline-ms": 10_000 }));
        first.switching("vda").await;
        assert!(!asked.is_there(), "vda does not look");
        let view = first.manager.device("vdb").expect("a device").stack.view();
        let bytes = AlignedBuffer::copy_of(&[5; 4096]);
        view.write(GuestOffset::ZERO, Buffer::Owned(bytes)).await.0.expect("written");
        view.flush().await.expect("durable");
    });
    (environment.crash(), world.catalogue.after_power_cut())
}

async fn serve(world: &World, device: &str) -> Result<(), DeviceOpenError> {
    world.serve(&format!("name={device},image=/vm/{device}.qcow2,format=qcow2,socket=/run/{device}")).await
}

#[test]
fn an_overlay_that_cannot_be_looked_at_is_waited_for() {
    for missing in [false, true] {
        let (environment, catalogue) = half_switched(111);
        let mut simulation = Simulation::on(environment.clone());
        simulation.block_on(async move {
            // Its disk is away, or its file system is not mounted.
            let overlay = std::path::Path::new("/vm/vdb.s1.qcow2");
            let away = std::path::Path::new("/vm/away");
            if missing {
                environment.rename(overlay, away).await.expect("moved");
            } else {
                environment.inject(Fault::lasting(OperationKind::Open, 0).on(overlay));
            }
            let world = World::start(environment.clone(), catalogue, &[]);
            world.manager.recover().await.expect("a catalogue");
            for device in ["vda", "vdb"] {
                let refused = serve(&world, device).await.expect_err("unknown").to_string();
                let expected = "it is unknown which layer is its top: /vm/vdb.s1.qcow2 of snapshot 's1' cannot be looked at (";
                assert!(refused.contains(expected) && refused.contains("start once with --forget vdb"), "{refused}");
            }
            let refused = world.serve("name=x,image=/vm/vda.qcow2,format=qcow2,socket=/run/x").await.expect_err("unknown").to_string();
            assert!(refused.contains("must not be written to: snapshot `s1` depends on it"), "{refused}");
            serve(&world, "vdc").await.expect("it has nothing to do with that");
            environment.clear_faults();
            if missing {
                environment.rename(away, overlay).await.expect("moved");
            }
            let world = world.restart().await;
            for device in ["vda", "vdb"] {
                serve(&world, device).await.expect("served");
                assert_eq!(world.layers(device).await.len(), 2);
            }
            assert_eq!(world.read("vdb", 1).await, [5]);
            assert_eq!(world.done("snapshot-show", json!({ "name": "s1" })).await["state"], "failed");
        });
    }
}

#[test]
fn an_overlay_that_is_not_as_it_was_recorded_is_waited_for() {
    // Another program has been at the overlay, or at its name; or the directory of the frozen layer is none of the overlay's business any more.
    for change in ["no image", "another cover", "cover is gone"] {
        let (environment, catalogue) = half_switched(115);
        let mut simulation = Simulation::on(environment.clone());
        simulation.block_on(async move {
            let world = World::start(environment.clone(), catalogue, &[]);
            let overlay = std::path::Path::new("/vm/vdb.s1.qcow2");
            let away = std::path::Path::new("/vm/away");
            environment.rename(overlay, away).await.expect("moved");
            let expected = match change {
                "no image" => {
                    environment.put(overlay, b"text");
                    "is not what was recorded (the file is empty or too short"
                }
                "another cover" => {
                    world.create("/vm/vdb.s1.qcow2", &CreateOptions::overlay(DISK, "vdc.qcow2", "qcow2")).await;
                    "does not cover the recorded top (its backing file is /vm/vdc.qcow2"
                }
                _ => {
                    world.create("/vm/vdb.s1.qcow2", &CreateOptions::overlay(DISK, "/elsewhere/vdb.qcow2", "qcow2")).await;
                    "does not cover the recorded top (its backing file is not opened: /elsewhere/vdb.qcow2 lies outside"
                }
            };
            world.manager.recover().await.expect("a catalogue");
            let refused = serve(&world, "vdb").await.expect_err("unknown").to_string();
            assert!(refused.contains(&format!("top: /vm/vdb.s1.qcow2 of snapshot 's1' {expected}")), "{change}: {refused}");
            assert!(refused.contains("start once with --forget vdb"), "{refused}");
            environment.rename(away, overlay).await.expect("moved back");
            let world = world.restart().await;
            serve(&world, "vdb").await.expect("served");
            assert_eq!(world.read("vdb", 1).await, [5], "what was acknowledged is there");
        });
    }
}

#[test]
fn forgetting_one_device_takes_no_other_back_in_time() {
    let (environment, catalogue) = half_switched(112);
    let mut simulation = Simulation::on(environment.clone());
    simulation.block_on(async move {
        environment.remove(std::path::Path::new("/vm/vda.s1.qcow2")).await.expect("lost");
        let world = World::start(environment.clone(), catalogue, &[]);
        world.manager.catalogue().run(|store| store.forget_device("vda")).await.expect("a catalogue");
        world.manager.recover().await.expect("a catalogue");
        for device in ["vda", "vdb"] {
            serve(&world, device).await.expect("served");
        }
        assert_eq!(world.layers("vda").await, ["/vm/vda.qcow2"]);
        assert_eq!(world.layers("vdb").await, ["/vm/vdb.s1.qcow2", "/vm/vdb.qcow2"]);
        assert_eq!(world.read("vdb", 1).await, [5], "what was acknowledged is there");
    });
}

#[test]
fn a_recorded_layer_that_cannot_be_looked_at_might_be_any_file() {
    let mut simulation = Simulation::new(113);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        for device in ["vda", "vdb"] {
            world.serve_new(device).await;
        }
        world.snapshot("s1", &["vda"]).await;
        let world = world.restart().await;
        environment.inject(Fault::lasting(OperationKind::Open, 0).on("/vm/vda.qcow2"));
        let refused = serve(&world, "vdb").await.expect_err("it might be that file").to_string();
        let expected =
            "device 'vdb': nothing is opened for writing, because device `vda` depends on /vm/vda.qcow2, which cannot be looked at: ";
        assert!(refused.starts_with(expected), "{refused}");
        world.serve("name=vdb,image=/vm/vdb.qcow2,format=qcow2,socket=/run/vdb,readonly=on").await.expect("nothing is written");
        world.done("device-remove", json!({ "name": "vdb" })).await;
        environment.clear_faults();
        environment.remove(std::path::Path::new("/vm/vda.qcow2")).await.expect("lost");
        serve(&world, "vdb").await.expect("what is not there cannot be written to");
    });
}

#[test]
fn intents_are_rolled_forward_in_the_order_of_their_layers_whatever_the_clock_said() {
    let mut simulation = Simulation::new(131);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.serve_new("vda").await;
        world.write("vda", 0, 1).await;
        let base = "/vm/vda.qcow2";
        let (lower, upper) = ("/vm/vda.late.qcow2", "/vm/vda.early.qcow2");
        world.create(lower, &CreateOptions::overlay(DISK, "vda.qcow2", "qcow2")).await;
        world.create(upper, &CreateOptions::overlay(DISK, "vda.late.qcow2", "qcow2")).await;
        // The daemon ends before the catalogue has either as switched, and in between somebody has set the clock back.
        let layer = |path: &str| LayerRecord { path: path.into(), format: Format::Qcow2 };
        for (name, created_us, frozen, overlay) in [("late", 2, base, lower), ("early", 1, lower, upper)] {
            let member = SnapshotDevice {
                device: "vda".to_owned(),
                frozen: layer(frozen),
                overlay: layer(overlay),
                created_overlay: true,
                times: DeviceTimes::default(),
            };
            let state = SnapshotState::Intended;
            let record = SnapshotRecord { name: name.to_owned(), created_us, state, devices: vec![member], error: None };
            world.manager.catalogue().run(move |store| store.intend(&record, None)).await.expect("a catalogue");
        }
        let world = world.restart().await;
        world.serve(&format!("name=vda,image={base},format=qcow2,socket=/run/vda")).await.expect("served");
        assert_eq!(world.layers("vda").await, [upper, lower, base]);
        assert_eq!(world.read("vda", 1).await, [1]);
    });
}

//! Devices: what may be served, under which name, and which layer is on top.

use serde_json::json;
use snapfence::protocol::ErrorClass;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, Simulation};

use super::support::{CatalogueFile, DISK, World};

fn overlay_of(backing: &str) -> CreateOptions {
    CreateOptions::overlay(DISK, backing, "qcow2")
}

#[test]
fn a_device_comes_and_goes_by_command() {
    let mut simulation = Simulation::new(1);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.environment.put("/vm/a.raw", &vec![7; 1 << 20]);
        let added = json!({ "name": "vda", "image": "a.raw", "format": "raw", "socket": "/run/vda", "queues": 2, "serial": "s" });
        let info = world.done("device-add", added.clone()).await;
        assert_eq!((&info["image"], &info["virtual-size"], &info["depth"]), (&json!("/vm/a.raw"), &json!(DISK), &json!(1)));
        assert_eq!(world.done("device-list", json!({})).await, json!([info]));
        let refused = world.ask("device-add", added).await.expect_err("taken");
        assert_eq!(refused.desc, "device 'vda': there already is a device of this name");
        world.connect("vda", true);
        let refused = world.ask("device-remove", json!({ "name": "vda" })).await.expect_err("in use");
        assert!(refused.desc.contains("a front-end is connected"), "{}", refused.desc);
        world.done("device-remove", json!({ "name": "vda", "force": true })).await;
        assert_eq!(world.done("device-list", json!({})).await, json!([]));
        let refused = world.ask("device-remove", json!({ "name": "vda" })).await.expect_err("gone");
        assert_eq!(refused.class, ErrorClass::DeviceNotFound);
        world.done("quit", json!({})).await;
        assert_eq!(world.quits.get(), 1);
    });
}

#[test]
fn whatever_stands_in_the_way_is_named_and_nothing_is_left() {
    let mut simulation = Simulation::new(2);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.serve_new("vda").await;
        world.create("/vm/child.qcow2", &overlay_of("vda.qcow2")).await;
        world.create("/vm/b.qcow2", &CreateOptions::standalone(DISK)).await;
        world.environment.put("/vm/empty.raw", &[]);
        world.environment.put("/vm/ragged.raw", &[0; 700]);
        let table = [
            ("name=vda,image=/vm/b.qcow2,format=qcow2,socket=/run/b", "device 'vda': there already is a device of this name"),
            ("name=vdb,image=/vm/b.qcow2,format=qcow2,socket=/run/vda", "device 'vdb': socket /run/vda belongs to another device"),
            ("name=vdb,image=/vm/none,format=raw,socket=/run/b", "device 'vdb': /vm/none: cannot be opened for writing: "),
            ("name=vdb,image=/nowhere/x,format=raw,socket=/run/b", "device 'vdb': the directory of /nowhere/x cannot be used: "),
            ("name=vdb,image=/vm/b.qcow2,format=qcow2,socket=/nowhere/s", "device 'vdb': the directory of /nowhere/s cannot be used: "),
            (
                "name=vdb,image=/vm/empty.raw,format=qcow2,socket=/run/b",
                "device 'vdb': /vm/empty.raw: the file is empty or too short for a header",
            ),
            ("name=vdb,image=/vm/empty.raw,format=raw,socket=/run/b", "device 'vdb': image /vm/empty.raw has no size"),
            ("name=vdb,image=/vm/ragged.raw,format=raw,socket=/run/b", "device 'vdb': /vm/ragged.raw: "),
            ("name=vdb,image=/vm/vda.qcow2,format=qcow2,socket=/run/b", "device 'vdb': /vm/vda.qcow2: is in use"),
            ("name=vdb,image=/vm/child.qcow2,format=qcow2,socket=/run/b", "device 'vdb': /vm/vda.qcow2: is in use"),
            ("name=vdb,image=/vm/b.qcow2,format=qcow2,socket=/run/refused", "device 'vdb': as the test wants it"),
        ];
        for (specification, expected) in table {
            let refused = world.serve(specification).await.expect_err(specification).to_string();
            assert!(refused.starts_with(expected), "{specification}: {refused}");
        }
        world.serve("name=vdb,image=/vm/b.qcow2,format=qcow2,socket=/run/b").await.expect("nothing is held after a refusal");
    });
}

#[test]
fn the_catalogue_decides_which_layer_is_on_top() {
    let mut simulation = Simulation::new(3);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.serve_new("vda").await;
        world.write("vda", 0, 1).await;
        world.snapshot("s1", &["vda"]).await;
        world.write("vda", 0, 2).await;
        world.snapshot("s2", &["vda"]).await;
        world.write("vda", 1, 3).await;
        world.create("/vm/other.qcow2", &CreateOptions::standalone(DISK)).await;
        let layers = ["/vm/vda.s2.qcow2", "/vm/vda.s1.qcow2", "/vm/vda.qcow2"];
        let mut world = world;
        for image in layers {
            world = world.restart().await;
            world.serve(&format!("name=vda,image={image},format=qcow2,socket=/run/vda")).await.expect("a layer of it");
            assert_eq!(world.layers("vda").await, layers);
            assert_eq!(world.read("vda", 3).await, [2, 3, 0]);
        }
        let stack = world.done("stack-show", json!({ "device": "vda" })).await;
        let shown: Vec<_> = (0..3).map(|at| (stack["layers"][at]["snapshot"].clone(), stack["layers"][at]["state"].clone())).collect();
        assert_eq!(shown, [(json!(null), json!("active")), (json!("s2"), json!("frozen")), (json!("s1"), json!("frozen"))]);

        world = world.restart().await;
        let refused = world.serve("name=vda,image=/vm/other.qcow2,format=qcow2,socket=/run/vda").await.expect_err("another").to_string();
        assert_eq!(
            refused,
            "device 'vda': image /vm/other.qcow2 is not in the recorded stack of this name, whose top is /vm/vda.s2.qcow2 and which has 3 \
             layers; give image=/vm/vda.s2.qcow2 to go on with it, choose another name, or start once with --forget vda to drop the record"
        );
        let refused = world.serve("name=vda,image=/vm/vda.qcow2,format=raw,socket=/run/vda").await.expect_err("another").to_string();
        assert_eq!(refused, "device 'vda': image /vm/vda.qcow2 is recorded as qcow2, not raw");
        world.environment.symlink("/vm/vda.s1.qcow2", "/vm/link").expect("a new name");
        world.serve("name=vda,image=/vm/link,format=qcow2,socket=/run/vda").await.expect("a layer by another name");
        // The name of a snapshot that started in the run before goes on to be taken.
        let again = json!({ "name": "s1", "devices": [{ "device": "vda" }] });
        let refused = world.ask("snapshot-create", again).await.expect_err("taken").desc;
        assert_eq!(refused, "there already is a snapshot 's1'; choose another name");
        world.snapshot("s3", &["vda"]).await;
        assert_eq!(world.layers("vda").await[0], "/vm/vda.s3.qcow2");
    });
}

#[test]
fn what_lies_beneath_is_never_opened_for_writing() {
    let mut simulation = Simulation::new(4);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.serve_new("vda").await;
        world.snapshot("s1", &["vda"]).await;
        let base = "name=vdb,image=/vm/vda.qcow2,format=qcow2,socket=/run/vdb";
        let refused = world.serve(base).await.expect_err("a layer of vda").to_string();
        assert_eq!(refused, "device 'vdb': /vm/vda.qcow2: must not be written to: device 'vda' depends on it as a backing file; serve what depends on it, or this read-only");
        world.serve(&format!("{base},readonly=on")).await.expect("for reading");
        world.done("device-remove", json!({ "name": "vdb" })).await;
        // Nobody has it open any more, and the catalogue knows all the same.
        world.done("device-remove", json!({ "name": "vda" })).await;
        let world = world.restart().await;
        let refused = world.serve(base).await.expect_err("recorded").to_string();
        assert!(refused.ends_with("must not be written to: device `vda` depends on it as a backing file; serve what depends on it, or this read-only"), "{refused}");
    });
}

#[test]
fn the_socket_leads_into_allowed_directories_only() {
    let mut simulation = Simulation::new(5);
    let world = World::start(simulation.environment().clone(), CatalogueFile::default(), &["/vm"]);
    simulation.block_on(async move {
        for path in ["/vm/a.raw", "/secret/a.raw", "/vm/b.raw"] {
            world.environment.put(path, &vec![0; 1 << 20]);
        }
        world.environment.symlink("/secret/a.raw", "/vm/link.raw").expect("a new name");
        let add = |image: &str, socket: &str| json!({ "name": "vda", "image": image, "format": "raw", "socket": socket });
        let table = [
            (add("/secret/a.raw", "/run/s"), "/secret/a.raw lies outside the allowed directories (/vm)"),
            (add("/vm/a.raw", "/vm/s"), "socket /vm/s lies outside the directories for sockets (/run)"),
            (add("/vm/a.raw", "/secret/s"), "socket /secret/s lies outside the directories for sockets (/run)"),
            (add("/vm/../secret/a.raw", "/run/s"), "/secret/a.raw lies outside the allowed directories (/vm)"),
            (add("/vm/link.raw", "/run/s"), "/vm/link.raw: cannot be opened for writing: "),
        ];
        for (arguments, expected) in table {
            let refused = world.ask("device-add", arguments.clone()).await.expect_err("outside").desc;
            assert!(refused.starts_with(&format!("device 'vda': {expected}")), "{arguments}: {refused}");
            assert_eq!(refused.contains("names inside images and on the control socket"), expected.contains("link"), "{refused}");
        }
        world.serve("name=vdb,image=/secret/a.raw,format=raw,socket=/run/vdb").await.expect("the operator may");
        world.done("device-add", add("/vm/a.raw", "/run/s")).await;
        let out = json!({ "name": "s", "devices": [{ "device": "vda", "overlay": "/elsewhere/o" }], "create": true });
        let refused = world.ask("snapshot-create", out).await.expect_err("outside").desc;
        assert!(refused.contains("/elsewhere/o lies outside the allowed directories"), "{refused}");
    });
}

#[test]
fn an_image_that_an_unreadable_overlay_names_is_not_written_to() {
    let mut simulation = Simulation::new(9);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.create("/strange/base.qcow2", &CreateOptions::standalone(DISK)).await;
        world.create("/strange/o.qcow2", &overlay_of("base.qcow2")).await;
        let serve = async |world: &World| world.serve("name=vda,image=/strange/base.qcow2,format=qcow2,socket=/run/vda").await;
        let whole = environment.bytes("/strange/o.qcow2").expect("a file");
        // Its first L2 table lies between two clusters: what it holds cannot be told.
        let mut broken = whole.clone();
        let l1 = usize::try_from(u64::from_be_bytes(whole[40..48].try_into().expect("8 bytes"))).expect("small");
        broken[l1..l1 + 8].copy_from_slice(&0x200_u64.to_be_bytes());
        environment.put("/strange/o.qcow2", &broken);
        let refused = serve(&world).await.expect_err("it may hold anything").to_string();
        assert!(refused.contains("must not be written to: /strange/o.qcow2 depends on it"), "{refused}");
        // An unknown feature: no header that we understand, and a warning.
        let mut strange = whole.clone();
        strange[72] = 0x80;
        environment.put("/strange/o.qcow2", &strange);
        serve(&world).await.expect("nothing is known to depend on it");
        world.done("device-remove", json!({ "name": "vda" })).await;
        world.manager.catalogue().run(|store| store.forget_device("vda")).await.expect("a catalogue");
        environment.put("/strange/o.qcow2", &whole);
        serve(&world).await.expect("an empty overlay loses nothing");
    });
}

#[test]
fn an_image_behind_a_link_goes_by_its_own_name() {
    let mut simulation = Simulation::new(8);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::start(environment.clone(), CatalogueFile::default(), &["/vm"]);
        world.create("/pool/7.qcow2", &CreateOptions::standalone(DISK)).await;
        environment.put("/dev/dm-3", &vec![0; 1 << 20]);
        environment.symlink("/pool/7.qcow2", "/vm/vda.qcow2").expect("a new name");
        environment.symlink("../dm-3", "/dev/vg/lv").expect("a new name");
        world.serve("name=vda,image=/vm/vda.qcow2,format=qcow2,socket=/run/vda").await.expect("served");
        world.serve("name=vdb,image=/dev/vg/lv,format=raw,socket=/run/vdb").await.expect("served");
        let devices = json!([{ "device": "vda" }, { "device": "vdb", "overlay": "/vm/vdb.qcow2" }]);
        world.done("snapshot-create", json!({ "name": "s1", "devices": devices, "create": true })).await;
        assert_eq!(world.settled("s1").await["state"], "frozen");
        assert_eq!(world.layers("vda").await, ["/pool/7.s1.qcow2", "/pool/7.qcow2"], "beside the real file");
        // The number of a mapped device is another after the next start of the machine.
        assert_eq!(world.layers("vdb").await, ["/vm/vdb.qcow2", "/dev/vg/lv"]);
        world.manager.stop().await.expect("everything is durable");
        environment.rename(std::path::Path::new("/dev/dm-3"), std::path::Path::new("/dev/dm-4")).await.expect("renamed");
        environment.remove(std::path::Path::new("/dev/vg/lv")).await.expect("removed");
        environment.symlink("../dm-4", "/dev/vg/lv").expect("a new name");
        let world = World::start(environment, world.catalogue.after_power_cut(), &["/vm"]);
        world.serve("name=vda,image=/vm/vda.qcow2,format=qcow2,socket=/run/vda").await.expect("served");
        world.serve("name=vdb,image=/dev/vg/lv,format=raw,socket=/run/vdb").await.expect("served");
        assert_eq!([world.layers("vda").await.len(), world.layers("vdb").await.len()], [2, 2]);
    });
}

#[test]
fn removal_waits_for_the_snapshots_before_it() {
    let mut simulation = Simulation::new(6);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.serve_new("vda").await;
        world.occupy("vda");
        let members = json!([{ "device": "vda" }]);
        let first = world.begin("snapshot-create", json!({ "name": "s1", "devices": members, "deadline-ms": 10_000 }));
        let second = world.begin("snapshot-create", json!({ "name": "s2", "devices": members, "deadline-ms": 10_000 }));
        world.switching("vda").await;
        let removal = world.begin("device-remove", json!({ "name": "vda" }));
        world.pause().await;
        let refused = world.ask("snapshot-create", json!({ "name": "s3", "devices": members })).await.expect_err("it goes").desc;
        assert_eq!(refused, "device 'vda' is being removed");
        let refused = world.ask("device-remove", json!({ "name": "vda" })).await.expect_err("it goes").desc;
        assert_eq!(refused, "device 'vda' is being removed already");
        assert!(!first.is_there() && !second.is_there() && !removal.is_there());
        world.park("vda");
        for answer in [first, second, removal] {
            answer.wait().await.expect("done");
        }
        assert_eq!(world.done("snapshot-list", json!({})).await.as_array().map(Vec::len), Some(2));
        assert_eq!(world.done("device-list", json!({})).await, json!([]));
    });
}

#[test]
fn nobody_waits_for_ever_for_a_disk_that_hangs() {
    let mut simulation = Simulation::new(18);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        for device in ["vda", "vdb", "vdc"] {
            world.serve_new(device).await;
            world.write(device, 0, 1).await;
        }
        for device in ["vda", "vdb"] {
            environment.inject(Fault::lasting(OperationKind::Flush, 0).on(format!("/vm/{device}.qcow2")).with(FaultEffect::Hang));
        }
        // A freeze that hangs keeps the device, and whoever removes it is told.
        world.done("snapshot-create", json!({ "name": "s", "devices": [{ "device": "vda" }] })).await;
        let refused = world.ask("device-remove", json!({ "name": "vda" })).await.expect_err("busy").desc;
        assert!(refused.starts_with("device 'vda' is not removed: what is under way on it has not ended within 30 s"), "{refused}");
        // A last flush that hangs does not.
        let refused = world.ask("device-remove", json!({ "name": "vdb" })).await.expect_err("abandoned").desc;
        assert!(refused.starts_with("device 'vdb' is removed, but requests of it have not ended within 30 s"), "{refused}");
        assert_eq!(world.done("device-list", json!({})).await.as_array().map(Vec::len), Some(2));
        let began = environment.now();
        assert_eq!(world.manager.stop().await, Err(vec!["vda".to_owned()]));
        assert!(environment.now() - began < std::time::Duration::from_secs(100));
    });
}

#[test]
fn stopping_refuses_what_is_new_and_completes_what_has_switched() {
    let mut simulation = Simulation::new(7);
    let world = World::new(simulation.environment());
    simulation.block_on(async move {
        world.serve_new("vda").await;
        world.occupy("vda");
        let create = |name: &str| json!({ "name": name, "devices": [{ "device": "vda" }], "deadline-ms": 10_000 });
        let first = world.begin("snapshot-create", create("s1"));
        let second = world.begin("snapshot-create", create("s2"));
        world.switching("vda").await;
        let manager = std::rc::Rc::clone(&world.manager);
        let ended = std::rc::Rc::new(std::cell::Cell::new(false));
        let seen = std::rc::Rc::clone(&ended);
        snapfence_image_format::storage::Environment::spawn(&world.environment, async move {
            manager.stop().await.expect("everything is durable");
            seen.set(true);
        });
        world.pause().await;
        assert!(second.wait().await.expect_err("in line").desc.contains("it was cancelled"));
        assert_eq!(world.ask("snapshot-create", create("s3")).await.expect_err("too late").desc, "the daemon is stopping");
        let late = world.serve("name=vdb,image=/vm/vda.qcow2,format=qcow2,socket=/run/b").await.expect_err("too late").to_string();
        assert_eq!(late, "device 'vdb': the daemon is stopping");
        assert!(!ended.get(), "the first has switched halfway");
        world.park("vda");
        first.wait().await.expect("completed");
        world.until("it has ended", async || ended.get()).await;
        assert_eq!(world.done("snapshot-show", json!({ "name": "s1" })).await["state"], "frozen");
    });
}

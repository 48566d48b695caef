//! Snapshots that come about: groups, lines, deadlines, cancellation, QEMU's commands.

use serde_json::{Value, json};
use snapfence::protocol::ErrorClass;
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, Simulation};

use super::support::{DISK, World};

/// A daemon with disks of these names.
async fn world_with(environment: &snapfence_image_format::storage::simulated::SimulatedEnvironment, devices: &[&str]) -> World {
    let world = World::new(environment);
    for device in devices {
        world.serve_new(device).await;
    }
    world
}

fn create(name: &str, devices: &[&str], deadline_ms: u64) -> Value {
    let members: Vec<_> = devices.iter().map(|device| json!({ "device": device })).collect();
    json!({ "name": name, "devices": members, "deadline-ms": deadline_ms })
}

fn job_status(jobs: &Value, id: &str) -> Value {
    let jobs = jobs.as_array().expect("a list");
    jobs.iter().find(|job| job["id"] == id).map(|job| job["status"].clone()).unwrap_or_default()
}

#[test]
fn a_group_is_cut_and_frozen_and_everything_tells_so() {
    let mut simulation = Simulation::new(10);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        environment.put("/vm/c.raw", &vec![9; 1 << 20]);
        world.serve("name=vdc,image=/vm/c.raw,format=raw,socket=/run/vdc").await.expect("served");
        let devices = ["vda", "vdb", "vdc"];
        for device in devices {
            world.write(device, 0, 1).await;
        }
        world.events();
        let mut asked = create("s1", &devices, 1000);
        asked["job-id"] = json!("cut");
        let switched = world.done("snapshot-create", asked).await;
        assert_eq!((&switched["state"], &switched["job"]), (&json!("switched"), &json!("cut")));
        for device in devices {
            world.write(device, 0, 2).await;
        }
        world.settled("s1").await;
        world.concluded("cut").await;
        let frozen = world.done("snapshot-show", json!({ "name": "s1" })).await;
        assert_eq!(frozen["state"], "frozen");
        for (member, device) in frozen["devices"].as_array().expect("a list").iter().zip(["vda", "vdb", "c"]) {
            assert_eq!(member["overlay"], format!("/vm/{device}.s1.qcow2"));
            assert!(["switch_us", "hold_us", "freeze_us"].iter().all(|time| member[time].is_u64()), "{member}");
        }
        let expected =
            ["cut created", "cut running", "s1 switched", "s1 frozen", "cut waiting", "cut pending", "cut concluded"].map(str::to_owned);
        assert_eq!(world.event_names(), expected);
        let jobs = world.done("query-jobs", json!({})).await;
        assert_eq!(jobs, json!([{ "id": "cut", "type": "snapshot", "status": "concluded", "current-progress": 4, "total-progress": 4 }]));
        for (device, layer, format) in [("vda", "/vm/vda.qcow2", Format::Qcow2), ("vdc", "/vm/c.raw", Format::Raw)] {
            assert_eq!(world.read_file(layer, format, 1).await, [1], "the snapshot holds what was there before");
            assert_eq!(world.read(device, 1).await, [2]);
        }
        assert_eq!(world.done("snapshot-list", json!({})).await, json!([frozen]));
        let refused = world.ask("snapshot-show", json!({ "name": "s9" })).await.expect_err("unknown").desc;
        assert!(refused.starts_with("there is no snapshot 's9'"), "{refused}");
        world.manager.stop().await.expect("everything is durable");
    });
}

#[test]
fn a_device_waits_in_line_for_itself_and_for_nobody_else() {
    let mut simulation = Simulation::new(11);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb", "vdc"]).await;
        world.occupy("vda");
        let first = world.begin("snapshot-create", create("s1", &["vda"], 10_000));
        let second = world.begin("snapshot-create", create("s2", &["vda", "vdb"], 10_000));
        let third = world.begin("snapshot-create", create("s3", &["vdb"], 10_000));
        world.switching("vda").await;
        world.snapshot("free", &["vdc"]).await;
        third.wait().await.expect("the second waits for vda, and keeps nobody from vdb");
        world.settled("s3").await;
        assert!(!first.is_there() && !second.is_there());
        let jobs = world.done("query-jobs", json!({})).await;
        assert_eq!(["job1", "job2", "job3", "job4"].map(|id| job_status(&jobs, id)), ["running", "created", "concluded", "concluded"]);
        let listed = world.done("snapshot-list", json!({})).await;
        let states: Vec<_> = listed.as_array().expect("a list").iter().map(|info| (info["name"].clone(), info["state"].clone())).collect();
        let expected = [("s1", "preparing"), ("s2", "preparing"), ("s3", "frozen"), ("free", "frozen")];
        assert_eq!(states, expected.map(|(name, state)| (json!(name), json!(state))));
        let state = world.done("device-list", json!({})).await[0]["state"].clone();
        assert_eq!(state, "snapshot");
        world.park("vda");
        for answer in [first, second] {
            answer.wait().await.expect("switched");
        }
        world.settled("s2").await;
        assert_eq!(world.layers("vda").await, ["/vm/vda.s2.qcow2", "/vm/vda.s1.qcow2", "/vm/vda.qcow2"]);
        assert_eq!(world.layers("vdb").await, ["/vm/vdb.s2.qcow2", "/vm/vdb.s3.qcow2", "/vm/vdb.qcow2"]);
        assert_eq!(world.settled("s2").await["state"], "frozen");
        world.manager.stop().await.expect("everything is durable");
    });
}

#[test]
fn a_disk_that_hangs_delays_only_its_own_snapshot() {
    let mut simulation = Simulation::new(12);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        for device in ["vda", "vdb"] {
            world.write(device, 0, 1).await;
        }
        environment.inject(Fault::once(OperationKind::Flush, 0).on("/vm/vda.qcow2").with(FaultEffect::Hang));
        let slow = world.done("snapshot-create", create("slow", &["vda"], 1000)).await;
        assert_eq!(slow["state"], "switched", "the fence needs no flush");
        for round in 0..5 {
            world.snapshot(&format!("quick{round}"), &["vdb"]).await;
            world.write("vda", 1, round).await;
        }
        assert_eq!(world.done("snapshot-show", json!({ "name": "slow" })).await["state"], "switched");
        let state = world.done("stack-show", json!({ "device": "vda" })).await["layers"][1]["state"].clone();
        assert_eq!(state, "freezing");
        environment.release_hung();
        assert_eq!(world.settled("slow").await["state"], "frozen");
        assert_eq!(world.read("vda", 2).await, [1, 4]);
    });
}

#[test]
fn a_group_with_a_file_server_that_hangs_fails_and_lets_the_others_go() {
    use OperationKind::{Create, Flush, FlushDirectory, Open, Read, Rename, Write};
    // Wherever the making of the overlay is held up; and where the operation that hangs changes nothing any more, when it ends at last.
    for (seed, kind) in (120..).zip([Open, Create, Read, Write, Flush, Rename, FlushDirectory]) {
        let mut simulation = Simulation::new(seed);
        let environment = simulation.environment().clone();
        simulation.block_on(async move {
            let world = world_with(&environment, &["vda"]).await;
            world.create("/slow/vdb.qcow2", &CreateOptions::standalone(DISK)).await;
            world.serve("name=vdb,image=/slow/vdb.qcow2,format=qcow2,socket=/run/vdb").await.expect("served");
            for device in ["vda", "vdb"] {
                world.write(device, 0, 1).await;
            }
            let before = world.files();
            // Temporary names are not known, so all of the overlay's directory hangs: what else is done meanwhile is done elsewhere.
            let hang = Fault::lasting(kind, 0).beneath("/slow").with(FaultEffect::Hang);
            environment.inject(hang);
            let group = world.begin("snapshot-create", create("group", &["vda", "vdb"], 1000));
            let behind = world.begin("snapshot-create", create("behind", &["vda"], 1000));
            let refused = group.wait().await.expect_err("it hangs").desc;
            let expected = "snapshot 'group' failed: the overlays are not ready in time, because what lies beneath them does not answer: \
                            device 'vdb'";
            assert_eq!(refused, expected, "{kind:?}");
            behind.wait().await.expect("nothing holds vda back");
            assert_eq!(world.settled("behind").await["state"], "frozen");
            assert_eq!(world.layers("vda").await, ["/vm/vda.behind.qcow2", "/vm/vda.qcow2"]);
            assert!(!world.files().contains(&"/vm/vda.group.qcow2".to_owned()), "{kind:?}: what was ready is undone");
            environment.clear_faults();
            environment.release_hung();
            let own = |files: Vec<String>| files.into_iter().filter(|file| file.starts_with("/slow")).collect::<Vec<_>>();
            world.until("nothing is left", async || own(world.files()) == own(before.clone())).await;
            assert_eq!(world.done("snapshot-show", json!({ "name": "behind" })).await["state"], "frozen");
            assert!(world.ask("snapshot-show", json!({ "name": "group" })).await.is_err(), "{kind:?}: no late success");
            assert_eq!(world.layers("vdb").await, ["/slow/vdb.qcow2"]);
            assert_eq!(world.snapshot("group", &["vda", "vdb"]).await["state"], "frozen", "{kind:?}: name and devices are free");
            assert_eq!([world.read("vda", 1).await, world.read("vdb", 1).await], [[1], [1]]);
            world.manager.stop().await.expect("everything is durable");
        });
    }
}

#[test]
fn who_waits_in_line_behind_a_snapshot_that_does_not_end_is_told() {
    let mut simulation = Simulation::new(121);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        environment.inject(Fault::once(OperationKind::Flush, 0).on("/vm/vda.qcow2").with(FaultEffect::Hang));
        world.done("snapshot-create", create("slow", &["vda"], 1000)).await;
        let refused = world.ask("snapshot-create", create("next", &["vda", "vdb"], 1000)).await.expect_err("it does not end").desc;
        assert_eq!(refused, "snapshot 'next' failed: device 'vda': an earlier snapshot of it has not come to its end within 60 s");
        assert_eq!(world.snapshot("other", &["vdb"]).await["state"], "frozen");
        environment.release_hung();
        assert_eq!(world.snapshot("next", &["vda", "vdb"]).await["state"], "frozen");
    });
}

#[test]
fn a_layer_that_never_becomes_durable_fails_the_group_and_lets_the_others_go() {
    let mut simulation = Simulation::new(122);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        for device in ["vda", "vdb"] {
            world.write(device, 0, 1).await;
        }
        environment.inject(Fault::once(OperationKind::Flush, 0).on("/vm/vda.qcow2").with(FaultEffect::Hang));
        world.done("snapshot-create", create("slow", &["vda", "vdb"], 1000)).await;
        let behind = world.begin("snapshot-create", create("behind", &["vdb"], 1000));
        let info = world.settled("slow").await;
        assert_eq!(info["error"], "device 'vda': the layer beneath is not durable within 60 s", "{info}");
        behind.wait().await.expect("vdb is let go");
        assert_eq!(world.settled("behind").await["state"], "frozen");
        world.write("vda", 1, 2).await;
        environment.release_hung();
        assert_eq!(world.snapshot("next", &["vda", "vdb"]).await["state"], "frozen");
        assert_eq!(world.settled("slow").await["state"], "failed", "no late success");
        let stack = world.done("stack-show", json!({ "device": "vda" })).await;
        let shown = |at: usize| (stack["layers"][at]["state"].clone(), stack["layers"][at]["snapshot"].clone());
        assert_eq!([shown(1), shown(2)], [(json!("frozen"), json!("next")), (json!("frozen"), json!(null))]);
        assert_eq!(world.read("vda", 2).await, [1, 2]);
        world.manager.stop().await.expect("everything is durable");
    });
}

#[test]
fn past_the_deadline_the_snapshot_has_failed_and_the_disk_goes_on() {
    let mut simulation = Simulation::new(13);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        world.write("vda", 0, 1).await;
        world.occupy("vda");
        world.events();
        let failed = world.ask("snapshot-create", create("late", &["vda", "vdb"], 50)).await.expect_err("nobody looks").desc;
        assert!(failed.starts_with("snapshot 'late' failed: not every queue switched within 50 ms"), "{failed}");
        world.write("vda", 1, 2).await;
        world.park("vda");
        let info = world.settled("late").await;
        assert_eq!((&info["state"], info["error"].is_string()), (&json!("failed"), true));
        world.concluded("job1").await;
        let expected = ["job1 created", "job1 running", "late failed", "job1 aborting", "job1 concluded"];
        assert_eq!(world.event_names(), expected);
        // The overlays are in use, and the next snapshot is taken of them.
        assert_eq!(world.layers("vda").await, ["/vm/vda.late.qcow2", "/vm/vda.qcow2"]);
        assert_eq!(world.snapshot("next", &["vda", "vdb"]).await["state"], "frozen");
        let stack = world.done("stack-show", json!({ "device": "vda" })).await;
        let snapshots: Vec<_> = (0..3).map(|at| stack["layers"][at]["snapshot"].clone()).collect();
        assert_eq!(snapshots, [json!(null), json!("next"), json!(null)], "a failed snapshot has frozen nothing");
        let world = world.restart().await;
        for device in ["vda", "vdb"] {
            world.serve(&format!("name={device},image=/vm/{device}.qcow2,format=qcow2,socket=/run/{device}")).await.expect("served");
        }
        assert_eq!(world.read("vda", 2).await, [1, 2]);
        assert_eq!(world.layers("vdb").await, ["/vm/vdb.next.qcow2", "/vm/vdb.late.qcow2", "/vm/vdb.qcow2"]);
    });
}

#[test]
fn a_snapshot_can_be_cancelled_until_it_is_recorded() {
    let mut simulation = Simulation::new(14);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda"]).await;
        let before = world.files();
        // While it is being prepared: an overlay is being written.
        environment.inject(Fault::once(OperationKind::Rename, 0).with(FaultEffect::Hang));
        let preparing = world.begin("snapshot-create", create("s1", &["vda"], 10_000));
        world.until("a file is renamed", async || environment.counts().contains_key(&OperationKind::Rename)).await;
        let waiting = world.begin("snapshot-create", create("s2", &["vda"], 10_000));
        world.pause().await;
        for id in ["job1", "job2"] {
            world.done("job-cancel", json!({ "id": id })).await;
        }
        let refused = waiting.wait().await.expect_err("cancelled").desc;
        assert_eq!(refused, "snapshot 's2' failed: it was cancelled");
        let refused = preparing.wait().await.expect_err("cancelled").desc;
        assert_eq!(refused, "snapshot 's1' failed: it was cancelled", "the disk is not waited for");
        environment.release_hung();
        world.until("nothing is left", async || world.files() == before).await;
        assert_eq!(world.done("snapshot-list", json!({})).await, json!([]));
        // Afterwards it is too late.
        world.occupy("vda");
        let switching = world.begin("snapshot-create", create("s1", &["vda"], 10_000));
        world.switching("vda").await;
        let refused = world.ask("job-cancel", json!({ "id": "job3" })).await.expect_err("too late").desc;
        assert_eq!(refused, "job 'job3' is running and cannot be cancelled any more");
        world.park("vda");
        switching.wait().await.expect("the name is free again");
        world.concluded("job3").await;
        let refused = world.ask("job-cancel", json!({ "id": "job3" })).await.expect_err("too late").desc;
        assert_eq!(refused, "job 'job3' is concluded and cannot be cancelled any more");
        assert!(world.ask("job-cancel", json!({ "id": "none" })).await.is_err());
    });
}

#[test]
fn overlays_that_are_there_or_named_are_used() {
    let mut simulation = Simulation::new(15);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        world.write("vda", 0, 1).await;
        // One of QEMU's kind: 64 KiB clusters, no sub-clusters.
        let plain = CreateOptions { backing: Some(("vda.qcow2".into(), "qcow2".into())), ..CreateOptions::standalone(DISK) };
        world.create("/vm/given.qcow2", &plain).await;
        let devices = json!([{ "device": "vda", "overlay": "given.qcow2" }, { "device": "vdb" }]);
        world.done("snapshot-create", json!({ "name": "s1", "devices": devices })).await;
        assert_eq!(world.settled("s1").await["devices"][0]["overlay"], "/vm/given.qcow2");
        let devices = json!([{ "device": "vda", "overlay": "/vm/made.qcow2" }]);
        world.done("snapshot-create", json!({ "name": "s2", "devices": devices, "create": true })).await;
        assert_eq!(world.settled("s2").await["state"], "frozen");
        world.write("vda", 1, 2).await;
        assert_eq!(world.layers("vda").await, ["/vm/made.qcow2", "/vm/given.qcow2", "/vm/vda.qcow2"]);
        assert_eq!(world.read("vda", 2).await, [1, 2]);
        // Two disks of one folder whose names differ in the extension only.
        for (name, image) in [("vdc", "/vm/x.img"), ("vdd", "/vm/x.raw")] {
            environment.put(image, &vec![0; 1 << 20]);
            world.serve(&format!("name={name},image={image},format=raw,socket=/run/{name}")).await.expect("served");
        }
        world.snapshot("s3", &["vdc", "vdd"]).await;
        assert_eq!(world.layers("vdc").await[0], "/vm/x.s3.qcow2");
        assert_eq!(world.layers("vdd").await[0], "/vm/vdd.s3.qcow2");
    });
}

#[test]
fn qemus_commands_take_group_snapshots() {
    let mut simulation = Simulation::new(16);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        let nodes = async |world: &World| {
            let nodes = world.done("query-named-block-nodes", json!({})).await;
            let nodes: Vec<_> = nodes.as_array().expect("a list").iter().map(|node| (node["node-name"].clone(), node["file"].clone())).collect();
            nodes
        };
        let expect = |names: &[(&str, &str)]| names.iter().map(|(name, file)| (json!(name), json!(file))).collect::<Vec<_>>();
        assert_eq!(nodes(&world).await, expect(&[("vda", "/vm/vda.qcow2"), ("vdb", "/vm/vdb.qcow2")]));
        let sync = |device: &str, node: &str, file: &str| {
            json!({ "type": "blockdev-snapshot-sync", "data": { "node-name": device, "snapshot-node-name": node, "snapshot-file": file } })
        };
        world.done("transaction", json!({ "actions": [sync("vda", "a1", "/vm/a1"), sync("vdb", "b1", "/vm/b1")] })).await;
        let named = [("a1", "/vm/a1"), ("vda", "/vm/vda.qcow2"), ("b1", "/vm/b1"), ("vdb", "/vm/vdb.qcow2")];
        assert_eq!(nodes(&world).await, expect(&named), "a name stays with its layer");
        let listed = world.done("snapshot-list", json!({})).await;
        assert_eq!((listed.as_array().map(Vec::len), &listed[0]["state"]), (Some(1), &json!("frozen")), "one group");
        // With an overlay that is there: by mode, and by a node.
        let over = |below: &str| CreateOptions::overlay(DISK, below, "qcow2");
        world.create("/vm/a2", &over("a1")).await;
        world.create("/vm/b2", &over("b1")).await;
        world.done("blockdev-snapshot-sync", json!({ "device": "vda", "snapshot-file": "/vm/a2", "mode": "existing" })).await;
        let add = json!({ "driver": "qcow2", "node-name": "b2", "file": { "driver": "file", "filename": "/vm/b2" }, "backing": null });
        world.done("blockdev-add", add.clone()).await;
        assert_eq!(nodes(&world).await.last(), Some(&(json!("b2"), json!("/vm/b2"))), "not in use yet");
        world.done("blockdev-snapshot", json!({ "node": "b1", "overlay": "b2" })).await;
        let all = nodes(&world).await;
        let made_up = all[0].0.as_str().expect("a name").to_owned();
        assert!(made_up.starts_with("#block"), "{made_up}");
        let overlays = [(made_up.as_str(), "/vm/a2"), ("a1", "/vm/a1"), ("vda", "/vm/vda.qcow2"), ("b2", "/vm/b2")];
        assert_eq!(all, expect(&[&overlays[..], &named[2..]].concat()));
        // What is wrong changes nothing.
        let table = [
            ("blockdev-snapshot-sync", json!({ "device": "vdx", "snapshot-file": "/vm/x" }), ErrorClass::DeviceNotFound),
            ("blockdev-snapshot-sync", json!({ "snapshot-file": "/vm/x" }), ErrorClass::GenericError),
            ("blockdev-snapshot-sync", json!({ "device": "vda", "snapshot-file": "" }), ErrorClass::GenericError),
            ("blockdev-snapshot-sync", json!({ "device": "vda", "node-name": "a1", "snapshot-file": "/vm/x" }), ErrorClass::GenericError),
            ("blockdev-snapshot-sync", json!({ "node-name": made_up, "snapshot-file": "/vm/x" }), ErrorClass::GenericError),
            (
                "blockdev-snapshot-sync",
                json!({ "node-name": "vda", "snapshot-node-name": "x", "snapshot-file": "/vm/x" }),
                ErrorClass::GenericError,
            ),
            (
                "blockdev-snapshot-sync",
                json!({ "device": "vda", "snapshot-node-name": "a1", "snapshot-file": "/vm/x" }),
                ErrorClass::GenericError,
            ),
            ("blockdev-snapshot", json!({ "node": "a1", "overlay": "b2" }), ErrorClass::GenericError),
            (
                "device-add",
                json!({ "name": "a1", "image": "/vm/b2", "format": "qcow2", "socket": "/run/a1", "readonly": true }),
                ErrorClass::GenericError,
            ),
            ("blockdev-snapshot-sync", json!({ "device": "vda", "snapshot-file": "/vm/x", "format": "raw" }), ErrorClass::GenericError),
            ("blockdev-snapshot-sync", json!({ "device": "vda", "snapshot-file": "/vm/a1" }), ErrorClass::GenericError),
            ("blockdev-snapshot", json!({ "node": "vda", "overlay": "none" }), ErrorClass::DeviceNotFound),
            ("blockdev-add", add, ErrorClass::GenericError),
            ("blockdev-del", json!({ "node-name": "b2" }), ErrorClass::DeviceNotFound),
            ("transaction", json!({ "actions": [sync(&made_up, "x", "/vm/x"), sync("b2", "x", "/vm/y")] }), ErrorClass::GenericError),
            ("transaction", json!({ "actions": [sync(&made_up, "x", "/vm/x"), sync(&made_up, "y", "/vm/y")] }), ErrorClass::GenericError),
            ("transaction", json!({ "actions": [sync(&made_up, "x", "/vm/x"), sync("none", "y", "/vm/y")] }), ErrorClass::DeviceNotFound),
            ("transaction", json!({ "actions": [sync(&made_up, "x", "/vm/x"), sync("b2", "y", "/vm/b1")] }), ErrorClass::GenericError),
            ("transaction", json!({ "actions": [{ "type": "blockdev-backup", "data": {} }] }), ErrorClass::GenericError),
        ];
        let files = world.files();
        for (command, arguments, class) in table {
            let refused = world.ask(command, arguments.clone()).await.expect_err(command);
            assert_eq!(refused.class, class, "{command} {arguments}: {}", refused.desc);
        }
        assert_eq!(world.files(), files);
        assert_eq!(nodes(&world).await, all);
        world.done("transaction", json!({ "actions": [] })).await;
        // The name that was made up is as good as any.
        let sync = json!({ "node-name": made_up, "snapshot-node-name": "a3", "snapshot-file": "/vm/a3" });
        world.done("blockdev-snapshot-sync", sync).await;
        let listed = world.done("query-named-block-nodes", json!({})).await;
        let shown = |at: usize| (listed[at]["node-name"].clone(), listed[at]["ro"].clone(), listed[at]["backing_file_depth"].clone());
        assert_eq!([shown(0), shown(1)], [(json!("a3"), json!(false), json!(3)), (json!(made_up), json!(true), json!(2))]);
        for node in listed.as_array().expect("a list") {
            assert_eq!((&node["active"], &node["image"]["dirty-flag"]), (&json!(true), &json!(false)), "{node}");
        }
        // A node that is named belongs to no device, and none may take its name.
        world.done("blockdev-add", json!({ "driver": "qcow2", "node-name": "vdc", "file": { "driver": "file", "filename": "/vm/c" } })).await;
        let add = json!({ "name": "vdc", "image": "/vm/vdc.raw", "format": "raw", "socket": "/run/vdc" });
        let refused = world.ask("device-add", add).await.expect_err("its name is taken").desc;
        assert!(refused.contains("blockdev-del"), "{refused}");
    });
}

#[test]
fn one_path_becomes_one_overlay_however_it_is_spelled() {
    let mut simulation = Simulation::new(17);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = world_with(&environment, &["vda", "vdb"]).await;
        let member = |device: &str, overlay: &str| json!({ "device": device, "overlay": overlay });
        let asked = |name: &str, members: &[Value]| json!({ "name": name, "devices": members, "create": true });
        let group = asked("s0", &[member("vda", "/vm/x.qcow2"), member("vdb", "x.qcow2")]);
        let refused = world.ask("snapshot-create", group).await.expect_err("twice").desc;
        assert_eq!(refused, "snapshot 's0' failed: the overlay /vm/x.qcow2 is named twice");
        let answers = [
            world.begin("snapshot-create", asked("s1", &[member("vda", "/vm/x.qcow2")])),
            world.begin("snapshot-create", asked("s2", &[member("vdb", "x.qcow2")])),
        ];
        let results = [answers[0].wait().await, answers[1].wait().await];
        let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).map(|failure| failure.desc.as_str()).collect();
        assert!(matches!(refused[..], [only] if only.contains("overlay /vm/x.qcow2: it exists already")), "{refused:?}");
        let (made, other) = if results[0].is_ok() { ("vda", "vdb") } else { ("vdb", "vda") };
        world.write(made, 0, 7).await;
        assert_eq!(world.layers(made).await[0], "/vm/x.qcow2");
        assert_eq!(world.layers(other).await.len(), 1);
        let world = world.restart().await;
        for device in ["vda", "vdb"] {
            world.serve(&format!("name={device},image=/vm/{device}.qcow2,format=qcow2,socket=/run/{device}")).await.expect("served");
        }
        assert_eq!(world.read(made, 1).await, [7]);
    });
}

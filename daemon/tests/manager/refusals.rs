//! Overlays that cannot be used, and preparations that fail: the snapshot is refused, the reason names the file, and nothing is left of it.

use serde_json::{Value, json};
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::simulated::{Fault, FaultEffect, OperationKind, Simulation};

use super::support::{CatalogueFile, DISK, World};

fn over(backing: &str, format: &str) -> CreateOptions {
    CreateOptions::overlay(DISK, backing, format)
}

fn of_vda(overlay: Value, create: bool) -> Value {
    json!({ "name": "s", "devices": [{ "device": "vdb" }, { "device": "vda", "overlay": overlay }], "create": create })
}

/// What may not change when a snapshot is refused.
async fn state(world: &World) -> Value {
    let mut contents = Vec::new();
    for file in world.files() {
        contents.push(json!({ "file": file, "bytes": world.environment.bytes(&file).expect("a file") }));
    }
    json!([
        contents,
        world.done("stack-show", json!({ "device": "vda" })).await,
        world.done("stack-show", json!({ "device": "vdb" })).await,
        world.done("snapshot-list", json!({})).await,
    ])
}

#[test]
fn every_wrong_overlay_is_refused_by_name_and_nothing_changes() {
    let mut simulation = Simulation::new(20);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        for device in ["vda", "vdb", "other"] {
            world.serve_new(device).await;
        }
        world.write("vda", 0, 1).await;
        world.flush("vda").await;
        world.create("/vm/small.qcow2", &CreateOptions::overlay(DISK / 2, "vda.qcow2", "qcow2")).await;
        world.create("/vm/alone.qcow2", &CreateOptions::standalone(DISK)).await;
        world.create("/vm/sibling.qcow2", &over("alone.qcow2", "qcow2")).await;
        world.create("/vm/dangling.qcow2", &over("none.qcow2", "qcow2")).await;
        world.create("/vm/lies.qcow2", &over("vda.qcow2", "raw")).await;
        world.create("/vm/escapes.qcow2", &over("/etc/shadow", "raw")).await;
        world.create("/vm/full.qcow2", &over("vda.qcow2", "qcow2")).await;
        {
            // Something was written to it once.
            let full = snapfence_image_format::storage::Location::Trusted("/vm/full.qcow2".into());
            // Its backing file is in use, so the layer is opened alone.
            let cache = snapfence_image_format::storage::CacheMode::Direct;
            let file = snapfence_image_format::chain::open_file(&environment, &full, true, cache).await.expect("there");
            let header = snapfence_image_format::qcow2::Header::read(&file).await.expect("an image");
            let opening = snapfence_image_format::qcow2::OpenOptions::writing();
            let image = snapfence_image_format::qcow2::Qcow2::open_with_header(file, header, opening).await.expect("an image");
            let layer = std::sync::Arc::new(snapfence_image_format::layer::Layer::Qcow2(image));
            let domain = snapfence_image_format::stack::FenceDomain::new(|| std::time::Duration::ZERO);
            let stack = snapfence_image_format::stack::Stack::new(environment.clone(), &domain, vec![layer], false);
            let bytes = Buffer::Owned(AlignedBuffer::copy_of(&[5; 4096]));
            let position = snapfence_image_format::units::GuestOffset::new(64 << 10);
            stack.view().write(position, bytes).await.0.expect("written");
            stack.close().await.expect("durable");
        }
        environment.put("/vm/text.qcow2", b"not an image at all");
        environment.symlink("/vm/alone.qcow2", "/vm/link.qcow2").expect("a new name");
        let table = [
            ("none.qcow2", false, "there is no such file, and it is not asked to be made"),
            ("/nowhere/o.qcow2", false, "the directory of /nowhere/o.qcow2 cannot be used: "),
            ("/nowhere/o.qcow2", true, "the directory of /nowhere/o.qcow2 cannot be used: "),
            ("/etc/o.qcow2", false, "/etc/o.qcow2 lies outside the allowed directories (/vm)"),
            ("/etc/o.qcow2", true, "/etc/o.qcow2 lies outside the allowed directories (/vm)"),
            ("small.qcow2", false, "its virtual size is 524288 bytes, and the device has 1048576"),
            (
                "alone.qcow2",
                false,
                "it names no backing file, but must name the present top: `qemu-img rebase -u -F qcow2 -b /vm/vda.qcow2 FILE`",
            ),
            ("sibling.qcow2", false, "its backing file is /vm/alone.qcow2, and must be the present top /vm/vda.qcow2 (qcow2)"),
            ("dangling.qcow2", false, "its backing file is /vm/none.qcow2, and must be the present top /vm/vda.qcow2 (qcow2)"),
            ("lies.qcow2", false, "it says that /vm/vda.qcow2 is raw, but it is qcow2"),
            ("escapes.qcow2", false, "its backing file is not opened: /etc/shadow lies outside"),
            ("full.qcow2", false, "it is not empty: it has data at "),
            ("text.qcow2", false, "the file is empty or too short for a header: 19 bytes"),
            ("link.qcow2", false, "cannot be opened for writing: "),
            ("vda.qcow2", false, "it is already a layer of device 'vda'"),
            ("other.qcow2", false, "it is already a layer of device 'other'"),
            ("alone.qcow2", true, "it exists already; choose another name, or use it as it is (without creating it)"),
        ];
        let empty = json!({ "name": "s", "devices": [{ "device": "vda", "overlay": "" }] });
        let refused = world.ask("snapshot-create", empty).await.expect_err("nothing is named").desc;
        assert_eq!(refused, "argument 'overlay' is empty");
        let before = state(&world).await;
        for (overlay, create, expected) in table {
            let refused = world.ask("snapshot-create", of_vda(json!(overlay), create)).await.expect_err(overlay).desc;
            let path = if overlay.starts_with('/') { overlay.to_owned() } else { format!("/vm/{overlay}") };
            let start = "snapshot 's' failed: device 'vda': ";
            let whole = [format!("{start}overlay {path}: {expected}"), format!("{start}{expected}")];
            assert!(whole.iter().any(|whole| refused.starts_with(whole)), "{overlay}: {refused}");
            assert_eq!(state(&world).await, before, "{overlay}");
        }
        let jobs = world.done("query-jobs", json!({})).await;
        let all = jobs.as_array().expect("a list");
        assert!(all.iter().all(|job| job["status"] == "concluded" && job["error"].is_string()), "{jobs}");
        // Nothing is held after a refusal: what was wrong is set right, and used.
        assert_eq!(world.snapshot("s", &["vda", "vdb", "other"]).await["state"], "frozen");
    });
}

#[test]
fn no_overlay_is_made_where_only_memory_keeps_it_and_no_neighbour_of_a_disk_is_opened() {
    let mut simulation = Simulation::new(25);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        for disk in ["/dev/sda", "/dev/sdb"] {
            environment.put(disk, &vec![7; 1 << 20]);
        }
        world.serve("name=vda,image=/dev/sdb,format=raw,socket=/run/vda").await.expect("served");
        let refused = world.ask("snapshot-create", json!({ "name": "s", "devices": [{ "device": "vda" }] })).await.expect_err("no place");
        assert!(refused.desc.ends_with("its top /dev/sdb is a block device, beside which no overlay is made; give the overlay's path"));
        let asked = |path: &str| json!({ "name": "s", "devices": [{ "device": "vda", "overlay": path }], "create": true });
        let refused = world.ask("snapshot-create", asked("/dev/o.qcow2")).await.expect_err("in memory").desc;
        assert!(refused.ends_with("/dev is for device nodes and kept in memory; give a path on a disk"), "{refused}");
        let refused = world.ask("snapshot-create", asked("/vm/o.qcow2")).await.expect_err("outside").desc;
        assert!(refused.contains("/vm/o.qcow2 lies outside the allowed directories (the file /dev/sdb)"), "{refused}");
        assert_eq!(world.files(), ["/dev/sda", "/dev/sdb"]);
        world.done("device-remove", json!({ "name": "vda" })).await;

        let world = World::start(environment.clone(), world.catalogue.after_power_cut(), &["/vm"]);
        world.serve("name=vda,image=/dev/sdb,format=raw,socket=/run/vda").await.expect("served");
        world.done("snapshot-create", asked("/vm/o.qcow2")).await;
        assert_eq!(world.settled("s").await["state"], "frozen");
        world.manager.stop().await.expect("everything is durable");
        // The overlay is found again on the disk that it was made on; on another disk of the host it is not put.
        let world = World::start(environment.clone(), world.catalogue.after_power_cut(), &["/vm"]);
        world.serve("name=vda,image=/dev/sdb,format=raw,socket=/run/vda").await.expect("served");
        assert_eq!(world.layers("vda").await, ["/vm/o.qcow2", "/dev/sdb"]);
        world.done("device-remove", json!({ "name": "vda" })).await;
        world.create("/vm/spy.qcow2", &over("/dev/sda", "raw")).await;
        let spy = "name=spy,image=/vm/spy.qcow2,format=qcow2,socket=/run/spy";
        let refused = world.serve(spy).await.expect_err("outside").to_string();
        assert!(refused.contains("its backing file is not opened: /dev/sda lies outside"), "{refused}");
    });
}

#[test]
fn a_name_stands_for_one_snapshot_under_way_or_recorded() {
    let mut simulation = Simulation::new(27);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        for device in ["vda", "vdb"] {
            world.serve_new(device).await;
        }
        let of = |device: &str| json!({ "name": "s", "devices": [{ "device": device }] });
        let first = world.begin("snapshot-create", of("vda"));
        let refused = world.ask("snapshot-create", of("vdb")).await.expect_err("one of that name is under way").desc;
        assert!(refused.contains("there already is a snapshot 's'"), "{refused}");
        assert!(!first.is_there(), "it is under way still");
        first.wait().await.expect("the first comes to its end");
        for device in ["vda", "vdb"] {
            let refused = world.ask("snapshot-create", of(device)).await.expect_err("one of that name is recorded").desc;
            assert!(refused.contains("there already is a snapshot 's'"), "{refused}");
        }
        assert_eq!(world.layers("vdb").await, ["/vm/vdb.qcow2"]);
    });
}

#[test]
fn a_layer_that_others_need_is_no_overlay() {
    let mut simulation = Simulation::new(21);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.serve_new("vda").await;
        // A clone of the disk has an empty layer above it, and a layer above that: taken for an overlay, the clone would change.
        world.create("/vm/clone.qcow2", &over("vda.qcow2", "qcow2")).await;
        world.done("device-remove", json!({ "name": "vda" })).await;
        world.serve("name=clone,image=/vm/clone.qcow2,format=qcow2,socket=/run/clone").await.expect("served");
        world.snapshot("s1", &["clone"]).await;
        world.done("device-remove", json!({ "name": "clone" })).await;
        // The disk itself is protected by now, but for an operator who insists.
        world.manager.catalogue().run(|store| store.forget_device("clone")).await.expect("a catalogue");
        world.serve("name=vda,image=/vm/vda.qcow2,format=qcow2,socket=/run/vda").await.expect("served");
        let record = snapfenced::catalogue::DeviceRecord {
            name: "clone".to_owned(),
            layers: ["/vm/vda.qcow2", "/vm/clone.qcow2", "/vm/clone.s1.qcow2"]
                .map(|path| snapfenced::catalogue::LayerRecord { path: path.into(), format: Format::Qcow2 })
                .to_vec(),
        };
        world.manager.catalogue().run(move |store| store.put_device(&record)).await.expect("a catalogue");
        let asked = json!({ "name": "s2", "devices": [{ "device": "vda", "overlay": "clone.qcow2" }] });
        let refused = world.ask("snapshot-create", asked).await.expect_err("needed").desc;
        assert!(refused.ends_with("it must not be written to: device `clone` depends on it as a backing file"), "{refused}");
    });
}

#[test]
fn whatever_fails_while_preparing_leaves_no_file() {
    let kinds = [OperationKind::Create, OperationKind::Write, OperationKind::Flush, OperationKind::Rename, OperationKind::FlushDirectory];
    for kind in kinds {
        for effect in [libc::EIO, libc::ENOSPC, libc::EDQUOT].map(FaultEffect::Error) {
            for after in 0..4 {
                let mut simulation = Simulation::new(22);
                let environment = simulation.environment().clone();
                let refused = simulation.block_on(async move {
                    let world = World::new(&environment);
                    for device in ["vda", "vdb"] {
                        world.serve_new(device).await;
                    }
                    let before = state(&world).await;
                    environment.inject(Fault::once(kind, after).with(effect));
                    let devices = json!([{ "device": "vda" }, { "device": "vdb" }]);
                    let answer = world.ask("snapshot-create", json!({ "name": "s", "devices": devices })).await;
                    environment.clear_faults();
                    let Err(refused) = answer else { return false };
                    assert!(refused.desc.contains(".s.qcow2: "), "{kind:?} {after}: {}", refused.desc);
                    assert_eq!(state(&world).await, before, "{kind:?} {after}: {}", refused.desc);
                    world.snapshot("s", &["vda", "vdb"]).await;
                    true
                });
                // A flush of the directory is for both.
                let often = if kind == OperationKind::FlushDirectory { 1 } else { 2 };
                assert!(refused || after >= often, "{kind:?} {after}: nothing failed");
            }
        }
    }
}

#[test]
fn each_directory_of_a_group_is_flushed_once_and_if_one_fails_nothing_is_left() {
    let mut simulation = Simulation::new(24);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::start(environment.clone(), CatalogueFile::default(), &["/vm", "/far"]);
        for device in ["vda", "vdb"] {
            world.serve_new(device).await;
        }
        let far = "/far/vdc.qcow2";
        world.create(far, &CreateOptions::standalone(DISK)).await;
        world.serve(&format!("name=vdc,image={far},format=qcow2,socket=/run/vdc")).await.expect("served");
        let flushes = || environment.counts().get(&OperationKind::FlushDirectory).copied().unwrap_or(0);
        let before = flushes();
        world.snapshot("one", &["vda", "vdb"]).await;
        assert_eq!(flushes() - before, 1);
        let before = flushes();
        world.snapshot("two", &["vda", "vdb", "vdc"]).await;
        assert_eq!(flushes() - before, 2);
        let before = state(&world).await;
        for after in 0..2 {
            environment.inject(Fault::once(OperationKind::FlushDirectory, after));
            let devices = json!([{ "device": "vda" }, { "device": "vdb" }, { "device": "vdc" }]);
            let refused = world.ask("snapshot-create", json!({ "name": "s", "devices": devices })).await.expect_err("a failed flush").desc;
            assert!(refused.contains(".s.qcow2: cannot flush the directory: "), "{refused}");
            assert_eq!(state(&world).await, before, "{refused}");
        }
        world.snapshot("s", &["vda", "vdb", "vdc"]).await;
    });
}

#[test]
fn a_catalogue_that_cannot_be_written_stops_snapshots_before_the_switch() {
    let mut simulation = Simulation::new(23);
    let environment = simulation.environment().clone();
    simulation.block_on(async move {
        let world = World::new(&environment);
        world.serve_new("vda").await;
        world.write("vda", 0, 1).await;
        world.catalogue.break_down();
        let asked = json!({ "name": "s", "devices": [{ "device": "vda" }] });
        let refused = world.ask("snapshot-create", asked).await.expect_err("no record").desc;
        assert!(refused.starts_with("snapshot 's' failed: the catalogue cannot be "), "{refused}");
        assert_eq!(world.layers("vda").await, ["/vm/vda.qcow2"]);
        world.write("vda", 0, 2).await;
        world.flush("vda").await;
    });
}

#[test]
fn a_snapshot_that_the_catalogue_did_not_conclude_has_failed_for_everybody() {
    for adopted in [false, true] {
        let mut simulation = Simulation::new(26);
        let environment = simulation.environment().clone();
        simulation.block_on(async move {
            let world = World::new(&environment);
            for device in ["vda", "vdb"] {
                world.serve_new(device).await;
            }
            world.write("vda", 0, 1).await;
            let asked = json!({ "name": "s", "devices": [{ "device": "vda" }], "deadline-ms": 10_000 });
            if adopted {
                environment.inject(Fault::once(OperationKind::Flush, 0).on("/vm/vda.qcow2").with(FaultEffect::Hang));
                world.done("snapshot-create", asked).await;
                world.pause().await;
                world.catalogue.break_down();
                environment.release_hung();
            } else {
                world.occupy("vda");
                let answer = world.begin("snapshot-create", asked);
                world.switching("vda").await;
                world.catalogue.break_down();
                world.park("vda");
                answer.wait().await.expect("it has switched");
            }
            let failed = world.settled("s").await;
            assert!(failed["error"].as_str().expect("a reason").starts_with("the catalogue cannot be "), "{failed}");
            world.concluded("job1").await;
            assert_eq!(world.done("snapshot-show", json!({ "name": "s" })).await["state"], "failed");
            assert_eq!(world.layers("vda").await.len(), 2);
            world.catalogue.heal();
            // Whatever the catalogue had: in the end it says what the client was told.
            assert_eq!(world.snapshot("t", &["vda", "vdb"]).await["state"], "frozen", "the catalogue works again");
            world
                .until("the catalogue agrees", async || {
                    let found = world.manager.catalogue().run(|store| Ok((store.snapshot("s")?, store.device("vda")?))).await;
                    let (snapshot, device) = found.expect("readable");
                    let state = snapshot.expect("recorded").state;
                    assert_eq!(world.done("snapshot-list", json!({})).await[0]["state"], "failed", "{state:?}");
                    assert_eq!(device.expect("recorded").top().expect("a layer").path, std::path::Path::new("/vm/vda.t.qcow2"));
                    state == snapfenced::catalogue::SnapshotState::Failed
                })
                .await;
            let world = world.restart().await;
            world.serve("name=vda,image=/vm/vda.qcow2,format=qcow2,socket=/run/vda").await.expect("served");
            assert_eq!(world.layers("vda").await, ["/vm/vda.t.qcow2", "/vm/vda.s.qcow2", "/vm/vda.qcow2"]);
        });
    }
}

#[test]
fn an_intent_that_may_have_been_recorded_does_not_keep_the_device_from_starting() {
    let mut depths = std::collections::BTreeSet::new();
    for syncs in [None, Some(0), Some(1), Some(2)] {
        let mut simulation = Simulation::new(24);
        let environment = simulation.environment().clone();
        let depth = simulation.block_on(async move {
            let world = World::new(&environment);
            world.serve_new("vda").await;
            match syncs {
                Some(syncs) => world.catalogue.break_down_after(syncs),
                None => world.catalogue.break_down(),
            }
            let asked = json!({ "name": "s", "devices": [{ "device": "vda" }] });
            if world.ask("snapshot-create", asked).await.is_ok() {
                return None;
            }
            world.write("vda", 0, 2).await;
            world.flush("vda").await;
            let world = world.restart().await;
            world.serve("name=vda,image=/vm/vda.qcow2,format=qcow2,socket=/run/vda").await.expect("served");
            assert_eq!(world.read("vda", 1).await, [2]);
            assert_eq!(world.snapshot("t", &["vda"]).await["state"], "frozen");
            Some(world.layers("vda").await.len())
        });
        depths.extend(depth);
    }
    assert_eq!(depths, [2, 3].into(), "of the failed commits some were there and some were not");
}

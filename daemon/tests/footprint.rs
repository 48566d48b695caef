//! What an idle daemon costs. Time to readiness is printed, for people.

mod common;

use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, IN, Machine, OUT};
use common::make_qcow2;
use snapfence::protocol::{SnapshotCreate, SnapshotMember, SnapshotShow, SnapshotState};
use snapfence_image_format::qcow2::CreateOptions;

#[test]
fn one_idle_device_takes_less_than_two_mebibytes_beside_its_program() {
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.qcow2"), directory.path().join("vda.sock"));
    make_qcow2(&image, CreateOptions::standalone(1 << 40));
    let device = format!("name=vda,image={},format=qcow2,socket={},queues=4", image.display(), socket.display());
    let began = Instant::now();
    let daemon = Daemon::start(directory.path(), &[device]);
    println!("answers after {:?}", began.elapsed());
    let idle = daemon.resident();
    let own = daemon.resident_of_its_own();
    println!("{} KiB resident, {} of them its own, {} threads", idle >> 10, own >> 10, daemon.threads());
    assert!(own < 2 << 20, "{own} bytes resident beside the program");
    let mut machine = Machine::new(4);
    let link = machine.connect(&socket);
    for queue in &mut machine.queues {
        assert_eq!(queue.request(IN, 0, Data::In(4096)).status, 0);
    }
    println!("{} KiB resident with a front-end", daemon.resident() >> 10);
    drop(link);
    daemon.stop();
}

#[test]
fn a_frozen_layer_takes_little_memory() {
    const LAYERS: u64 = 100;
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.qcow2"), directory.path().join("vda.sock"));
    make_qcow2(&image, CreateOptions::standalone(1 << 30));
    let device = format!("name=vda,image={},format=qcow2,socket={}", image.display(), socket.display());
    let daemon = Daemon::start(directory.path(), &[device]);
    let mut machine = Machine::new(1);
    let link = machine.connect(&socket);
    let mut client = daemon.client();
    let mut snapshots = |names: std::ops::Range<u64>| {
        for number in names {
            assert_eq!(machine.queues[0].request(OUT, number * 8 % 256, Data::Out(&[1; 4096])).status, 0);
            let name = format!("s{number}");
            let devices = vec![SnapshotMember { device: "vda".into(), overlay: None, format: None }];
            client
                .call(&SnapshotCreate { name: name.clone(), devices, create: false, deadline_ms: None, job_id: None })
                .expect("a snapshot");
            let wanted = SnapshotShow { name };
            while client.call(&wanted).expect("it is known").state != SnapshotState::Frozen {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    // What is needed once.
    snapshots(0..LAYERS / 2);
    let before = daemon.resident();
    snapshots(LAYERS / 2..LAYERS / 2 + LAYERS);
    let each = daemon.resident().saturating_sub(before) / LAYERS;
    println!("{each} bytes for each layer");
    assert!(each < 48 << 10, "{each} bytes resident for each frozen layer");
    drop(link);
    daemon.stop();
}

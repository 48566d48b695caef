//! What an idle daemon costs. Time to readiness is printed, for people.

mod common;

use std::time::Instant;

use common::daemon::Daemon;
use common::machine::{Data, IN, Machine};
use common::make_qcow2;
use snapfence_image_format::qcow2::CreateOptions;

#[test]
fn one_idle_device_takes_less_than_ten_mebibytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.qcow2"), directory.path().join("vda.sock"));
    make_qcow2(&image, CreateOptions::standalone(1 << 40));
    let device = format!("name=vda,image={},format=qcow2,socket={},queues=4", image.display(), socket.display());
    let began = Instant::now();
    let daemon = Daemon::start(directory.path(), &[device]);
    println!("answers after {:?}", began.elapsed());
    let idle = daemon.resident();
    println!("{} KiB resident, {} threads", idle >> 10, daemon.threads());
    assert!(idle < 10 << 20, "{idle} bytes resident");
    let mut machine = Machine::new(4);
    let link = machine.connect(&socket);
    for queue in &mut machine.queues {
        assert_eq!(queue.request(IN, 0, Data::In(4096)).status, 0);
    }
    println!("{} KiB resident with a front-end", daemon.resident() >> 10);
    drop(link);
    daemon.stop();
}

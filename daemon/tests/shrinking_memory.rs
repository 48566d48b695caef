//! A front-end whose memory is less than it says, or becomes less: its own disk suffers, and nothing else.

mod common;

use std::os::fd::{AsFd, AsRawFd};

use common::daemon::Daemon;
use common::machine::{Data, IN, Link, Machine, OUT, SLOT_DATA};
use common::{SharedMemory, make_qcow2};
use snapfence_image_format::qcow2::CreateOptions;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const DISK_BYTES: u64 = 16 << 20;

/// A daemon with two disks, and where to reach them.
fn daemon(directory: &std::path::Path) -> (Daemon, [std::path::PathBuf; 2]) {
    let sockets = ["vda", "vdb"].map(|name| directory.join(format!("{name}.sock")));
    let device = |name: &str, socket: &std::path::Path| {
        let image = directory.join(format!("{name}.qcow2"));
        make_qcow2(&image, CreateOptions::standalone(DISK_BYTES));
        format!("name={name},image={},format=qcow2,socket={},queues=2", image.display(), socket.display())
    };
    let devices = [device("vda", &sockets[0]), device("vdb", &sockets[1])];
    (Daemon::start(directory, &devices), sockets)
}

fn assert_serves(machine: &mut Machine) {
    for queue in &mut machine.queues {
        assert_eq!(queue.request(OUT, 8, Data::Out(&[7; 4096])).status, 0);
        assert_eq!(queue.request(IN, 8, Data::In(4096)).status, 0);
        assert_eq!(queue.data(0, 4096), [7; 4096]);
    }
}

#[test]
fn memory_that_shrinks_under_requests_costs_its_owner_only() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut daemon, [socket, other_socket]) = daemon(directory.path());
    let mut other = Machine::new(2);
    let _other_link = other.connect(&other_socket);
    for round in 1..=5_usize {
        let mut machine = Machine::new(2);
        let link = machine.connect(&socket);
        assert_serves(&mut machine);
        for queue in &mut machine.queues {
            for slot in 0..32 {
                queue.submit(
                    slot,
                    if slot % 2 == 0 { IN } else { OUT },
                    slot as u64 * 128,
                    match slot % 2 {
                        0 => Data::In(SLOT_DATA),
                        _ => Data::Out(&[1; SLOT_DATA]),
                    },
                );
            }
        }
        machine.queues.iter().for_each(common::machine::Queue::kick);
        rustix::fs::ftruncate(&machine.memory.file, 0).expect("no seals");
        machine.queues.iter().for_each(common::machine::Queue::kick);
        daemon.wait_until("both queues to be given up", |daemon| daemon.log().matches("guest memory was taken away").count() >= 2 * round);
        assert_serves(&mut other);
        drop(link);
    }
    // The next guest finds the disk as ever.
    let mut machine = Machine::new(2);
    let _link = machine.connect(&socket);
    assert_serves(&mut machine);
    assert_serves(&mut other);
    drop((_link, _other_link));
    daemon.stop();
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut daemon, [socket, other_socket]) = daemon(directory.path());
    let mut other = Machine::new(2);
    let _other_link = other.connect(&other_socket);
    // A region past the end of its file.
    let memory = SharedMemory::new(1 << 20);
    let link = Link::new(&socket, 1);
    link.frontend.set_features(link.offered).expect("an answer");
    rustix::fs::ftruncate(&memory.file, 4096).expect("no seals");
    assert!(link.frontend.set_mem_table(&[common::machine::region(&memory)]).is_err());
    daemon.wait_until("the reason", |daemon| daemon.log().contains("1048576 bytes at 0 are asked for, and the file has 4096"));
    // A record of requests in flight in such a file.
    let mut link = Link::new(&socket, 1);
    let record = VhostUserInflight::new(1 << 20, 0, 2, 256);
    assert!(link.frontend.set_inflight_fd(&record, memory.file.as_fd().as_raw_fd()).is_err());
    daemon.wait_until("the reason", |daemon| daemon.log().contains("record of requests in flight cannot be mapped"));
    // Records for queues that there are not.
    for (queues, size) in [(0, 256), (3, 256), (1, 0), (1, 2048)] {
        let mut link = Link::new(&socket, 1);
        assert!(link.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size)).is_err());
    }
    assert_serves(&mut other);
    drop(_other_link);
    daemon.stop();
}

//! A file system that is really full, beneath the daemon as a process of its own: writes that need space wait and are told of, everything else goes
//! on, a snapshot is refused and leaves nothing behind, a front-end may go and come back meanwhile; and with space again, all is as was written.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Machine, OUT};
use common::{PATIENCE, check_clean, make_ext4, make_qcow2, read_by_qemu};
use serde_json::json;
use snapfence::client::Client;
use snapfence::protocol::{
    BlockDeviceIoStatus, BlockErrorAction, BlockIoError, DeviceList, DeviceResume, Event, IoOperationType, QueryNamedBlockNodes, StackShow,
};
use snapfence_image_format::qcow2::CreateOptions;

const FILE_SYSTEM_BYTES: u64 = 32 << 20;
const DISK_BYTES: u64 = 64 << 20;
/// What is removed to make space.
const BALLAST_BYTES: usize = 8 << 20;
const CLUSTER: usize = 64 << 10;
/// Slots of requests that wait; slot 0 is for others.
const WAITING: std::ops::Range<usize> = 1..9;

/// A small ext4.
struct FileSystem(PathBuf);

impl FileSystem {
    /// One on a new file, if this process may mount it.
    fn new(directory: &Path) -> Option<Self> {
        let place = directory.join("small");
        std::fs::create_dir(&place).expect("a directory");
        let file = make_ext4(directory, FILE_SYSTEM_BYTES);
        match Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&place).output() {
            Ok(output) if output.status.success() => Some(Self(place)),
            other => {
                skip::skipped(format_args!("no file system can be mounted: {other:?}"));
                None
            }
        }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{} stays behind", self.0.display());
    }
}

fn io_status(client: &mut Client) -> Vec<BlockDeviceIoStatus> {
    client.call(&DeviceList {}).expect("an answer").iter().map(|device| device.io_status).collect()
}

/// The next event about requests, if one comes in time.
fn shortage(client: &mut Client, within: Duration) -> Option<BlockIoError> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let received = client.next_event(Some(left)).expect("a control socket")?;
        if let Some(Event::BlockIoError(error)) = received.event() {
            return Some(error);
        }
    }
}

fn write(machine: &mut Machine, slot: usize, cluster: usize, byte: u8) {
    machine.queues[0].submit(slot, OUT, (cluster * CLUSTER / 512) as u64, Data::Out(&[byte; CLUSTER]));
    machine.queues[0].kick();
}

#[test]
fn a_full_file_system_makes_writes_wait_and_loses_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let Some(small) = FileSystem::new(directory.path()) else { return };
    let ballast = small.0.join("ballast");
    std::fs::write(&ballast, vec![1; BALLAST_BYTES]).expect("space");
    let (image, socket) = (small.0.join("vda.qcow2"), directory.path().join("vda.sock"));
    let (other, other_socket) = (directory.path().join("vdb.qcow2"), directory.path().join("vdb.sock"));
    make_qcow2(&image, CreateOptions::standalone(DISK_BYTES));
    make_qcow2(&other, CreateOptions::standalone(DISK_BYTES));
    let device =
        |name, image: &Path, socket: &Path| format!("name={name},image={},format=qcow2,socket={}", image.display(), socket.display());
    let daemon = Daemon::start(directory.path(), &[device("vda", &image, &socket), device("vdb", &other, &other_socket)]);
    let mut client = daemon.client();
    let (mut machine, mut other_machine) = (Machine::new(1), Machine::new(1));
    // The guest writes to a layer whose node has a name of its own.
    let top = small.0.join("top.qcow2");
    let cut = json!({ "device": "vda", "snapshot-node-name": "top", "snapshot-file": &top });
    client.execute("blockdev-snapshot-sync", cut).expect("a new layer");
    let link = machine.connect(&socket);
    let _other_link = other_machine.connect(&other_socket);

    // Until one waits, which is told, and is not to be taken for one that is slow.
    let mut model = vec![0_u8; DISK_BYTES as usize / CLUSTER];
    let mut clusters = 0;
    let told = 'full: loop {
        let byte = clusters as u8 | 1;
        assert!(clusters < model.len(), "the file system is never full");
        write(&mut machine, WAITING.start, clusters, byte);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = machine.queues[0].completed().first() {
                assert_eq!(done.status, 0);
                model[clusters] = byte;
                clusters += 1;
                break;
            }
            if let Some(error) = shortage(&mut client, Duration::from_micros(100)) {
                break 'full error;
            }
            assert!(Instant::now() < deadline, "a write is neither done nor told to wait");
        }
    };
    assert!(clusters > 100, "{clusters} clusters fit");
    let BlockIoError { device, node_name, operation, action, nospace, reason } = told;
    assert_eq!((device.as_str(), operation, action, nospace), ("vda", IoOperationType::Write, BlockErrorAction::Stop, true), "{reason}");
    let nodes = client.call(&QueryNamedBlockNodes { flat: None }).expect("an answer");
    let named: Vec<_> = nodes.iter().filter(|node| node.node_name == node_name).map(|node| Path::new(&node.file)).collect();
    assert_eq!((node_name.as_str(), named), ("top", vec![top.as_path()]));
    let waiting: Vec<_> = WAITING.map(|slot| (slot, clusters + slot - WAITING.start)).collect();
    for &(slot, cluster) in &waiting[1..] {
        write(&mut machine, slot, cluster, cluster as u8 | 1);
    }

    // Everything else goes on.
    assert_eq!(io_status(&mut client), [BlockDeviceIoStatus::Nospace, BlockDeviceIoStatus::Ok]);
    let queue = &mut machine.queues[0];
    assert_eq!(queue.request(OUT, 0, Data::Out(&[9; CLUSTER])).status, 0);
    model[0] = 9;
    assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
    assert_eq!(queue.request(IN, 0, Data::In(CLUSTER)).status, 0);
    assert_eq!(queue.data(0, CLUSTER), [9; CLUSTER]);
    assert_eq!(other_machine.queues[0].request(OUT, 0, Data::Out(&[5; CLUSTER])).status, 0);
    assert_eq!(other_machine.queues[0].request(FLUSH, 0, Data::None).status, 0);

    // A snapshot is refused before anything has changed.
    let members = json!([{ "device": "vdb" }, { "device": "vda" }]);
    let refused = client.execute("snapshot-create", json!({ "name": "s", "devices": members })).expect_err("no space").to_string();
    assert!(refused.contains("vda") && refused.contains(&small.0.display().to_string()), "{refused}");
    for (name, layers) in [("vda", 2), ("vdb", 1)] {
        assert_eq!(client.call(&StackShow { device: name.into() }).expect("a stack").layers.len(), layers);
    }
    let left =
        |place: &Path| std::fs::read_dir(place).expect("a directory").filter_map(Result::ok).map(|entry| entry.file_name()).collect();
    let mut left: Vec<std::ffi::OsString> = left(&small.0);
    left.sort();
    assert_eq!(left, ["ballast", "lost+found", "top.qcow2", "vda.qcow2"], "nothing is left of it");

    // The front-end goes, and finds them in its record when it comes back.
    drop(link);
    let _link = machine.connect(&socket);
    let again = shortage(&mut client, PATIENCE).expect("they are served again, and wait again");
    assert_eq!(again.device, "vda");
    client.call(&DeviceResume { name: "vda".into() }).expect("an answer");
    shortage(&mut client, PATIENCE).expect("there still is no space, which is told");
    assert_eq!(machine.queues[0].completed(), [], "none has been given up");

    std::fs::remove_file(&ballast).expect("a file");
    client.call(&DeviceResume { name: "vda".into() }).expect("an answer");
    for done in machine.queues[0].wait(waiting.len()) {
        assert_eq!(done.status, 0, "slot {}", done.slot);
    }
    for &(_, cluster) in &waiting {
        model[cluster] = cluster as u8 | 1;
    }
    let deadline = Instant::now() + PATIENCE;
    while io_status(&mut client) != [BlockDeviceIoStatus::Ok; 2] {
        assert!(Instant::now() < deadline, "nothing waits any more, and that is not seen");
    }
    assert_eq!(machine.queues[0].request(FLUSH, 0, Data::None).status, 0);
    for (cluster, &byte) in model.iter().enumerate() {
        assert_eq!(machine.queues[0].request(IN, (cluster * CLUSTER / 512) as u64, Data::In(CLUSTER)).status, 0);
        assert!(machine.queues[0].data(0, CLUSTER) == [byte; CLUSTER], "cluster {cluster}");
    }
    drop(client);
    daemon.stop();

    check_clean(&image);
    check_clean(&top);
    let bytes = read_by_qemu(&top, directory.path());
    for (cluster, &byte) in model.iter().enumerate() {
        assert!(bytes[cluster * CLUSTER..][..CLUSTER].iter().all(|found| *found == byte), "QEMU reads something else in cluster {cluster}");
    }
}

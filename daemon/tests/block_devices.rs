//! qcow2 images on block devices, the daemon beneath a virtual machine's queues: the image lies on one loop device, a snapshot puts the overlay that
//! QEMU has made on another over it, and QEMU reads from both what was written.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::daemon::Daemon;
use common::machine::{DISCARD, Data, FLUSH, IN, Machine, OUT, range};
use common::seed;
use serde_json::json;
use snapfence_image_format::storage::Chance;

const DISK_BYTES: usize = 8 << 20;
/// More than the disk: tables and counts need room as well.
const DEVICE_BYTES: u64 = 16 << 20;
const UNIT: usize = 4096;
const WRITES: usize = 300;

struct LoopDevice(PathBuf);

impl LoopDevice {
    /// A device over a new file, if this process may make one.
    fn new(directory: &Path, name: &str) -> Option<Self> {
        let file = directory.join(name);
        std::fs::File::create(&file).and_then(|file| file.set_len(DEVICE_BYTES)).expect("a file");
        match Command::new("losetup").args(["--show", "--find"]).arg(&file).output() {
            Ok(output) if output.status.success() => Some(Self(String::from_utf8(output.stdout).expect("a readable name").trim().into())),
            other => {
                skip::skipped(format_args!("no loop device to be had: {other:?}"));
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()), "the loop device {} stays behind", self.0.display());
    }
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img").args(arguments).args(paths).output().expect("qemu-img");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
}

/// Writes and discards at random, keeps to it in `model`, and reads the whole disk back.
fn work(machine: &mut Machine, model: &mut [u8], chance: &mut Chance) {
    let queue = &mut machine.queues[0];
    for _ in 0..WRITES {
        let unit = if chance.happens(1, 2) { 512 } else { UNIT };
        let len = unit * (1 + chance.index(8));
        let at = chance.index((DISK_BYTES - len) / unit) * unit;
        if chance.happens(1, 10) {
            let (at, len) = (at & !(UNIT - 1), UNIT * 16);
            let len = len.min(DISK_BYTES - at);
            assert_eq!(queue.request(DISCARD, 0, Data::Out(&range(at as u64 / 512, len as u32 / 512, 0))).status, 0);
            // What is discarded may be anything: make it something.
            let zeros = vec![0; len];
            assert_eq!(queue.request(OUT, at as u64 / 512, Data::Out(&zeros)).status, 0);
            model[at..at + len].fill(0);
            continue;
        }
        let bytes = vec![chance.below(256) as u8; len];
        assert_eq!(queue.request(OUT, at as u64 / 512, Data::Out(&bytes)).status, 0);
        model[at..at + len].copy_from_slice(&bytes);
    }
    assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
    for (number, expected) in model.chunks_exact(64 << 10).enumerate() {
        assert_eq!(queue.request(IN, number as u64 * 128, Data::In(expected.len())).status, 0);
        assert!(queue.data(0, expected.len()) == expected, "the disk at {number} times 64 KiB");
    }
}

#[test]
fn qcow2_images_on_block_devices_are_served_and_snapshotted() {
    let mut chance = Chance::new(seed());
    let directory = tempfile::tempdir().expect("a directory");
    let Some(base) = LoopDevice::new(directory.path(), "base") else { return };
    let Some(overlay) = LoopDevice::new(directory.path(), "overlay") else { return };
    qemu_img(&["create", "-q", "-f", "qcow2"], &[&base.0, Path::new(&DISK_BYTES.to_string())]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[&base.0, &overlay.0]);
    let socket = directory.path().join("vda.sock");
    let daemon = Daemon::start_with(
        directory.path(),
        &[format!("name=vda,image={},format=qcow2,socket={}", base.0.display(), socket.display())],
        // A device is allowed by itself only.
        &["--allow-dir".as_ref(), "/dev".as_ref()],
    );
    let mut machine = Machine::new(1);
    let link = machine.connect(&socket);

    let mut model = vec![0; DISK_BYTES];
    work(&mut machine, &mut model, &mut chance);
    let before = model.clone();
    let mut client = daemon.client();
    let members = json!([{ "device": "vda", "overlay": overlay.0 }]);
    client.execute("snapshot-create", json!({ "name": "s", "devices": members })).expect("a snapshot");
    while client.next_event(Some(common::PATIENCE)).expect("a control socket").expect("it is frozen some time").name != "SNAPSHOT_FROZEN" {}
    work(&mut machine, &mut model, &mut chance);
    drop(client);
    drop(link);
    daemon.stop();

    let expected = directory.path().join("expected.raw");
    for (device, contents) in [(&base, &before), (&overlay, &model)] {
        qemu_img(&["check", "-q", "-f", "qcow2"], &[&device.0]);
        std::fs::write(&expected, contents).expect("a file");
        qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[&expected, &device.0]);
    }
}

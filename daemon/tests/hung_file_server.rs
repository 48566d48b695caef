//! A file server that stands still beneath one device of a daemon that runs as a process of its own: other devices, their snapshots and the control
//! socket do not notice, whatever asks for the device's files is answered all the same, and when the server goes on, so does the device.
//!
//! All queues share one thread, which is the hardest case.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Link, Machine, OUT};
use common::{PATIENCE, check_clean, make_ext4, make_qcow2};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::CpuSet;
use serde_json::{Value, json};
use snapfence::client::Client;
use snapfence_image_format::qcow2::CreateOptions;

const FILE_SYSTEM_BYTES: u64 = 64 << 20;
const DISK_BYTES: u64 = 32 << 20;
const CLUSTER: usize = 64 << 10;
/// Slots of requests that hang: more than the kernel has workers for by itself, on few processors. Slot 0 is for others.
const HANGING: std::ops::Range<usize> = 1..33;

/// A small ext4 whose server is a process that can be stopped and go on.
struct FileServer {
    place: PathBuf,
    process: Child,
}

impl FileServer {
    /// One on a new file, if this process may mount it.
    fn new(directory: &Path) -> Option<Self> {
        let place = directory.join("served");
        std::fs::create_dir(&place).expect("a directory");
        let file = make_ext4(directory, FILE_SYSTEM_BYTES);
        let log = std::fs::File::create(directory.join("file server's log")).expect("a log");
        let process = Command::new("fuse2fs").args(["-f", "-o", "fakeroot"]).args([&file, &place]).stdin(Stdio::null()).stderr(log).spawn();
        let mut server = Self { place, process: process.expect("fuse2fs") };
        let deadline = Instant::now() + PATIENCE;
        while !server.is_mounted() {
            if let Some(status) = server.process.try_wait().expect("a child") {
                skip::skipped(format_args!("fuse2fs cannot mount: {status}"));
                return None;
            }
            assert!(Instant::now() < deadline, "fuse2fs does not mount");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        mounts.contains(self.place.to_str().expect("a plain name"))
    }

    /// Stops all of its threads: what one of them has taken from the kernel before it stops cannot even be killed.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + PATIENCE;
        let tasks = format!("/proc/{}/task", self.process.id());
        let has_stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.expect("a thread").path().join("stat")).expect("a living thread");
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        while !std::fs::read_dir(&tasks).expect("threads").all(has_stopped) {
            assert!(Instant::now() < deadline, "the server does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("a living process");
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        self.signal(Signal::TERM);
        assert!(self.process.wait().is_ok_and(|status| status.success()), "{} stays behind", self.place.display());
    }
}

/// A device on a sound disk and one on the file server's, and their guests.
struct Setting {
    server: FileServer,
    daemon: Daemon,
    sound: Machine,
    hung: Machine,
    _sound_link: Link,
    hung_link: Link,
    images: [PathBuf; 2],
    // Removed last.
    directory: tempfile::TempDir,
}

impl Setting {
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let server = FileServer::new(directory.path())?;
        // The daemon has as many queue threads as it may use processors.
        let mut one = CpuSet::new();
        let all = rustix::thread::sched_getaffinity(None).expect("processors");
        one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).expect("a processor"));
        rustix::thread::sched_setaffinity(None, &one).expect("one of ours");
        let images = [directory.path().join("sound.qcow2"), server.place.join("hung.qcow2")];
        let device = |name: &str, image: &Path| {
            make_qcow2(image, CreateOptions::standalone(DISK_BYTES));
            format!("name={name},image={},format=qcow2,socket={}", image.display(), directory.path().join(name).display())
        };
        let daemon = Daemon::start(directory.path(), &[device("sound", &images[0]), device("hung", &images[1])]);
        let (mut sound, mut hung) = (Machine::new(1), Machine::new(1));
        let [sound_link, hung_link] =
            [(&sound, "sound"), (&hung, "hung")].map(|(machine, name)| machine.connect(&directory.path().join(name)));
        for machine in [&mut sound, &mut hung] {
            write(machine, 0, 7);
        }
        Some(Self { server, daemon, sound, hung, _sound_link: sound_link, hung_link, images, directory })
    }

    /// Stops the server, and sends requests that it keeps.
    fn hang(&mut self) {
        self.server.stop();
        for slot in HANGING {
            match slot % 4 {
                0 => self.hung.queues[0].submit(slot, FLUSH, 0, Data::None),
                1 => self.hung.queues[0].submit(slot, OUT, sector(slot), Data::Out(&[slot as u8; CLUSTER])),
                2 => self.hung.queues[0].submit(slot, OUT, sector(0), Data::Out(&[7; CLUSTER])),
                _ => self.hung.queues[0].submit(slot, IN, sector(0), Data::In(CLUSTER)),
            }
        }
        self.hung.queues[0].kick();
    }

    /// What must go on beside a device that hangs. `round` tells the snapshots apart.
    fn others_go_on(&mut self, round: u8) {
        for cluster in 1..65 {
            write(&mut self.sound, cluster, round);
        }
        let mut client = self.daemon.client();
        snapshot(&mut client, &format!("alone-{round}"), &["sound"]).expect("a snapshot of a device that is sound");
        for cluster in 1..65 {
            write(&mut self.sound, cluster, round | 0x80);
        }
    }
}

fn sector(cluster: usize) -> u64 {
    (cluster * CLUSTER / 512) as u64
}

/// Writes, flushes and reads back.
fn write(machine: &mut Machine, cluster: usize, byte: u8) {
    let queue = &mut machine.queues[0];
    assert_eq!(queue.request(OUT, sector(cluster), Data::Out(&[byte; CLUSTER])).status, 0);
    assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
    assert_eq!(queue.request(IN, sector(cluster), Data::In(CLUSTER)).status, 0);
    assert!(queue.data(0, CLUSTER) == [byte; CLUSTER], "cluster {cluster}");
}

fn snapshot(client: &mut Client, name: &str, devices: &[&str]) -> Result<Value, String> {
    let members: Vec<_> = devices.iter().map(|device| json!({ "device": device })).collect();
    let asked = json!({ "name": name, "devices": members, "deadline-ms": 500 });
    client.execute("snapshot-create", asked).map_err(|error| error.to_string())
}

#[test]
fn a_device_whose_file_server_stands_still_hurts_nobody_and_goes_on_with_it() {
    let Some(mut setting) = Setting::new() else { return };
    setting.hang();
    setting.others_go_on(1);

    let mut client = setting.daemon.client();
    let refused = snapshot(&mut client, "both", &["sound", "hung"]).expect_err("it cannot be");
    assert!(refused.contains("'hung'") && !refused.contains("'sound'"), "{refused}");
    for number in 0..20 {
        // Whoever looks again and again, and gives files of the server to the daemon, uses nothing up.
        for device in ["sound", "hung"] {
            let stack = client.execute("stack-show", json!({ "device": device })).expect("an answer");
            let size = stack["layers"][0].get("allocated-bytes");
            assert_eq!(size.is_some(), device == "sound", "{stack}");
        }
        client.execute("query-named-block-nodes", json!({})).expect("an answer");
        let added = json!({
            "name": format!("more-{number}"), "image": setting.server.place.join(format!("more-{number}")), "format": "raw",
            "socket": setting.directory.path().join(format!("more-{number}.sock")),
        });
        let mut asking = setting.daemon.client();
        std::thread::spawn(move || asking.execute("device-add", added));
    }
    setting.others_go_on(2);
    let devices = client.execute("device-list", json!({})).expect("an answer");
    assert_eq!(devices.as_array().map(Vec::len), Some(2), "{devices}");
    assert_eq!(setting.hung.queues[0].completed(), [], "nothing has been made up");

    setting.server.signal(Signal::CONT);
    for done in setting.hung.queues[0].wait(HANGING.len()) {
        assert_eq!(done.status, 0, "slot {}", done.slot);
        if done.slot % 4 == 3 {
            assert!(setting.hung.queues[0].data(done.slot, CLUSTER) == [7; CLUSTER], "slot {}", done.slot);
        }
    }
    for slot in HANGING.filter(|slot| slot % 4 == 1) {
        assert_eq!(setting.hung.queues[0].request(IN, sector(slot), Data::In(CLUSTER)).status, 0);
        assert!(setting.hung.queues[0].data(0, CLUSTER) == [slot as u8; CLUSTER], "slot {slot}");
    }
    snapshot(&mut client, "both", &["sound", "hung"]).expect("a snapshot, now that it can be");
    write(&mut setting.hung, 1, 9);
    setting.others_go_on(3);
    drop((client, setting.hung_link));
    setting.daemon.stop();
    setting.images.iter().for_each(|image| check_clean(image));
}

#[test]
fn a_device_that_hangs_neither_keeps_its_front_end_nor_the_daemon() {
    let Some(mut setting) = Setting::new() else { return };
    setting.hang();
    drop(setting.hung_link);
    let again = setting.hung.connect(&setting.directory.path().join("hung"));
    drop(again);
    let mut client = setting.daemon.client();
    let removed = client.execute("device-remove", json!({ "name": "hung", "force": true })).expect_err("not in good order").to_string();
    assert!(removed.contains("'hung'"), "{removed}");
    write(&mut setting.sound, 1, 1);
    setting.daemon.stop();
}

#[test]
fn a_daemon_that_is_stopped_says_which_device_hangs_and_ends() {
    let Some(mut setting) = Setting::new() else { return };
    setting.hang();
    setting.daemon.signal(Signal::TERM);
    let status = setting.daemon.await_end();
    assert!(!status.success(), "not everything is durable");
    let log = std::fs::read_to_string(setting.directory.path().join("log")).expect("a log");
    assert!(log.contains("snapfenced: not everything is durable on: hung\n"), "{log}");
}

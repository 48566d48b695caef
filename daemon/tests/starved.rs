//! A daemon that runs out of descriptors, threads or memory while it serves a disk: what needs more is refused and says so, the guest goes on, and
//! with the limit gone everything is as before. Without memory it may end instead, and the next one goes on with what was in flight.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, Done, FLUSH, IN, Link, Machine, OUT};
use common::{PATIENCE, as_user, check_clean, make_qcow2};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;
use snapfence::client::Client;
use snapfence_image_format::qcow2::CreateOptions;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK: usize = 4096;

/// A daemon with a disk, a guest, and a client that were there before it became poor.
struct Setting {
    directory: tempfile::TempDir,
    /// Whose daemon it is, if not ours.
    user: Option<u32>,
    device: String,
    daemon: Daemon,
    client: Client,
    machine: Machine,
    link: Link,
    written: u8,
    /// Bytes that the daemon may have more than it had, if that is limited.
    room: Option<u64>,
    /// How often the daemon has ended for want of memory.
    ends: usize,
}

/// Somebody who has no processes, and whom limits bind, unlike root.
const POOR: u32 = 59_731;

impl Setting {
    fn new() -> Self {
        let mut setting = Self::without_requests(None);
        setting.guest_goes_on();
        setting
    }

    /// A guest that has asked for nothing yet, of a daemon of this user.
    fn without_requests(user: Option<u32>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        make_qcow2(&path("vda.qcow2"), CreateOptions::standalone(DISK_BYTES));
        make_qcow2(&path("vdb.qcow2"), CreateOptions::standalone(DISK_BYTES));
        let device = format!("name=vda,image={},format=qcow2,socket={}", path("vda.qcow2").display(), path("vda.sock").display());
        let command = match user {
            None => Daemon::command(directory.path(), std::slice::from_ref(&device)),
            Some(user) => {
                // The program may be where he cannot look.
                // Not by us: children of ours that begin meanwhile would have it open for writing, and what is so cannot be run.
                let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_snapfenced")).arg(path("program")).status();
                assert!(copied.expect("cp").success());
                for name in ["", "vda.qcow2", "vdb.qcow2"] {
                    chown(path(name), Some(user), Some(user)).expect("root may");
                }
                let mut command = Daemon::command_of(&path("program"), directory.path(), std::slice::from_ref(&device));
                command.uid(user).gid(user);
                command
            }
        };
        let daemon = Daemon::run(command, directory.path());
        let client = daemon.client();
        let machine = Machine::new(1);
        let link = machine.connect(&path("vda.sock"));
        Self { directory, user, device, daemon, client, machine, link, written: 0, room: None, ends: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn limit(&self, resource: Resource, current: Option<u64>) {
        let process = Pid::from_raw(i32::try_from(self.daemon.id()).expect("small")).expect("a process");
        // Which it has from us, and which only root may raise.
        let maximum = getrlimit(resource).maximum;
        let limit = || prlimit(Some(process), resource, Rlimit { current: current.or(maximum), maximum }).expect("a process of this user");
        match self.user {
            None => limit(),
            Some(user) => as_user(user, limit),
        };
    }

    /// One request from beginning to end, which may come after that of the daemon.
    fn request(&mut self, kind: u32, block: u8, data: Data<'_>) {
        let sector = u64::from(block) * (BLOCK / 512) as u64;
        self.machine.queues[0].submit(0, kind, sector, data);
        self.machine.queues[0].kick();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.machine.queues[0].completed()[..] {
                [] => assert!(Instant::now() < deadline, "a request does not come back"),
                [Done { slot: 0, status: 0, .. }] => return,
                ref other => panic!("{other:?}"),
            }
            if let Some(status) = self.daemon.end() {
                self.start_again(status);
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// After the daemon has ended like this, which only want of memory may bring about.
    fn start_again(&mut self, status: ExitStatus) {
        let log = self.daemon.log();
        // The next one has all that it wants.
        let is_want = match (status.signal(), self.room.take()) {
            (Some(libc::SIGABRT), Some(_)) => log.contains("memory allocation of") || log.contains("failed to allocate"),
            // The kernel's answer if the main thread's stack cannot grow, for which it needs little.
            (Some(libc::SIGSEGV), Some(room)) => room < 1 << 20,
            _ => false,
        };
        assert!(is_want, "{status}: {log}");
        self.ends += 1;
        self.daemon = Daemon::start(self.directory.path(), std::slice::from_ref(&self.device));
        self.client = self.daemon.client();
        self.link = self.machine.connect(&self.path("vda.sock"));
    }

    fn guest_goes_on(&mut self) {
        self.written += 1;
        let written = self.written;
        self.request(OUT, written, Data::Out(&[written; BLOCK]));
        self.request(FLUSH, 0, Data::None);
        for block in 1..=written {
            self.request(IN, block, Data::In(BLOCK));
            assert!(self.machine.queues[0].data(0, BLOCK) == [block; BLOCK], "block {block}");
        }
    }

    /// Asks for a snapshot, a device, and a connection. What came of the first two: nothing, or why not.
    fn ask(&mut self, name: &str) -> Vec<String> {
        let snapshot = json!({ "name": name, "devices": [{ "device": "vda" }] });
        let added = json!({ "name": "vdb", "image": self.path("vdb.qcow2"), "format": "qcow2", "socket": self.path("vdb.sock") });
        let mut refusals = Vec::new();
        for (command, arguments) in [("snapshot-create", snapshot), ("device-add", added)] {
            match self.client.execute(command, arguments) {
                Err(error) => refusals.push(error.to_string()),
                Ok(_) if command == "device-add" => {
                    let removed = self.client.execute("device-remove", json!({ "name": "vdb" }));
                    refusals.extend(removed.err().map(|error| error.to_string()));
                }
                Ok(_) => {}
            }
        }
        // Whoever comes now may be refused.
        drop(Client::connect(&self.daemon.control()));
        self.guest_goes_on();
        refusals
    }

    /// With the limit gone.
    fn end(mut self) {
        let asked = self.ask("last");
        assert!(asked.is_empty(), "{asked:?}");
        self.daemon.client().execute("device-list", json!({})).expect("an answer");
        let stack = self.client.execute("stack-show", json!({ "device": "vda" })).expect("a stack");
        let layers: Vec<_> = stack["layers"].as_array().expect("a list").iter().map(|layer| layer["file"].clone()).collect();
        let Self { directory, daemon, client, link, ends, .. } = self;
        drop((client, link));
        daemon.stop();
        // A layer that is frozen keeps what it has lost in a crash.
        for layer in layers.iter().take(if ends > 0 { 1 } else { layers.len() }) {
            check_clean(Path::new(layer.as_str().expect("a path")));
        }
        let images = std::fs::read_dir(directory.path()).expect("a directory").filter_map(Result::ok).map(|entry| entry.path());
        let images: Vec<_> = images.filter(|path| path.extension().is_some_and(|extension| extension == "qcow2")).collect();
        assert_eq!(images.len(), layers.len() + 1, "an overlay that no device has: {images:?}");
    }
}

/// All refusals under limits that leave room for so much more.
fn starve(setting: &mut Setting, name: &str, resource: Resource, rooms: impl Iterator<Item = u64>) -> Vec<String> {
    let mut refusals = Vec::new();
    for (number, limit) in rooms.enumerate() {
        setting.limit(resource, Some(limit));
        refusals.extend(setting.ask(&format!("{name}{number}")));
        setting.limit(resource, None);
    }
    for refusal in &refusals {
        println!("{refusal}");
    }
    refusals
}

#[test]
fn a_daemon_without_descriptors_says_so_and_goes_on() {
    let mut setting = Setting::new();
    let used = setting.daemon.descriptors() as u64;
    // Snapshots that succeed take some for good.
    let refusals = starve(&mut setting, "s", Resource::Nofile, (used..used + 30).step_by(2));
    assert!(refusals.len() > 4 && refusals.iter().all(|refusal| refusal.contains("Too many open files")), "{refusals:#?}");
    setting.end();
}

#[test]
fn a_daemon_without_threads_says_so_and_goes_on() {
    if !rustix::process::geteuid().is_root() {
        skip::skipped("only root can start a daemon of somebody else, whose threads can be counted");
        return;
    }
    let mut setting = Setting::without_requests(Some(POOR));
    // Nobody has flushed yet: the kernel needs a thread for that.
    let mut refusals = starve(&mut setting, "early", Resource::Nproc, 1..2);
    assert_eq!(refusals.len(), 1, "the new device: {refusals:#?}");
    // After some time neither it nor we keep more threads than we must.
    std::thread::sleep(Duration::from_secs(6));
    let used = setting.daemon.all_threads() as u64;
    refusals.extend(starve(&mut setting, "late", Resource::Nproc, [1].into_iter().chain(used..used + 6)));
    assert!(refusals.len() > 1, "{refusals:#?}");
    for refusal in &refusals {
        assert!(refusal.contains("device 'vdb': ") && refusal.contains("Resource temporarily unavailable"), "{refusal}");
    }
    setting.end();
}

#[test]
fn a_daemon_without_memory_says_so_or_ends_and_the_next_goes_on() {
    let mut refused = 0;
    for kib in [0, 16, 64, 256, 1024, 2048, 3072, 4096, 8192, 16384, 65536, 131_072] {
        let mut setting = Setting::new();
        let room = kib * 1024;
        setting.room = Some(room);
        setting.limit(Resource::As, Some(setting.daemon.addresses() + room));
        let refusals = setting.ask("s0");
        // It may have ended after the guest's last request.
        setting.guest_goes_on();
        println!("{kib} KiB more: ended {} times, {refusals:?}", setting.ends);
        refused += refusals.iter().filter(|refusal| refusal.contains("Cannot allocate memory")).count();
        setting.limit(Resource::As, None);
        setting.room = None;
        setting.end();
    }
    assert!(refused > 0, "the limit is not felt");
}

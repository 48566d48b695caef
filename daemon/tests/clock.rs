//! A daemon whose wall clock is set, years forward and back, also in the midst of snapshots and while it is dead: guests and snapshots do not notice,
//! and only the times that are shown follow.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Machine, OUT};
use common::{PATIENCE, check_clean, make_qcow2, read_by_qemu};
use serde_json::{Value, json};
use snapfence::client::Client;
use snapfence::protocol::Moment;
use snapfence_image_format::qcow2::CreateOptions;

const DISK_BYTES: u64 = 1 << 20;
const BLOCK: usize = 4096;

const DAY: u64 = 86_400 * 1_000_000;
/// libfaketime's year.
const YEAR: u64 = 365 * DAY;

/// What stands between the daemon and the system's clock, from Debian's package libfaketime.
fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.filter_map(Result::ok);
    folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|library| library.exists())
}

/// The clock of one daemon after another.
struct Clock<'a> {
    library: &'a Path,
    directory: &'a Path,
}

impl Clock<'_> {
    fn file(&self) -> PathBuf {
        self.directory.join("clock")
    }

    /// Sets it to so much before or after the present, in libfaketime's words.
    fn set(&self, offset: &str) {
        let new = self.directory.join("clock.new");
        std::fs::write(&new, offset).expect("a file");
        std::fs::rename(&new, self.file()).expect("a file in its place");
    }

    fn start_daemon(&self, device: &str) -> Daemon {
        let mut command = Daemon::command(self.directory, &[device.to_owned()]);
        command.env("LD_PRELOAD", self.library).env("FAKETIME_TIMESTAMP_FILE", self.file());
        // Looked at whenever somebody asks for the time. Nobody sets the monotonic clock, nor the times of files.
        command.env("FAKETIME_NO_CACHE", "1").env("DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
        Daemon::run(command, self.directory)
    }
}

struct Guest {
    machine: Machine,
    written: u8,
}

impl Guest {
    /// Writes one block more, and reads them all.
    fn go_on(&mut self) {
        self.written += 1;
        let queue = &mut self.machine.queues[0];
        let sector = |block: u8| u64::from(block) * (BLOCK / 512) as u64;
        assert_eq!(queue.request(OUT, sector(self.written), Data::Out(&[self.written; BLOCK])).status, 0);
        assert_eq!(queue.request(FLUSH, 0, Data::None).status, 0);
        for block in 1..=self.written {
            let done = queue.request(IN, sector(block), Data::In(BLOCK));
            assert_eq!((done.status, queue.data(done.slot, BLOCK)), (0, vec![block; BLOCK]), "block {block}");
        }
    }
}

/// A snapshot with the layer that holds it, and how many blocks had been written.
struct Taken {
    name: String,
    layer: PathBuf,
    blocks: u8,
}

/// Returns the answer as well.
fn snapshot(client: &mut Client, guest: &Guest) -> (Taken, Value) {
    let name = format!("s{}", guest.written);
    let info = client.execute("snapshot-create", json!({ "name": name, "devices": [{ "device": "vda" }] })).expect("a snapshot");
    let layer = info["devices"][0]["frozen_layer"].as_str().expect("a path").into();
    (Taken { name, layer, blocks: guest.written }, info)
}

/// Waits until a snapshot has frozen or failed. Whether it has frozen.
fn has_frozen(client: &mut Client, name: &str) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match client.execute("snapshot-show", json!({ "name": name })).expect("a snapshot")["state"].as_str() {
            Some("frozen") => return true,
            Some("failed") => return false,
            state => assert!(Instant::now() < deadline, "snapshot {name} stays {state:?}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_clock_that_is_set_is_not_noticed() {
    let Some(library) = faketime() else {
        skip::skipped("no clock can be set for one process without libfaketime (Debian: apt-get install libfaketime)");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    make_qcow2(&path("vda.qcow2"), CreateOptions::standalone(DISK_BYTES));
    let device = format!("name=vda,image={},format=qcow2,socket={}", path("vda.qcow2").display(), path("vda.sock").display());
    let clock = Clock { library: &library, directory: directory.path() };
    clock.set("+0");
    let mut daemon = clock.start_daemon(&device);
    let mut client = daemon.client();
    let mut guest = Guest { machine: Machine::new(1), written: 0 };
    let mut link = guest.machine.connect(&path("vda.sock"));
    let mut all = Vec::new();

    for (words, at) in [
        ("+0", Moment::now().unix_microseconds()),
        ("+10y", Moment::now().unix_microseconds() + 10 * YEAR),
        ("-10y", Moment::now().unix_microseconds() - 10 * YEAR),
        ("+20y", Moment::now().unix_microseconds() + 20 * YEAR),
        // Before the times that we can write.
        ("-100y", 0),
    ] {
        clock.set(words);
        guest.go_on();
        let (taken, info) = snapshot(&mut client, &guest);
        let created: Moment = info["created"].as_str().expect("a time").parse().expect("a time");
        assert!(created.unix_microseconds().abs_diff(at) < DAY, "the clock was set by {words}, and this is asked for at {created}");
        assert!(has_frozen(&mut client, &taken.name));
        all.push(taken);
    }

    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for words in ["-10y", "+10y", "-1", "+1"].iter().cycle().take_while(|_| !is_over.load(Relaxed)) {
                clock.set(words);
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        for _ in 0..30 {
            guest.go_on();
            all.push(snapshot(&mut client, &guest).0);
        }
        is_over.store(true, Relaxed);
    });

    // What no daemon has finished has failed.
    let mut unfinished = Vec::new();
    for words in ["-10y", "+10y"] {
        unfinished.extend(all.last().map(|taken| taken.name.clone()));
        daemon.kill();
        clock.set(words);
        daemon = clock.start_daemon(&device);
        client = daemon.client();
        drop(link);
        link = guest.machine.connect(&path("vda.sock"));
        for _ in 0..3 {
            guest.go_on();
            all.push(snapshot(&mut client, &guest).0);
        }
    }
    all.retain(|taken| {
        let has_frozen = has_frozen(&mut client, &taken.name);
        assert!(has_frozen || unfinished.contains(&taken.name), "snapshot {} has failed", taken.name);
        has_frozen
    });
    drop((link, client));
    daemon.stop();

    for taken in &all {
        check_clean(&taken.layer);
        let disk = read_by_qemu(&taken.layer, directory.path());
        for (block, bytes) in disk.chunks(BLOCK).enumerate() {
            let expected = if block <= taken.blocks.into() { block as u8 } else { 0 };
            assert!(bytes.iter().all(|byte| *byte == expected), "snapshot {}, block {block}", taken.name);
        }
    }
}

//! The control socket of a daemon that serves a disk: other users have no say, and a flood of requests, sensible and senseless, takes nothing from
//! the disk: every request of the guest ends well, and snapshots are taken meanwhile.

mod common;
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::fs::Permissions;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Machine, OUT, Queue};
use common::{PATIENCE, as_user, check_clean, make_qcow2};
use serde_json::json;
use snapfence::client::Client;
use snapfence::protocol::DeviceList;
use snapfence_image_format::qcow2::CreateOptions;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK: usize = 4096;
/// Requests of the guest, with the flood and without it.
const REQUESTS: usize = 4_000;
const FLOODERS: usize = 6;
/// "nobody", who owns nothing here.
const STRANGER: u32 = 65_534;

fn device(directory: &Path) -> String {
    let image = directory.join("vda.qcow2");
    make_qcow2(&image, CreateOptions::standalone(DISK_BYTES));
    format!("name=vda,image={},format=qcow2,socket={}", image.display(), directory.join("vda.sock").display())
}

#[test]
fn other_users_have_no_say() {
    if !rustix::process::geteuid().is_root() {
        skip::skipped("only root can act as another user");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let daemon = Daemon::start(directory.path(), &[device(directory.path())]);
    let control = daemon.control();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("ours");
    let refused = as_user(STRANGER, || UnixStream::connect(&control)).expect_err("the socket is for its owner");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    // Whoever opens the socket to all has not said that all may give commands.
    std::fs::set_permissions(&control, Permissions::from_mode(0o666)).expect("ours");
    for command in ["", "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n"] {
        let heard = as_user(STRANGER, || {
            let mut stream = UnixStream::connect(&control).expect("a socket open to all");
            stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
            // It may be closed before we have said anything.
            let _ = stream.write_all(command.as_bytes());
            let mut heard = Vec::new();
            // A socket that is closed with something unread in it ends with an error.
            let _ = stream.read_to_end(&mut heard);
            String::from_utf8(heard).expect("text")
        });
        assert!(heard.contains(&format!("user {STRANGER} may not use this control socket")), "{heard:?}");
        assert!(!heard.contains("QMP") && !heard.contains("return"), "{heard:?}");
    }
    assert_eq!(daemon.client().call(&DeviceList {}).expect("the owner has").len(), 1);
    daemon.stop();
}

/// Writes, reads back and flushes. Answers with how long it took, and the longest request.
fn work(queue: &mut Queue, model: &mut [u8]) -> (Duration, Duration) {
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    for number in 0..REQUESTS {
        let block = number * 7 % model.len();
        let sector = (block * BLOCK / 512) as u64;
        let one = Instant::now();
        let status = match number % 8 {
            0..4 => {
                model[block] = number as u8;
                queue.request(OUT, sector, Data::Out(&[number as u8; BLOCK])).status
            }
            4..7 => {
                let done = queue.request(IN, sector, Data::In(BLOCK));
                assert!(queue.data(0, BLOCK) == vec![model[block]; BLOCK], "block {block}");
                done.status
            }
            _ => queue.request(FLUSH, 0, Data::None).status,
        };
        assert_eq!(status, 0, "request {number}");
        longest = longest.max(one.elapsed());
    }
    (began.elapsed(), longest)
}

/// Tells others to stop, also when something has gone wrong.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends and asks whatever comes to mind until it is told to stop. Whoever comes new is refused where there are too many already.
fn flood(control: &Path, mut client: Client, kind: usize, stop: &AtomicBool, count: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        match kind % 3 {
            0 => {
                for _ in 0..100 {
                    client.call(&DeviceList {}).expect("an answer");
                    client.execute("device-remove", json!({ "name": "none" })).expect_err("there is none");
                    count.fetch_add(2, Ordering::Relaxed);
                }
            }
            1 => {
                // Comes, says half a line, and goes.
                let Ok(mut stream) = UnixStream::connect(control) else { continue };
                let _ = stream.write_all(b"{\"execute\":\"qmp_cap");
                count.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                // Asks for more than it reads.
                let Ok(mut stream) = UnixStream::connect(control) else { continue };
                let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
                let _ = stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n");
                for _ in 0..10_000 {
                    if stop.load(Ordering::Relaxed) || stream.write_all(b"{\"execute\":\"query-commands\"}\n").is_err() {
                        break;
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

#[test]
fn a_flood_of_control_requests_takes_nothing_from_the_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let daemon = Daemon::start(directory.path(), &[device(directory.path())]);
    let mut machine = Machine::new(1);
    let _link = machine.connect(&directory.path().join("vda.sock"));
    let mut model = vec![0; DISK_BYTES as usize / BLOCK];
    let quiet = work(&mut machine.queues[0], &mut model);
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let control = daemon.control();
    let mut client = daemon.client();
    // Before the flood, which may take all connections that there are.
    let clients: Vec<Client> = (0..FLOODERS).map(|_| daemon.client()).collect();
    let flooded = std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for (kind, client) in clients.into_iter().enumerate() {
            let (control, stop, count) = (&control, &stop, &count);
            scope.spawn(move || flood(control, client, kind, stop, count));
        }
        let snapshots = scope.spawn(|| {
            for number in 0..5 {
                let asked = json!({ "name": format!("s{number}"), "devices": [{ "device": "vda" }] });
                client.execute("snapshot-create", asked).expect("a snapshot");
            }
        });
        let flooded = work(&mut machine.queues[0], &mut model);
        snapshots.join().expect("no panic");
        flooded
    });
    let asked = count.load(Ordering::Relaxed);
    println!("{REQUESTS} requests: {quiet:?} (longest) in quiet, {flooded:?} beside {asked} control requests");
    assert!(asked > 1_000, "{asked} are no flood");
    let layers = client.execute("stack-show", json!({ "device": "vda" })).expect("a stack");
    let layers = layers["layers"].as_array().expect("a list").clone();
    assert_eq!(layers.len(), 6);
    work(&mut machine.queues[0], &mut model);
    drop(client);
    daemon.stop();
    for layer in layers {
        check_clean(Path::new(layer["file"].as_str().expect("a path")));
    }
}

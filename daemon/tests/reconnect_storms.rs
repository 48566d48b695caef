//! Front-ends that come and go a thousand times, in the midst of requests and of messages: nothing of them stays in the daemon, and the device
//! serves the next one.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Link, Machine, OUT, SLOT_DATA};
use common::seed;
use snapfence_image_format::storage::Chance;

const DISK_BYTES: u64 = 64 << 20;
const QUEUES: usize = 4;
const CYCLES: usize = 1000;
/// Cycles after which everything that is needed once is there.
const WARM_UP: usize = 100;
/// Bytes of memory that the other cycles may add, all together: the allocator keeps pieces.
const MEMORY_DRIFT: u64 = 1 << 20;
const DEPTH: usize = 16;

/// Half of a message, or one that is none.
fn broken_message(chance: &mut Chance, socket: &Path) {
    let mut stream = UnixStream::connect(socket).expect("a daemon that listens");
    // Request, flags (version 1, reply wanted), bytes that follow.
    let message =
        |request: u32, size: u32, payload: &[u8]| [&request.to_le_bytes()[..], &9_u32.to_le_bytes(), &size.to_le_bytes(), payload].concat();
    let bytes = match chance.below(6) {
        // GET_FEATURES, cut off in its header.
        0 => message(1, 0, &[])[..1 + chance.below(11) as usize].to_vec(),
        // SET_FEATURES, cut off in its payload.
        1 => message(2, 8, &[1, 2, 3]),
        // SET_MEM_TABLE without descriptors.
        2 => message(5, 40, &[&1_u64.to_le_bytes()[..], &[0; 32]].concat()),
        // No such request; one that has a payload of 4 GiB; noise.
        3 => message(200, 0, &[]),
        4 => message(2, u32::MAX, &[0; 100]),
        _ => (0..200).map(|_| chance.below(256) as u8).collect(),
    };
    // The daemon may have had enough before the end.
    let _ = stream.write_all(&bytes);
}

/// Requests on all queues, which nobody waits for.
fn work(machine: &mut Machine, chance: &mut Chance) {
    for queue in &mut machine.queues {
        for slot in 0..DEPTH {
            let sector = chance.below((DISK_BYTES - SLOT_DATA as u64) / 512);
            match chance.below(4) {
                0 => queue.submit(slot, OUT, sector, Data::Out(&[slot as u8; 4096])),
                1 => queue.submit(slot, FLUSH, 0, Data::None),
                _ => queue.submit(slot, IN, sector, Data::In(SLOT_DATA)),
            }
        }
        queue.kick();
    }
}

fn assert_serves(socket: &Path) {
    let mut machine = Machine::new(QUEUES);
    let _link = machine.connect(socket);
    for queue in &mut machine.queues {
        assert_eq!(queue.request(IN, 0, Data::In(4096)).status, 0);
    }
}

#[test]
fn nothing_stays_of_front_ends_that_are_gone() {
    let mut chance = Chance::new(seed());
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.raw"), directory.path().join("vda.sock"));
    std::fs::File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
    let device = format!("name=vda,image={},format=raw,socket={},queues={QUEUES}", image.display(), socket.display());
    let mut daemon = Daemon::start(directory.path(), &[device]);
    assert_serves(&socket);
    let mut before = (0, 0);
    daemon.wait_until("the first front-end to go", |daemon| {
        before = (daemon.descriptors(), daemon.threads());
        daemon.log().matches("disconnected").count() >= 1 && daemon.guest_mappings() == 0
    });
    let mut memory = 0;
    for cycle in 0..CYCLES {
        if cycle == WARM_UP {
            memory = daemon.resident();
        }
        match chance.below(5) {
            0 => drop(UnixStream::connect(&socket).expect("a daemon that listens")),
            1 => broken_message(&mut chance, &socket),
            2 => drop(Link::new(&socket, QUEUES)),
            _ => {
                let mut machine = Machine::new(QUEUES);
                // The frontend's memory goes with it.
                let link = machine.connect(&socket);
                work(&mut machine, &mut chance);
                if chance.below(2) == 0 {
                    let outstanding = machine.queues[0].driver.outstanding();
                    machine.queues[0].wait(usize::from(outstanding).min(1));
                }
                drop(link);
            }
        }
        if cycle % 50 == 0 {
            assert_serves(&socket);
        }
    }
    assert_serves(&socket);
    // Descriptors are closed a little after the connection.
    daemon.wait_until("descriptors and threads as before", |daemon| {
        daemon.descriptors() <= before.0 && daemon.threads() <= before.1 && daemon.guest_mappings() == 0
    });
    let drift = daemon.resident().saturating_sub(memory);
    eprintln!("{CYCLES} cycles: {} descriptors, {} threads, {} KiB more resident than after {WARM_UP}", before.0, before.1, drift >> 10);
    assert!(drift < MEMORY_DRIFT, "{drift} bytes more are resident than after {WARM_UP} cycles");
    assert!(!daemon.log().contains("ring_abandoned"), "rings drain");
    assert!(!daemon.log().contains("panicked"));
    daemon.stop();
}

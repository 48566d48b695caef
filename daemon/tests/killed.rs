//! The daemon is killed hundreds of times with requests in flight, also while snapshots are being taken, and started again: the guest, whose
//! front-end connects again and has kept the record of what is in flight, gets each request back once, without an error, and reads what it has
//! written.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Link, Machine, OUT};
use common::{make_qcow2, read_by_qemu, seed};
use snapfence::protocol::{SnapshotCreate, SnapshotMember, StackShow};
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::storage::Chance;

const QUEUES: usize = 4;
const DEPTH: usize = 32;
const KILLS: usize = 200;
/// Each slot of each queue has a place of its own on the disk, which it writes and reads, one request at a time.
const PLACE_BYTES: u64 = 32 << 10;
const DISK_BYTES: u64 = QUEUES as u64 * DEPTH as u64 * PLACE_BYTES;

#[derive(Clone, Copy, Debug)]
enum Doing {
    Write { at: usize, len: usize, fill: u64 },
    Read { at: usize, len: usize },
    Flush,
}

/// One slot of a queue, and its place on the disk.
struct Slot {
    sector: u64,
    expected: Vec<u8>,
    doing: Option<Doing>,
}

struct Guest {
    machine: Machine,
    slots: Vec<Vec<Slot>>,
    chance: Chance,
    completed: u64,
    next_fill: u64,
}

fn bytes_of(fill: u64, len: usize) -> Vec<u8> {
    fill.to_le_bytes().repeat(len / 8)
}

impl Guest {
    fn new(chance: Chance) -> Self {
        let slot = |number: usize| Slot { sector: number as u64 * PLACE_BYTES / 512, expected: vec![0; PLACE_BYTES as usize], doing: None };
        let slots = (0..QUEUES).map(|queue| (0..DEPTH).map(|index| slot(queue * DEPTH + index)).collect()).collect();
        Self { machine: Machine::new(QUEUES), slots, chance, completed: 0, next_fill: 1 }
    }

    /// Gives every idle slot something to do.
    fn submit(&mut self) {
        let Self { machine, slots, chance, next_fill, .. } = self;
        for (queue, slots) in machine.queues.iter_mut().zip(slots) {
            for (index, slot) in slots.iter_mut().enumerate().filter(|(_, slot)| slot.doing.is_none()) {
                let sectors = 1 + chance.below(16);
                let first = chance.below(PLACE_BYTES / 512 - sectors + 1);
                let (at, len, sector) = (first as usize * 512, sectors as usize * 512, slot.sector + first);
                let doing = match chance.below(8) {
                    0 => Doing::Flush,
                    1..=3 => Doing::Read { at, len },
                    _ => {
                        *next_fill += 1;
                        Doing::Write { at, len, fill: *next_fill }
                    }
                };
                match doing {
                    Doing::Flush => queue.submit(index, FLUSH, 0, Data::None),
                    Doing::Read { .. } => queue.submit(index, IN, sector, Data::In(len)),
                    Doing::Write { fill, .. } => queue.submit(index, OUT, sector, Data::Out(&bytes_of(fill, len))),
                }
                slot.doing = Some(doing);
            }
            queue.kick();
        }
    }

    /// Takes what has come back, if anything.
    fn collect(&mut self) {
        let Self { machine, slots, completed, .. } = self;
        for (queue, slots) in machine.queues.iter_mut().zip(slots) {
            queue.clear_call();
            for done in queue.completed() {
                *completed += 1;
                assert_eq!(done.status, 0, "the guest sees no error");
                let slot = &mut slots[done.slot];
                match slot.doing.take().expect("each request comes back once") {
                    Doing::Flush => {}
                    Doing::Write { at, len, fill } => slot.expected[at..at + len].copy_from_slice(&bytes_of(fill, len)),
                    Doing::Read { at, len } => {
                        assert!(queue.data(done.slot, len) == slot.expected[at..at + len], "a read finds other data")
                    }
                }
            }
        }
    }

    /// Goes on for so long; not at all if that is nothing, so that no completion has been seen by then.
    fn work_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        loop {
            self.submit();
            if Instant::now() >= end {
                return;
            }
            std::thread::yield_now();
            self.collect();
        }
    }

    /// Waits until something comes back, and until nothing is in flight if `all`.
    fn await_completions(&mut self, all: bool) {
        let (end, before) = (Instant::now() + common::PATIENCE, self.completed);
        loop {
            self.collect();
            let is_idle = self.slots.iter().flatten().all(|slot| slot.doing.is_none());
            if is_idle || !all && self.completed > before {
                return;
            }
            assert!(Instant::now() < end, "requests do not come back");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Asks for a snapshot and does not wait for it.
fn begin_snapshot(daemon: &Daemon, name: String) {
    let mut client = daemon.client();
    let devices = vec![SnapshotMember { device: "vda".into(), overlay: None, format: None }];
    let command = SnapshotCreate { name, devices, create: false, deadline_ms: None, job_id: None };
    // The daemon is killed before it answers, or after.
    std::thread::spawn(move || client.call(&command).map(drop));
}

fn check(image: &Path) {
    let output = Command::new("qemu-img").args(["check", "-q", "-U", "-f", "qcow2"]).arg(image).output().expect("qemu-img");
    // 3: leaked clusters only, which a kill may leave.
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {}", image.display(), String::from_utf8_lossy(&output.stderr));
}

#[test]
fn requests_in_flight_survive_the_daemon() {
    let mut chance = Chance::new(seed());
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.qcow2"), directory.path().join("vda.sock"));
    make_qcow2(&image, CreateOptions::standalone(DISK_BYTES));
    let device = [format!("name=vda,image={},format=qcow2,socket={},queues={QUEUES}", image.display(), socket.display())];
    let mut guest = Guest::new(Chance::new(chance.below(u64::MAX)));
    let mut back_after = Vec::new();
    let mut in_flight = 0;
    let mut layers = Vec::new();
    for cycle in 0..=KILLS {
        let began = Instant::now();
        let daemon = Daemon::start(directory.path(), &device);
        let link: Link = guest.machine.connect(&socket);
        if cycle > 0 {
            // Whatever was in flight comes back without any kick.
            guest.await_completions(chance.below(4) == 0);
            back_after.push(began.elapsed());
        }
        if cycle == KILLS {
            guest.await_completions(true);
            guest.work_for(Duration::from_millis(100));
            guest.await_completions(true);
            drop(link);
            layers = daemon.client().call(&StackShow { device: "vda".into() }).expect("a stack").layers;
            daemon.stop();
            break;
        }
        guest.work_for(Duration::from_micros(chance.below(15_000) * chance.below(2)));
        if chance.below(2) == 0 {
            begin_snapshot(&daemon, format!("s{cycle}"));
            guest.work_for(Duration::from_micros(chance.below(15_000)));
        }
        daemon.kill();
        guest.collect();
        in_flight += guest.slots.iter().flatten().filter(|slot| slot.doing.is_some()).count();
        drop(link);
    }
    back_after.sort();
    eprintln!(
        "{KILLS} kills, {in_flight} requests in flight at them, {} completed; first completion {:?} after the start (median), {:?} at most",
        guest.completed,
        back_after[KILLS / 2],
        back_after[KILLS - 1]
    );
    assert!(in_flight > KILLS * DEPTH, "kills must hit requests");
    // What a snapshot had begun to make when its daemon was killed may lie about; the layers are sound.
    let images: Vec<PathBuf> = layers.into_iter().map(|layer| layer.file).collect();
    images.iter().for_each(|image| check(image));
    let top = images.first().expect("the top comes first");
    // What QEMU reads from the top is what the guest has written.
    let bytes = read_by_qemu(top, directory.path());
    for slot in guest.slots.iter().flatten() {
        let at = slot.sector as usize * 512;
        assert!(bytes[at..at + PLACE_BYTES as usize] == slot.expected, "QEMU reads something else at sector {}", slot.sector);
    }
}

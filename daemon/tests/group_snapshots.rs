//! Group snapshots of four devices by the daemon itself, taken back to back over its control socket while requests go on over its vhost-user
//! sockets. Each snapshot is compared with a record of all writes:
//!
//! - every write that had completed before the snapshot was asked for is in it;
//! - no write that was submitted after the answer is in it;
//! - it is one cut through time over all queues of all devices: a write that is in it was not submitted after one completed that is not in it;
//! - no write is in it in part.
//!
//! QEMU checks every image, and reads every tenth snapshot: it must find what we find.
//!
//! One thread submits and collects, so the numbers that it gives to submissions and completions are an order in time.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Machine, OUT, Queue};
use common::{block_on, make_qcow2, seed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use snapfence::client::Client;
use snapfence::protocol::{Event, SnapshotCreate, SnapshotMember, SnapshotState};
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, Unprotected, open_chain};
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::storage::{CacheMode, Chance, Location};
use snapfence_image_format::units::GuestOffset;

const DEVICES: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];
const QUEUES: usize = 4;
const DEPTH: usize = 32;
const SNAPSHOTS: usize = 200;
/// QEMU reads one snapshot of so many.
const COMPARED_EVERY: usize = 10;
/// Enough for several times as many cells as there are requests in flight.
const DISK_BYTES: u64 = 2 << 20;
/// The disk is divided into units of 4 KiB, each of which is one cell or, every third, eight of one sector. Three of four units are not used.
const UNITS: u64 = DISK_BYTES / 4096 / 4;

/// A place that is always written whole.
#[derive(Clone, Copy, Debug)]
struct Cell {
    sector: u64,
    len: usize,
}

fn cells() -> Vec<Cell> {
    let unit = |unit: u64| -> Vec<Cell> {
        let sector = unit * 4 * 8;
        match unit % 3 {
            0 => (0..8).map(|index| Cell { sector: sector + index, len: 512 }).collect(),
            _ => vec![Cell { sector, len: 4096 }],
        }
    };
    (0..UNITS).flat_map(unit).collect()
}

/// One write. Its content is its number in the history plus one.
#[derive(Clone, Copy, Debug)]
struct Write {
    device: usize,
    cell: usize,
    submitted: u64,
    completed: u64,
}

/// When a snapshot was asked for and answered, in the writer's numbers.
#[derive(Debug)]
struct Taken {
    name: String,
    asked: u64,
    answered: u64,
}

fn content(write: usize, len: usize) -> Vec<u8> {
    (write as u64 + 1).to_le_bytes().repeat(len / 8)
}

/// What a cell contains: the number of a write, or zero.
fn written_by(bytes: &[u8]) -> Option<usize> {
    let word = &bytes[..8];
    assert!(bytes.chunks_exact(8).all(|other| other == word), "a write is there in part: {bytes:x?}");
    (u64::from_le_bytes(word.try_into().expect("eight bytes")) as usize).checked_sub(1)
}

enum Doing {
    Write(usize),
    Read { cell: usize, expected: Option<usize> },
    Flush,
}

struct Writer<'a> {
    clock: &'a AtomicU64,
    chance: Chance,
    cells: Vec<Cell>,
    history: Vec<Write>,
    /// Last completed write of each cell, and whether an operation is under way.
    states: Vec<Vec<(Option<usize>, bool)>>,
    /// What each slot of each queue of each device does.
    doing: Vec<Vec<Vec<Option<Doing>>>>,
}

impl<'a> Writer<'a> {
    fn new(clock: &'a AtomicU64, chance: Chance) -> Self {
        let cells = cells();
        let states = vec![vec![(None, false); cells.len()]; DEVICES.len()];
        let nothing = || (0..DEPTH).map(|_| None).collect::<Vec<_>>();
        let doing = (0..DEVICES.len()).map(|_| (0..QUEUES).map(|_| nothing()).collect()).collect();
        Self { clock, chance, cells, history: Vec::new(), states, doing }
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn submit(&mut self, device: usize, index: usize, queue: &mut Queue) {
        let mut any = false;
        for slot in 0..DEPTH {
            if self.doing[device][index][slot].is_some() {
                continue;
            }
            let number = self.chance.below(self.cells.len() as u64) as usize;
            let Cell { sector, len } = self.cells[number];
            let (last, busy) = &mut self.states[device][number];
            if *busy {
                continue;
            }
            let doing = match self.chance.below(16) {
                0 => {
                    queue.submit(slot, FLUSH, 0, Data::None);
                    Doing::Flush
                }
                1..=3 => {
                    *busy = true;
                    let expected = *last;
                    queue.submit(slot, IN, sector, Data::In(len));
                    Doing::Read { cell: number, expected }
                }
                _ => {
                    *busy = true;
                    let write = self.history.len();
                    // Its number is taken before the device can see it.
                    let submitted = self.tick();
                    self.history.push(Write { device, cell: number, submitted, completed: u64::MAX });
                    queue.submit(slot, OUT, sector, Data::Out(&content(write, len)));
                    Doing::Write(write)
                }
            };
            self.doing[device][index][slot] = Some(doing);
            any = true;
        }
        if any {
            queue.kick();
        }
    }

    fn collect(&mut self, device: usize, index: usize, queue: &mut Queue) {
        queue.clear_call();
        for done in queue.completed() {
            let doing = self.doing[device][index][done.slot].take().expect("something was being done");
            assert_eq!(done.status, 0);
            match doing {
                Doing::Flush => {}
                Doing::Read { cell, expected } => {
                    let bytes = queue.data(done.slot, self.cells[cell].len);
                    assert_eq!(written_by(&bytes), expected, "{} reads cell {cell}", DEVICES[device]);
                    self.states[device][cell].1 = false;
                }
                Doing::Write(write) => {
                    let completed = self.tick();
                    let entry = &mut self.history[write];
                    entry.completed = completed;
                    self.states[device][entry.cell] = (Some(write), false);
                }
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.doing.iter().flatten().flatten().all(Option::is_none)
    }

    /// Writes until told to stop, and until everything has come back.
    fn run(&mut self, machines: &mut [Machine], stop: &AtomicBool) {
        loop {
            let stopping = stop.load(Ordering::SeqCst);
            for (device, machine) in machines.iter_mut().enumerate() {
                for (index, queue) in machine.queues.iter_mut().enumerate() {
                    self.collect(device, index, queue);
                    if !stopping {
                        self.submit(device, index, queue);
                    }
                }
            }
            if stopping && self.is_idle() {
                return;
            }
            let calls = machines.iter().flat_map(|machine| &machine.queues).map(|queue| &queue.call);
            let mut fds: Vec<_> = calls.map(|call| PollFd::new(call, PollFlags::IN)).collect();
            let patience = Timespec { tv_sec: common::PATIENCE.as_secs() as i64, tv_nsec: 0 };
            assert!(poll(&mut fds, Some(&patience)).expect("a poll") > 0, "requests do not come back");
        }
    }
}

/// Takes all snapshots, one right after the other, and waits until the last is frozen.
fn take_snapshots(mut client: Client, clock: &AtomicU64) -> Vec<Taken> {
    let mut taken = Vec::new();
    for number in 0..SNAPSHOTS {
        let name = format!("s{number}");
        let devices = DEVICES.map(|device| SnapshotMember { device: device.into(), overlay: None, format: None }).into();
        let command = SnapshotCreate { name: name.clone(), devices, create: false, deadline_ms: Some(10_000), job_id: None };
        let asked = clock.load(Ordering::SeqCst);
        let info = client.call(&command).expect("a snapshot");
        let answered = clock.load(Ordering::SeqCst);
        assert_ne!(info.state, SnapshotState::Failed);
        assert_ne!(info.state, SnapshotState::Preparing, "the answer comes after the switch");
        taken.push(Taken { name, asked, answered });
    }
    let mut frozen = 0;
    while frozen < SNAPSHOTS {
        let event = client.next_event(Some(common::PATIENCE)).expect("a control socket").expect("the snapshots are frozen some time");
        match event.event() {
            Some(Event::SnapshotFrozen(_)) => frozen += 1,
            Some(Event::SnapshotFailed(info)) => panic!("{info:?}"),
            _ => {}
        }
    }
    taken
}

/// What each snapshot has in each cell of the device, oldest snapshot first.
fn read_snapshots(top: PathBuf) -> Vec<Vec<Option<usize>>> {
    block_on(async move {
        let allowed = AllowedDirectories::new([top.parent().expect("a directory").to_owned()]);
        let options = ChainOptions {
            allowed: &allowed,
            data_files: &[],
            cache: CacheMode::Buffered,
            writable: false,
            protected: &Unprotected,
            keeper: None,
        };
        let layers = open_chain(&UringEnvironment, &Location::Trusted(top), Format::Qcow2, options).await.expect("a chain");
        let layers: Vec<_> = layers.into_iter().map(|layer| layer.layer).collect();
        assert_eq!(layers.len(), SNAPSHOTS + 1);
        let domain = FenceDomain::new(|| Duration::ZERO);
        let mut snapshots = Vec::new();
        for count in 1..=SNAPSHOTS {
            let stack = Stack::new(UringEnvironment, &domain, layers[..count].to_vec(), true);
            let (result, buffer) = stack.view().read(GuestOffset::ZERO, AlignedBuffer::zeroed(DISK_BYTES as usize).into()).await;
            result.expect("a disk that can be read");
            let Buffer::Owned(bytes) = buffer else { panic!("the buffer that was given") };
            let at = |cell: &Cell| &bytes[cell.sector as usize * 512..][..cell.len];
            snapshots.push(cells().iter().map(|cell| written_by(at(cell))).collect());
        }
        snapshots
    })
}

/// Compares one snapshot with the history. Returns the number of writes under way while it was taken.
fn verify(taken: &Taken, found: &[Vec<Option<usize>>], history: &[Write]) -> usize {
    let Taken { name, asked, answered } = taken;
    let (mut last_in, mut first_out) = (None, None);
    for (number, write) in history.iter().enumerate() {
        // Writes to one cell follow one another.
        let is_in = found[write.device][write.cell].is_some_and(|newest| newest >= number);
        assert!(is_in || write.completed >= *asked, "{name}: {write:?} was complete when the snapshot was asked for, and is not in it");
        assert!(!is_in || write.submitted < *answered, "{name}: {write:?} was submitted after the answer, and is in it");
        if is_in {
            last_in = last_in.max(Some((write.submitted, number)));
        } else if write.completed != u64::MAX {
            first_out = Some(first_out.map_or((write.completed, number), |other: (u64, usize)| other.min((write.completed, number))));
        }
    }
    if let (Some((submitted, inside)), Some((completed, outside))) = (last_in, first_out) {
        let (inside, outside) = (history[inside], history[outside]);
        assert!(submitted < completed, "{name} is no cut: {inside:?} is in it, {outside:?} is not, but was complete before");
    }
    history.iter().filter(|write| write.completed >= *asked && write.submitted < *answered).count()
}

fn tool(arguments: &[&str], paths: &[&Path]) -> std::process::Output {
    let output = Command::new("qemu-img").args(arguments).args(paths).output().expect("qemu-img");
    assert!(output.status.success(), "qemu-img {arguments:?} {paths:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// In memory where that is possible: disks take long to flush, and to delete, so many files, and nothing here depends on them.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.expect("a directory")
}

#[test]
fn each_group_snapshot_is_one_cut_through_time() {
    let mut chance = Chance::new(seed());
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let mut devices = Vec::new();
    for (number, name) in DEVICES.iter().enumerate() {
        let format = if number % 2 == 0 { "raw" } else { "qcow2" };
        let image = path(&format!("{name}.{format}"));
        match format {
            "raw" => std::fs::File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image"),
            _ => make_qcow2(&image, CreateOptions::standalone(DISK_BYTES)),
        }
        let socket = path(&format!("{name}.sock"));
        devices.push(format!("name={name},image={},format={format},socket={},queues={QUEUES}", image.display(), socket.display()));
    }
    let daemon = Daemon::start(directory.path(), &devices);
    let clock = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let mut machines: Vec<Machine> = DEVICES.iter().map(|_| Machine::new(QUEUES)).collect();
    let links: Vec<_> = machines.iter().zip(DEVICES).map(|(machine, name)| machine.connect(&path(&format!("{name}.sock")))).collect();
    let client = daemon.client();
    let mut writer = Writer::new(&clock, Chance::new(chance.below(u64::MAX)));
    let taken = std::thread::scope(|scope| {
        let taking = scope.spawn(|| {
            // Also when it panics: the writer must not go on for ever.
            struct Stop<'a>(&'a AtomicBool);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
            let _stop = Stop(&stop);
            take_snapshots(client, &clock)
        });
        writer.run(&mut machines, &stop);
        taking.join().expect("all snapshots are taken")
    });
    drop(links);
    daemon.stop();

    let tops = DEVICES.map(|name| path(&format!("{name}.s{}.qcow2", SNAPSHOTS - 1)));
    let by_device: Vec<_> = tops.iter().map(|top| read_snapshots(top.clone())).collect();
    let mut under_way = 0;
    for (number, taken) in taken.iter().enumerate() {
        let found: Vec<_> = by_device.iter().map(|snapshots| snapshots[number].clone()).collect();
        under_way += verify(taken, &found, &writer.history);
    }
    println!("{} writes, {} of them under way during a snapshot on average", writer.history.len(), under_way / SNAPSHOTS);
    assert!(under_way >= SNAPSHOTS, "{under_way} writes were under way while {SNAPSHOTS} snapshots were taken");

    // What others make of the images. Programs of others take longer than ours, so each device has a thread.
    std::thread::scope(|scope| {
        for ((device, name), top) in DEVICES.iter().enumerate().zip(&tops) {
            let (directory, snapshots) = (directory.path(), &by_device[device]);
            scope.spawn(move || {
                let overlay = |number: usize| directory.join(format!("{name}.s{number}.qcow2"));
                for number in 0..SNAPSHOTS {
                    // Without what is beneath, which would be opened every time.
                    let file = json!({ "driver": "file", "filename": overlay(number) });
                    let image = json!({ "driver": "qcow2", "backing": null, "file": file });
                    tool(&["check", &format!("json:{image}")], &[]);
                }
                assert_eq!(*top, overlay(SNAPSHOTS - 1));
                let raw = directory.join(format!("{name}.compared"));
                // The layer below the first overlay is the image that there was, of a format of its own.
                for number in (1..SNAPSHOTS).step_by(COMPARED_EVERY).chain([SNAPSHOTS - 1]) {
                    tool(&["convert", "-f", "qcow2", "-O", "raw"], &[&overlay(number - 1), &raw]);
                    let bytes = std::fs::read(&raw).expect("an image");
                    let theirs: Vec<_> = cells().iter().map(|cell| written_by(&bytes[cell.sector as usize * 512..][..cell.len])).collect();
                    assert_eq!(theirs, snapshots[number], "{name}: QEMU reads another snapshot {number}");
                }
            });
        }
    });
}

//! A thousand group snapshots of two, four and sixteen devices by the daemon itself, taken back to back over its control socket while requests
//! go on over its vhost-user sockets. Each snapshot is compared with a record of all writes:
//!
//! - every write that had completed before the snapshot was asked for is in it;
//! - no write that was submitted after the answer is in it;
//! - it is one cut through time over all queues of all devices: a write that is in it was not submitted after one completed that is not in it;
//! - no write is in it in part.
//!
//! Each layer is hashed as soon as it is said to be frozen, and again at the end: nothing has changed in it.
//!
//! QEMU checks images and reads snapshots, some of them, since it opens each layer beneath every time: it must find what we find.
//!
//! One thread submits and collects, so the numbers that it gives to submissions and completions are an order in time.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::daemon::Daemon;
use common::machine::{Data, FLUSH, IN, Machine, OUT, Queue};
use common::{block_on, make_qcow2, read_by_qemu, seed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use sha2::{Digest, Sha256};
use snapfence::client::Client;
use snapfence::protocol::{Event, SnapshotCreate, SnapshotMember, SnapshotState};
use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain};
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::storage::{CacheMode, Chance, Location};
use snapfence_image_format::units::GuestOffset;

/// How large a run is.
#[derive(Clone, Copy)]
struct Scale {
    devices: usize,
    /// Snapshots of one chain. Each layer takes more than a megabyte.
    snapshots: usize,
    /// Requests in flight on each queue.
    depth: usize,
    /// QEMU checks the layers of one snapshot of so many.
    checked_every: usize,
    /// We read one snapshot of so many through all its layers, and not only each layer by itself.
    read_every: usize,
    /// QEMU reads one snapshot of so many.
    compared_every: usize,
}

const QUEUES: usize = 4;
/// QEMU reads a layer with all beneath it by recursion, and dies of a stack overflow where there are some hundred more.
const DEEPEST_OF_QEMU: usize = 400;
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
    /// The write that follows it in its cell.
    next: Option<usize>,
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
    scale: Scale,
    cells: Vec<Cell>,
    history: Vec<Write>,
    /// First write of each cell.
    first: Vec<Vec<Option<usize>>>,
    /// Last completed write of each cell, and whether an operation is under way.
    states: Vec<Vec<(Option<usize>, bool)>>,
    /// What each slot of each queue of each device does.
    doing: Vec<Vec<Vec<Option<Doing>>>>,
}

impl<'a> Writer<'a> {
    fn new(clock: &'a AtomicU64, chance: Chance, scale: Scale) -> Self {
        let cells = cells();
        let first = vec![vec![None; cells.len()]; scale.devices];
        let states = vec![vec![(None, false); cells.len()]; scale.devices];
        let nothing = || (0..scale.depth).map(|_| None).collect::<Vec<_>>();
        let doing = (0..scale.devices).map(|_| (0..QUEUES).map(|_| nothing()).collect()).collect();
        Self { clock, chance, scale, cells, history: Vec::new(), first, states, doing }
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn submit(&mut self, device: usize, index: usize, queue: &mut Queue) {
        let mut any = false;
        for slot in 0..self.scale.depth {
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
                    match *last {
                        None => self.first[device][number] = Some(write),
                        Some(before) => self.history[before].next = Some(write),
                    }
                    // Its number is taken before the device can see it.
                    let submitted = self.tick();
                    self.history.push(Write { device, cell: number, next: None, submitted, completed: u64::MAX });
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
                    assert_eq!(written_by(&bytes), expected, "{} reads cell {cell}", name_of(device));
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

/// The name of a device.
fn name_of(device: usize) -> String {
    format!("vd{}", char::from(b'a' + device as u8))
}

/// Takes all snapshots, one right after the other.
fn take_snapshots(mut client: Client, clock: &AtomicU64, scale: Scale) -> Vec<Taken> {
    let take = |number| {
        let name = format!("s{number}");
        let devices = (0..scale.devices).map(|device| SnapshotMember { device: name_of(device), overlay: None, format: None }).collect();
        let command = SnapshotCreate { name: name.clone(), devices, create: false, deadline_ms: Some(10_000), job_id: None };
        let asked = clock.load(Ordering::SeqCst);
        let info = client.call(&command).expect("a snapshot");
        let answered = clock.load(Ordering::SeqCst);
        assert_ne!(info.state, SnapshotState::Failed);
        assert_ne!(info.state, SnapshotState::Preparing, "the answer comes after the switch");
        Taken { name, asked, answered }
    };
    (0..scale.snapshots).map(take).collect()
}

type Hash = [u8; 32];

fn hash(path: &Path) -> Hash {
    let mut file = std::fs::File::open(path).expect("a layer");
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).expect("a layer that can be read");
    hasher.finalize().into()
}

/// Hashes all layers as they are frozen, until the last is.
fn hash_frozen(mut events: Client, expected: usize) -> Vec<(PathBuf, Hash)> {
    let mut frozen = Vec::new();
    let mut snapshots = 0;
    while snapshots < expected {
        let event = events.next_event(Some(common::PATIENCE)).expect("a control socket").expect("the snapshots are frozen some time");
        match event.event() {
            Some(Event::SnapshotFrozen(info)) => {
                snapshots += 1;
                frozen.extend(
                    info.devices
                        .into_iter()
                        .map(|device| (hash(&device.frozen_layer), device.frozen_layer))
                        .map(|(hash, path)| (path, hash)),
                );
            }
            Some(Event::SnapshotFailed(info)) => panic!("{info:?}"),
            _ => {}
        }
    }
    frozen
}

/// What each snapshot has in each cell of the device, oldest snapshot first.
///
/// Cells never go back to zero, so a layer by itself says which of them it has. One of `read_every` snapshots is read as a guest would, too.
fn read_snapshots(top: PathBuf, Scale { snapshots: count, read_every, .. }: Scale) -> Vec<Vec<Option<usize>>> {
    block_on(async move {
        let allowed = AllowedDirectories::new([top.parent().expect("a directory").to_owned()]);
        let options = ChainOptions { cache: CacheMode::Buffered, ..ChainOptions::reading(&allowed) };
        let layers = open_chain(&UringEnvironment, &Location::Trusted(top), Format::Qcow2, options).await.expect("a chain");
        let layers: Vec<_> = layers.into_iter().map(|layer| layer.layer).collect();
        assert_eq!(layers.len(), count + 1);
        let domain = FenceDomain::new(|| Duration::ZERO);
        let read = async |layers: &[_]| -> Vec<Option<usize>> {
            let stack = Stack::new(UringEnvironment, &domain, layers.to_vec(), true);
            let (result, buffer) = stack.view().read(GuestOffset::ZERO, AlignedBuffer::zeroed(DISK_BYTES as usize).into()).await;
            result.expect("a disk that can be read");
            let Buffer::Owned(bytes) = buffer else { panic!("the buffer that was given") };
            cells().iter().map(|cell| written_by(&bytes[cell.sector as usize * 512..][..cell.len])).collect()
        };
        let mut snapshots: Vec<Vec<Option<usize>>> = Vec::new();
        for number in 0..count {
            let mut found = read(&layers[number..=number]).await;
            if let Some(before) = snapshots.last() {
                found.iter_mut().zip(before).for_each(|(own, beneath)| *own = own.or(*beneath));
            }
            if number % read_every == 0 || number == count - 1 {
                assert!(read(&layers[..=number]).await == found, "snapshot {number} is not what its layers have");
            }
            snapshots.push(found);
        }
        snapshots
    })
}

/// Compares one snapshot, given by cell and device, with the history.
fn verify(taken: &Taken, found: &[&[Option<usize>]], writer: &Writer<'_>) {
    let Taken { name, asked, answered } = taken;
    let history = &writer.history;
    let (mut last_in, mut first_out) = (None, None);
    for (device, found) in found.iter().enumerate() {
        for (cell, newest) in found.iter().enumerate() {
            // Writes to one cell follow one another: those up to the newest are in it, and those after it are not.
            let outside = match newest {
                Some(newest) => {
                    let write = history[*newest];
                    assert_eq!((write.device, write.cell), (device, cell), "{name}: {write:?} is in another's place");
                    assert!(write.submitted < *answered, "{name}: {write:?} was submitted after the answer, and is in it");
                    last_in = last_in.max(Some((write.submitted, *newest)));
                    write.next
                }
                None => writer.first[device][cell],
            };
            if let Some(outside) = outside {
                let write = history[outside];
                assert!(write.completed >= *asked, "{name}: {write:?} was complete when the snapshot was asked for, and is not in it");
                first_out = Some(first_out.map_or((write.completed, outside), |other: (u64, usize)| other.min((write.completed, outside))));
            }
        }
    }
    if let (Some((submitted, inside)), Some((completed, outside))) = (last_in, first_out) {
        let (inside, outside) = (history[inside], history[outside]);
        assert!(submitted < completed, "{name} is no cut: {inside:?} is in it, {outside:?} is not, but was complete before");
    }
}

/// Writes that were under way at some time between question and answer, all snapshots together.
fn under_way(taken: &[Taken], history: &[Write]) -> usize {
    let mut completions: Vec<u64> = history.iter().map(|write| write.completed).collect();
    completions.sort_unstable();
    let begun = |before: u64| history.partition_point(|write| write.submitted < before);
    let ended = |before: u64| completions.partition_point(|completed| *completed < before);
    taken.iter().map(|taken| begun(taken.answered) - ended(taken.asked)).sum()
}

/// In memory where that is possible: disks take long to flush, and to delete, so many files, and nothing here depends on them.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.expect("a directory")
}

fn snapshots_are_cuts(chance: &mut Chance, scale: Scale) {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let names: Vec<String> = (0..scale.devices).map(name_of).collect();
    let mut devices = Vec::new();
    for (number, name) in names.iter().enumerate() {
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
    let mut machines: Vec<Machine> = names.iter().map(|_| Machine::new(QUEUES)).collect();
    let links: Vec<_> = machines.iter().zip(&names).map(|(machine, name)| machine.connect(&path(&format!("{name}.sock")))).collect();
    let (client, events) = (daemon.client(), daemon.client());
    let mut writer = Writer::new(&clock, Chance::new(chance.below(u64::MAX)), scale);
    let (taken, hashes) = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| hash_frozen(events, scale.snapshots));
        let taking = scope.spawn(|| {
            // Also when it panics: the writer must not go on for ever.
            struct Stop<'a>(&'a AtomicBool);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
            let _stop = Stop(&stop);
            take_snapshots(client, &clock, scale)
        });
        writer.run(&mut machines, &stop);
        (taking.join().expect("all snapshots are taken"), hashing.join().expect("all layers are frozen"))
    });
    drop(links);
    daemon.stop();

    assert_eq!(hashes.len(), scale.snapshots * scale.devices);
    for (layer, then) in &hashes {
        assert!(hash(layer) == *then, "{} has changed since it was frozen", layer.display());
    }
    // What we and others make of the images. Each device has a thread, since programs of others take long to open so many layers.
    let by_device: Vec<_> = std::thread::scope(|scope| {
        let reading: Vec<_> = names.iter().map(|name| scope.spawn(|| inspect(directory.path(), name, scale))).collect();
        reading.into_iter().map(|reading| reading.join().expect("images that are sound")).collect()
    });
    for (number, taken) in taken.iter().enumerate() {
        let found: Vec<_> = by_device.iter().map(|snapshots| snapshots[number].as_slice()).collect();
        verify(taken, &found, &writer);
    }
    let under_way = under_way(&taken, &writer.history);
    eprintln!(
        "{} snapshots of {} devices: {} writes, {} of them under way during a snapshot on average; {} frozen layers hashed twice",
        scale.snapshots,
        scale.devices,
        writer.history.len(),
        under_way / scale.snapshots,
        hashes.len()
    );
    assert!(under_way >= scale.snapshots, "{under_way} writes were under way during all snapshots");
}

/// What each snapshot has in each cell of the device, as [`read_snapshots`] says; QEMU agrees.
fn inspect(directory: &Path, name: &str, scale: Scale) -> Vec<Vec<Option<usize>>> {
    let overlay = |number: usize| directory.join(format!("{name}.s{number}.qcow2"));
    let snapshots = read_snapshots(overlay(scale.snapshots - 1), scale);
    for number in (0..scale.snapshots).step_by(scale.checked_every) {
        // Without what is beneath, which would be opened every time.
        let file = json!({ "driver": "file", "filename": overlay(number) });
        let image = json!({ "driver": "qcow2", "backing": null, "file": file });
        let check = Command::new("qemu-img").arg("check").arg(format!("json:{image}")).output().expect("qemu-img");
        assert!(check.status.success(), "{image}: {}", String::from_utf8_lossy(&check.stderr));
    }
    // The layer below the first overlay is the image that there was, of a format of its own.
    for number in (1..scale.snapshots.min(DEEPEST_OF_QEMU)).step_by(scale.compared_every) {
        let bytes = read_by_qemu(&overlay(number - 1), directory);
        let theirs: Vec<_> = cells().iter().map(|cell| written_by(&bytes[cell.sector as usize * 512..][..cell.len])).collect();
        assert_eq!(theirs, snapshots[number], "{name}: QEMU reads another snapshot {number}");
    }
    snapshots
}

#[test]
fn each_snapshot_of_two_devices_is_one_cut_through_time() {
    snapshots_are_cuts(
        &mut Chance::new(seed()),
        Scale { devices: 2, snapshots: 1000, depth: 32, checked_every: 4, read_every: 50, compared_every: 66 },
    );
}

#[test]
fn each_snapshot_of_four_devices_is_one_cut_through_time() {
    snapshots_are_cuts(
        &mut Chance::new(seed()),
        Scale { devices: 4, snapshots: 1000, depth: 32, checked_every: 10, read_every: 100, compared_every: 199 },
    );
}

#[test]
fn each_snapshot_of_sixteen_devices_is_one_cut_through_time() {
    let mut chance = Chance::new(seed());
    for _ in 0..5 {
        snapshots_are_cuts(
            &mut chance,
            Scale { devices: 16, snapshots: 200, depth: 8, checked_every: 25, read_every: 50, compared_every: 199 },
        );
    }
}

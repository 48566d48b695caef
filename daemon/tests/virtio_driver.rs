//! A client without a VM, crate virtio-driver, over the real socket: what it wrote is what it reads, on all queues at once, and what QEMU reads from
//! the image afterwards, also while snapshots are taken back to back. The device is served by the daemon's parts in this process, for which threads
//! and features are varied, or by the daemon itself.
//!
//! Random operations of several sectors go to four queues at depth 32. A model of one word per sector says what each must contain; sectors with
//! an operation in flight are left alone. The seed is printed, and taken from `SNAPFENCE_SEED` if that is set.

mod common;

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::daemon::Daemon;
use common::{Host, SharedMemory, block_on, make_qcow2, options, seed};
use rustix::event::{PollFd, PollFlags, poll};
use snapfence::client::Client;
use snapfence::protocol::{Event, SnapshotCreate, SnapshotMember};
use snapfence_image_format::chain::Format;
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::stack::{FenceOutcome, Stack};
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::uring::UringEnvironment;
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

const BLOCK: usize = 512;
const QUEUES: usize = 4;
const OPERATIONS: usize = 20_000;
const DEPTH: usize = 32;
/// Snapshots that the daemon is told to take, however many operations that needs.
const COMMANDED: usize = 40;
const MOST_BLOCKS: usize = 64;
const BLOCKS: usize = 32_768;
const DISK_BYTES: u64 = (BLOCKS * BLOCK) as u64;

/// What a block must contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// This word, again and again. Zero at first.
    Word(u64),
    /// Anything: it has been discarded.
    Anything,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write(u64),
    Zero,
    Discard,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    kind: Kind,
    start: usize,
    count: usize,
    slot: usize,
}

fn connect(socket: &Path, features: u64) -> Box<VirtioBlkTransport> {
    let path = socket.to_str().expect("a path of plain characters");
    Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features).expect("a handshake"))
}

fn all_features() -> u64 {
    VirtioFeatureFlags::VERSION_1.bits() | VirtioFeatureFlags::RING_EVENT_IDX.bits() | VirtioBlkFeatureFlags::all().bits()
}

/// The data buffer of one slot.
fn buffer(memory: &SharedMemory, slot: usize) -> &'static mut [u8] {
    let at = slot * MOST_BLOCKS * BLOCK;
    assert!(at + MOST_BLOCKS * BLOCK <= memory.len);
    let start = memory.base().wrapping_add(at);
    // SAFETY: within the mapping, checked above, which lives to the end of the test; the daemon touches a slot only while its operation is in
    // flight, when the test does not.
    unsafe { std::slice::from_raw_parts_mut(start, MOST_BLOCKS * BLOCK) }
}

fn fill(bytes: &mut [u8], word: u64) {
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
}

fn check(bytes: &[u8], expected: Content, block: usize) {
    if let Content::Word(word) = expected {
        let word = word.to_le_bytes();
        assert!(bytes.chunks_exact(8).all(|chunk| chunk == word), "block {block} does not contain {word:x?}");
    }
}

/// Sectors to operate on: any, or whole units of 4 KiB.
fn random_range(chance: &mut Chance) -> (usize, usize) {
    let unit = if chance.below(2) == 0 { 1 } else { 8 };
    let count = 1 + chance.below((MOST_BLOCKS / unit) as u64) as usize;
    let start = chance.below((BLOCKS / unit - count) as u64) as usize;
    (start * unit, count * unit)
}

/// Puts one overlay after the other on the device until told to stop. Returns the last, and how many there are.
fn take_snapshots(host: &Host, stack: &Arc<Stack<UringEnvironment>>, base: (&Path, Format), stop: &AtomicBool) -> (PathBuf, Format, usize) {
    let (mut top, mut top_format, mut count) = (base.0.to_owned(), base.1, 0);
    while !stop.load(Ordering::SeqCst) && count < 200 {
        let name = format!("overlay {count}");
        let overlay = host.overlay(&name, &top, top_format.name(), DISK_BYTES);
        let stack = Arc::clone(stack);
        let fence = host.domain.fence();
        let outcome = block_on(async move {
            let view = stack.prepare_overlay(overlay, &fence);
            let before = stack.publish(view);
            fence.switch();
            let outcome = fence.ended().await;
            stack.freeze_below(before).await.expect("a layer that is brought to rest");
            outcome
        });
        assert_eq!(outcome, FenceOutcome::Released);
        (top, top_format, count) = (host.path(&format!("{name}.qcow2")), Format::Qcow2, count + 1);
    }
    (top, top_format, count)
}

/// Stops the others also when a test fails.
struct SetAtEnd<'a>(&'a AtomicBool, bool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, Debug)]
struct Setup {
    threads: usize,
    features: u64,
    format: Format,
    snapshots: bool,
}

fn random_operations(setup: Setup) {
    let chance = Chance::new(seed());
    let host = Host::new(setup.threads);
    let served = match setup.format {
        Format::Raw => host.serve_raw(options(QUEUES as u16), DISK_BYTES),
        Format::Qcow2 => host.serve_qcow2(options(QUEUES as u16), DISK_BYTES),
    };
    let stop = AtomicBool::new(!setup.snapshots);
    let ((top, format, count), model) = std::thread::scope(|scope| {
        let (host, stop, stack, base) = (&host, &stop, served.device.stack(), (&*served.image, setup.format));
        let snapshots = scope.spawn(move || take_snapshots(host, stack, base, stop));
        let model = {
            let _stop = SetAtEnd(stop, true);
            operate(&served.socket, setup.features, chance, &AtomicBool::new(false))
        };
        (snapshots.join().expect("snapshots"), model)
    });
    println!("{count} snapshots");
    assert_eq!(count > 0, setup.snapshots);
    served.close();
    compare_with_qemu((&top, format), &host.path("flat"), &model);
}

/// QEMU finds the image in order, and in it what the model says.
fn compare_with_qemu(image: (&Path, Format), flat: &Path, model: &[Content]) {
    let (path, format) = image;
    qemu_img(&["convert", "-f", format.name(), "-O", "raw"], &[path, flat]);
    if format == Format::Qcow2 {
        qemu_img(&["check", "-f", "qcow2"], &[path]);
    }
    for (block, bytes) in common::read_image(flat).chunks_exact(BLOCK).enumerate() {
        check(bytes, model[block], block);
    }
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img").args(arguments).args(paths).output().expect("qemu-img");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Returns what the disk must contain. Does not stop as long as there is to be more.
fn operate(socket: &Path, features: u64, mut chance: Chance, more: &AtomicBool) -> Vec<Content> {
    let mut transport = connect(socket, features);
    let mut queues = VirtioBlkQueue::<Operation>::setup_queues(&mut *transport, QUEUES, 128).expect("queues");
    let memory = SharedMemory::new(QUEUES * DEPTH * MOST_BLOCKS * BLOCK);
    transport.map_mem_region(memory.base() as usize, memory.len, memory.file.as_raw_fd(), 0).expect("memory");
    queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
    let calls: Vec<Arc<EventFd>> = (0..QUEUES).map(|index| transport.get_completion_fd(index)).collect();

    let mut model = vec![Content::Word(0); BLOCKS];
    let mut is_busy = vec![false; BLOCKS];
    let mut free: Vec<Vec<usize>> = (0..QUEUES).map(|queue| (queue * DEPTH..(queue + 1) * DEPTH).collect()).collect();
    let (mut started, mut ended, mut next_word) = (0, 0, 1);
    loop {
        let goes_on = started < OPERATIONS || more.load(Ordering::SeqCst);
        if !goes_on && ended == started {
            return model;
        }
        for index in 0..QUEUES {
            let before = started;
            while goes_on && let Some(&slot) = free[index].last() {
                let (start, count) = random_range(&mut chance);
                if is_busy[start..start + count].iter().any(|busy| *busy) {
                    break;
                }
                let kind = match chance.below(20) {
                    0 => Kind::Flush,
                    1 => Kind::Zero,
                    2 => Kind::Discard,
                    3..=10 => Kind::Read,
                    _ => {
                        next_word += 1;
                        Kind::Write(next_word)
                    }
                };
                free[index].pop();
                let operation = Operation { kind, start, count, slot };
                let (at, len) = ((start * BLOCK) as u64, count * BLOCK);
                let bytes = &mut buffer(&memory, slot)[..len];
                let queue = &mut queues[index];
                if !matches!(kind, Kind::Flush) {
                    is_busy[start..start + count].fill(true);
                }
                match kind {
                    Kind::Read => {
                        bytes.fill(0xee);
                        queue.read(at, bytes, operation)
                    }
                    Kind::Write(word) => {
                        fill(bytes, word);
                        queue.write(at, bytes, operation)
                    }
                    Kind::Zero => queue.write_zeroes(at, len as u64, chance.below(2) == 1, operation),
                    Kind::Discard => queue.discard(at, len as u64, operation),
                    Kind::Flush => queue.flush(operation),
                }
                .expect("a free descriptor");
                started += 1;
            }
            if started > before && queues[index].avail_notif_needed() {
                transport.get_submission_notifier(index).notify().expect("a kick");
            }
        }
        let mut fds: Vec<PollFd<'_>> = calls.iter().map(|call| PollFd::new(&**call, PollFlags::IN)).collect();
        poll(&mut fds, None).expect("a call");
        let ready: Vec<usize> = (0..QUEUES).filter(|&index| !fds[index].revents().is_empty()).collect();
        for index in ready {
            calls[index].read().expect("it is readable");
            for completion in queues[index].completions() {
                let Operation { kind, start, count, slot } = completion.context;
                assert_eq!(completion.ret, 0, "{kind:?} of {count} blocks at {start}");
                ended += 1;
                free[index].push(slot);
                let range = start..start + count;
                if !matches!(kind, Kind::Flush) {
                    is_busy[range.clone()].fill(false);
                }
                match kind {
                    Kind::Read => {
                        let bytes = &buffer(&memory, slot)[..count * BLOCK];
                        for (block, bytes) in range.zip(bytes.chunks_exact(BLOCK)) {
                            check(bytes, model[block], block);
                        }
                    }
                    Kind::Write(word) => model[range].fill(Content::Word(word)),
                    Kind::Zero => model[range].fill(Content::Word(0)),
                    Kind::Discard => model[range].fill(Content::Anything),
                    Kind::Flush => {}
                }
            }
        }
    }
}

/// Has the daemon take snapshots, one right after the other. Returns the path of the last overlay.
fn command_snapshots(mut client: Client) -> PathBuf {
    let mut top = PathBuf::new();
    for number in 0..COMMANDED {
        let devices = vec![SnapshotMember { device: "vda".into(), overlay: None, format: None }];
        let command = SnapshotCreate { name: format!("s{number}"), devices, create: false, deadline_ms: Some(10_000), job_id: None };
        let info = client.call(&command).expect("a snapshot");
        top.clone_from(&info.devices[0].overlay);
    }
    let mut frozen = 0;
    while frozen < COMMANDED {
        let event = client.next_event(Some(common::PATIENCE)).expect("a control socket").expect("snapshots are frozen some time");
        match event.event() {
            Some(Event::SnapshotFrozen(_)) => frozen += 1,
            Some(Event::SnapshotFailed(info)) => panic!("{info:?}"),
            _ => {}
        }
    }
    top
}

#[test]
fn what_was_written_to_the_daemon_is_read_through_snapshots_by_command() {
    let chance = Chance::new(seed());
    let directory = tempfile::tempdir().expect("a directory");
    let (image, socket) = (directory.path().join("vda.qcow2"), directory.path().join("vda.sock"));
    make_qcow2(&image, CreateOptions::standalone(DISK_BYTES));
    let device = format!("name=vda,image={},format=qcow2,socket={},queues={QUEUES}", image.display(), socket.display());
    let daemon = Daemon::start(directory.path(), &[device]);
    let more = AtomicBool::new(true);
    let (top, model) = std::thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            let _no_more = SetAtEnd(&more, false);
            command_snapshots(daemon.client())
        });
        let model = operate(&socket, all_features(), chance, &more);
        (snapshots.join().expect("snapshots"), model)
    });
    daemon.stop();
    compare_with_qemu((&top, Format::Qcow2), &directory.path().join("flat"), &model);
}

#[test]
fn what_was_written_is_read_with_a_thread_per_queue() {
    random_operations(Setup { threads: QUEUES, features: all_features(), format: Format::Raw, snapshots: false });
}

#[test]
fn what_was_written_is_read_with_all_queues_on_one_thread() {
    random_operations(Setup { threads: 1, features: all_features(), format: Format::Qcow2, snapshots: false });
}

#[test]
fn what_was_written_is_read_without_event_index() {
    let features = all_features() & !VirtioFeatureFlags::RING_EVENT_IDX.bits();
    random_operations(Setup { threads: 2, features, format: Format::Raw, snapshots: false });
}

#[test]
fn what_was_written_is_read_through_snapshots_of_a_raw_disk() {
    random_operations(Setup { threads: QUEUES, features: all_features(), format: Format::Raw, snapshots: true });
}

#[test]
fn what_was_written_is_read_through_snapshots_of_a_qcow2_disk() {
    random_operations(Setup { threads: 2, features: all_features(), format: Format::Qcow2, snapshots: true });
}

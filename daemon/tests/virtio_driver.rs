//! A client without a VM, crate virtio-driver, over the real socket: what it wrote is what it reads, on all queues at once, and in the file.
//!
//! Random operations of several blocks go to four queues at depth 32. A model of one word per block says what each must contain; blocks with an
//! operation in flight are left alone. The seed is printed, and taken from `SNAPFENCE_SEED` if that is set.

mod common;

use std::os::fd::AsRawFd;

use common::{Host, Served, SharedMemory, options, seed};
use rustix::event::{PollFd, PollFlags, poll};
use snapfence_image_format::storage::Chance;
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

const BLOCK: usize = 4096;
const QUEUES: usize = 4;
const DEPTH: usize = 32;
const MOST_BLOCKS: usize = 8;

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

fn connect(served: &Served, features: u64) -> Box<VirtioBlkTransport> {
    let path = served.socket.to_str().expect("a path of plain characters");
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

fn random_operations(threads: usize, features: u64, operations: usize) {
    let mut chance = Chance::new(seed());
    let blocks = 4096;
    let host = Host::new(threads);
    let served = host.serve_raw(options(QUEUES as u16), (blocks * BLOCK) as u64);
    let mut transport = connect(&served, features);
    let mut queues = VirtioBlkQueue::<Operation>::setup_queues(&mut *transport, QUEUES, 128).expect("queues");
    let memory = SharedMemory::new(QUEUES * DEPTH * MOST_BLOCKS * BLOCK);
    transport.map_mem_region(memory.base() as usize, memory.len, memory.file.as_raw_fd(), 0).expect("memory");
    queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
    let calls: Vec<std::sync::Arc<EventFd>> = (0..QUEUES).map(|index| transport.get_completion_fd(index)).collect();

    let mut model = vec![Content::Word(0); blocks];
    let mut is_busy = vec![false; blocks];
    let mut free: Vec<Vec<usize>> = (0..QUEUES).map(|queue| (queue * DEPTH..(queue + 1) * DEPTH).collect()).collect();
    let (mut started, mut ended, mut next_word) = (0, 0, 1);
    while ended < operations {
        for index in 0..QUEUES {
            let before = started;
            while started < operations {
                let Some(&slot) = free[index].last() else { break };
                let count = 1 + chance.below(MOST_BLOCKS as u64) as usize;
                let start = chance.below((blocks - count) as u64) as usize;
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
    let image = common::read_image(&served.close());
    for (block, bytes) in image.chunks_exact(BLOCK).enumerate() {
        check(bytes, model[block], block);
    }
}

#[test]
fn what_was_written_is_read_with_a_thread_per_queue() {
    random_operations(QUEUES, all_features(), 20_000);
}

#[test]
fn what_was_written_is_read_with_all_queues_on_one_thread() {
    random_operations(1, all_features(), 20_000);
}

#[test]
fn what_was_written_is_read_without_event_index() {
    random_operations(2, all_features() & !VirtioFeatureFlags::RING_EVENT_IDX.bits(), 20_000);
}

//! Several threads write to one image at the same time: to neighbouring sectors of the same clusters, and to clusters of their own, which they
//! also unmap while others allocate. In memory and on real files; judged by QEMU's tools.

use std::sync::Arc;

use futures_util::future::join_all;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::storage::{Access, Chance, Environment, MemoryEnvironment};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Request, SECTOR, expect_disk, on_a_ring, open_file, open_stack, span};
use crate::tools::Scratch;

const THREADS: u64 = 4;
const ROUNDS: u64 = 60;
/// Requests of one thread at the same time.
const DEPTH: usize = 6;

/// Which parts of the disk belong to one thread.
#[derive(Clone, Copy, Debug)]
struct Share {
    thread: u64,
    size: u64,
    cluster: u64,
}

impl Share {
    /// A range of this thread's own: in the first half of the disk some sectors, dealt out in turn, in the second half whole clusters.
    fn range(&self, chance: &mut Chance) -> GuestRange {
        let unit = if chance.happens(1, 2) { 2 * SECTOR } else { self.cluster };
        let half = (self.size / 2).next_multiple_of(self.cluster * THREADS);
        let (start, len) = if unit == self.cluster { (half, self.size - half) } else { (0, half) };
        let turns = len / (unit * THREADS);
        let own = start + (chance.below(turns) * THREADS + self.thread) * unit;
        let skip = chance.below(unit / SECTOR) * SECTOR;
        let len = (1 + chance.below((unit - skip) / SECTOR)) * SECTOR;
        if chance.happens(1, 2) {
            return GuestRange::new(GuestOffset::new(own), unit);
        }
        GuestRange::new(GuestOffset::new(own + skip), len)
    }

    fn request(&self, chance: &mut Chance) -> Request {
        let range = self.range(chance);
        let kind = match chance.below(8) {
            0 => Kind::Discard,
            1 => Kind::Zero { unmap: true },
            2 => Kind::Zero { unmap: false },
            _ => Kind::Write,
        };
        Request::new(kind, range, chance)
    }
}

/// The work of one thread. Returns the disk as it must be where it is this thread's own, and which parts those are.
async fn work<E: Environment>(stack: Arc<Stack<E>>, share: Share, seed: u64) -> (Vec<u8>, Vec<GuestRange>) {
    let mut chance = Chance::new(seed ^ (share.thread << 32));
    let mut bytes = vec![0; share.size as usize];
    let mut touched = Vec::new();
    for _ in 0..ROUNDS {
        let mut requests: Vec<Request> = Vec::new();
        for _ in 0..DEPTH {
            let request = share.request(&mut chance);
            if !requests.iter().any(|other| other.range.overlaps(request.range)) {
                requests.push(request);
            }
        }
        join_all(requests.iter().map(|request| request.send(&stack))).await;
        for request in &requests {
            request.apply(&stack, &mut bytes).await;
        }
        touched.extend(requests.iter().map(|request| request.range));
        if chance.happens(1, 6) {
            stack.view().flush().await.expect("flushed");
        }
        let request = &requests[0];
        let found = crate::disk::read(&stack, request.range).await;
        assert!(found == bytes[span(request.range)], "{request:?} of thread {} reads as something else", share.thread);
    }
    (bytes, touched)
}

/// How one kind of environment runs things on a thread.
trait Runs: Environment {
    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T;
}

impl Runs for MemoryEnvironment {
    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.block_on(future)
    }
}

impl Runs for UringEnvironment {
    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        on_a_ring(future)
    }
}

/// Makes an image in `environment` at `/a.qcow2` beneath `root`, lets all threads work on it, and closes it. Returns what must be in it.
fn stress<E: Runs>(environment: &E, scratch: &Scratch, options: &CreateOptions, seed: u64) -> Vec<u8> {
    let path = scratch.path("a.qcow2");
    let (inner, image, options) = (environment.clone(), path.clone(), options.clone());
    let share = Share { thread: 0, size: options.virtual_size, cluster: 1 << options.cluster_bits };
    let stack = environment.run(async move {
        let file = open_file(&inner, &image, Access::CreateNew).await;
        Qcow2::<E>::create(&file, &options).await.expect("created");
        drop(file);
        open_stack(&inner, &image, None).await
    });
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (stack, environment) = (Arc::clone(&stack), environment.clone());
            std::thread::spawn(move || environment.run(work(stack, Share { thread, ..share }, seed)))
        })
        .collect();
    let mut bytes = vec![0; share.size as usize];
    for thread in threads {
        let (own, touched) = thread.join().expect("the thread found nothing wrong");
        for range in touched {
            bytes[span(range)].copy_from_slice(&own[span(range)]);
        }
    }
    let context = format!("seed {seed}");
    let expected = bytes.clone();
    environment.run(async move {
        expect_disk(&stack, &expected, &context).await;
        stack.close().await.expect("closed");
    });
    bytes
}

fn layouts() -> impl Iterator<Item = CreateOptions> {
    let layout = |cluster_bits, extended_l2, refcount_bits, size| CreateOptions {
        cluster_bits,
        extended_l2,
        refcount_bits,
        ..CreateOptions::standalone(size)
    };
    [
        layout(9, false, 64, 1 << 20),
        layout(12, false, 1, 2 << 20),
        layout(16, false, 16, 4 << 20),
        layout(14, true, 16, 2 << 20),
        layout(17, true, 16, 8 << 20),
    ]
    .into_iter()
}

#[test]
fn threads_share_an_image_in_memory() {
    for (options, seed) in layouts().zip(1..) {
        let (environment, scratch) = (MemoryEnvironment::with_real_clock(), Scratch::new());
        let bytes = stress(&environment, &scratch, &options, seed);
        let path = scratch.path("a.qcow2");
        environment.export(&path, &path).expect("exported");
        scratch.expect_sound("a.qcow2", &format!("{options:?}"));
        scratch.expect_content("a.qcow2", &bytes, &format!("{options:?}"));
    }
}

#[test]
fn threads_share_an_image_on_rings() {
    for (options, seed) in layouts().zip(1..) {
        let scratch = Scratch::new();
        let bytes = stress(&UringEnvironment, &scratch, &options, seed);
        scratch.expect_sound("a.qcow2", &format!("{options:?}"));
        scratch.expect_content("a.qcow2", &bytes, &format!("{options:?}"));
    }
}

/// Threads that give up most reservations of parts of the same two clusters, as failed requests do, beside others that succeed.
#[test]
fn reservations_that_are_given_up_leave_nothing_behind() {
    let environment = MemoryEnvironment::with_real_clock();
    let scratch = Scratch::new();
    let path = scratch.path("a.qcow2");
    let (inner, image) = (environment.clone(), path.clone());
    let options = CreateOptions { cluster_bits: 16, extended_l2: true, ..CreateOptions::standalone(1 << 20) };
    let layer = environment.block_on(async move {
        let file = open_file(&inner, &image, Access::CreateNew).await;
        Qcow2::<MemoryEnvironment>::create(&file, &options).await.expect("created");
        let image = Qcow2::<MemoryEnvironment>::open(file, OpenOptions::writing()).await.expect("opens");
        Arc::new(Layer::Qcow2(image))
    });
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (environment, layer) = (environment.clone(), Arc::clone(&layer));
            std::thread::spawn(move || {
                environment.block_on(async move {
                    let mut chance = Chance::new(thread);
                    for _ in 0..300 {
                        // Several at a time, in ascending order, so that no two threads wait for one another.
                        let mut held = Vec::new();
                        for unit in (0..64).filter(|_| chance.happens(1, 16)) {
                            let range = GuestRange::new(GuestOffset::new(unit * 2048), 2048);
                            held.push(layer.reserve(range).await.expect("reserved"));
                        }
                        if chance.happens(1, 4) {
                            layer.flush().await.expect("flushed");
                        }
                        for reservation in held {
                            if chance.happens(1, 4) {
                                reservation.commit(|| {});
                            }
                        }
                        if chance.happens(1, 8) {
                            let cluster = GuestRange::new(GuestOffset::new(chance.below(2) << 16), 1 << 16);
                            layer.discard(cluster, false, &|_| {}).await.expect("discarded");
                        }
                    }
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("the thread found nothing wrong");
    }
    environment.block_on(async move { layer.freeze().await.expect("frozen") });
    environment.export(&path, &path).expect("exported");
    scratch.expect_sound("a.qcow2", "after reservations that were given up");
}

//! The data path in one thread, to count instructions of: a driver that makes requests available, a queue's worker that serves them from a stack over
//! io_uring, and nothing that waits.
//!
//! `datapath KIND COUNT` serves COUNT requests of 4 KiB, [`BATCH`] at a time, on a disk in /dev/shm, where the kernel completes a transfer within the
//! system call. All that serving takes of this process happens in [`serve`], so that `valgrind --tool=callgrind --toggle-collect='*datapath*serve*'` counts
//! it and nothing else; the difference between two COUNTs leaves the start out. `tests/instructions.rs` does so.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{EventfdFlags, eventfd};
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment, UringFile, Wait};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::vring::{GuestMemory, Ring, RingFeatures, RingLayout, Used};
use snapfenced::worker::{Start, Worker};

#[path = "../../../daemon/src/vring/driver.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod driver;

use driver::{DATA, Driver, readable, writable};

/// Requests in flight at a time.
const BATCH: u64 = 16;
const DISK_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: u64 = 4096;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;
/// Memory of a request: indirect table, header and status byte; data behind.
const SLOT_BYTES: u64 = 0x3000;

type Layers = Vec<Arc<Layer<UringEnvironment>>>;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Reads of a raw image.
    RawRead,
    /// Writes to it.
    RawWrite,
    /// Reads of blocks that a qcow2 image has.
    Read,
    /// Writes to blocks that it may overwrite.
    Overwrite,
    /// Writes to blocks of a fresh overlay, each for the first time.
    FirstWrite,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, count] = &arguments[..] else { bail!("usage: datapath raw-read|raw-write|read|overwrite|first-write COUNT") };
    let kind = match kind.as_str() {
        "raw-read" => Kind::RawRead,
        "raw-write" => Kind::RawWrite,
        "read" => Kind::Read,
        "overwrite" => Kind::Overwrite,
        "first-write" => Kind::FirstWrite,
        other => bail!("no kind of request is called `{other}`"),
    };
    let count: u64 = count.parse().context("COUNT is not a number")?;
    ensure!(count.is_multiple_of(BATCH) && count <= BLOCKS, "COUNT has to be a multiple of {BATCH}, and at most {BLOCKS}");
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let reactor = Reactor::new(128)?;
    let path = folder.path().to_owned();
    let layers = block_on(&reactor, async move { layers(&path, kind).await })?;

    let domain = FenceDomain::new(|| Duration::ZERO);
    let (options, stack) = (
        DeviceOptions {
            name: "vda".into(),
            serial: String::new(),
            read_only: false,
            queues: 1,
            queue_size: 128,
            on_no_space: NoSpacePolicy::Report,
        },
        Stack::new(UringEnvironment, &domain, layers, false),
    );
    let device = Device::new(options, stack)?;
    let (mut worker, handle) = Worker::new(reactor.executor().clone(), reactor.clone(), &domain);
    let queue = handle.attach(&device, 0);
    let mut driver = Driver::new(128, 0);
    let _entered = reactor.enter();
    let started = queue.start(Start {
        layout: driver.layout,
        features: RingFeatures { event_idx: true, indirect: true },
        base: 0,
        memory: driver.memory(),
        record: None,
        kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.try_into()?,
        call: None,
        error: None,
        enabled: true,
    });
    loop {
        match started.try_recv() {
            Ok(outcome) => break outcome?,
            Err(_) => serve(&mut worker, &reactor)?,
        }
    }
    for batch in 0..count / BATCH {
        for slot in 0..BATCH {
            // All blocks come up, each once, far from the one before: the factor has no divisor in common with their number.
            let block = (batch * BATCH + slot) * 6_151 % BLOCKS;
            offer(&mut driver, kind, slot, block);
        }
        while driver.outstanding() > 0 {
            serve(&mut worker, &reactor)?;
        }
        driver.completed();
        let status = (0..BATCH).map(|slot| driver.read(DATA + slot * SLOT_BYTES + 0x110, 1)[0]).max();
        ensure!(status == Some(0), "a request has failed");
    }
    println!("{count} requests served");
    // Nothing is left to wait for, and nothing to keep.
    drop(folder);
    std::process::exit(0)
}

/// One turn of a queue thread.
#[inline(never)]
fn serve(worker: &mut Worker<UringEnvironment, Reactor>, reactor: &Reactor) -> Result<()> {
    worker.turn();
    reactor.turn(Wait::No)?;
    Ok(())
}

fn offer(driver: &mut Driver, kind: Kind, slot: u64, block: u64) {
    let at = DATA + slot * SLOT_BYTES;
    let is_read = matches!(kind, Kind::RawRead | Kind::Read);
    let request = u32::from(!is_read);
    driver.write(at + 0x100, &[&request.to_le_bytes()[..], &[0; 4], &(block * BLOCK_BYTES / 512).to_le_bytes()].concat());
    driver.write(at + 0x110, &[0x5a]);
    let len = BLOCK_BYTES as u32;
    let data = if is_read { writable(at + 0x1000, len) } else { readable(at + 0x1000, len) };
    driver.add_indirect(at, &[readable(at + 0x100, 16), data, writable(at + 0x110, 1)]);
}

async fn layers(folder: &Path, kind: Kind) -> Result<Layers> {
    let file = create(&folder.join("disk")).await?;
    if matches!(kind, Kind::RawRead | Kind::RawWrite) {
        std::fs::write(folder.join("disk"), vec![0x5a; DISK_BYTES as usize])?;
        return Ok(vec![Arc::new(Layer::Raw(Raw::open(file, true).await?))]);
    }
    let overlay = CreateOptions::overlay(DISK_BYTES, folder.join("base"), "raw");
    Qcow2::<UringEnvironment>::create(&file, &overlay).await?;
    std::fs::write(folder.join("base"), vec![0xba; DISK_BYTES as usize])?;
    let base = UringEnvironment.open(&Location::Trusted(folder.join("base")), Access::Read, CacheMode::Direct).await?;
    let top = Arc::new(Layer::Qcow2(Qcow2::open(file, OpenOptions::writing()).await?));
    let layers = vec![Arc::new(Layer::Raw(Raw::open(base, false).await?)), top];
    if kind != Kind::FirstWrite {
        let stack = Stack::new(UringEnvironment, &FenceDomain::new(|| Duration::ZERO), layers.clone(), false);
        let bytes = snapfence_image_format::buffer::AlignedBuffer::copy_of(&vec![0x5a; 1 << 20]);
        let mut buffer = bytes.into();
        for at in (0..DISK_BYTES).step_by(1 << 20) {
            let (result, back) = stack.view().write(snapfence_image_format::units::GuestOffset::new(at), buffer).await;
            result?;
            buffer = back;
        }
        stack.view().flush().await?;
    }
    Ok(layers)
}

async fn create(path: &Path) -> Result<UringFile> {
    Ok(UringEnvironment.open(&Location::Trusted(path.to_owned()), Access::CreateNew, CacheMode::Direct).await?)
}

/// Runs `future` to its end without a system call that waits: valgrind runs one thread at a time, and does not know that such a call may wait for
/// another one.
fn block_on<T: 'static>(reactor: &Reactor, future: impl Future<Output = T> + 'static) -> T {
    let _entered = reactor.enter();
    let result = std::rc::Rc::new(std::cell::Cell::new(None));
    let slot = std::rc::Rc::clone(&result);
    reactor.executor().spawn(async move { slot.set(Some(future.await)) });
    loop {
        reactor.executor().run_ready();
        if let Some(value) = result.take() {
            return value;
        }
        reactor.turn(Wait::No).expect("a turn");
        std::thread::yield_now();
    }
}

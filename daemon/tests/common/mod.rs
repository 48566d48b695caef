//! A device over a raw image in a temporary directory, served by the daemon's own parts in this process.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use rustix::fs::MemfdFlags;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfenced::connection::{ConnectionEvent, Listening, Server, listen::SOCKET_MODE};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::worker::WorkerThread;
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// A device that can be connected to.
pub(crate) struct Served {
    pub(crate) device: Arc<Device<UringEnvironment>>,
    pub(crate) events: Receiver<ConnectionEvent>,
    // In the order in which they must go.
    pub(crate) server: Option<Server>,
    threads: Vec<WorkerThread<UringEnvironment>>,
    directory: TempDir,
}

pub(crate) fn options(queues: u16) -> DeviceOptions {
    DeviceOptions { name: "vda".into(), serial: "serial-of-vda".into(), read_only: false, queues, queue_size: 256 }
}

impl Served {
    /// A device of `bytes` zeros whose queues share `threads` threads.
    pub(crate) fn new(options: DeviceOptions, bytes: u64, threads: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let image = directory.path().join("image.raw");
        std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
        let writable = !options.read_only;
        let access = if writable { Access::Write } else { Access::Read };
        let file = Reactor::new(8)
            .expect("io_uring")
            .block_on(async move { UringEnvironment.open(&Location::Trusted(image), access, CacheMode::Direct).await })
            .expect("a ring that works")
            .expect("a file that opens");
        let raw = Raw::open(file, writable).expect("a raw image");
        let domain = FenceDomain::new(|| UringEnvironment.now());
        let stack = Stack::new(UringEnvironment, &domain, vec![Arc::new(Layer::Raw(raw))], !writable);
        let device = Device::new(options, stack).expect("good options");
        let threads: Vec<_> =
            (0..threads).map(|index| WorkerThread::spawn(format!("queue {index}"), 128, &domain).expect("a thread")).collect();
        let mut served = {
            let (_, events) = channel();
            Self { device, events, server: None, threads, directory }
        };
        served.listen();
        served
    }

    /// Starts to listen, also again.
    pub(crate) fn listen(&mut self) {
        let (sender, events) = channel();
        self.events = events;
        let listening = Listening::bind(&self.socket(), SOCKET_MODE).expect("a socket");
        let workers = self.threads.iter().map(|thread| thread.handle().clone()).collect();
        // A test that has ended listens no more.
        let report = move |event| {
            let _ = sender.send(event);
        };
        self.server = Some(Server::start(Arc::clone(&self.device), listening, workers, report).expect("a server"));
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("image.raw")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server = None;
        assert!(!self.socket().exists(), "the socket goes with the server");
        self.threads.clear();
    }
}

/// Memory that can be shared with the daemon.
pub(crate) struct SharedMemory {
    pub(crate) file: OwnedFd,
    pub(crate) mmap: Arc<GuestMemoryMmap>,
    pub(crate) len: usize,
}

impl SharedMemory {
    pub(crate) fn new(len: usize) -> Self {
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, len as u64).expect("a length");
        let offset = FileOffset::new(file.try_clone().expect("a descriptor").into(), 0);
        let mmap = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, Some(offset))]).expect("a mapping");
        Self { file, mmap: Arc::new(mmap), len }
    }

    /// Where it is in this process.
    pub(crate) fn base(&self) -> *mut u8 {
        use vm_memory::GuestMemoryBackend;
        self.mmap.get_host_address(GuestAddress(0)).expect("it starts at 0")
    }
}

pub(crate) fn read_image(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("an image")
}

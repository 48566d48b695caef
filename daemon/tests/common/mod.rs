//! Devices served by the daemon's own parts in this process, over real sockets, and front-ends that connect to them.
#![allow(dead_code, unused_imports, reason = "each test file uses a part of it")]

pub(crate) mod daemon;
#[path = "../../src/vring/driver.rs"]
pub(crate) mod driver;
pub(crate) mod machine;
pub(crate) mod queue_thread;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::process::{Gid, Uid};
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location};
use snapfenced::connection::{ConnectionEvent, Listening, Server, listen::SOCKET_MODE};
use snapfenced::device::{Device, DeviceOptions};
use snapfenced::worker::WorkerThread;
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use snapfenced::vring::{GuestMemory, Ring, RingFeatures, RingLayout, Used};

/// When something that must happen has not happened, and never will.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The seed of a random test, from `SNAPFENCE_SEED` if that is set. Printed, to be used again.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("SNAPFENCE_SEED").map_or_else(|_| std::process::id().into(), |seed| seed.parse().expect("a number"));
    eprintln!("SNAPFENCE_SEED={seed}");
    seed
}

/// Runs the future to its end on a ring of its own, as the control thread does.
pub(crate) fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    Reactor::new(8).expect("io_uring").block_on(future).expect("a ring that works")
}

/// Does `work` as another user. The kernel gives each thread credentials of its own, so nothing else of this process changes.
pub(crate) fn as_user<T: Send>(user: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (group, user) = (Gid::from_raw(user), Uid::from_raw(user));
            rustix::thread::set_thread_res_gid(group, group, group).expect("root may");
            rustix::thread::set_thread_res_uid(user, user, user).expect("root may");
            work()
        });
        thread.join().expect("no panic")
    })
}

pub(crate) fn options(queues: u16) -> DeviceOptions {
    DeviceOptions {
        name: "vda".into(),
        serial: "serial-of-vda".into(),
        read_only: false,
        queues,
        queue_size: 256,
        on_no_space: NoSpacePolicy::Hold,
    }
}

/// Queue threads and a directory.
pub(crate) struct Host {
    pub(crate) domain: Arc<FenceDomain>,
    // Ends before the directory goes.
    threads: Vec<WorkerThread<UringEnvironment>>,
    directory: TempDir,
}

impl Host {
    pub(crate) fn new(threads: usize) -> Self {
        let domain = FenceDomain::new(|| UringEnvironment.now());
        let threads = (0..threads)
            .map(|index| WorkerThread::spawn(format!("queue {index}"), 128, Duration::ZERO, &domain).expect("a thread"))
            .collect();
        Self { domain, threads, directory: tempfile::tempdir().expect("a directory") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A device of `bytes` zeros in a new raw image.
    pub(crate) fn serve_raw(&self, options: DeviceOptions, bytes: u64) -> Served {
        let image = self.path(&format!("{}.raw", options.name));
        std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
        self.serve(options, image, Format::Raw)
    }

    /// A device of `bytes` zeros in a new qcow2 image of 64 KiB clusters.
    pub(crate) fn serve_qcow2(&self, options: DeviceOptions, bytes: u64) -> Served {
        let image = self.path(&format!("{}.qcow2", options.name));
        make_qcow2(&image, CreateOptions::standalone(bytes));
        self.serve(options, image, Format::Qcow2)
    }

    /// A device over an image that exists.
    pub(crate) fn serve(&self, options: DeviceOptions, image: PathBuf, format: Format) -> Served {
        let writable = !options.read_only;
        let allowed = AllowedDirectories::new([self.directory.path().to_owned()]);
        let location = Location::Trusted(image.clone());
        let layers = block_on(async move {
            let options = ChainOptions { writable, ..ChainOptions::reading(&allowed) };
            open_chain(&UringEnvironment, &location, format, options).await.expect("an image that opens")
        });
        let layers = layers.into_iter().map(|layer| layer.layer).collect();
        let stack = Stack::new(UringEnvironment, &self.domain, layers, !writable);
        let socket = self.path(&format!("{}.sock", options.name));
        let device = Device::new(options, stack).expect("good options");
        let mut served = Served { device, events: channel().1, server: None, socket, image };
        served.listen(self);
        served
    }
}

impl Host {
    /// A new overlay of our own kind over `top`, ready to take over.
    pub(crate) fn overlay(&self, name: &str, top: &Path, top_format: &str, bytes: u64) -> Arc<Layer<UringEnvironment>> {
        let path = self.path(&format!("{name}.qcow2"));
        make_qcow2(&path, CreateOptions::overlay(bytes, top, top_format));
        block_on(async move {
            let file = UringEnvironment.open(&Location::Trusted(path), Access::Write, CacheMode::Direct).await.expect("a file");
            let layer = Layer::Qcow2(Qcow2::open(file, OpenOptions::writing()).await.expect("an image"));
            layer.warm().await.expect("space");
            layer.flush().await.expect("a disk that flushes");
            Arc::new(layer)
        })
    }
}

/// Makes a file in `directory` that holds an empty ext4 of so many bytes.
pub(crate) fn make_ext4(directory: &Path, bytes: u64) -> PathBuf {
    let path = directory.join("file system");
    std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file");
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-O", "^has_journal"]).arg(&path).status();
    assert!(made.expect("mkfs.ext4").success());
    path
}

/// Has QEMU look for damage and leaks in an image that nobody uses.
pub(crate) fn check_clean(image: &Path) {
    let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(image).output().expect("qemu-img");
    assert!(check.status.success(), "{}: {}", image.display(), String::from_utf8_lossy(&[check.stdout, check.stderr].concat()));
}

/// The disk that an image shows with those beneath it, as QEMU reads it by way of a file in `directory`.
pub(crate) fn read_by_qemu(image: &Path, directory: &Path) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new_in(directory).expect("a file");
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    let converted = Command::new("qemu-img").args(convert).args([image, raw.path()]).output().expect("qemu-img");
    assert!(converted.status.success(), "{}: {}", image.display(), String::from_utf8_lossy(&converted.stderr));
    std::fs::read(raw).expect("a disk")
}

/// Writes an empty image.
pub(crate) fn make_qcow2(path: &Path, options: CreateOptions) {
    let location = Location::Trusted(path.to_owned());
    block_on(async move {
        let file = UringEnvironment.open(&location, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        Qcow2::<UringEnvironment>::create(&file, &options).await.expect("an image");
    });
}

/// A device that can be connected to.
pub(crate) struct Served {
    pub(crate) device: Arc<Device<UringEnvironment>>,
    pub(crate) events: Receiver<ConnectionEvent>,
    pub(crate) server: Option<Server>,
    pub(crate) socket: PathBuf,
    pub(crate) image: PathBuf,
}

impl Served {
    /// Starts to listen, also again.
    pub(crate) fn listen(&mut self, host: &Host) {
        let (sender, events) = channel();
        self.events = events;
        let listening = Listening::bind(&self.socket, SOCKET_MODE).expect("a socket");
        let workers = host.threads.iter().map(|thread| thread.handle().clone()).collect();
        // A test that has ended listens no more.
        let report = move |event| {
            let _ = sender.send(event);
        };
        self.server = Some(Server::start(Arc::clone(&self.device), listening, workers, report).expect("a server"));
    }

    /// Waits for the front-end to come or go.
    pub(crate) fn await_event(&self, expected: ConnectionEvent) {
        assert_eq!(self.events.recv_timeout(PATIENCE), Ok(expected));
    }

    /// Ends the connection and brings the image to rest.
    pub(crate) fn close(mut self) -> PathBuf {
        self.server = None;
        assert!(!self.socket.exists(), "the socket goes with the server");
        let stack = Arc::clone(self.device.stack());
        block_on(async move { stack.close().await }).expect("a stack that can be closed");
        self.image.clone()
    }
}

/// Memory that can be shared with the daemon.
pub(crate) struct SharedMemory {
    pub(crate) file: OwnedFd,
    pub(crate) mmap: Arc<GuestMemoryMmap>,
    pub(crate) start: u64,
    pub(crate) len: usize,
}

impl SharedMemory {
    pub(crate) fn new(len: usize) -> Self {
        Self::at(0, len)
    }

    /// At this guest address.
    pub(crate) fn at(start: u64, len: usize) -> Self {
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, len as u64).expect("a length");
        let offset = FileOffset::new(file.try_clone().expect("a descriptor").into(), 0);
        let mmap = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(start), len, Some(offset))]).expect("a mapping");
        Self { file, mmap: Arc::new(mmap), start, len }
    }

    /// Where it is in this process.
    pub(crate) fn base(&self) -> *mut u8 {
        use vm_memory::GuestMemoryBackend;
        self.mmap.get_host_address(GuestAddress(self.start)).expect("it starts there")
    }
}

pub(crate) fn read_image(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("an image")
}

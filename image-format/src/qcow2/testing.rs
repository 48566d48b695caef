//! What the tests of this format share: images in memory, programs that we did not write, a disk as a plain byte vector.

use std::future::{Ready, ready};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::buffer::Buffer;
use crate::runtime::{Executor, Unpark};
use crate::storage::simulated::{OperationKind, SimulatedEnvironment, Simulation};
use crate::storage::{Access, CacheMode, Environment, FileIdentity, Location, Sharing, Storage, StorageExt, Transferred};
use crate::units::{GuestOffset, GuestRange, HostOffset};

use super::{CreateOptions, OpenOptions, Qcow2};

/// A file in memory whose operations complete at once.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryFile {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl MemoryFile {
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)) }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("no panics").clone()
    }
}

impl Storage for MemoryFile {
    type Transfer = Ready<Transferred>;

    fn read(&self, at: HostOffset, mut into: Buffer) -> Self::Transfer {
        let bytes = self.bytes.lock().expect("no panics");
        let start = usize::try_from(at.get()).expect("fits").min(bytes.len());
        let end = start.saturating_add(into.len()).min(bytes.len());
        into.copy_in(0, &bytes[start..end]);
        let len = into.len();
        into.fill_zero(end - start..len);
        ready((Ok(()), into))
    }

    fn write(&self, at: HostOffset, from: Buffer) -> Self::Transfer {
        let mut bytes = self.bytes.lock().expect("no panics");
        let start = usize::try_from(at.get()).expect("fits");
        let end = start + from.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        from.copy_out(0, &mut bytes[start..end]);
        ready((Ok(()), from))
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, at: HostOffset, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().expect("no panics");
        let end = usize::try_from(at.get() + len).expect("fits");
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }

    async fn punch(&self, at: HostOffset, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().expect("no panics");
        let start = usize::try_from(at.get()).expect("fits").min(bytes.len());
        let end = usize::try_from(at.get() + len).expect("fits").min(bytes.len());
        bytes[start..end].fill(0);
        Ok(())
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().expect("no panics").len() as u64)
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.lock().expect("no panics").resize(usize::try_from(len).expect("fits"), 0);
        Ok(())
    }

    async fn allocated_bytes(&self) -> io::Result<u64> {
        self.length().await
    }

    fn alignment(&self) -> u64 {
        512
    }

    fn identity(&self) -> FileIdentity {
        FileIdentity { device: 0, inode: Arc::as_ptr(&self.bytes) as u64 }
    }

    async fn set_sharing(&self, _sharing: Sharing) -> io::Result<()> {
        Ok(())
    }
}

/// An environment of which only the files are used.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryOnly {
    random: Arc<AtomicU64>,
}

impl Environment for MemoryOnly {
    type File = MemoryFile;

    async fn open(&self, _at: &Location, _access: Access, _cache: CacheMode) -> io::Result<MemoryFile> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn flush_directory(&self, _directory: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_clock(&self) -> Duration {
        Duration::ZERO
    }

    async fn sleep_until(&self, _deadline: Duration) {}

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        crate::runtime::spawn(task);
    }

    fn random(&self) -> u64 {
        self.random.fetch_add(1, Ordering::Relaxed)
    }
}

/// Runs a future to its end on an executor of its own.
pub(super) fn run<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    struct Never;
    impl Unpark for Never {
        fn unpark(&self) {}
    }
    Executor::new(Never).block_on(future, || panic!("the future waits for something that nobody does"))
}

/// A folder for one test, removed at its end.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `qemu-img` in the folder and expects success.
    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        let output = Command::new("qemu-img").args(arguments).current_dir(self.0.path()).output().expect("qemu-img runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
        text
    }

    /// Runs commands of `qemu-io` on a file in the folder and expects success of each.
    pub(super) fn qemu_io(&self, file: &str, format: &str, commands: &[String]) {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).current_dir(self.0.path());
        for line in commands {
            command.args(["-c", line]);
        }
        let output = command.arg(file).output().expect("qemu-io runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let failed = text.contains("failed") || text.contains("error") || text.contains("mismatch");
        assert!(output.status.success() && !failed, "qemu-io {file} {commands:?}: {text}");
    }

    pub(super) fn load(&self, name: &str) -> MemoryFile {
        MemoryFile::from_bytes(std::fs::read(self.path(name)).expect("the file exists"))
    }

    pub(super) fn store(&self, name: &str, file: &MemoryFile) {
        std::fs::write(self.path(name), file.to_bytes()).expect("the folder is writable");
    }
}

/// The first cluster of an image of version 3 of 1 MiB with clusters of 64 KiB, by qemu's docs/interop/qcow2.rst: without extensions, followed by the
/// refcount table, a refcount block and the L1 table, one cluster each.
pub(crate) fn plain_header() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &0x3_0000_u64.to_be_bytes());
    put(48, &0x1_0000_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    bytes
}

/// Creates an image on a simulated disk, opens it for writing and gives it to `body`.
pub(super) fn with_image<F>(seed: u64, options: CreateOptions, body: impl FnOnce(SimulatedEnvironment, SimulatedImage) -> F + 'static)
where
    F: Future<Output = ()> + 'static,
{
    let environment = SimulatedEnvironment::new(seed);
    let inner = environment.clone();
    Simulation::on(environment).block_on(async move {
        let at = Location::Trusted(Path::new(SIMULATED_IMAGE).to_owned());
        let file = inner.open(&at, Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        SimulatedImage::create(&file, &options).await.expect("created");
        let image = SimulatedImage::open(file, OpenOptions::writing()).await.expect("opens");
        body(inner, image).await;
    });
}

/// Where [`with_image`] puts the image.
pub(super) const SIMULATED_IMAGE: &str = "/a.qcow2";

/// An image on a simulated disk.
pub(super) type SimulatedImage = Qcow2<SimulatedEnvironment>;

/// Flushes of all files of the disk.
pub(super) fn flushes_so_far(disk: &SimulatedEnvironment) -> u64 {
    disk.counts().get(&OperationKind::Flush).copied().unwrap_or(0)
}

/// Writes to a part of one cluster of the disk, which gets a place of its own if it has none.
pub(super) async fn write(image: &SimulatedImage, at: u64, len: u64) {
    let reservation = image.reserve(GuestRange::new(GuestOffset::new(at), len)).await.expect("space");
    let bytes = vec![7; usize::try_from(len).expect("a small write")];
    image.inner.file.write_bytes(reservation.host(), &bytes).await.expect("a sound disk");
    reservation.commit(|| {});
}

//! What the model drives: anything that is a disk on a simulated medium.

use std::cell::Cell;
use std::fmt::Display;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, SimulatedFile};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange, HostOffset};

/// A disk as a guest uses it. Errors are for people only.
pub(crate) trait Disk: 'static {
    /// What an operation fails with.
    type Error: Display;

    /// Size in bytes.
    fn size(&self) -> u64;

    /// Ends when the disk takes a request; what is called on it next, without waiting in between, is that request. Gives its generation: the
    /// number of cuts that it is after.
    fn admitted(&self) -> impl Future<Output = u64> {
        std::future::ready(0)
    }

    /// Fills the buffer.
    fn read(&self, at: GuestOffset, into: Buffer) -> impl Future<Output = (Result<(), Self::Error>, Buffer)>;

    /// Writes the buffer.
    fn write(&self, at: GuestOffset, from: Buffer) -> impl Future<Output = (Result<(), Self::Error>, Buffer)>;

    /// Makes the range read as zeros.
    fn write_zeroes(&self, range: GuestRange, unmap: bool) -> impl Future<Output = Result<(), Self::Error>>;

    /// Makes the range read as zeros or as before.
    fn discard(&self, range: GuestRange) -> impl Future<Output = Result<(), Self::Error>>;

    /// Makes everything durable that has ended.
    fn flush(&self) -> impl Future<Output = Result<(), Self::Error>>;
}

/// How a kind of disk is made, found again, and looked at.
pub(crate) trait Subject: 'static {
    /// The disk.
    type Disk: Disk;

    /// Makes it, durably, of `sectors` sectors that read as zeros.
    fn create(&self, environment: &SimulatedEnvironment, sectors: u64);

    /// Opens it: after its creation, an orderly end or a crash.
    fn open(self: Rc<Self>, environment: SimulatedEnvironment) -> impl Future<Output = Result<Self::Disk, String>> + 'static;

    /// Ends its use in an orderly way.
    fn close(self: Rc<Self>, disk: Arc<Self::Disk>) -> impl Future<Output = Result<(), String>> + 'static;

    /// Lets another program look at the files while nobody has them open. Says whether there is one for such files.
    ///
    /// # Errors
    /// If they are not what they should be.
    fn check(&self, environment: &SimulatedEnvironment, after_crash: bool) -> Result<bool, String> {
        let _ = (environment, after_crash);
        Ok(false)
    }
}

/// One file as a disk: the model against the simulation itself.
#[derive(Debug)]
pub(crate) struct FileSubject;

/// See [`FileSubject`].
#[derive(Debug)]
pub(crate) struct FileDisk {
    file: SimulatedFile,
    /// In bytes.
    size: u64,
    /// A flush has failed: no other, not even one under way then, proves anything any more.
    failed: Cell<bool>,
}

const FILE: &str = "/disk";

impl Subject for FileSubject {
    type Disk = FileDisk;

    fn create(&self, environment: &SimulatedEnvironment, sectors: u64) {
        environment.put(FILE, &vec![0; sectors as usize * 512]);
    }

    async fn open(self: Rc<Self>, environment: SimulatedEnvironment) -> Result<FileDisk, String> {
        let opened = async {
            let file = environment.open(&Location::Trusted(FILE.into()), Access::Write, CacheMode::Direct).await?;
            Ok::<_, io::Error>(FileDisk { size: file.length().await?, file, failed: Cell::new(false) })
        };
        opened.await.map_err(|error| error.to_string())
    }

    async fn close(self: Rc<Self>, disk: Arc<FileDisk>) -> Result<(), String> {
        disk.flush().await.map_err(|error| error.to_string())
    }
}

impl Disk for FileDisk {
    type Error = io::Error;

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, at: GuestOffset, into: Buffer) -> (io::Result<()>, Buffer) {
        self.file.read(HostOffset::new(at.get()), into).await
    }

    async fn write(&self, at: GuestOffset, from: Buffer) -> (io::Result<()>, Buffer) {
        self.file.write(HostOffset::new(at.get()), from).await
    }

    async fn write_zeroes(&self, range: GuestRange, unmap: bool) -> io::Result<()> {
        let at = HostOffset::new(range.start.get());
        if unmap {
            return self.file.punch(at, range.len).await;
        }
        self.file.write(at, Buffer::Owned(AlignedBuffer::zeroed(range.len as usize))).await.0
    }

    async fn discard(&self, range: GuestRange) -> io::Result<()> {
        self.file.punch(HostOffset::new(range.start.get()), range.len).await
    }

    async fn flush(&self) -> io::Result<()> {
        let result = self.file.flush().await;
        self.failed.set(self.failed.get() || result.is_err());
        if self.failed.get() { Err(io::Error::other("a flush has failed")) } else { Ok(()) }
    }
}

//! Our side: stacks over io_uring.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::join_all;
use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::chain::{AllowedDirectories, ChainCause, ChainOptions, Format, open_chain, open_file};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CheckOptions, CreateOptions, Qcow2, check};
use snapfence_image_format::stack::{FenceDomain, Stack, View};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::operation::Operation;
use crate::qemu::{LOCK_PAUSE, LOCK_TRIES};

/// Bytes to read at a time.
const PIECE: u64 = 1 << 20;

type UringStack = Stack<UringEnvironment>;

/// How images are opened.
#[derive(Clone, Debug)]
pub(crate) struct Opening {
    pub(crate) top: PathBuf,
    pub(crate) format: Format,
    pub(crate) data_files: Vec<PathBuf>,
    pub(crate) cache: CacheMode,
}

/// Runs a future that does I/O.
pub(crate) fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    Reactor::new(64).expect("io_uring").block_on(future).expect("the ring works")
}

impl Opening {
    async fn stack(&self, writable: bool) -> Arc<UringStack> {
        let allowed = AllowedDirectories::default().with_directory_of(&self.top);
        let mut tries = 0;
        let layers = loop {
            let options = ChainOptions { data_files: &self.data_files, cache: self.cache, writable, ..ChainOptions::reading(&allowed) };
            match open_chain(&UringEnvironment, &Location::Trusted(self.top.clone()), self.format, options).await {
                Ok(layers) => break layers,
                Err(error) if matches!(error.cause, ChainCause::InUse { .. }) && tries < LOCK_TRIES => {
                    tries += 1;
                    UringEnvironment.sleep_until(UringEnvironment.now() + LOCK_PAUSE).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let layers: Vec<Arc<Layer<_>>> = layers.into_iter().map(|open| open.layer).collect();
        let domain = FenceDomain::new(|| UringEnvironment.now());
        Stack::new(UringEnvironment, &domain, layers, !writable)
    }

    /// The whole disk, and whether our own check finds nothing in the top.
    pub(crate) fn read(&self) -> Vec<u8> {
        let opening = self.clone();
        block_on(async move {
            let stack = opening.stack(false).await;
            let bytes = read_all(&stack).await;
            drop(stack);
            if opening.format == Format::Qcow2 {
                opening.check().await;
            }
            bytes
        })
    }

    async fn check(&self) {
        let file = open_file(&UringEnvironment, &Location::Trusted(self.top.clone()), false, self.cache).await.expect("it opens");
        let report = check(&file, &CheckOptions::default()).await.unwrap_or_else(|error| panic!("our check: {error}"));
        assert!(report.is_clean() && !report.dirty, "our check: {report:#?}");
    }

    /// Does operations, some of them at the same time, and closes the stack. Returns what the disk read as before closing.
    pub(crate) fn write(&self, operations: Vec<Operation>, mut chance: Chance) -> Vec<u8> {
        let opening = self.clone();
        block_on(async move {
            let stack = opening.stack(true).await;
            let mut rest = operations.as_slice();
            while !rest.is_empty() {
                let most = 1 + chance.index(6);
                let together = independent(rest, most);
                for (operation, result) in
                    rest.iter().zip(join_all(rest[..together].iter().map(|operation| perform(&stack, operation))).await)
                {
                    result.unwrap_or_else(|error| panic!("{operation:?}: {error}"));
                }
                rest = &rest[together..];
            }
            let bytes = read_all(&stack).await;
            stack.close().await.unwrap_or_else(|error| panic!("closing: {error}"));
            bytes
        })
    }

    /// Makes the disk larger.
    pub(crate) fn grow(&self, size: u64) {
        let opening = self.clone();
        block_on(async move {
            let stack = opening.stack(true).await;
            stack.grow(size).await.unwrap_or_else(|error| panic!("growing to {size} bytes: {error}"));
        });
    }
}

/// How many operations from the first on, `most` at most, do not touch one another's bytes.
fn independent(operations: &[Operation], most: usize) -> usize {
    let most = most.min(operations.len());
    (1..most).find(|&next| operations[..next].iter().any(|earlier| earlier.overlaps(&operations[next]))).unwrap_or(most)
}

async fn perform(stack: &Arc<UringStack>, operation: &Operation) -> Result<(), LayerError> {
    let view: Arc<View<_>> = stack.view();
    let range = |at, len| GuestRange::new(GuestOffset::new(at), len);
    match *operation {
        Operation::Write { at, len, fill } => {
            let mut bytes = AlignedBuffer::zeroed(len as usize);
            fill.put(&mut bytes);
            view.write(GuestOffset::new(at), bytes.into()).await.0
        }
        Operation::Zero { at, len, unmap } => view.write_zeroes(range(at, len), unmap).await,
        Operation::Discard { at, len } => view.discard(range(at, len)).await,
        Operation::Flush => view.flush().await,
        Operation::Compress { .. } => panic!("we write no compressed clusters"),
    }
}

async fn read_all(stack: &Arc<UringStack>) -> Vec<u8> {
    let size = stack.virtual_size();
    let mut all = Vec::with_capacity(size as usize);
    for at in (0..size).step_by(PIECE as usize) {
        let buffer = AlignedBuffer::zeroed(PIECE.min(size - at) as usize);
        let (result, buffer) = stack.view().read(GuestOffset::new(at), buffer.into()).await;
        result.unwrap_or_else(|error| panic!("reading at {at:#x}: {error}"));
        all.extend_from_slice(&buffer.into_owned());
    }
    all
}

/// Makes an image.
pub(crate) fn create(path: &Path, options: CreateOptions) {
    let location = Location::Trusted(path.to_owned());
    block_on(async move {
        let file = UringEnvironment.open(&location, Access::CreateNew, CacheMode::Buffered).await.expect("a new file");
        Qcow2::<UringEnvironment>::create(&file, &options).await.unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert!(file.length().await.expect("a length") > 0);
    });
}

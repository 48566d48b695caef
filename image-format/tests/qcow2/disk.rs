//! A stack with a qcow2 image on top, and beside it an array of bytes that says what must be in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};
use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{OpenOptions, Qcow2};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location};
use snapfence_image_format::units::{GuestOffset, GuestRange};

pub(crate) const SECTOR: u64 = 512;

/// Runs a future on a ring of its own.
pub(crate) fn on_a_ring<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    Reactor::new(64).expect("a ring").block_on(future).expect("the ring works")
}

/// Opens a stack for writing: a qcow2 image and, beneath it, perhaps one other image.
pub(crate) async fn open_stack<E: Environment>(environment: &E, top: &Path, backing: Option<(PathBuf, &'static str)>) -> Arc<Stack<E>> {
    let mut layers = Vec::new();
    if let Some((path, format)) = backing {
        let file = open_file(environment, &path, Access::Read).await;
        layers.push(Arc::new(match format {
            "raw" => Layer::Raw(Raw::open(file, false).await.expect("whole sectors")),
            _ => Layer::Qcow2(Qcow2::open(file, OpenOptions::reading()).await.expect("the backing file opens")),
        }));
    }
    let file = open_file(environment, top, Access::Write).await;
    let image = Qcow2::open(file, OpenOptions::writing()).await.unwrap_or_else(|error| panic!("the image opens: {error}"));
    layers.push(Arc::new(Layer::Qcow2(image)));
    Stack::new(environment.clone(), &FenceDomain::new(|| Duration::ZERO), layers, false)
}

/// Opens a file whose place the test knows.
pub(crate) async fn open_file<E: Environment>(environment: &E, path: &Path, access: Access) -> E::File {
    environment.open(&Location::Trusted(path.to_owned()), access, CacheMode::Direct).await.expect("the file is there")
}

/// Opens a stack over real files, on the present ring.
pub(crate) async fn open_real(top: &Path, backing: Option<(PathBuf, &'static str)>) -> Arc<Stack<UringEnvironment>> {
    open_stack(&UringEnvironment, top, backing).await
}

/// What one request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Write,
    Zero { unmap: bool },
    Discard,
}

/// Random requests, and what they must leave.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    pub(crate) chance: Chance,
}

/// A request on its way.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) range: GuestRange,
    mark: u64,
}

impl Request {
    /// A change of `range`. Its bytes, if it has any, are those of no other request.
    pub(crate) fn new(kind: Kind, range: GuestRange, chance: &mut Chance) -> Self {
        Self { kind, range, mark: chance.number() }
    }

    fn data(&self) -> Vec<u8> {
        let sectors = self.range.start.get() / SECTOR..self.range.end().get() / SECTOR;
        sectors.flat_map(|sector| (self.mark ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes().repeat(64)).collect()
    }

    /// Whether `bytes`, at `range` within its own, may be what it has left there.
    pub(crate) fn leaves(&self, range: GuestRange, bytes: &[u8]) -> bool {
        match self.kind {
            Kind::Write => {
                let at = (range.start - self.range.start) as usize;
                self.data()[at..].starts_with(bytes)
            }
            Kind::Zero { .. } | Kind::Discard => bytes.iter().all(|&byte| byte == 0),
        }
    }

    /// Carries it out.
    pub(crate) async fn send<E: Environment>(&self, stack: &Stack<E>) {
        self.try_send(stack).await.unwrap_or_else(|error| panic!("{self:?}: {error}"));
    }

    /// Carries it out, or not.
    pub(crate) async fn try_send<E: Environment>(&self, stack: &Stack<E>) -> Result<(), LayerError> {
        let view = stack.view();
        match self.kind {
            Kind::Write => {
                let data = AlignedBuffer::copy_of(&self.data());
                view.write(self.range.start, data.into()).await.0
            }
            Kind::Zero { unmap } => view.write_zeroes(self.range, unmap).await,
            Kind::Discard => view.discard(self.range).await,
        }
    }

    /// What it leaves in the whole disk. Discards are settled by reading what is there.
    pub(crate) async fn apply<E: Environment>(&self, stack: &Stack<E>, bytes: &mut [u8]) {
        let place = &mut bytes[span(self.range)];
        match self.kind {
            Kind::Write => place.copy_from_slice(&self.data()),
            Kind::Zero { .. } => place.fill(0),
            Kind::Discard => {
                let found = read(stack, self.range).await;
                for (old, new) in place.chunks_mut(512).zip(found.chunks(512)) {
                    assert!(new == old || new.iter().all(|&byte| byte == 0), "{self:?} left something else");
                    old.copy_from_slice(new);
                }
            }
        }
    }
}

/// The bytes of a range of the disk as indexes.
pub(crate) fn span(range: GuestRange) -> std::ops::Range<usize> {
    range.start.get() as usize..range.end().get() as usize
}

/// What the guest sees in `range`.
pub(crate) async fn read<E: Environment>(stack: &Stack<E>, range: GuestRange) -> Vec<u8> {
    let (result, buffer) = stack.view().read(range.start, AlignedBuffer::zeroed(range.len as usize).into()).await;
    result.unwrap_or_else(|error| panic!("reading {range}: {error}"));
    buffer.into_owned().to_vec()
}

/// Expects that the whole disk is as the array says.
pub(crate) async fn expect_disk<E: Environment>(stack: &Stack<E>, bytes: &[u8], context: &str) {
    const PIECE: usize = 1 << 20;
    for (number, expected) in bytes.chunks(PIECE).enumerate() {
        let range = GuestRange::new(GuestOffset::new((number * PIECE) as u64), expected.len() as u64);
        let found = read(stack, range).await;
        if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
            panic!("{context}: byte {} is {:#x} and should be {:#x}", number * PIECE + at, found[at], expected[at]);
        }
    }
}

impl Model {
    /// A range of whole sectors, short or long, anywhere or at the borders of `unit`.
    pub(crate) fn range(&mut self, unit: u64) -> GuestRange {
        let size = self.bytes.len() as u64;
        let longest = match self.chance.below(4) {
            0 => SECTOR,
            1 => 4096,
            2 => unit,
            _ => 3 * unit,
        };
        let start = self.chance.below(size / SECTOR) * SECTOR;
        let len = (1 + self.chance.below(longest / SECTOR)) * SECTOR;
        let range = GuestRange::new(GuestOffset::new(start), len.min(size - start));
        let whole = range.widen(unit).intersection(GuestRange::new(GuestOffset::ZERO, size));
        if self.chance.happens(1, 4) { whole } else { range }
    }

    /// A random request. `unit`: the size of a cluster.
    pub(crate) fn request(&mut self, unit: u64) -> Request {
        let kind = match self.chance.below(10) {
            0 => Kind::Discard,
            1 => Kind::Zero { unmap: true },
            2 => Kind::Zero { unmap: false },
            _ => Kind::Write,
        };
        let range = self.range(unit);
        Request::new(kind, range, &mut self.chance)
    }

    /// Sends some requests at the same time that do not overlap, and takes over what they leave.
    pub(crate) async fn batch<E: Environment>(&mut self, stack: &Stack<E>, unit: u64) {
        let mut requests: Vec<Request> = Vec::new();
        for _ in 0..1 + self.chance.below(8) {
            let request = self.request(unit);
            if !requests.iter().any(|other| other.range.overlaps(request.range)) {
                requests.push(request);
            }
        }
        let flush = self.chance.happens(1, 8);
        let flushing = async {
            if flush {
                stack.view().flush().await.expect("flushed");
            }
        };
        join(join_all(requests.iter().map(|request| request.send(stack))), flushing).await;
        for request in &requests {
            request.apply(stack, &mut self.bytes).await;
        }
        let range = self.range(unit);
        let found = read(stack, range).await;
        assert!(found == self.bytes[span(range)], "{range} after {requests:?}");
    }
}

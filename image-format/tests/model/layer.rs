//! One layer as a disk: raw, or qcow2 of any layout that `qemu-img create` makes. What the stack does for many layers is done here for one, in
//! the plainest way that keeps the layer's contract.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::error::{LayerError, Structure};
use snapfence_image_format::extent::{ExtentList, Mapping};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::raw::Raw;
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange, HostOffset};

use crate::disk::{Disk, Subject};
use crate::for_seeds;
use crate::workload::{Plan, run, run_with};

type SimulatedLayer = Layer<SimulatedEnvironment>;

/// A layer with nothing beneath it.
#[derive(Debug)]
pub(crate) struct LayerDisk {
    layer: SimulatedLayer,
    /// Requests under way, by number: clusters that a flush has unmapped are reused when all requests from before have ended.
    requests: RefCell<Requests>,
    ended: WaitQueue,
}

#[derive(Debug, Default)]
struct Requests {
    next: u64,
    under_way: BTreeSet<u64>,
}

/// Counts a request as under way until it is dropped.
struct Request<'a>(&'a LayerDisk, u64);

impl Drop for Request<'_> {
    fn drop(&mut self) {
        self.0.requests.borrow_mut().under_way.remove(&self.1);
        self.0.ended.notify_all();
    }
}

impl LayerDisk {
    pub(crate) fn new(layer: SimulatedLayer) -> Self {
        Self { layer, requests: RefCell::default(), ended: WaitQueue::new() }
    }

    pub(crate) fn layer(&self) -> &SimulatedLayer {
        &self.layer
    }

    fn request(&self) -> Request<'_> {
        let mut requests = self.requests.borrow_mut();
        let number = requests.next;
        requests.next += 1;
        requests.under_way.insert(number);
        Request(self, number)
    }

    async fn map(&self, range: GuestRange) -> Result<ExtentList, LayerError> {
        let mut extents = ExtentList::new();
        self.layer.map(range, &mut extents).await?;
        assert_eq!(extents.as_slice().first().map(|first| first.range.start), Some(range.start), "a mapping begins where it should");
        assert_eq!(extents.end(), Some(range.end()), "a mapping is complete");
        Ok(extents)
    }

    async fn read_range(&self, range: GuestRange) -> Result<AlignedBuffer, LayerError> {
        let mut bytes = AlignedBuffer::zeroed(range.len as usize);
        for extent in self.map(range).await?.as_slice() {
            let start = (extent.range.start - range.start) as usize;
            let into = &mut bytes[start..start + extent.range.len as usize];
            match extent.mapping {
                Mapping::Unallocated | Mapping::Zero => into.fill(0),
                Mapping::Data { host, .. } => {
                    let buffer = Buffer::Owned(AlignedBuffer::zeroed(into.len()));
                    let (result, buffer) = self.layer.data_file().read(host, buffer).await;
                    result.map_err(|error| LayerError::io("read", Structure::Data, host, error))?;
                    into.copy_from_slice(&buffer.into_owned());
                }
                Mapping::Compressed => {
                    let mut next = extent.range.start;
                    while next < extent.range.end() {
                        let (cluster, content) = self.layer.read_compressed(next).await?.expect("still compressed");
                        let part = cluster.intersection(extent.range);
                        let (from, to) = ((part.start - cluster.start) as usize, (part.start - extent.range.start) as usize);
                        into[to..to + part.len as usize].copy_from_slice(&content[from..from + part.len as usize]);
                        next = part.end();
                    }
                }
            }
        }
        Ok(bytes)
    }

    async fn write_data(&self, host: HostOffset, bytes: &[u8]) -> Result<(), LayerError> {
        let (result, _) = self.layer.data_file().write(host, Buffer::Owned(AlignedBuffer::copy_of(bytes))).await;
        result.map_err(|error| LayerError::io("write", Structure::Data, host, error))
    }

    async fn write_range(&self, range: GuestRange, bytes: &[u8]) -> Result<(), LayerError> {
        for piece in range.split_at_multiples(self.layer.cluster_bytes().unwrap_or(1 << 62)) {
            for extent in self.map(piece).await?.as_slice() {
                let start = (extent.range.start - range.start) as usize;
                let bytes = &bytes[start..start + extent.range.len as usize];
                match extent.mapping {
                    Mapping::Data { host, in_place: true } => self.write_data(host, bytes).await?,
                    _ => self.write_new(extent.range, bytes).await?,
                }
            }
        }
        Ok(())
    }

    async fn write_new(&self, range: GuestRange, bytes: &[u8]) -> Result<(), LayerError> {
        let reservation = self.layer.reserve(range).await?;
        let whole = reservation.range(range);
        assert!(whole.start <= range.start && range.end() <= whole.end(), "a reservation covers what was asked for");
        let mut content = AlignedBuffer::zeroed(whole.len as usize);
        if whole != range {
            // Bytes past the end of the disk are nobody's.
            let inside = whole.intersection(GuestRange::new(GuestOffset::ZERO, self.layer.virtual_size()));
            content[..inside.len as usize].copy_from_slice(&self.read_range(inside).await?);
        }
        let start = (range.start - whole.start) as usize;
        content[start..start + bytes.len()].copy_from_slice(bytes);
        self.write_data(reservation.host(), &content).await?;
        reservation.commit(|| {});
        Ok(())
    }

    /// The whole mapping units in a range, and what is left before and after.
    fn whole_units(&self, range: GuestRange) -> (GuestRange, [GuestRange; 2]) {
        let whole = range.shrink(self.layer.mapping_unit().unwrap_or(512));
        if whole.is_empty() {
            return (GuestRange::new(range.start, 0), [range, GuestRange::new(range.end(), 0)]);
        }
        (whole, [GuestRange::between(range.start, whole.start), GuestRange::between(whole.end(), range.end())])
    }

    async fn release_unmapped(&self) -> Result<(), LayerError> {
        let unmapped = self.layer.take_unmapped();
        let bound = self.requests.borrow().next;
        self.ended.wait_until(|| self.requests.borrow().under_way.range(..bound).next().is_none().then_some(())).await;
        self.layer.release(unmapped).await
    }
}

impl Disk for LayerDisk {
    type Error = LayerError;

    fn size(&self) -> u64 {
        self.layer.virtual_size()
    }

    async fn read(&self, at: GuestOffset, mut into: Buffer) -> (Result<(), LayerError>, Buffer) {
        let _request = self.request();
        match self.read_range(GuestRange::new(at, into.len() as u64)).await {
            Ok(bytes) => {
                into.copy_in(0, &bytes);
                (Ok(()), into)
            }
            Err(error) => (Err(error), into),
        }
    }

    async fn write(&self, at: GuestOffset, from: Buffer) -> (Result<(), LayerError>, Buffer) {
        let _request = self.request();
        let mut bytes = vec![0; from.len()];
        from.copy_out(0, &mut bytes);
        let result = self.write_range(GuestRange::new(at, from.len() as u64), &bytes).await;
        (result, from)
    }

    async fn write_zeroes(&self, range: GuestRange, unmap: bool) -> Result<(), LayerError> {
        let _request = self.request();
        let (whole, rest) = self.whole_units(range);
        if !whole.is_empty() && !self.layer.write_zeroes(whole, unmap, &|_| {}).await? {
            self.write_range(whole, &vec![0; whole.len as usize]).await?;
        }
        for range in rest {
            if !range.is_empty() {
                self.write_range(range, &vec![0; range.len as usize]).await?;
            }
        }
        Ok(())
    }

    async fn discard(&self, range: GuestRange) -> Result<(), LayerError> {
        let _request = self.request();
        let (whole, _) = self.whole_units(range);
        if whole.is_empty() { Ok(()) } else { self.layer.discard(whole, false, &|_| {}).await }
    }

    async fn flush(&self) -> Result<(), LayerError> {
        self.layer.flush().await?;
        self.release_unmapped().await
    }
}

/// A raw image.
#[derive(Debug)]
pub(crate) struct RawSubject;

const IMAGE: &str = "/image";

pub(crate) async fn open_image(
    environment: &SimulatedEnvironment,
    path: &str,
    access: Access,
) -> Result<<SimulatedEnvironment as Environment>::File, String> {
    environment.open(&Location::Trusted(path.into()), access, CacheMode::Direct).await.map_err(|error| error.to_string())
}

impl Subject for RawSubject {
    type Disk = LayerDisk;

    fn create(&self, environment: &SimulatedEnvironment, sectors: u64) {
        environment.put(IMAGE, &vec![0; sectors as usize * 512]);
    }

    async fn open(self: Rc<Self>, environment: SimulatedEnvironment) -> Result<LayerDisk, String> {
        let file = open_image(&environment, IMAGE, Access::Write).await?;
        Ok(LayerDisk::new(Layer::Raw(Raw::open(file, true).await.map_err(|error| error.to_string())?)))
    }

    async fn close(self: Rc<Self>, disk: Arc<LayerDisk>) -> Result<(), String> {
        disk.layer().freeze().await.map_err(|error| error.to_string())
    }
}

#[test]
fn a_raw_image_keeps_what_was_flushed() {
    for_seeds("raw", 300, |seed| run(RawSubject, Plan::new(seed)));
}

#[test]
fn a_raw_image_whose_operations_fail_keeps_what_was_flushed() {
    for_seeds("raw with faults", 300, |seed| {
        let kind = [OperationKind::Write, OperationKind::Flush, OperationKind::Punch, OperationKind::Read][seed as usize % 4];
        run_with(RawSubject, Plan::new(seed), |environment| {
            environment.inject(if seed & 4 == 0 { Fault::once(kind, seed / 4) } else { Fault::lasting(kind, seed / 4) });
            true
        })
    });
}

//! One layer of a stack, whatever its format.
//!
//! A layer knows its own file and nothing of the layers beneath; the stack puts them together. The write side of a copy-on-write format works
//! in two steps. [`reserve`](Layer::reserve) finds out where bytes may go and keeps everybody else away from that part of the mapping; the
//! stack writes the data; [`Reservation::commit`] makes the mapping point there. A reservation that is dropped leaves the mapping as it was.

use std::sync::Arc;

use crate::buffer::AlignedBuffer;
use crate::error::LayerError;
use crate::extent::{Extent, ExtentList};
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::rounds::Rounds;
use crate::storage::kept::{Failure, Incarnation, MemoryKeeper};
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// An open image that is one layer of a stack.
#[derive(Debug)]
pub enum Layer<E: Environment> {
    /// Bytes as the guest sees them.
    Raw(Raw<E>),
    /// qcow2, version 2 or 3.
    Qcow2(Qcow2<E>),
}

/// Leave to write data to a place and to map it afterwards.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its clusters back"]
pub enum Reservation<E: Environment> {
    /// The bytes already have a place of their own; nothing needs to be mapped. Holds nothing.
    InPlace {
        /// Position of the first reserved byte.
        host: HostOffset,
    },
    /// New space in a qcow2 image.
    Qcow2(crate::qcow2::Allocation<E>),
}

/// Clusters that the mapping no longer refers to, durably, and whose space may be used again once no request can still be writing to it. The
/// layer keeps the list itself; dropping this only means that they stay unused until the layer is frozen.
#[derive(Debug, Default)]
#[must_use = "clusters that are forgotten stay unused"]
pub struct Unmapped {
    /// Number of the layer's list; `None` for an empty one.
    pub(crate) batch: Option<u64>,
}

impl Unmapped {
    /// Whether there is nothing to release.
    pub fn is_empty(&self) -> bool {
        self.batch.is_none()
    }
}

impl<E: Environment> Layer<E> {
    /// Size of the disk in bytes as this layer has it. A layer beneath may be smaller or larger than the one on top.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.virtual_size(),
            Self::Qcow2(image) => image.virtual_size(),
        }
    }

    /// The unit of the mapping in bytes, a power of two of at least 512: within one unit (cluster or, with extended L2 entries,
    /// sub-cluster) all bytes have the same mapping. `None` where everything is in one place.
    pub fn mapping_unit(&self) -> Option<u64> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => Some(image.geometry().subcluster_bytes()),
        }
    }

    /// The file that holds this layer's data: where [`Mapping::Data`](crate::extent::Mapping::Data) points.
    pub fn data_file(&self) -> &E::File {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(image) => image.data_file(),
        }
    }

    /// The image file itself.
    pub fn file(&self) -> &E::File {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(image) => image.file(),
        }
    }

    /// Appends this layer's mappings of `range`, complete and in order. Bytes past this layer's virtual size are `Unallocated`.
    ///
    /// # Errors
    /// If a table cannot be read or makes no sense.
    pub async fn map(&self, range: GuestRange, extents: &mut ExtentList) -> Result<(), LayerError> {
        match self {
            Self::Raw(raw) => {
                raw.map(range, extents);
                Ok(())
            }
            Self::Qcow2(image) => image.map(range, extents).await,
        }
    }

    /// Reads ahead of [`map`](Self::map) what that will need of a small range.
    pub(crate) async fn prefetch(&self, range: GuestRange) {
        match self {
            Self::Raw(_) => {}
            Self::Qcow2(image) => image.prefetch(range).await,
        }
    }

    /// Lets go of what was read of the tables for `range` and nothing else: whoever calls this remembers what [`map`](Self::map) has said.
    pub(crate) fn forget(&self, range: GuestRange) {
        match self {
            Self::Raw(_) => {}
            Self::Qcow2(image) => image.forget(range),
        }
    }

    /// How many parts of its tables are in memory.
    #[cfg(test)]
    pub(crate) fn tables_in_memory(&self) -> usize {
        match self {
            Self::Raw(_) => 0,
            Self::Qcow2(image) => image.slices_in_memory(),
        }
    }

    /// The decompressed bytes of the whole cluster around `at`, and the cluster's range. `None` if it is not compressed: between
    /// [`map`](Self::map) and this call somebody may have written it anew.
    ///
    /// # Errors
    /// If it cannot be read or decompressed.
    pub async fn read_compressed(&self, at: GuestOffset) -> Result<Option<(GuestRange, AlignedBuffer)>, LayerError> {
        match self {
            Self::Raw(_) => Ok(None),
            Self::Qcow2(image) => image.read_compressed(at).await,
        }
    }

    /// Reserves space for a write to `range`, which must not be empty nor cross one of this layer's clusters ([`Self::cluster_bytes`]).
    ///
    /// Waits while another reservation or an unmapping holds an overlapping part of the mapping.
    ///
    /// # Errors
    /// If the layer is read-only or failed, the disk is full, or tables cannot be read.
    pub async fn reserve(&self, range: GuestRange) -> Result<Reservation<E>, LayerError> {
        match self {
            Self::Raw(raw) => Ok(Reservation::InPlace { host: raw.place(range)? }),
            Self::Qcow2(image) => image.reserve(range).await,
        }
    }

    /// Bytes within which one reservation must stay, a power of two. `None`: no limit.
    pub fn cluster_bytes(&self) -> Option<u64> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => Some(image.geometry().cluster_bytes()),
        }
    }

    /// Whether the layer takes writes now.
    ///
    /// # Errors
    /// `ReadOnly`, or `Failed` after an earlier failure.
    pub fn admit_write(&self) -> Result<(), LayerError> {
        match self {
            Self::Raw(raw) => raw.admit_write(),
            Self::Qcow2(image) => image.admit_write(),
        }
    }

    /// Makes `range`, whole mapping units or up to the end of the disk, read as zeros without writing them. With `unmap` the space is given
    /// up where possible. `changed` is told of each change of the mapping while others are still kept away from it.
    ///
    /// Returns `false` if the format or medium cannot and nothing changed: the caller writes zeros instead. Freed space is not used again
    /// before it went through [`take_unmapped`](Self::take_unmapped) and [`release`](Self::release).
    ///
    /// # Errors
    /// As for [`reserve`](Self::reserve).
    pub async fn write_zeroes(&self, range: GuestRange, unmap: bool, changed: &dyn Fn(Extent)) -> Result<bool, LayerError> {
        match self {
            Self::Raw(raw) => raw.write_zeroes(range, unmap).await,
            Self::Qcow2(image) => image.write_zeroes(range, unmap, changed).await,
        }
    }

    /// Gives up the space of `range`, whole mapping units or up to the end of the disk; afterwards it reads as zeros if there is a layer
    /// beneath (so that nothing older shows through), and as zeros or as before if there is none. Where that needs a mapping that the format
    /// lacks (version 2 above a backing file, a part of a compressed cluster), nothing happens. `changed` as for
    /// [`write_zeroes`](Self::write_zeroes).
    ///
    /// # Errors
    /// As for [`reserve`](Self::reserve).
    pub async fn discard(&self, range: GuestRange, has_layer_beneath: bool, changed: &dyn Fn(Extent)) -> Result<(), LayerError> {
        match self {
            Self::Raw(raw) => raw.discard(range).await,
            Self::Qcow2(image) => image.discard(range, has_layer_beneath, changed).await,
        }
    }

    /// Makes every write, commit and unmapping that ended before this call durable, in the crash order of docs/crash-order.md. Concurrent
    /// calls share their device flushes.
    ///
    /// # Errors
    /// If anything fails: the layer then refuses all further writes and flushes ([`LayerError::Failed`]).
    pub async fn flush(&self) -> Result<(), LayerError> {
        match self {
            Self::Raw(raw) => raw.flush().await,
            Self::Qcow2(image) => image.flush().await,
        }
    }

    /// Ends when no write, commit or unmapping that ended before this call can be lost with the process, however it ends; a power cut is for
    /// [`flush`](Self::flush). Does nothing where a keeper sees to it ([`keep`](Self::keep)), or nobody has asked for it.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn outlast_process(&self) -> Result<(), LayerError> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.outlast_process().await,
        }
    }

    /// Whether nothing has to be done for [`outlast_process`](Self::outlast_process).
    pub fn outlasts_process(&self) -> bool {
        match self {
            Self::Raw(_) => true,
            Self::Qcow2(image) => image.outlasts_process(),
        }
    }

    /// What has been unmapped durably since the last call.
    pub fn take_unmapped(&self) -> Unmapped {
        match self {
            Self::Raw(_) => Unmapped::default(),
            Self::Qcow2(image) => image.take_unmapped(),
        }
    }

    /// Gives clusters back to the allocator and punches them out of the file. Only when nobody can be writing to them any more. Does nothing
    /// once the layer has been frozen, which gives them back as well.
    ///
    /// # Errors
    /// If reference counts cannot be read or written.
    pub async fn release(&self, unmapped: Unmapped) -> Result<(), LayerError> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.release(unmapped).await,
        }
    }

    /// Gets ready for quick first writes all over the disk: tables and some free clusters allocated, durable and cached.
    ///
    /// # Errors
    /// As for [`reserve`](Self::reserve).
    pub async fn warm(&self) -> Result<(), LayerError> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.warm().await,
        }
    }

    /// Ends writing: flushes, gives unused and unmapped space back, flushes again. Reads go on. Writes are refused with
    /// [`LayerError::ReadOnly`] from the call on, and once it has succeeded the file never changes again. No request may be using the layer any
    /// more.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn freeze(&self) -> Result<(), LayerError> {
        self.freeze_after(std::future::ready(())).await
    }

    fn rounds(&self) -> &Rounds {
        match self {
            Self::Raw(raw) => raw.rounds(),
            Self::Qcow2(image) => image.rounds(),
        }
    }

    /// That the layer cannot be made durable is remembered in `keeper` from now on, beyond the process. Only the first call counts.
    pub(crate) fn remember_failures(&self, keeper: &Arc<dyn MemoryKeeper>) {
        match self {
            Self::Raw(raw) => raw.rounds().remember_in(keeper, vec![Incarnation::of(raw.file())]),
            Self::Qcow2(image) => image.remember_failures(keeper),
        }
    }

    /// The failure of a flush of the layer since the machine was started and before it was opened: what had been written until then may be seen now
    /// and still be gone after a power cut, whatever later flushes say. Known if there is a keeper.
    pub fn earlier_failure(&self) -> Option<Failure> {
        self.rounds().earlier_failure()
    }

    /// As [`earlier_failure`](Self::earlier_failure), and also of one that somebody else has met since who makes the layer durable.
    pub(crate) fn present_failure(&self) -> Option<Failure> {
        self.rounds().present_failure()
    }

    /// Remembers that the layer could not be made durable, where that was tried past the layer.
    pub(crate) fn note_failure(&self) {
        self.rounds().note_failure();
    }

    /// Remembers that those who write to the layer know of the failure of a flush, if there was one.
    pub(crate) fn note_told(&self) {
        self.rounds().add_to_failure(Failure { told: true, rewritten: false });
    }

    /// Begins to keep what must not be lost with the process, in an image that was opened without a keeper and has not been written to yet.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush), or if there is no room.
    pub async fn keep(&self, keeper: &Arc<dyn MemoryKeeper>) -> Result<(), LayerError> {
        match self {
            Self::Raw(_) => {
                self.remember_failures(keeper);
                Ok(())
            }
            Self::Qcow2(image) => image.keep(keeper).await,
        }
    }

    /// As [`freeze`](Self::freeze), while requests may still be reading, but none writing. `readers_gone` is awaited before space is given back
    /// that was unmapped, if there is any: it ends when every request has ended that may know an old place of some bytes.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn freeze_after(&self, readers_gone: impl Future<Output = ()>) -> Result<(), LayerError> {
        match self {
            Self::Raw(raw) => raw.freeze().await,
            Self::Qcow2(image) => image.freeze(readers_gone).await,
        }
    }
}

impl<E: Environment> Reservation<E> {
    /// What must be written at [`host`](Self::host): the reserved range, widened to whole mapping units where they are new. The caller fills
    /// the difference with what the guest sees there now.
    pub fn range(&self, asked: GuestRange) -> GuestRange {
        match self {
            Self::InPlace { .. } => asked,
            Self::Qcow2(allocation) => allocation.range(),
        }
    }

    /// Position of the first byte of [`range`](Self::range) in the layer's data file.
    pub fn host(&self) -> HostOffset {
        match self {
            Self::InPlace { host } => *host,
            Self::Qcow2(allocation) => allocation.host(),
        }
    }

    /// Whether the file is known to read as zeros at the reserved place, so that zeros need not be written there.
    pub fn reads_zero(&self) -> bool {
        match self {
            Self::InPlace { .. } => false,
            Self::Qcow2(allocation) => allocation.reads_zero(),
        }
    }

    /// Maps the range to the place, now that the data has been written there (completely; it need not be durable). In memory; durable after
    /// the next flush of the layer. `publish` is called if the mapping has changed, and while others are still kept away from it.
    pub fn commit(self, publish: impl FnOnce()) {
        match self {
            Self::InPlace { .. } => {}
            Self::Qcow2(allocation) => allocation.commit(publish),
        }
    }

    /// Gives the place up, for others to use at once. No write to it may be under way; where that is not certain, the reservation must be dropped
    /// instead.
    pub fn give_up(self) {
        match self {
            Self::InPlace { .. } => {}
            Self::Qcow2(allocation) => allocation.give_up(),
        }
    }
}

/// The virtual size and file position of a storage that is its own guest disk.
pub(crate) fn same_position(at: GuestOffset) -> HostOffset {
    HostOffset::new(at.get())
}

#[expect(dead_code, reason = "states that layers are shared between queue threads; checked by the compiler")]
fn layers_are_shared<E: Environment>(layer: Layer<E>)
where
    E::File: Storage,
{
    fn shared<T: Send + Sync>(_: T) {}
    shared(layer);
}

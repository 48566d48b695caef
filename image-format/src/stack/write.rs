//! Changing the disk: overwriting in place, and copy-on-write into the top layer.

use std::sync::Arc;

use super::View;
use super::map::{Piece, Place};
use super::read::{all_ended, buffer_len, position};
use crate::buffer::{AlignedBuffer, Buffer, SharedVectors};
use crate::error::{LayerError, Structure};
use crate::extent::{Extent, Mapping};
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange, SECTOR_BYTES};

/// Zeros are written in pieces of at most this many bytes where nothing better works.
const ZERO_PIECE_BYTES: u64 = 1 << 20;

impl<E: Environment> View<E> {
    /// Writes the buffer to the disk at `at`.
    ///
    /// # Errors
    /// `OutOfRange` unless it is whole sectors within the disk, `ReadOnly`; whatever the layers report. Any part may have been written then.
    pub async fn write(self: &Arc<Self>, at: GuestOffset, from: Buffer) -> (Result<(), LayerError>, Buffer) {
        let range = GuestRange::new(at, from.len() as u64);
        if let Err(error) = self.admit_change(range) {
            return (Err(error), from);
        }
        if range.is_empty() {
            return (Ok(()), from);
        }
        if let Some(host) = self.known_place(range).and_then(|place| self.overwritable(place)) {
            let (result, buffer) = self.top().data_file().write(host, from).await;
            let result = match result {
                // The place may be one that the file does not know yet.
                Ok(()) if self.top().outlasts_process() => Ok(()),
                Ok(()) => Box::pin(self.top().outlast_process()).await,
                Err(error) => Err(LayerError::io("write", Structure::Data, host, error)),
            };
            return (result, buffer);
        }
        Box::pin(self.write_to_several(range, from)).await
    }

    /// [`write`](Self::write) where that is not one overwriting of what the map knows.
    async fn write_to_several(self: &Arc<Self>, range: GuestRange, from: Buffer) -> (Result<(), LayerError>, Buffer) {
        let pieces = match self.resolve(range).await {
            Ok(pieces) => pieces,
            Err(error) => return (Err(error), from),
        };
        let (vectors, owned) = match from {
            Buffer::Shared(vectors) => (vectors, None),
            Buffer::Owned(buffer) => (AlignedBuffer::copy_of(&buffer).into_shared(), Some(buffer)),
        };
        let result = async {
            self.write_pieces(range, &pieces, &vectors).await?;
            self.top().outlast_process().await
        };
        (result.await, owned.map_or(Buffer::Shared(vectors), Buffer::Owned))
    }

    /// Makes the range read as zeros. `unmap` allows to give its space up.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub async fn write_zeroes(self: &Arc<Self>, range: GuestRange, unmap: bool) -> Result<(), LayerError> {
        self.admit_change(range)?;
        let unit = self.top().mapping_unit().unwrap_or(SECTOR_BYTES);
        let whole = self.shrink_to_units(range, unit);
        if whole.is_empty() {
            return self.write_zero_bytes(range).await;
        }
        if !self.top().write_zeroes(whole, unmap, &|extent| self.record(extent)).await? {
            return self.write_zero_bytes(range).await;
        }
        self.top().outlast_process().await?;
        self.write_zero_bytes(GuestRange::between(range.start, whole.start)).await?;
        self.write_zero_bytes(GuestRange::between(whole.end(), range.end())).await
    }

    /// Gives up the space of the whole units in the range; their bytes read as zeros afterwards or, without a layer beneath, may stay.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub async fn discard(self: &Arc<Self>, range: GuestRange) -> Result<(), LayerError> {
        self.admit_change(range)?;
        let unit = self.top().mapping_unit().unwrap_or(SECTOR_BYTES);
        let whole = self.shrink_to_units(range, unit);
        if whole.is_empty() {
            return Ok(());
        }
        self.top().discard(whole, self.layers.len() > 1, &|extent| self.record(extent)).await?;
        self.top().outlast_process().await
    }

    fn admit_change(&self, range: GuestRange) -> Result<(), LayerError> {
        self.check_range(range, self.virtual_size())?;
        if self.stack().is_none_or(|stack| stack.is_read_only()) {
            return Err(LayerError::ReadOnly);
        }
        self.top().admit_write()
    }

    /// The whole units in a range; a last unit that the end of the disk cuts short counts as whole.
    fn shrink_to_units(&self, range: GuestRange, unit: u64) -> GuestRange {
        let size = self.virtual_size();
        let end = if range.end().get() == size { range.end() } else { range.end().align_down(unit) };
        GuestRange::between(range.start.align_up(unit), end)
    }

    /// Where bytes at `place` may be overwritten, if they may.
    fn overwritable(&self, place: Place) -> Option<crate::units::HostOffset> {
        match place {
            Place::Data { layer, host, in_place: true } if layer == self.top_in_map() => Some(host),
            _ => None,
        }
    }

    async fn write_pieces(self: &Arc<Self>, range: GuestRange, pieces: &[Piece], from: &SharedVectors) -> Result<(), LayerError> {
        let cluster = self.top().cluster_bytes();
        // What most first writes to a part of an overlay are.
        if let [piece] = pieces
            && self.overwritable(piece.place).is_none()
            && range.split_at_multiples(cluster.unwrap_or(1 << 62)).nth(1).is_none()
        {
            return self.write_new(range, from.clone()).await;
        }
        let mut writes = Vec::new();
        for piece in pieces {
            let host = self.overwritable(piece.place);
            let unit = if host.is_some() { None } else { cluster };
            // A reservation stays within a cluster; an overwrite goes on for as long as the bytes do.
            for part in piece.range.split_at_multiples(unit.unwrap_or(1 << 62)) {
                let skip = position(range, part.start);
                let bytes = from.slice(skip..skip + buffer_len(part));
                let host = host.map(|host| host + (part.start - piece.range.start));
                writes.push(async move {
                    match host {
                        Some(host) => {
                            let (result, _) = self.top().data_file().write(host, Buffer::Shared(bytes)).await;
                            result.map_err(|error| LayerError::io("write", Structure::Data, host, error))
                        }
                        None => self.write_new(part, bytes).await,
                    }
                });
            }
        }
        all_ended(writes).await
    }

    /// Writes to a part of one cluster that the top layer may not overwrite where it is.
    async fn write_new(self: &Arc<Self>, range: GuestRange, from: SharedVectors) -> Result<(), LayerError> {
        let top = self.top();
        let reservation = top.reserve(range).await?;
        let whole = reservation.range(range);
        let mut start = whole.start;
        let mut parts = Vec::new();
        let before = self.fill(GuestRange::between(whole.start, range.start), reservation.reads_zero()).await?;
        match before {
            Some(bytes) => parts.push(bytes),
            None => start = range.start,
        }
        parts.push(from);
        parts.extend(self.fill(GuestRange::between(range.end(), whole.end()), reservation.reads_zero()).await?);
        let host = reservation.host() + (start - whole.start);
        let bytes = if parts.len() == 1 { parts.remove(0) } else { SharedVectors::join(parts) };
        let (result, _) = top.data_file().write(host, Buffer::Shared(bytes)).await;
        if let Err(error) = result {
            reservation.give_up();
            return Err(LayerError::io("write", Structure::Data, host, error));
        }
        let place = Mapping::Data { host: reservation.host(), in_place: true };
        reservation.commit(|| self.record(Extent { range: whole, mapping: place }));
        Ok(())
    }

    /// What the guest sees in `range` now, to be written beside new data in the same unit. `None` if nothing needs to be written.
    async fn fill(self: &Arc<Self>, range: GuestRange, reads_zero: bool) -> Result<Option<SharedVectors>, LayerError> {
        if range.is_empty() {
            return Ok(None);
        }
        // Requests from before the cut may still be writing to the same unit in an older layer, and their bytes belong in the copy.
        if let (Some(fence), Some(stack)) = (&self.fence, self.stack()) {
            fence.fence().ended().await;
            if let Some(older) = self.top_number().checked_sub(1) {
                stack.retirements.all_up_to(older).await;
            }
        }
        let pieces = self.resolve(range).await?;
        if reads_zero && pieces.iter().all(|piece| matches!(piece.place, Place::Zero { .. })) {
            return Ok(None);
        }
        let (result, buffer) = Box::pin(self.read(range.start, AlignedBuffer::zeroed(buffer_len(range)).into())).await;
        result?;
        Ok(Some(buffer.into_owned().into_shared()))
    }

    /// Writes zeros as data.
    async fn write_zero_bytes(self: &Arc<Self>, range: GuestRange) -> Result<(), LayerError> {
        for part in range.split_at_multiples(ZERO_PIECE_BYTES) {
            let zeros = AlignedBuffer::zeroed(buffer_len(part));
            self.write(part.start, zeros.into()).await.0?;
        }
        Ok(())
    }

    /// Takes a change of the top layer's table over into the map.
    fn record(&self, extent: Extent) {
        let layer = self.top_in_map();
        let place = match extent.mapping {
            Mapping::Data { host, in_place } => Place::Data { layer, host, in_place },
            Mapping::Compressed => Place::Compressed { layer },
            // An unallocated unit of a layer with nothing beneath reads as zeros; above another layer discards leave zero units.
            Mapping::Zero | Mapping::Unallocated => Place::Zero { layer },
        };
        let piece = Piece { range: extent.range, place };
        if let Some(stack) = self.stack() {
            // A fence may have replaced the map meanwhile, and those who fill the new one may have read the table before. Requests of this
            // view still use the old one.
            let present = &stack.present.load().map;
            present.record(piece);
            if !Arc::ptr_eq(present, &self.map) {
                self.map.record(piece);
            }
        }
    }
}

/// Where one byte is; for tests and tools.
impl<E: Environment> View<E> {
    /// The pieces of `range`, in order: which layer holds what, and where.
    ///
    /// # Errors
    /// `OutOfRange` unless they are whole sectors within the disk; whatever the layers report.
    pub async fn map(&self, range: GuestRange) -> Result<Vec<Piece>, LayerError> {
        self.check_range(range, self.virtual_size())?;
        self.resolve(GuestRange::new(GuestOffset::new(range.start.get()), range.len)).await.map(|pieces| pieces.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::layer::Layer;
    use crate::qcow2::{CreateOptions, OpenOptions, Qcow2};
    use crate::raw::Raw;
    use crate::stack::{FenceDomain, Stack};
    use crate::storage::kept::{MemoryKeeper, TestKeeper};
    use crate::storage::simulated::{SimulatedEnvironment, SimulatedFile, Simulation};
    use crate::storage::{Access, CacheMode, Location};

    const DISK_BYTES: u64 = 1 << 20;

    fn filled(byte: u8, len: usize) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::zeroed(len);
        buffer.fill(byte);
        buffer
    }

    async fn open(environment: &SimulatedEnvironment, name: &str, access: Access) -> SimulatedFile {
        environment.open(&Location::Trusted(Path::new(name).to_owned()), access, CacheMode::Direct).await.expect("a file")
    }

    /// An empty image above a raw one, whose changes would outlive the process where its version has a place for that.
    async fn overlay(environment: &SimulatedEnvironment, name: &str, version: u32, extended_l2: bool) -> Arc<Layer<SimulatedEnvironment>> {
        let keeper: Arc<dyn MemoryKeeper> = Arc::new(TestKeeper::default());
        let file = open(environment, name, Access::CreateNew).await;
        let options = CreateOptions { version, extended_l2, ..CreateOptions::overlay(DISK_BYTES, "base", "raw") };
        Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
        let options = OpenOptions { keeper: Some(Arc::clone(&keeper)), ..OpenOptions::writing() };
        let image = Qcow2::open(file, options).await.expect("an image");
        image.keep(&keeper).await.expect("sound");
        Arc::new(Layer::Qcow2(image))
    }

    /// An empty overlay on a base of sevens.
    fn with_overlay<F>(
        version: u32,
        body: impl FnOnce(SimulatedEnvironment, Arc<FenceDomain>, Arc<Stack<SimulatedEnvironment>>) -> F + 'static,
    ) where
        F: Future<Output = ()> + 'static,
    {
        let disk = SimulatedEnvironment::new(u64::from(version));
        let environment = disk.clone();
        Simulation::on(disk).block_on(async move {
            environment.put("/base", &vec![7; DISK_BYTES as usize]);
            let base = Arc::new(Layer::Raw(Raw::open(open(&environment, "/base", Access::Read).await, false).await.expect("raw")));
            let top = overlay(&environment, "/top", version, false).await;
            let domain = FenceDomain::new(|| std::time::Duration::ZERO);
            let stack = Stack::new(environment.clone(), &domain, vec![base, top], false);
            body(environment, domain, stack).await;
        });
    }

    /// Another request has made the place, and has not told the file yet.
    #[test]
    fn overwriting_what_only_memory_knows_waits_until_the_process_may_die() {
        for version in [2, 3] {
            with_overlay(version, async move |_, _, stack| {
                let view = stack.view();
                let first = GuestRange::new(GuestOffset::ZERO, 4096);
                view.read(first.start, AlignedBuffer::zeroed(4096).into()).await.0.expect("sound");
                view.write_new(first, filled(8, 4096).into_shared()).await.expect("space");
                assert_eq!(view.top().outlasts_process(), version == 3);
                let second = GuestOffset::new(4096);
                assert!(view.known_place(GuestRange::new(second, 4096)).and_then(|place| view.overwritable(place)).is_some());
                view.write(second, filled(9, 4096).into()).await.0.expect("sound");
                assert!(view.top().outlasts_process());
            });
        }
    }

    /// A request from before the cut goes on with its own view and map, and those after it with theirs, which is another where entries are finer.
    #[test]
    fn what_who_began_before_the_cut_writes_after_it_is_seen_by_both() {
        for finer in [false, true] {
            with_overlay(3, async move |environment, domain, stack| {
                let read = async |view: &Arc<View<SimulatedEnvironment>>, at: u64| {
                    let (result, buffer) = view.read(GuestOffset::new(at), AlignedBuffer::zeroed(512).into()).await;
                    result.expect("sound");
                    buffer.into_owned()[0]
                };
                assert_eq!(read(&stack.view(), 0).await, 7);
                let fence = domain.fence();
                let before = stack.publish(stack.prepare_overlay(overlay(&environment, "/next", 3, finer).await, &fence));
                let after = stack.view();
                assert_eq!(Arc::ptr_eq(&before.map, &after.map), !finer);
                // Both maps know that the base has it.
                assert_eq!(read(&after, 0).await, 7);
                before.write(GuestOffset::ZERO, filled(9, 512).into()).await.0.expect("sound");
                for (at, byte) in [(0, 9), (512, 7)] {
                    assert_eq!([read(&before, at).await, read(&after, at).await], [byte; 2]);
                }
            });
        }
    }
}

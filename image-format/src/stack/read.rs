//! Finding and reading what the guest sees.

use std::sync::Arc;

use futures_util::future::join_all;

use super::map::{Miss, PAGE_BYTES, Piece, Pieces, Place, push_piece};
use super::{View, whole_disk};
use crate::buffer::{AlignedBuffer, Buffer, SharedVectors};
use crate::error::{LayerError, Structure};
use crate::extent::{ExtentList, Mapping};
use crate::layer::Layer;
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange};

impl<E: Environment> View<E> {
    /// Fills the buffer with the bytes of the disk from `at` on.
    ///
    /// # Errors
    /// `OutOfRange` unless they are whole sectors within the disk; whatever the layers report.
    pub async fn read(self: &Arc<Self>, at: GuestOffset, into: Buffer) -> (Result<(), LayerError>, Buffer) {
        let range = GuestRange::new(at, into.len() as u64);
        if let Err(error) = self.check_range(range, self.virtual_size()) {
            return (Err(error), into);
        }
        if range.is_empty() {
            return (Ok(()), into);
        }
        if let Some(Place::Data { layer, host, .. }) = self.known_place(range) {
            let (result, buffer) = self.layers[usize::from(layer)].data_file().read(host, into).await;
            return (result.map_err(|error| LayerError::io("read", Structure::Data, host, error)), buffer);
        }
        Box::pin(self.read_from_several(range, into)).await
    }

    /// [`read`](Self::read) where that is not one transfer of what the map knows.
    async fn read_from_several(&self, range: GuestRange, into: Buffer) -> (Result<(), LayerError>, Buffer) {
        let pieces = match self.resolve(range).await {
            Ok(pieces) => pieces,
            Err(error) => return (Err(error), into),
        };
        if let [Piece { place: Place::Data { layer, host, .. }, .. }] = pieces[..] {
            let (result, buffer) = self.layers[usize::from(layer)].data_file().read(host, into).await;
            return (result.map_err(|error| LayerError::io("read", Structure::Data, host, error)), buffer);
        }
        match into {
            Buffer::Shared(vectors) => (self.read_pieces(range, &pieces, &vectors).await, Buffer::Shared(vectors)),
            Buffer::Owned(mut buffer) => {
                // Several places fill parts of one buffer at once, which needs vectors that can be sliced.
                let vectors = AlignedBuffer::zeroed(buffer.len()).into_shared();
                let result = self.read_pieces(range, &pieces, &vectors).await;
                vectors.copy_out(0, &mut buffer);
                (result, Buffer::Owned(buffer))
            }
        }
    }

    /// Reads each piece of `range` into its part of `vectors`, all at once.
    async fn read_pieces(&self, range: GuestRange, pieces: &[Piece], vectors: &SharedVectors) -> Result<(), LayerError> {
        let reads = pieces.iter().map(|piece| async {
            let from = position(range, piece.range.start);
            let part = vectors.slice(from..from + buffer_len(piece.range));
            self.read_piece(*piece, part).await
        });
        all_ended(reads).await
    }

    async fn read_piece(&self, piece: Piece, into: SharedVectors) -> Result<(), LayerError> {
        match piece.place {
            Place::Zero { .. } => {
                into.fill_zero(0..into.len());
                Ok(())
            }
            Place::Data { layer, host, .. } => {
                let (result, _) = self.layers[usize::from(layer)].data_file().read(host, Buffer::Shared(into)).await;
                result.map_err(|error| LayerError::io("read", Structure::Data, host, error))
            }
            Place::Compressed { layer } => self.read_compressed(layer, piece.range, into).await,
        }
    }

    async fn read_compressed(&self, layer: u16, range: GuestRange, into: SharedVectors) -> Result<(), LayerError> {
        let mut next = range.start;
        while next < range.end() {
            let rest = GuestRange::between(next, range.end());
            let Some((cluster, bytes)) = self.layers[usize::from(layer)].read_compressed(next).await? else {
                // Somebody has written to it since we looked it up.
                let pieces = self.resolve(rest).await?;
                let vectors = into.slice(position(range, next)..buffer_len(range));
                return Box::pin(self.read_pieces(rest, &pieces, &vectors)).await;
            };
            let wanted = rest.intersection(cluster);
            let skip = position(cluster, wanted.start);
            into.copy_in(position(range, wanted.start), &bytes[skip..skip + buffer_len(wanted)]);
            next = wanted.end();
        }
        Ok(())
    }

    /// Where the bytes of `range` are, if that is one place and nothing has to be read to know it. Nearly all requests need no more, and their
    /// futures no room for the rest.
    pub(super) fn known_place(&self, range: GuestRange) -> Option<Place> {
        if let [only] = &self.layers[..]
            && let Layer::Raw(raw) = &**only
        {
            return raw.place_of(range).map(|(host, in_place)| Place::Data { layer: 0, host, in_place });
        }
        let mut pieces = Pieces::new();
        self.map.lookup(range, self.top_in_map(), &mut pieces).ok()?;
        match pieces[..] {
            [piece] => Some(piece.place),
            _ => None,
        }
    }

    /// Where the bytes of `range` are, for this view.
    pub(super) async fn resolve(&self, range: GuestRange) -> Result<Pieces, LayerError> {
        let mut pieces = Pieces::new();
        if let [only] = &self.layers[..]
            && only.mapping_unit().is_none()
        {
            walk(&self.layers, range, &mut pieces).await?;
            return Ok(pieces);
        }
        loop {
            pieces.clear();
            match self.map.lookup(range, self.top_in_map(), &mut pieces) {
                Ok(()) => return Ok(pieces),
                Err(Miss::NoPage(at)) => self.fill_page(at).await?,
                Err(Miss::Unusable) => {
                    pieces.clear();
                    walk(&self.layers, range, &mut pieces).await?;
                    return Ok(pieces);
                }
            }
        }
    }

    /// Fills the map's page around `at` from the tables of all layers that the stack has now.
    async fn fill_page(&self, at: GuestOffset) -> Result<(), LayerError> {
        let page = self.map.page_to_fill(at);
        let Some(duty) = page.fill_duty().await else { return Ok(()) };
        // The list is taken after the page is in place, so that a layer which is missing in it cannot have been written to before.
        let layers = self.stack().map_or_else(|| Arc::clone(&self.layers), |stack| Arc::clone(&stack.view().layers));
        let range = duty.page().range().intersection(whole_disk(self.virtual_size()));
        let mut pieces = Pieces::new();
        walk(&layers, range, &mut pieces).await?;
        self.map.fill(duty.page(), &pieces);
        duty.complete();
        debug_assert!(range.len <= PAGE_BYTES, "a page covers at most its own range");
        Ok(())
    }
}

/// Asks the layers from the top down where the bytes of `range` are, and appends the answer in order.
pub(super) async fn walk<E: Environment>(layers: &[Arc<Layer<E>>], range: GuestRange, pieces: &mut Pieces) -> Result<(), LayerError> {
    let mut found: Vec<Piece> = Vec::new();
    let mut open = vec![range];
    let mut extents = ExtentList::new();
    for (number, layer) in layers.iter().enumerate().rev() {
        let number = u16::try_from(number).expect("a stack has at most MAX_LAYERS layers");
        let mut beneath = Vec::new();
        let disk = whole_disk(layer.virtual_size());
        for range in open {
            // Past the end of a layer that is shorter than those above nothing shows through, not even what lies deeper.
            let past = GuestRange::between(range.start.max(disk.end()), range.end());
            if !past.is_empty() {
                found.push(Piece { range: past, place: Place::Zero { layer: number } });
            }
            let inside = range.intersection(disk);
            if inside.is_empty() {
                continue;
            }
            extents.clear();
            layer.map(inside, &mut extents).await?;
            for extent in extents.as_slice() {
                let place = match extent.mapping {
                    Mapping::Unallocated => {
                        beneath.push(extent.range);
                        continue;
                    }
                    Mapping::Zero => Place::Zero { layer: number },
                    Mapping::Data { host, in_place } => Place::Data { layer: number, host, in_place },
                    Mapping::Compressed => Place::Compressed { layer: number },
                };
                found.push(Piece { range: extent.range, place });
            }
        }
        open = beneath;
        if open.is_empty() {
            break;
        }
    }
    found.extend(open.into_iter().map(|range| Piece { range, place: Place::Zero { layer: 0 } }));
    found.sort_unstable_by_key(|piece| piece.range.start);
    for piece in found {
        push_piece(pieces, piece);
    }
    Ok(())
}

/// Runs transfers at the same time, to the end of each: one that went on after its request had failed could still change what the buffer or
/// the file is used for next.
pub(super) async fn all_ended(transfers: impl IntoIterator<Item = impl Future<Output = Result<(), LayerError>>>) -> Result<(), LayerError> {
    join_all(transfers).await.into_iter().collect()
}

/// How far into the bytes of `range` the position `at` is.
pub(super) fn position(range: GuestRange, at: GuestOffset) -> usize {
    usize::try_from(at - range.start).expect("a position in a buffer that exists")
}

/// The length of a range whose bytes are in memory.
pub(super) fn buffer_len(range: GuestRange) -> usize {
    usize::try_from(range.len).expect("the length of a buffer that exists")
}

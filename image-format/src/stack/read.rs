//! Finding and reading what the guest sees.

use std::sync::Arc;

use futures_util::future::join_all;
use smallvec::SmallVec;

use super::map::{Miss, PAGE_BYTES, Piece, Pieces, Place, push_piece};
use super::{View, whole_disk};
use crate::buffer::{AlignedBuffer, Buffer, SharedVectors};
use crate::error::{LayerError, Structure};
use crate::extent::{Extent, ExtentList, Mapping};
use crate::layer::Layer;
use crate::storage::{Environment, Storage};
use crate::units::{GuestOffset, GuestRange};

/// Layers whose tables are read at a time, at most.
const MOST_AHEAD: usize = 64;

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
            walk(&self.layers, range, None, &mut pieces).await?;
            return Ok(pieces);
        }
        loop {
            pieces.clear();
            match self.map.lookup(range, self.top_in_map(), &mut pieces) {
                Ok(()) => return Ok(pieces),
                Err(Miss::NoPage(at)) => self.fill_page(at).await?,
                Err(Miss::Unusable) => {
                    pieces.clear();
                    walk(&self.layers, range, None, &mut pieces).await?;
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
        walk(&layers, range, Some(duty.page().range()), &mut pieces).await?;
        self.map.fill(duty.page(), &pieces);
        duty.complete();
        debug_assert!(range.len <= PAGE_BYTES, "a page covers at most its own range");
        Ok(())
    }
}

/// Asks the layers from the top down where the bytes of `range` are, and appends the answer in order. Whoever remembers the answer names what he
/// remembers all of: layers let go of tables for nothing else, unless compressed data is looked up there again. Of a deep chain, what each layer keeps
/// in memory counts.
pub(super) async fn walk<E: Environment>(
    layers: &[Arc<Layer<E>>],
    range: GuestRange,
    remembered: Option<GuestRange>,
    pieces: &mut Pieces,
) -> Result<(), LayerError> {
    let mut found: Vec<Piece> = Vec::new();
    let mut open = vec![range];
    let forget = |layer: &Layer<E>| {
        if let Some(remembered) = remembered {
            layer.forget(remembered);
        }
    };
    // More and more layers at a time, the further down what is looked for lies.
    let (mut looked_ahead, mut ahead) = (layers.len(), 1);
    for (number, layer) in layers.iter().enumerate().rev() {
        if open.is_empty() {
            layers[looked_ahead..=number].iter().for_each(|layer| forget(layer));
            break;
        }
        if number < looked_ahead {
            looked_ahead = (number + 1).saturating_sub(ahead);
            prefetch(&layers[looked_ahead..=number], &open).await;
            ahead = (ahead * 2).min(MOST_AHEAD);
        }
        let number = u16::try_from(number).expect("a stack has at most MAX_LAYERS layers");
        let disk = whole_disk(layer.virtual_size());
        let extents = map_open(layer, disk, &open).await?;
        for extent in &extents {
            if place(extent.mapping, number).is_none() {
                continue;
            }
            for hit in take_out(&mut open, extent.range) {
                found.extend(place(extent.clip(hit).mapping, number).map(|place| Piece { range: hit, place }));
            }
        }
        if !extents.iter().any(|extent| extent.mapping == Mapping::Compressed) {
            forget(layer);
        }
        // Past the end of a layer that is shorter than those above nothing shows through, not even what lies deeper.
        let past = take_out(&mut open, GuestRange::between(disk.end(), range.end().max(disk.end())));
        found.extend(past.into_iter().map(|range| Piece { range, place: Place::Zero { layer: number } }));
    }
    found.extend(open.into_iter().map(|range| Piece { range, place: Place::Zero { layer: 0 } }));
    found.sort_unstable_by_key(|piece| piece.range.start);
    for piece in found {
        push_piece(pieces, piece);
    }
    Ok(())
}

/// The place that a layer's mapping means, if that decides.
fn place(mapping: Mapping, layer: u16) -> Option<Place> {
    match mapping {
        Mapping::Unallocated => None,
        Mapping::Zero => Some(Place::Zero { layer }),
        Mapping::Data { host, in_place } => Some(Place::Data { layer, host, in_place }),
        Mapping::Compressed => Some(Place::Compressed { layer }),
    }
}

/// A layer's mappings of the ranges in `open`, which may be many: of all from the first to the last at once if that makes sense. Where it does not,
/// what is wrong may be something that nobody looks for.
async fn map_open<E: Environment>(layer: &Layer<E>, disk: GuestRange, open: &[GuestRange]) -> Result<Vec<Extent>, LayerError> {
    let ([first, ..], [.., last]) = (open, open) else { return Ok(Vec::new()) };
    let mut extents = ExtentList::new();
    if layer.map(GuestRange::between(first.start, last.end()).intersection(disk), &mut extents).await.is_ok() {
        return Ok(extents.as_slice().to_vec());
    }
    let mut all = Vec::new();
    for range in open {
        extents.clear();
        layer.map(range.intersection(disk), &mut extents).await?;
        all.extend_from_slice(extents.as_slice());
    }
    Ok(all)
}

/// Takes what `range` covers out of the ranges in `open`, which are in order, and returns it.
fn take_out(open: &mut Vec<GuestRange>, range: GuestRange) -> SmallVec<[GuestRange; 2]> {
    if range.is_empty() {
        return SmallVec::new();
    }
    let first = open.partition_point(|piece| piece.end() <= range.start);
    let last = first + open[first..].partition_point(|piece| piece.start < range.end());
    let touched = &open[first..last];
    let ([begin, ..], [.., end]) = (touched, touched) else { return SmallVec::new() };
    let rest = [(begin.start, range.start), (range.end(), end.end())].into_iter().filter(|(from, to)| from < to);
    let hits = touched.iter().map(|piece| piece.intersection(range)).collect();
    open.splice(first..last, rest.map(|(from, to)| GuestRange::between(from, to)));
    hits
}

/// Reads at the same time what some layers will be asked for next.
async fn prefetch<E: Environment>(layers: &[Arc<Layer<E>>], open: &[GuestRange]) {
    if let ([_, _, ..], [first, ..], [.., last]) = (layers, open, open) {
        let range = GuestRange::between(first.start, last.end());
        join_all(layers.iter().map(|layer| layer.prefetch(range))).await;
    }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::qcow2::testing::Scratch;
    use crate::qcow2::{CreateOptions, OpenOptions, Qcow2};
    use crate::stack::{FenceDomain, Stack};
    use crate::storage::simulated::{SimulatedEnvironment, Simulation};
    use crate::storage::{Access, CacheMode, Location};

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
    }

    /// Every range of ten units out of every set of them, beside a list of flags.
    #[test]
    fn what_is_taken_out_is_what_was_there() {
        const UNITS: u64 = 10;
        let ranges_of = |flags: u32| {
            let mut ranges: Vec<GuestRange> = Vec::new();
            for unit in (0..UNITS).filter(|unit| flags >> unit & 1 != 0) {
                match ranges.last_mut() {
                    Some(last) if last.end().get() == unit => last.len += 1,
                    _ => ranges.push(range(unit, unit + 1)),
                }
            }
            ranges
        };
        for flags in 0..1 << UNITS {
            for start in 0..=UNITS {
                for end in start..=UNITS {
                    let covered = (start..end).fold(0, |covered, unit| covered | 1 << unit);
                    let mut open = ranges_of(flags);
                    let hits = take_out(&mut open, range(start, end));
                    assert_eq!((open, hits.to_vec()), (ranges_of(flags & !covered), ranges_of(flags & covered)), "{flags:b} {start} {end}");
                }
            }
        }
    }

    /// Qemu's tools make the layers beneath, plain and compressed, where every read asks for the place again. All are full, so that only the one below
    /// the top is asked; the next has been read ahead.
    #[test]
    fn layers_beneath_let_go_of_tables_that_the_map_makes_superfluous() {
        for (compressed, options) in [(false, &["-f", "raw"][..]), (true, &["-c", "-f", "raw"])] {
            let scratch = Scratch::new();
            std::fs::write(scratch.path("raw"), vec![7; 1 << 20]).expect("space");
            scratch.qemu_img(&[&["convert"], options, &["-O", "qcow2", "raw", "full"]].concat());
            let full = std::fs::read(scratch.path("full")).expect("an image");
            let disk = SimulatedEnvironment::new(35);
            Simulation::on(disk.clone()).block_on(async move {
                let open = async |name: &str, access, options| {
                    let file = disk.open(&Location::Trusted(name.into()), access, CacheMode::Direct).await.expect("a file");
                    Arc::new(Layer::Qcow2(Qcow2::open(file, options).await.expect("an image")))
                };
                let mut layers = Vec::new();
                for name in ["/0", "/1", "/2"] {
                    disk.put(name, &full);
                    layers.push(open(name, Access::Read, OpenOptions::reading()).await);
                }
                let top = disk.open(&Location::Trusted("/top".into()), Access::CreateNew, CacheMode::Direct).await.expect("a new file");
                Qcow2::<SimulatedEnvironment>::create(&top, &CreateOptions::overlay(1 << 20, "2", "qcow2")).await.expect("created");
                drop(top);
                layers.push(open("/top", Access::Write, OpenOptions::writing()).await);
                let domain = FenceDomain::new(|| Duration::ZERO);
                let buffer = || AlignedBuffer::zeroed(1 << 16);
                let stack = Stack::new(disk.clone(), &domain, layers.clone(), false);
                stack.view().write(GuestOffset::ZERO, buffer().into()).await.0.expect("sound");
                let held = |layers: &[Arc<Layer<SimulatedEnvironment>>]| -> Vec<usize> {
                    layers.iter().map(|layer| layer.tables_in_memory()).collect()
                };
                assert_eq!(held(&layers), [0, 0, usize::from(compressed), 1]);
                // Another stack has nothing in its map, and finds what the top has in memory.
                let stack = Stack::new(disk.clone(), &domain, layers.clone(), false);
                for (at, expected) in [(0, 0), (1 << 16, 7), (1 << 19, 7)] {
                    let (result, buffer) = stack.view().read(GuestOffset::new(at), buffer().into()).await;
                    result.expect("sound");
                    assert!(buffer.into_owned().iter().all(|&byte| byte == expected), "from {at}");
                }
                assert_eq!(held(&layers), [0, 0, usize::from(compressed), 1], "what is written to keeps its tables");
            });
        }
    }
}

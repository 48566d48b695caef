//! The chain map: from a position on the disk to the one place among all layers that holds its bytes, at a cost that does not depend on how many
//! layers there are.
//!
//! Two levels. A *page* covers 32 MiB of the disk and has an entry for each 64 KiB of it: a place in one layer, or a *row* of entries at the
//! grain, the smallest mapping unit of all layers. Pages are made on first use and dropped, least lately made first, when a budget is exceeded:
//! everything in them can be read again from the layers' own tables.
//!
//! Layers are numbered from the base, so that an entry stays true when a layer is put on top. What keeps the map right while queues change it
//! at once:
//!
//! 1. Whoever changes a layer's table does that first, and then calls [`ChainMap::record`], which finds the page or does nothing.
//! 2. Whoever fills a page puts it in place first, then takes the list of layers, then reads tables, and stores only into entries that are still
//!    unknown, of the page that it began with.
//! 3. An entry of an older layer never replaces one of a newer layer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use smallvec::SmallVec;

use crate::runtime::WaitQueue;
use crate::units::{GuestOffset, GuestRange, HostOffset, SECTOR_BYTES};

/// Bytes of the disk that one entry of a page stands for.
pub(super) const UNIT_BYTES: u64 = 64 * 1024;
/// Entries of a page.
const UNITS: usize = 512;
/// Bytes of the disk that one page stands for.
pub(super) const PAGE_BYTES: u64 = UNIT_BYTES * UNITS as u64;
/// Pages whose places are allocated together.
const PAGES_PER_CHUNK: usize = 1024;

/// Where the bytes of a piece of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the data file of a layer.
    Data {
        /// Number of the layer, from the base.
        layer: u16,
        /// Position of the first byte.
        host: HostOffset,
        /// Whether that layer, while it is the top, may overwrite them there.
        in_place: bool,
    },
    /// Nowhere: they are zero, as this layer says.
    Zero {
        /// Number of the layer, from the base.
        layer: u16,
    },
    /// In a compressed cluster of a layer.
    Compressed {
        /// Number of the layer, from the base.
        layer: u16,
    },
}

impl Place {
    /// The layer that decides.
    pub fn layer(self) -> u16 {
        match self {
            Self::Data { layer, .. } | Self::Zero { layer } | Self::Compressed { layer } => layer,
        }
    }

    /// The place of the byte `bytes` further on.
    fn advance(self, bytes: u64) -> Self {
        match self {
            Self::Data { layer, host, in_place } => Self::Data { layer, host: host + bytes, in_place },
            other => other,
        }
    }
}

/// A run of the disk with one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which bytes.
    pub range: GuestRange,
    /// Where they are.
    pub place: Place,
}

/// Pieces of a request, in order.
pub(super) type Pieces = SmallVec<[Piece; 4]>;

/// Appends a piece, merged with the one before where its bytes simply go on.
pub(super) fn push_piece(pieces: &mut Pieces, piece: Piece) {
    if piece.range.is_empty() {
        return;
    }
    if let Some(last) = pieces.last_mut()
        && last.range.end() == piece.range.start
        && last.place.advance(last.range.len) == piece.place
    {
        last.range.len += piece.range.len;
        return;
    }
    pieces.push(piece);
}

/// An entry as it is stored: kind in bits 0 to 2, layer in bits 3 to 18, sector or row in bits 19 to 63.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

const KIND_UNKNOWN: u64 = 0;
const KIND_IN_PLACE: u64 = 1;
const KIND_SHARED: u64 = 2;
const KIND_ZERO: u64 = 3;
const KIND_COMPRESSED: u64 = 4;
const KIND_ROW: u64 = 5;
/// Cannot be stored at this granularity: look into the layers each time.
const KIND_MIXED: u64 = 6;
const PAYLOAD_BITS: u32 = 45;

impl Entry {
    const UNKNOWN: Self = Self(KIND_UNKNOWN);
    const MIXED: Self = Self(KIND_MIXED);

    fn row(index: usize) -> Self {
        Self(KIND_ROW | (index as u64) << 19)
    }

    /// The entry for bytes at `place`, or `MIXED` if the place has no room in it.
    fn at(place: Place) -> Self {
        let (kind, sector) = match place {
            Place::Data { host, in_place, .. } => {
                if !host.is_aligned(SECTOR_BYTES) || host.get() / SECTOR_BYTES >= 1 << PAYLOAD_BITS {
                    return Self::MIXED;
                }
                (if in_place { KIND_IN_PLACE } else { KIND_SHARED }, host.get() / SECTOR_BYTES)
            }
            Place::Zero { .. } => (KIND_ZERO, 0),
            Place::Compressed { .. } => (KIND_COMPRESSED, 0),
        };
        Self(kind | u64::from(place.layer()) << 3 | sector << 19)
    }

    fn kind(self) -> u64 {
        self.0 & 7
    }

    fn layer(self) -> u16 {
        (self.0 >> 3 & 0xffff) as u16
    }

    fn payload(self) -> u64 {
        self.0 >> 19
    }

    fn row_index(self) -> Option<usize> {
        (self.kind() == KIND_ROW).then_some(self.payload() as usize)
    }

    fn place(self) -> Option<Place> {
        let layer = self.layer();
        let host = HostOffset::new(self.payload() * SECTOR_BYTES);
        match self.kind() {
            KIND_IN_PLACE => Some(Place::Data { layer, host, in_place: true }),
            KIND_SHARED => Some(Place::Data { layer, host, in_place: false }),
            KIND_ZERO => Some(Place::Zero { layer }),
            KIND_COMPRESSED => Some(Place::Compressed { layer }),
            _ => None,
        }
    }

    /// The entry for the bytes `bytes` further on.
    fn advance(self, bytes: u64) -> Self {
        self.place().map_or(self, |place| Self::at(place.advance(bytes)))
    }

    /// Whether `new` may replace this.
    fn yields_to(self, new: Self, only_unknown: bool) -> bool {
        match self.kind() {
            KIND_UNKNOWN => true,
            _ if only_unknown => false,
            KIND_MIXED => true,
            _ => self.layer() <= new.layer(),
        }
    }
}

/// 32 MiB of the disk.
pub(super) struct Page {
    start: GuestOffset,
    entries: RwLock<Entries>,
    state: Mutex<FillState>,
    filled: WaitQueue,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FillState {
    Empty,
    Filling,
    Filled,
}

struct Entries {
    /// Bytes that the map counts for this page; `None` once it is dropped, though whoever is filling it goes on.
    counted: Option<usize>,
    units: Box<[Entry; UNITS]>,
    rows: Vec<Box<[Entry]>>,
    free_rows: Vec<usize>,
}

/// The duty to fill a page; given up when dropped, so that another can take it.
pub(super) struct FillDuty {
    page: Arc<Page>,
    done: bool,
}

impl FillDuty {
    pub(super) fn page(&self) -> &Arc<Page> {
        &self.page
    }

    /// The page has been filled.
    pub(super) fn complete(mut self) {
        self.done = true;
    }
}

impl Drop for FillDuty {
    fn drop(&mut self) {
        *self.page.lock_state() = if self.done { FillState::Filled } else { FillState::Empty };
        self.page.filled.notify_all();
    }
}

impl Page {
    /// The bytes of the disk that this page stands for, past the disk's end included.
    pub(super) fn range(&self) -> GuestRange {
        GuestRange::new(self.start, PAGE_BYTES)
    }

    /// The duty to fill this page, or `None` once it is filled. Waits while somebody else fills it.
    pub(super) async fn fill_duty(self: &Arc<Self>) -> Option<FillDuty> {
        self.filled
            .wait_until(|| {
                let mut state = self.lock_state();
                match *state {
                    FillState::Filled => Some(None),
                    FillState::Filling => None,
                    FillState::Empty => {
                        *state = FillState::Filling;
                        Some(Some(FillDuty { page: Arc::clone(self), done: false }))
                    }
                }
            })
            .await
    }

    fn lock_state(&self) -> MutexGuard<'_, FillState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a page without rows takes.
const BARE_PAGE_BYTES: usize = UNITS * size_of::<Entry>();

fn row_bytes(grain: u64) -> usize {
    (UNIT_BYTES / grain) as usize * size_of::<Entry>()
}

impl Entries {
    fn new() -> Self {
        Self { counted: Some(BARE_PAGE_BYTES), units: Box::new([Entry::UNKNOWN; UNITS]), rows: Vec::new(), free_rows: Vec::new() }
    }

    fn store(&mut self, page_start: GuestOffset, piece: Piece, grain: u64, only_unknown: bool) {
        for part in piece.range.split_at_multiples(UNIT_BYTES) {
            let unit = ((part.start - page_start) / UNIT_BYTES) as usize;
            let entry = Entry::at(piece.place.advance(part.start - piece.range.start));
            if part.len == UNIT_BYTES && self.units[unit].row_index().is_none() {
                if self.units[unit].yields_to(entry, only_unknown) {
                    self.units[unit] = entry;
                }
            } else {
                self.store_in_row(unit, part, entry, grain, only_unknown);
            }
        }
    }

    fn store_in_row(&mut self, unit: usize, part: GuestRange, entry: Entry, grain: u64, only_unknown: bool) {
        let index = self.row_of(unit, grain);
        let unit_start = part.start.align_down(UNIT_BYTES);
        let row = &mut self.rows[index];
        for piece in part.split_at_multiples(grain) {
            let slot = &mut row[((piece.start - unit_start) / grain) as usize];
            let into_grain = (piece.start - unit_start) % grain;
            if piece.len < grain && slot.place().is_some() && slot.advance(into_grain) == entry.advance(piece.start - part.start) {
                // A part of what is known already.
                continue;
            }
            // A grain of which only a part is in this place has no entry of its own.
            let new = if piece.len == grain { entry.advance(piece.start - part.start) } else { Entry::MIXED };
            if slot.yields_to(new, only_unknown) {
                *slot = new;
            }
        }
        self.collapse(unit, index, grain);
    }

    /// The row of a unit, made from its entry if there is none.
    fn row_of(&mut self, unit: usize, grain: u64) -> usize {
        if let Some(index) = self.units[unit].row_index() {
            return index;
        }
        let whole = self.units[unit];
        let row: Box<[Entry]> = (0..UNIT_BYTES / grain).map(|slot| whole.advance(slot * grain)).collect();
        let index = match self.free_rows.pop() {
            Some(index) => {
                self.rows[index] = row;
                index
            }
            None => {
                self.rows.push(row);
                self.rows.len() - 1
            }
        };
        self.units[unit] = Entry::row(index);
        index
    }

    /// Replaces a row whose entries simply go on by one entry.
    fn collapse(&mut self, unit: usize, index: usize, grain: u64) {
        let row = &self.rows[index];
        let first = row[0];
        if first.place().is_none() {
            return;
        }
        if (1u64..).zip(&row[1..]).all(|(slot, entry)| *entry == first.advance(slot * grain)) {
            self.units[unit] = first;
            self.free_rows.push(index);
        }
    }
}

type Chunk = Box<[RwLock<Option<Arc<Page>>>]>;

/// The map of one stack.
pub(super) struct ChainMap {
    grain: u64,
    chunks: Box<[OnceLock<Chunk>]>,
    budget: usize,
    used: AtomicUsize,
    /// Pages in the order in which they were made, for dropping.
    made: Mutex<std::collections::VecDeque<usize>>,
}

impl ChainMap {
    /// An empty map of a disk of `disk_bytes`, for layers whose smallest mapping unit is `grain`, that takes about `budget` bytes.
    pub(super) fn new(disk_bytes: u64, grain: u64, budget: usize) -> Self {
        let pages =
            usize::try_from(disk_bytes.div_ceil(PAGE_BYTES)).expect("a disk of at most 2^63 bytes has fewer pages than a usize counts");
        let chunks = (0..pages.div_ceil(PAGES_PER_CHUNK)).map(|_| OnceLock::new()).collect();
        let grain = grain.clamp(SECTOR_BYTES, UNIT_BYTES);
        Self { grain, chunks, budget, used: AtomicUsize::new(0), made: Mutex::default() }
    }

    /// The smallest unit that has an entry of its own, in bytes.
    pub(super) fn grain(&self) -> u64 {
        self.grain
    }

    /// Looks `range` up. `Err` gives the position of the first byte that no page knows, or whose entry is not for a view whose top is `top`.
    pub(super) fn lookup(&self, range: GuestRange, top: u16, pieces: &mut Pieces) -> Result<(), Miss> {
        for part in range.split_at_multiples(PAGE_BYTES) {
            let Some(page) = self.page(part.start) else { return Err(Miss::NoPage(part.start)) };
            let entries = page.entries.read().unwrap_or_else(PoisonError::into_inner);
            for unit in part.split_at_multiples(UNIT_BYTES) {
                let entry = entries.units[((unit.start - page.start) / UNIT_BYTES) as usize];
                let within = unit.start - unit.start.align_down(UNIT_BYTES);
                let Some(row) = entry.row_index() else {
                    push_piece(pieces, Piece { range: unit, place: usable(entry, top, unit.start)?.advance(within) });
                    continue;
                };
                let row = &entries.rows[row];
                for piece in unit.split_at_multiples(self.grain) {
                    let offset = piece.start - piece.start.align_down(UNIT_BYTES);
                    let place = usable(row[(offset / self.grain) as usize], top, piece.start)?;
                    push_piece(pieces, Piece { range: piece, place: place.advance(offset % self.grain) });
                }
            }
        }
        Ok(())
    }

    /// Takes note that `piece` changed in the table of its layer. Call after the table has changed, while the change excludes others to the
    /// same bytes.
    pub(super) fn record(&self, piece: Piece) {
        for part in piece.range.split_at_multiples(PAGE_BYTES) {
            let Some(page) = self.page(part.start) else { continue };
            let place = piece.place.advance(part.start - piece.range.start);
            let mut entries = page.entries.write().unwrap_or_else(PoisonError::into_inner);
            entries.store(page.start, Piece { range: part, place }, self.grain, false);
            self.count(&mut entries);
        }
    }

    /// Stores pieces that lie in `page` where nothing is known yet, and keeps to the budget.
    pub(super) fn fill(&self, page: &Page, pieces: &[Piece]) {
        let mut entries = page.entries.write().unwrap_or_else(PoisonError::into_inner);
        for piece in pieces {
            entries.store(page.start, *piece, self.grain, true);
        }
        self.count(&mut entries);
        drop(entries);
        self.shrink(page_number(page.start));
    }

    /// Counts what a page has grown by, if it is in its place. Under the page's lock, so that whoever drops it takes back what was added.
    fn count(&self, entries: &mut Entries) {
        let bytes = BARE_PAGE_BYTES + entries.rows.len() * row_bytes(self.grain);
        if let Some(counted) = &mut entries.counted {
            // Rows are used again and never given up.
            self.used.fetch_add(bytes - *counted, Ordering::Relaxed);
            *counted = bytes;
        }
    }

    /// The page around `at`, put in place empty if there is none.
    pub(super) fn page_to_fill(&self, at: GuestOffset) -> Arc<Page> {
        let number = page_number(at);
        let chunk = self.chunks[number / PAGES_PER_CHUNK].get_or_init(|| (0..PAGES_PER_CHUNK).map(|_| RwLock::new(None)).collect());
        let mut slot = chunk[number % PAGES_PER_CHUNK].write().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = &*slot {
            return Arc::clone(page);
        }
        let page = Arc::new(Page {
            start: at.align_down(PAGE_BYTES),
            entries: RwLock::new(Entries::new()),
            state: Mutex::new(FillState::Empty),
            filled: WaitQueue::new(),
        });
        self.used.fetch_add(BARE_PAGE_BYTES, Ordering::Relaxed);
        *slot = Some(Arc::clone(&page));
        drop(slot);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push_back(number);
        self.shrink(number);
        page
    }

    /// Drops the oldest pages but `keep` until the budget holds again.
    fn shrink(&self, keep: usize) {
        while self.memory_bytes() > self.budget {
            let oldest = {
                let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
                match made.iter().position(|number| *number != keep) {
                    Some(position) => made.remove(position),
                    None => None,
                }
            };
            let Some(number) = oldest else { return };
            self.drop_page(number);
        }
    }

    /// Bytes that pages and rows take.
    pub(super) fn memory_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn drop_page(&self, number: usize) {
        let Some(chunk) = self.chunks[number / PAGES_PER_CHUNK].get() else { return };
        let page = chunk[number % PAGES_PER_CHUNK].write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(page) = page {
            let mut entries = page.entries.write().unwrap_or_else(PoisonError::into_inner);
            self.used.fetch_sub(entries.counted.take().unwrap_or(0), Ordering::Relaxed);
        }
    }

    fn page(&self, at: GuestOffset) -> Option<Arc<Page>> {
        let number = page_number(at);
        let chunk = self.chunks.get(number / PAGES_PER_CHUNK)?.get()?;
        chunk[number % PAGES_PER_CHUNK].read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The number of the page around `at`.
pub(super) fn page_number(at: GuestOffset) -> usize {
    usize::try_from(at.get() / PAGE_BYTES).expect("a position on a disk whose pages were counted")
}

/// Why a look-up gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// There is no filled page for this position.
    NoPage(GuestOffset),
    /// The entry for this position cannot be used by the view that asks; it has to look into its layers.
    Unusable,
}

fn usable(entry: Entry, top: u16, at: GuestOffset) -> Result<Place, Miss> {
    match entry.place() {
        Some(place) if place.layer() <= top => Ok(place),
        None if entry == Entry::UNKNOWN => Err(Miss::NoPage(at)),
        _ => Err(Miss::Unusable),
    }
}

impl std::fmt::Debug for ChainMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChainMap({} bytes, grain {})", self.memory_bytes(), self.grain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAIN: u64 = 4096;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), len)
    }

    fn data(start: u64, len: u64, layer: u16, host: u64) -> Piece {
        Piece { range: range(start, len), place: Place::Data { layer, host: HostOffset::new(host), in_place: true } }
    }

    fn filled(pieces: &[Piece]) -> ChainMap {
        let map = ChainMap::new(1 << 30, GRAIN, 1 << 20);
        let page = map.page_to_fill(GuestOffset::ZERO);
        map.fill(&page, pieces);
        map
    }

    fn lookup(map: &ChainMap, range: GuestRange, top: u16) -> Result<Vec<Piece>, Miss> {
        let mut pieces = Pieces::new();
        map.lookup(range, top, &mut pieces).map(|()| pieces.to_vec())
    }

    #[test]
    fn a_small_write_splits_a_unit_and_writing_all_of_it_joins_it_again() {
        let map = filled(&[data(0, PAGE_BYTES, 0, 1 << 20)]);
        map.record(data(8192, GRAIN, 1, 4096));
        assert_eq!(
            lookup(&map, range(0, 65536), 1).expect("all known"),
            [data(0, 8192, 0, 1 << 20), data(8192, GRAIN, 1, 4096), data(12288, 65536 - 12288, 0, (1 << 20) + 12288)]
        );
        for slot in 0..16 {
            map.record(data(slot * GRAIN, GRAIN, 2, 65536 + slot * GRAIN));
        }
        let page = map.page(GuestOffset::ZERO).expect("the page stays");
        assert!(page.entries.read().expect("no panic before").units[0].row_index().is_none());
        assert_eq!(lookup(&map, range(512, 1024), 2).expect("all known"), [data(512, 1024, 2, 66048)]);
    }

    #[test]
    fn older_layers_never_replace_newer_ones() {
        let map = filled(&[]);
        map.record(data(0, UNIT_BYTES, 3, 0));
        map.record(data(0, UNIT_BYTES, 2, 1 << 20));
        map.record(data(4096, GRAIN, 1, 1 << 21));
        assert_eq!(lookup(&map, range(0, UNIT_BYTES), 3).expect("all known"), [data(0, UNIT_BYTES, 3, 0)]);
    }

    #[test]
    fn filling_leaves_what_is_known() {
        let map = filled(&[]);
        map.record(data(4096, GRAIN, 1, 0));
        map.fill(&map.page(GuestOffset::ZERO).expect("made above"), &[data(0, PAGE_BYTES, 5, 1 << 30)]);
        assert_eq!(lookup(&map, range(4096, GRAIN), 9).expect("all known"), [data(4096, GRAIN, 1, 0)]);
        assert_eq!(lookup(&map, range(0, GRAIN), 9).expect("all known"), [data(0, GRAIN, 5, 1 << 30)]);
    }

    #[test]
    fn a_view_does_not_use_entries_of_layers_above_its_top() {
        let map = filled(&[data(0, PAGE_BYTES, 4, 0)]);
        assert_eq!(lookup(&map, range(0, 512), 3), Err(Miss::Unusable));
        assert_eq!(lookup(&map, range(PAGE_BYTES, 512), 3), Err(Miss::NoPage(GuestOffset::new(PAGE_BYTES))));
    }

    #[test]
    fn a_grain_in_two_places_is_looked_up_in_the_layers() {
        let map = filled(&[data(0, 512, 0, 0), Piece { range: range(512, PAGE_BYTES - 512), place: Place::Zero { layer: 0 } }]);
        assert_eq!(lookup(&map, range(0, 512), 0), Err(Miss::Unusable));
        assert_eq!(lookup(&map, range(4096, 512), 0).expect("known").len(), 1);
    }

    #[test]
    fn what_is_put_into_a_page_that_was_dropped_is_not_counted() {
        let map = ChainMap::new(1 << 30, GRAIN, BARE_PAGE_BYTES);
        let pieces: Vec<_> = (0..512).map(|unit| data(unit * UNIT_BYTES, GRAIN, 0, 1 << 20)).collect();
        let first = map.page_to_fill(GuestOffset::ZERO);
        let second = map.page_to_fill(GuestOffset::new(PAGE_BYTES));
        assert!(map.page(GuestOffset::ZERO).is_none(), "dropped while it is being filled");
        map.fill(&first, &pieces);
        assert_eq!(map.memory_bytes(), BARE_PAGE_BYTES);
        map.record(data(PAGE_BYTES, GRAIN, 1, 0));
        assert_eq!(map.memory_bytes(), BARE_PAGE_BYTES + row_bytes(GRAIN));
        drop(second);
        map.page_to_fill(GuestOffset::new(2 * PAGE_BYTES));
        assert_eq!(map.memory_bytes(), BARE_PAGE_BYTES);
    }

    #[test]
    fn the_budget_holds() {
        let map = ChainMap::new(1 << 40, GRAIN, 10 * UNITS * size_of::<Entry>());
        for number in 0..100 {
            map.page_to_fill(GuestOffset::new(number * PAGE_BYTES));
        }
        assert!(map.memory_bytes() <= 10 * UNITS * size_of::<Entry>());
        assert!(map.page(GuestOffset::ZERO).is_none());
        assert!(map.page(GuestOffset::new(99 * PAGE_BYTES)).is_some());
    }
}

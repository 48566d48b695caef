//! Guest memory as a queue reaches it: a few regions, each mapped somewhere into this process.
//!
//! All unsafe code of the daemon's data path is here. The guest and its VMM may change every byte at any time, so nothing is ever referenced:
//! values are copied out once, ring indices are accessed as atomics, and request buffers leave as
//! [`SharedVectors`], which only raw copies and the kernel touch. Whatever points into guest memory holds a
//! handle that keeps it mapped.

use std::any::Any;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use snapfence_image_format::buffer::{SharedVectors, Vectors};
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use super::mapping::{self, Watched};

/// The guest's memory during one epoch, that is, between two changes of the memory table. Cheap to look things up in; one per queue, so that
/// queues do not share its reference count.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    /// Ascending, not overlapping.
    regions: Arc<[Region]>,
    kept: Arc<Kept>,
}

/// What keeps the guest's memory mapped.
#[derive(Debug)]
struct Kept {
    /// Goes before the mappings.
    watched: Vec<Watched>,
    _mmap: Arc<GuestMemoryMmap>,
}

/// Guest addresses from `start` up to, not including, `end`, mapped at `base`.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    end: u64,
    base: NonNull<u8>,
}

// SAFETY: `base` is an address for raw access from any thread; the mapping is kept by the `GuestMemory` that the region is part of.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

impl GuestMemory {
    /// The regions of `mmap`, which stays mapped for as long as this or anything made from it lives.
    pub fn new(mmap: &Arc<GuestMemoryMmap>) -> Self {
        let mut regions: Vec<Region> = mmap
            .iter()
            .filter_map(|region| {
                let start = region.start_addr().raw_value();
                Some(Region { start, end: start.checked_add(region.len())?, base: NonNull::new(region.as_ptr())? })
            })
            .collect();
        regions.sort_unstable_by_key(|region| region.start);
        let watched = mmap.iter().map(|region| Watched::new(region.as_ptr() as usize, region.size())).collect();
        // An `Arc` of its own around the shared one: its count is this queue's alone.
        Self { regions: regions.into(), kept: Arc::new(Kept { watched, _mmap: Arc::clone(mmap) }) }
    }

    /// Checks that the files behind `mmap` have what it maps.
    ///
    /// # Errors
    /// If one has not, or cannot be memory.
    pub fn admit(mmap: &GuestMemoryMmap) -> io::Result<()> {
        for region in mmap.iter() {
            if let Some(file) = region.file_offset() {
                mapping::admit(file.file(), file.start(), region.len())?;
            }
        }
        Ok(())
    }

    /// Whether the front-end has made a file of the memory shorter beneath us: nothing that is read there means anything.
    pub fn is_lost(&self) -> bool {
        self.kept.watched.iter().any(Watched::is_lost)
    }

    fn keep(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.kept) as Arc<dyn Any + Send + Sync>
    }

    /// The bytes from `address` on that are mapped in one piece, at most `len`; `None` if there is none.
    fn piece(&self, address: u64, len: u64) -> Option<(NonNull<u8>, u64)> {
        let region = match &*self.regions {
            // Most guests: at most one hole below 4 GiB.
            [only] => Some(only),
            regions => regions.get(regions.partition_point(|region| region.end <= address)),
        };
        let region = region.filter(|region| region.start <= address && address < region.end)?;
        let offset = usize::try_from(address - region.start).ok()?;
        // SAFETY: `address` lies within the region, so the offset stays within its mapping.
        let base = unsafe { region.base.add(offset) };
        Some((base, len.min(region.end - address)))
    }

    /// The `len` bytes at `address` as a ring area, if they are mapped in one piece and aligned to `alignment`, a power of two, in the guest
    /// and here.
    pub fn area(&self, address: u64, len: usize, alignment: usize) -> Option<Area> {
        let (base, mapped) = self.piece(address, len as u64)?;
        let aligned = address.is_multiple_of(alignment as u64) && base.addr().get().is_multiple_of(alignment);
        (aligned && mapped == len as u64).then(|| Area { base, len, _keep: self.keep() })
    }

    /// A copy of the `N` bytes at `address`, if they are mapped in one piece.
    pub fn copy_out<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        self.run(address, N).map(|run| run.copy_out(0))
    }

    /// The `len` bytes at `address`, if they are mapped in one piece.
    pub fn run(&self, address: u64, len: usize) -> Option<Run<'_>> {
        let (base, mapped) = self.piece(address, len as u64)?;
        (mapped == len as u64).then_some(Run { base, len, memory: PhantomData })
    }

    /// Starts to put buffers together.
    pub fn gather(&self) -> Gather<'_> {
        Gather { memory: self, vectors: Vectors::new(), bytes: 0 }
    }
}

/// Bytes of guest memory that lie in one piece.
#[derive(Clone, Copy, Debug)]
pub struct Run<'m> {
    base: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m GuestMemory>,
}

impl Run<'_> {
    /// A copy of the `N` bytes at `offset`, read once.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn copy_out<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset.checked_add(N).is_some_and(|end| end <= self.len), "bytes of a run lie within it");
        before_load();
        // SAFETY: within the run, which is mapped and readable for as long as the memory is borrowed; byte arrays need no alignment.
        unsafe { self.base.as_ptr().wrapping_add(offset).cast::<[u8; N]>().read_volatile() }
    }
}

/// Buffers of one request, one after the other.
#[derive(Debug)]
pub struct Gather<'m> {
    memory: &'m GuestMemory,
    vectors: Vectors,
    bytes: u64,
}

impl<'m> Gather<'m> {
    /// Adds the `len` bytes at `address`. `false`, and nothing added, if not all of them are guest memory.
    pub fn push(&mut self, address: u64, len: u32) -> bool {
        let (before, mut at, mut left) = (self.vectors.len(), address, u64::from(len));
        while left > 0 {
            let Some((base, mapped)) = self.memory.piece(at, left) else {
                self.vectors.truncate(before);
                return false;
            };
            // `mapped` is at most `left`, which came from a `u32`.
            self.vectors.push(libc::iovec { iov_base: base.as_ptr().cast(), iov_len: mapped as usize });
            left -= mapped;
            at = at.wrapping_add(mapped); // A region ends at most at the last address, where the next look-up fails.
        }
        self.bytes += u64::from(len);
        true
    }

    /// Nothing yet, in the same memory.
    #[must_use]
    pub fn emptied(&self) -> Self {
        self.memory.gather()
    }

    /// Total bytes so far.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether there are no bytes yet.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Everything as one run of bytes.
    pub fn finish(self) -> SharedVectors {
        // SAFETY: each vector lies within a region (`push`) of a mapping that is readable and writable, is kept by `keep`, and to which this
        // module, the only one that sees the addresses, makes no references.
        unsafe { SharedVectors::new(self.vectors, self.memory.keep()) }
    }
}

/// Memory that the front-end shares beside the guest's: a part of a file.
#[derive(Debug)]
pub struct SharedRegion(Arc<WatchedRegion>);

#[derive(Debug)]
struct WatchedRegion {
    /// Goes before the mapping.
    _watched: Watched,
    region: MmapRegion,
}

impl SharedRegion {
    /// Maps `len` bytes of `file` from `offset` on, a multiple of the page size.
    ///
    /// # Errors
    /// If the file does not have them, or cannot be mapped.
    pub fn map(file: File, offset: u64, len: usize) -> io::Result<Self> {
        mapping::admit(&file, offset, len as u64)?;
        let region = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(io::Error::other)?;
        let _watched = Watched::new(region.as_ptr() as usize, region.size());
        Ok(Self(Arc::new(WatchedRegion { _watched, region })))
    }

    /// The `len` bytes at `offset`, if they are within.
    pub fn area(&self, offset: usize, len: usize) -> Option<Area> {
        if offset.checked_add(len)? > self.0.region.size() {
            return None;
        }
        // SAFETY: the offset lies within the mapping, or at its end if there are no bytes.
        let base = unsafe { NonNull::new(self.0.region.as_ptr())?.add(offset) };
        Some(Area { base, len, _keep: Arc::clone(&self.0) as Arc<dyn Any + Send + Sync> })
    }
}

/// A run of shared memory in which single fields are read and written: one of the three parts of a ring, or a queue's record of what is in
/// flight.
///
/// # Panics
/// Every access panics if it reaches past the end or is not aligned: offsets come from the ring's own, checked size.
#[derive(Clone, Debug)]
pub struct Area {
    base: NonNull<u8>,
    len: usize,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory stays mapped while `_keep` lives, and all access is atomic or volatile.
unsafe impl Send for Area {}

impl Area {
    fn field<T>(&self, offset: usize) -> NonNull<T> {
        assert!(offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len), "a ring field lies within its area");
        // SAFETY: within the area, checked above.
        let field = unsafe { self.base.add(offset) }.cast::<T>();
        assert!(field.is_aligned(), "a ring field is aligned, as its area is");
        field
    }

    fn atomic_u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: mapped (`field`) for as long as `self` keeps the memory. Inside this process it is accessed as an atomic only; an atomic may
        // be shared with other processes.
        unsafe { AtomicU8::from_ptr(self.field::<u8>(offset).as_ptr()) }
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: aligned and mapped (`field`); the rest as for `atomic_u8`.
        unsafe { AtomicU16::from_ptr(self.field::<u16>(offset).as_ptr()) }
    }

    fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: aligned and mapped (`field`); the rest as for `atomic_u8`.
        unsafe { AtomicU64::from_ptr(self.field::<u64>(offset).as_ptr()) }
    }

    /// The byte at `offset`.
    pub fn load_u8(&self, offset: usize) -> u8 {
        before_load();
        self.atomic_u8(offset).load(Ordering::Relaxed)
    }

    /// Sets the byte at `offset`.
    pub fn store_u8(&self, offset: usize, value: u8, order: Ordering) {
        self.atomic_u8(offset).store(value, order);
        observe();
    }

    /// The 16-bit little-endian value at `offset`.
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        before_load();
        u16::from_le(self.atomic_u16(offset).load(order))
    }

    /// Sets the 16-bit little-endian value at `offset`.
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.atomic_u16(offset).store(value.to_le(), order);
        observe();
    }

    /// The 64-bit little-endian value at `offset`.
    pub fn load_u64(&self, offset: usize) -> u64 {
        before_load();
        u64::from_le(self.atomic_u64(offset).load(Ordering::Relaxed))
    }

    /// Sets the 64-bit little-endian value at `offset`.
    pub fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.atomic_u64(offset).store(value.to_le(), order);
        observe();
    }

    /// Sets the 32-bit little-endian value at `offset`. Ordered by a later release store.
    pub fn store_u32(&self, offset: usize, value: u32) {
        // SAFETY: `field` is aligned and mapped, and guest memory is writable.
        unsafe { self.field::<u32>(offset).write_volatile(value.to_le()) }
        observe();
    }

    /// A copy of the 16 bytes at `offset`, read once.
    pub fn copy_out(&self, offset: usize) -> [u8; 16] {
        before_load();
        // SAFETY: `field` is mapped and readable; byte arrays need no alignment.
        unsafe { self.field::<[u8; 16]>(offset).read_volatile() }
    }
}

#[cfg(test)]
thread_local! {
    /// What a test wants to do after each store to an area on its thread.
    pub(super) static OBSERVER: std::cell::RefCell<Option<Box<dyn FnMut()>>> = const { std::cell::RefCell::new(None) };
}

/// A place between two stores, where a process may end.
#[cfg(test)]
fn observe() {
    OBSERVER.with_borrow_mut(|observer| observer.as_mut().map(|observe| observe()));
}

#[cfg(not(test))]
#[inline(always)]
fn observe() {}

#[cfg(fuzzing)]
thread_local! {
    /// What a fuzzer does before each load from shared memory on its thread, as a guest's other processors might.
    pub static BEFORE_LOAD: std::cell::RefCell<Option<Box<dyn FnMut()>>> = const { std::cell::RefCell::new(None) };
}

/// A place where the memory may change.
#[cfg(fuzzing)]
fn before_load() {
    BEFORE_LOAD.with_borrow_mut(|observer| observer.as_mut().map(|observe| observe()));
}

#[cfg(not(fuzzing))]
#[inline(always)]
fn before_load() {}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory(ranges: &[(u64, usize)]) -> (Arc<GuestMemoryMmap>, GuestMemory) {
        let ranges: Vec<_> = ranges.iter().map(|&(start, len)| (GuestAddress(start), len)).collect();
        let mmap = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("anonymous memory"));
        let memory = GuestMemory::new(&mmap);
        (mmap, memory)
    }

    #[test]
    fn buffers_cross_adjacent_regions_and_nothing_else() {
        let (mmap, memory) = memory(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        mmap.write_slice(b"abcdef", GuestAddress(0x1ffd)).expect("inside");
        let mut gather = memory.gather();
        assert!(gather.push(0x1ffd, 6));
        assert!(!gather.push(0x2ffd, 6), "a hole follows");
        assert!(!gather.push(0, 1));
        assert!(!gather.push(u64::MAX, 2));
        assert!(gather.push(0x8fff, 1));
        assert_eq!(gather.len(), 7);
        let vectors = gather.finish();
        assert_eq!(vectors.vectors().len(), 3);
        drop(memory);
        let mut bytes = [0; 6];
        vectors.copy_out(0, &mut bytes);
        assert_eq!(&bytes, b"abcdef");
    }

    #[test]
    fn values_and_areas_must_lie_in_one_region() {
        let (mmap, memory) = memory(&[(0, 0x1000), (0x1000, 0x1000)]);
        mmap.write_obj(0x1122_3344_u32, GuestAddress(0xff8)).expect("inside");
        assert_eq!(memory.copy_out::<4>(0xff8), Some(0x1122_3344_u32.to_le_bytes()));
        assert_eq!(memory.copy_out::<16>(0xff8), None);
        assert!(memory.area(0xff0, 16, 16).is_some());
        assert!(memory.area(0xff8, 16, 8).is_none(), "crosses two regions");
        assert!(memory.area(0xfe8, 16, 16).is_none(), "not aligned");
        assert!(memory.area(0x2000, 1, 1).is_none());
        assert!(memory.area(u64::MAX, 16, 1).is_none());
    }

    #[test]
    fn memory_without_regions_holds_nothing() {
        let memory = GuestMemory::new(&Arc::new(GuestMemoryMmap::new()));
        assert!(memory.area(0, 1, 1).is_none());
        assert_eq!(memory.copy_out::<1>(0), None);
    }

    #[test]
    #[should_panic(expected = "within its area")]
    fn access_past_an_area_panics() {
        let (_mmap, memory) = memory(&[(0, 0x1000)]);
        let _ = memory.area(0, 8, 8).expect("inside").load_u16(7, Ordering::Relaxed);
    }
}

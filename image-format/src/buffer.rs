//! The memory that an operation reads into or writes from.
//!
//! An operation owns its [`Buffer`] until it completes, so that memory which the kernel still writes to is never freed, whatever happens to the
//! future that waits. Two kinds exist: bytes of our own ([`AlignedBuffer`]) and vectors into memory that somebody else shares with us, above all
//! a guest ([`SharedVectors`]). The second kind may change under us at any time: it is only ever copied through raw pointers, never referenced.

use std::alloc::{self, Layout};
use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::{Array, SmallVec};

/// Alignment of every buffer of our own, enough for `O_DIRECT` on any device: the page size.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// Bytes of our own, aligned for `O_DIRECT`.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory exclusively, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared references only allow reads, like a `Box<[u8]>`.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// A buffer of `len` zero bytes.
    ///
    /// # Panics
    /// If the allocator refuses; callers check sizes that come from outside first.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::dangling(), len };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero, checked above.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { alloc::handle_alloc_error(layout) };
        Self { start, len }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// Gives the bytes up to sharing: vectors over them that can be sliced and joined, and keep them alive.
    pub fn into_shared(self) -> SharedVectors {
        let vector = libc::iovec { iov_base: self.start.as_ptr().cast(), iov_len: self.len };
        let keep = Arc::new(self);
        // SAFETY: `keep` owns the memory and nobody can reach it but through the vectors any more.
        unsafe { SharedVectors::new(smallvec::smallvec![vector], keep) }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BUFFER_ALIGNMENT).expect("a length that fits in an isize, as every checked length does")
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with the same layout, and freed only here.
            unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.len)) };
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `len` initialised bytes (or dangles with `len` 0), owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Clone for AlignedBuffer {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len)
    }
}

/// Parts of memory, one after the other. Most requests have one or two.
pub type Vectors = SmallVec<[libc::iovec; 2]>;

/// Vectors into memory that is shared with others and kept alive by a handle. Cheap to slice; the bytes are never copied.
#[derive(Clone)]
pub struct SharedVectors {
    vectors: Vectors,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the constructor's contract makes the memory valid from any thread for as long as `keep` lives, and every access goes through raw
// pointers, so that other writers cause torn bytes at worst.
unsafe impl Send for SharedVectors {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedVectors {}

impl SharedVectors {
    /// Vectors over memory that `keep` keeps alive. Empty ones are dropped.
    ///
    /// # Safety
    /// Every vector must describe memory that stays mapped, readable and writable for as long as `keep` lives, and to which no Rust reference
    /// exists meanwhile. Others may read and write it at any time.
    pub unsafe fn new(mut vectors: Vectors, keep: Arc<dyn Any + Send + Sync>) -> Self {
        vectors.retain(|vector| vector.iov_len > 0);
        Self { vectors, keep }
    }

    /// One after the other, as a single run of bytes.
    pub fn join(parts: impl IntoIterator<Item = SharedVectors>) -> Self {
        let mut vectors = SmallVec::new();
        let mut keeps = Vec::new();
        for part in parts {
            vectors.extend(part.vectors);
            keeps.push(part.keep);
        }
        Self { vectors, keep: Arc::new(keeps) }
    }

    /// Total bytes.
    pub fn len(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The vectors, for a system call or submission. The pointers are valid only while `self` or a clone lives.
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// The bytes of `range` only, over the same memory.
    ///
    /// # Panics
    /// If `range` reaches past the end.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let mut vectors = SmallVec::new();
        self.pieces(range, |base, len, _| vectors.push(libc::iovec { iov_base: base.cast(), iov_len: len }));
        Self { vectors, keep: Arc::clone(&self.keep) }
    }

    /// Cuts off the bytes from `at` on, and gives them back, over the same memory.
    ///
    /// # Panics
    /// If `at` lies past the end.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        let mut left = at;
        let mut whole = 0;
        while let Some(vector) = self.vectors.get(whole)
            && vector.iov_len <= left
        {
            left -= vector.iov_len;
            whole += 1;
        }
        let mut rest: Vectors = self.vectors[whole..].into();
        self.vectors.truncate(whole);
        if left > 0 {
            let split = rest.first_mut().expect("a place within the vectors");
            self.vectors.push(libc::iovec { iov_base: split.iov_base, iov_len: left });
            split.iov_base = split.iov_base.cast::<u8>().wrapping_add(left).cast();
            split.iov_len -= left;
        }
        Self { vectors: rest, keep: Arc::clone(&self.keep) }
    }

    /// Whether every vector starts and ends on a multiple of `alignment`, as `O_DIRECT` asks.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.vectors.iter().all(|vector| (vector.iov_base as usize | vector.iov_len) & (alignment - 1) == 0)
    }

    /// Copies `bytes` in at `offset`.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        self.pieces(offset..offset + bytes.len(), |base, len, at| {
            // SAFETY: `pieces` yields parts of our vectors, writable by the constructor's contract, and `at + len <= bytes.len()`. The two
            // cannot overlap because no Rust reference to shared memory exists.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..at + len].as_ptr(), base, len) }
        });
    }

    /// Copies the bytes from `offset` on out into all of `bytes`.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        self.pieces(offset..offset + bytes.len(), |base, len, at| {
            // SAFETY: as in `copy_in`, with the directions exchanged.
            unsafe { std::ptr::copy_nonoverlapping(base, bytes[at..at + len].as_mut_ptr(), len) }
        });
    }

    /// Sets the bytes of `range` to zero.
    ///
    /// # Panics
    /// If `range` reaches past the end.
    pub fn fill_zero(&self, range: Range<usize>) {
        // SAFETY: `pieces` yields parts of our vectors, writable by the constructor's contract.
        self.pieces(range, |base, len, _| unsafe { std::ptr::write_bytes(base, 0, len) });
    }

    /// Calls `visit(base, len, position in range)` for each contiguous part of `range`.
    fn pieces(&self, range: Range<usize>, mut visit: impl FnMut(*mut u8, usize, usize)) {
        let (mut skip, mut left, mut done) = (range.start, range.end - range.start, 0);
        for vector in &self.vectors {
            if left == 0 {
                return;
            }
            if skip >= vector.iov_len {
                skip -= vector.iov_len;
                continue;
            }
            let len = left.min(vector.iov_len - skip);
            visit(vector.iov_base.cast::<u8>().wrapping_add(skip), len, done);
            (skip, left, done) = (0, left - len, done + len);
        }
        assert!(left == 0, "a range of shared vectors ends {left} bytes past their end");
    }
}

impl fmt::Debug for SharedVectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedVectors({} bytes in {} vectors)", self.len(), self.vectors.len())
    }
}

/// What one operation transfers.
#[derive(Debug)]
pub enum Buffer {
    /// Bytes of our own; the operation gives them back when it completes.
    Owned(AlignedBuffer),
    /// Memory that others share, above all a guest's.
    Shared(SharedVectors),
}

impl Buffer {
    /// Total bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(buffer) => buffer.len(),
            Self::Shared(vectors) => vectors.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The vectors to hand to the kernel. The pointers are valid only while `self` lives.
    pub fn vectors<A: Array<Item = libc::iovec>>(&mut self) -> SmallVec<A> {
        match self {
            Self::Owned(buffer) => {
                let len = buffer.len();
                smallvec::smallvec![libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: len }]
            }
            Self::Shared(shared) => shared.vectors.iter().copied().collect(),
        }
    }

    /// Copies `bytes` in at `offset`.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn copy_in(&mut self, offset: usize, bytes: &[u8]) {
        match self {
            Self::Owned(buffer) => buffer[offset..offset + bytes.len()].copy_from_slice(bytes),
            Self::Shared(shared) => shared.copy_in(offset, bytes),
        }
    }

    /// Copies the bytes from `offset` on out into all of `bytes`.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        match self {
            Self::Owned(buffer) => bytes.copy_from_slice(&buffer[offset..offset + bytes.len()]),
            Self::Shared(shared) => shared.copy_out(offset, bytes),
        }
    }

    /// Sets the bytes of `range` to zero.
    ///
    /// # Panics
    /// If `range` reaches past the end.
    pub fn fill_zero(&mut self, range: Range<usize>) {
        match self {
            Self::Owned(buffer) => buffer[range].fill(0),
            Self::Shared(shared) => shared.fill_zero(range),
        }
    }

    /// Whether every vector starts and ends on a multiple of `alignment`.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        match self {
            Self::Owned(buffer) => buffer.len() & (alignment - 1) == 0,
            Self::Shared(shared) => shared.is_aligned(alignment),
        }
    }

    /// The bytes of our own.
    ///
    /// # Panics
    /// If the buffer is a shared one; an operation gives back the kind that it was given.
    pub fn into_owned(self) -> AlignedBuffer {
        match self {
            Self::Owned(buffer) => buffer,
            Self::Shared(_) => panic!("an operation that was given an owned buffer gives an owned one back"),
        }
    }
}

impl From<AlignedBuffer> for Buffer {
    fn from(buffer: AlignedBuffer) -> Self {
        Self::Owned(buffer)
    }
}

impl From<SharedVectors> for Buffer {
    fn from(vectors: SharedVectors) -> Self {
        Self::Shared(vectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cross_vectors_and_keep_the_memory_alive() {
        let joined = SharedVectors::join([
            AlignedBuffer::copy_of(&[1, 2, 3]).into_shared(),
            AlignedBuffer::copy_of(&[4]).into_shared(),
            AlignedBuffer::copy_of(&[5, 6]).into_shared(),
        ]);
        let middle = joined.slice(2..5);
        drop(joined);
        let mut bytes = [0; 3];
        middle.copy_out(0, &mut bytes);
        assert_eq!(bytes, [3, 4, 5]);
        middle.copy_in(1, &[9, 8]);
        middle.fill_zero(0..1);
        middle.copy_out(0, &mut bytes);
        assert_eq!(bytes, [0, 9, 8]);
        assert_eq!(middle.vectors().len(), 3);
    }

    #[test]
    #[should_panic(expected = "past their end")]
    fn slicing_past_the_end_panics() {
        let _ = AlignedBuffer::zeroed(4).into_shared().slice(2..5);
    }

    #[test]
    fn own_buffers_are_aligned_for_direct_io() {
        let buffer = AlignedBuffer::zeroed(512);
        assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGNMENT, 0);
        assert!(AlignedBuffer::zeroed(0).is_empty());
    }
}

//! A read or a write of a whole buffer, as the kernel does it: in parts, interrupted, short at the end of a file.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use smallvec::SmallVec;

use super::file::OpenFile;
use super::operation::{MAX_ATTEMPTS, Next, Output, is_transient};
use crate::buffer::{AlignedBuffer, Buffer};

/// Vectors that one submission may carry (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// Bytes that one submission may carry: what the kernel moves at most (`MAX_RW_COUNT`), on a whole page.
const MAX_BYTES: usize = 0x7fff_f000;
/// What positions and lengths must be a multiple of with `O_DIRECT`; files that ask for more are opened through the page cache.
pub(super) const DIRECT_ALIGNMENT: usize = 512;

/// Bytes that are copied at a time. Copying takes the thread's time, and that of all queues on it, so nobody copies much in one go.
const BOUNCE_BYTES: usize = 1 << 20;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// A read or a write of a whole buffer, in as many submissions as the kernel needs.
pub(super) struct TransferWork {
    file: Arc<OpenFile>,
    direction: Direction,
    /// Where in the file the buffer begins.
    at: u64,
    buffer: Buffer,
    /// Takes the buffer's place at the file where `O_DIRECT` cannot use its vectors.
    bounce: Option<Bounce>,
    /// What is left of the vectors, from `first` on. The kernel reads them at submission, from where they are: two or more lie on the heap,
    /// so they stay in place when this value moves; a single one is copied into the submission.
    vectors: SmallVec<[libc::iovec; 1]>,
    first: usize,
    /// Bytes transferred.
    done: usize,
    len: usize,
    /// Attempts in vain since the last byte.
    attempts: u32,
}

/// A piece of the buffer, copied to where `O_DIRECT` can use it.
struct Bounce {
    bytes: AlignedBuffer,
    /// Which bytes of the buffer it holds.
    piece: Range<usize>,
}

impl TransferWork {
    pub(super) fn new(file: Arc<OpenFile>, direction: Direction, at: u64, mut buffer: Buffer) -> Self {
        let len = buffer.len();
        let vectors: SmallVec<[libc::iovec; 1]> = buffer.vectors();
        let needs_bounce = file.direct_memory_alignment().is_some_and(|alignment| !fits_direct(&vectors, alignment));
        let mut work = Self { file, direction, at, buffer, bounce: None, vectors, first: 0, done: 0, len, attempts: 0 };
        if needs_bounce {
            work.bounce = Some(Bounce { bytes: AlignedBuffer::zeroed(len.min(BOUNCE_BYTES)), piece: 0..0 });
            work.next_piece();
        }
        work
    }

    /// Goes on with the piece of the buffer after what is done.
    fn next_piece(&mut self) {
        let Some(Bounce { bytes, piece }) = &mut self.bounce else { return };
        *piece = self.done..self.len.min(self.done + BOUNCE_BYTES);
        let bytes = &mut bytes[..piece.len()];
        if self.direction == Direction::Write {
            self.buffer.copy_out(piece.start, bytes);
        }
        self.vectors = smallvec::smallvec![libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        self.first = 0;
    }

    /// Takes what has been read of the present piece over into the buffer.
    fn keep_piece(&mut self) {
        if let Some(Bounce { bytes, piece }) = &self.bounce
            && self.direction == Direction::Read
        {
            self.buffer.copy_in(piece.start, &bytes[..self.done - piece.start]);
        }
    }

    /// The submission for what is left to transfer.
    pub(super) fn entry(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_fd().as_raw_fd());
        let offset = self.at + self.done as u64;
        let left = &self.vectors[self.first..];
        let entry = if let [vector] = left {
            let len = u32::try_from(vector.iov_len.min(MAX_BYTES)).expect("at most MAX_BYTES");
            match self.direction {
                Direction::Read => opcode::Read::new(fd, vector.iov_base.cast(), len).offset(offset).build(),
                Direction::Write => opcode::Write::new(fd, vector.iov_base.cast_const().cast(), len).offset(offset).build(),
            }
        } else {
            let count = u32::try_from(left.len().min(MAX_VECTORS)).expect("at most MAX_VECTORS");
            match self.direction {
                Direction::Read => opcode::Readv::new(fd, left.as_ptr(), count).offset(offset).build(),
                Direction::Write => opcode::Writev::new(fd, left.as_ptr(), count).offset(offset).build(),
            }
        };
        // What could not be done at once is given to a kernel thread that may sleep, so that trying again is not spinning; and what hangs with
        // a file server hangs there, too.
        if self.attempts > 0 || self.file.holds_up() { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    /// Takes note of a completion.
    pub(super) fn advance(&mut self, result: i32) -> Next {
        let Ok(count) = usize::try_from(result) else {
            if is_transient(result) && self.attempts < MAX_ATTEMPTS {
                self.attempts += 1;
                return Next::Again;
            }
            return self.finish(Err(io::Error::from_raw_os_error(-result)));
        };
        let before = self.done;
        self.done += count;
        debug_assert!(self.done <= self.len, "the kernel transferred more than it was asked to");
        if self.done >= self.len {
            self.keep_piece();
            return self.finish(Ok(()));
        }
        if self.bounce.as_ref().is_some_and(|bounce| self.done >= bounce.piece.end) {
            self.keep_piece();
            self.next_piece();
            self.attempts = 0;
            return Next::Again;
        }
        let is_direct = self.file.direct_memory_alignment().is_some();
        let is_ragged = is_direct && !self.done.is_multiple_of(DIRECT_ALIGNMENT);
        match self.direction {
            // Nothing more, or less than a sector of an O_DIRECT read: the end of the file.
            Direction::Read if count == 0 || is_ragged => {
                self.keep_piece();
                self.buffer.fill_zero(self.done..self.len);
                return self.finish(Ok(()));
            }
            // The next submission must start on a sector, so part of one is written again.
            Direction::Write if is_ragged => self.done -= self.done % DIRECT_ALIGNMENT,
            Direction::Read | Direction::Write => {}
        }
        if self.done == before {
            return self.finish(Err(io::Error::new(io::ErrorKind::WriteZero, "the medium accepts no more bytes")));
        }
        self.attempts = 0;
        self.skip(self.done - before);
        Next::Again
    }

    /// Takes `bytes` off the front of the vectors. The kernel has copied what it needs of them when it took the submission.
    fn skip(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let vector = &mut self.vectors[self.first];
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }

    fn finish(&mut self, result: io::Result<()>) -> Next {
        let buffer = std::mem::replace(&mut self.buffer, Buffer::Owned(AlignedBuffer::zeroed(0)));
        Next::Finished(Output::Transfer((result, buffer)))
    }
}

/// Whether `O_DIRECT` takes these vectors: addresses as the medium asks, lengths in whole sectors.
fn fits_direct(vectors: &[libc::iovec], memory_alignment: usize) -> bool {
    vectors
        .iter()
        .all(|vector| (vector.iov_base as usize).is_multiple_of(memory_alignment) && vector.iov_len.is_multiple_of(DIRECT_ALIGNMENT))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::AtFlags;

    use super::super::file::UringFile;
    use super::super::open::FACTS;
    use super::super::skip::skipped;
    use super::super::stat::Medium;
    use super::*;
    use crate::storage::CacheMode;

    fn file(cache: CacheMode) -> Arc<OpenFile> {
        let file = tempfile::tempfile().expect("a temporary file");
        let facts = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, FACTS).expect("facts about it");
        UringFile::adopt(file.into(), &facts, Medium::Local, Path::new("image"), cache).expect("a file").open_file()
    }

    fn transfer(cache: CacheMode, direction: Direction, buffer: impl Into<Buffer>) -> TransferWork {
        TransferWork::new(file(cache), direction, 4096, buffer.into())
    }

    fn finished(next: Next) -> (io::Result<()>, Buffer) {
        match next {
            Next::Finished(Output::Transfer(transferred)) => transferred,
            _ => panic!("the transfer goes on"),
        }
    }

    fn goes_on(next: Next) {
        assert!(matches!(next, Next::Again));
    }

    /// What the next submission would transfer: number of vectors and bytes, from where in the file.
    fn rest(transfer: &TransferWork) -> (usize, usize, u64) {
        let left = &transfer.vectors[transfer.first..];
        (left.len(), left.iter().map(|vector| vector.iov_len).sum(), transfer.at + transfer.done as u64)
    }

    #[test]
    fn short_transfers_go_on_where_they_stopped() {
        let pieces = [100, 200, 300].map(|len| AlignedBuffer::zeroed(len).into_shared());
        let mut write = transfer(CacheMode::Buffered, Direction::Write, crate::buffer::SharedVectors::join(pieces));
        assert_eq!(rest(&write), (3, 600, 4096));
        goes_on(write.advance(50));
        assert_eq!(rest(&write), (3, 550, 4146));
        goes_on(write.advance(250));
        assert_eq!(rest(&write), (1, 300, 4396));
        goes_on(write.advance(299));
        assert_eq!(rest(&write), (1, 1, 4695));
        finished(write.advance(1)).0.expect("all of it");
    }

    #[test]
    fn interruptions_are_tried_again_but_not_for_ever() {
        let mut read = transfer(CacheMode::Buffered, Direction::Read, AlignedBuffer::zeroed(512));
        for _ in 0..MAX_ATTEMPTS / 2 {
            goes_on(read.advance(-libc::EINTR));
            goes_on(read.advance(-libc::EAGAIN));
        }
        assert_eq!(rest(&read), (1, 512, 4096));
        let (result, buffer) = finished(read.advance(-libc::EAGAIN));
        assert_eq!((result.expect_err("enough").raw_os_error(), buffer.len()), (Some(libc::EAGAIN), 512));
        let mut write = transfer(CacheMode::Buffered, Direction::Write, AlignedBuffer::zeroed(512));
        assert_eq!(finished(write.advance(-libc::ENOSPC)).0.expect_err("full").kind(), io::ErrorKind::StorageFull);
        assert_eq!(finished(write.advance(-libc::EDQUOT)).0.expect_err("used up").kind(), io::ErrorKind::QuotaExceeded);
    }

    #[test]
    fn a_medium_that_takes_no_more_bytes_is_an_error() {
        let mut write = transfer(CacheMode::Buffered, Direction::Write, AlignedBuffer::zeroed(512));
        goes_on(write.advance(100));
        assert_eq!(finished(write.advance(0)).0.expect_err("stuck").kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn what_a_read_does_not_reach_is_zero() {
        let mut read = transfer(CacheMode::Buffered, Direction::Read, AlignedBuffer::copy_of(&[1; 512]));
        goes_on(read.advance(100));
        let (result, buffer) = finished(read.advance(0));
        result.expect("the end of the file");
        let bytes = buffer.into_owned();
        assert!(bytes[..100].iter().all(|byte| *byte == 1) && bytes[100..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn direct_transfers_go_on_at_sectors_only() {
        let direct = file(CacheMode::Direct);
        if direct.direct_memory_alignment().is_none() {
            skipped("the temporary directory has no O_DIRECT");
            return;
        }
        let new = |direction| TransferWork::new(Arc::clone(&direct), direction, 4096, AlignedBuffer::copy_of(&[1; 2048]).into());
        let mut write = new(Direction::Write);
        goes_on(write.advance(1000));
        assert_eq!(rest(&write), (1, 1536, 4608));
        assert_eq!(finished(write.advance(511)).0.expect_err("stuck").kind(), io::ErrorKind::WriteZero);

        let mut read = new(Direction::Read);
        goes_on(read.advance(512));
        let (result, buffer) = finished(read.advance(100));
        result.expect("the end of the file");
        let bytes = buffer.into_owned();
        assert!(bytes[..612].iter().all(|byte| *byte == 1) && bytes[612..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn vectors_that_o_direct_cannot_use_are_copied() {
        let direct = file(CacheMode::Direct);
        if direct.direct_memory_alignment().is_none() {
            skipped("the temporary directory has no O_DIRECT");
            return;
        }
        let pieces = || [100, 412].map(|len| AlignedBuffer::copy_of(&vec![7; len]).into_shared());
        let ragged = || crate::buffer::SharedVectors::join(pieces()).into();
        let write = TransferWork::new(Arc::clone(&direct), Direction::Write, 0, ragged());
        assert!(write.bounce.as_ref().is_some_and(|bounce| bounce.bytes[..] == [7; 512]));
        assert_eq!(rest(&write), (1, 512, 0));

        let mut read = TransferWork::new(Arc::clone(&direct), Direction::Read, 0, ragged());
        let bounce = read.bounce.as_mut().expect("a bounce buffer");
        bounce.bytes.fill(9);
        let (result, buffer) = finished(read.advance(300));
        result.expect("the end of the file");
        let mut bytes = [1; 512];
        buffer.copy_out(0, &mut bytes);
        assert!(bytes[..300].iter().all(|byte| *byte == 9) && bytes[300..].iter().all(|byte| *byte == 0));
        let aligned = TransferWork::new(direct, Direction::Read, 0, AlignedBuffer::zeroed(512).into());
        assert!(aligned.bounce.is_none());
    }

    #[test]
    fn much_is_copied_piece_by_piece() {
        let direct = file(CacheMode::Direct);
        if direct.direct_memory_alignment().is_none() {
            skipped("the temporary directory has no O_DIRECT");
            return;
        }
        let len = 2 * BOUNCE_BYTES + 1024;
        let lens = [100, len - 100];
        let pieces = |fill: fn(usize) -> u8| {
            let bytes: Vec<u8> = (0..len).map(fill).collect();
            let parts = [&bytes[..lens[0]], &bytes[lens[0]..]].map(|part| AlignedBuffer::copy_of(part).into_shared());
            crate::buffer::SharedVectors::join(parts).into()
        };
        let mut write = TransferWork::new(Arc::clone(&direct), Direction::Write, 0, pieces(|at| (at / BOUNCE_BYTES) as u8 + 1));
        let held = |work: &TransferWork| work.bounce.as_ref().expect("a bounce buffer").bytes[0];
        assert_eq!((rest(&write), held(&write)), ((1, BOUNCE_BYTES, 0), 1));
        goes_on(write.advance(512));
        assert_eq!(rest(&write), (1, BOUNCE_BYTES - 512, 512));
        goes_on(write.advance(BOUNCE_BYTES as i32 - 512));
        assert_eq!((rest(&write), held(&write)), ((1, BOUNCE_BYTES, BOUNCE_BYTES as u64), 2));
        goes_on(write.advance(BOUNCE_BYTES as i32));
        assert_eq!((rest(&write), held(&write)), ((1, 1024, 2 * BOUNCE_BYTES as u64), 3));
        finished(write.advance(1024)).0.expect("all of it");

        let mut read = TransferWork::new(direct, Direction::Read, 0, pieces(|_| 0xff));
        for fill in [1, 2, 3] {
            read.bounce.as_mut().expect("a bounce buffer").bytes.fill(fill);
            let next = read.advance(if fill < 3 { BOUNCE_BYTES as i32 } else { 512 });
            goes_on(next);
        }
        let (result, buffer) = finished(read.advance(0));
        result.expect("the end of the file");
        let mut bytes = vec![0; len];
        buffer.copy_out(0, &mut bytes);
        let expected = |at: usize| if at < 2 * BOUNCE_BYTES + 512 { (at / BOUNCE_BYTES) as u8 + 1 } else { 0 };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    }
}

//! One operation of a ring: what it keeps alive while the kernel has it, and what it does with its completion.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use smallvec::SmallVec;

use super::file::OpenFile;
use crate::buffer::{AlignedBuffer, Buffer};
use crate::storage::Transferred;

/// Vectors that one submission may carry (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// Bytes that one submission may carry: what the kernel moves at most (`MAX_RW_COUNT`), on a whole page.
const MAX_BYTES: usize = 0x7fff_f000;
/// Fruitless attempts after which "try again" is taken for the answer.
const MAX_ATTEMPTS: u32 = 1000;
/// What positions and lengths must be a multiple of with `O_DIRECT`; files that ask for more are opened through the page cache.
pub(super) const DIRECT_ALIGNMENT: usize = 512;

/// An operation that the kernel has.
pub(super) enum Work {
    Transfer(TransferWork),
    Call(CallWork),
    Watch(WatchWork),
}

/// What an operation came to.
pub(super) enum Output {
    Transfer(Transferred),
    Value(io::Result<u32>),
    Descriptor(io::Result<OwnedFd>),
    /// A watch, with its token.
    WatchEnded(u64),
}

/// What to do after a completion.
pub(super) enum Next {
    /// Submit [`Work::entry`] again.
    Again,
    /// Nothing: the kernel goes on with it.
    Wait,
    /// It is over.
    Finished(Output),
}

impl Work {
    /// The submission for what is left to do, without its user data.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        match self {
            Self::Transfer(transfer) => transfer.entry(),
            Self::Call(call) => call.entry.clone(),
            Self::Watch(watch) => watch.entry(),
        }
    }

    /// Takes note of a completion. `more` says that the kernel will report others for the same submission.
    pub(super) fn advance(&mut self, result: i32, more: bool) -> Next {
        match self {
            Self::Transfer(transfer) => transfer.advance(result),
            Self::Call(call) => call.advance(result),
            Self::Watch(watch) => watch.advance(result, more),
        }
    }

    /// Whether it waits for something outside that may never happen, and is cancelled when nobody waits for it any more.
    pub(super) fn is_endless(&self) -> bool {
        match self {
            Self::Transfer(_) => false,
            Self::Call(call) => matches!(call.kind, CallKind::Timer),
            Self::Watch(_) => true,
        }
    }
}

fn is_transient(error: i32) -> bool {
    error == -libc::EINTR || error == -libc::EAGAIN
}

fn value(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

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
    bounce: Option<AlignedBuffer>,
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

impl TransferWork {
    pub(super) fn new(file: Arc<OpenFile>, direction: Direction, at: u64, mut buffer: Buffer) -> Self {
        let len = buffer.len();
        let mut vectors: SmallVec<[libc::iovec; 1]> = buffer.vectors().into_iter().collect();
        let mut bounce = None;
        if let Some(memory_alignment) = file.direct_memory_alignment()
            && !fits_direct(&vectors, memory_alignment)
        {
            let mut bytes = AlignedBuffer::zeroed(len);
            if direction == Direction::Write {
                buffer.copy_out(0, &mut bytes);
            }
            vectors = smallvec::smallvec![libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len }];
            bounce = Some(bytes);
        }
        Self { file, direction, at, buffer, bounce, vectors, first: 0, done: 0, len, attempts: 0 }
    }

    fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.file.fd().as_raw_fd());
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
        // What could not be done at once is given to a kernel thread that may sleep, so that trying again is not spinning.
        if self.attempts > 0 { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    fn advance(&mut self, result: i32) -> Next {
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
            return self.finish(Ok(()));
        }
        let is_direct = self.file.direct_memory_alignment().is_some();
        let is_ragged = is_direct && !self.done.is_multiple_of(DIRECT_ALIGNMENT);
        match self.direction {
            // Nothing more, or less than a sector of an O_DIRECT read: the end of the file.
            Direction::Read if count == 0 || is_ragged => {
                let rest = self.done..self.len;
                match &mut self.bounce {
                    Some(bounce) => bounce[rest].fill(0),
                    None => self.buffer.fill_zero(rest),
                }
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
        let mut buffer = std::mem::replace(&mut self.buffer, Buffer::Owned(AlignedBuffer::zeroed(0)));
        if let Some(bounce) = &self.bounce
            && self.direction == Direction::Read
            && result.is_ok()
        {
            buffer.copy_in(0, bounce);
        }
        Next::Finished(Output::Transfer((result, buffer)))
    }
}

/// Whether `O_DIRECT` takes these vectors: addresses as the medium asks, lengths in whole sectors.
fn fits_direct(vectors: &[libc::iovec], memory_alignment: usize) -> bool {
    vectors
        .iter()
        .all(|vector| (vector.iov_base as usize).is_multiple_of(memory_alignment) && vector.iov_len.is_multiple_of(DIRECT_ALIGNMENT))
}

/// How the result of a call is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallKind {
    /// A number; interrupted ones are repeated.
    Plain,
    /// A number, and never repeated: a flush that failed in any way has perhaps thrown away the news of a failed write.
    Once,
    /// A new descriptor.
    Open,
    /// Ends by running out.
    Timer,
}

/// An operation with one submission and one completion.
pub(super) struct CallWork {
    entry: squeue::Entry,
    kind: CallKind,
    /// Keeps everything alive that `entry` points to.
    _keep: Rc<dyn Any>,
    attempts: u32,
}

impl CallWork {
    /// # Safety
    /// Everything that `entry` points to, its file descriptor included, must stay valid and in place for as long as `keep` lives.
    pub(super) unsafe fn new(entry: squeue::Entry, kind: CallKind, keep: Rc<dyn Any>) -> Self {
        Self { entry, kind, _keep: keep, attempts: 0 }
    }

    fn advance(&mut self, result: i32) -> Next {
        if is_transient(result) && self.kind != CallKind::Once && self.attempts < MAX_ATTEMPTS {
            self.attempts += 1;
            return Next::Again;
        }
        Next::Finished(match self.kind {
            CallKind::Plain | CallKind::Once => Output::Value(value(result)),
            CallKind::Timer if result == -libc::ETIME => Output::Value(Ok(0)),
            CallKind::Timer => Output::Value(value(result)),
            CallKind::Open if result < 0 => Output::Descriptor(Err(io::Error::from_raw_os_error(-result))),
            // SAFETY: the kernel has just made this descriptor for us, and this is the only place that learns of it.
            CallKind::Open => Output::Descriptor(Ok(unsafe { OwnedFd::from_raw_fd(result) })),
        })
    }
}

/// A descriptor whose readiness is reported under a token, again and again.
pub(super) struct WatchWork {
    fd: OwnedFd,
    pub(super) token: u64,
    /// Whether it is in the list of those to report.
    pub(super) is_reported: bool,
}

impl WatchWork {
    pub(super) fn new(fd: OwnedFd, token: u64) -> Self {
        Self { fd, token, is_reported: false }
    }

    fn entry(&self) -> squeue::Entry {
        opcode::PollAdd::new(types::Fd(self.fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build()
    }

    fn advance(&self, result: i32, more: bool) -> Next {
        let ends = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
        if more {
            Next::Wait
        } else if result < 0 || result & i32::from(ends) != 0 {
            // Armed again it would be ready again at once, for ever.
            Next::Finished(Output::WatchEnded(self.token))
        } else {
            Next::Again
        }
    }
}

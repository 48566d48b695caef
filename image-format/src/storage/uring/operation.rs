//! One operation of a ring: what it keeps alive while the kernel has it, and what it does with its completion.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use io_uring::{opcode, squeue, types};
use rustix::event::epoll;

use super::transfer::TransferWork;
use crate::storage::Transferred;

/// Fruitless attempts after which "try again" is taken for the answer.
pub(super) const MAX_ATTEMPTS: u32 = 1000;

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

/// Whether an operation that nobody cancels can be tried again after this error. The kernel itself cancels what it has not begun if it has no thread
/// to do it.
pub(super) fn is_transient(error: i32) -> bool {
    matches!(-error, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
}

fn value(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// How the result of a call is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallKind {
    /// A number; interrupted ones are repeated.
    Plain,
    /// A number, and never repeated: a flush that failed in any way has perhaps thrown away the news of a failed write.
    Once,
    /// The same, but what the kernel has not begun for want of a thread is tried again. Only for files of which nobody else says that.
    OnceBegun,
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
        let tries_again = match self.kind {
            CallKind::Plain => is_transient(result),
            CallKind::OnceBegun => result == -libc::ECANCELED,
            CallKind::Once | CallKind::Timer => false,
        };
        if tries_again && self.attempts < MAX_ATTEMPTS {
            self.attempts += 1;
            return Next::Again;
        }
        Next::Finished(match self.kind {
            CallKind::Plain | CallKind::Once | CallKind::OnceBegun => Output::Value(value(result)),
            CallKind::Timer if result == -libc::ETIME => Output::Value(Ok(0)),
            CallKind::Timer => Output::Value(value(result)),
        })
    }
}

/// A descriptor whose readiness is reported under a token, again and again.
pub(super) struct WatchWork {
    fd: OwnedFd,
    /// Regular files and the like are ready at all times, so waiting for them would never wait.
    can_wait: bool,
    pub(super) token: u64,
    /// Whether it is in the list of those to report.
    pub(super) is_reported: bool,
}

impl WatchWork {
    pub(super) fn new(fd: OwnedFd, token: u64) -> Self {
        let can_wait = can_wait(&fd);
        Self { fd, can_wait, token, is_reported: false }
    }

    fn entry(&self) -> squeue::Entry {
        opcode::PollAdd::new(types::Fd(self.fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build()
    }

    fn advance(&self, result: i32, more: bool) -> Next {
        let ends = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
        if more {
            Next::Wait
        } else if !self.can_wait || result < 0 || result & i32::from(ends) != 0 {
            // Armed again it would be ready again at once, for ever.
            Next::Finished(Output::WatchEnded(self.token))
        } else {
            Next::Again
        }
    }
}

/// Whether the descriptor tells when it becomes ready. Epoll is the one interface that says so.
fn can_wait(fd: &OwnedFd) -> bool {
    let Ok(epoll) = epoll::create(epoll::CreateFlags::CLOEXEC) else { return true };
    epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN) != Err(rustix::io::Errno::PERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advance(kind: CallKind, error: i32) -> Next {
        // SAFETY: it points to nothing.
        let mut call = unsafe { CallWork::new(opcode::Nop::new().build(), kind, Rc::new(())) };
        call.advance(-error)
    }

    #[test]
    fn only_what_was_not_done_is_done_again() {
        let errors = [libc::EINTR, libc::EAGAIN, libc::ECANCELED, libc::EIO];
        for (kind, again) in [
            (CallKind::Plain, [true, true, true, false]),
            (CallKind::Once, [false; 4]),
            (CallKind::OnceBegun, [false, false, true, false]),
            (CallKind::Timer, [false; 4]),
        ] {
            assert_eq!(errors.map(|error| matches!(advance(kind, error), Next::Again)), again, "{kind:?}");
        }
    }
}

//! Telling the front-end something, and being told, through descriptors that it gave us.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use io_uring::{IoUring, opcode};

/// An eventfd of the front-end: what kicks, calls and errors go through.
///
/// Nothing else is taken. A thread that waits for or writes to a descriptor serves other devices too, and of a file on a FUSE mount even asking
/// whether it is ready may take for ever.
#[derive(Debug)]
pub struct EventDescriptor(OwnedFd);

/// A front-end has given something else for an eventfd.
#[derive(Debug, thiserror::Error)]
#[error("{what} is not an eventfd")]
pub struct NotAnEventfd {
    /// What the kernel calls it.
    what: String,
}

impl TryFrom<OwnedFd> for EventDescriptor {
    type Error = NotAnEventfd;

    fn try_from(fd: OwnedFd) -> Result<Self, NotAnEventfd> {
        match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())) {
            Ok(name) if name.as_os_str() == "anon_inode:[eventfd]" => Ok(Self(fd)),
            Ok(name) => Err(NotAnEventfd { what: name.display().to_string() }),
            Err(error) => Err(NotAnEventfd { what: format!("a descriptor that cannot be looked at in /proc ({error})") }),
        }
    }
}

impl From<EventDescriptor> for OwnedFd {
    fn from(descriptor: EventDescriptor) -> Self {
        descriptor.0
    }
}

/// The call or the error descriptor of a ring.
///
/// It may be in any state: signalling never blocks and never fails. Writing to an eventfd blocks when its counter is full, unless it has
/// `O_NONBLOCK`; the front-end can fill it, and can change the flag at any time, which belongs to the descriptor that both share. A thread that
/// hangs there serves other devices too. The kernel itself never waits when it signals an eventfd: so the descriptor is registered with
/// a small io_uring of its own, as what is signalled for each completion, and a signal is an operation that does nothing.
pub struct Signal {
    ring: Mutex<IoUring>,
    _descriptor: OwnedFd,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signal({:?})", self._descriptor)
    }
}

impl Signal {
    /// Signals through `descriptor`.
    ///
    /// # Errors
    /// If the system gives no ring for it.
    pub fn new(descriptor: EventDescriptor) -> io::Result<Self> {
        let EventDescriptor(descriptor) = descriptor;
        let ring = IoUring::builder().dontfork().build(1)?;
        ring.submitter().register_eventfd(descriptor.as_raw_fd())?;
        Ok(Self { ring: Mutex::new(ring), _descriptor: descriptor })
    }

    /// Signals once. If the descriptor is full the front-end has not seen the signals before, and finds what this one is about with them.
    pub fn raise(&self) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: an operation that does nothing refers to no memory.
        let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
        // Each is submitted and completed before the next, so there is room.
        debug_assert!(pushed.is_ok(), "the ring is empty");
        // Nothing can be done about a system that has no memory for this, and the guest's polling may do without.
        let _ = ring.submit();
        ring.completion().for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, OFlags};

    use super::*;

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).expect("signalled");
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn signals_are_counted_and_full_descriptors_do_not_block() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let ours = eventfd(0, flags).expect("an eventfd");
            let signal = Signal::new(ours.try_clone().expect("a descriptor").try_into().expect("an eventfd")).expect("a ring");
            (0..100).for_each(|_| signal.raise());
            assert_eq!(count(&ours), 100);
            // The front-end fills it, and lets writers wait, after it has been looked at.
            rustix::fs::fcntl_setfl(&ours, OFlags::empty()).expect("flags");
            rustix::io::write(&ours, &(u64::MAX - 1).to_ne_bytes()).expect("room");
            (0..100).for_each(|_| signal.raise());
            assert!(count(&ours) >= u64::MAX - 1);
            signal.raise();
            assert_eq!(count(&ours), 1);
        }
    }

    #[test]
    fn nothing_but_an_eventfd_is_taken() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let memfd = rustix::fs::memfd_create("anon_inode:[eventfd]", MemfdFlags::CLOEXEC).expect("a memfd");
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).expect("an epoll");
        let directory = tempfile::tempdir().expect("a directory");
        let named = std::fs::File::create(directory.path().join("anon_inode:[eventfd]")).expect("a file");
        for fd in [reader.into(), writer.into(), socket.into(), memfd, epoll, named.into()] {
            let error = EventDescriptor::try_from(fd).expect_err("not an eventfd");
            assert!(error.to_string().ends_with(" is not an eventfd"), "{error}");
        }
    }
}

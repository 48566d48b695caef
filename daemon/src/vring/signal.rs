//! Telling the front-end something, and being told, through descriptors that it gave us.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

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
/// It may be in any state: signalling never blocks and never fails. The descriptor's flags belong to the front-end, which shares them, so
/// `O_NONBLOCK` is not ours to set.
#[derive(Debug)]
pub struct Signal {
    fd: OwnedFd,
    may_block: bool,
}

impl Signal {
    /// Signals through `descriptor`.
    pub fn new(descriptor: EventDescriptor) -> Self {
        let EventDescriptor(fd) = descriptor;
        let may_block = !rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { fd, may_block }
    }

    /// Signals once. If the descriptor is full the front-end has not seen the signals before, and finds what this one is about with them.
    pub fn raise(&self) {
        if self.may_block {
            // Only a front-end that fills the descriptor between these two calls, on purpose, makes the thread wait.
            let mut poll = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1..)) || !poll[0].revents().contains(PollFlags::OUT) {
                return;
            }
        }
        // Nothing can be done about a descriptor that takes no signals, and the guest's polling may do without.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::MemfdFlags;

    use super::*;

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).expect("signalled");
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn full_descriptors_do_not_block() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let ours = eventfd(0, flags).expect("an eventfd");
            let signal = Signal::new(ours.try_clone().expect("a descriptor").try_into().expect("an eventfd"));
            signal.raise();
            signal.raise();
            assert_eq!(count(&ours), 2);
            rustix::io::write(&ours, &(u64::MAX - 1).to_ne_bytes()).expect("room");
            signal.raise();
            assert_eq!(count(&ours), u64::MAX - 1);
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

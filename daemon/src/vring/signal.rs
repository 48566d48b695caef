//! Telling the front-end something through a descriptor that it gave us.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

/// An eventfd of the front-end: the call or the error descriptor of a ring.
///
/// It may be anything, in any state: signalling never blocks and never fails. The descriptor's flags belong to the front-end, which shares them, so
/// `O_NONBLOCK` is not ours to set.
#[derive(Debug)]
pub struct Signal {
    fd: OwnedFd,
    may_block: bool,
}

impl Signal {
    /// Signals through `fd`.
    pub fn new(fd: OwnedFd) -> Self {
        let may_block = !rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { fd, may_block }
    }

    /// Signals once. If the descriptor is full the front-end has not seen the signals before, and finds what this one is about with them.
    pub fn raise(&self) {
        if self.may_block {
            // Only a front-end that fills the descriptor between these two calls makes its own queue wait.
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

    use super::*;

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).expect("signalled");
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn full_and_closed_descriptors_do_not_block() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let ours = eventfd(0, flags).expect("an eventfd");
            let signal = Signal::new(ours.try_clone().expect("a descriptor"));
            signal.raise();
            signal.raise();
            assert_eq!(count(&ours), 2);
            rustix::io::write(&ours, &(u64::MAX - 1).to_ne_bytes()).expect("room");
            signal.raise();
            assert_eq!(count(&ours), u64::MAX - 1);
        }
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        Signal::new(writer.into()).raise();
    }
}

//! Between a front-end and crate vhost-user-backend.
//!
//! The crate refuses two messages, `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`, so they are answered here. All others are passed on as they are, with
//! their descriptors, and so are the answers. What is answered here has its turn: first comes every answer to what was sent before.
//!
//! ```text
//! front-end ◀──▶ relay (accepting thread) ◀──▶ crate's thread ──▶ Backend, HookVring
//!                  └── inflight messages ─────────────────────▶ Backend
//! ```

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType,
};
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::vring::inflight::{InflightError, InflightLayout};

/// Request, flags, size: 32 bits each, in the machine's order.
const HEADER_BYTES: usize = 12;
const GET_FEATURES: u32 = 1;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
/// Version 1 of the protocol, in every message's flags.
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// Size and offset of the record (64 bits each), number and size of queues (16 bits each); padded in some front-ends.
const INFLIGHT_BYTES: usize = 20;
/// Attempts to make a private connection that nobody else gets into.
const PAIR_ATTEMPTS: usize = 64;

/// Who keeps the record of requests in flight.
pub(super) trait InflightKeeper {
    /// Makes an empty record for a front-end that has none.
    fn create(&self, queues: u16, queue_size: u16) -> Result<(InflightLayout, File), InflightError>;

    /// Takes the record that the front-end keeps.
    fn set(&self, layout: InflightLayout, file: OwnedFd) -> Result<(), InflightError>;
}

/// Why a connection is cut off.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    /// The socket.
    #[error("connection broke: {0}")]
    Socket(#[from] io::Error),
    /// Longer than the protocol's messages are.
    #[error("message {request} of {size} bytes")]
    TooLong {
        /// What it asks for.
        request: u32,
        /// What it claims to have.
        size: u32,
    },
    /// One of the messages that are answered here is too short or has no descriptor, or more than one.
    #[error("message {request} with {size} bytes and {descriptors} descriptors")]
    Malformed {
        /// What it asks for.
        request: u32,
        /// Bytes after the header.
        size: usize,
        /// Descriptors that came with it.
        descriptors: usize,
    },
    /// The record cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// A message with its descriptors.
struct Message {
    /// Header and body.
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    fn new(request: u32, flags: u32, body: &[u8]) -> Self {
        // Bodies are shorter than a page.
        let header = [request, VERSION | flags, body.len() as u32].map(u32::to_ne_bytes).concat();
        Self { bytes: [&header, body].concat(), descriptors: Vec::new() }
    }

    fn word(&self, index: usize) -> u32 {
        u32::from_ne_bytes(self.bytes[index * 4..][..4].try_into().expect("four bytes of the header"))
    }

    fn request(&self) -> u32 {
        self.word(0)
    }

    fn needs_reply(&self) -> bool {
        self.word(1) & FLAG_NEED_REPLY != 0
    }

    fn body(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..]
    }

    fn malformed(&self) -> RelayError {
        RelayError::Malformed { request: self.request(), size: self.body().len(), descriptors: self.descriptors.len() }
    }

    /// What the two messages say about the record.
    fn layout(&self) -> Option<InflightLayout> {
        let body = self.body().get(..INFLIGHT_BYTES)?;
        let long = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let short = |at: usize| u16::from_ne_bytes(body[at..at + 2].try_into().expect("two bytes"));
        Some(InflightLayout { bytes: long(0), offset: long(8), queues: short(16), queue_size: short(18) })
    }

    /// Waits for a whole message; `None` if the other side has ended, also in the midst of one.
    fn receive(socket: &UnixStream) -> Result<Option<Self>, RelayError> {
        let mut message = Self { bytes: vec![0; HEADER_BYTES], descriptors: Vec::new() };
        if !message.fill(socket, 0)? {
            return Ok(None);
        }
        let size = message.word(2);
        if size as usize > MAX_MSG_SIZE {
            return Err(RelayError::TooLong { request: message.request(), size });
        }
        message.bytes.resize(HEADER_BYTES + size as usize, 0);
        Ok(message.fill(socket, HEADER_BYTES)?.then_some(message))
    }

    /// Receives what is missing from `at` on. `false` if it does not come.
    fn fill(&mut self, socket: &UnixStream, mut at: usize) -> io::Result<bool> {
        while at < self.bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut self.bytes[at..])];
            let received = match rustix::net::recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CONNRESET) => 0,
                Err(error) => return Err(error.into()),
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    // What is more than a message may have is closed at once.
                    let room = MAX_ATTACHED_FD_ENTRIES - self.descriptors.len();
                    self.descriptors.extend(descriptors.take(room));
                }
            }
            if received == 0 {
                return Ok(false);
            }
            at += received;
        }
        Ok(true)
    }

    fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut at = 0;
        while at < self.bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            // They go with the first byte.
            if at == 0 && !descriptors.is_empty() {
                let has_room = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                assert!(has_room, "a message has at most as many as there is room for");
            }
            match rustix::net::sendmsg(socket, &[IoSlice::new(&self.bytes[at..])], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(sent) => at += sent,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A listener for the crate at which one connection already waits: the other end of it.
///
/// # Errors
/// If the system gives no sockets.
pub(super) fn private_connection() -> io::Result<(UnixListener, UnixStream)> {
    let socket = |flags| rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | flags, None);
    for _ in 0..PAIR_ATTEMPTS {
        let listener = socket(SocketFlags::empty())?;
        // The kernel picks a name, in no file system.
        rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
        // Room for one connection. Whoever finds it taken, by somebody who guessed the name, is not the one that will be accepted.
        rustix::net::listen(&listener, 0)?;
        let address: SocketAddrAny = rustix::net::getsockname(&listener)?;
        let stream = socket(SocketFlags::NONBLOCK)?;
        match rustix::net::connect(&stream, &address) {
            Ok(()) => {
                let stream = UnixStream::from(stream);
                stream.set_nonblocking(false)?;
                return Ok((listener.into(), stream));
            }
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody gets into every private connection"))
}

/// One connection.
pub(super) struct Relay<'a> {
    front_end: &'a UnixStream,
    back_end: &'a UnixStream,
    keeper: &'a dyn InflightKeeper,
    /// `GET_FEATURES` of the front-end that have not been answered.
    features_asked: usize,
}

impl<'a> Relay<'a> {
    pub(super) fn new(front_end: &'a UnixStream, back_end: &'a UnixStream, keeper: &'a dyn InflightKeeper) -> Self {
        Self { front_end, back_end, keeper, features_asked: 0 }
    }

    /// Passes messages on until one of the two has ended, and then ends the other.
    ///
    /// # Errors
    /// If the front-end must be cut off, or a socket fails.
    pub(super) fn run(mut self) -> Result<(), RelayError> {
        let outcome = self.pass_on();
        for socket in [self.front_end, self.back_end] {
            // One of them is closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        match outcome {
            // The other side has ended while something was on its way.
            Err(RelayError::Socket(error)) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            outcome => outcome,
        }
    }

    fn pass_on(&mut self) -> Result<(), RelayError> {
        loop {
            let mut fds = [PollFd::new(self.front_end, PollFlags::IN), PollFd::new(self.back_end, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let [from_front_end, from_back_end] = fds.map(|fd| !fd.revents().is_empty());
            if from_back_end && !self.answer()? {
                return Ok(());
            }
            if from_front_end && !self.ask()? {
                return Ok(());
            }
        }
    }

    /// One message of the front-end's. `false` if there is none any more.
    fn ask(&mut self) -> Result<bool, RelayError> {
        let Some(message) = Message::receive(self.front_end)? else { return Ok(false) };
        match message.request() {
            GET_INFLIGHT_FD => self.get_inflight(&message),
            SET_INFLIGHT_FD => self.set_inflight(message),
            request => {
                self.features_asked += usize::from(request == GET_FEATURES);
                message.send(self.back_end)?;
                Ok(true)
            }
        }
    }

    /// One message of the back-end's. `false` if there is none any more.
    fn answer(&mut self) -> Result<bool, RelayError> {
        let Some(message) = Message::receive(self.back_end)? else { return Ok(false) };
        self.features_asked -= usize::from(message.request() == GET_FEATURES);
        message.send(self.front_end)?;
        Ok(true)
    }

    /// Passes on all answers to what was sent before. The crate answers in order, so a question of our own shows when it is there.
    fn settle(&mut self) -> Result<bool, RelayError> {
        Message::new(GET_FEATURES, 0, &[]).send(self.back_end)?;
        loop {
            let Some(message) = Message::receive(self.back_end)? else { return Ok(false) };
            if message.request() == GET_FEATURES {
                if self.features_asked == 0 {
                    return Ok(true);
                }
                self.features_asked -= 1;
            }
            message.send(self.front_end)?;
        }
    }

    fn get_inflight(&mut self, message: &Message) -> Result<bool, RelayError> {
        let asked = message.layout().ok_or_else(|| message.malformed())?;
        let (layout, file) = self.keeper.create(asked.queues, asked.queue_size)?;
        if !self.settle()? {
            return Ok(false);
        }
        // As long as the question: front-ends differ in the padding at the end.
        let mut body = message.body().to_vec();
        body[..8].copy_from_slice(&layout.bytes.to_ne_bytes());
        body[8..16].copy_from_slice(&layout.offset.to_ne_bytes());
        let mut reply = Message::new(GET_INFLIGHT_FD, FLAG_REPLY, &body);
        reply.descriptors.push(file.into());
        reply.send(self.front_end)?;
        Ok(true)
    }

    fn set_inflight(&mut self, mut message: Message) -> Result<bool, RelayError> {
        let layout = message.layout();
        let (Some(layout), [_]) = (layout, &message.descriptors[..]) else { return Err(message.malformed()) };
        let file = message.descriptors.remove(0);
        // What was sent before may have stopped rings, which keep the record that they have while they run.
        if !self.settle()? {
            return Ok(false);
        }
        self.keeper.set(layout, file)?;
        if message.needs_reply() {
            Message::new(SET_INFLIGHT_FD, FLAG_REPLY, &0_u64.to_ne_bytes()).send(self.front_end)?;
        }
        Ok(true)
    }
}

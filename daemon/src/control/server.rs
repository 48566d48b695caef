//! The socket and its connections.

use std::fmt;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use snapfence::protocol::Failure;

use super::connection::Connection;
use super::encode;
use super::outbox::Outbox;
use super::peer::Peer;
use super::{Commands, Events};
use crate::socket::{BindError, SocketAccess, SocketFile, listen_at};

/// Connections waiting to be accepted.
const BACKLOG: i32 = 128;
/// Rest after the system could not give us a connection, so that we do not spin.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// The patience with a request that does not end: for slow hands, and against programs that hold their connection for ever.
const PATIENCE: Duration = Duration::from_secs(300);
/// Least time between two lines in the log about refused connections.
const REFUSALS_APART: Duration = Duration::from_secs(1);
/// How long [`Server::stop`] waits for the connections. They themselves give up earlier.
const STOP_WAIT: Duration = Duration::from_secs(3);

/// Where to listen, and to whom.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The socket's path. A socket that nobody listens on any more is replaced.
    pub path: PathBuf,
    /// Users who may connect, besides this process's own and root.
    pub allowed_uids: Vec<u32>,
    /// Connections at the same time.
    pub max_connections: usize,
    /// How long the rest of a request may fail to come before the connection is closed.
    pub patience: Duration,
}

impl ServerOptions {
    /// The defaults: nobody else, 64 connections, 5 minutes of patience.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, allowed_uids: Vec::new(), max_connections: 64, patience: PATIENCE }
    }

    fn admits(&self, uid: u32) -> bool {
        uid == 0 || uid == rustix::process::geteuid().as_raw() || self.allowed_uids.contains(&uid)
    }
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path cannot be that of a socket.
    #[error("control socket path {} has {bytes} bytes; a socket's path has at most 107", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// Something else has this path.
    #[error("control socket path {} exists and is not a socket; remove it, or give another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another daemon has this path.
    #[error("another daemon listens on control socket {}; stop that one, or give another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("cannot listen on control socket {}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The running control server. Dropping it stops it as [`Server::stop`] does.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Goes as soon as nobody accepts any more.
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct Shared {
    connections: Mutex<Vec<Arc<Outbox>>>,
    /// A connection has ended.
    ended: Condvar,
    /// Readable when the acceptor has to end.
    stop: OwnedFd,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Vec<Arc<Outbox>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Begins to listen. The socket's mode is 0600.
    ///
    /// # Errors
    ///
    /// If the path is taken or cannot be used, or the system has no more threads or files.
    pub fn start(options: ServerOptions, commands: Arc<dyn Commands>, events: Events) -> Result<Self, ServerError> {
        let path = options.path.clone();
        let failed = |source: io::Error| ServerError::Listen { path: path.clone(), source };
        let (listener, file) = open(&path)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        let shared = Arc::new(Shared { connections: Mutex::default(), ended: Condvar::new(), stop });
        let acceptor = Acceptor { listener, options, commands, events, shared: shared.clone(), refusals: Refusals::default() };
        let acceptor = thread::Builder::new().name("control".to_owned()).spawn(move || acceptor.run()).map_err(failed)?;
        Ok(Self { shared, acceptor: Some(acceptor), file: Some(file) })
    }

    /// Ends all connections: a request under way may still be answered for a second, then each is closed. Removes the socket.
    ///
    /// Not to be called from [`Commands::execute`]: that is a connection's own thread, which then would be waited for in vain.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        drop(self.file.take());
        // The counter of a new eventfd cannot be full.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if acceptor.join().is_err() {
            tracing::error!(event = "control_listener_panicked", "the control socket's listener has panicked");
        }
        let mut connections = self.shared.connections();
        for outbox in connections.iter() {
            outbox.stop();
        }
        let deadline = Instant::now() + STOP_WAIT;
        while !connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(event = "control_connections_left", count = connections.len(), "control connections did not end in time");
                return;
            }
            connections = self.shared.ended.wait_timeout(connections, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes the listening socket.
fn open(path: &Path) -> Result<(UnixListener, SocketFile), ServerError> {
    let path_of = || path.to_owned();
    listen_at(path, &SocketAccess::default(), SocketFlags::NONBLOCK, BACKLOG).map_err(|error| match error {
        BindError::TooLong { bytes } => ServerError::TooLong { path: path_of(), bytes },
        BindError::NotASocket => ServerError::NotASocket { path: path_of() },
        BindError::InUse => ServerError::InUse { path: path_of() },
        BindError::System(source) => ServerError::Listen { path: path_of(), source },
        other @ (BindError::NoGroup(_) | BindError::Group { .. }) => {
            ServerError::Listen { path: path_of(), source: io::Error::other(other) }
        }
    })
}

/// The listener thread.
struct Acceptor {
    listener: UnixListener,
    options: ServerOptions,
    commands: Arc<dyn Commands>,
    events: Events,
    shared: Arc<Shared>,
    refusals: Refusals,
}

impl Acceptor {
    fn run(mut self) {
        loop {
            let mut fds = [PollFd::new(&self.shared.stop, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(event = "control_poll_failed", %error, "cannot wait for control connections");
                    self.rest();
                }
            }
            if !fds[0].revents().is_empty() {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.accepted(stream),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    tracing::warn!(event = "control_accept_failed", %error, "cannot accept a control connection");
                    self.rest();
                }
            }
        }
    }

    /// Waits a little, but not when asked to stop.
    fn rest(&self) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: ACCEPT_REST.subsec_nanos().into() };
        // If this cannot wait either, there is nothing better to do than to go on.
        let _ = poll(&mut [PollFd::new(&self.shared.stop, PollFlags::IN)], Some(&timeout));
    }

    fn accepted(&mut self, stream: UnixStream) {
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                self.refused(None, &format_args!("cannot learn who connects to the control socket: {error}"));
                return;
            }
        };
        if !self.options.admits(peer.uid) {
            self.refused(Some(peer), &"this user may not use the control socket");
            refuse(&stream, format_args!("user {} may not use this control socket; only the daemon's own user and root may", peer.uid));
            return;
        }
        let mut connections = self.shared.connections();
        if connections.len() >= self.options.max_connections {
            drop(connections);
            self.refused(Some(peer), &"too many control connections");
            refuse(&stream, format_args!("there are {} control connections already; close one", self.options.max_connections));
            return;
        }
        let outbox = match Outbox::new() {
            Ok(outbox) => Arc::new(outbox),
            Err(error) => {
                drop(connections);
                self.refused(Some(peer), &format_args!("no file descriptor for a control connection: {error}"));
                return;
            }
        };
        connections.push(outbox.clone());
        drop(connections);
        let place = Place { shared: self.shared.clone(), outbox: outbox.clone() };
        let (commands, events, patience) = (self.commands.clone(), self.events.clone(), self.options.patience);
        let body = move || {
            let _place = place;
            let ended = Connection::new(stream, outbox, commands, events, patience).and_then(Connection::run);
            if let Err(error) = ended {
                tracing::debug!(event = "control_disconnected", pid = peer.pid, %error, "a control connection broke");
            }
        };
        if let Err(error) = thread::Builder::new().name("control client".to_owned()).spawn(body) {
            self.refused(Some(peer), &format_args!("no thread for a control connection: {error}"));
        }
    }

    /// Tells the log, but not of each of many: anybody may try as often as they like.
    fn refused(&mut self, peer: Option<Peer>, cause: &dyn fmt::Display) {
        if let Some(unsaid) = self.refusals.admit(Instant::now()) {
            let (uid, pid) = (peer.map(|peer| peer.uid), peer.map(|peer| peer.pid));
            tracing::warn!(event = "control_refused", uid, pid, %cause, unsaid, "control connection refused; unsaid: others before it");
        }
    }
}

/// What the log has heard of refused connections.
#[derive(Debug, Default)]
struct Refusals {
    last_said: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    /// Whether to speak of one that is refused now: then how many there were since the last time.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last_said.is_some_and(|said| now.duration_since(said) < REFUSALS_APART) {
            self.unsaid += 1;
            return None;
        }
        self.last_said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// Tells a client why it is not served. A client that does not take even that hears nothing.
fn refuse(stream: &UnixStream, why: fmt::Arguments<'_>) {
    let line = encode::answer(Err(Failure::generic(why)), None);
    let _ = stream.set_nonblocking(true).and_then(|()| io::Write::write(&mut &*stream, &line));
}

/// A connection's entry in the list, removed when its thread ends, however it does.
struct Place {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.connections().retain(|outbox| !Arc::ptr_eq(outbox, &self.outbox));
        self.shared.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_user_root_and_those_allowed_may_connect() {
        let own = rustix::process::geteuid().as_raw();
        let stranger = own.wrapping_add(4242);
        let mut options = ServerOptions::new(PathBuf::new());
        assert!(options.admits(own) && options.admits(0) && !options.admits(stranger) && !options.admits(u32::MAX));
        options.allowed_uids.push(stranger);
        assert!(options.admits(stranger) && !options.admits(stranger + 1));
    }

    #[test]
    fn the_log_hears_of_refusals_once_in_a_while_and_how_many_there_were() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        let heard: Vec<_> = (0..2500).map(|millisecond| refusals.admit(start + Duration::from_millis(millisecond))).collect();
        let expected = |millisecond| match millisecond {
            0 => Some(0),
            1000 | 2000 => Some(999),
            _ => None,
        };
        assert_eq!(heard, (0..2500).map(expected).collect::<Vec<_>>());
    }
}

//! Front-ends: one socket per device, one connection at a time, any number one after the other.
//!
//! - [`listen`]: the socket.
//! - `configuration`: what the device offers.
//! - `vring`, `backend`: our side of crate vhost-user-backend, which reads the messages and keeps the memory table. It can serve one connection
//!   only, so each gets a new one; nothing of the device is in there.
//! - `relay`: answers two messages that the crate refuses, about the record of requests in flight (`vring::inflight`). A queue keeps that record;
//!   a daemon that is started after one that was killed goes on with what is in it, when the front-end connects again.

mod backend;
mod configuration;
mod drains;
pub mod listen;
mod relay;
mod vring;

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use snapfence_image_format::storage::Environment;
use tracing::{error, info, warn};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use self::backend::Backend;
use self::drains::Drains;
use self::relay::{Relay, private_connection};
use self::vring::{Control, with_controls};
use crate::device::Device;
use crate::worker::WorkerHandle;

pub use self::listen::Listening;

/// How long to leave a connection waiting that could not be taken.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What happens to the connection of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// A front-end has connected.
    Connected,
    /// It is gone, and nothing of it is in flight any more.
    Disconnected,
}

/// A device that front-ends can connect to. Dropping it ends the connection, after what is in flight, and the listening.
#[derive(Debug)]
pub struct Server {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// How the accepting thread is told to end.
struct Stop {
    signal: OwnedFd,
    state: Mutex<StopState>,
}

#[derive(Default)]
struct StopState {
    is_stopping: bool,
    /// The present connection.
    connection: Option<Link>,
}

/// The sockets of a connection, towards the front-end and towards the crate.
struct Link {
    front_end: UnixStream,
    back_end: UnixStream,
}

impl Link {
    fn shut_down(&self) {
        for socket in [&self.front_end, &self.back_end] {
            // A socket that is closed already needs nothing.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stop({})", self.lock().is_stopping)
    }
}

impl Stop {
    fn lock(&self) -> std::sync::MutexGuard<'_, StopState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Serves `device` to whoever connects. Queue i is the work of `workers[i % workers.len()]`. `report` is called from the accepting thread.
    ///
    /// # Errors
    /// If the system gives no thread or no descriptor.
    ///
    /// # Panics
    /// If there are no workers.
    pub fn start<E: Environment>(
        device: Arc<Device<E>>,
        listening: Listening,
        workers: Vec<WorkerHandle<E>>,
        report: impl Fn(ConnectionEvent) + Send + 'static,
    ) -> io::Result<Self> {
        assert!(!workers.is_empty(), "somebody must serve the queues");
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { signal, state: Mutex::default() });
        let acceptor = Acceptor { device, listening, workers, stop: Arc::clone(&stop), report };
        let name = format!("accept {}", acceptor.device.name());
        let thread = std::thread::Builder::new().name(name).spawn(move || acceptor.run())?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.stop.lock().connection.is_some()
    }

    /// Begins to end the connection and the listening. Dropping the server waits for it.
    pub fn begin_stop(&self) {
        let mut state = self.stop.lock();
        state.is_stopping = true;
        if let Some(connection) = &state.connection {
            connection.shut_down();
        }
        // The counter of an eventfd that is written once cannot be full.
        let _ = rustix::io::write(&self.stop.signal, &1_u64.to_ne_bytes());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.begin_stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!(event = "accept_panicked", "an accepting thread had panicked");
        }
    }
}

struct Acceptor<E: Environment, R> {
    device: Arc<Device<E>>,
    listening: Listening,
    workers: Vec<WorkerHandle<E>>,
    stop: Arc<Stop>,
    report: R,
}

impl<E: Environment, R: Fn(ConnectionEvent)> Acceptor<E, R> {
    fn run(self) {
        while self.wait_for_connection() {
            if let Err(error) = self.serve() {
                warn!(event = "connection_failed", device = self.device.name(), cause = %error, "connection cannot be served");
                // What fails here (descriptors, threads) fails again at once. A stop is seen by the next wait.
                std::thread::sleep(RETRY_PAUSE);
            }
        }
    }

    /// `false` if it is time to stop.
    fn wait_for_connection(&self) -> bool {
        loop {
            let mut fds = [PollFd::new(self.listening.listener(), PollFlags::IN), PollFd::new(&self.stop.signal, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return false,
                Ok(_) if !fds[0].revents().is_empty() => return true,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    error!(event = "listening_failed", device = self.device.name(), cause = %error, "no front-end can connect any more");
                    return false;
                }
            }
        }
    }

    /// Takes the connection that waits, and serves it to its end.
    fn serve(&self) -> Result<(), BackendError> {
        let drains = Arc::<Drains>::default();
        let rings: Vec<Arc<Control>> = (0..self.device.options().queues)
            .map(|index| {
                let worker = &self.workers[usize::from(index) % self.workers.len()];
                Control::new(self.device.name().to_owned(), index, worker.attach(&self.device, index), Arc::clone(&drains))
            })
            .collect();
        let backend = Arc::new(Backend::new(Arc::clone(&self.device), rings));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let name = format!("vhost {}", self.device.name());
        let mut daemon = with_controls(backend.rings(), || VhostUserDaemon::new(name, Arc::clone(&backend), memory))?;
        let (front_end, _) = self.listening.listener().accept().map_err(BackendError::StartDaemon)?;
        let (listener, back_end) = private_connection().map_err(BackendError::StartDaemon)?;
        daemon.start(&mut Listener::from(listener))?;
        let link = Link {
            front_end: front_end.try_clone().map_err(BackendError::StartDaemon)?,
            back_end: back_end.try_clone().map_err(BackendError::StartDaemon)?,
        };
        {
            let mut state = self.stop.lock();
            if state.is_stopping {
                link.shut_down();
            }
            state.connection = Some(link);
        }
        info!(event = "connected", device = self.device.name(), "front-end connected");
        (self.report)(ConnectionEvent::Connected);
        let relayed = Relay::new(&front_end, &back_end, &*backend).run();
        let outcome = daemon.wait();
        backend.stop_rings();
        drop(daemon);
        self.stop.lock().connection = None;
        match (relayed, outcome) {
            (Err(error), _) => {
                warn!(event = "disconnected", device = self.device.name(), cause = %error, "front-end cut off");
            }
            (Ok(()), Ok(()) | Err(BackendError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage))) => {
                info!(event = "disconnected", device = self.device.name(), "front-end disconnected");
            }
            (Ok(()), Err(error)) => warn!(event = "disconnected", device = self.device.name(), cause = %error, "front-end cut off"),
        }
        (self.report)(ConnectionEvent::Disconnected);
        Ok(())
    }
}

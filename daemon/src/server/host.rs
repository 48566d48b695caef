//! Devices on vhost-user sockets.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use snapfence::protocol::{DeviceEvent, Event};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::UringEnvironment;

use super::offload::offload;
use super::workers::{Assignment, Workers};
use crate::connection::listen::SOCKET_MODE;
use crate::connection::{ConnectionEvent, Listening, Server};
use crate::device::{self, Device};
use crate::jobs::EventSink;
use crate::manager::{Export, ExportError, Host};
use crate::options::DeviceOptions;

/// Serves devices on vhost-user sockets, from queue threads that they share.
#[derive(Debug)]
pub struct VhostHost {
    workers: Rc<RefCell<Workers>>,
}

/// A device on its socket.
pub struct VhostExport {
    server: Server,
    assignment: Assignment,
    workers: Rc<RefCell<Workers>>,
}

impl VhostHost {
    /// A host with at most `threads` queue threads.
    pub fn new(threads: usize) -> Self {
        Self { workers: Rc::new(RefCell::new(Workers::new(threads))) }
    }
}

impl Host<UringEnvironment> for VhostHost {
    type Export = VhostExport;

    fn start(
        &self,
        options: &DeviceOptions,
        stack: &Arc<Stack<UringEnvironment>>,
        domain: &Arc<FenceDomain>,
        events: &EventSink,
    ) -> Result<VhostExport, ExportError> {
        let socket = &options.socket;
        let shown = device::DeviceOptions {
            name: options.name.clone(),
            serial: options.serial.clone(),
            read_only: options.read_only,
            queues: options.queues,
            queue_size: options.queue_size,
        };
        let device = Device::new(shown, Arc::clone(stack)).map_err(ExportError::new)?;
        let listening = Listening::bind(socket, SOCKET_MODE)
            .map_err(|error| ExportError::new(format!("cannot listen on socket {}: {error}", socket.display())))?;
        let (assignment, handles) = self
            .workers
            .borrow_mut()
            .assign(options.queues, domain)
            .map_err(|error| ExportError::new(format!("cannot start a queue thread: {error}")))?;
        let (name, events) = (options.name.clone(), Arc::clone(events));
        let report = move |happened| {
            let device = DeviceEvent { device: name.clone() };
            events(match happened {
                ConnectionEvent::Connected => Event::DeviceConnected(device),
                ConnectionEvent::Disconnected => Event::DeviceDisconnected(device),
            });
        };
        match Server::start(device, listening, handles, report) {
            Ok(server) => Ok(VhostExport { server, assignment, workers: Rc::clone(&self.workers) }),
            Err(error) => {
                self.workers.borrow_mut().give_back(assignment);
                Err(ExportError::new(format!("cannot serve socket {}: {error}", socket.display())))
            }
        }
    }

    async fn real_directory(&self, directory: &Path) -> io::Result<PathBuf> {
        let directory = directory.to_owned();
        // It blocks, and a file server that hangs must not stop the control thread.
        offload("real path", move || {
            let real = directory.canonicalize()?;
            if real.is_dir() { Ok(real) } else { Err(io::ErrorKind::NotADirectory.into()) }
        })
        .await?
    }

    async fn files_in(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let directory = directory.to_owned();
        offload("list directory", move || {
            let mut files = Vec::new();
            for entry in directory.read_dir()? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    files.push(entry.path());
                }
            }
            Ok(files)
        })
        .await?
    }
}

impl Export for VhostExport {
    fn is_connected(&self) -> bool {
        self.server.is_connected()
    }

    async fn stop(self) {
        let Self { server, assignment, workers } = self;
        server.begin_stop();
        if let Err(error) = offload("stop device", move || drop(server)).await {
            tracing::warn!(event = "stop_failed", %error, "a device could not be stopped in good order");
        }
        workers.borrow_mut().give_back(assignment);
    }
}

impl fmt::Debug for VhostExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostExport").field("server", &self.server).field("assignment", &self.assignment).finish_non_exhaustive()
    }
}

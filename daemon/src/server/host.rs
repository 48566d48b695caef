//! Devices on vhost-user sockets.

use std::cell::RefCell;
use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use snapfence::protocol::{BlockErrorAction, BlockIoError, DeviceEvent, Event, IoOperationType};
use snapfence_image_format::runtime::{offload, offload_apart};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::uring::UringEnvironment;

use super::priority::Foreground;
use super::workers::{Assignment, Workers};
use crate::connection::{ConnectionEvent, Listening, Server};
use crate::device::{self, Device};
use crate::jobs::EventSink;
use crate::manager::{Export, ExportError, Host, PathKind, TopNode};
use crate::options::DeviceOptions;

/// How many symbolic links Linux follows in one path.
const MAX_LINKS: usize = 40;

/// Serves devices on vhost-user sockets, from queue threads that they share.
#[derive(Debug)]
pub struct VhostHost {
    workers: Rc<RefCell<Workers>>,
    /// Where what guests have chosen outlives the daemon.
    choices: PathBuf,
}

/// A device on its socket.
pub struct VhostExport {
    server: Server,
    device: Arc<Device<UringEnvironment>>,
    assignment: Assignment,
    workers: Rc<RefCell<Workers>>,
}

impl VhostHost {
    /// A host with at most `threads` queue threads, made by `foreground`, which spend waits of up to `polling` looking for work. It keeps what guests have chosen in the
    /// directory `choices`.
    ///
    /// # Errors
    /// If that cannot be made.
    pub(super) fn new(foreground: Rc<Foreground>, threads: usize, polling: Duration, choices: PathBuf) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&choices)?;
        Ok(Self { workers: Rc::new(RefCell::new(Workers::new(foreground, threads, polling))), choices })
    }
}

impl Host<UringEnvironment> for VhostHost {
    type Export = VhostExport;

    fn start(
        &self,
        options: &DeviceOptions,
        stack: &Arc<Stack<UringEnvironment>>,
        domain: &Arc<FenceDomain>,
        top: &TopNode,
        events: &EventSink,
    ) -> Result<VhostExport, ExportError> {
        let socket = &options.socket;
        let shown = device::DeviceOptions {
            name: options.name.clone(),
            serial: options.serial.clone(),
            read_only: options.read_only,
            queues: options.queues,
            queue_size: options.queue_size,
            on_no_space: options.on_no_space,
        };
        let device = Device::new(shown, Arc::clone(stack)).map_err(ExportError::new)?;
        device.cache().keep_in(self.choices.join(&options.name)).map_err(ExportError::new)?;
        let listening = Listening::bind_for(socket, &options.socket_access)
            .map_err(|error| ExportError::new(format!("cannot listen on socket {}: {error}", socket.display())))?;
        let (assignment, handles) = self
            .workers
            .borrow_mut()
            .assign(options.queues, domain)
            .map_err(|error| ExportError::new(format!("cannot start a queue thread: {error}")))?;
        let (name, top, told) = (options.name.clone(), top.clone(), Arc::clone(events));
        device.space().report_to(move |shortage| {
            told(Event::BlockIoError(BlockIoError {
                device: name.clone(),
                node_name: top.name(),
                operation: IoOperationType::Write,
                action: if shortage.is_held { BlockErrorAction::Stop } else { BlockErrorAction::Report },
                nospace: true,
                reason: shortage.reason,
            }));
        });
        let (name, events) = (options.name.clone(), Arc::clone(events));
        let report = move |happened| {
            let device = DeviceEvent { device: name.clone() };
            events(match happened {
                ConnectionEvent::Connected => Event::DeviceConnected(device),
                ConnectionEvent::Disconnected => Event::DeviceDisconnected(device),
            });
        };
        match Server::start(Arc::clone(&device), listening, handles, report) {
            Ok(server) => Ok(VhostExport { server, device, assignment, workers: Rc::clone(&self.workers) }),
            Err(error) => {
                self.workers.borrow_mut().give_back(assignment);
                Err(ExportError::new(format!("cannot serve socket {}: {error}", socket.display())))
            }
        }
    }

    async fn real_directory(&self, directory: &Path) -> io::Result<PathBuf> {
        let directory = directory.to_owned();
        // It blocks, and a file server that hangs must not stop the control thread.
        offload(move || {
            let real = directory.canonicalize()?;
            if real.is_dir() { Ok(real) } else { Err(io::ErrorKind::NotADirectory.into()) }
        })
        .await?
    }

    async fn real_file(&self, path: &Path) -> io::Result<PathBuf> {
        let path = path.to_owned();
        offload(move || real_file(&path)).await?
    }

    async fn path_kinds(&self, paths: Vec<PathBuf>) -> io::Result<Vec<PathKind>> {
        offload(move || paths.iter().map(|path| path_kind(path)).collect()).await
    }

    async fn is_for_devices(&self, directory: &Path) -> io::Result<bool> {
        let directory = directory.to_owned();
        offload(move || {
            let device = directory.metadata()?.dev();
            let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
            // It looks like a tmpfs to statfs.
            Ok(has_devtmpfs(&std::fs::read_to_string("/proc/self/mountinfo")?, &number))
        })
        .await?
    }

    async fn files_in(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let directory = directory.to_owned();
        offload(move || {
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

/// See [`Host::real_file`]. Links are followed one by one, because the one to stop at may be anywhere among them.
fn real_file(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not end with a file name"))?;
        let directory = path.parent().unwrap_or(Path::new("/")).canonicalize()?;
        path = directory.join(name);
        if path_kind(&path) == PathKind::AloneByLink {
            return Ok(path);
        }
        match path.read_link() {
            Ok(target) => path = directory.join(target),
            // Whatever is wrong with the file is found out by opening it.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

fn path_kind(path: &Path) -> PathKind {
    let Ok(found) = path.symlink_metadata() else { return PathKind::Alone };
    if found.is_symlink() {
        let leads_to_device = path.metadata().is_ok_and(|target| target.file_type().is_block_device());
        let is_roots = |directory: Metadata| directory.uid() == 0 && directory.mode() & 0o022 == 0;
        let by_root = path.parent().is_some_and(|directory| directory.metadata().is_ok_and(is_roots));
        return if leads_to_device && by_root { PathKind::AloneByLink } else { PathKind::Neighbour };
    }
    if found.is_file() { PathKind::Neighbour } else { PathKind::Alone }
}

/// Whether the file system of this number (`major:minor`) is a devtmpfs, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn has_devtmpfs(mounts: &str, number: &str) -> bool {
    mounts.lines().any(|line| {
        let kind = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').next());
        line.split(' ').nth(2) == Some(number) && kind == Some("devtmpfs")
    })
}

impl Export for VhostExport {
    fn is_connected(&self) -> bool {
        self.server.is_connected()
    }

    fn waits_for_space(&self) -> bool {
        self.device.space().held() > 0
    }

    fn resume(&self) {
        self.device.space().resume();
    }

    async fn stop(self) {
        let Self { server, device, assignment, workers } = self;
        drop(device);
        server.begin_stop();
        if let Err(error) = offload_apart(move || drop(server)).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_directories_are_told_from_other_memory() {
        let mounts = "23 28 0:5 / /dev rw,nosuid - devtmpfs udev rw,size=1k\n24 23 0:22 / /dev/shm rw - tmpfs - devtmpfs rw\n";
        assert!(has_devtmpfs(mounts, "0:5"));
        assert!(!has_devtmpfs(mounts, "0:22") && !has_devtmpfs(mounts, "0:2"));
    }

    #[test]
    fn links_are_followed_to_the_real_file() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let root = directory.path().canonicalize().expect("a path");
        std::fs::create_dir_all(root.join("real/deep")).expect("directories");
        std::fs::write(root.join("real/image"), "x").expect("a file");
        let links =
            [("a", "b"), ("b", "real/deep/c"), ("real/deep/c", "../image"), ("circle", "circle"), ("loose", "real/none"), ("up", "..")];
        for (link, target) in links {
            std::os::unix::fs::symlink(target, root.join(link)).expect("a link");
        }
        assert_eq!(real_file(&root.join("a")).expect("there"), root.join("real/image"));
        assert_eq!(real_file(&root.join("loose")).expect("a directory"), root.join("real/none"));
        assert_eq!(real_file(&root.join("circle")).expect_err("endless").raw_os_error(), Some(libc::ELOOP));
        assert!(real_file(&root.join("up")).is_err() && real_file(&root.join("none/x")).is_err());
    }

    #[test]
    fn paths_speak_for_their_directory_if_they_are_files() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("image"), "x").expect("a file");
        std::os::unix::fs::symlink("image", path("link")).expect("a link");
        let table = [("image", PathKind::Neighbour), ("link", PathKind::Neighbour), ("none", PathKind::Alone), (".", PathKind::Alone)];
        for (name, expected) in table {
            assert_eq!(path_kind(&path(name)), expected, "{name}");
        }
    }
}

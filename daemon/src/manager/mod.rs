//! The devices of the daemon and the commands about them.
//!
//! Everything here runs as tasks of the control thread; a command that waits for a disk delays no other. The manager knows no socket: front-ends
//! come through [`Host`], so that it runs in simulation as it does in the daemon.

mod commands;
mod device;
mod host;
mod lifecycle;
mod neighbours;
mod nodes;
mod open;
mod places;
mod recover;
mod remains;
mod sizes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use snapfence::protocol::BlockdevAdd;
use snapfence_image_format::chain::AllowedDirectories;
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::kept::MemoryKeeper;
use snapfence_image_format::storage::{Environment, FileIdentity};

use crate::catalogue::Catalogue;
use crate::jobs::{EventSink, Jobs};
use crate::snapshot::{Lines, Progress};

pub use device::Device;
pub(crate) use device::DeviceLayer;
pub use host::{Export, ExportError, Host, PathKind};
pub use lifecycle::RemoveError;
pub use nodes::TopNode;
pub(crate) use open::Beneath;
pub use open::{BeneathError, DeviceOpenCause, DeviceOpenError, GivenBy};
pub use places::{Places, SocketPlaceError};

/// What the daemon serves, and what is going on with it.
pub struct Manager<E: Environment, H: Host<E>> {
    pub(crate) environment: E,
    pub(crate) host: H,
    pub(crate) catalogue: Catalogue,
    pub(crate) keeper: Arc<dyn MemoryKeeper>,
    pub(crate) domain: Arc<FenceDomain>,
    pub(crate) events: EventSink,
    pub(crate) jobs: Jobs,
    pub(crate) lines: Rc<Lines>,
    pub(crate) places: Places,
    /// Relative paths start here.
    pub(crate) working_directory: PathBuf,
    devices: RefCell<BTreeMap<String, Rc<Device<E, H>>>>,
    /// Names and sockets of devices that are being opened, and names that nodes will have.
    opening: RefCell<BTreeSet<Reserved>>,
    /// Fewer are being opened.
    opened: WaitQueue,
    /// Snapshots under way.
    pub(crate) snapshots: RefCell<BTreeMap<String, Rc<Progress>>>,
    /// What `blockdev-add` has named.
    nodes: RefCell<BTreeMap<String, BlockdevAdd>>,
    /// How many names were made up for nodes.
    made_nodes: Cell<u64>,
    /// Devices that cannot be served, because it is unknown which layer is their top, and why.
    unsettled: RefCell<BTreeMap<String, String>>,
    stopping: Cell<bool>,
    /// Runs once the daemon is asked to end.
    quit: Box<dyn Fn()>,
}

/// What two devices, or a device and a node, cannot both have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reserved {
    Name(String),
    Socket(PathBuf),
}

/// What a manager is made of.
#[derive(Debug)]
pub struct Parts<E, H> {
    /// Files, time and tasks.
    pub environment: E,
    /// Front-ends.
    pub host: H,
    /// What outlives the daemon.
    pub catalogue: Catalogue,
    /// Where images keep what must not be lost with the daemon.
    pub keeper: Arc<dyn MemoryKeeper>,
    /// Where relative paths start.
    pub working_directory: PathBuf,
    /// Where named files may be.
    pub places: Places,
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// A manager without devices. `quit` is called for the command of that name.
    pub fn new(parts: Parts<E, H>, events: EventSink, quit: impl Fn() + 'static) -> Rc<Self> {
        let clock = parts.environment.clone();
        Rc::new(Self {
            domain: FenceDomain::new(move || clock.now()),
            environment: parts.environment,
            host: parts.host,
            catalogue: parts.catalogue,
            keeper: parts.keeper,
            jobs: Jobs::new(Arc::clone(&events)),
            events,
            lines: Rc::default(),
            places: parts.places,
            working_directory: parts.working_directory,
            devices: RefCell::default(),
            opening: RefCell::default(),
            opened: WaitQueue::new(),
            snapshots: RefCell::default(),
            nodes: RefCell::default(),
            made_nodes: Cell::new(0),
            unsettled: RefCell::default(),
            stopping: Cell::new(false),
            quit: Box::new(quit),
        })
    }

    /// What outlives the daemon.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Whose queue threads its fences wait for; somebody should see to their deadlines.
    pub fn fences(&self) -> Arc<FenceDomain> {
        Arc::clone(&self.domain)
    }

    /// The device of that name.
    pub fn device(&self, name: &str) -> Option<Rc<Device<E, H>>> {
        self.devices.borrow().get(name).cloned()
    }

    /// All devices, in the order of their names.
    pub fn devices(&self) -> Vec<Rc<Device<E, H>>> {
        self.devices.borrow().values().cloned().collect()
    }

    /// Whether nothing new is begun.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// The device that has this file as a layer.
    pub(crate) fn device_with_layer(&self, file: FileIdentity) -> Option<String> {
        let devices = self.devices.borrow();
        let found = devices.values().find(|device| device.layers.borrow().iter().any(|layer| layer.identity == file));
        found.map(|device| device.name().to_owned())
    }

    /// Where names inside these images may lead, and overlays on them.
    ///
    /// # Errors
    /// If the system does not look at paths.
    pub(crate) async fn allowed_around(&self, images: Vec<PathBuf>) -> io::Result<AllowedDirectories> {
        let kinds = self.host.path_kinds(images.clone()).await?;
        Ok(self.places.around(images.iter().map(PathBuf::as_path).zip(kinds)))
    }

    /// The absolute path of a file in an existing directory, the directory without symbolic links.
    pub(crate) async fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        let path = self.working_directory.join(path);
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not end with a file name"))?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        Ok(self.host.real_directory(directory).await?.join(name))
    }
}

impl<E: Environment, H: Host<E>> fmt::Debug for Manager<E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("devices", &self.devices.borrow().keys()).field("jobs", &self.jobs).finish_non_exhaustive()
    }
}

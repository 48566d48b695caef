//! Opening a device: which layers it has, by the catalogue and by the images' headers, and what may be written to.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use snapfence::protocol::{Failure, LayerState};
use snapfence_image_format::chain::{self, AllowedDirectories, ChainError, ChainLayer, ChainOptions, Format, NameError, Protection};
use snapfence_image_format::stack::{MAX_LAYERS, Stack};
use snapfence_image_format::storage::{Environment, FileIdentity, Location};

use super::device::{Device, DeviceLayer};
use super::host::{ExportError, Host};
use super::nodes::TopNode;
use super::places::SocketPlaceError;
use super::{Manager, Reserved};
use crate::catalogue::{CatalogueError, DeviceRecord, LayerRecord, SnapshotState, layers_beneath};
use crate::options::DeviceOptions;

/// Who has given a device's paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenBy {
    /// The command line or the configuration file: they lead anywhere.
    Operator,
    /// The control socket.
    Socket,
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("device '{device}': {cause}")]
pub struct DeviceOpenError {
    /// Which device.
    pub device: String,
    /// What is wrong.
    #[source]
    pub cause: DeviceOpenCause,
}

/// What is wrong with a device that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DeviceOpenCause {
    /// The daemon is about to end.
    #[error("the daemon is stopping")]
    Stopping,
    /// It is unknown which layer is its top.
    #[error("it is unknown which layer is its top: {0}")]
    Unsettled(String),
    /// The name is taken.
    #[error("there already is a device of this name")]
    NameTaken,
    /// The name is a node's.
    #[error("its name is that of a block node: {0}")]
    NodeNameTaken(String),
    /// The socket is taken.
    #[error("socket {0} belongs to another device")]
    SocketTaken(PathBuf),
    /// The path leads where the control socket may not lead.
    #[error(transparent)]
    Place(#[from] NameError),
    /// The same of its socket.
    #[error(transparent)]
    SocketPlace(#[from] SocketPlaceError),
    /// The directory of a path cannot be used.
    #[error("the directory of {path} cannot be used: {source}")]
    Directory {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system does not say what is at a path.
    #[error("the paths of the layers cannot be looked at: {0}")]
    Look(#[source] io::Error),
    /// The image cannot be found.
    #[error("image {path} cannot be opened: {source}")]
    Image {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer cannot be opened.
    #[error("{}{source}", if *.recorded { "the recorded stack cannot be opened: " } else { "" })]
    Chain {
        /// Whether the catalogue said which image is on top.
        recorded: bool,
        /// Which layer, and why.
        #[source]
        source: ChainError,
    },
    /// The image is not one of the layers that the device had.
    #[error(
        "image {} is not in the recorded stack of this name, whose top is {} and which has {layers} layers; give image={} to go on with \
         it, choose another name, or start once with --forget {device} to drop the record",
        image.display(), top.path.display(), top.path.display()
    )]
    NotInStack {
        /// The image asked for.
        image: PathBuf,
        /// The recorded top.
        top: LayerRecord,
        /// Recorded layers.
        layers: usize,
        /// The device.
        device: String,
    },
    /// The format is another than the recorded one.
    #[error("image {} is recorded as {recorded}, not {asked}", image.display())]
    OtherFormat {
        /// The image.
        image: PathBuf,
        /// The format asked for.
        asked: Format,
        /// The recorded format.
        recorded: Format,
    },
    /// More layers than a stack can have.
    #[error("{0} layers are more than the {MAX_LAYERS} that a stack can have")]
    TooDeep(usize),
    /// A disk without a sector.
    #[error("image {0} has no size: there is nothing to serve")]
    Empty(PathBuf),
    /// The catalogue does not answer.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// It is not known what must not be written to.
    #[error(transparent)]
    Beneath(#[from] BeneathError),
    /// Front-ends cannot reach it.
    #[error(transparent)]
    Export(#[from] ExportError),
}

impl From<DeviceOpenError> for Failure {
    fn from(error: DeviceOpenError) -> Self {
        Self::generic(error)
    }
}

/// Why it is not known which files must not be written to.
#[derive(Debug, thiserror::Error)]
pub enum BeneathError {
    /// The catalogue does not answer.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// A recorded layer cannot be looked at, so any file might be it.
    #[error("nothing is opened for writing, because {dependant} depends on {path}, which cannot be looked at: {source}")]
    Layer {
        /// The layer.
        path: PathBuf,
        /// What depends on it.
        dependant: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Files that lie beneath others, by the catalogue and by the headers of open images.
#[derive(Debug, Default)]
pub(crate) struct Beneath(HashMap<FileIdentity, String>);

impl Protection for Beneath {
    fn dependant(&self, file: FileIdentity) -> Option<String> {
        self.0.get(&file).cloned()
    }
}

/// Gives names back when opening has ended.
pub(super) struct Reservation<'a, E: Environment, H: Host<E>> {
    manager: &'a Manager<E, H>,
    reserved: Vec<Reserved>,
}

impl<'a, E: Environment, H: Host<E>> Reservation<'a, E, H> {
    pub(super) fn new(manager: &'a Manager<E, H>) -> Self {
        Self { manager, reserved: Vec::new() }
    }

    /// Reserves one thing more, unless somebody has.
    pub(super) fn add(&mut self, reserved: Reserved) -> bool {
        let free = self.manager.opening.borrow_mut().insert(reserved.clone());
        if free {
            self.reserved.push(reserved);
        }
        free
    }
}

impl<E: Environment, H: Host<E>> Drop for Reservation<'_, E, H> {
    fn drop(&mut self) {
        let mut opening = self.manager.opening.borrow_mut();
        for reserved in &self.reserved {
            opening.remove(reserved);
        }
        drop(opening);
        self.manager.opened.notify_all();
    }
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Opens a device and serves it.
    ///
    /// # Errors
    /// Which file or record stands in the way. Nothing has changed then.
    pub async fn add_device(self: &Rc<Self>, options: DeviceOptions, given_by: GivenBy) -> Result<Rc<Device<E, H>>, DeviceOpenError> {
        let device = options.name.clone();
        self.open_device(options, given_by).await.map_err(|cause| DeviceOpenError { device, cause })
    }

    async fn open_device(self: &Rc<Self>, mut options: DeviceOptions, given_by: GivenBy) -> Result<Rc<Device<E, H>>, DeviceOpenCause> {
        options.image = if given_by == GivenBy::Operator || self.places.are_open() {
            // A link that whoever may do anything has named is followed once: from here on the image goes by its own name, beside which its
            // overlays lie, and which they can name.
            let image = self.working_directory.join(&options.image);
            self.host.real_file(&image).await.map_err(|source| DeviceOpenCause::Directory { path: image, source })?
        } else {
            self.directory_checked(&options.image).await?
        };
        options.socket = self.directory_checked(&options.socket).await?;
        let location = match given_by {
            GivenBy::Operator => Location::Trusted(options.image.clone()),
            GivenBy::Socket => {
                self.places.admit_socket(&options.socket)?;
                self.places.admit(&options.image)?
            }
        };
        let _reservation = self.reserve(&options)?;
        if let Some(reason) = self.unsettled.borrow().get(&options.name) {
            return Err(DeviceOpenCause::Unsettled(reason.clone()));
        }
        let name = options.name.clone();
        let (record, frozen) = self
            .catalogue
            .run(move |store| {
                let frozen = store.snapshots()?.into_iter().filter(|snapshot| snapshot.state == SnapshotState::Frozen);
                let frozen: Vec<_> = frozen
                    .flat_map(|snapshot| snapshot.devices.into_iter().map(move |member| (snapshot.name.clone(), member)))
                    .filter(|(_, member)| member.device == name)
                    .collect();
                Ok((store.device(&name)?, frozen))
            })
            .await?;
        let (layers, allowed) = self.open_layers(&options, location, record.as_ref()).await?;
        let read_only = options.read_only;
        let stack = Stack::new(
            self.environment.clone(),
            &self.domain,
            layers.iter().map(|layer| std::sync::Arc::clone(&layer.layer)).collect(),
            read_only,
        );
        let top_node = TopNode::new(&options.name);
        let export = self.host.start(&options, &stack, &self.domain, &top_node, &self.events)?;
        let (name, settled) = (options.name.clone(), std::sync::Arc::clone(&stack));
        // Not waited for: the first flush will be, if it comes before.
        self.environment.spawn(async move {
            if let Err(error) = settled.settle().await {
                tracing::error!(event = "base_not_durable", device = %name, cause = %error, "flushes of the device fail until it is opened again");
            }
        });
        if let Some(at) = stack.doubtful_layer() {
            tracing::warn!(
                event = "doubtful_layer", device = %options.name, layer = %layers[at].path.display(),
                "a flush of it failed before it was opened: there are no snapshots of the device until the host is restarted or the disk copied"
            );
        }
        let top = layers.len() - 1;
        let mut layers: Vec<_> = layers
            .into_iter()
            .enumerate()
            .map(|(at, layer)| {
                let state = match layer.layer.earlier_failure() {
                    _ if at == top && !read_only => LayerState::Active,
                    Some(_) => LayerState::Failed,
                    None => LayerState::Frozen,
                };
                DeviceLayer::new(layer, state, if at == top { options.name.clone() } else { self.fresh_node_name() })
            })
            .collect();
        // There may be a thousand of either.
        let places: HashMap<_, _> = layers.iter().enumerate().map(|(at, layer)| (layer.record.path.clone(), at)).collect();
        for (snapshot, member) in frozen {
            let place = |record: &LayerRecord| places.get(&record.path).copied();
            if let Some(layer) = place(&member.frozen).map(|at| &mut layers[at]).filter(|layer| layer.record == member.frozen) {
                layer.snapshot = Some(snapshot.clone());
            }
            if let Some(layer) = place(&member.overlay).map(|at| &mut layers[at]).filter(|layer| layer.record == member.overlay) {
                layer.made_by = Some(snapshot);
            }
        }
        let device = Rc::new(Device {
            options,
            stack,
            layers: RefCell::new(layers),
            top_node,
            export: RefCell::new(Some(export)),
            leaving: Cell::new(false),
            in_snapshot: Cell::new(false),
            sizes: Rc::default(),
            allowed,
        });
        if let Err(error) = self.record_device(&device, record).await {
            // What is reported is the first failure.
            let _ = self.close_device(&device).await;
            return Err(error.into());
        }
        if self.is_stopping() {
            // Nobody would close it later.
            let _ = self.close_device(&device).await;
            return Err(DeviceOpenCause::Stopping);
        }
        self.devices.borrow_mut().insert(device.name().to_owned(), Rc::clone(&device));
        Ok(device)
    }

    async fn directory_checked(&self, path: &Path) -> Result<PathBuf, DeviceOpenCause> {
        self.real_path(path).await.map_err(|source| DeviceOpenCause::Directory { path: path.to_owned(), source })
    }

    /// Keeps name and socket from others while this device is being opened.
    fn reserve(&self, options: &DeviceOptions) -> Result<Reservation<'_, E, H>, DeviceOpenCause> {
        if self.is_stopping() {
            return Err(DeviceOpenCause::Stopping);
        }
        let (name, socket) = (Reserved::Name(options.name.clone()), Reserved::Socket(options.socket.clone()));
        let mut reservation = Reservation::new(self);
        if self.device(&options.name).is_some() || !reservation.add(name) {
            return Err(DeviceOpenCause::NameTaken);
        }
        if let Some(other) = self.device_of_node(&options.name) {
            return Err(DeviceOpenCause::NodeNameTaken(format!("a layer of device '{}' has it", other.name())));
        }
        if self.nodes.borrow().contains_key(&options.name) {
            return Err(DeviceOpenCause::NodeNameTaken("blockdev-add has given it, and blockdev-del takes it back".to_owned()));
        }
        if self.devices().iter().any(|device| device.options.socket == options.socket) || !reservation.add(socket) {
            return Err(DeviceOpenCause::SocketTaken(options.socket.clone()));
        }
        Ok(reservation)
    }

    /// Opens the recorded stack if there is one, else the image at `asked` with what lies beneath it. Answers where names inside them may lead as well.
    async fn open_layers(
        &self,
        options: &DeviceOptions,
        asked: Location,
        record: Option<&DeviceRecord>,
    ) -> Result<(Vec<ChainLayer<E>>, AllowedDirectories), DeviceOpenCause> {
        let (top, location) = match record.and_then(|record| Some((record, record.top()?))) {
            None => (LayerRecord { path: options.image.clone(), format: options.format }, asked),
            Some((record, top)) => {
                self.check_membership(options, record, top).await?;
                (top.clone(), Location::Trusted(top.path.clone()))
            }
        };
        let known = record.map(|record| record.layers.as_slice()).unwrap_or_default();
        let images = known.iter().map(|layer| layer.path.clone()).chain([options.image.clone()]).collect();
        let allowed = self.allowed_around(images).await.map_err(DeviceOpenCause::Look)?;
        let below = known.split_last().map_or(known, |(_, below)| below);
        let expected: Vec<_> = below.iter().map(|layer| (layer.path.clone(), layer.format)).collect();
        let mut protected = if options.read_only { Beneath::default() } else { self.beneath().await? };
        if record.is_none()
            && !options.read_only
            && let Ok(identity) = self.identity(&top.path).await
            && let Some(overlay) = self.overlay_beside(&top.path, identity).await
        {
            protected.0.insert(identity, overlay);
        }
        let chain_options = ChainOptions {
            allowed: &allowed,
            data_files: self.places.data_files(),
            cache: options.cache,
            writable: !options.read_only,
            protected: &protected,
            keeper: Some(&self.keeper),
            expected: &expected,
        };
        let layers = chain::open_chain(&self.environment, &location, top.format, chain_options)
            .await
            .map_err(|source| DeviceOpenCause::Chain { recorded: record.is_some(), source })?;
        if layers.len() > MAX_LAYERS {
            return Err(DeviceOpenCause::TooDeep(layers.len()));
        }
        if layers.last().is_none_or(|layer| layer.layer.virtual_size() == 0) {
            return Err(DeviceOpenCause::Empty(top.path));
        }
        if top.path != options.image {
            tracing::info!(
                event = "recorded_top", device = %options.name, image = %options.image.display(), top = %top.path.display(),
                layers = layers.len(), "the catalogue says that another layer is on top of the image"
            );
        }
        Ok((layers, allowed))
    }

    /// Whether the image asked for is one of the recorded layers.
    async fn check_membership(&self, options: &DeviceOptions, record: &DeviceRecord, top: &LayerRecord) -> Result<(), DeviceOpenCause> {
        let mut found = record.layers.iter().find(|layer| layer.path == options.image);
        if found.is_none() {
            // Perhaps by another name.
            let image = self.identity(&options.image).await;
            let image = image.map_err(|source| DeviceOpenCause::Image { path: options.image.clone(), source })?;
            let paths: Vec<_> = record.layers.iter().map(|layer| layer.path.clone()).collect();
            let identities = self.environment.identities(&paths).await;
            found = record
                .layers
                .iter()
                .zip(identities)
                .find(|(_, found)| found.as_ref().is_ok_and(|found| *found == image))
                .map(|(layer, _)| layer);
        }
        let Some(found) = found else {
            return Err(DeviceOpenCause::NotInStack {
                image: options.image.clone(),
                top: top.clone(),
                layers: record.layers.len(),
                device: options.name.clone(),
            });
        };
        if found.format != options.format {
            return Err(DeviceOpenCause::OtherFormat { image: options.image.clone(), asked: options.format, recorded: found.format });
        }
        Ok(())
    }

    pub(super) async fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        let mut identities = self.environment.identities(&[path.to_owned()]).await;
        identities.pop().expect("one for each path")
    }

    /// Everything that must not be written to, because a record or the header of an open image says that it lies beneath something.
    ///
    /// # Errors
    /// If the catalogue cannot be read, or it cannot be found out which file a record means.
    pub(crate) async fn beneath(&self) -> Result<Beneath, BeneathError> {
        let mut beneath = Beneath::default();
        let mut open_paths = HashMap::new();
        for device in self.devices() {
            for (at, layer) in device.layers.borrow().iter().enumerate() {
                open_paths.insert(layer.record.path.clone(), layer.identity);
                if at + 1 < device.layers.borrow().len() {
                    beneath.0.insert(layer.identity, format!("device '{}'", device.name()));
                }
            }
        }
        let recorded = self.catalogue.run(|store| layers_beneath(store)).await?;
        let not_open: BTreeSet<_> = recorded.iter().map(|(layer, _)| &layer.path).filter(|path| !open_paths.contains_key(*path)).collect();
        let not_open: Vec<_> = not_open.into_iter().cloned().collect();
        let identities = self.environment.identities(&not_open).await;
        let mut looked_at: HashMap<_, _> = not_open.into_iter().zip(identities).collect();
        looked_at.extend(open_paths.into_iter().map(|(path, identity)| (path, Ok(identity))));
        for (layer, dependant) in recorded {
            match &looked_at[&layer.path] {
                Ok(identity) => drop(beneath.0.entry(*identity).or_insert(dependant)),
                // A file that is not there cannot be written to either.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(_) => {
                    let source = looked_at.remove(&layer.path).and_then(Result::err).expect("seen just now");
                    return Err(BeneathError::Layer { path: layer.path, dependant, source });
                }
            }
        }
        Ok(beneath)
    }

    /// Keeps the catalogue in agreement with what the headers say.
    async fn record_device(&self, device: &Device<E, H>, before: Option<DeviceRecord>) -> Result<(), CatalogueError> {
        let record = DeviceRecord { name: device.name().to_owned(), layers: device.records() };
        if before.as_ref() == Some(&record) {
            return Ok(());
        }
        if let Some(before) = before {
            tracing::warn!(
                event = "stack_changed", device = %record.name, before = before.layers.len(), now = record.layers.len(),
                "the images name other layers beneath the top than those recorded; the images are followed"
            );
        }
        self.catalogue.run(move |store| store.put_device(&record)).await
    }
}

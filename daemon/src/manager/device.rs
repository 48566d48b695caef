//! One device: its options, its layers, and how it is described to people.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use snapfence::protocol::{
    self, BlockDeviceIoStatus, BlockNode, BlockNodeCache, BlockNodeImage, DeviceInfo, DeviceState, LayerInfo, LayerState, StackInfo,
};
use snapfence_image_format::chain::{AllowedDirectories, ChainLayer};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::stack::Stack;
use snapfence_image_format::storage::{CacheMode, Environment, FileIdentity};

use super::host::{Export, Host};
use super::nodes::TopNode;
use super::sizes::Sizes;
use crate::catalogue::LayerRecord;
use crate::options::{DeviceOptions, image_format};
use crate::snapshot::DeviceFacts;

/// A device that is served.
#[derive(Debug)]
pub struct Device<E: Environment, H: Host<E>> {
    /// As it was asked for, paths made absolute.
    pub options: DeviceOptions,
    /// The disk.
    pub stack: Arc<Stack<E>>,
    /// What the stack is made of, base first, never empty.
    pub(crate) layers: RefCell<Vec<DeviceLayer<E>>>,
    /// The node name of the last of them.
    pub(crate) top_node: TopNode,
    /// How front-ends reach it; gone once it is being stopped.
    pub(crate) export: RefCell<Option<H::Export>>,
    /// It is being removed.
    pub(crate) leaving: Cell<bool>,
    /// A snapshot of it is under way.
    pub(crate) in_snapshot: Cell<bool>,
    pub(crate) sizes: Rc<Sizes>,
    /// Where names inside its images may lead, and overlays on them: by the layers that were recorded when it was opened and the image asked for.
    /// All others lie there, so none of them adds to it.
    pub(crate) allowed: AllowedDirectories,
}

/// One layer and what is known of it beside what the stack knows.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLayer<E: Environment> {
    pub(crate) record: LayerRecord,
    pub(crate) identity: FileIdentity,
    pub(crate) layer: Arc<Layer<E>>,
    /// What QEMU's commands call it.
    pub(crate) node_name: String,
    pub(crate) state: LayerState,
    /// The snapshot that put it on top.
    pub(crate) made_by: Option<String>,
    /// The snapshot that froze it.
    pub(crate) snapshot: Option<String>,
}

impl<E: Environment> DeviceLayer<E> {
    pub(crate) fn new(opened: ChainLayer<E>, state: LayerState, node_name: String) -> Self {
        let record = LayerRecord { path: opened.path, format: opened.format };
        Self { record, identity: opened.identity, layer: opened.layer, node_name, state, made_by: None, snapshot: None }
    }
}

impl<E: Environment, H: Host<E>> Device<E, H> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.export.borrow().as_ref().is_some_and(Export::is_connected)
    }

    /// The layer that is written to.
    pub(crate) fn top(&self) -> DeviceLayer<E> {
        self.layers.borrow().last().expect("a stack has at least one layer").clone()
    }

    /// The snapshot that put the present top there.
    pub(crate) fn made_by(&self) -> Option<String> {
        self.layers.borrow().last().and_then(|top| top.made_by.clone())
    }

    /// Takes note of a new top: the one before is being frozen.
    pub(crate) fn put_on_top(&self, layer: DeviceLayer<E>) {
        let mut layers = self.layers.borrow_mut();
        if let Some(top) = layers.last_mut() {
            top.state = LayerState::Freezing;
        }
        self.top_node.rename(&layer.node_name);
        layers.push(layer);
    }

    pub(crate) fn set_layer_state(&self, layer: FileIdentity, state: LayerState) {
        if let Some(found) = self.layers.borrow_mut().iter_mut().find(|other| other.identity == layer) {
            found.state = state;
        }
    }

    /// Takes note of the snapshot that froze the layer at `path`.
    pub(crate) fn set_layer_snapshot(&self, path: &Path, snapshot: &str) {
        if let Some(found) = self.layers.borrow_mut().iter_mut().find(|other| other.record.path == path) {
            found.snapshot = Some(snapshot.to_owned());
        }
    }

    /// Gives a name to the node of the layer that `snapshot` put on top.
    pub(crate) fn name_node(&self, snapshot: &str, node_name: &str) {
        if let Some(found) = self.layers.borrow_mut().iter_mut().find(|layer| layer.made_by.as_deref() == Some(snapshot)) {
            node_name.clone_into(&mut found.node_name);
        }
        self.top_node.rename(&self.top().node_name);
    }

    /// What the admission of snapshots asks.
    pub(crate) fn facts(&self, in_line: usize) -> DeviceFacts {
        let layers = self.layers.borrow();
        DeviceFacts {
            read_only: self.options.read_only,
            leaving: self.leaving.get(),
            depth: layers.len() + in_line,
            doubtful: self.stack.doubtful_layer().and_then(|at| layers.get(at)).map(|layer| layer.record.path.clone()),
        }
    }

    /// As `device-list` shows it.
    pub fn info(&self) -> DeviceInfo {
        let top = self.top();
        let options = &self.options;
        let depth = self.layers.borrow().len();
        DeviceInfo {
            name: options.name.clone(),
            image: top.record.path,
            format: image_format(top.record.format),
            socket: options.socket.clone(),
            queues: options.queues,
            queue_size: options.queue_size,
            readonly: options.read_only,
            serial: options.serial.clone(),
            cache: match options.cache {
                CacheMode::Direct => protocol::CacheMode::Direct,
                CacheMode::Buffered => protocol::CacheMode::Buffered,
            },
            on_no_space: options.on_no_space,
            virtual_size: self.stack.virtual_size(),
            connected: self.is_connected(),
            depth: u32::try_from(depth).unwrap_or(u32::MAX),
            state: self.state(),
            io_status: self.io_status(),
        }
    }

    fn io_status(&self) -> BlockDeviceIoStatus {
        match &*self.export.borrow() {
            _ if self.stack.failure().is_some() => BlockDeviceIoStatus::Failed,
            Some(export) if export.waits_for_space() => BlockDeviceIoStatus::Nospace,
            _ => BlockDeviceIoStatus::Ok,
        }
    }

    /// Lets requests that wait for space be tried at once.
    pub(crate) fn resume(&self) {
        if let Some(export) = &*self.export.borrow() {
            export.resume();
        }
    }

    fn state(&self) -> DeviceState {
        match self.stack.failure() {
            Some(_) => DeviceState::Failed,
            None if self.in_snapshot.get() => DeviceState::Snapshot,
            None => DeviceState::Ready,
        }
    }

    /// As `stack-show` shows it, the top first, with the sizes found out last.
    pub fn stack_info(&self) -> StackInfo {
        let describe = |layer: &DeviceLayer<E>| LayerInfo {
            file: layer.record.path.clone(),
            format: image_format(layer.record.format),
            virtual_size: layer.layer.virtual_size(),
            allocated_bytes: self.sizes.of(layer.identity),
            snapshot: layer.snapshot.clone(),
            state: layer.state,
        };
        StackInfo { device: self.name().to_owned(), layers: self.layers.borrow().iter().rev().map(describe).collect() }
    }

    /// As `query-named-block-nodes` shows its layers, the top first.
    pub(crate) fn block_nodes(&self) -> Vec<BlockNode> {
        let layers = self.layers.borrow();
        (0..layers.len()).rev().map(|at| self.block_node(&layers[..=at])).collect()
    }

    /// The last of these layers, which lies on the others.
    fn block_node(&self, layers: &[DeviceLayer<E>]) -> BlockNode {
        let (layer, below) = layers.split_last().expect("a layer is asked for");
        let is_top = below.len() + 1 == self.layers.borrow().len();
        let backing = below.last().map(|layer| &layer.record);
        let file = layer.record.path.display().to_string();
        let image = BlockNodeImage {
            filename: file.clone(),
            format: layer.record.format.name().to_owned(),
            virtual_size: layer.layer.virtual_size(),
            actual_size: self.sizes.of(layer.identity),
            // Of an open image; reference counts are never updated late.
            dirty_flag: false,
            cluster_size: layer.layer.cluster_bytes(),
            backing_filename: backing.map(|record| record.path.display().to_string()),
            full_backing_filename: backing.map(|record| record.path.display().to_string()),
            backing_filename_format: backing.map(|record| record.format.name().to_owned()),
        };
        BlockNode {
            file,
            node_name: layer.node_name.clone(),
            ro: self.options.read_only || !is_top,
            active: true,
            drv: layer.record.format.name().to_owned(),
            backing_file: backing.map(|record| record.path.display().to_string()),
            backing_file_depth: u32::try_from(below.len()).unwrap_or(u32::MAX),
            image,
            cache: BlockNodeCache { writeback: true, direct: self.options.cache == CacheMode::Direct, no_flush: false },
            ..BlockNode::default()
        }
    }

    /// The format and path of every layer, base first, as the catalogue keeps them.
    pub(crate) fn records(&self) -> Vec<LayerRecord> {
        self.layers.borrow().iter().map(|layer| layer.record.clone()).collect()
    }
}

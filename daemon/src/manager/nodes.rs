//! Names of block nodes, as QEMU's commands use them.
//!
//! A layer keeps its node's name for as long as it is served: the top begins with the device's, an overlay has the one that the client gives it,
//! and whatever has been given none gets one that no client can give. Names of nodes and devices are one set, since commands take either.

use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use snapfence::protocol::{BlockNode, BlockNodeCache, BlockNodeImage, BlockdevAdd, Failure};
use snapfence_image_format::storage::Environment;

use super::device::Device;
use super::host::Host;
use super::open::Reservation;
use super::{Manager, Reserved};
use crate::name;

/// The name of the node that is attached to a device, for threads that tell of the device. Clones are the same.
#[derive(Clone, Debug)]
pub struct TopNode(Arc<Mutex<String>>);

impl TopNode {
    pub(super) fn new(name: &str) -> Self {
        Self(Arc::new(Mutex::new(name.to_owned())))
    }

    /// Its name now.
    pub fn name(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn rename(&self, name: &str) {
        name.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// A name for a node that has been given none: `#` begins no name that clients can give.
    pub(crate) fn fresh_node_name(&self) -> String {
        let number = self.made_nodes.get();
        self.made_nodes.set(number.wrapping_add(1));
        format!("#block{number:03}")
    }

    /// The device with a layer of this node name.
    pub(super) fn device_of_node(&self, node: &str) -> Option<Rc<Device<E, H>>> {
        self.devices().into_iter().find(|device| device.layers.borrow().iter().any(|layer| layer.node_name == node))
    }

    /// The device whose top has this node name: only tops can be covered.
    ///
    /// # Errors
    /// If there is no such node, or it lies beneath another one.
    pub(super) fn device_under_node(&self, node: &str) -> Result<Rc<Device<E, H>>, Failure> {
        let device = self.device_of_node(node).ok_or_else(|| Failure::no_device(node))?;
        let top = device.top().node_name;
        if top != node {
            let name = device.name();
            return Err(Failure::generic(format_args!(
                "node '{node}' lies beneath others and does not change any more; the top of device '{name}' is node '{top}'"
            )));
        }
        Ok(device)
    }

    /// The device of this name, or the one whose top has this node name.
    ///
    /// # Errors
    /// As of [`Manager::device_under_node`].
    pub(super) fn device_or_node(&self, name: &str) -> Result<Rc<Device<E, H>>, Failure> {
        self.device(name).map_or_else(|| self.device_under_node(name), Ok)
    }

    /// Whether a new node may have this name.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_new_node(&self, node: &str) -> Result<(), Failure> {
        if name::check(node).is_err() {
            return Err(Failure::generic(format_args!("'{node}' cannot be a node's name: a name has {}", name::RULE)));
        }
        let known = self.nodes.borrow().contains_key(node) || self.device(node).is_some() || self.device_of_node(node).is_some();
        if known || self.is_promised(node) {
            return Err(Failure::generic(format_args!("there already is a node or device '{node}'")));
        }
        Ok(())
    }

    /// Whether a device being opened or a snapshot under way will have this name.
    pub(super) fn is_promised(&self, name: &str) -> bool {
        self.opening.borrow().contains(&Reserved::Name(name.to_owned()))
    }

    /// Keeps names from others until a snapshot has given them to its overlays.
    ///
    /// # Errors
    /// If one is named twice or is promised already.
    pub(super) fn promise_nodes<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Reservation<'_, E, H>, Failure> {
        let mut promise = Reservation::new(self);
        for name in names {
            if !promise.add(Reserved::Name(name.to_owned())) {
                return Err(Failure::generic(format_args!("the node '{name}' is named twice, or another snapshot is about to use it")));
            }
        }
        Ok(promise)
    }

    /// As `query-named-block-nodes` shows them: the layers of all devices, the top first, then what is not in use yet.
    pub(super) fn block_nodes(&self) -> Vec<BlockNode> {
        let mut nodes: Vec<_> = self.devices().iter().flat_map(|device| device.block_nodes()).collect();
        nodes.extend(self.nodes.borrow().values().map(waiting_node));
        nodes
    }
}

/// A node that nobody uses yet. Its image is opened when a snapshot is taken: until then its size is not known, and is shown as 0.
fn waiting_node(node: &BlockdevAdd) -> BlockNode {
    let file = node.file.filename.display().to_string();
    BlockNode {
        node_name: node.node_name.clone(),
        drv: node.driver.to_string(),
        image: BlockNodeImage { filename: file.clone(), format: node.driver.to_string(), ..BlockNodeImage::default() },
        file,
        active: true,
        cache: BlockNodeCache { writeback: true, direct: true, no_flush: false },
        ..BlockNode::default()
    }
}

//! What the manager needs beside files: front-ends, and the names that paths really have.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::Environment;

use super::nodes::TopNode;
use crate::jobs::EventSink;
use crate::options::DeviceOptions;

/// Serves stacks to front-ends. In simulation there are none, or simulated ones.
pub trait Host<E: Environment>: fmt::Debug + 'static {
    /// One device that front-ends can reach.
    type Export: Export;

    /// Begins to serve `stack`. Threads that take requests join `domain`; connections, and requests that fail at the node `top`, are told to
    /// `events`.
    ///
    /// # Errors
    /// If the socket cannot be used or there are no threads.
    fn start(
        &self,
        options: &DeviceOptions,
        stack: &Arc<Stack<E>>,
        domain: &Arc<FenceDomain>,
        top: &TopNode,
        events: &EventSink,
    ) -> Result<Self::Export, ExportError>;

    /// The absolute path that an existing directory really has, without symbolic links.
    fn real_directory(&self, directory: &Path) -> impl Future<Output = io::Result<PathBuf>>;

    /// The absolute path that an image really has, without symbolic links, but for a link that is [`PathKind::AloneByLink`]: what such links
    /// lead to has another number after the next start of the machine. The file need not exist.
    fn real_file(&self, path: &Path) -> impl Future<Output = io::Result<PathBuf>>;

    /// How far each of these absolute paths speaks for its directory.
    fn path_kinds(&self, paths: Vec<PathBuf>) -> impl Future<Output = io::Result<Vec<PathKind>>>;

    /// Whether an existing directory is one for device nodes, which is kept in memory.
    fn is_for_devices(&self, directory: &Path) -> impl Future<Output = io::Result<bool>>;

    /// The regular files in a directory.
    fn files_in(&self, directory: &Path) -> impl Future<Output = io::Result<Vec<PathBuf>>>;
}

/// What an image's path says about where its overlays and backing files may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// It is a file in a directory of images.
    Neighbour,
    /// It is a block device, or cannot be looked at: its directory says nothing.
    Alone,
    /// It is a symbolic link to a block device, in a directory that only root can change: the lasting name of the device.
    AloneByLink,
}

/// A device that front-ends can reach.
pub trait Export: fmt::Debug + 'static {
    /// Whether a front-end is connected now.
    fn is_connected(&self) -> bool;

    /// Whether requests wait for space.
    fn waits_for_space(&self) -> bool;

    /// Lets requests that wait for space be tried at once.
    fn resume(&self);

    /// Ends the connection, drains the queues and removes the socket. When it ends nobody uses the stack any more.
    fn stop(self) -> impl Future<Output = ()>;
}

/// Why a device cannot be reached by front-ends.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ExportError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl ExportError {
    /// Whatever the connection reports.
    pub fn new(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

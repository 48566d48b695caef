//! Errors that reading and writing an open image can end with. Opening has its own, per format.

use std::io;

use crate::units::{GuestRange, HostOffset};

/// Which part of an image an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// The image header and its extensions.
    Header,
    /// The first mapping level.
    L1Table,
    /// The second mapping level.
    L2Table,
    /// The first level of reference counts.
    RefcountTable,
    /// The second level of reference counts.
    RefcountBlock,
    /// The list of internal snapshots.
    SnapshotTable,
    /// Directory, tables and bits of persistent bitmaps.
    Bitmaps,
    /// Guest data.
    Data,
    /// A compressed cluster.
    CompressedCluster,
    /// The file as a whole: its length, its durability.
    File,
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::L1Table => "L1 table",
            Self::L2Table => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::Bitmaps => "bitmaps",
            Self::Data => "data",
            Self::CompressedCluster => "compressed cluster",
            Self::File => "file",
        })
    }
}

/// Why an operation on an open layer failed. Cheap to clone: several waiters may get the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LayerError {
    /// The medium failed.
    #[error("cannot {action} the {what} at {at}: {source}")]
    Io {
        /// "read", "write", "flush" and so on.
        action: &'static str,
        /// Of what.
        what: Structure,
        /// Where in the file.
        at: HostOffset,
        /// What the medium said.
        source: SharedIoError,
    },
    /// The image contradicts itself. It is not written to any more.
    #[error("the image is corrupt: {what} at {at}: {detail}")]
    Corrupt {
        /// Where the contradiction was found.
        what: Structure,
        /// Where in the file.
        at: HostOffset,
        /// What it is.
        detail: &'static str,
    },
    /// A write to a layer that is open for reading.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// An earlier flush or metadata write failed; what is durable is unknown until the image is opened again.
    #[error("an earlier write to the image failed and it must be opened again: {0}")]
    Failed(Box<LayerError>),
    /// A flush of the layer had failed before it was opened, or somebody else's has: nobody can say what of it a power cut would leave.
    #[error(
        "a flush of layer {layer} (the base is 0) has failed, so a power cut may take away what had been written to it until then; copy the disk \
         to a new image, or restart the host"
    )]
    Doubtful {
        /// Which layer of the stack, the base being 0.
        layer: usize,
    },
    /// A range outside the disk, or not on sectors.
    #[error("{range} is not within the disk of {size} bytes")]
    OutOfRange {
        /// The range asked for.
        range: GuestRange,
        /// Virtual size in bytes.
        size: u64,
    },
    /// The image cannot hold any more clusters, by its format.
    #[error("the image has reached the largest size that its {limit} allows")]
    TooLarge {
        /// What is exhausted.
        limit: &'static str,
    },
}

impl LayerError {
    /// A failure of the medium.
    pub fn io(action: &'static str, what: Structure, at: HostOffset, source: io::Error) -> Self {
        Self::Io { action, what, at, source: SharedIoError::from(source) }
    }

    /// Whether an earlier failure is the reason, which stands until the image is opened again.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// Whether the medium had no space left, or no more than a quota allows.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.is_no_space(),
            Self::Failed(cause) => cause.is_no_space(),
            _ => false,
        }
    }
}

/// An [`io::Error`] that can be cloned.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct SharedIoError(std::sync::Arc<io::Error>);

impl SharedIoError {
    /// The error itself.
    pub fn get(&self) -> &io::Error {
        &self.0
    }

    fn is_no_space(&self) -> bool {
        matches!(self.0.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

impl From<io::Error> for SharedIoError {
    fn from(error: io::Error) -> Self {
        Self(std::sync::Arc::new(error))
    }
}

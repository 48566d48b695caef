//! Why the catalogue does not answer.

use std::io;
use std::path::PathBuf;

use super::super::records::SnapshotState;
use super::SCHEMA;

/// Why the catalogue could not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Another daemon uses the state directory.
    #[error("the state directory {0} is in use by another snapfenced; stop it or use another directory")]
    InUse(PathBuf),
    /// The state directory cannot be used.
    #[error("cannot {action} {path}: {source}")]
    StateDirectory {
        /// "make", "open" and so on.
        action: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file of the catalogue cannot be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<CatalogueError>,
    },
    /// The database refuses.
    #[error("the catalogue cannot be {action}: {source}")]
    Database {
        /// "opened", "read", "written".
        action: &'static str,
        /// Why.
        #[source]
        source: redb::Error,
    },
    /// What is in the file is no database of ours, or was changed by something else.
    #[error(
        "the catalogue is damaged and was left as it is; put a copy in its place, or move it away and name each device's topmost image: {cause}"
    )]
    Damaged {
        /// What was found first.
        cause: String,
    },
    /// A newer program wrote it.
    #[error("the catalogue has layout {found} and this program knows layouts up to {SCHEMA}: use the newer snapfenced that wrote it")]
    Schema {
        /// The version found.
        found: u64,
    },
    /// A row that this program did not write.
    #[error("the catalogue's record of {what} makes no sense: {source}")]
    Record {
        /// Of what.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A snapshot name that is taken.
    #[error("there already is a snapshot `{0}`")]
    SnapshotExists(String),
    /// A snapshot name that is not known.
    #[error("there is no snapshot `{0}`")]
    NoSnapshot(String),
    /// A step that the snapshot's state does not allow.
    #[error("snapshot `{name}` is {} and cannot become {}", from.name(), to.name())]
    Transition {
        /// Which snapshot.
        name: String,
        /// Its state.
        from: SnapshotState,
        /// The state asked for.
        to: SnapshotState,
    },
    /// The thread of the catalogue has ended, because of a defect that it has reported.
    #[error("the catalogue has stopped working")]
    Stopped,
}

pub(super) fn read_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "read", source: source.into() }
}

pub(super) fn write_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "written", source: source.into() }
}

pub(super) fn open_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "opened", source: source.into() }
}

pub(super) fn file_error(source: io::Error) -> CatalogueError {
    open_error(redb::StorageError::Io(source))
}

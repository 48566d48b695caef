//! What requests are made to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Result;

use super::Job;
use super::file::FileEngine;
use super::report::Direction;
use super::vhost::VhostEngine;

/// A device or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A block device behind a vhost-user socket.
    VhostUser(PathBuf),
    /// A file, opened with `O_DIRECT` where that is possible.
    File(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vhost-user", path)) if !path.is_empty() => Ok(Self::VhostUser(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!("'{text}' is no target: expected vhost-user:SOCKET or file:PATH")),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VhostUser(path) => write!(f, "vhost-user:{}", path.display()),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl Target {
    pub(super) fn open(&self, job: &Job) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::VhostUser(path) => Box::new(VhostEngine::connect(path, job)?),
            Self::File(path) => Box::new(FileEngine::open(path, job)?),
        })
    }
}

/// A way to make requests, with a block of memory for each slot; slots of one queue follow one another.
pub(super) trait Engine {
    /// Size of the device in bytes.
    fn size(&self) -> u64;

    /// Prepares a request of one block at `at`.
    fn prepare(&mut self, slot: usize, direction: Direction, at: u64) -> Result<()>;

    /// Hands over what was prepared.
    fn submit(&mut self) -> Result<()>;

    /// Appends the slots whose requests have come back. Waits for one, if none has, for so long.
    ///
    /// # Errors
    /// If a request has failed.
    fn complete(&mut self, wait: Option<Duration>, done: &mut Vec<usize>) -> Result<()>;
}

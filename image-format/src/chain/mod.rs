//! Backing chains: the layers beneath an image, as the headers name them.

mod names;
mod open;

use std::fmt;
use std::str::FromStr;

pub use names::{AllowedDirectories, MAX_NAME_BYTES, NameError};
pub use open::{
    ChainCause, ChainError, ChainLayer, ChainOptions, Protection, Unprotected, backing, lock_file, open_chain, open_chain_unlocked,
    open_file,
};

/// Most layers of one chain.
pub const MAX_DEPTH: usize = 65_535;

/// How an image file is laid out. Always stated by the operator or by the header of the layer above, never guessed from the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Bytes as the guest sees them.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name that QEMU uses as well.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format that this program does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown image format `{0}`: known are raw and qcow2")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

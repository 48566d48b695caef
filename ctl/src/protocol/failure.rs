//! Errors as they are answered.

use std::fmt;

use serde::{Deserialize, Serialize};

/// QMP's error classes. Only the text differs within one; programs look at the class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command, or not at this time.
    CommandNotFound,
    /// No device or node of that name.
    DeviceNotFound,
    /// The device is there, and not in a state for this.
    DeviceNotActive,
    /// Only QEMU itself has a use for this one.
    #[serde(rename = "KVMMissingCap")]
    KvmMissingCap,
}

/// Why a command was not carried out, for programs (`class`) and for people (`desc`: which object, what is wrong, what to do).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Failure {
    /// Its class.
    pub class: ErrorClass,
    /// One sentence without a full stop.
    pub desc: String,
}

impl Failure {
    /// A failure of a class.
    pub fn new(class: ErrorClass, desc: impl fmt::Display) -> Self {
        Self { class, desc: desc.to_string() }
    }

    /// A failure without a class of its own.
    pub fn generic(desc: impl fmt::Display) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// No device or node of this name.
    #[must_use]
    pub fn no_device(name: &str) -> Self {
        Self::new(ErrorClass::DeviceNotFound, format_args!("there is no device or node called '{name}'; device-list names those there are"))
    }
}

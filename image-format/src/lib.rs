//! Disk image formats and copy-on-write stacks, over an asynchronous storage seam.
//!
//! - [`units`], [`buffer`], [`extent`], [`error`]: the words that everything else is written in.
//! - [`storage`], [`runtime`]: what lies beneath: files, time, chance, tasks; real or simulated.
//!
//! The library knows no socket, no virtqueue and no guest memory. docs/ARCHITECTURE.md shows how the parts fit together.

pub mod buffer;
pub mod error;
pub mod extent;
pub mod runtime;
pub mod storage;
pub mod units;

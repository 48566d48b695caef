//! Disk image formats and copy-on-write stacks, over an asynchronous storage seam.
//!
//! - [`units`], [`buffer`], [`extent`], [`error`]: the words that everything else is written in.
//! - [`storage`], [`runtime`]: what lies beneath: files, time, chance, tasks; real or simulated.
//! - [`raw`], [`qcow2`]: one image each; [`layer`]: an image as one layer of a stack.
//! - [`chain`]: which images belong together, by the names in their headers.
//! - [`stack`]: the layers as one disk, and the fence that puts a new one on top.
//!
//! The library knows no socket, no virtqueue and no guest memory. docs/ARCHITECTURE.md shows how the parts fit together.

pub mod buffer;
pub mod chain;
pub mod error;
pub mod extent;
pub mod layer;
pub mod qcow2;
pub mod raw;
mod rounds;
pub mod runtime;
pub mod stack;
pub mod storage;
mod sync;
pub mod units;

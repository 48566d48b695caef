//! The harness of the whole-system tests and of the demo.
//!
//! - [`guest`] boots a Linux guest under QEMU and talks to the program inside it.
//! - [`backend`] starts the storage daemon that serves the guest's disks and takes snapshots through it.
//! - [`counters`] decides whether the disks of a snapshot are one cut through time.
//! - [`tools`] runs QEMU's image tools; [`qmp`] speaks to a QMP socket; [`process`] ends what it started; [`skipped`] says what a test left out.

pub mod backend;
pub mod counters;
pub mod guest;
pub mod process;
pub mod qmp;
mod skip;
pub mod tools;

pub use skip::skipped;

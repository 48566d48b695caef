//! The parts of `snapfenced`.
//!
//! - [`catalogue`]: what outlives the daemon.
//! - [`connection`]: sockets, and the front-ends that connect to them.
//! - [`control`]: the control socket.
//! - [`device`]: one disk as guests see it.
//! - [`jobs`]: what goes on for longer than a command.
//! - [`manager`]: the devices and the commands about them.
//! - [`name`]: names of devices, snapshots and jobs.
//! - [`options`]: the command line and the configuration file.
//! - [`server`]: all of it, as a process.
//! - [`snapshot`]: group snapshots.
//! - [`socket`]: sockets that have a path.
//! - [`space`]: requests for which the medium has no space.
//! - [`vring`]: virtqueues, and the requests in them.
//! - [`worker`]: queue threads.

pub mod catalogue;
pub mod connection;
pub mod control;
pub mod device;
pub mod jobs;
pub mod manager;
pub mod name;
pub mod options;
pub mod server;
pub mod snapshot;
pub mod socket;
pub mod space;
mod tasks;
pub mod vring;
pub mod worker;

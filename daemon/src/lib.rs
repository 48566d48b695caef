//! The parts of `snapfenced`.
//!
//! - [`connection`]: sockets, and the front-ends that connect to them.
//! - [`device`]: one disk as guests see it.
//! - [`vring`]: virtqueues, and the requests in them.
//! - [`worker`]: queue threads.

pub mod connection;
pub mod device;
pub mod vring;
pub mod worker;

//! The manager on a simulated disk with simulated front-ends: commands as they come from the control socket, what they answer, what they leave
//! behind, and what a restart makes of a crash at any instant.
//!
//! Runs repeat from their seeds. The clock is virtual, so nothing here depends on how fast the machine is.

mod aborted;
mod crash;
mod devices;
mod doubtful;
mod expired;
mod refusals;
mod remains;
mod snapshots;
mod support;

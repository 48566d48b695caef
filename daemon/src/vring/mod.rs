//! The split virtqueue, device side (VIRTIO 1.3, 2.7), and the requests in it (5.2.6).
//!
//! - `mapping`: memory that the front-end shares and may take away.
//! - [`memory`]: guest memory, checked; the only place that touches it through raw pointers, with the ring areas beside it.
//! - [`ring`]: descriptor table, available and used ring of one queue; descriptor chains out, used elements in, notifications both ways.
//! - [`inflight`]: the record of chains in flight, which outlives this process.
//! - [`signal`]: eventfds that are shared with the front-end.
//! - [`request`]: what a chain asks for, and serving it from a view of the stack.
//!
//! A chain is read once into owned values and checked; whoever holds a [`Chain`] or a [`Request`] never checks again.

pub mod inflight;
mod mapping;
pub mod memory;
pub mod request;
pub mod ring;
pub mod signal;

#[cfg(test)]
pub(crate) mod driver;

pub use inflight::{InflightLog, InflightQueue};
pub use memory::GuestMemory;
pub use request::{Limits, Request, Status};
pub use ring::{Broken, Chain, ChainFault, Ring, RingError, RingFeatures, RingLayout, Used};
pub use signal::{EventDescriptor, Signal};

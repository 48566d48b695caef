//! Storage over io_uring.
//!
//! Each thread that does I/O has a [`Reactor`]: one ring, one executor, one place to wait. [`UringFile`] and [`UringEnvironment`] find the
//! reactor of the thread that they are called on, so files are shared freely between threads while rings never are.
//!
//! - `probe`: what the kernel offers, and a ring that makes use of it.
//! - `operation`, `transfer`: what one operation keeps alive, and what it does with a completion.
//! - `ring`: the operations of one thread; `reactor`: the thread's place to wait for them.
//! - `file`, `locks`, `open`, `stat`, `environment`: the seam's traits.

mod environment;
mod file;
mod locks;
mod open;
mod operation;
mod probe;
mod reactor;
mod ring;
#[cfg(test)]
#[allow(unreachable_pub, reason = "it is public where it comes from")]
#[path = "../../../../tests/src/skip.rs"]
mod skip;
mod stat;
mod transfer;

pub use environment::UringEnvironment;
pub use file::{UringFile, UringTransfer};
pub use probe::Tier;
pub use reactor::{Entered, Reactor, Wait, Watch, hold_while_in_flight};

//! Tasks: a small executor for one thread, and the one way in which tasks wait for one another across threads.

mod executor;
mod offload;
mod turns;
mod wait;

pub use executor::{Executor, Unpark, spawn};
pub use offload::{offload, offload_apart, offload_detached};
pub use turns::next_turn;
pub use wait::WaitQueue;

//! A load generator whose jobs read as fio's do, for block devices behind a vhost-user socket and, as the limit of what they can reach, for
//! files through io_uring.
//!
//! - [`Job`]: what is done.
//! - [`Target`]: to what. One thread makes all requests of a target.
//! - [`run()`]: does it, and measures.
//! - [`Report`]: what came of it, in the shape of fio's JSON.
//! - [`Memory`]: where the data of requests is.

mod file;
mod job;
mod memory;
mod report;
mod run;
mod target;
mod vhost;

pub use job::{Job, Pattern, Size};
pub use memory::Memory;
pub use report::{Direction, LogEntry, Report};
pub use run::run;
pub use target::Target;

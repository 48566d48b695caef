//! Fuzz targets: what strangers may hand to snapfence, each as a function from bytes to nothing, which panics where a promise is broken.
//!
//! - [`control`]: lines of the control socket.
//! - [`qcow2`]: an image together with what is done to it.
//! - [`source`]: takes an input apart.
//!
//! `make fuzz` sends inputs through them that libFuzzer makes (targets/); `cargo test` those of the corpus (tests/replay.rs).

pub mod control;
pub mod qcow2;
mod source;

#[allow(dead_code, reason = "it serves the tests of the manager as well")]
#[path = "../../../daemon/tests/manager/support.rs"]
mod support;

/// A target: its name, which is that of its folder in the corpus, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[("control", control::run), ("qcow2", qcow2::run)];

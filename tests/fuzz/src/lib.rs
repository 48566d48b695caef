//! Fuzz targets: what strangers may hand to snapfence, each as a function from bytes to nothing, which panics where a promise is broken.
//!
//! - [`catalogue`]: the catalogue's file.
//! - [`control`]: lines of the control socket.
//! - [`qcow2`]: an image together with what is done to it.
//! - [`vhost_user`]: messages of a front-end, with descriptors.
//! - [`virtqueue`]: descriptor chains, in memory that changes while it is read.
//! - `source`: takes an input apart.
//!
//! `make fuzz` sends inputs through them that libFuzzer makes (targets/); `cargo test` those of the corpus (tests/replay.rs).

pub mod catalogue;
pub mod control;
pub mod qcow2;
mod source;
pub mod vhost_user;
pub mod virtqueue;

#[path = "../../../daemon/tests/common/queue_thread.rs"]
mod queue_thread;
#[allow(dead_code, reason = "it serves the tests of the manager as well")]
#[path = "../../../daemon/tests/manager/support.rs"]
mod support;

/// A target: its name, which is that of its folder in the corpus, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("catalogue", catalogue::run),
    ("control", control::run),
    ("qcow2", qcow2::run),
    ("vhost_user", vhost_user::run),
    ("virtqueue", virtqueue::run),
];

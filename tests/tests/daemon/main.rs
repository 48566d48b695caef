//! `snapfenced` and `snapfence` as a user meets them: starting, refusing to start, being spoken to, stopping. No guest is needed for that; QEMU's
//! tools say whether the images are in order.

mod command_line;
mod front_ends;
mod lifecycle;
mod start_failures;
mod support;
mod wire;

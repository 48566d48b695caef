//! qcow2 images written through a stack hold what was written, as QEMU's own tools see it.
//!
//! - `random`: random requests of one thread, over every layout, with and without a backing file.
//! - `threads`: the same from several threads at once.
//! - `faults`: a medium that fails or is full.
//! - `grow`: disks that become larger.
//! - `crash`: the power goes off in the middle of making, repairing, growing, freezing.
//! - `killed`: the process is killed, and the guest goes on.
//! - `open`: what opening for writing repairs, forgets, keeps and refuses.
//! - `shared`: clusters that internal snapshots share, and compressed ones.
//! - `beneath`: what lay in the cache when a stack was opened over it.
//! - `torn`: metadata that was written in part, not at all or elsewhere.

mod beneath;
mod crash;
mod disk;
mod faults;
mod grow;
mod killed;
mod open;
mod random;
mod shared;
mod threads;
mod tools;
mod torn;

//! What the handshake of the fence synchronises with: the fence, the retirement of views, and waiting.
//!
//! Those three files name no primitive of the standard library for it, so that the tests `handshake_loom` and `handshake_shuttle` can compile
//! the same files over the primitives of a model checker.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

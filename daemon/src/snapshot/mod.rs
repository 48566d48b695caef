//! Group snapshots: who may take one and when, and what happens from the first look at an overlay to the commit record.

mod admit;
mod line;
pub(crate) mod overlay;
mod prepare;
mod progress;
mod run;

pub use admit::{Asked, DEFAULT_DEADLINE_MS, DeviceFacts, MAX_DEADLINE_MS, MAX_GROUP, Member, Overlay, Refusal, admit};
pub use line::{Lines, Place};
pub use overlay::{OverlayCause, OverlayError};
pub use progress::{Progress, info_of};
pub use run::StartError;

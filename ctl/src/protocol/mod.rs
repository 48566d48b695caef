//! What is said on the control socket.
//!
//! The wire rules are QMP's (QEMU's `docs/interop/qmp-spec`): one JSON object a line; a greeting; `qmp_capabilities` before anything else; then
//! `{"execute", "arguments", "id"}` answered by `{"return", "id"}` or `{"error": {"class", "desc"}, "id"}`, with
//! `{"event", "data", "timestamp"}` in between. Commands that QEMU has keep QEMU's names and shapes (`qemu`, `job`); the others are ours.
//!
//! Every command is a type with its arguments as fields ([`Call`]); [`Command`] is any one of them as the daemon receives it. Unknown keys, missing
//! keys and wrong types are errors that name the key, before anything has been done.

mod command;
mod device;
mod event;
mod failure;
mod job;
mod message;
mod qemu;
mod snapshot;
mod strict;
mod time;

pub use command::{Call, Command, Empty, NEGOTIATION, QueryCommands, QueryVersion, Quit, all_commands};
pub use device::{
    BlockDeviceIoStatus, CacheMode, DeviceAdd, DeviceInfo, DeviceList, DeviceOptionError, DeviceRemove, DeviceResume, DeviceState,
    ImageFormat, NoSpacePolicy,
};
pub use event::{BlockErrorAction, BlockIoError, DeviceEvent, Event, IoOperationType, JobStatusChange};
pub use failure::{ErrorClass, Failure};
pub use job::{JobCancel, JobInfo, JobStatus, QueryJobs};
pub use message::{CommandInfo, Greeting, Incoming, Request, Timestamp, VersionInfo, VersionTriple, greeting, version};
pub use qemu::{
    BlockNode, BlockNodeCache, BlockNodeImage, BlockdevAdd, BlockdevDel, BlockdevFile, BlockdevSnapshot, BlockdevSnapshotSync,
    CompletionMode, DetectZeroes, FileDriver, NewImageMode, QueryNamedBlockNodes, Transaction, TransactionAction, TransactionProperties,
};
pub use snapshot::{
    LayerInfo, LayerState, SnapshotCreate, SnapshotDevice, SnapshotInfo, SnapshotList, SnapshotMember, SnapshotShow, SnapshotState,
    StackInfo, StackShow,
};
pub use strict::{object, typed};
pub use time::{Moment, MomentError};

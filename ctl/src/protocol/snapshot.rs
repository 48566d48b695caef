//! Snapshots and stacks of layers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Call, ImageFormat, Moment};

/// Cut one or more devices at one point in time.
///
/// Answered when every queue has switched, or the attempt has failed; events and the job tell of the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotCreate {
    /// The snapshot's name, unique in the daemon's catalogue.
    pub name: String,
    /// The group. At least one, none twice.
    pub devices: Vec<SnapshotMember>,
    /// Make the overlays at the paths given. Overlays without a path are made in any case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub create: bool,
    /// How long the switch may take before the snapshot is given up, in milliseconds. 1000 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// The name of its job. Chosen by the daemon if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
}

impl Call for SnapshotCreate {
    const NAME: &'static str = "snapshot-create";
    type Answer = SnapshotInfo;
}

/// A device in a group, and the overlay it is to get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotMember {
    /// The device.
    pub device: String,
    /// The overlay. If absent, one is made beside the present top, named after the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PathBuf>,
    /// The overlay's format: qcow2 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
}

/// All snapshots of the catalogue, oldest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotList {}

impl Call for SnapshotList {
    const NAME: &'static str = "snapshot-list";
    type Answer = Vec<SnapshotInfo>;
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotShow {
    /// Its name.
    pub name: String,
}

impl Call for SnapshotShow {
    const NAME: &'static str = "snapshot-show";
    type Answer = SnapshotInfo;
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Overlays are made, opened and checked; the guest writes to the old tops.
    Preparing,
    /// The guest writes to the overlays; what it wrote before is on its way to the layers below.
    Switched,
    /// The layers below are complete and will not change.
    Frozen,
    /// There is no such snapshot; `error` says why.
    Failed,
}

impl SnapshotState {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Switched => "switched",
            Self::Frozen => "frozen",
            Self::Failed => "failed",
        }
    }
}

/// A snapshot. Times are there once they are known, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: SnapshotState,
    /// When it was asked for.
    pub created: Moment,
    /// The job that makes it, if the daemon still knows that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// What became of each device.
    pub devices: Vec<SnapshotDevice>,
    /// From the first to the last queue of the group switched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch_us: Option<u64>,
    /// The longest that a completion was held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_us: Option<u64>,
    /// From the switch until the last layer was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_us: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One device's part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDevice {
    /// The device.
    pub device: String,
    /// Where its writes go from now on.
    pub overlay: PathBuf,
    /// What holds the snapshot.
    pub frozen_layer: PathBuf,
    /// From the first to the last of its queues switched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch_us: Option<u64>,
    /// The longest that one of its completions was held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_us: Option<u64>,
    /// From the switch until its layer was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_us: Option<u64>,
}

/// The layers of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackShow {
    /// The device.
    pub device: String,
}

impl Call for StackShow {
    const NAME: &'static str = "stack-show";
    type Answer = StackInfo;
}

/// The layers of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackInfo {
    /// The device.
    pub device: String,
    /// Its layers, the top first.
    pub layers: Vec<LayerInfo>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// Its file or block device.
    pub file: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Size of the disk that it describes, in bytes.
    pub virtual_size: u64,
    /// Space that the file takes on its own medium, in bytes; absent if the medium does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    /// The snapshot that froze it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// What may still happen to it.
    pub state: LayerState,
}

/// What may still happen to a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerState {
    /// The guest writes to it.
    Active,
    /// Requests from before a cut still go to it.
    Freezing,
    /// Nothing.
    Frozen,
    /// It could not be made durable: flushes of the device fail or, if it has been opened again since, snapshots.
    Failed,
}

impl LayerState {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::Failed => "failed",
        }
    }
}

//! What the catalogue keeps, as plain data.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snapfence_image_format::chain::Format;

/// One layer of a device's stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Absolute path of the image.
    pub path: PathBuf,
    /// Its format.
    #[serde(with = "format_name")]
    pub format: Format,
}

/// The stack of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Which device.
    pub name: String,
    /// Its layers, base first.
    pub layers: Vec<LayerRecord>,
}

impl DeviceRecord {
    /// The layer that is written to. A recorded stack is never empty.
    pub fn top(&self) -> Option<&LayerRecord> {
        self.layers.last()
    }
}

/// How far a snapshot has come. Only a frozen one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotState {
    /// The overlays are durable; the devices may or may not write to them already. Start-up rolls it forward.
    Intended,
    /// Every device writes to its overlay; the layers beneath may not be durable yet.
    Switched,
    /// The layers beneath never change again and are durable: the snapshot is valid.
    Frozen,
    /// The snapshot does not count. The overlays may be in use all the same.
    Failed,
}

impl SnapshotState {
    /// The word for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Intended => "intended",
            Self::Switched => "switched",
            Self::Frozen => "frozen",
            Self::Failed => "failed",
        }
    }

    /// Whether a snapshot may go from this state to `next`.
    pub const fn may_become(self, next: Self) -> bool {
        matches!((self, next), (Self::Intended, Self::Switched | Self::Failed) | (Self::Switched, Self::Frozen | Self::Failed))
    }
}

/// One device's part in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDevice {
    /// Which device.
    pub device: String,
    /// The layer that the snapshot freezes: the snapshot's content is it with what lies beneath.
    pub frozen: LayerRecord,
    /// The layer that is written to from then on.
    pub overlay: LayerRecord,
    /// Whether the overlay was made by the daemon.
    pub created_overlay: bool,
    /// What was measured.
    #[serde(default)]
    pub times: DeviceTimes,
}

/// What a snapshot cost one device, in microseconds; absent until it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTimes {
    /// From the first to the last queue that switched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch_us: Option<u64>,
    /// The longest time for which a completion was held back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_us: Option<u64>,
    /// From the switch until the layer beneath was durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze_us: Option<u64>,
}

/// One group snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// What it is called.
    pub name: String,
    /// When it was intended, in microseconds since 1970-01-01 00:00 UTC.
    pub created_us: u64,
    /// How far it has come.
    pub state: SnapshotState,
    /// Every device of the group.
    pub devices: Vec<SnapshotDevice>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl SnapshotRecord {
    /// The part of `device`.
    pub fn device_mut(&mut self, device: &str) -> Option<&mut SnapshotDevice> {
        self.devices.iter_mut().find(|member| member.device == device)
    }
}

/// Overlays that the daemon makes for one snapshot: recorded before the first file is there, until the snapshot's intent names them or they are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Making {
    /// Unique. The images have it in their headers, and the names under which they are written.
    pub mark: u64,
    /// Where they are to be.
    pub overlays: Vec<PathBuf>,
}

/// Whole microseconds; saturates after half a million years.
pub fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Formats as their names.
mod format_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use snapfence_image_format::chain::Format;

    pub(super) fn serialize<S: Serializer>(format: &Format, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(format.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

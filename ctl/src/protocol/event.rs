//! What happens without being asked for.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{JobStatus, SnapshotInfo};

/// An event. Those not in this list are kept as they came by [`super::Incoming`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// QEMU's: a job goes to another status.
    JobStatusChange(JobStatusChange),
    /// Every queue of every member has switched to the overlays, within the deadline.
    SnapshotSwitched(SnapshotInfo),
    /// The layers below will never change again; the snapshot is complete and durable.
    SnapshotFrozen(SnapshotInfo),
    /// The snapshot will not come to be; `error` says why.
    SnapshotFailed(SnapshotInfo),
    /// A front-end has connected to a device.
    DeviceConnected(DeviceEvent),
    /// A front-end has gone from a device.
    DeviceDisconnected(DeviceEvent),
    /// QEMU's: requests of a device have failed, or wait.
    BlockIoError(BlockIoError),
    /// This client has not read for so long that events were left out.
    EventsLost {
        /// How many.
        count: u64,
    },
}

/// Data of `JOB_STATUS_CHANGE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStatusChange {
    /// The job.
    pub id: String,
    /// Its new status.
    pub status: JobStatus,
}

/// Data of the events about one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceEvent {
    /// The device.
    pub device: String,
}

/// Data of `BLOCK_IO_ERROR`, in QEMU's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The device.
    pub device: String,
    /// The block node that is attached to the device: its top, whichever layer has failed.
    pub node_name: String,
    /// What the request was.
    pub operation: IoOperationType,
    /// What became of it.
    pub action: BlockErrorAction,
    /// Whether the medium has no space left.
    pub nospace: bool,
    /// What the medium said, for people.
    pub reason: String,
}

/// What a request does to the medium, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoOperationType {
    /// It reads.
    Read,
    /// It writes, or changes what is allocated.
    Write,
}

/// What becomes of a request that the medium has failed, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockErrorAction {
    /// The guest has been told.
    Report,
    /// It waits. Unlike QEMU, nothing else stops.
    Stop,
}

impl Event {
    /// The names of all.
    pub const NAMES: [&str; 8] = [
        "JOB_STATUS_CHANGE",
        "SNAPSHOT_SWITCHED",
        "SNAPSHOT_FROZEN",
        "SNAPSHOT_FAILED",
        "DEVICE_CONNECTED",
        "DEVICE_DISCONNECTED",
        "BLOCK_IO_ERROR",
        "EVENTS_LOST",
    ];

    /// The event of a line from the daemon.
    ///
    /// # Errors
    ///
    /// If it is none that we know, or its data are of another shape.
    pub fn parse(name: &str, data: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(serde_json::json!({ "event": name, "data": data }))
    }

    /// Its name on the wire.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::JobStatusChange(_) => "JOB_STATUS_CHANGE",
            Self::SnapshotSwitched(_) => "SNAPSHOT_SWITCHED",
            Self::SnapshotFrozen(_) => "SNAPSHOT_FROZEN",
            Self::SnapshotFailed(_) => "SNAPSHOT_FAILED",
            Self::DeviceConnected(_) => "DEVICE_CONNECTED",
            Self::DeviceDisconnected(_) => "DEVICE_DISCONNECTED",
            Self::BlockIoError(_) => "BLOCK_IO_ERROR",
            Self::EventsLost { .. } => "EVENTS_LOST",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::{Moment, SnapshotDevice, SnapshotState};

    #[test]
    fn every_event_is_read_and_written_the_same() {
        let snapshot = SnapshotInfo {
            name: "s".to_owned(),
            state: SnapshotState::Switched,
            created: Moment::from_unix_microseconds(1_735_689_600_000_001),
            job: Some("j".to_owned()),
            devices: vec![SnapshotDevice {
                device: "vda".to_owned(),
                overlay: "/o".into(),
                frozen_layer: "/f".into(),
                switch_us: Some(5),
                hold_us: Some(7),
                freeze_us: None,
            }],
            switch_us: Some(5),
            hold_us: Some(7),
            freeze_us: None,
            error: None,
        };
        let written = json!({
            "name": "s", "state": "switched", "created": "2025-01-01T00:00:00.000001Z", "job": "j", "switch_us": 5, "hold_us": 7,
            "devices": [{ "device": "vda", "overlay": "/o", "frozen_layer": "/f", "switch_us": 5, "hold_us": 7 }],
        });
        let device = DeviceEvent { device: "vda".to_owned() };
        let table = [
            (
                Event::JobStatusChange(JobStatusChange { id: "j".to_owned(), status: JobStatus::Concluded }),
                json!({ "id": "j", "status": "concluded" }),
            ),
            (Event::SnapshotSwitched(snapshot.clone()), written.clone()),
            (Event::SnapshotFrozen(snapshot.clone()), written.clone()),
            (Event::SnapshotFailed(snapshot), written),
            (Event::DeviceConnected(device.clone()), json!({ "device": "vda" })),
            (Event::DeviceDisconnected(device), json!({ "device": "vda" })),
            (
                Event::BlockIoError(BlockIoError {
                    device: "vda".to_owned(),
                    node_name: "top".to_owned(),
                    operation: IoOperationType::Write,
                    action: BlockErrorAction::Stop,
                    nospace: true,
                    reason: "full".to_owned(),
                }),
                json!({
                    "device": "vda", "node-name": "top", "operation": "write", "action": "stop", "nospace": true, "reason": "full",
                }),
            ),
            (Event::EventsLost { count: 3 }, json!({ "count": 3 })),
        ];
        // All of them: the names that serde knows are in its complaint about another.
        let known = Event::parse("NO_SUCH_EVENT", &json!({})).unwrap_err().to_string();
        let known: Vec<_> = known.split('`').skip(3).step_by(2).collect();
        assert_eq!(known, Event::NAMES);
        assert_eq!(table.each_ref().map(|(event, _)| event.name()), Event::NAMES);
        for (event, data) in table {
            assert_eq!(serde_json::to_value(&event).unwrap(), json!({ "event": event.name(), "data": data }));
            assert_eq!(Event::parse(event.name(), &data).unwrap(), event);
        }
        assert!(Event::parse("NO_SUCH_EVENT", &json!({})).is_err());
    }
}

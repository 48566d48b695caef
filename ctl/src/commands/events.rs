//! `snapfence events`

use anyhow::Result;
use serde_json::json;
use snapfence::client::Received;
use snapfence::protocol::{BlockErrorAction, Event, Moment, SnapshotInfo};

use super::{Session, output};
use crate::render;

pub(super) fn run(session: &Session) -> Result<()> {
    let mut client = session.connect()?;
    loop {
        if let Some(received) = client.next_event(None)? {
            let line = if session.json { for_programs(&received) } else { for_people(&received) };
            output(&(line + "\n"))?;
        }
    }
}

/// One line of JSON, as it came.
fn for_programs(received: &Received) -> String {
    json!({ "event": received.name, "data": received.data, "timestamp": received.timestamp }).to_string()
}

fn for_people(received: &Received) -> String {
    let (seconds, microseconds) = (received.timestamp.seconds, received.timestamp.microseconds);
    let time = u64::try_from(i128::from(seconds) * 1_000_000 + i128::from(microseconds)).unwrap_or(0);
    let what = match received.event() {
        Some(Event::JobStatusChange(change)) => format!("job {} is {}", change.id, change.status.as_str()),
        Some(Event::SnapshotSwitched(snapshot)) => {
            format!("snapshot {} of {} has switched{}", snapshot.name, devices(&snapshot), times(&snapshot))
        }
        Some(Event::SnapshotFrozen(snapshot)) => {
            format!("snapshot {} of {} is frozen{}", snapshot.name, devices(&snapshot), times(&snapshot))
        }
        Some(Event::SnapshotFailed(snapshot)) => {
            let error = snapshot.error.as_deref().unwrap_or("no reason is given");
            format!("snapshot {} of {} has failed: {error}", snapshot.name, devices(&snapshot))
        }
        Some(Event::DeviceConnected(event)) => format!("a front-end has connected to {}", event.device),
        Some(Event::DeviceDisconnected(event)) => format!("the front-end of {} has gone", event.device),
        Some(Event::BlockIoError(event)) => {
            let fate = match event.action {
                BlockErrorAction::Stop => "requests wait",
                BlockErrorAction::Report => "the guest has an I/O error",
            };
            format!("{fate} on {}: {}", event.device, event.reason)
        }
        Some(Event::EventsLost { count }) => format!("{count} events are missing here, this program was too slow"),
        None => format!("{} {}", received.name, received.data),
    };
    format!("{}  {what}", Moment::from_unix_microseconds(time))
}

/// What is known of the times so far, after a colon.
fn times(snapshot: &SnapshotInfo) -> String {
    let times = render::times(snapshot);
    if times.is_empty() { times } else { format!(": {times}") }
}

fn devices(snapshot: &SnapshotInfo) -> String {
    let names: Vec<_> = snapshot.devices.iter().map(|device| device.device.as_str()).collect();
    names.join(", ")
}

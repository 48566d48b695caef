//! `snapfence snapshot`

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use snapfence::client::Client;
use snapfence::protocol::{Event, SnapshotCreate, SnapshotInfo, SnapshotList, SnapshotShow, SnapshotState};

use super::{Session, absolute};
use crate::arguments::{Member, SnapshotCommand, SnapshotCreateArguments};
use crate::render;

/// How long to rely on events before the daemon is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);

pub(super) fn run(session: &Session, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::List => {
            let snapshots = session.connect()?.call(&SnapshotList {})?;
            session.print(snapshots.as_slice(), render::snapshots)
        }
        SnapshotCommand::Show { name } => {
            let snapshot = session.connect()?.call(&SnapshotShow { name })?;
            session.print(&snapshot, render::snapshot)
        }
        SnapshotCommand::Create(arguments) => create(session, arguments),
    }
}

fn create(session: &Session, arguments: SnapshotCreateArguments) -> Result<()> {
    let SnapshotCreateArguments { name, devices, create, no_wait, deadline_ms } = arguments;
    let mut members = Vec::with_capacity(devices.len());
    for Member(mut member) in devices {
        member.overlay = member.overlay.as_deref().map(absolute).transpose()?;
        members.push(member);
    }
    let call = SnapshotCreate { name, devices: members, create, deadline_ms, job_id: None };
    let mut client = session.connect()?;
    let mut snapshot = client.call(&call).map_err(|error| match missing(&call) {
        Some(path) => anyhow!(error).context(format!("{} is not there; --create has it made", path.display())),
        None => error.into(),
    })?;
    if !no_wait {
        snapshot = wait_until_settled(&mut client, snapshot)?;
    }
    session.print(&snapshot, render::snapshot)?;
    if snapshot.state == SnapshotState::Failed {
        bail!("snapshot {} failed: {}", snapshot.name, snapshot.error.as_deref().unwrap_or("the daemon gives no reason"));
    }
    Ok(())
}

/// An overlay that is to be there and is not, as far as can be seen from here.
fn missing(asked: &SnapshotCreate) -> Option<&Path> {
    let overlays = asked.devices.iter().filter_map(|member| member.overlay.as_deref());
    overlays.filter(|_| !asked.create).find(|path| path.try_exists().is_ok_and(|exists| !exists))
}

/// Waits until nothing about the snapshot will change any more. Asks the daemon when no event has come for a while: one may have been lost.
fn wait_until_settled(client: &mut Client, mut snapshot: SnapshotInfo) -> Result<SnapshotInfo> {
    while !matches!(snapshot.state, SnapshotState::Frozen | SnapshotState::Failed) {
        match client.next_event(Some(ASK_AGAIN))?.map(|received| received.event()) {
            Some(Some(Event::SnapshotFrozen(now) | Event::SnapshotFailed(now))) if now.name == snapshot.name => snapshot = now,
            None | Some(Some(Event::EventsLost { .. })) => snapshot = client.call(&SnapshotShow { name: snapshot.name })?,
            Some(_) => {}
        }
    }
    Ok(snapshot)
}

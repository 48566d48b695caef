//! What start-up makes of snapshots that the last run has not finished.
//!
//! | recorded | overlay | then |
//! |---|---|---|
//! | intended | there, covers the recorded top | it becomes the top; the snapshot has failed |
//! | intended | whatever it is: the recorded top is another by now | the intent is dropped for this device |
//! | intended | anything else: not there, not readable, no image, covers another file | nothing changes, and none of the group's devices is served, until a later start finds it as it was |
//! | switched | is the top already | the snapshot has failed: what lies beneath was perhaps not durable |
//!
//! Rolling forward is right whether the devices had switched or not: an overlay that nothing was written to changes nothing, and one that was
//! written to holds what the guest was told is there. It was durable and covered the top before it was recorded; if it is not found so, its file
//! system may not be mounted, or a directory is not allowed any more, and to go on without it would take the guest back in time. `--forget` is
//! for operators who know better.
//!
//! After that, whatever snapshots without an intent have left is removed (`remains`).

use std::io;
use std::path::Path;
use std::rc::Rc;

use snapfence_image_format::qcow2::{Header, HeaderError};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Storage};

use super::Manager;
use super::host::Host;
use crate::catalogue::{CatalogueError, DeviceRecord, DeviceTimes, SnapshotDevice, SnapshotRecord, SnapshotState};
use crate::snapshot::overlay::{self, Below, OverlayCause};

/// What is to be done with one overlay.
enum Verdict {
    Adopt,
    /// The device certainly does not write to it.
    Drop(String),
    /// Why it is unknown.
    Wait(String),
}

/// Why it is unknown whether an overlay is a device's top, in words that go on with its name.
#[derive(Debug, thiserror::Error)]
enum Unclear {
    #[error("cannot be looked at ({0})")]
    Look(#[from] io::Error),
    #[error("is not what was recorded ({0})")]
    Header(#[from] HeaderError),
    #[error("does not cover the recorded top ({0})")]
    Cover(#[from] OverlayCause),
}

/// Each snapshot after those whose overlays it covers. The times at which they were asked for do not tell: the wall clock may have been set back
/// in between, and an intent that is judged too early is dropped, with what guests have written to its overlay.
fn in_order_of_layers(mut left: Vec<SnapshotRecord>) -> Vec<SnapshotRecord> {
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let covers = |above: &SnapshotRecord, below: &SnapshotRecord| {
            above.devices.iter().any(|member| below.devices.iter().any(|other| member.frozen.path == other.overlay.path))
        };
        let lowest = left.iter().position(|snapshot| !left.iter().any(|other| covers(snapshot, other)));
        // Records that lead in a circle make no sense in any order.
        ordered.push(left.remove(lowest.unwrap_or(0)));
    }
    ordered
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Brings the catalogue to rest after the last run. Call before devices are added.
    ///
    /// # Errors
    /// If the catalogue cannot be read or written.
    pub async fn recover(self: &Rc<Self>) -> Result<(), CatalogueError> {
        let mut intents = Vec::new();
        for snapshot in self.catalogue.run(|store| store.snapshots()).await? {
            match snapshot.state {
                SnapshotState::Frozen | SnapshotState::Failed => {}
                SnapshotState::Intended => intents.push(snapshot),
                SnapshotState::Switched => {
                    let name = snapshot.name;
                    tracing::warn!(event = "snapshot_incomplete", snapshot = %name, "the last run ended before it was durable; it has failed");
                    let error = "the daemon ended before the snapshot was durable".to_owned();
                    self.catalogue.run(move |store| store.conclude(&name, &[], SnapshotState::Failed, Some(error))).await?;
                }
            }
        }
        for snapshot in in_order_of_layers(intents) {
            self.roll_forward(snapshot).await?;
        }
        // By now the overlays that devices write to, or may write to, are recorded as such.
        self.clear_all_remains().await
    }

    async fn roll_forward(&self, snapshot: SnapshotRecord) -> Result<(), CatalogueError> {
        let mut adopted = Vec::new();
        for member in &snapshot.devices {
            let (overlay, device) = (member.overlay.path.display(), &member.device);
            match self.judge(member).await? {
                Verdict::Adopt => {
                    tracing::warn!(
                        event = "overlay_rolled_forward", snapshot = %snapshot.name, device = %device, overlay = %overlay,
                        "the last run ended while the device was being switched; the overlay is its top"
                    );
                    adopted.push((device.clone(), DeviceTimes::default()));
                }
                Verdict::Drop(reason) => {
                    tracing::warn!(
                        event = "overlay_dropped", snapshot = %snapshot.name, device = %device, overlay = %overlay, cause = %reason,
                        "the last run ended before the device was switched"
                    );
                }
                Verdict::Wait(error) => {
                    tracing::error!(
                        event = "overlay_unknown", snapshot = %snapshot.name, device = %device, overlay = %overlay, cause = %error,
                        "it is unknown whether the device writes to the overlay; the intent stays"
                    );
                    let reason = format!(
                        "{overlay} of snapshot '{}' {error}; bring it back and start again, or start once with --forget {device} to go on \
                         without it",
                        snapshot.name
                    );
                    let members = snapshot.devices.iter().map(|member| (member.device.clone(), reason.clone()));
                    self.unsettled.borrow_mut().extend(members);
                    return Ok(());
                }
            }
        }
        if adopted.is_empty() {
            return self.catalogue.run(move |store| store.drop_intent(&snapshot, None)).await;
        }
        let name = snapshot.name;
        let error = Some("the daemon ended before the snapshot was complete".to_owned());
        self.catalogue.run(move |store| store.adopt_overlays(&name, &adopted, SnapshotState::Failed, error)).await.map(|_| ())
    }

    async fn judge(&self, member: &SnapshotDevice) -> Result<Verdict, CatalogueError> {
        if let Some(reason) = self.unsettled.borrow().get(&member.device) {
            return Ok(Verdict::Wait(format!("has to wait: {reason}")));
        }
        let name = member.device.clone();
        let record = self.catalogue.run(move |store| store.device(&name)).await?;
        match record {
            Some(record) if record.top() == Some(&member.frozen) => {
                let covers = self.covers_recorded_top(member, &record).await;
                Ok(covers.map_or_else(|error| Verdict::Wait(error.to_string()), |()| Verdict::Adopt))
            }
            _ => Ok(Verdict::Drop(format!("{} is not the top any more", member.frozen.path.display()))),
        }
    }

    /// Whether the overlay is as it was when the intent was recorded, so far as that can be seen.
    async fn covers_recorded_top(&self, member: &SnapshotDevice, record: &DeviceRecord) -> Result<(), Unclear> {
        let frozen = self.open_for_look(&member.frozen.path).await?;
        let overlay = self.open_for_look(&member.overlay.path).await?;
        // Where the overlay could be when it was recorded, its backing file can be now.
        let images = record.layers.iter().map(|layer| layer.path.clone()).chain([member.overlay.path.clone()]);
        let allowed = self.allowed_around(images.collect()).await?;
        let header = Header::read(&overlay).await?;
        let below = Below {
            record: member.frozen.clone(),
            identity: frozen.identity(),
            // It was checked when the intent was recorded, and growing is no reason to lose what was written since.
            virtual_size: header.virtual_size(),
            allowed,
            cache: CacheMode::Buffered,
        };
        Ok(overlay::covers(&self.environment, &below, &member.overlay.path, &header).await?)
    }

    async fn open_for_look(&self, path: &Path) -> io::Result<E::File> {
        self.environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Buffered).await
    }
}

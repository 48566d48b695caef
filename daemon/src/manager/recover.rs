//! What start-up makes of snapshots that the last run has not finished.
//!
//! | recorded | overlay | then |
//! |---|---|---|
//! | intended | there, covers the recorded top | it becomes the top; the snapshot has failed |
//! | intended | covers something else | the intent is dropped for this device |
//! | intended | not there, or cannot be looked at | nothing changes, and none of the group's devices is served, until a later start can look at it |
//! | switched | is the top already | the snapshot has failed: what lies beneath was perhaps not durable |
//!
//! Rolling forward is right whether the devices had switched or not: an overlay that nothing was written to changes nothing, and one that was
//! written to holds what the guest was told is there. It was durable before it was recorded; if it is not there, its file system may not be
//! mounted, and to go on without it would take the guest back in time. `--forget` is for operators who know better.

use std::io;
use std::path::Path;

use snapfence_image_format::chain::ChainCause;
use snapfence_image_format::qcow2::{Header, HeaderError};
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Storage};

use super::Manager;
use super::host::Host;
use crate::catalogue::{CatalogueError, DeviceTimes, SnapshotDevice, SnapshotRecord, SnapshotState};
use crate::snapshot::overlay::{self, Below, OverlayCause};

/// What is to be done with one overlay.
enum Verdict {
    Adopt,
    Drop(String),
    Wait(io::Error),
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Brings the catalogue to rest after the last run. Call before devices are added.
    ///
    /// # Errors
    /// If the catalogue cannot be read or written.
    pub async fn recover(&self) -> Result<(), CatalogueError> {
        for snapshot in self.catalogue.run(|store| store.snapshots()).await? {
            match snapshot.state {
                SnapshotState::Frozen | SnapshotState::Failed => {}
                SnapshotState::Intended => self.roll_forward(snapshot).await?,
                SnapshotState::Switched => {
                    let name = snapshot.name.clone();
                    tracing::warn!(event = "snapshot_incomplete", snapshot = %name, "the last run ended before it was durable; it has failed");
                    let error = "the daemon ended before the snapshot was durable".to_owned();
                    self.catalogue.run(move |store| store.conclude(&name, &[], SnapshotState::Failed, Some(error))).await?;
                }
            }
        }
        Ok(())
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
                        "the overlay cannot be looked at; the intent stays until it can"
                    );
                    let reason = format!(
                        "{overlay} of snapshot '{}' cannot be looked at ({error}); bring it back and start again, or start once with --forget \
                         {device} to go on without it",
                        snapshot.name
                    );
                    let members = snapshot.devices.iter().map(|member| (member.device.clone(), reason.clone()));
                    self.unsettled.borrow_mut().extend(members);
                    return Ok(());
                }
            }
        }
        if adopted.is_empty() {
            return self.catalogue.run(move |store| store.drop_intent(&snapshot)).await;
        }
        let name = snapshot.name;
        let error = Some("the daemon ended before the snapshot was complete".to_owned());
        self.catalogue.run(move |store| store.adopt_overlays(&name, &adopted, SnapshotState::Failed, error)).await.map(|_| ())
    }

    async fn judge(&self, member: &SnapshotDevice) -> Result<Verdict, CatalogueError> {
        if let Some(reason) = self.unsettled.borrow().get(&member.device) {
            return Ok(Verdict::Wait(io::Error::other(reason.clone())));
        }
        let name = member.device.clone();
        let record = self.catalogue.run(move |store| store.device(&name)).await?;
        if record.as_ref().and_then(|record| record.top()) != Some(&member.frozen) {
            return Ok(Verdict::Drop(format!("{} is not the top any more", member.frozen.path.display())));
        }
        let frozen = match self.open_for_look(&member.frozen.path).await {
            Ok(file) => file,
            Err(error) => return Ok(Verdict::Wait(error)),
        };
        let overlay = match self.open_for_look(&member.overlay.path).await {
            Ok(file) => file,
            Err(error) => return Ok(Verdict::Wait(error)),
        };
        let images = vec![member.frozen.path.clone(), member.overlay.path.clone()];
        let allowed = match self.allowed_around(images).await {
            Ok(allowed) => allowed,
            Err(error) => return Ok(Verdict::Wait(error)),
        };
        let header = match Header::read(&overlay).await {
            Ok(header) => header,
            Err(HeaderError::Read(error)) => return Ok(Verdict::Wait(error)),
            Err(error) => return Ok(Verdict::Drop(error.to_string())),
        };
        let below = Below {
            record: member.frozen.clone(),
            identity: frozen.identity(),
            // It was checked when the intent was recorded, and growing is no reason to lose what was written since.
            virtual_size: header.virtual_size(),
            allowed,
            cache: CacheMode::Buffered,
        };
        match overlay::covers(&self.environment, &below, &member.overlay.path, &header).await {
            Ok(()) => Ok(Verdict::Adopt),
            Err(OverlayCause::Open(ChainCause::Open { source, .. })) => Ok(Verdict::Wait(source)),
            Err(cause) => Ok(Verdict::Drop(cause.to_string())),
        }
    }

    async fn open_for_look(&self, path: &Path) -> io::Result<E::File> {
        self.environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Buffered).await
    }
}

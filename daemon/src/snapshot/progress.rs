//! One snapshot under way, as those who wait for it see it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use snapfence::protocol::{Failure, Moment, SnapshotDevice, SnapshotInfo, SnapshotState};
use snapfence_image_format::runtime::WaitQueue;

use crate::catalogue::{self, Making, SnapshotRecord};
use crate::jobs::Job;

/// A snapshot from its admission to its end. It reaches `Switched` and then `Frozen`, or `Failed` from any state but `Frozen`.
#[derive(Debug)]
pub struct Progress {
    info: RefCell<SnapshotInfo>,
    /// It was `Switched` at some time, whatever came after.
    has_switched: Cell<bool>,
    changed: WaitQueue,
    pub(super) job: Rc<Job>,
    /// What the catalogue has, or may have, and must not keep if the snapshot fails.
    pub(super) recorded: RefCell<Option<Recorded>>,
}

/// What the catalogue says of a snapshot that has not come to its end.
#[derive(Clone, Debug)]
pub(super) enum Recorded {
    /// This intent, or nothing. No device has switched. And the overlays that were made for it.
    Perhaps(SnapshotRecord, Option<Making>),
    /// The intent, or any state after it.
    Switching,
}

impl Progress {
    pub(super) fn new(name: String, created: Moment, job: Rc<Job>) -> Self {
        let info = SnapshotInfo {
            name,
            state: SnapshotState::Preparing,
            created,
            job: Some(job.id().to_owned()),
            devices: Vec::new(),
            switch_us: None,
            hold_us: None,
            freeze_us: None,
            error: None,
        };
        Self { info: RefCell::new(info), has_switched: Cell::new(false), changed: WaitQueue::new(), job, recorded: RefCell::default() }
    }

    /// As it is now.
    pub fn info(&self) -> SnapshotInfo {
        self.info.borrow().clone()
    }

    /// Ends when every device writes to its overlay.
    ///
    /// # Errors
    /// If it failed before.
    pub async fn switched(&self) -> Result<SnapshotInfo, Failure> {
        self.wait(|info, has_switched| has_switched.then(|| Ok(info.clone()))).await
    }

    /// Ends when the snapshot is complete and durable.
    ///
    /// # Errors
    /// If it failed.
    pub async fn frozen(&self) -> Result<SnapshotInfo, Failure> {
        self.wait(|info, _| (info.state == SnapshotState::Frozen).then(|| Ok(info.clone()))).await
    }

    async fn wait(&self, reached: impl Fn(&SnapshotInfo, bool) -> Option<Result<SnapshotInfo, Failure>>) -> Result<SnapshotInfo, Failure> {
        self.changed
            .wait_until(|| {
                let info = self.info.borrow();
                reached(&info, self.has_switched.get()).or_else(|| {
                    let error = info.error.as_ref().filter(|_| info.state == SnapshotState::Failed)?;
                    Some(Err(Failure::generic(format_args!("snapshot '{}' failed: {error}", info.name))))
                })
            })
            .await
    }

    /// Changes what is seen, and tells those who wait.
    pub(super) fn update(&self, change: impl FnOnce(&mut SnapshotInfo)) -> SnapshotInfo {
        let info = {
            let mut info = self.info.borrow_mut();
            change(&mut info);
            self.has_switched.set(self.has_switched.get() || info.state == SnapshotState::Switched);
            info.clone()
        };
        self.changed.notify_all();
        info
    }
}

/// How a recorded snapshot is shown.
pub fn info_of(record: &SnapshotRecord, job: Option<String>) -> SnapshotInfo {
    SnapshotInfo {
        name: record.name.clone(),
        state: match record.state {
            catalogue::SnapshotState::Intended => SnapshotState::Preparing,
            catalogue::SnapshotState::Switched => SnapshotState::Switched,
            catalogue::SnapshotState::Frozen => SnapshotState::Frozen,
            catalogue::SnapshotState::Failed => SnapshotState::Failed,
        },
        created: Moment::from_unix_microseconds(record.created_us),
        job,
        devices: record.devices.iter().map(device_info).collect(),
        switch_us: record.devices.iter().filter_map(|member| member.times.switch_us).max(),
        hold_us: record.devices.iter().filter_map(|member| member.times.hold_us).max(),
        freeze_us: record.devices.iter().filter_map(|member| member.times.freeze_us).max(),
        error: record.error.clone(),
    }
}

fn device_info(member: &catalogue::SnapshotDevice) -> SnapshotDevice {
    SnapshotDevice {
        device: member.device.clone(),
        overlay: member.overlay.path.clone(),
        frozen_layer: member.frozen.path.clone(),
        switch_us: member.times.switch_us,
        hold_us: member.times.hold_us,
        freeze_us: member.times.freeze_us,
    }
}

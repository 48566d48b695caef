//! Taking a group snapshot, from its admission to the commit record.
//!
//! ```text
//!  admitted ─▶ in line ─▶ prepare ─▶ intent ─▶ switch ─▶ released ─▶ freeze ─▶ commit
//!                │           │         │                    │           │
//!                └───────────┴─────────┴─▶ undone           └─ expired ─┴─▶ failed, the overlays stay
//! ```
//!
//! Up to the intent everything can be undone and nothing is remembered. From the switch on the overlays are where the guests write, whatever else
//! happens; only the snapshot can still fail.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join, join_all, select};
use snapfence::protocol::{Event, Failure, JobInfo, LayerState, Moment, SnapshotInfo, SnapshotState};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::stack::{FenceMember, FenceOutcome, FenceTimes, View};
use snapfence_image_format::storage::{Environment, Sharing, Storage};

use super::overlay::{self, OverlayError, Prepared};
use super::prepare::Ready;
use super::progress::{Progress, Recorded, info_of};
use super::{Asked, Place, Refusal, admit};
use crate::catalogue::{self, CatalogueError, DeviceTimes, SnapshotDevice, SnapshotRecord, microseconds};
use crate::jobs::{Job, JobError};
use crate::manager::{BeneathError, Device, DeviceLayer, Host, Manager};
use crate::tasks::Tasks;

/// Steps of a snapshot's job: prepared, intended, switched, frozen.
const STEPS: u64 = 4;

/// How long one snapshot waits for one other of the same device: longer than disks take to make durable what they have, if they do at all.
const LINE_LIMIT: Duration = Duration::from_secs(60);

/// How long the layers beneath may take to become durable. A disk that hangs never gets so far; then the snapshot has failed, and only that disk is kept
/// from further ones.
const FREEZE_LIMIT: Duration = Duration::from_secs(60);

/// How long the catalogue is left alone before it is asked again to record what it could not.
const CORRECTION_INTERVAL: Duration = Duration::from_secs(1);

/// Why a snapshot was not begun.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It makes no sense.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Its job cannot be made.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The catalogue does not answer.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Refused(Refusal::UnknownDevice(name)) => Self::no_device(&name),
            other => Self::generic(other),
        }
    }
}

/// Why a snapshot came to nothing, or does not count.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("it was cancelled")]
    Cancelled,
    #[error("the overlays are not ready in time, because what lies beneath them does not answer: device {0}")]
    NotReady(String),
    #[error("device '{0}': an earlier snapshot of it has not come to its end within {limit} s", limit = LINE_LIMIT.as_secs())]
    InLine(String),
    #[error("device '{0}' has been removed meanwhile")]
    DeviceGone(String),
    #[error("the overlay {0} is named twice")]
    OverlayTwice(PathBuf),
    #[error("device '{device}': {source}")]
    Overlay {
        device: String,
        #[source]
        source: OverlayError,
    },
    #[error("device '{device}': the directory of {path} cannot be used: {source}")]
    Directory {
        device: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Beneath(#[from] BeneathError),
    #[error(
        "not every queue switched within {0} ms; the overlays are in use, but the layers beneath are not one point in time (deadline-ms sets the limit)"
    )]
    Deadline(u64),
    #[error("device '{0}': the layer beneath is not durable within {limit} s", limit = FREEZE_LIMIT.as_secs())]
    FreezeHangs(String),
    #[error("device '{device}': the layer beneath is not durable: {source}")]
    Freeze {
        device: String,
        #[source]
        source: LayerError,
    },
}

/// One device while it is being cut.
pub(super) struct Cut<E: Environment, H: Host<E>> {
    pub(super) device: Rc<Device<E, H>>,
    /// The layer that is being covered.
    pub(super) old: DeviceLayer<E>,
    pub(super) overlay: Prepared<E>,
}

/// One device after the switch.
struct Switched<E: Environment, H: Host<E>> {
    device: Rc<Device<E, H>>,
    old: DeviceLayer<E>,
    view: Arc<View<E>>,
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Admits a snapshot and begins it. The answer tells how far it is.
    ///
    /// # Errors
    /// If it is refused; nothing has changed then.
    pub async fn start_snapshot(self: &Rc<Self>, asked: Asked, job_id: Option<String>) -> Result<Rc<Progress>, StartError> {
        let name = asked.name.clone();
        let recorded = self.catalogue.run(move |store| store.snapshot(&name)).await?.is_some();
        // From here to the place in line nothing waits, so nobody comes in between.
        let taken = recorded || self.snapshots.borrow().contains_key(&asked.name);
        let deadline_ms = admit(&asked, self.is_stopping(), taken, |device| {
            let in_line = self.lines.length(device);
            self.device(device).map(|device| device.facts(in_line))
        })?;
        let job = self.jobs.create(JobInfo::SNAPSHOT, job_id, STEPS)?;
        let created = Moment::from_unix_microseconds(microseconds(self.environment.wall_clock()));
        let progress = Rc::new(Progress::new(asked.name.clone(), created, job));
        self.snapshots.borrow_mut().insert(asked.name.clone(), Rc::clone(&progress));
        let place = Rc::new(self.lines.enter(asked.members.iter().map(|member| member.device.as_str())));
        let (manager, shown) = (Rc::clone(self), Rc::clone(&progress));
        self.environment.spawn(async move { manager.run_snapshot(asked, deadline_ms, shown, place).await });
        Ok(progress)
    }

    async fn run_snapshot(self: Rc<Self>, asked: Asked, deadline_ms: u64, progress: Rc<Progress>, place: Rc<Place>) {
        let name = asked.name.clone();
        let outcome = self.take_snapshot(asked, deadline_ms, &progress, &place).await;
        let outcome = outcome.map_err(|error| error.to_string());
        let wrong = outcome.as_ref().err().and_then(|error| Some((progress.recorded.take()?, error.clone())));
        let wrong = match wrong {
            Some((recorded, error)) => self.correct(&name, &recorded, &error).await.is_err().then_some((recorded, error)),
            None => None,
        };
        if wrong.is_none() {
            self.snapshots.borrow_mut().remove(&name);
        }
        if let Err(error) = &outcome {
            tracing::warn!(event = "snapshot_failed", snapshot = %name, cause = %error, "the snapshot does not count");
            if progress.info().state != SnapshotState::Failed {
                let info = progress.update(|info| {
                    info.state = SnapshotState::Failed;
                    info.error = Some(error.clone());
                });
                (self.events)(Event::SnapshotFailed(info));
            }
        }
        self.jobs.conclude(&progress.job, outcome);
        drop(place);
        let Some((recorded, error)) = wrong else { return };
        // For as long as the catalogue may say something else, this is what is shown. Start-up finds that it failed if we do not get that far.
        while !self.is_stopping() {
            self.environment.sleep_until(self.environment.now() + CORRECTION_INTERVAL).await;
            if self.correct(&name, &recorded, &error).await.is_ok() {
                tracing::info!(event = "catalogue_corrected", snapshot = %name, "the catalogue says now that the snapshot has failed");
                break;
            }
        }
        self.snapshots.borrow_mut().remove(&name);
    }

    /// Makes the catalogue agree that a snapshot has failed.
    async fn correct(&self, name: &str, recorded: &Recorded, error: &str) -> Result<(), CatalogueError> {
        let (name, error, recorded) = (name.to_owned(), error.to_owned(), recorded.clone());
        self.catalogue
            .run(move |store| match recorded {
                Recorded::Perhaps(intent, made) => store.drop_intent(&intent, made.as_ref()),
                Recorded::Switching => store.fail(&name, &error),
            })
            .await
    }

    async fn take_snapshot(
        self: &Rc<Self>,
        asked: Asked,
        deadline_ms: u64,
        progress: &Progress,
        place: &Rc<Place>,
    ) -> Result<(), RunError> {
        let job = &progress.job;
        self.wait_in_line(place, job).await?;
        job.run();
        let Ready { cuts, made } = self.prepare(&asked, job).await?;
        job.step();
        if !job.seal() {
            self.undo(cuts, made).await;
            return Err(RunError::Cancelled);
        }
        let record = intent(&asked.name, progress.info().created, &cuts);
        let (intended, mark) = (record.clone(), made.as_ref().map(|making| making.mark));
        if let Err(error) = self.catalogue.run(move |store| store.intend(&intended, mark)).await {
            // The record may be there all the same, and whatever it names is waited for at the next start. So it goes first.
            let (intended, making) = (record.clone(), made.clone());
            match self.catalogue.run(move |store| store.drop_intent(&intended, making.as_ref())).await {
                Ok(()) => self.undo(cuts, made).await,
                // The first failure is what is reported.
                Err(_) => {
                    self.leave(cuts).await;
                    progress.recorded.replace(Some(Recorded::Perhaps(record, made)));
                }
            }
            return Err(error.into());
        }
        progress.recorded.replace(Some(Recorded::Switching));
        job.step();
        let devices: Vec<_> = cuts.iter().map(|cut| Rc::clone(&cut.device)).collect();
        for device in &devices {
            device.in_snapshot.set(true);
        }
        let result = self.switch_and_freeze(&asked.name, deadline_ms, progress, record, cuts, place).await;
        for device in &devices {
            device.in_snapshot.set(false);
        }
        result
    }

    /// Waits for the turn of `place`. An earlier snapshot that does not come to its end is not waited for without end.
    async fn wait_in_line(&self, place: &Place, job: &Job) -> Result<(), RunError> {
        let stuck = async {
            loop {
                let before = place.blockers();
                self.patience(LINE_LIMIT).await;
                if let Some((device, _)) = place.blockers().into_iter().find(|blocker| before.contains(blocker)) {
                    return device;
                }
            }
        };
        let (cancelled, stuck) = (std::pin::pin!(job.wait_cancelled()), std::pin::pin!(stuck));
        match select(std::pin::pin!(place.wait_first()), select(cancelled, stuck)).await {
            Either::Left(_) => Ok(()),
            Either::Right((Either::Left(_), _)) => Err(RunError::Cancelled),
            Either::Right((Either::Right((device, _)), _)) => Err(RunError::InLine(device)),
        }
    }

    /// Leaves overlays where they are, closed: perhaps the next start puts them on top, which changes nothing, because they are empty.
    async fn leave(&self, cuts: Vec<Cut<E, H>>) {
        for cut in &cuts {
            tracing::warn!(
                event = "overlay_left_behind", overlay = %cut.overlay.record.path.display(),
                "it is unknown whether the catalogue has recorded the snapshot; the next start finds out, and needs the empty overlay if so"
            );
        }
        join_all(cuts.into_iter().map(|cut| overlay::leave(cut.overlay))).await;
    }

    /// The part that cannot be undone.
    async fn switch_and_freeze(
        self: &Rc<Self>,
        name: &str,
        deadline_ms: u64,
        progress: &Progress,
        record: SnapshotRecord,
        cuts: Vec<Cut<E, H>>,
        place: &Rc<Place>,
    ) -> Result<(), RunError> {
        let fence = self.domain.fence();
        let views: Vec<_> = cuts.iter().map(|cut| cut.device.stack.prepare_overlay(Arc::clone(&cut.overlay.layer), &fence)).collect();
        let members: Vec<_> = views.iter().map(|view| view.fence().cloned()).collect();
        let measured = || {
            let times = members.iter().map(|member| member.as_ref().map(FenceMember::times).unwrap_or_default());
            times.collect::<Vec<_>>()
        };
        let began = self.environment.now();
        let old_views: Vec<_> = cuts.iter().zip(views).map(|(cut, view)| cut.device.stack.publish(view)).collect();
        let deadline = began + Duration::from_millis(deadline_ms);
        fence.switch_until(deadline);
        let outcome = {
            let deadline = std::pin::pin!(self.environment.sleep_until(deadline));
            match select(std::pin::pin!(fence.ended()), deadline).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => fence.expire(),
            }
        };
        // We may have been told of both at the same time: what came too late is no success.
        let in_time = fence.times().switch <= Duration::from_millis(deadline_ms);
        let outcome = if in_time { outcome } else { FenceOutcome::Expired };
        let switched: Vec<_> = cuts.into_iter().zip(old_views).map(|(cut, view)| self.put_on_top(name, cut, view)).collect();
        progress.job.step();
        let times = |times: FenceTimes| DeviceTimes { switch_us: Some(microseconds(times.switch)), hold_us: None, freeze_us: None };
        let times_of: Vec<_> =
            record.devices.iter().zip(measured()).map(|(member, measured)| (member.device.clone(), times(measured))).collect();
        let expired = (outcome == FenceOutcome::Expired).then_some(RunError::Deadline(deadline_ms));
        let state = if expired.is_some() { catalogue::SnapshotState::Failed } else { catalogue::SnapshotState::Switched };
        self.announce_switch(progress, record, &times_of, expired.as_ref());
        let (key, error) = (name.to_owned(), expired.as_ref().map(ToString::to_string));
        let adopting = self.catalogue.run(move |store| store.adopt_overlays(&key, &times_of, state, error));
        // The old layers are beneath others now, whatever became of the snapshot: they are brought to rest in any case. At the same time, because
        // requests may be waiting for the old views, and must not wait for the catalogue's disk.
        let (adopted, frozen) = join(adopting, self.freeze_all(switched, began, place)).await;
        let mut all_times = Vec::new();
        let mut failure = expired.or_else(|| adopted.err().map(RunError::from));
        for ((device, result), measured) in frozen.into_iter().zip(measured()) {
            let freeze_us = match result {
                Some(Ok(time)) => Some(microseconds(time)),
                Some(Err(source)) => {
                    failure = failure.or(Some(RunError::Freeze { device: device.clone(), source }));
                    None
                }
                None => {
                    failure = failure.or(Some(RunError::FreezeHangs(device.clone())));
                    None
                }
            };
            let hold_us = Some(microseconds(measured.longest_hold));
            all_times.push((device, DeviceTimes { hold_us, freeze_us, ..times(measured) }));
        }
        self.commit(name, progress, all_times, failure, outcome).await
    }

    /// Takes note of the new top.
    fn put_on_top(&self, name: &str, cut: Cut<E, H>, view: Arc<View<E>>) -> Switched<E, H> {
        let Cut { device, old, overlay } = cut;
        let Prepared { record, identity, layer, .. } = overlay;
        device.put_on_top(DeviceLayer {
            record,
            identity,
            layer,
            node_name: self.fresh_node_name(),
            state: LayerState::Active,
            made_by: Some(name.to_owned()),
            snapshot: None,
        });
        Switched { device, old, view }
    }

    fn announce_switch(
        &self,
        progress: &Progress,
        mut record: SnapshotRecord,
        times: &[(String, DeviceTimes)],
        expired: Option<&RunError>,
    ) {
        for (member, (_, times)) in record.devices.iter_mut().zip(times) {
            member.times = *times;
        }
        let shown = info_of(&record, Some(progress.job.id().to_owned()));
        let info = progress.update(|info| {
            *info = SnapshotInfo { created: info.created, ..shown };
            match expired {
                None => info.state = SnapshotState::Switched,
                Some(error) => {
                    info.state = SnapshotState::Failed;
                    info.error = Some(error.to_string());
                }
            }
        });
        if expired.is_some() {
            (self.events)(Event::SnapshotFailed(info));
        } else {
            tracing::info!(event = "snapshot_switched", snapshot = %info.name, switch_us = info.switch_us, "all queues write to the overlays");
            (self.events)(Event::SnapshotSwitched(info));
        }
    }

    /// Brings the layers that were covered to rest. Answers with each device's name and the time since the switch, or `None` for those that have not
    /// come to rest in time; they keep their part of the turn until they have.
    async fn freeze_all(
        self: &Rc<Self>,
        members: Vec<Switched<E, H>>,
        began: Duration,
        place: &Rc<Place>,
    ) -> Vec<(String, Option<Result<Duration, LayerError>>)> {
        let names: Vec<_> = members.iter().map(|member| member.device.name().to_owned()).collect();
        let (tasks, results) = (Rc::<Tasks>::default(), Rc::new(RefCell::new(BTreeMap::new())));
        for member in members {
            let (manager, results) = (Rc::clone(self), Rc::clone(&results));
            tasks.spawn(&self.environment, async move {
                let name = member.device.name().to_owned();
                let result = manager.freeze_one(member, began).await;
                results.borrow_mut().insert(name, result);
            });
        }
        let limit = self.patience(FREEZE_LIMIT);
        let in_time = matches!(select(std::pin::pin!(tasks.all_ended()), std::pin::pin!(limit)).await, Either::Left(_));
        let mut results = results.take();
        let all: Vec<_> = names.into_iter().map(|name| (results.remove(&name), name)).map(|(result, name)| (name, result)).collect();
        if !in_time {
            let hung: BTreeSet<_> = all.iter().filter(|(_, result)| result.is_none()).map(|(name, _)| name.clone()).collect();
            tracing::error!(event = "freeze_hangs", devices = ?hung, "these devices have no further snapshots until their layers are durable");
            place.keep_only(&hung);
            let place = Rc::clone(place);
            self.environment.spawn(async move {
                tasks.all_ended().await;
                drop(place);
            });
        }
        all
    }

    /// Brings the layer that was covered to rest. Answers with the time since the switch.
    async fn freeze_one(&self, member: Switched<E, H>, began: Duration) -> Result<Duration, LayerError> {
        let Switched { device, old, view } = member;
        let result = device.stack.freeze_below(view).await;
        let took = self.environment.now().saturating_sub(began);
        if result.is_ok() {
            // Readers of a file that does not change any more need not be kept away; failing to tell them harms nobody.
            if let Err(error) = old.layer.file().set_sharing(Sharing::Reader).await {
                tracing::warn!(event = "lock_not_lowered", layer = %old.record.path.display(), cause = %error, "others cannot write it either way");
            }
            device.set_layer_state(old.identity, LayerState::Frozen);
        } else {
            device.set_layer_state(old.identity, LayerState::Failed);
        }
        result.map(|()| took)
    }

    /// Writes the record that makes the snapshot count, or that it does not.
    async fn commit(
        &self,
        name: &str,
        progress: &Progress,
        times: Vec<(String, DeviceTimes)>,
        failure: Option<RunError>,
        outcome: FenceOutcome,
    ) -> Result<(), RunError> {
        let state = if failure.is_none() { catalogue::SnapshotState::Frozen } else { catalogue::SnapshotState::Failed };
        let (key, error) = (name.to_owned(), failure.as_ref().map(ToString::to_string));
        let recorded = if outcome == FenceOutcome::Released {
            self.catalogue.run(move |store| store.conclude(&key, &times, state, error)).await.map(Some)
        } else {
            Ok(None) // That it failed is in the catalogue already.
        };
        if let Some(failure) = failure {
            if let Err(error) = recorded {
                tracing::error!(event = "catalogue_failed", snapshot = %name, cause = %error, "that it failed is not recorded yet");
            }
            return Err(failure);
        }
        let Some(record) = recorded? else { return Ok(()) };
        for member in &record.devices {
            if let Some(device) = self.device(&member.device) {
                device.set_layer_snapshot(&member.frozen.path, name);
            }
        }
        let shown = info_of(&record, Some(progress.job.id().to_owned()));
        let info = progress.update(|info| *info = SnapshotInfo { created: info.created, ..shown });
        tracing::info!(
            event = "snapshot_frozen", snapshot = %name, switch_us = info.switch_us, hold_us = info.hold_us, freeze_us = info.freeze_us,
            "the snapshot is complete and durable"
        );
        (self.events)(Event::SnapshotFrozen(info));
        Ok(())
    }
}

/// What is recorded before the switch.
fn intent<E: Environment, H: Host<E>>(name: &str, created: Moment, cuts: &[Cut<E, H>]) -> SnapshotRecord {
    let member = |cut: &Cut<E, H>| SnapshotDevice {
        device: cut.device.name().to_owned(),
        frozen: cut.old.record.clone(),
        overlay: cut.overlay.record.clone(),
        created_overlay: cut.overlay.created,
        times: DeviceTimes::default(),
    };
    SnapshotRecord {
        name: name.to_owned(),
        created_us: created.unix_microseconds(),
        state: catalogue::SnapshotState::Intended,
        devices: cuts.iter().map(member).collect(),
        error: None,
    }
}

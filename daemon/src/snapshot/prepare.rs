//! Getting the overlays of a group ready, all or none, for so long and no longer.
//!
//! A disk or file server that hangs may never end what was asked of it. So files are made and opened in tasks that nobody has to wait for: past the
//! limit, or when the job is cancelled, the snapshot has failed, the members that are ready are undone at once, and the others undo themselves
//! whenever they get so far. Nothing of what such a task does can become part of a snapshot any more.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use snapfence_image_format::storage::Environment;

use super::overlay::{self, Below, Others, OverlayCause, OverlayError};
use super::run::{Cut, RunError};
use super::{Asked, MAX_DEADLINE_MS, Member, Overlay};
use crate::catalogue::Making;
use crate::jobs::Job;
use crate::manager::{Beneath, Device, DeviceLayer, Host, Manager};
use crate::tasks::Tasks;

/// How long it may take to get the overlays of a group ready. The guests notice nothing of it, so it is not the deadline of the fence, which disks
/// under load would break time and again; but neither is it longer than the longest of those.
const PREPARE_LIMIT: Duration = Duration::from_millis(MAX_DEADLINE_MS);
/// How long a snapshot that has failed waits for its files to be gone. Whoever tries again at once finds none in the way, and a disk that hangs
/// keeps nobody waiting.
const UNDO_LIMIT: Duration = Duration::from_secs(2);

/// The overlays of one group.
pub(super) struct Ready<E: Environment, H: Host<E>> {
    pub(super) cuts: Vec<Cut<E, H>>,
    /// What the catalogue has of those that we have made.
    pub(super) made: Option<Making>,
}

/// The overlays of one group on their way.
struct Preparation<E: Environment, H: Host<E>> {
    /// Nobody wants them any more.
    abandoned: Cell<bool>,
    /// Devices that tasks are waiting for, each as often as one is.
    awaited: RefCell<Vec<String>>,
    /// What is ready, by its place in the group.
    ready: RefCell<Vec<(usize, Cut<E, H>)>>,
    first_error: RefCell<Option<RunError>>,
    /// What the catalogue has of those that we make.
    made: RefCell<Option<Making>>,
    tasks: Rc<Tasks>,
}

/// What is to be done for one member.
struct Plan<E: Environment, H: Host<E>> {
    device: Rc<Device<E, H>>,
    old: DeviceLayer<E>,
    path: PathBuf,
    wanted: Overlay,
}

impl<E: Environment, H: Host<E>> Plan<E, H> {
    /// Whether we make the file.
    fn is_made(&self) -> bool {
        !matches!(self.wanted, Overlay::Existing(_))
    }
}

impl<E: Environment, H: Host<E>> Preparation<E, H> {
    fn new(ready: Vec<(usize, Cut<E, H>)>, made: Option<Making>) -> Rc<Self> {
        Rc::new(Self {
            abandoned: Cell::new(false),
            awaited: RefCell::default(),
            ready: RefCell::new(ready),
            first_error: RefCell::default(),
            made: RefCell::new(made),
            tasks: Rc::default(),
        })
    }

    /// Runs `work` on behalf of these devices.
    async fn awaiting<T>(&self, devices: &[String], work: impl Future<Output = T>) -> T {
        self.awaited.borrow_mut().extend_from_slice(devices);
        let value = work.await;
        let mut awaited = self.awaited.borrow_mut();
        for device in devices {
            let at = awaited.iter().position(|other| other == device).expect("each takes out what it has put in");
            awaited.swap_remove(at);
        }
        value
    }

    /// Devices that are waited for, in words.
    fn awaited(&self) -> String {
        let devices: BTreeSet<_> = self.awaited.borrow().iter().map(|device| format!("'{device}'")).collect();
        devices.into_iter().collect::<Vec<_>>().join(", ")
    }
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Gets the overlays of all members ready, at the same time. All or none.
    ///
    /// # Errors
    /// What is wrong with the first overlay that is not possible; or which ones are not ready within [`PREPARE_LIMIT`].
    pub(super) async fn prepare(self: &Rc<Self>, asked: &Asked, job: &Job) -> Result<Ready<E, H>, RunError> {
        let preparation = Preparation::new(Vec::new(), None);
        let (manager, begun, wanted) = (Rc::clone(self), Rc::clone(&preparation), asked.clone());
        preparation.tasks.spawn(&self.environment, async move {
            if let Err(error) = manager.begin_members(&wanted, &begun).await {
                begun.first_error.borrow_mut().get_or_insert(error);
            }
        });
        let all_ended = async {
            preparation.tasks.all_ended().await;
            self.flush_names(&preparation);
            preparation.tasks.all_ended().await;
        };
        let (cancelled, limit) = (std::pin::pin!(job.wait_cancelled()), std::pin::pin!(self.patience(PREPARE_LIMIT)));
        let error = match select(std::pin::pin!(all_ended), select(cancelled, limit)).await {
            Either::Left(_) => {
                let Some(error) = preparation.first_error.take() else {
                    let mut ready = preparation.ready.take();
                    ready.sort_by_key(|(at, _)| *at);
                    let cuts = ready.into_iter().map(|(_, cut)| cut).collect();
                    return Ok(Ready { cuts, made: preparation.made.take() });
                };
                error
            }
            Either::Right((Either::Left(_), _)) => RunError::Cancelled,
            Either::Right((Either::Right(_), _)) => {
                let failed = preparation.first_error.take();
                failed.unwrap_or_else(|| RunError::NotReady(preparation.awaited()))
            }
        };
        self.abandon(&preparation).await;
        Err(error)
    }

    /// Begins to make the names of the overlays durable, each directory once. Not if anything has failed.
    fn flush_names(self: &Rc<Self>, preparation: &Rc<Preparation<E, H>>) {
        if preparation.first_error.borrow().is_some() {
            return;
        }
        let mut directories: BTreeMap<PathBuf, Vec<(String, PathBuf)>> = BTreeMap::new();
        for (_, cut) in &*preparation.ready.borrow() {
            let path = &cut.overlay.record.path;
            let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
            directories.entry(directory).or_default().push((cut.device.name().to_owned(), path.clone()));
        }
        for (directory, members) in directories {
            let (environment, state) = (self.environment.clone(), Rc::clone(preparation));
            preparation.tasks.spawn(&self.environment, async move {
                let (devices, mut paths): (Vec<_>, Vec<_>) = members.into_iter().unzip();
                if let Err(source) = state.awaiting(&devices, environment.flush_directory(&directory)).await {
                    let cause = OverlayCause::Make { action: "flush the directory", source };
                    let (device, path) = (devices[0].clone(), paths.swap_remove(0));
                    let error = RunError::Overlay { device, source: OverlayError { path, cause } };
                    state.first_error.borrow_mut().get_or_insert(error);
                }
            });
        }
    }

    /// Takes back what was prepared; a disk that hangs is not waited for.
    pub(super) async fn undo(self: &Rc<Self>, cuts: Vec<Cut<E, H>>, made: Option<Making>) {
        self.abandon(&Preparation::new(cuts.into_iter().enumerate().collect(), made)).await;
    }

    async fn abandon(self: &Rc<Self>, preparation: &Rc<Preparation<E, H>>) {
        preparation.abandoned.set(true);
        for (_, cut) in preparation.ready.take() {
            let (manager, state) = (Rc::clone(self), Rc::clone(preparation));
            preparation.tasks.spawn(&self.environment, async move {
                state.awaiting(&[cut.device.name().to_owned()], overlay::discard(&manager.environment, &manager.keeper, cut.overlay)).await;
            });
        }
        // Once nobody makes anything any more, nothing is left; only then may the record go that would lead the next start to it.
        let (manager, state, end) = (Rc::clone(self), Rc::clone(preparation), Rc::<Tasks>::default());
        end.spawn(&self.environment, async move {
            state.tasks.all_ended().await;
            if let Some(making) = state.made.take() {
                manager.clear_remains(&making).await;
            }
        });
        let limit = self.patience(UNDO_LIMIT);
        if let Either::Right(_) = select(std::pin::pin!(end.all_ended()), std::pin::pin!(limit)).await {
            tracing::error!(
                event = "overlay_abandoned",
                devices = preparation.awaited(),
                "the files of these devices do not answer; what was begun there is removed when they do"
            );
        }
    }

    /// Finds out where the overlays shall be, and begins to make and open them.
    async fn begin_members(self: &Rc<Self>, asked: &Asked, preparation: &Rc<Preparation<E, H>>) -> Result<(), RunError> {
        let given = asked.members.iter().map(|member| preparation.awaiting(std::slice::from_ref(&member.device), self.given_path(member)));
        let given = join_all(given).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut paths: Vec<PathBuf> = Vec::new();
        let mut plans = Vec::new();
        for (member, given) in asked.members.iter().zip(given) {
            let device = self.device(&member.device).ok_or_else(|| RunError::DeviceGone(member.device.clone()))?;
            let old = device.top();
            let path = given.unwrap_or_else(|| {
                let path = overlay::path_beside(&old.record.path, device.made_by().as_deref(), &asked.name);
                // Two disks of one directory may differ in their extension only.
                if paths.contains(&path) { path.with_file_name(format!("{}.{}.qcow2", member.device, asked.name)) } else { path }
            });
            if paths.contains(&path) {
                return Err(RunError::OverlayTwice(path));
            }
            paths.push(path.clone());
            plans.push(Plan { device, old, path, wanted: member.overlay.clone() });
        }
        // What was made just now nobody can depend on.
        let found = asked.members.iter().any(|member| matches!(member.overlay, Overlay::Existing(_)));
        let protected = Rc::new(if found { self.beneath().await? } else { Beneath::default() });
        let overlays: Vec<_> = plans.iter().filter(|plan| plan.is_made()).map(|plan| plan.path.clone()).collect();
        let mark = self.environment.random();
        if !overlays.is_empty() {
            // Durable before there is a file.
            let making = Making { mark, overlays };
            preparation.made.replace(Some(making.clone()));
            self.catalogue.run(move |store| store.begin_making(&making)).await?;
        }
        if preparation.abandoned.get() {
            return Ok(());
        }
        for (at, plan) in plans.into_iter().enumerate() {
            let (manager, state, protected) = (Rc::clone(self), Rc::clone(preparation), Rc::clone(&protected));
            preparation.tasks.spawn(&self.environment, async move {
                let name = plan.device.name().to_owned();
                let member = async {
                    match manager.prepare_one(plan, mark, &protected, &|| !state.abandoned.get()).await {
                        Err(error) => drop(state.first_error.borrow_mut().get_or_insert(error)),
                        Ok(cut) if state.abandoned.get() => overlay::discard(&manager.environment, &manager.keeper, cut.overlay).await,
                        Ok(cut) => state.ready.borrow_mut().push((at, cut)),
                    }
                };
                state.awaiting(std::slice::from_ref(&name), member).await;
            });
        }
        Ok(())
    }

    /// The path of an overlay, where it was given.
    async fn given_path(&self, member: &Member) -> Result<Option<PathBuf>, RunError> {
        let Some(path) = member.overlay.path() else { return Ok(None) };
        let real = self.real_path(path).await;
        real.map(Some).map_err(|source| RunError::Directory { device: member.device.clone(), path: path.to_owned(), source })
    }

    async fn prepare_one(
        self: &Rc<Self>,
        plan: Plan<E, H>,
        mark: u64,
        protected: &Beneath,
        wanted_still: &dyn Fn() -> bool,
    ) -> Result<Cut<E, H>, RunError> {
        let is_made = plan.is_made();
        let Plan { device, old, path, wanted } = plan;
        let failed = |source| RunError::Overlay { device: device.name().to_owned(), source };
        let unusable = |source| RunError::Directory { device: device.name().to_owned(), path: path.clone(), source };
        if is_made && !(wanted == Overlay::Create && old.identity.is_block_device()) {
            let directory = path.parent().unwrap_or(Path::new("/"));
            if self.host.is_for_devices(directory).await.map_err(unusable)? {
                return Err(failed(OverlayError { path: path.clone(), cause: OverlayCause::AmongDevices(directory.to_owned()) }));
            }
        }
        let below = Below {
            record: old.record.clone(),
            identity: old.identity,
            virtual_size: device.stack.virtual_size(),
            allowed: device.allowed.clone(),
            cache: device.options.cache,
        };
        let serving = |identity| self.device_with_layer(identity);
        let others = Others { serving: &serving, protected, keeper: &self.keeper, wanted: wanted_still };
        match overlay::prepare(&self.environment, &below, &path, (&wanted, mark), &others).await {
            Err(source) => Err(failed(source)),
            Ok(overlay) => Ok(Cut { device, old, overlay }),
        }
    }
}

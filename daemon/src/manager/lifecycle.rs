//! Removing devices, and the end of all.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::storage::Environment;

use super::Manager;
use super::device::Device;
use super::host::{Export, Host};

/// How long the end of requests is waited for when a device or the daemon goes: a disk that hangs may never end them. Shorter than the time
/// after which service managers kill (systemd: 90 s), and longer than disks take that only retry.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_STEP: Duration = Duration::from_millis(100);

/// Why a device is not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// No such device.
    #[error("there is no device '{0}'; device-list names those there are")]
    Unknown(String),
    /// Somebody uses it.
    #[error("a front-end is connected to device '{0}'; stop the machine, or remove it with force")]
    Connected(String),
    /// Somebody else removes it.
    #[error("device '{0}' is being removed already")]
    Leaving(String),
    /// Somebody else has the device.
    #[error(
        "device '{device}' is not removed: what is under way on it has not ended within {} s; query-jobs shows what it is",
        PATIENCE.as_secs()
    )]
    Busy {
        /// Which device.
        device: String,
    },
    /// It is gone, and nobody knows when its last request ends.
    #[error(
        "device '{device}' is removed, but requests of it have not ended within {} s: not all that was written to it may be durable, and its \
         images stay locked until they end",
        PATIENCE.as_secs()
    )]
    Abandoned {
        /// Which device.
        device: String,
    },
    /// It is gone, and the last flush failed.
    #[error("device '{device}' is removed, but not all that was written to it is durable: {source}")]
    NotDurable {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: LayerError,
    },
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Stops serving a device, after the snapshots of it that are under way. Its record stays.
    ///
    /// # Errors
    /// If it is not there or in use; or if its last flush failed or its requests do not end, though it is gone then.
    pub async fn remove_device(self: &Rc<Self>, name: &str, force: bool) -> Result<(), RemoveError> {
        let device = self.device(name).ok_or_else(|| RemoveError::Unknown(name.to_owned()))?;
        if device.leaving.get() {
            return Err(RemoveError::Leaving(name.to_owned()));
        }
        if device.is_connected() && !force {
            return Err(RemoveError::Connected(name.to_owned()));
        }
        device.leaving.set(true);
        let place = self.lines.enter([name]);
        if self.in_patience(place.wait_first()).await.is_none() {
            device.leaving.set(false);
            return Err(RemoveError::Busy { device: name.to_owned() });
        }
        if device.is_connected() && !force {
            // It came while we waited in line.
            device.leaving.set(false);
            return Err(RemoveError::Connected(name.to_owned()));
        }
        let closed = self.close_in_patience(&device).await;
        self.devices.borrow_mut().remove(name);
        match closed {
            Some(closed) => closed.map_err(|source| RemoveError::NotDurable { device: name.to_owned(), source }),
            None => Err(RemoveError::Abandoned { device: name.to_owned() }),
        }
    }

    /// Ends after `limit`, in steps: time in which this process stood still with everything else is not counted.
    pub(crate) async fn patience(&self, limit: Duration) {
        for _ in 0..limit.as_millis() / PATIENCE_STEP.as_millis() {
            self.environment.sleep_until(self.environment.now() + PATIENCE_STEP).await;
        }
    }

    /// The end of `work`, or `None` if that takes longer than anybody waits.
    async fn in_patience<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let limit = self.patience(PATIENCE);
        match select(std::pin::pin!(work), std::pin::pin!(limit)).await {
            Either::Left((value, _)) => Some(value),
            Either::Right(_) => None,
        }
    }

    /// As [`close_device`](Self::close_device), in a task that goes on by itself if it is not waited for any more: `None`.
    async fn close_in_patience(self: &Rc<Self>, device: &Rc<Device<E, H>>) -> Option<Result<(), LayerError>> {
        let closed = Rc::new((RefCell::new(None), WaitQueue::new()));
        let (manager, device, given) = (Rc::clone(self), Rc::clone(device), Rc::clone(&closed));
        let name = device.name().to_owned();
        self.environment.spawn(async move {
            let result = manager.close_device(&device).await;
            given.0.replace(Some(result));
            given.1.notify_all();
        });
        let result = self.in_patience(closed.1.wait_until(|| closed.0.take())).await;
        if result.is_none() {
            tracing::error!(event = "device_abandoned", device = %name, "its requests do not end; not everything may be durable");
        }
        result
    }

    /// Stops front-ends and queues, gives reserved space back and makes everything durable. Never leaves a device half open: after an error
    /// it is closed as well.
    pub(super) async fn close_device(&self, device: &Device<E, H>) -> Result<(), LayerError> {
        let export = device.export.borrow_mut().take();
        if let Some(export) = export {
            export.stop().await;
        }
        let result = device.stack.close().await;
        match &result {
            Ok(()) if device.stack.doubtful_layer().is_some() => {
                tracing::warn!(event = "device_closed", device = %device.name(), "all is durable but what a failed flush may have lost before");
            }
            Ok(()) => tracing::info!(event = "device_closed", device = %device.name(), "everything is durable"),
            Err(error) => tracing::error!(event = "close_failed", device = %device.name(), cause = %error, "not everything is durable"),
        }
        result
    }

    /// Ends everything in good order: nothing new begins, snapshots in line are cancelled, those that have switched are completed, then all
    /// devices are closed.
    ///
    /// # Errors
    /// The names of the devices whose last flush failed, or whose requests do not end.
    pub async fn stop(self: &Rc<Self>) -> Result<(), Vec<String>> {
        self.stopping.set(true);
        for job in self.jobs.list() {
            // Those that have gone too far are waited for.
            let _ = self.jobs.cancel(&job.id);
        }
        if self.in_patience(self.lines.wait_empty()).await.is_none() {
            tracing::error!(event = "snapshots_abandoned", devices = ?self.lines.busy(), "snapshots of these devices do not end");
        }
        if self.in_patience(self.opened.wait_until(|| self.opening.borrow().is_empty().then_some(()))).await.is_none() {
            tracing::error!(event = "opening_abandoned", devices = ?self.opening.borrow(), "these devices are still being opened");
        }
        let devices = std::mem::take(&mut *self.devices.borrow_mut());
        let closed = join_all(devices.values().map(|device| async move { (device.name(), self.close_in_patience(device).await) })).await;
        let failed = closed.into_iter().filter(|(_, result)| !matches!(result, Some(Ok(()))));
        let failed: Vec<_> = failed.map(|(name, _)| name.to_owned()).collect();
        if failed.is_empty() { Ok(()) } else { Err(failed) }
    }
}

//! Removing devices, and the end of all.

use std::rc::Rc;

use futures_util::future::join_all;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::storage::Environment;

use super::Manager;
use super::device::Device;
use super::host::{Export, Host};

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
    /// If it is not there or in use; or if its last flush failed, though it is gone then.
    pub async fn remove_device(&self, name: &str, force: bool) -> Result<(), RemoveError> {
        let device = self.device(name).ok_or_else(|| RemoveError::Unknown(name.to_owned()))?;
        if device.leaving.get() {
            return Err(RemoveError::Leaving(name.to_owned()));
        }
        if device.is_connected() && !force {
            return Err(RemoveError::Connected(name.to_owned()));
        }
        device.leaving.set(true);
        let place = self.lines.enter([name]);
        place.wait_first().await;
        if device.is_connected() && !force {
            // It came while we waited in line.
            device.leaving.set(false);
            return Err(RemoveError::Connected(name.to_owned()));
        }
        let closed = self.close_device(&device).await;
        self.devices.borrow_mut().remove(name);
        closed.map_err(|source| RemoveError::NotDurable { device: name.to_owned(), source })
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
            Ok(()) => tracing::info!(event = "device_closed", device = %device.name(), "everything is durable"),
            Err(error) => tracing::error!(event = "close_failed", device = %device.name(), cause = %error, "not everything is durable"),
        }
        result
    }

    /// Ends everything in good order: nothing new begins, snapshots in line are cancelled, those that have switched are completed, then all
    /// devices are closed.
    ///
    /// # Errors
    /// The names of the devices whose last flush failed.
    pub async fn stop(self: &Rc<Self>) -> Result<(), Vec<String>> {
        self.stopping.set(true);
        for job in self.jobs.list() {
            // Those that have gone too far are waited for.
            let _ = self.jobs.cancel(&job.id);
        }
        self.lines.wait_empty().await;
        self.opened.wait_until(|| self.opening.borrow().is_empty().then_some(())).await;
        let devices = std::mem::take(&mut *self.devices.borrow_mut());
        let closed = join_all(devices.values().map(|device| async move { (device.name(), self.close_device(device).await) })).await;
        let failed: Vec<_> = closed.into_iter().filter(|(_, result)| result.is_err()).map(|(name, _)| name.to_owned()).collect();
        if failed.is_empty() { Ok(()) } else { Err(failed) }
    }
}

//! How much space the layers of a device take on their medium, for people.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::storage::{Environment, FileIdentity, Storage};

use super::Manager;
use super::device::Device;
use super::host::Host;

/// A file server that takes longer is not waited for: what it said before is shown.
const LIMIT: Duration = Duration::from_secs(1);

/// What has been found out of a device's layers.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    known: RefCell<HashMap<FileIdentity, u64>>,
    /// Files are being asked; a medium that hangs is never asked twice.
    is_asking: Cell<bool>,
    /// They take their time, and nobody waits for them any more.
    is_late: Cell<bool>,
    answered: WaitQueue,
}

impl Sizes {
    /// The bytes that this file took when it last said so, if it ever did.
    pub(crate) fn of(&self, file: FileIdentity) -> Option<u64> {
        self.known.borrow().get(&file).copied()
    }
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Has the files of these devices asked how much space they take, as far as they answer in time.
    pub(super) async fn measure(&self, devices: &[Rc<Device<E, H>>]) {
        let answers = join_all(devices.iter().map(|device| async {
            self.ask(device);
            let sizes = &device.sizes;
            sizes.answered.wait_until(|| (!sizes.is_asking.get() || sizes.is_late.get()).then_some(())).await;
        }));
        if let Either::Right(_) = select(std::pin::pin!(answers), std::pin::pin!(self.patience(LIMIT))).await {
            for device in devices {
                device.sizes.is_late.set(device.sizes.is_asking.get());
            }
        }
    }

    /// Asks one file after the other, in a task that goes on by itself.
    fn ask(&self, device: &Rc<Device<E, H>>) {
        let sizes = Rc::clone(&device.sizes);
        if sizes.is_asking.replace(true) {
            return;
        }
        let layers: Vec<_> = device.layers.borrow().iter().map(|layer| (layer.identity, layer.layer.clone())).collect();
        self.environment.spawn(async move {
            let mut known = HashMap::with_capacity(layers.len());
            for (identity, layer) in layers {
                // A file whose size cannot be told still has its place in the stack.
                if let Ok(bytes) = layer.file().allocated_bytes().await {
                    known.insert(identity, bytes);
                }
            }
            sizes.known.replace(known);
            sizes.is_asking.set(false);
            sizes.is_late.set(false);
            sizes.answered.notify_all();
        });
    }
}

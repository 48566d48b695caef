//! The device behind one connection, as crate vhost-user-backend asks for it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use snapfence_image_format::storage::Environment;
use tracing::debug;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::configuration;
use super::relay::InflightKeeper;
use super::vring::{Control, HookVring, Memory};
use crate::device::Device;
use crate::vring::inflight::{InflightError, InflightLayout};
use crate::vring::{GuestMemory, InflightLog};

/// Answers the messages that are not about one ring.
#[derive(Debug)]
pub(super) struct Backend<E: Environment> {
    device: Arc<Device<E>>,
    rings: Vec<Arc<Control>>,
    /// Whether a ring of this connection has been started, so that there is a driver that relies on what it has chosen.
    has_started: AtomicBool,
}

impl<E: Environment> Backend<E> {
    /// For a new connection.
    pub(super) fn new(device: Arc<Device<E>>, rings: Vec<Arc<Control>>) -> Self {
        device.cache().begin_negotiation();
        Self { device, rings, has_started: AtomicBool::new(false) }
    }

    pub(super) fn rings(&self) -> &[Arc<Control>] {
        &self.rings
    }

    /// Most queues, and largest queue size.
    fn record_limits(&self) -> (u16, u16) {
        let options = self.device.options();
        (options.queues, options.queue_size)
    }

    /// Stops all rings at once, after what is in flight.
    pub(super) fn stop_rings(&self) {
        let stopping: Vec<_> = self.rings.iter().map(|ring| (ring, ring.begin_stop())).collect();
        let deadline = self.drain_deadline();
        for (ring, answer) in stopping {
            if let Some(answer) = answer {
                ring.finish_stop(&answer, deadline);
            }
        }
    }

    /// When a drain of all rings that begins now must have ended.
    fn drain_deadline(&self) -> Instant {
        self.rings.first().map_or_else(Instant::now, |ring| ring.drain_deadline())
    }

    fn has_started(&self) -> bool {
        if self.rings.iter().any(|ring| ring.is_running()) {
            self.has_started.store(true, Ordering::Relaxed);
        }
        self.has_started.load(Ordering::Relaxed)
    }
}

impl<E: Environment> InflightKeeper for Backend<E> {
    fn create(&self, queues: u16, queue_size: u16) -> Result<(InflightLayout, File), InflightError> {
        InflightLog::create(queues, queue_size, self.record_limits())
    }

    fn set(&self, layout: InflightLayout, file: OwnedFd) -> Result<(), InflightError> {
        let record = InflightLog::map(layout, file, self.record_limits())?;
        for (index, ring) in (0..).zip(&self.rings) {
            ring.set_record(record.queue(index));
        }
        Ok(())
    }
}

impl<E: Environment> VhostUserBackend for Backend<E> {
    type Bitmap = ();
    type Vring = HookVring;

    fn num_queues(&self) -> usize {
        self.rings.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.options().queue_size)
    }

    /// None of the crate's threads: the rings are served by our workers.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn features(&self) -> u64 {
        configuration::features(&self.device)
    }

    fn acked_features(&self, features: u64) {
        debug!(
            event = "features",
            device = self.device.name(),
            features = format_args!("{features:#x}"),
            "front-end has accepted features"
        );
        self.device.cache().set_features(features);
        for ring in &self.rings {
            ring.set_indirect(configuration::ring_features(features).indirect);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        configuration::protocol_features()
    }

    /// The event index comes to each ring by [`HookVring`].
    fn set_event_idx(&self, _enabled: bool) {}

    /// After the crate has disabled, and so drained, every ring.
    fn reset_device(&self) {
        self.stop_rings();
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        if configuration::covers_write_back(offset, size as usize) && !self.has_started() {
            self.device.cache().reset();
        }
        configuration::read(&self.device, offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        configuration::write(&self.device, offset, bytes);
        Ok(())
    }

    /// The memory table has changed. Returns, and so lets the front-end go on, when nothing in flight uses the table before. A table that cannot be
    /// used ends the connection.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let memory = memory.memory().into_inner();
        GuestMemory::admit(&memory)?;
        let changing: Vec<_> = self.rings.iter().map(|ring| (ring, ring.change_memory(&memory))).collect();
        let deadline = self.drain_deadline();
        for (ring, answer) in changing {
            if let Some(answer) = answer {
                ring.await_memory(&answer, deadline);
            }
        }
        Ok(())
    }

    fn handle_event(&self, _event: u16, _events: EventSet, _vrings: &[HookVring], _thread: usize) -> io::Result<()> {
        // Only the crate's threads call this, and there are none.
        Ok(())
    }

    /// There is no state beside the image and what front-ends keep: saving writes nothing, and closing the file says that this was all. A
    /// front-end that has a state to load, from another back-end, cannot write it and so learns that it does not fit.
    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        debug!(event = "device_state", device = self.device.name(), ?direction, "front-end transfers the device state, which is empty");
        drop(file);
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        Ok(())
    }
}

//! A ring as vhost-user messages see it.
//!
//! Crate vhost-user-backend keeps one object per ring, and calls one of its methods for each message about the ring. With an object of our own
//! and no worker threads of the crate's, the rings are ours: methods put the configuration together and command the queue's worker. They
//! run on the thread that reads messages, so a method that waits delays the answer, which is what draining needs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, warn};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::drains::Drains;
use crate::vring::{EventDescriptor, GuestMemory, InflightQueue, RingFeatures, RingLayout, Signal};
use crate::worker::{QueueHandle, Start};

/// Guest memory as the crate keeps it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// How long a worker may take to see a command that needs no I/O.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long held requests may take to fail, once they are given up. Short, since a queue with others that hang takes all of it.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// One ring of one connection.
#[derive(Debug)]
pub(super) struct Control {
    /// For the log.
    device: String,
    index: u16,
    queue: QueueHandle,
    /// Shared by the rings of the device.
    drains: Arc<Drains>,
    state: Mutex<State>,
}

/// What messages have said so far.
#[derive(Debug, Default)]
struct State {
    layout: RingLayout,
    base: u16,
    features: RingFeatures,
    record: Option<InflightQueue>,
    is_enabled: bool,
    is_running: bool,
    /// The next "no kick descriptor" belongs to a stop and is no message.
    is_stopping: bool,
    call: Option<Arc<Signal>>,
    error: Option<Arc<Signal>>,
}

impl Control {
    pub(super) fn new(device: String, index: u16, queue: QueueHandle, drains: Arc<Drains>) -> Arc<Self> {
        Arc::new(Self { device, index, queue, drains, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_indirect(&self, indirect: bool) {
        self.state().features.indirect = indirect;
    }

    /// `SET_INFLIGHT_FD`: this queue's part, from its next start on. Front-ends send it before they start anything.
    pub(super) fn set_record(&self, record: Option<InflightQueue>) {
        let mut state = self.state();
        if state.is_running {
            warn!(
                event = "ring_message_ignored",
                device = self.device,
                queue = self.index,
                "running ring keeps its record of requests in flight"
            );
        } else {
            state.record = record;
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.state().is_running
    }

    /// Tells the worker about another memory table. `None` if the ring does not run.
    pub(super) fn change_memory(&self, memory: &Arc<GuestMemoryMmap>) -> Option<Receiver<()>> {
        self.state().is_running.then(|| self.queue.set_memory(GuestMemory::new(memory)))
    }

    /// Waits for the answer to [`change_memory`](Self::change_memory).
    pub(super) fn await_memory(&self, answer: &Receiver<()>, until: Instant) {
        if answer.recv_timeout(until.saturating_duration_since(Instant::now())).is_err() {
            self.drains.give_up(Instant::now());
            error!(
                event = "memory_in_use",
                device = self.device,
                queue = self.index,
                "requests still use memory that the front-end takes away"
            );
        }
    }

    /// Begins to stop the ring; [`finish_stop`](Self::finish_stop) waits for it.
    pub(super) fn begin_stop(&self) -> Option<Receiver<u16>> {
        let mut state = self.state();
        std::mem::replace(&mut state.is_running, false).then(|| self.queue.stop())
    }

    /// Waits until nothing is in flight, and remembers where the ring stopped.
    pub(super) fn finish_stop(&self, answer: &Receiver<u16>, until: Instant) {
        let stopped = answer.recv_timeout(until.saturating_duration_since(Instant::now())).or_else(|_| {
            self.drains.give_up(Instant::now());
            error!(event = "drain_timeout", device = self.device, queue = self.index, "ring is given up, with its requests in flight");
            self.queue.abandon().recv_timeout(COMMAND_TIMEOUT)
        });
        match stopped {
            Ok(next_avail) => self.state().base = next_avail,
            Err(_) => error!(event = "worker_silent", device = self.device, queue = self.index, "queue thread does not answer"),
        }
    }

    /// When a drain that begins now must have ended.
    pub(super) fn drain_deadline(&self) -> Instant {
        self.drains.deadline(Instant::now())
    }

    fn stop(&self) {
        if let Some(answer) = self.begin_stop() {
            self.finish_stop(&answer, self.drain_deadline());
        }
    }

    /// The front-end's descriptor, if it is one that can be used. A front-end is not told: none of these messages can be refused but by ending
    /// the connection, which would cost the guest its disk.
    fn descriptor(&self, purpose: &str, file: File) -> Option<EventDescriptor> {
        match OwnedFd::from(file).try_into() {
            Ok(descriptor) => Some(descriptor),
            Err(cause) => {
                warn!(event = "descriptor_refused", device = self.device, queue = self.index, purpose, %cause, "taken for none");
                None
            }
        }
    }

    fn signal(&self, purpose: &str, file: Option<File>) -> Option<Arc<Signal>> {
        match Signal::new(self.descriptor(purpose, file?)?) {
            Ok(signal) => Some(Arc::new(signal)),
            Err(cause) => {
                error!(event = "signal_failed", device = self.device, queue = self.index, purpose, %cause, "the guest will hear of nothing");
                None
            }
        }
    }

    fn start(&self, kick: EventDescriptor, memory: &Memory) {
        let mut state = self.state();
        let start = Start {
            layout: state.layout,
            features: state.features,
            base: state.base,
            memory: GuestMemory::new(&memory.memory().into_inner()),
            record: state.record.clone(),
            kick,
            call: state.call.clone(),
            error: state.error.clone(),
            enabled: state.is_enabled,
        };
        match self.queue.start(start).recv_timeout(COMMAND_TIMEOUT) {
            Ok(Ok(())) => state.is_running = true,
            Ok(Err(cause)) => {
                warn!(event = "ring_refused", device = self.device, queue = self.index, %cause, "ring cannot be started");
                if let Some(error) = &state.error {
                    error.raise();
                }
            }
            Err(_) => error!(event = "worker_silent", device = self.device, queue = self.index, "queue thread does not answer"),
        }
    }
}

thread_local! {
    /// The crate makes its rings itself, from nothing but memory and size, on the thread that makes its daemon. What they are for comes this way.
    static NEXT: RefCell<VecDeque<Arc<Control>>> = const { RefCell::new(VecDeque::new()) };
}

/// Runs `make`, which makes one [`HookVring`] for each of `controls`, in order.
pub(super) fn with_controls<T>(controls: &[Arc<Control>], make: impl FnOnce() -> T) -> T {
    NEXT.set(controls.iter().cloned().collect());
    let made = make();
    NEXT.take();
    made
}

/// The crate's object for a ring.
#[derive(Clone)]
pub(super) struct HookVring {
    /// What the crate looks into. It never learns of a kick, so it takes the ring for one that is not ready, and leaves it alone.
    inner: VringMutex<Memory>,
    memory: Memory,
    control: Arc<Control>,
}

impl<'a> VringStateGuard<'a, Memory> for HookVring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for HookVring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for HookVring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        let control = NEXT.with_borrow_mut(VecDeque::pop_front).ok_or(QueueError::QueueNotReady)?;
        Ok(Self { inner: VringMutex::new(memory.clone(), max_queue_size)?, memory, control })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.inner.get_mut()
    }

    // The five that follow are for users of the crate's worker threads.

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }

    /// `SET_VRING_ENABLE`. Disabling drains: Cloud Hypervisor pauses a guest with nothing else, and then saves its memory.
    fn set_enabled(&self, enabled: bool) {
        let mut state = self.control.state();
        state.is_enabled = enabled;
        if !state.is_running {
            return;
        }
        if enabled {
            self.control.queue.enable();
            return;
        }
        let wait = self.control.drain_deadline().saturating_duration_since(Instant::now());
        let at_rest = self.control.queue.disable().recv_timeout(wait).or_else(|_| {
            self.control.drains.give_up(Instant::now());
            // What waits for space would write to guest memory at any time, and the front-end may be saving it.
            self.control.queue.give_up_held();
            self.control.queue.disable().recv_timeout(GIVE_UP_TIMEOUT)
        });
        if at_rest.is_err() {
            error!(
                event = "drain_timeout",
                device = self.control.device,
                queue = self.control.index,
                "ring is not at rest, whatever the front-end believes"
            );
        }
    }

    /// `SET_VRING_NUM`.
    fn set_queue_size(&self, size: u16) {
        let mut state = self.control.state();
        if state.is_running {
            let (device, queue) = (&self.control.device, self.control.index);
            warn!(event = "ring_message_ignored", device, queue, size, "front-end resizes a running ring");
        } else {
            state.layout.size = size;
        }
    }

    /// `SET_VRING_ADDR`, in guest addresses. Comes for running rings too, when a migration begins to log; nothing changes then.
    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), QueueError> {
        let mut state = self.control.state();
        let layout = RingLayout { size: state.layout.size, descriptors, available, used };
        if state.is_running && layout != state.layout {
            let (device, queue) = (&self.control.device, self.control.index);
            warn!(event = "ring_message_refused", device, queue, "front-end moves a running ring");
            return Err(QueueError::QueueNotReady);
        }
        state.layout = layout;
        Ok(())
    }

    /// `GET_VRING_BASE`, after the ring has stopped.
    fn queue_next_avail(&self) -> u16 {
        self.control.state().base
    }

    /// `SET_VRING_BASE`.
    fn set_queue_next_avail(&self, base: u16) {
        let mut state = self.control.state();
        if state.is_running {
            let (device, queue) = (&self.control.device, self.control.index);
            warn!(event = "ring_message_ignored", device, queue, base, "front-end sets the base of a running ring");
        } else {
            state.base = base;
        }
    }

    /// The crate sets what it has just asked for. The ring looks for itself when it starts.
    fn set_queue_next_used(&self, _index: u16) {}

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        Ok(0)
    }

    /// `SET_FEATURES`, which may come again while rings run, with or without the logging of a migration.
    fn set_queue_event_idx(&self, enabled: bool) {
        self.control.state().features.event_idx = enabled;
    }

    /// `GET_VRING_BASE` begins with `false`: the ring stops, after what is in flight. `true` never comes without a kick in `inner`.
    fn set_queue_ready(&self, ready: bool) {
        if !ready {
            self.control.state().is_stopping = true;
            self.control.stop();
        }
    }

    /// `SET_VRING_KICK` starts a stopped ring, and gives a running one another descriptor. `None` also ends `GET_VRING_BASE`.
    fn set_kick(&self, kick: Option<File>) {
        let was_stopping = std::mem::replace(&mut self.control.state().is_stopping, false);
        if was_stopping && kick.is_none() {
            return;
        }
        let Some(kick) = kick.and_then(|kick| self.control.descriptor("kick", kick)) else {
            let (device, queue) = (&self.control.device, self.control.index);
            warn!(event = "kick_missing", device, queue, "rings are not polled: the front-end must give an eventfd for kicks");
            return;
        };
        if self.control.is_running() {
            self.control.queue.set_kick(kick);
        } else {
            self.control.start(kick, &self.memory);
        }
    }

    /// `SET_VRING_CALL`. `None` is a driver that polls.
    fn set_call(&self, call: Option<File>) {
        let call = self.control.signal("call", call);
        let mut state = self.control.state();
        state.call.clone_from(&call);
        if state.is_running {
            self.control.queue.set_call(call);
        }
    }

    /// `SET_VRING_ERR`.
    fn set_err(&self, error: Option<File>) {
        let error = self.control.signal("error", error);
        let mut state = self.control.state();
        state.error.clone_from(&error);
        if state.is_running {
            self.control.queue.set_error(error);
        }
    }
}

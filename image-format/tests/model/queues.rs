//! Queue threads as the daemon has them, on the simulation's clock: look at the fence, take requests with the view of the turn, park.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::runtime::Executor;
use snapfence_image_format::stack::{Attachment, FenceDomain, Participant, Stack, View};
use snapfence_image_format::storage::Chance;
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, SimulatedThread};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::Disk;

pub(crate) type SimulatedStack = Stack<SimulatedEnvironment>;
type SimulatedView = View<SimulatedEnvironment>;

/// One stack as one queue thread serves it.
#[derive(Debug)]
pub(crate) struct Port {
    stack: Arc<SimulatedStack>,
    /// Loaded once per turn, for all requests of the turn.
    view: RefCell<Option<Arc<SimulatedView>>>,
    chance: RefCell<Chance>,
    participant: Rc<RefCell<Participant>>,
    _attachment: Attachment,
}

/// Where a queue thread is in its loop. Others may do anything between any two of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Parked,
    /// It has looked at the fence.
    Began,
    /// It takes requests.
    Loaded,
    /// Tasks have run.
    Ran,
}

/// See the module.
pub(crate) struct QueueThread {
    executor: Executor,
    participant: Rc<RefCell<Participant>>,
    ports: Vec<Arc<Port>>,
    phase: Phase,
    /// Turns for which the system runs something else.
    stall: u64,
    chance: Chance,
}

impl QueueThread {
    /// A thread that serves all stacks. Its tasks run on `executor`.
    pub(crate) fn new(executor: Executor, domain: &Arc<FenceDomain>, stacks: &[Arc<SimulatedStack>], mut chance: Chance) -> Self {
        let participant = Rc::new(RefCell::new(domain.join()));
        let mut port = |stack: &Arc<SimulatedStack>| {
            let attachment = stack.attach(&participant.borrow());
            let chance = RefCell::new(chance.fork());
            #[expect(clippy::arc_with_non_send_sync, reason = "simulated threads are one thread")]
            Arc::new(Port {
                stack: Arc::clone(stack),
                view: RefCell::default(),
                chance,
                participant: Rc::clone(&participant),
                _attachment: attachment,
            })
        };
        let ports = stacks.iter().map(&mut port).collect();
        Self { executor, participant, ports, phase: Phase::Parked, stall: 0, chance }
    }

    pub(crate) fn ports(&self) -> &[Arc<Port>] {
        &self.ports
    }

    fn forget_views(ports: &[Arc<Port>]) {
        for port in ports {
            *port.view.borrow_mut() = None;
        }
    }
}

impl SimulatedThread for QueueThread {
    fn has_work(&self) -> bool {
        self.phase != Phase::Parked || self.executor.has_ready()
    }

    fn turn(&mut self) {
        if self.stall > 0 {
            self.stall -= 1;
            return;
        }
        self.phase = match self.phase {
            Phase::Parked => {
                self.participant.borrow_mut().begin_turn(|| Self::forget_views(&self.ports));
                Phase::Began
            }
            Phase::Began => {
                for port in &self.ports {
                    if self.chance.happens(1, 2) {
                        port.view();
                    }
                }
                Phase::Loaded
            }
            Phase::Loaded => {
                self.executor.run_ready();
                Phase::Ran
            }
            Phase::Ran if self.executor.has_ready() => {
                self.participant.borrow_mut().begin_turn(|| Self::forget_views(&self.ports));
                Phase::Began
            }
            Phase::Ran => {
                Self::forget_views(&self.ports);
                self.participant.borrow_mut().park();
                Phase::Parked
            }
        };
        // Long enough, now and then, for others to do whole requests meanwhile.
        self.stall = match self.chance.below(32) {
            0 => self.chance.below(1000),
            1..5 => self.chance.below(32),
            _ => 0,
        };
    }
}

impl Port {
    fn view(&self) -> Arc<SimulatedView> {
        Arc::clone(self.view.borrow_mut().get_or_insert_with(|| self.stack.view()))
    }

    /// Waits like a request in a ring.
    async fn wait_in_ring(&self) {
        let turns = self.chance.borrow_mut().below(4);
        for _ in 0..turns {
            next_turn().await;
        }
    }
}

/// Ends in a later turn of the thread.
pub(crate) async fn next_turn() {
    let mut waited = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

impl Disk for Port {
    type Error = LayerError;

    fn size(&self) -> u64 {
        self.stack.virtual_size()
    }

    async fn admitted(&self) -> u64 {
        self.wait_in_ring().await;
        if self.participant.borrow().is_stale() {
            *self.view.borrow_mut() = None;
        }
        self.view().layers().len() as u64
    }

    async fn read(&self, at: GuestOffset, into: Buffer) -> (Result<(), LayerError>, Buffer) {
        let view = self.view();
        let result = view.read(at, into).await;
        view.completions_released().await;
        result
    }

    async fn write(&self, at: GuestOffset, from: Buffer) -> (Result<(), LayerError>, Buffer) {
        let view = self.view();
        let result = view.write(at, from).await;
        view.completions_released().await;
        result
    }

    async fn write_zeroes(&self, range: GuestRange, unmap: bool) -> Result<(), LayerError> {
        let view = self.view();
        let result = view.write_zeroes(range, unmap).await;
        view.completions_released().await;
        result
    }

    async fn discard(&self, range: GuestRange) -> Result<(), LayerError> {
        let view = self.view();
        let result = view.discard(range).await;
        view.completions_released().await;
        result
    }

    async fn flush(&self) -> Result<(), LayerError> {
        let view = self.view();
        let result = view.flush().await;
        view.completions_released().await;
        result
    }
}

/// All bytes of a stack, for one who is no queue thread.
///
/// # Errors
/// If they cannot be read.
pub(crate) async fn read_stack(stack: Arc<SimulatedStack>) -> Result<Vec<u8>, String> {
    let len = usize::try_from(stack.virtual_size()).expect("small");
    let (result, buffer) = stack.view().read(GuestOffset::ZERO, AlignedBuffer::zeroed(len).into()).await;
    result.map(|()| buffer.into_owned().to_vec()).map_err(|error| format!("cannot read: {error}"))
}

//! What others want of a worker. Commands are letters in its mailbox; answers come through a channel of their own, so whoever asks may wait
//! with a time limit, and learns that the worker is gone when the channel closes.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::storage::Environment;

use crate::device::Device;
use crate::vring::{EventDescriptor, GuestMemory, InflightQueue, RingError, RingFeatures, RingLayout, Signal};

/// Everything that a ring needs to run.
#[derive(Debug)]
pub struct Start {
    /// Where it is.
    pub layout: RingLayout,
    /// What was negotiated.
    pub features: RingFeatures,
    /// From where on the front-end thinks that it is to be taken.
    pub base: u16,
    /// The memory that it is in.
    pub memory: GuestMemory,
    /// The front-end's record of what is in flight, if it keeps one.
    pub record: Option<InflightQueue>,
    /// How the driver kicks.
    pub kick: EventDescriptor,
    /// How the driver is interrupted; `None` for one that polls.
    pub call: Option<Arc<Signal>>,
    /// How the front-end hears of a broken ring.
    pub error: Option<Arc<Signal>>,
    /// Whether chains may be taken.
    pub enabled: bool,
}

/// Where an answer goes.
pub(super) type Answer<T> = SyncSender<T>;

/// What one queue shall do.
#[derive(Debug)]
pub(super) enum Command {
    /// Run a ring, instead of any that runs.
    Start { start: Box<Start>, answer: Answer<Result<(), RingError>> },
    /// Take nothing more; when nothing is in flight, answer with the index to go on from, and forget the ring.
    Stop { answer: Answer<u16> },
    /// Forget the ring at once. What is in flight ends, but is not given back.
    Abandon { answer: Answer<u16> },
    /// Give back as failed what waits for space, and hold nothing more before the next `Enable`.
    GiveUpHeld,
    /// Take chains.
    Enable,
    /// Take no chains for now; answer when nothing is in flight.
    Disable { answer: Answer<()> },
    /// Use another descriptor for kicks.
    Kick(EventDescriptor),
    /// Use another descriptor for interrupts, or none.
    Call(Option<Arc<Signal>>),
    /// Use another descriptor for errors, or none.
    Error(Option<Arc<Signal>>),
    /// Use another memory table; answer when nothing that is in flight uses the one before.
    Memory { memory: GuestMemory, answer: Answer<()> },
    /// The queue is not needed any more.
    Detach,
}

/// What comes in a mailbox.
pub(super) enum Letter<E: Environment> {
    Attach { queue: u64, device: Arc<Device<E>>, index: u16 },
    Command { queue: u64, command: Command },
    End,
}

/// The way to a worker.
#[derive(Debug)]
pub(super) struct Mailbox<E: Environment> {
    /// `None` once the worker is gone.
    letters: Mutex<Option<Vec<Letter<E>>>>,
    arrived: WaitQueue,
}

impl<E: Environment> Default for Mailbox<E> {
    fn default() -> Self {
        Self { letters: Mutex::new(Some(Vec::new())), arrived: WaitQueue::new() }
    }
}

impl<E: Environment> std::fmt::Debug for Letter<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Attach { queue, index, .. } => write!(f, "Attach({queue}, queue {index})"),
            Self::Command { queue, command } => write!(f, "Command({queue}, {command:?})"),
            Self::End => f.write_str("End"),
        }
    }
}

impl<E: Environment> Mailbox<E> {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<Letter<E>>>> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, letter: Letter<E>) {
        // A letter to a worker that is gone is dropped, which closes its answer.
        if let Some(letters) = &mut *self.lock() {
            letters.push(letter);
        }
        self.arrived.notify_all();
    }

    /// The worker's task that brings letters into its inbox. Being a task, it wakes the worker.
    pub(super) async fn fetch(mailbox: Arc<Self>, inbox: Rc<RefCell<Vec<Letter<E>>>>) {
        loop {
            let letters =
                mailbox.arrived.wait_until(|| mailbox.lock().as_mut().filter(|letters| !letters.is_empty()).map(std::mem::take)).await;
            inbox.borrow_mut().extend(letters);
        }
    }

    /// Nobody reads letters any more.
    pub(super) fn close(&self) {
        let unread = self.lock().take();
        drop(unread);
    }
}

/// Commands without the type of the environment, for those who do not care.
trait Post: std::fmt::Debug + Send + Sync {
    fn post_command(&self, queue: u64, command: Command);
}

impl<E: Environment> Post for Mailbox<E> {
    fn post_command(&self, queue: u64, command: Command) {
        self.post(Letter::Command { queue, command });
    }
}

/// A worker, as others reach it. It ends when told to, not when the last handle goes.
#[derive(Clone, Debug)]
pub struct WorkerHandle<E: Environment> {
    mailbox: Arc<Mailbox<E>>,
}

impl<E: Environment> WorkerHandle<E> {
    pub(super) fn new(mailbox: Arc<Mailbox<E>>) -> Self {
        Self { mailbox }
    }

    /// Gives the worker the virtqueue `index` of `device`. It is taken away when the handle is dropped.
    pub fn attach(&self, device: &Arc<Device<E>>, index: u16) -> QueueHandle {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let queue = NEXT.fetch_add(1, Ordering::Relaxed);
        self.mailbox.post(Letter::Attach { queue, device: Arc::clone(device), index });
        QueueHandle { queue, mailbox: Arc::clone(&self.mailbox) as Arc<dyn Post> }
    }

    /// Tells the worker to end when its tasks have. Its queues are gone at once: stop them before.
    pub fn end(&self) {
        self.mailbox.post(Letter::End);
    }
}

/// One virtqueue on its worker, as a connection commands it. Methods that give a [`Receiver`] answer through it; it closes without an answer if
/// the worker or the ring is gone.
#[derive(Debug)]
pub struct QueueHandle {
    queue: u64,
    mailbox: Arc<dyn Post>,
}

impl QueueHandle {
    fn send(&self, command: Command) {
        self.mailbox.post_command(self.queue, command);
    }

    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Receiver<T> {
        let (answer, receiver) = sync_channel(1);
        self.send(command(answer));
        receiver
    }

    /// Runs a ring.
    pub fn start(&self, start: Start) -> Receiver<Result<(), RingError>> {
        self.ask(|answer| Command::Start { start: Box::new(start), answer })
    }

    /// Takes nothing more; answers, when nothing is in flight, with the index to go on from.
    pub fn stop(&self) -> Receiver<u16> {
        self.ask(|answer| Command::Stop { answer })
    }

    /// Forgets the ring, also if something is in flight: that ends, touching only memory which it keeps, but is not given back.
    pub fn abandon(&self) -> Receiver<u16> {
        self.ask(|answer| Command::Abandon { answer })
    }

    /// Lets requests that wait for space fail, and those as well that would have to, until the queue is enabled again.
    pub fn give_up_held(&self) {
        self.send(Command::GiveUpHeld);
    }

    /// Lets chains be taken.
    pub fn enable(&self) {
        self.send(Command::Enable);
    }

    /// Lets no chains be taken; answers when nothing is in flight.
    pub fn disable(&self) -> Receiver<()> {
        self.ask(|answer| Command::Disable { answer })
    }

    /// Replaces the kick descriptor of a running ring.
    pub fn set_kick(&self, kick: EventDescriptor) {
        self.send(Command::Kick(kick));
    }

    /// Replaces the call descriptor of a running ring.
    pub fn set_call(&self, call: Option<Arc<Signal>>) {
        self.send(Command::Call(call));
    }

    /// Replaces the error descriptor of a running ring.
    pub fn set_error(&self, error: Option<Arc<Signal>>) {
        self.send(Command::Error(error));
    }

    /// Replaces the memory; answers when nothing in flight uses the memory before.
    pub fn set_memory(&self, memory: GuestMemory) -> Receiver<()> {
        self.ask(|answer| Command::Memory { memory, answer })
    }
}

impl Drop for QueueHandle {
    fn drop(&mut self) {
        self.send(Command::Detach);
    }
}

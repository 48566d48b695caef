//! Queue threads: each serves any number of virtqueues, of any devices, from one loop without locks.
//!
//! - [`command`]: what others want of a worker, and the way to it.
//! - `queue`: one virtqueue on its worker.
//! - `polling`: when a thread looks again instead of sleeping.
//! - [`thread`]: the loop over io_uring.
//!
//! [`Worker::turn`] does everything but the waiting, so a simulator can run the same worker on a virtual clock.

pub mod command;
mod polling;
mod queue;
pub mod thread;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::runtime::Executor;
use snapfence_image_format::stack::{FenceDomain, Participant};
use snapfence_image_format::storage::Environment;
use snapfence_image_format::storage::uring::{Reactor, Watch};

use self::command::{Command, Letter, Mailbox};
use self::queue::Queue;

pub use self::command::{QueueHandle, Start, WorkerHandle};
pub use self::thread::WorkerThread;

/// How a worker is woken by kicks. The worker looks at its rings itself; all that a kick must do is to end its sleep.
pub trait Doorbells {
    /// A kick descriptor that is being watched, until it is dropped.
    type Bell;

    /// Lets kicks through `kick` end the worker's sleep, also one that was there before.
    fn watch(&self, kick: OwnedFd) -> Self::Bell;
}

impl Doorbells for Reactor {
    type Bell = Watch;

    fn watch(&self, kick: OwnedFd) -> Watch {
        Reactor::watch(self, kick, 0)
    }
}

/// For workers that nobody has to wake, because somebody else decides when they turn.
impl Doorbells for () {
    type Bell = OwnedFd;

    fn watch(&self, kick: OwnedFd) -> OwnedFd {
        kick
    }
}

/// What a worker's turn has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do at once.
    Busy,
    /// Nothing to do before a kick, a completion or a command.
    Idle,
    /// The worker has been told to end, and nothing is left.
    Ended,
}

/// The queues of one thread.
pub struct Worker<E: Environment, D: Doorbells> {
    executor: Executor,
    doorbells: D,
    participant: Participant,
    mailbox: Arc<Mailbox<E>>,
    /// Letters that the mailbox's task has fetched.
    inbox: Rc<RefCell<Vec<Letter<E>>>>,
    queues: Vec<Queue<E, D::Bell>>,
    is_ending: bool,
}

impl<E: Environment, D: Doorbells> Worker<E, D> {
    /// A worker without queues, whose tasks run on `executor`. Whoever owns the executor's thread calls [`turn`](Self::turn).
    pub fn new(executor: Executor, doorbells: D, domain: &Arc<FenceDomain>) -> (Self, WorkerHandle<E>) {
        let mailbox = Arc::new(Mailbox::default());
        let inbox = Rc::new(RefCell::new(Vec::new()));
        executor.spawn(Mailbox::fetch(Arc::clone(&mailbox), Rc::clone(&inbox)));
        let handle = WorkerHandle::new(Arc::clone(&mailbox));
        let worker = Self { executor, doorbells, participant: domain.join(), mailbox, inbox, queues: Vec::new(), is_ending: false };
        (worker, handle)
    }

    /// Works or, if there was nothing to do, rests.
    pub fn turn(&mut self) -> Turn {
        match self.work() {
            Turn::Idle => self.rest(),
            other => other,
        }
    }

    /// Obeys commands, takes what is in the rings, runs what is ready, and gives back what is done. Never blocks.
    ///
    /// After [`Turn::Idle`] there was nothing to do. The caller may work again, or [`rest`](Self::rest).
    pub(crate) fn work(&mut self) -> Turn {
        let Self { participant, queues, .. } = self;
        participant.begin_turn(|| queues.iter_mut().for_each(Queue::forget_view));
        self.obey();
        let mut has_worked = false;
        for queue in &mut self.queues {
            has_worked |= queue.take(&self.executor, &self.participant) > 0;
        }
        has_worked |= self.executor.run_ready() > 0;
        for queue in &mut self.queues {
            queue.give_back();
        }
        if self.is_ending && self.executor.task_count() <= 1 {
            // Only the mailbox's task is left.
            return Turn::Ended;
        }
        if has_worked { Turn::Busy } else { Turn::Idle }
    }

    /// Prepares for sleep, if there is nothing to do.
    ///
    /// After [`Turn::Idle`] the caller may sleep, and must work again after anything has happened. Kicks are asked for by then, and the fence
    /// knows that nothing is taken from any ring meanwhile.
    pub(crate) fn rest(&mut self) -> Turn {
        // All queues ask, so that none stays without kicks because another one has work.
        let waiting = self.queues.iter_mut().filter_map(|queue| queue.ask_for_kick().then_some(())).count() > 0;
        if waiting || self.executor.has_ready() || !self.inbox.borrow().is_empty() {
            return Turn::Busy;
        }
        // A view that is kept is not retired, and a snapshot would wait for this worker to wake up.
        self.queues.iter_mut().for_each(Queue::forget_view);
        self.participant.park();
        Turn::Idle
    }

    fn obey(&mut self) {
        let letters = std::mem::take(&mut *self.inbox.borrow_mut());
        for letter in letters {
            match letter {
                Letter::Attach { queue, device, index } => self.queues.push(Queue::new(queue, device, index, &self.participant)),
                Letter::Command { queue, command: Command::Detach } => self.queues.retain(|known| known.id() != queue),
                Letter::Command { queue, command } => {
                    // A queue that is gone answers by dropping the command.
                    if let Some(queue) = self.queues.iter_mut().find(|known| known.id() == queue) {
                        queue.obey(command, &self.doorbells);
                    }
                }
                Letter::End => {
                    self.queues.clear();
                    self.is_ending = true;
                }
            }
        }
    }
}

impl<E: Environment, D: Doorbells> Drop for Worker<E, D> {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl<E: Environment, D: Doorbells> std::fmt::Debug for Worker<E, D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker({} queues, {:?})", self.queues.len(), self.executor)
    }
}

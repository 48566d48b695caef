//! A queue thread of the daemon, as a simulation turns it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::runtime::Executor;
use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, SimulatedThread};
use snapfenced::worker::{Turn, Worker, WorkerHandle};

/// The thread's loop. In place of kicks it has a flag, which the driver sets, or what the last turn has left.
pub(crate) struct QueueThread {
    worker: Worker<SimulatedEnvironment, ()>,
    executor: Executor,
    awake: Rc<Cell<bool>>,
}

impl QueueThread {
    /// One that begins awake.
    pub(crate) fn new(executor: Executor, domain: &Arc<FenceDomain>, awake: &Rc<Cell<bool>>) -> (Self, WorkerHandle<SimulatedEnvironment>) {
        let (worker, handle) = Worker::new(executor.clone(), (), domain);
        awake.set(true);
        (Self { worker, executor, awake: Rc::clone(awake) }, handle)
    }
}

impl SimulatedThread for QueueThread {
    fn has_work(&self) -> bool {
        self.awake.get() || self.executor.has_ready()
    }

    fn turn(&mut self) {
        // A kick that comes in the midst of it is for the next.
        self.awake.set(false);
        if self.worker.turn() == Turn::Busy {
            self.awake.set(true);
        }
    }
}

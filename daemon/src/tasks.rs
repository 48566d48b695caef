//! Tasks that end by themselves, and those who would like to know when all of them have.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

use snapfence_image_format::runtime::WaitQueue;
use snapfence_image_format::storage::Environment;

/// Tasks of one thread that go on whether or not anybody waits for them: what they wait for may be a disk that hangs.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    running: Cell<usize>,
    fewer: WaitQueue,
}

/// One task, until it has ended in whatever way.
struct Running(Rc<Tasks>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        self.0.fewer.notify_all();
    }
}

impl Tasks {
    /// Begins one more.
    pub(crate) fn spawn<E: Environment>(self: &Rc<Self>, environment: &E, task: impl Future<Output = ()> + 'static) {
        self.running.set(self.running.get() + 1);
        let running = Running(Rc::clone(self));
        environment.spawn(async move {
            task.await;
            drop(running);
        });
    }

    /// Ends when none is left.
    pub(crate) async fn all_ended(&self) {
        self.fewer.wait_until(|| (self.running.get() == 0).then_some(())).await;
    }
}

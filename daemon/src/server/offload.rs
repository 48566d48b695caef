//! Work that blocks, on threads of its own.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use snapfence_image_format::runtime::WaitQueue;

/// Where the result of one piece of work arrives. `Some(None)`: it panicked.
struct Outcome<T> {
    value: Mutex<Option<Option<T>>>,
    arrived: WaitQueue,
}

/// Tells that the work has ended, however it did.
struct Ending<T>(Arc<Outcome<T>>);

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        self.0.value.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(None);
        self.0.arrived.notify_all();
    }
}

/// Runs `work` on a new thread and gives its result. The work goes on if the future is dropped.
///
/// # Errors
/// If the system gives no thread, or the work panicked.
pub(super) async fn offload<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let outcome = Arc::new(Outcome { value: Mutex::new(None), arrived: WaitQueue::new() });
    let ending = Ending(Arc::clone(&outcome));
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let value = work();
        *ending.0.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(Some(value));
    })?;
    let value = outcome.arrived.wait_until(|| outcome.value.lock().unwrap_or_else(PoisonError::into_inner).take()).await;
    value.ok_or_else(|| io::Error::other("the thread that did it has panicked"))
}

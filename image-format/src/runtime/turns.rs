//! Letting others go on in the middle of long work.

use std::future::poll_fn;
use std::task::Poll;

/// Ends in the next turn of this thread, after all tasks that are ready now have had theirs.
pub async fn next_turn() {
    let mut waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

//! Where a turn of a thread can be interrupted: whenever the program looks at the clock, or asks the disk for something.

use std::cell::RefCell;
use std::rc::Rc;

type Watcher = Rc<dyn Fn(Moment)>;

thread_local! {
    static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
}

/// What a thread is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It looks at the clock.
    Clock,
    /// An operation on a file or a name begins.
    Operation,
    /// What a test says: see [`reach`].
    Elsewhere,
}

/// Ends the watch of [`watch_moments`] when dropped.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct MomentWatch(());

impl Drop for MomentWatch {
    fn drop(&mut self) {
        // Later than all that it could be needed for.
        let _ = WATCHER.try_with(RefCell::take);
    }
}

/// Calls `watcher` whenever something in this thread of the system reaches a moment in a simulated environment, but not while it is being called.
/// There other threads of the program can have turns, as if the one that is interrupted had been held up. Locks may be held.
pub fn watch_moments(watcher: impl Fn(Moment) + 'static) -> MomentWatch {
    WATCHER.set(Some(Rc::new(watcher)));
    MomentWatch(())
}

/// Says that a moment is reached: the environment does for all that it has to do with, and what a test has in its place may.
pub fn reach(moment: Moment) {
    if let Some(watcher) = WATCHER.take() {
        watcher(moment);
        WATCHER.set(Some(watcher));
    }
}

//! Where a turn of a thread can be interrupted: whenever the program looks at the clock.

use std::cell::RefCell;
use std::rc::Rc;

thread_local! {
    static WATCHER: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

/// Ends the watch of [`watch_clock`] when dropped.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct ClockWatch(());

impl Drop for ClockWatch {
    fn drop(&mut self) {
        // Later than all that it could be needed for.
        let _ = WATCHER.try_with(RefCell::take);
    }
}

/// Calls `watcher` whenever something in this thread of the system is about to look at the clock of a simulated environment, but not while it is
/// being called. There other threads of the program can have turns, as if the one that looks had been held up. Locks may be held.
pub fn watch_clock(watcher: impl Fn() + 'static) -> ClockWatch {
    WATCHER.set(Some(Rc::new(watcher)));
    ClockWatch(())
}

/// The clock is about to be looked at.
pub(super) fn look() {
    if let Some(watcher) = WATCHER.take() {
        watcher();
        WATCHER.set(Some(watcher));
    }
}

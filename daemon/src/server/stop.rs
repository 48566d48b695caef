//! Being asked to end: by a signal, or on the control socket.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use snapfence_image_format::runtime::WaitQueue;

/// Whether the daemon shall end.
#[derive(Debug, Default)]
pub(super) struct StopRequest {
    asked: AtomicBool,
    changed: WaitQueue,
}

impl StopRequest {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Asks for the end. Once is enough.
    pub(super) fn ask(&self, who: &str) {
        let first = !self.asked.swap(true, Ordering::SeqCst);
        // Before anything is said of it: whatever becomes of the log, the daemon ends.
        self.changed.notify_all();
        if first {
            tracing::info!(event = "stopping", asked_by = who, "finishing what is under way");
        }
    }

    /// Ends when the daemon shall.
    pub(super) async fn asked(&self) {
        self.changed.wait_until(|| self.asked.load(Ordering::SeqCst).then_some(())).await;
    }

    /// Lets SIGTERM and SIGINT ask.
    ///
    /// # Errors
    /// If the handlers or their thread cannot be had.
    pub(super) fn follow_signals(self: &Arc<Self>) -> io::Result<()> {
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        let stop = Arc::clone(self);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                stop.ask(if signal == SIGTERM { "SIGTERM" } else { "SIGINT" });
            }
        })?;
        Ok(())
    }
}

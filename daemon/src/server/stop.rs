//! Being asked to end: by a signal, or on the control socket.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
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

    /// Lets SIGTERM, SIGINT and SIGHUP ask: a terminal that is closed must not cost what the guests have written. Whoever has SIGHUP ignored, as
    /// `nohup` does, goes on without the terminal.
    ///
    /// # Errors
    /// If the handlers or their thread cannot be had.
    pub(super) fn follow_signals(self: &Arc<Self>) -> io::Result<()> {
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        if !is_ignored(SIGHUP)? {
            signals.add_signal(SIGHUP)?;
        }
        let stop = Arc::clone(self);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                stop.ask(match signal {
                    SIGTERM => "SIGTERM",
                    SIGHUP => "SIGHUP",
                    _ => "SIGINT",
                });
            }
        })?;
        Ok(())
    }
}

/// Whether whoever has started us wants this signal to be ignored.
fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    let mut found = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action only the present one is stored, to a variable of the right type that lives through the call.
    if unsafe { libc::sigaction(signal, std::ptr::null(), found.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and so has stored an action.
    let found = unsafe { found.assume_init() };
    Ok(found.sa_sigaction == libc::SIG_IGN)
}

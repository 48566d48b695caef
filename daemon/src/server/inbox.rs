//! Commands on their way from the connections' threads to the control thread.

use std::sync::{Arc, Mutex, PoisonError};

use snapfence::protocol::Command;
use snapfence_image_format::runtime::WaitQueue;

use crate::control::{Commands, Reply};

/// Commands that the control thread has not taken yet. Dropped replies answer for themselves.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    commands: Mutex<Vec<(Command, Reply)>>,
    arrived: WaitQueue,
}

impl Inbox {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Waits for commands and takes them.
    pub(super) async fn take(&self) -> Vec<(Command, Reply)> {
        self.arrived
            .wait_until(|| {
                let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
                (!commands.is_empty()).then(|| std::mem::take(&mut *commands))
            })
            .await
    }
}

impl Commands for Inbox {
    fn execute(&self, command: Command, reply: Reply) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push((command, reply));
        self.arrived.notify_all();
    }
}

//! Events to all clients.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapfence::protocol::Event;

use super::encode;
use super::outbox::Outbox;

/// Sends events to every client that has negotiated. Clones send to the same clients.
///
/// Never waits for a client: each has room for 1024 events; those beyond are counted, and the client is told by `EVENTS_LOST`.
#[derive(Clone, Debug, Default)]
pub struct Events {
    /// A leaf in the lock order, but for the outboxes' own locks.
    listeners: Arc<Mutex<Vec<Arc<Outbox>>>>,
}

impl Events {
    /// No clients yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Arc<Outbox>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an event, with the present time. Events of one thread arrive in their order.
    pub fn emit(&self, event: Event) {
        let value = match serde_json::to_value(&event) {
            Ok(value) => value,
            Err(error) => {
                tracing::warn!(event = "event_not_sent", name = event.name(), %error, "an event cannot be written as JSON");
                return;
            }
        };
        let listeners = self.listeners();
        if listeners.is_empty() {
            return;
        }
        let line = encode::event(value);
        for listener in listeners.iter() {
            listener.event(&line);
        }
    }

    pub(super) fn subscribe(&self, outbox: Arc<Outbox>) {
        self.listeners().push(outbox);
    }

    pub(super) fn unsubscribe(&self, outbox: &Arc<Outbox>) {
        self.listeners().retain(|listener| !Arc::ptr_eq(listener, outbox));
    }
}

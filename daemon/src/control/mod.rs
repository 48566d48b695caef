//! The control server: QMP's wire rules on a unix socket.
//!
//! ```text
//!   listener thread ── accept ──▶ connection thread (one each, at most 64)
//!                                   │ bytes ─▶ Framer ─▶ Request ─▶ Command ─▶ Commands::execute ─▶ any thread
//!                                   └ Outbox ◀── Reply, once ◀─────────────────────────────────────┘
//!                                        ▲────── Events::emit, from any thread
//! ```
//!
//! The requests of one connection are carried out one after the other and answered in their order, as QMP says; those of different connections do not
//! wait for one another, as long as [`Commands::execute`] hands on whatever takes time and returns. An event is put into each connection's
//! [`outbox`](Events) and never waits for a client.

mod connection;
mod encode;
mod events;
mod framer;
mod outbox;
mod peer;
mod quotes;
mod reply;
mod server;

pub use events::Events;
pub use reply::Reply;
pub use server::{Server, ServerError, ServerOptions};

use snapfence::protocol::Command;

/// What carries out the commands.
pub trait Commands: Send + Sync {
    /// Begins to carry out a command.
    ///
    /// Runs on the thread of the connection and must not block: whatever takes time goes elsewhere and takes the reply along.
    fn execute(&self, command: Command, reply: Reply);
}

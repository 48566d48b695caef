//! The messages between host and guest: one JSON object a line, in both directions, over a virtio-serial port.
//!
//! Every request carries an id and is answered by exactly one reply with that id. Requests run side by side, so a long one delays no other.

use serde::{Deserialize, Serialize};

use crate::record::Layout;

/// Name of the virtio-serial port the messages go over.
pub const PORT: &str = "snapfence.agent";

/// A line from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host, repeated in the reply.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What the host may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Run a shell script and answer with what became of it ([`Answer::Ran`]).
    Run {
        /// Given to `sh -c`.
        script: String,
    },
    /// Start the ordered counters, going on from what the devices already hold ([`Answer::Done`]).
    StartCounters(Counters),
    /// Finish the counter each chain is at on all its devices, stop, and answer with the totals ([`Answer::Progress`]).
    StopCounters,
    /// Say how far the counters are ([`Answer::Progress`]).
    Progress,
    /// Make everything durable and restart. No reply; the next message is [`Message::Ready`].
    Reboot,
    /// Make everything durable and power off. No reply.
    PowerOff,
}

/// What the counters are to be written to, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The devices in the order every chain writes them.
    pub devices: Vec<Region>,
    /// How the regions are divided.
    pub layout: Layout,
    /// Flush a device after every so many counters written to it; never if 0.
    pub flush_every: u64,
    /// Send [`Message::Progress`] every so many milliseconds; never if 0.
    pub report_every_ms: u64,
}

/// Where the counters lie on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// The block device, for example `/dev/vda`.
    pub path: String,
    /// Byte offset of the region; a multiple of 4096.
    pub offset: u64,
}

/// A line from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The guest is up and takes requests. Sent at each start.
    Ready {
        /// The kernel's random id of this boot.
        boot_id: String,
        /// What `/` is, for example `rootfs` or `/dev/vda`.
        root: String,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The answer to a request, or why there is none.
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it. The error is text for a person.
        result: Result<Answer, String>,
    },
    /// How far the counters are.
    Progress(Progress),
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done.
    Done,
    /// A script ended.
    Ran {
        /// Exit status; 128 + n if signal n ended it.
        status: i32,
        /// Standard output and error, as they came.
        output: String,
    },
    /// How far the counters are.
    Progress(Progress),
}

/// How far the counters are. The totals count from [`Command::StartCounters`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// The newest counter that each chain has on all its devices.
    pub counters: Vec<u64>,
    /// Records written.
    pub writes: u64,
    /// Records read back and compared.
    pub reads: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Longest request since the last [`Message::Progress`], in microseconds.
    pub slowest_us: u64,
    /// Longest request since the start, in microseconds.
    pub slowest_ever_us: u64,
    /// Failed requests and wrong data. A chain that meets one stops.
    pub errors: Vec<String>,
}

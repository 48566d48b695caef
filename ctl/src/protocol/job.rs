//! Jobs, in QEMU's shapes.

use serde::{Deserialize, Serialize};

use super::{Call, Empty};

/// The jobs under way and the most recent of those that have concluded; QEMU's `query-jobs`.
///
/// A concluded job stays in the list for a while, so that whoever waited for it can learn how it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryJobs {}

impl Call for QueryJobs {
    const NAME: &'static str = "query-jobs";
    type Answer = Vec<JobInfo>;
}

/// End a job at the next opportunity; QEMU's `job-cancel`. Answered when it is marked, not when it has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobCancel {
    /// The job.
    pub id: String,
}

impl Call for JobCancel {
    const NAME: &'static str = "job-cancel";
    type Answer = Empty;
}

/// QEMU's `JobInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its name, unique among those listed.
    pub id: String,
    /// What it does; see [`JobInfo::SNAPSHOT`].
    #[serde(rename = "type")]
    pub kind: String,
    /// How far it is.
    pub status: JobStatus,
    /// Work done, in no unit of its own.
    pub current_progress: u64,
    /// What `current_progress` will be at the end, as far as is known.
    pub total_progress: u64,
    /// Why it failed. None for a job that has not concluded, or concluded well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl JobInfo {
    /// The type of a job that takes a snapshot.
    pub const SNAPSHOT: &'static str = "snapshot";
}

/// QEMU's `JobStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// Never shown.
    Undefined,
    /// Not begun: it waits in line.
    Created,
    /// Under way.
    Running,
    /// Under way, and held.
    Paused,
    /// Waits to be told to complete.
    Ready,
    /// Ready, and held.
    Standby,
    /// Waits for the other jobs of its transaction.
    Waiting,
    /// Done but for its last step.
    Pending,
    /// Failed or cancelled, and cleaning up.
    Aborting,
    /// Over.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }
}

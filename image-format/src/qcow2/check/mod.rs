//! Checking an image: does everything that refers to a cluster agree with the cluster's refcount?
//!
//! Every reference in the file is counted anew (header, tables, data of the active disk and of all internal snapshots, compressed clusters,
//! persistent bitmaps) and compared with the refcounts that the file states. A refcount above the number of references is a leak: space that
//! nothing uses. One below is a corruption: the cluster could be given away while it is in use. The numbers are those of `qemu-img check`.
//! Beyond it, clusters with metadata that something else claims as well are found whatever their refcounts say.
//!
//! Each table is read once, however many snapshots share it, so time is bounded by the size of the file; memory is a few bytes for each
//! cluster in use, and bounded by [`CheckOptions::memory_limit`].

mod bitmaps;
mod census;
mod compare;
mod dirty;
mod repair;
mod report;
#[cfg(test)]
mod tests;
mod walk;

use std::io;

use crate::error::Structure;
use crate::storage::Storage;
use crate::units::HostOffset;

use super::header::{Header, HeaderError};
use super::snapshot::SnapshotError;

pub(super) use dirty::repair_dirty;
pub use report::{CheckReport, Fault, Finding};

use walk::Walk;

/// Findings that are described one by one unless set otherwise; more are only counted.
pub const DEFAULT_MAX_FINDINGS: usize = 1000;
/// Memory for a check unless set otherwise: enough for 10 TiB in clusters of 64 KiB.
pub const DEFAULT_MEMORY_LIMIT: u64 = 1 << 30;
/// Most clusters that a file can have, as in QEMU.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Refcounts above the number of references are lowered. Only if there is no corruption: what a damaged table refers to is not known.
    Leaks,
}

/// How to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// What may be changed.
    pub repair: Repair,
    /// How many findings to describe one by one.
    pub max_findings: usize,
    /// Most bytes of memory for counting.
    pub memory_limit: u64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { repair: Repair::None, max_findings: DEFAULT_MAX_FINDINGS, memory_limit: DEFAULT_MEMORY_LIMIT }
    }
}

/// Why an image could not be checked, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The header makes no sense, so nothing else can be found.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The snapshot table makes no sense, so it is not known what the snapshots refer to.
    #[error("the table of internal snapshots: {0}")]
    Snapshots(#[from] SnapshotError),
    /// The medium failed.
    #[error("cannot {action} the {what} at {at}: {source}")]
    Io {
        /// "read", "write" or "flush".
        action: &'static str,
        /// Of what.
        what: Structure,
        /// Where in the file.
        at: HostOffset,
        /// What the medium said.
        #[source]
        source: io::Error,
    },
    /// More clusters than can be counted.
    #[error("the file has {clusters} clusters, more than the limit of {MAX_CLUSTERS}")]
    TooManyClusters {
        /// Clusters of the file.
        clusters: u64,
    },
    /// The L1 tables of the snapshots take more room than the file has.
    #[error("the L1 tables of the internal snapshots overlap: together they have {bytes} bytes, more than the file with {file_bytes}")]
    SnapshotTablesOverlap {
        /// All of them together.
        bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// Counting takes more memory than it may.
    #[error("counting the references takes more than {limit} bytes of memory")]
    Memory {
        /// The limit.
        limit: u64,
    },
}

impl CheckError {
    fn io(action: &'static str, what: Structure, at: HostOffset, source: io::Error) -> Self {
        Self::Io { action, what, at, source }
    }
}

/// Checks the image in `file`, which nobody may write to meanwhile: the caller holds its image lock, as a writer's for repairs. External
/// data files and backing files are not looked at.
///
/// After a repair the report is that of a second check, with what the first one repaired.
///
/// # Errors
/// If the header or the snapshot table make no sense, the file cannot be read (for repairs: written), or memory does not suffice. What is
/// wrong with the image otherwise is in the report.
pub async fn check<S: Storage>(file: &S, options: &CheckOptions) -> Result<CheckReport, CheckError> {
    let mut header = Header::read(file).await?;
    let (report, walk) = check_once(file, &header, options).await?;
    let wanted = report.leaks > 0 || header.is_dirty();
    if options.repair == Repair::None || report.is_corrupt() || !wanted {
        return Ok(report);
    }
    let leaks_fixed = report.leaks;
    let mut unkept = header.clone();
    repair::clear_kept(file, &mut unkept).await?;
    repair::correct_refcounts(&walk, repair::Direction::Down, false).await?;
    drop(walk);
    header = unkept;
    let (mut report, _) = check_once(file, &header, options).await?;
    if report.is_clean() && header.is_dirty() {
        repair::clear_dirty(file, &mut header).await?;
        report.dirty = false;
    }
    Ok(CheckReport { leaks_fixed, ..report })
}

async fn check_once<'a, S: Storage>(
    file: &'a S,
    header: &'a Header,
    options: &CheckOptions,
) -> Result<(CheckReport, Walk<'a, S>), CheckError> {
    let mut walk = Walk::new(file, header, options).await?;
    walk.count_all().await?;
    walk.compare().await?;
    Ok((walk.take_report(), walk))
}

//! What a check comes to.

use std::fmt;

use crate::error::Structure;
use crate::units::HostOffset;

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Clusters whose refcount is above the number of references: lost space, and no danger.
    pub leaks: u64,
    /// Everything else that is wrong, as `qemu-img check` counts it.
    pub corruptions: u64,
    /// Corruptions that `qemu-img check` does not look for: clusters with metadata that something else claims as well whatever the refcounts
    /// say, and entries with flags that contradict one another.
    pub contradictions: u64,
    /// Leaks that were there before the repair and are not any more.
    pub leaks_fixed: u64,
    /// What was found, one by one, up to the limit asked for.
    pub findings: Vec<Finding>,
    /// How many more findings there were.
    pub findings_omitted: u64,
    /// First byte after the last cluster in use.
    pub image_end: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of those, the ones with a place in the file.
    pub allocated_clusters: u64,
    /// Of those, the ones that do not lie right after the one before.
    pub fragmented_clusters: u64,
    /// Of the allocated ones, those that are compressed.
    pub compressed_clusters: u64,
    /// The image says that its refcounts may be out of date.
    pub dirty: bool,
    /// A program has marked the image as corrupt before.
    pub marked_corrupt: bool,
}

impl CheckReport {
    /// Whether nothing at all was found.
    pub fn is_clean(&self) -> bool {
        !self.is_corrupt() && self.leaks == 0
    }

    /// Whether anything worse than leaks was found.
    pub fn is_corrupt(&self) -> bool {
        self.corruptions > 0 || self.contradictions > 0
    }
}

/// One thing that is wrong, `times` times: tables that are shared are looked at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub fault: Fault,
    /// How often.
    pub times: u64,
}

/// What can be wrong with an image. Positions are those in the image file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the messages say what each variant and its numbers mean")]
pub enum Fault {
    Leak { at: HostOffset, refcount: u64, references: u64 },
    RefcountLow { at: HostOffset, refcount: u64, references: u64 },
    Overflow { at: HostOffset, limit: u64 },
    Outside { what: Structure, at: HostOffset, len: u64 },
    NotCopied { at: HostOffset },
    WronglyCopied { at: HostOffset, refcount: u64 },
    Overlap { at: HostOffset, owners: Vec<Structure> },
    Entry { what: Structure, at: HostOffset, word: u64, detail: &'static str },
    Flags { what: Structure, at: HostOffset, word: u64, detail: &'static str },
    BlockShared { at: HostOffset, references: u64 },
    SnapshotsWithDataFile { count: u32 },
    SnapshotTable { index: u32, at: HostOffset, detail: &'static str },
    Bitmaps { at: HostOffset, detail: &'static str },
}

impl Fault {
    /// Whether it costs space only.
    pub fn is_leak(&self) -> bool {
        matches!(self, Self::Leak { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)?;
        if self.times > 1 { write!(f, " ({} times)", self.times) } else { Ok(()) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leak { at, refcount, references } => {
                write!(f, "the cluster at {at} is leaked: its refcount is {refcount}, but there are {references} references")
            }
            Self::RefcountLow { at, refcount, references } => {
                write!(f, "the cluster at {at} has the refcount {refcount}, but there are {references} references")
            }
            Self::Overflow { at, limit } => write!(f, "the cluster at {at} has more references than the refcount width holds ({limit})"),
            Self::Outside { what, at, len } => write!(f, "the {what} at {at} with {len} bytes reaches past the end of the file"),
            Self::NotCopied { at } => write!(f, "the cluster at {at} has the refcount 1, but its entry does not say so"),
            Self::WronglyCopied { at, refcount } => {
                write!(f, "the cluster at {at} has the refcount {refcount}, but its entry says it is 1")
            }
            Self::Overlap { at, owners } => {
                write!(f, "the cluster at {at} is claimed by ")?;
                for (index, owner) in owners.iter().enumerate() {
                    write!(f, "{}{owner}", if index == 0 { "" } else { " and " })?;
                }
                Ok(())
            }
            Self::Entry { what, at, word, detail } | Self::Flags { what, at, word, detail } => {
                write!(f, "entry {word:#x} of the {what} at {at}: {detail}")
            }
            Self::BlockShared { at, references } => write!(f, "the refcount block at {at} has {references} references instead of 1"),
            Self::SnapshotsWithDataFile { count } => write!(f, "there are {count} internal snapshots beside an external data file"),
            Self::SnapshotTable { index, at, detail } => write!(f, "internal snapshot {index} with its L1 table at {at}: {detail}"),
            Self::Bitmaps { at, detail } => write!(f, "persistent bitmaps at {at}: {detail}"),
        }
    }
}

/// Collects findings into a report.
#[derive(Debug)]
pub(super) struct Reporter {
    pub(super) report: CheckReport,
    max_findings: usize,
}

impl Reporter {
    pub(super) fn new(report: CheckReport, max_findings: usize) -> Self {
        Self { report, max_findings }
    }

    /// Counts and keeps something that is wrong `times` times.
    pub(super) fn found(&mut self, fault: Fault, times: u64) {
        let counter = match fault {
            Fault::Leak { .. } => &mut self.report.leaks,
            Fault::Overlap { .. } | Fault::Flags { .. } => &mut self.report.contradictions,
            _ => &mut self.report.corruptions,
        };
        *counter = counter.saturating_add(times);
        if self.report.findings.len() < self.max_findings {
            self.report.findings.push(Finding { fault, times });
        } else {
            self.report.findings_omitted += 1;
        }
    }
}

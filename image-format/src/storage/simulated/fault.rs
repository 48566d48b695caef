//! Failures that a test asks for, and the record of what happened.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// What an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OperationKind {
    /// Opening an existing file.
    Open,
    /// Creating a file.
    Create,
    /// A read.
    Read,
    /// A write.
    Write,
    /// Making a file durable.
    Flush,
    /// Getting space.
    Allocate,
    /// Making a hole.
    Punch,
    /// Setting a length.
    SetLen,
    /// Renaming.
    Rename,
    /// Removing a name.
    Remove,
    /// Making names durable.
    FlushDirectory,
}

impl OperationKind {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Open,
        Self::Create,
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Allocate,
        Self::Punch,
        Self::SetLen,
        Self::Rename,
        Self::Remove,
        Self::FlushDirectory,
    ];

    /// Whether it changes what is on the medium or how durable that is.
    pub fn changes(self) -> bool {
        !matches!(self, Self::Open | Self::Read)
    }
}

/// Which operations fail, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Operations of this kind only; `None`: of any kind.
    pub kind: Option<OperationKind>,
    /// Operations on this file or directory only (the path under which a file was opened); `None`: on any.
    pub path: Option<PathBuf>,
    /// Operations on this directory and all beneath it only; `None`: anywhere.
    pub directory: Option<PathBuf>,
    /// How many such operations pass unharmed first.
    pub after: u64,
    /// Whether all later ones fail too, or only one.
    pub lasting: bool,
    /// What happens to them.
    pub effect: FaultEffect,
}

/// What happens to an operation that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEffect {
    /// It ends with this `errno`. A write may have written any part; a flush has left the cache in an unknown state.
    Error(i32),
    /// It does not end before [`release_hung`](super::SimulatedEnvironment::release_hung).
    Hang,
    /// A transfer stops in the middle and is resumed: its sectors are transferred in two parts with time between them. Nothing else is changed by it.
    Short,
}

impl Fault {
    /// The operation of this kind after `after` others ends with an I/O error, once.
    pub fn once(kind: OperationKind, after: u64) -> Self {
        Self { kind: Some(kind), path: None, directory: None, after, lasting: false, effect: FaultEffect::Error(libc::EIO) }
    }

    /// As [`once`](Self::once), and all later ones of the kind too.
    pub fn lasting(kind: OperationKind, after: u64) -> Self {
        Self { lasting: true, ..Self::once(kind, after) }
    }

    /// Narrows it to one file or directory.
    #[must_use]
    pub fn on(self, path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..self }
    }

    /// Narrows it to a directory and all beneath it.
    #[must_use]
    pub fn beneath(self, directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), ..self }
    }

    /// Another effect.
    #[must_use]
    pub fn with(self, effect: FaultEffect) -> Self {
        Self { effect, ..self }
    }
}

/// Faults that wait for their operation.
#[derive(Debug, Default)]
pub(super) struct Faults {
    waiting: Vec<Fault>,
    struck: u64,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.waiting.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// What happens to an operation that begins now. Every fault that it matches counts it.
    pub(super) fn meet(&mut self, kind: OperationKind, path: &Path) -> Option<FaultEffect> {
        let mut effect = None;
        self.waiting.retain_mut(|fault| {
            let is_there =
                fault.path.as_deref().is_none_or(|of| of == path) && fault.directory.as_deref().is_none_or(|of| path.starts_with(of));
            let matches = fault.kind.is_none_or(|of| of == kind) && is_there;
            if !matches {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            effect = effect.or(Some(fault.effect));
            fault.lasting
        });
        self.struck += u64::from(effect.is_some());
        effect
    }

    /// How many operations have met a fault.
    pub(super) fn struck(&self) -> u64 {
        self.struck
    }
}

/// One operation that has taken effect, for tests that look at the order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Virtual time of its effect.
    pub time: Duration,
    /// What it was.
    pub kind: OperationKind,
    /// The path under which the file was opened, or the directory.
    pub path: PathBuf,
    /// First byte, or the length to be set.
    pub at: u64,
    /// Number of bytes.
    pub len: u64,
    /// Whether it failed.
    pub failed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_the_operation_that_it_names() {
        let mut faults = Faults::default();
        faults.add(Fault::once(OperationKind::Write, 1).on("/a"));
        let mut meet = |kind, path: &str| faults.meet(kind, Path::new(path)).is_some();
        assert!(!meet(OperationKind::Write, "/a"));
        assert!(!meet(OperationKind::Write, "/b"));
        assert!(!meet(OperationKind::Read, "/a"));
        assert!(meet(OperationKind::Write, "/a"));
        assert!(!meet(OperationKind::Write, "/a"));
        faults.add(Fault::once(OperationKind::Read, 0).beneath("/d"));
        assert!(faults.meet(OperationKind::Read, Path::new("/dd")).is_none());
        assert!(faults.meet(OperationKind::Read, Path::new("/d/e")).is_some());
        faults.add(Fault::lasting(OperationKind::Flush, 0));
        assert!(faults.meet(OperationKind::Flush, Path::new("/b")).is_some());
        assert!(faults.meet(OperationKind::Flush, Path::new("/b")).is_some());
        assert_eq!(faults.struck(), 4);
    }
}

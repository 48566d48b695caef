//! Locks between handles of one file, for environments that have no system to keep them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use super::Sharing;

/// Which handle of a file holds what.
#[derive(Debug, Default)]
pub(super) struct SharingTable {
    held: Mutex<BTreeMap<u64, Sharing>>,
}

impl SharingTable {
    /// Changes what `handle` holds: a writer excludes every other reader and writer.
    pub(super) fn set(&self, handle: u64, sharing: Sharing) -> io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let excluded = |other: &Sharing| match sharing {
            Sharing::None => false,
            Sharing::Reader => *other == Sharing::Writer,
            Sharing::Writer => true,
        };
        if held.iter().any(|(other, theirs)| *other != handle && excluded(theirs)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match sharing {
            Sharing::None => held.remove(&handle),
            Sharing::Reader | Sharing::Writer => held.insert(handle, sharing),
        };
        Ok(())
    }

    /// Gives up what a handle holds that is closed.
    pub(super) fn close(&self, handle: u64) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_alone() {
        let table = SharingTable::default();
        table.set(1, Sharing::Reader).unwrap();
        table.set(2, Sharing::Reader).unwrap();
        assert_eq!(table.set(1, Sharing::Writer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        table.close(2);
        table.set(1, Sharing::Writer).unwrap();
        assert!(table.set(2, Sharing::Reader).is_err());
        table.set(2, Sharing::None).unwrap();
        table.set(1, Sharing::Reader).unwrap();
        table.set(2, Sharing::Reader).unwrap();
    }
}

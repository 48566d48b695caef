//! The model against one simulated file: proves the oracle and the simulation against one another, and that the oracle finds what is wrong.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::Buffer;
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Disk, FileDisk, FileSubject, Subject};
use crate::for_seeds;
use crate::workload::{Plan, run, run_with};

#[test]
fn a_file_keeps_what_was_flushed() {
    for_seeds("file", 500, |seed| run(FileSubject, Plan::new(seed)));
}

#[test]
fn a_file_whose_operations_fail_keeps_what_was_flushed() {
    for_seeds("file with faults", 500, |seed| {
        let kind = [OperationKind::Write, OperationKind::Flush, OperationKind::Punch, OperationKind::Read][seed as usize % 4];
        run_with(FileSubject, Plan::new(seed), |environment| {
            environment.inject(if seed & 4 == 0 { Fault::once(kind, seed / 4) } else { Fault::lasting(kind, seed / 4) });
            true
        })
    });
}

/// What a disk may do wrong without anybody seeing it while the power is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    FlushDoesNothing,
    FlushFailureHidden,
    LongDiscard,
}

#[derive(Debug)]
struct DefectiveSubject(Defect);

#[derive(Debug)]
struct DefectiveDisk(FileDisk, Defect);

impl Subject for DefectiveSubject {
    type Disk = DefectiveDisk;

    fn create(&self, environment: &SimulatedEnvironment, sectors: u64) {
        FileSubject.create(environment, sectors);
    }

    async fn open(self: Rc<Self>, environment: SimulatedEnvironment) -> Result<DefectiveDisk, String> {
        let disk = Rc::new(FileSubject).open(environment).await?;
        Ok(DefectiveDisk(disk, self.0))
    }

    async fn close(self: Rc<Self>, disk: Arc<DefectiveDisk>) -> Result<(), String> {
        // Only the oracle may notice.
        let _ = disk.0.flush().await;
        Ok(())
    }
}

impl Disk for DefectiveDisk {
    type Error = io::Error;

    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn read(&self, at: GuestOffset, into: Buffer) -> (io::Result<()>, Buffer) {
        self.0.read(at, into).await
    }

    async fn write(&self, at: GuestOffset, from: Buffer) -> (io::Result<()>, Buffer) {
        self.0.write(at, from).await
    }

    async fn write_zeroes(&self, range: GuestRange, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(range, unmap).await
    }

    async fn discard(&self, range: GuestRange) -> io::Result<()> {
        let len = if self.1 == Defect::LongDiscard { range.len + 512 } else { range.len };
        self.0.discard(GuestRange::new(range.start, len)).await
    }

    async fn flush(&self) -> io::Result<()> {
        match self.1 {
            Defect::FlushDoesNothing => Ok(()),
            Defect::FlushFailureHidden => self.0.flush().await.or(Ok(())),
            Defect::LongDiscard => self.0.flush().await,
        }
    }
}

/// Whether the oracle finds the defect within a few seeds.
fn is_found(defect: Defect, prepare: impl Fn(&SimulatedEnvironment) -> bool + std::panic::RefUnwindSafe) -> bool {
    (0..100).any(|seed| {
        let found = std::panic::catch_unwind(|| run_with(DefectiveSubject(defect), Plan::new(seed), &prepare));
        found.is_err()
    })
}

#[test]
fn the_oracle_finds_a_flush_that_does_nothing() {
    assert!(is_found(Defect::FlushDoesNothing, |_| false));
}

#[test]
fn the_oracle_finds_a_flush_that_hides_its_failure() {
    assert!(is_found(Defect::FlushFailureHidden, |environment| {
        environment.inject(Fault::once(OperationKind::Flush, 3));
        false
    }));
}

#[test]
fn the_oracle_finds_a_discard_that_goes_too_far() {
    assert!(is_found(Defect::LongDiscard, |_| false));
}

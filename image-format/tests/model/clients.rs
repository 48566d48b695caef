//! Clients that do at random what guests do, and tell the oracle.

use std::cell::RefCell;
use std::fmt::Display;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::buffer::{AlignedBuffer, Buffer, SharedVectors};
use snapfence_image_format::storage::Chance;
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::Disk;
use crate::history::History;
use crate::journal::Journal;
use crate::pattern::{self, SECTOR, Value};
use crate::workload::Report;

/// What the clients of one disk share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) history: RefCell<History>,
    pub(crate) report: Rc<RefCell<Report>>,
    pub(crate) journal: Rc<Journal>,
    /// Which disk of its group.
    pub(crate) disk: usize,
    /// Whether operations may fail, because faults have been asked for.
    pub(crate) faults: bool,
    pub(crate) seed: u64,
}

impl Shared {
    /// For a disk that is alone.
    pub(crate) fn new(seed: u64, history: History, faults: bool) -> Rc<Self> {
        let journal = Journal::new(history.clock().clone());
        Rc::new(Self { history: RefCell::new(history), report: Rc::default(), journal, disk: 0, faults, seed })
    }

    /// Ends the test with what is wrong.
    pub(crate) fn fail(&self, what: impl Display) -> ! {
        self.journal.fail(self.seed, format_args!("disk {}: {what}", self.disk))
    }

    fn began(&self, action: &str, sectors: &Range<u64>, value: Option<Value>, began: u64) {
        self.journal.note(format_args!("disk {}: {began} {action} {sectors:?} {value:?}", self.disk));
    }

    /// An operation has ended. Says whether it succeeded.
    fn ended(&self, action: &str, began: u64, generation: u64, result: Result<(), impl Display>) -> bool {
        let end = result.as_ref().map_or_else(ToString::to_string, |()| "ended".to_owned());
        self.journal.note(format_args!("disk {}: {began} {action} of generation {generation}: {end}", self.disk));
        self.journal.ended(self.disk, generation, began);
        match result {
            Ok(()) => {
                self.report.borrow_mut().operations += 1;
                true
            }
            Err(_) if self.faults => {
                self.report.borrow_mut().failures += 1;
                false
            }
            Err(error) => self.fail(format_args!("a {action} failed: {error}")),
        }
    }
}

/// One client: does one thing after another on any of the disks, anywhere from sector `first` on.
pub(crate) async fn client<D: Disk>(disks: Vec<(Arc<D>, Rc<Shared>)>, mut chance: Chance, operations: u64, first: u64) {
    for _ in 0..operations {
        let (disk, shared) = &disks[chance.index(disks.len())];
        let room = shared.history.borrow().sectors() - first;
        let range = some_sectors(&mut chance, room);
        let range = range.start + first..range.end + first;
        match chance.below(100) {
            0..40 => write(&**disk, shared, &mut chance, range).await,
            40..70 => read(&**disk, shared, &mut chance, range).await,
            70..78 => zero(&**disk, shared, range, chance.happens(1, 2)).await,
            78..86 => discard(&**disk, shared, range).await,
            _ => drop(flush(&**disk, shared).await),
        }
    }
}

/// A range, mostly small, often aligned to what images like.
fn some_sectors(chance: &mut Chance, sectors: u64) -> Range<u64> {
    let (unit, most) = match chance.below(8) {
        0..3 => (1, 16),
        3..6 => (8, 8),
        6 => (1, 300),
        _ => (128, 2),
    };
    let units = sectors / unit;
    let len = (1 + chance.below(most)).min(units);
    // Half of everything happens in one corner, so that clients meet.
    let room = if chance.happens(1, 2) { (units - len + 1).min(64 / unit + 1) } else { units - len + 1 };
    let start = chance.below(room) * unit;
    // Some ranges reach the end of the disk, which need not be that of a unit.
    if chance.happens(1, 16) { sectors - len * unit..sectors } else { start..start + len * unit }
}

fn guest_range(sectors: &Range<u64>) -> GuestRange {
    GuestRange::new(GuestOffset::new(sectors.start * SECTOR as u64), (sectors.end - sectors.start) * SECTOR as u64)
}

/// A buffer of our own, or several vectors like a guest's.
fn buffer_of(bytes: &[u8], chance: &mut Chance) -> Buffer {
    if chance.happens(1, 2) {
        return Buffer::Owned(AlignedBuffer::copy_of(bytes));
    }
    let mut parts = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let len = (1 + chance.index(rest.len() / SECTOR)) * SECTOR;
        parts.push(AlignedBuffer::copy_of(&rest[..len]).into_shared());
        rest = &rest[len..];
    }
    Buffer::Shared(SharedVectors::join(parts))
}

async fn write(disk: &impl Disk, shared: &Shared, chance: &mut Chance, sectors: Range<u64>) {
    let value = shared.history.borrow_mut().new_value();
    write_value(disk, shared, chance, sectors, value).await;
}

/// Writes a value that nobody else writes. Says whether that succeeded.
pub(crate) async fn write_value(disk: &impl Disk, shared: &Shared, chance: &mut Chance, sectors: Range<u64>, value: Value) -> bool {
    let range = guest_range(&sectors);
    let mut bytes = vec![0; range.len as usize];
    for (sector, bytes) in sectors.clone().zip(bytes.chunks_exact_mut(SECTOR)) {
        pattern::fill(value, sector, bytes);
    }
    let buffer = buffer_of(&bytes, chance);
    let writing = shared.history.borrow_mut().begin_write(sectors.clone(), value);
    let began = writing.began;
    shared.began("write", &sectors, Some(value), began);
    let generation = disk.admitted().await;
    shared.history.borrow_mut().admit_write(value, generation);
    let (result, _) = disk.write(range.start, buffer).await;
    let succeeded = shared.ended("write", began, generation, result);
    shared.history.borrow_mut().end_write(writing, succeeded, generation);
    succeeded
}

async fn read(disk: &impl Disk, shared: &Shared, chance: &mut Chance, sectors: Range<u64>) {
    let range = guest_range(&sectors);
    let mut bytes = vec![0xee; range.len as usize];
    let buffer = buffer_of(&bytes, chance);
    let reading = shared.history.borrow_mut().begin_read(sectors.clone());
    let began = reading.number;
    shared.began("read", &sectors, None, began);
    let generation = disk.admitted().await;
    let (result, buffer) = disk.read(range.start, buffer).await;
    if shared.ended("read", began, generation, result) {
        buffer.copy_out(0, &mut bytes);
        let end = shared.history.borrow_mut().end_read(reading, &bytes, generation);
        end.unwrap_or_else(|error| shared.fail(format_args!("read {began}: {error}")));
    } else {
        shared.history.borrow_mut().give_up_read(reading);
    }
}

async fn zero(disk: &impl Disk, shared: &Shared, sectors: Range<u64>, unmap: bool) {
    let action = if unmap { "zeroing with unmap" } else { "zeroing" };
    let writing = shared.history.borrow_mut().begin_write(sectors.clone(), Value::ZERO);
    let began = writing.began;
    shared.began(action, &sectors, None, began);
    let generation = disk.admitted().await;
    let result = disk.write_zeroes(guest_range(&sectors), unmap).await;
    let succeeded = shared.ended(action, began, generation, result);
    shared.history.borrow_mut().end_write(writing, succeeded, generation);
}

async fn discard(disk: &impl Disk, shared: &Shared, sectors: Range<u64>) {
    let writing = shared.history.borrow_mut().begin_discard(sectors.clone());
    let began = writing.began;
    shared.began("discard", &sectors, None, began);
    let generation = disk.admitted().await;
    let result = disk.discard(guest_range(&sectors)).await;
    let succeeded = shared.ended("discard", began, generation, result);
    shared.history.borrow_mut().end_write(writing, succeeded, generation);
}

/// Flushes. Says whether that succeeded.
pub(crate) async fn flush(disk: &impl Disk, shared: &Shared) -> bool {
    let flushing = shared.history.borrow_mut().begin_flush();
    let began = flushing.began;
    shared.began("flush", &(0..0), None, began);
    let generation = disk.admitted().await;
    let result = disk.flush().await;
    let succeeded = shared.ended("flush", began, generation, result);
    shared.history.borrow_mut().end_flush(flushing, succeeded);
    succeeded
}

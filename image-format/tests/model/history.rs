//! The oracle: which contents each sector of a disk may have, given everything that was asked of the disk and answered so far.
//!
//! A sector is a register that is written atomically. What a read may give: the value of any write that it overlaps in time, or of any earlier
//! write that no write between them (begun after that one had ended, ended before the read began) has replaced. What a crash may leave: the same,
//! except that only writes replace others that a flush has covered, one that began after they had ended and that succeeded.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use crate::pattern::{self, SECTOR, Value};

/// The first value of [`History::new_value`]; those below are for tests that give values themselves.
pub(crate) const FIRST_VALUE: u64 = 1 << 32;

/// One thing that may have given a sector its value.
#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    began: u64,
    ended: Option<u64>,
    /// Whether it surely took place, so that what came before is gone. Not so for failed writes and for discards.
    replaces: bool,
    durable: bool,
}

impl Entry {
    fn is_replaced_by(&self, other: &Entry) -> bool {
        other.replaces && other.ended.is_some() && self.ended.is_some_and(|ended| ended < other.began)
    }
}

/// A write, zeroing or discard under way.
#[derive(Clone, Debug)]
#[must_use]
pub(crate) struct Writing {
    sectors: Range<u64>,
    pub(crate) began: u64,
    replaces: bool,
}

/// A read under way: what it may give.
#[derive(Debug)]
#[must_use]
pub(crate) struct Reading {
    /// When it began.
    pub(crate) number: u64,
}

#[derive(Debug)]
struct ReadInProgress {
    number: u64,
    began: u64,
    first: u64,
    allowed: Vec<BTreeSet<Value>>,
}

/// A flush under way.
#[derive(Debug)]
#[must_use]
pub(crate) struct Flushing {
    pub(crate) began: u64,
}

/// All registers of a disk at one time.
#[derive(Clone, Debug)]
struct Registers {
    sectors: Vec<Vec<Entry>>,
    /// Sectors with more than one entry: only these need to be looked at.
    unsettled: BTreeSet<u64>,
}

/// The disk as it was cut off from later writes.
#[derive(Debug)]
struct Cut {
    /// Operations of this generation or a later one are not in it.
    generation: u64,
    registers: Registers,
    /// Whether operations that belong to it may still be under way.
    open: bool,
}

/// The order of all beginnings and ends, over all disks of a test.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock(Rc<Cell<u64>>);

impl Clock {
    /// The next point in time.
    pub(crate) fn tick(&self) -> u64 {
        self.0.set(self.0.get() + 1);
        self.0.get()
    }

    /// The latest point in time.
    pub(crate) fn now(&self) -> u64 {
        self.0.get()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct History {
    registers: Registers,
    clock: Clock,
    next_value: u64,
    /// Of every write of a disk that has been cut: how many cuts it is after.
    generations: BTreeMap<Value, u64>,
    reads: Vec<ReadInProgress>,
    cuts: Vec<Cut>,
}

impl History {
    /// A disk whose sectors have these values, durably.
    pub(crate) fn new(clock: Clock, values: impl IntoIterator<Item = Value>) -> Self {
        let settled = |value| vec![Entry { value, began: 0, ended: Some(0), replaces: true, durable: true }];
        let sectors = values.into_iter().map(settled).collect();
        let registers = Registers { sectors, unsettled: BTreeSet::new() };
        Self { registers, clock, next_value: FIRST_VALUE, generations: BTreeMap::new(), reads: Vec::new(), cuts: Vec::new() }
    }

    /// Number of sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.registers.sectors.len() as u64
    }

    /// A value that nobody has written yet.
    pub(crate) fn new_value(&mut self) -> Value {
        self.next_value += 1;
        Value(self.next_value)
    }

    /// A write (or, with [`Value::ZERO`], a zeroing) begins.
    pub(crate) fn begin_write(&mut self, sectors: Range<u64>, value: Value) -> Writing {
        self.begin(sectors, value, true)
    }

    /// A write of `value` has been taken by the disk as one of `generation`, the number of cuts that it is after.
    pub(crate) fn admit_write(&mut self, value: Value, generation: u64) {
        if generation > 0 && value != Value::ZERO {
            self.generations.insert(value, generation);
        }
    }

    /// A discard begins: afterwards the sectors are zero or as before.
    pub(crate) fn begin_discard(&mut self, sectors: Range<u64>) -> Writing {
        self.begin(sectors, Value::ZERO, false)
    }

    fn begin(&mut self, sectors: Range<u64>, value: Value, replaces: bool) -> Writing {
        let began = self.clock.tick();
        for sector in sectors.clone() {
            let entry = Entry { value, began, ended: None, replaces: false, durable: false };
            for cut in self.cuts.iter_mut().filter(|cut| cut.open) {
                cut.registers.begin(sector, entry.clone());
            }
            self.registers.begin(sector, entry);
            for read in &mut self.reads {
                if let Some(index) = sector.checked_sub(read.first)
                    && let Some(allowed) = read.allowed.get_mut(index as usize)
                {
                    allowed.insert(value);
                }
            }
        }
        Writing { sectors, began, replaces }
    }

    /// A write, zeroing or discard of a generation (the number of cuts that it is after) has ended.
    pub(crate) fn end_write(&mut self, writing: Writing, succeeded: bool, generation: u64) {
        let ended = self.clock.tick();
        let replaces = writing.replaces && succeeded;
        self.registers.end(&writing, ended, replaces);
        for cut in self.cuts.iter_mut().filter(|cut| cut.open) {
            if generation < cut.generation {
                cut.registers.end(&writing, ended, replaces);
            } else {
                cut.registers.forget(&writing);
            }
        }
    }

    /// A read begins.
    pub(crate) fn begin_read(&mut self, sectors: Range<u64>) -> Reading {
        let number = self.clock.tick();
        let allowed = sectors.clone().map(|sector| self.registers.visible(sector)).collect();
        self.reads.push(ReadInProgress { number, began: number, first: sectors.start, allowed });
        Reading { number }
    }

    /// A read has failed: what it gives does not matter.
    pub(crate) fn give_up_read(&mut self, reading: Reading) {
        self.reads.retain(|read| read.number != reading.number);
    }

    /// A read of a generation has given `bytes`. What is written after a cut must not be seen by reads from before it: the guest could act on
    /// it before the cut.
    ///
    /// # Errors
    /// If it may not: says which sector.
    pub(crate) fn end_read(&mut self, reading: Reading, bytes: &[u8], generation: u64) -> Result<(), String> {
        let index = self.reads.iter().position(|read| read.number == reading.number).expect("reads end once");
        let read = self.reads.swap_remove(index);
        let now = self.clock.tick();
        for (index, (allowed, bytes)) in read.allowed.iter().zip(bytes.chunks_exact(SECTOR)).enumerate() {
            let sector = read.first + index as u64;
            let value = pattern::identify(sector, bytes).filter(|value| allowed.contains(value));
            let Some(value) = value else {
                return Err(format!("sector {sector} reads as {}, allowed: {allowed:?}", pattern::describe(sector, bytes)));
            };
            let written = self.generations.get(&value).copied().unwrap_or(0);
            if written > generation {
                return Err(format!("sector {sector} reads as {value:?} of generation {written}, the read is of generation {generation}"));
            }
            self.registers.observe(sector, value, read.began, now);
        }
        Ok(())
    }

    /// A flush begins.
    pub(crate) fn begin_flush(&mut self) -> Flushing {
        Flushing { began: self.clock.tick() }
    }

    /// A flush has ended.
    pub(crate) fn end_flush(&mut self, flushing: Flushing, succeeded: bool) {
        if succeeded {
            self.registers.make_durable(flushing.began);
        }
    }

    /// The disk is about to be cut: what is of `generation` or later is not in the snapshot. Returns its number.
    pub(crate) fn cut(&mut self, generation: u64) -> usize {
        self.cuts.push(Cut { generation, registers: self.registers.clone(), open: true });
        self.cuts.len() - 1
    }

    /// Whether a snapshot, when everything that belongs to it has ended, has this content as it may. From the first time on it must not change.
    ///
    /// # Errors
    /// If not: says which sector.
    pub(crate) fn check_cut(&mut self, number: usize, content: &[u8]) -> Result<(), String> {
        let now = self.clock.tick();
        let cut = &mut self.cuts[number];
        if std::mem::take(&mut cut.open) {
            cut.registers.forget_under_way();
        }
        for (sector, bytes) in (0..).zip(content.chunks_exact(SECTOR)) {
            let allowed = cut.registers.visible(sector);
            let Some(value) = pattern::identify(sector, bytes).filter(|value| allowed.contains(value)) else {
                let found = pattern::describe(sector, bytes);
                let entries = &cut.registers.sectors[sector as usize];
                return Err(format!("sector {sector} of snapshot {number} is {found}, its history: {entries:?}"));
            };
            cut.registers.observe(sector, value, now, now);
        }
        Ok(())
    }

    /// Whether a crash now may leave this content. `found` gets the values.
    ///
    /// # Errors
    /// If not: says which sector.
    pub(crate) fn check_crash(&self, content: &[u8]) -> Result<Vec<Value>, String> {
        let mut found = Vec::new();
        for (sector, bytes) in (0..).zip(content.chunks_exact(SECTOR)) {
            let entries = &self.registers.sectors[sector as usize];
            let value = pattern::identify(sector, bytes).filter(|value| entries.iter().any(|entry| entry.value == *value));
            found.push(value.ok_or_else(|| {
                format!("after the crash sector {sector} is {}, its history: {entries:?}", pattern::describe(sector, bytes))
            })?);
        }
        Ok(found)
    }

    /// The disk goes on with these values after a crash. Values are not used again.
    pub(crate) fn recovered(&self, clock: Clock, values: Vec<Value>) -> Self {
        Self { next_value: self.next_value, ..Self::new(clock, values) }
    }

    /// The order of all that begins and ends.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }
}

impl Registers {
    fn begin(&mut self, sector: u64, entry: Entry) {
        self.sectors[sector as usize].push(entry);
        self.unsettled.insert(sector);
    }

    /// A write turns out not to belong here.
    fn forget(&mut self, writing: &Writing) {
        for sector in writing.sectors.clone() {
            self.sectors[sector as usize].retain(|entry| entry.began != writing.began);
        }
    }

    fn forget_under_way(&mut self) {
        for entries in &mut self.sectors {
            entries.retain(|entry| entry.ended.is_some());
        }
    }

    fn end(&mut self, writing: &Writing, ended: u64, replaces: bool) {
        for sector in writing.sectors.clone() {
            for entry in &mut self.sectors[sector as usize] {
                if entry.began == writing.began {
                    entry.ended = Some(ended);
                    entry.replaces = replaces;
                }
            }
        }
    }

    /// What a read that begins now may give, as far as is known yet.
    fn visible(&self, sector: u64) -> BTreeSet<Value> {
        let entries = &self.sectors[sector as usize];
        let current = |entry: &&Entry| !entries.iter().any(|other| entry.is_replaced_by(other));
        entries.iter().filter(current).map(|entry| entry.value).collect()
    }

    /// A read has given `value`. If nothing was being written meanwhile, the sector keeps it: as if it had been written then.
    fn observe(&mut self, sector: u64, value: Value, began: u64, now: u64) {
        let entries = &mut self.sectors[sector as usize];
        let at_rest = entries.iter().all(|entry| entry.ended.is_some_and(|ended| ended < began));
        if at_rest && self.unsettled.contains(&sector) {
            let current = entries.iter().filter(|entry| !entries.iter().any(|other| entry.is_replaced_by(other))).count();
            if current > 1 {
                entries.push(Entry { value, began, ended: Some(now), replaces: true, durable: false });
            }
        }
    }

    /// A flush that began then has succeeded.
    fn make_durable(&mut self, began: u64) {
        self.unsettled.retain(|sector| {
            let entries = &mut self.sectors[*sector as usize];
            for entry in entries.iter_mut() {
                entry.durable |= entry.ended.is_some_and(|ended| ended < began);
            }
            let durable: Vec<Entry> = entries.iter().filter(|entry| entry.durable).cloned().collect();
            entries.retain(|entry| !durable.iter().any(|other| entry.is_replaced_by(other)));
            entries.len() > 1
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(values: &[Value]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * SECTOR];
        for (sector, bytes) in (0..).zip(bytes.chunks_exact_mut(SECTOR)) {
            pattern::fill(values[sector as usize], sector, bytes);
        }
        bytes
    }

    fn read(history: &mut History, value: Value) -> bool {
        let reading = history.begin_read(0..1);
        history.end_read(reading, &content(&[value]), 0).is_ok()
    }

    #[test]
    fn a_read_gives_the_last_write_or_one_under_way() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let (one, two) = (history.new_value(), history.new_value());
        let first = history.begin_write(0..1, one);
        assert!(read(&mut history, one) && read(&mut history, Value::ZERO));
        history.end_write(first, true, 0);
        assert!(read(&mut history, one) && !read(&mut history, Value::ZERO));
        let reading = history.begin_read(0..1);
        let second = history.begin_write(0..1, two);
        history.end_write(second, true, 0);
        assert!(history.end_read(reading, &content(&[two]), 0).is_ok());
        assert!(!read(&mut history, one));
    }

    #[test]
    fn writes_at_the_same_time_settle_when_they_are_seen() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let (one, two) = (history.new_value(), history.new_value());
        let (first, second) = (history.begin_write(0..1, one), history.begin_write(0..1, two));
        history.end_write(first, true, 0);
        history.end_write(second, true, 0);
        assert!(!read(&mut history, Value::ZERO));
        assert!(read(&mut history, one));
        assert!(!read(&mut history, two));
        assert!(history.check_crash(&content(&[two])).is_ok());
        let flushing = history.begin_flush();
        history.end_flush(flushing, true);
        assert!(history.check_crash(&content(&[two])).is_err());
    }

    #[test]
    fn a_crash_takes_back_what_no_flush_has_covered() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let (one, two) = (history.new_value(), history.new_value());
        let first = history.begin_write(0..1, one);
        let early = history.begin_flush();
        history.end_write(first, true, 0);
        history.end_flush(early, true);
        assert!(history.check_crash(&content(&[Value::ZERO])).is_ok());
        let flushing = history.begin_flush();
        let second = history.begin_write(0..1, two);
        history.end_write(second, true, 0);
        history.end_flush(flushing, true);
        assert!(history.check_crash(&content(&[Value::ZERO])).is_err());
        assert!(history.check_crash(&content(&[one])).is_ok());
        assert!(history.check_crash(&content(&[two])).is_ok());
    }

    #[test]
    fn failed_writes_and_discards_leave_both_values() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let (one, two) = (history.new_value(), history.new_value());
        let first = history.begin_write(0..1, one);
        history.end_write(first, true, 0);
        let failing = history.begin_write(0..1, two);
        history.end_write(failing, false, 0);
        let discard = history.begin_discard(0..1);
        history.end_write(discard, true, 0);
        let reading = history.begin_read(0..1);
        assert_eq!(history.reads[0].allowed[0].len(), 3);
        history.give_up_read(reading);
    }

    #[test]
    fn a_cut_has_what_began_before_it_only() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let (one, two) = (history.new_value(), history.new_value());
        let first = history.begin_write(0..1, one);
        let cut = history.cut(1);
        let second = history.begin_write(0..1, two);
        let third = history.begin_write(0..1, two);
        history.end_write(first, true, 0);
        history.end_write(second, true, 1);
        assert!(history.check_cut(cut, &content(&[two])).is_err());
        assert!(history.check_cut(cut, &content(&[Value::ZERO])).is_err());
        assert!(history.check_cut(cut, &content(&[one])).is_ok());
        history.end_write(third, true, 1);
    }

    #[test]
    fn a_read_from_before_a_cut_does_not_see_what_is_written_after_it() {
        let mut history = History::new(Clock::default(), [Value::ZERO]);
        let value = history.new_value();
        let writing = history.begin_write(0..1, value);
        history.admit_write(value, 1);
        let (before, after) = (history.begin_read(0..1), history.begin_read(0..1));
        assert!(history.end_read(before, &content(&[value]), 0).is_err());
        assert!(history.end_read(after, &content(&[value]), 1).is_ok());
        history.end_write(writing, true, 1);
    }
}

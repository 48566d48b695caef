//! The clock, the operations under way, and what happens when one takes effect.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use super::super::sharing::SharingTable;
use super::super::sparse::SparseBytes;
use super::disk::{Disk, FileChange, SECTOR};
use super::fault::{FaultEffect, Faults, Operation, OperationKind};
use crate::buffer::Buffer;
use crate::storage::{Chance, Location};

/// Operations that the log keeps; older ones are forgotten.
const LOG_LEN: usize = 65_536;

/// What an operation does when it takes effect.
#[derive(Debug)]
pub(super) enum Action {
    Open { at: Location, create: bool },
    Read { inode: u64, at: u64, buffer: Buffer },
    Write { inode: u64, at: u64, buffer: Buffer },
    Flush { inode: u64 },
    Allocate { inode: u64, at: u64, len: u64 },
    Punch { inode: u64, at: u64, len: u64 },
    SetLen { inode: u64, len: u64 },
    Rename { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf },
    FlushDirectory { path: PathBuf },
}

/// What an operation ends with: of an opening the file's number and path.
pub(super) struct Outcome {
    pub(super) result: io::Result<Option<(u64, PathBuf)>>,
    pub(super) buffer: Option<Buffer>,
}

/// Where the outcome of an operation is left for the future that waits, if it still does.
#[derive(Default)]
pub(super) struct Slot(Mutex<SlotState>);

#[derive(Default)]
struct SlotState {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

impl Slot {
    pub(super) fn poll(&self, waker: &Waker) -> Poll<Outcome> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                state.waker = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    /// Whether the operation has ended and whoever waits does not know yet.
    fn is_untold(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).outcome.is_some()
    }

    fn fill(&self, outcome: Outcome) -> Option<Waker> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.outcome = Some(outcome);
        state.waker.take()
    }
}

struct UnderWay {
    action: Action,
    path: PathBuf,
    fault: Option<FaultEffect>,
    /// What a read that was stopped short has read.
    read: Vec<u8>,
    /// Where sectors of a write begin that could be seen before its end.
    shown: Vec<u64>,
    /// Changes below this number are what a flush covers.
    bound: u64,
    slot: Arc<Slot>,
}

enum Event {
    /// Part of a write becomes visible early.
    Show(u64),
    /// The operation takes effect and ends.
    End(u64),
}

/// Everything behind the environment, under one lock that is never held while wakers run.
pub(super) struct World {
    pub(super) disk: Disk,
    pub(super) now: Duration,
    pub(super) faults: Faults,
    pub(super) program_chance: Chance,
    pub(super) space_limit: Option<u64>,
    pub(super) allocates_slowly: bool,
    pub(super) quota: Option<u64>,
    /// How many operations of each kind have begun.
    pub(super) counts: BTreeMap<OperationKind, u64>,
    pub(super) log: VecDeque<Operation>,
    /// Changing operations that have taken effect.
    pub(super) effects: u64,
    pub(super) stop_after: Option<u64>,
    /// The power is off: nothing happens any more.
    pub(super) stopped: bool,
    pub(super) sleepers: BTreeMap<(Duration, u64), Waker>,
    chance: Chance,
    /// Operations take up to about so many nanoseconds.
    spread: u64,
    events: BTreeMap<(Duration, u64), Event>,
    under_way: BTreeMap<u64, UnderWay>,
    hung: Vec<u64>,
    /// Of flushes that have failed.
    failed_flushes: Vec<Weak<Slot>>,
    sharing: BTreeMap<u64, Arc<SharingTable>>,
    next_number: u64,
}

impl World {
    pub(super) fn new(seed: u64, disk: Disk, now: Duration) -> Self {
        let mut chance = Chance::new(seed);
        let program_chance = chance.fork();
        // How far completions overtake one another is a matter of the seed too.
        let spread = [1_000, 100_000, 1_000_000, 20_000_000][chance.index(4)];
        Self {
            disk,
            now,
            faults: Faults::default(),
            program_chance,
            space_limit: None,
            allocates_slowly: false,
            quota: None,
            counts: BTreeMap::new(),
            log: VecDeque::new(),
            effects: 0,
            stop_after: None,
            stopped: false,
            sleepers: BTreeMap::new(),
            chance,
            spread,
            events: BTreeMap::new(),
            under_way: BTreeMap::new(),
            hung: Vec::new(),
            failed_flushes: Vec::new(),
            sharing: BTreeMap::new(),
            next_number: 0,
        }
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub(super) fn sharing(&mut self, inode: u64) -> Arc<SharingTable> {
        Arc::clone(self.sharing.entry(inode).or_default())
    }

    /// Begins an operation on `path`.
    pub(super) fn begin(&mut self, action: Action, path: &Path) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
        if self.stopped {
            return slot;
        }
        let kind = action.kind();
        *self.counts.entry(kind).or_default() += 1;
        let fault = self.faults.meet(kind, path);
        let number = self.number();
        if fault == Some(FaultEffect::Hang) {
            self.hung.push(number);
        } else {
            let shows = matches!(action, Action::Write { .. }) && fault.is_none() && self.chance.happens(1, 8);
            let delay = self.delay(kind);
            self.schedule(delay, Event::End(number));
            if shows {
                let earlier = Duration::from_nanos(self.chance.below(delay.as_nanos() as u64));
                self.schedule(earlier, Event::Show(number));
            }
        }
        let under_way = UnderWay {
            action,
            path: path.to_owned(),
            fault,
            read: Vec::new(),
            shown: Vec::new(),
            bound: self.disk.next_change(),
            slot: Arc::clone(&slot),
        };
        self.under_way.insert(number, under_way);
        slot
    }

    /// Lets operations that hang end as if nothing had been.
    pub(super) fn release_hung(&mut self) {
        for number in std::mem::take(&mut self.hung) {
            if let Some(under_way) = self.under_way.get_mut(&number) {
                under_way.fault = None;
                let kind = under_way.action.kind();
                let delay = self.delay(kind);
                self.schedule(delay, Event::End(number));
            }
        }
    }

    /// When the next thing happens, if anything does.
    pub(super) fn next_time(&self) -> Option<Duration> {
        if self.stopped {
            return None;
        }
        let event = self.events.first_key_value().map(|((time, _), _)| *time);
        let sleeper = self.sleepers.first_key_value().map(|((time, _), _)| *time);
        event.into_iter().chain(sleeper).min().map(|time| time.max(self.now))
    }

    /// Moves the clock to the next thing and lets it happen. The wakers are to be called without the lock.
    pub(super) fn advance(&mut self) -> Vec<Waker> {
        let Some(time) = self.next_time() else { return Vec::new() };
        self.now = time;
        let mut wakers = Vec::new();
        while let Some(first) = self.sleepers.first_entry() {
            if first.key().0 > time {
                break;
            }
            wakers.push(first.remove());
        }
        if let Some(first) = self.events.first_entry()
            && first.key().0 <= time
        {
            match first.remove() {
                Event::Show(number) => self.show(number),
                Event::End(number) => wakers.extend(self.end(number)),
            }
        }
        wakers
    }

    /// Whether a flush has failed and whoever waits for it does not know yet.
    pub(super) fn has_untold_failure(&self) -> bool {
        self.failed_flushes.iter().filter_map(Weak::upgrade).any(|slot| slot.is_untold())
    }

    /// The medium with every operation under way as one more change that is not durable: what a crash chooses from.
    pub(super) fn disk_at_crash(&self) -> Disk {
        let mut disk = self.disk.clone();
        for under_way in self.under_way.values() {
            // Names that cannot be are left out, as they will be in the end.
            let _ = match &under_way.action {
                Action::Open { at, create: true } => disk.names().resolve(at).and_then(|path| disk.create(path).map(|_| ())),
                Action::Rename { from, to } => rename(&mut disk, from, to),
                Action::Remove { path } => remove(&mut disk, path),
                Action::Open { .. } | Action::Read { .. } | Action::Flush { .. } | Action::FlushDirectory { .. } => Ok(()),
                Action::Write { inode, at, buffer } => {
                    write(&mut disk, *inode, *at, &bytes_of(buffer));
                    Ok(())
                }
                Action::Allocate { inode, at, len } => {
                    allocate(&mut disk, *inode, *at, *len);
                    Ok(())
                }
                Action::Punch { inode, at, len } => {
                    disk.change(*inode, FileChange::Hole { at: *at, len: *len });
                    Ok(())
                }
                Action::SetLen { inode, len } => {
                    disk.change(*inode, FileChange::Length(*len));
                    Ok(())
                }
            };
        }
        disk
    }

    fn delay(&mut self, kind: OperationKind) -> Duration {
        let mut nanoseconds = 2_000 + self.chance.below(self.spread);
        if self.chance.happens(1, 16) {
            nanoseconds += self.spread * 8;
        }
        if matches!(kind, OperationKind::Flush | OperationKind::FlushDirectory) {
            nanoseconds *= 4;
        }
        Duration::from_nanos(nanoseconds)
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        let key = (self.now + after, self.number());
        self.events.insert(key, event);
    }

    fn show(&mut self, number: u64) {
        let Some(UnderWay { action: Action::Write { inode, at, buffer }, .. }) = self.under_way.get(&number) else { return };
        let (inode, at, bytes) = (*inode, *at, bytes_of(buffer));
        let len = self.disk.visible(inode).len();
        let mut shown = Vec::new();
        for (start, sector) in sectors(at, &bytes) {
            // The length comes with the end only.
            let is_chosen = start + sector.len() as u64 <= len && self.chance.happens(1, 2);
            if is_chosen && self.admit_space(inode, start, sector.len() as u64).is_ok() {
                self.disk.show(inode, start, sector);
                shown.push(start);
            }
        }
        if let Some(under_way) = self.under_way.get_mut(&number) {
            under_way.shown = shown;
        }
    }

    fn end(&mut self, number: u64) -> Option<Waker> {
        let kind = self.under_way.get(&number)?.action.kind();
        if kind.changes() {
            if self.stop_after == Some(self.effects) {
                self.stopped = true;
                return None;
            }
            self.effects += 1;
        }
        if self.stop_short(number) {
            return None;
        }
        let UnderWay { mut action, path, fault, read, shown, bound, slot } = self.under_way.remove(&number)?;
        let result = match fault {
            Some(FaultEffect::Error(errno)) => {
                self.fail(&action, bound);
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(FaultEffect::Hang | FaultEffect::Short) | None => self.perform(&mut action, bound),
        };
        if let (Action::Write { inode, at, buffer }, Err(_)) = (&action, &result) {
            // What could be seen is in the cache although the write has failed, and goes to the medium with the next flush.
            for (start, sector) in sectors(*at, &bytes_of(buffer)).filter(|(start, _)| shown.contains(start)) {
                write(&mut self.disk, *inode, start, sector);
            }
        }
        if kind == OperationKind::Flush && result.is_err() {
            self.failed_flushes.push(Arc::downgrade(&slot));
        }
        if let Action::Read { buffer, .. } = &mut action
            && !read.is_empty()
        {
            buffer.copy_in(0, &read[..half(read.len())]);
        }
        let (at, len) = action.extent();
        if self.log.len() == LOG_LEN {
            self.log.pop_front();
        }
        self.log.push_back(Operation { time: self.now, kind, path, at, len, failed: result.is_err() });
        let buffer = match action {
            Action::Read { buffer, .. } | Action::Write { buffer, .. } => Some(buffer),
            _ => None,
        };
        slot.fill(Outcome { result, buffer })
    }

    /// Transfers the first part of a transfer that is to stop there, and lets it go on later. `false` if it is none.
    fn stop_short(&mut self, number: u64) -> bool {
        let Some(under_way) = self.under_way.get_mut(&number) else { return false };
        if under_way.fault != Some(FaultEffect::Short) {
            return false;
        }
        under_way.fault = None;
        let kind = under_way.action.kind();
        match &mut under_way.action {
            // What is read first may be old by the time that the rest is read.
            Action::Read { inode, at, buffer } => match self.disk.visible(*inode).read(*at, buffer) {
                Ok(()) => under_way.read = bytes_of(buffer),
                Err(_) => return false,
            },
            Action::Write { inode, at, buffer } => {
                let (inode, at, bytes) = (*inode, *at, bytes_of(buffer));
                let first = half(bytes.len());
                if self.admit_space(inode, at, first as u64).is_err() {
                    return false;
                }
                write(&mut self.disk, inode, at, &bytes[..first]);
            }
            _ => return false,
        }
        let delay = self.delay(kind);
        self.schedule(delay, Event::End(number));
        true
    }

    fn perform(&mut self, action: &mut Action, bound: u64) -> io::Result<Option<(u64, PathBuf)>> {
        match action {
            Action::Open { at, create } => {
                let path = self.disk.names().resolve(at)?;
                let inode = if *create { self.disk.create(path.clone())? } else { self.disk.names().file(&path)? };
                return Ok(Some((inode, path)));
            }
            Action::Read { inode, at, buffer } => self.disk.visible(*inode).read(*at, buffer)?,
            Action::Write { inode, at, buffer } => {
                if let Err(error) = self.admit_space(*inode, *at, buffer.len() as u64) {
                    self.write_part(*inode, *at, &bytes_of(buffer), true);
                    return Err(error);
                }
                write(&mut self.disk, *inode, *at, &bytes_of(buffer));
            }
            Action::Flush { inode } => self.disk.flush(*inode, bound),
            Action::Allocate { inode, at, len } => {
                self.admit_space(*inode, *at, *len)?;
                allocate(&mut self.disk, *inode, *at, *len);
            }
            Action::Punch { inode, at, len } => self.disk.change(*inode, FileChange::Hole { at: *at, len: *len }),
            Action::SetLen { inode, len } => self.disk.change(*inode, FileChange::Length(*len)),
            Action::Rename { from, to } => rename(&mut self.disk, from, to)?,
            Action::Remove { path } => remove(&mut self.disk, path)?,
            Action::FlushDirectory { path } => {
                let path = self.disk.names().resolve(&Location::Trusted(path.clone()))?;
                self.disk.flush_directory(&path, bound);
            }
        }
        Ok(None)
    }

    /// What an operation that fails does nevertheless.
    fn fail(&mut self, action: &Action, bound: u64) {
        match action {
            Action::Write { inode, at, buffer } => self.write_part(*inode, *at, &bytes_of(buffer), false),
            Action::Flush { inode } => {
                // All of it, nothing, or pieces.
                let kept = self.chance.below(5).saturating_sub(1);
                let chance = &mut self.chance;
                self.disk.fail_flush(*inode, bound, || chance.happens(kept, 3));
            }
            _ => {}
        }
    }

    /// Writes some of the sectors; with `in_place` only where there is space already.
    fn write_part(&mut self, inode: u64, at: u64, bytes: &[u8], in_place: bool) {
        for (start, sector) in sectors(at, bytes) {
            let missing = self.disk.visible(inode).missing_space(start, sector.len() as u64);
            if self.chance.happens(1, 2) && (missing == 0 || !in_place) {
                write(&mut self.disk, inode, start, sector);
            }
        }
    }

    fn admit_space(&self, inode: u64, at: u64, len: u64) -> io::Result<()> {
        if self.space_limit.is_none() && self.quota.is_none() {
            return Ok(());
        }
        let missing = self.disk.visible(inode).missing_space(at, len);
        let exceeds = |limit: Option<u64>| missing > 0 && limit.is_some_and(|limit| self.disk.used_space() + missing > limit);
        if exceeds(self.quota) {
            Err(io::Error::from_raw_os_error(libc::EDQUOT))
        } else if exceeds(self.space_limit) {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        } else {
            Ok(())
        }
    }
}

impl Action {
    fn kind(&self) -> OperationKind {
        match self {
            Self::Open { create: false, .. } => OperationKind::Open,
            Self::Open { create: true, .. } => OperationKind::Create,
            Self::Read { .. } => OperationKind::Read,
            Self::Write { .. } => OperationKind::Write,
            Self::Flush { .. } => OperationKind::Flush,
            Self::Allocate { .. } => OperationKind::Allocate,
            Self::Punch { .. } => OperationKind::Punch,
            Self::SetLen { .. } => OperationKind::SetLen,
            Self::Rename { .. } => OperationKind::Rename,
            Self::Remove { .. } => OperationKind::Remove,
            Self::FlushDirectory { .. } => OperationKind::FlushDirectory,
        }
    }

    /// Position and length, for the log.
    fn extent(&self) -> (u64, u64) {
        match self {
            Self::Read { at, buffer, .. } | Self::Write { at, buffer, .. } => (*at, buffer.len() as u64),
            Self::Allocate { at, len, .. } | Self::Punch { at, len, .. } => (*at, *len),
            Self::SetLen { len, .. } => (*len, 0),
            Self::Open { .. } | Self::Flush { .. } | Self::Rename { .. } | Self::Remove { .. } | Self::FlushDirectory { .. } => (0, 0),
        }
    }
}

/// Where a transfer of so many bytes stops short: at a sector.
fn half(len: usize) -> usize {
    let sector = SECTOR as usize;
    (len / 2).next_multiple_of(sector).min(len)
}

fn bytes_of(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.copy_out(0, &mut bytes);
    bytes
}

/// The parts of `bytes` on each sector, with their positions.
fn sectors(at: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == bytes.len() {
            return None;
        }
        let start = at + done as u64;
        let len = ((SECTOR - start % SECTOR) as usize).min(bytes.len() - done);
        let sector = &bytes[done..done + len];
        done += len;
        Some((start, sector))
    })
}

fn write(disk: &mut Disk, inode: u64, at: u64, bytes: &[u8]) {
    let end = at + bytes.len() as u64;
    let grows = !bytes.is_empty() && end > disk.visible(inode).len();
    disk.change(inode, FileChange::Bytes { at, bytes: bytes.into() });
    if grows {
        disk.change(inode, FileChange::Grow(end));
    }
}

fn allocate(disk: &mut Disk, inode: u64, at: u64, len: u64) {
    let grows = at + len > disk.visible(inode).len();
    disk.change(inode, FileChange::Space { at, len });
    if grows {
        disk.change(inode, FileChange::Grow(at + len));
    }
}

fn rename(disk: &mut Disk, from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (disk.names().resolve_name(from)?, disk.names().resolve_name(to)?);
    disk.rename(from, to)
}

fn remove(disk: &mut Disk, path: &Path) -> io::Result<()> {
    let path = disk.names().resolve_name(path)?;
    disk.remove(path)
}

/// Whether a file can have bytes there at all.
pub(super) fn admit(at: u64, len: u64) -> io::Result<()> {
    SparseBytes::admit(at, len)
}

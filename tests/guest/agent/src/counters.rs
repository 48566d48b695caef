//! The ordered counters: one thread a chain, each pinned to a processor so that the chains use different virtqueues.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::OFlags;
use rustix::thread::{CpuSet, sched_setaffinity};
use snapfence_guest_agent::protocol::{Counters, Progress};
use snapfence_guest_agent::record::{Identity, RECORD_BYTES, Record, Slot};

/// One record in so many is followed by a read of a slot written earlier.
const READ_BACK_EVERY: u64 = 4;
/// More errors than this tell nothing new.
const ERRORS_KEPT: usize = 16;

/// The running chains.
pub(crate) struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Instant,
}

/// What the chains count. All of it is statistics, so the order in which others see it does not matter; `stop` only has to be seen some time.
struct Shared {
    stop: AtomicBool,
    counters: Vec<AtomicU64>,
    writes: AtomicU64,
    reads: AtomicU64,
    flushes: AtomicU64,
    slowest_us: AtomicU64,
    slowest_ever_us: AtomicU64,
    errors: Mutex<Vec<String>>,
}

impl Writers {
    /// Starts the chains, after a look at the request.
    pub(crate) fn start(plan: Counters) -> Result<Self> {
        if plan.devices.is_empty() || plan.layout.chains == 0 || plan.layout.slots == 0 {
            bail!("counters need at least one device, one chain and one slot");
        }
        if let Some(region) = plan.devices.iter().find(|region| region.offset % RECORD_BYTES as u64 != 0) {
            bail!("offset {} on {} is not a multiple of {RECORD_BYTES}", region.offset, region.path);
        }
        let files: Vec<File> = plan.devices.iter().map(|region| open_direct(&region.path)).collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            counters: (0..plan.layout.chains).map(|_| AtomicU64::new(0)).collect(),
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            slowest_us: AtomicU64::new(0),
            slowest_ever_us: AtomicU64::new(0),
            errors: Mutex::new(Vec::new()),
        });
        let plan = Arc::new(plan);
        let files = Arc::new(files);
        let threads = (0..plan.layout.chains)
            .map(|chain| {
                let (plan, files, shared) = (Arc::clone(&plan), Arc::clone(&files), Arc::clone(&shared));
                std::thread::spawn(move || {
                    if let Err(error) = (Chain { chain, plan: &plan, files: &files, shared: &shared }).run() {
                        shared.report(format!("chain {chain}: {error:#}"));
                    }
                })
            })
            .collect();
        Ok(Self { shared, threads, started: Instant::now() })
    }

    /// The totals for a report; the next report's slowest request is counted from here.
    pub(crate) fn report(&self) -> Progress {
        let progress = self.progress();
        // A request that ends between the two lines is in neither report, but still in the slowest ever.
        self.shared.slowest_us.store(0, Ordering::Relaxed);
        progress
    }

    /// The totals.
    pub(crate) fn progress(&self) -> Progress {
        let shared = &self.shared;
        Progress {
            elapsed_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            counters: shared.counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect(),
            writes: shared.writes.load(Ordering::Relaxed),
            reads: shared.reads.load(Ordering::Relaxed),
            flushes: shared.flushes.load(Ordering::Relaxed),
            slowest_us: shared.slowest_us.load(Ordering::Relaxed),
            slowest_ever_us: shared.slowest_ever_us.load(Ordering::Relaxed),
            errors: shared.errors.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Lets every chain finish the counter it is at, and returns the totals.
    pub(crate) fn stop(mut self) -> Progress {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.report("a chain's thread panicked".to_owned());
            }
        }
        self.progress()
    }
}

impl Shared {
    fn report(&self, error: String) {
        eprintln!("snapfence-guest-agent: counters: {error}");
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < ERRORS_KEPT {
            errors.push(error);
        }
    }

    fn took(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.slowest_us.fetch_max(us, Ordering::Relaxed);
        self.slowest_ever_us.fetch_max(us, Ordering::Relaxed);
    }
}

/// One writer.
struct Chain<'a> {
    chain: u32,
    plan: &'a Counters,
    files: &'a [File],
    shared: &'a Shared,
}

impl Chain<'_> {
    fn run(&self) -> Result<()> {
        self.pin()?;
        let newest = (0..self.files.len()).map(|device| self.newest_on(device)).collect::<Result<Vec<_>>>()?;
        let level = newest.iter().copied().max().unwrap_or(0);
        // A chain that was cut short left later devices behind the first; they catch up before the next counter begins.
        for (device, &newest) in newest.iter().enumerate() {
            for counter in newest + 1..=level {
                self.write(device, counter)?;
            }
        }
        self.publish(level);
        let mut counter = level;
        while !self.shared.stop.load(Ordering::Relaxed) {
            counter += 1;
            for device in 0..self.files.len() {
                self.write(device, counter)?;
                if counter.is_multiple_of(READ_BACK_EVERY) {
                    self.read_back(device, counter)?;
                }
            }
            self.publish(counter);
            if self.plan.flush_every > 0 && counter.is_multiple_of(self.plan.flush_every) {
                let turn = counter / self.plan.flush_every + u64::from(self.chain);
                self.flush(usize::try_from(turn % self.files.len() as u64)?)?;
            }
        }
        Ok(())
    }

    fn pin(&self) -> Result<()> {
        let processors = std::thread::available_parallelism()?.get();
        let mut only = CpuSet::new();
        only.set(self.chain as usize % processors);
        sched_setaffinity(None, &only).context("cannot pin the thread")
    }

    fn publish(&self, counter: u64) {
        self.shared.counters[self.chain as usize].store(counter, Ordering::Relaxed);
    }

    fn offset(&self, device: usize, slot: u32) -> u64 {
        self.plan.devices[device].offset + self.plan.layout.slot_offset(self.chain, slot)
    }

    fn identity(&self, device: usize, counter: u64) -> Identity {
        Identity { chain: self.chain, device: u32::try_from(device).expect("few devices"), counter }
    }

    fn newest_on(&self, device: usize) -> Result<u64> {
        let mut newest = 0;
        for slot in 0..self.plan.layout.slots {
            match self.read(device, slot)? {
                Slot::Empty => {}
                Slot::Written(identity) => newest = newest.max(identity.counter),
                // A power cut may have torn the record that was being written. It is written again, or proves wrong when read back.
                Slot::Torn(_) => {}
            }
        }
        Ok(newest)
    }

    fn write(&self, device: usize, counter: u64) -> Result<()> {
        let record = Record::encode(self.identity(device, counter));
        let at = self.offset(device, self.plan.layout.slot_of(counter));
        let begun = Instant::now();
        self.files[device]
            .write_all_at(&record.0, at)
            .with_context(|| format!("cannot write counter {counter} to {} at {at}", self.plan.devices[device].path))?;
        self.shared.took(begun.elapsed());
        self.shared.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, device: usize, slot: u32) -> Result<Slot> {
        let mut record = Record::zeroed();
        let at = self.offset(device, slot);
        let begun = Instant::now();
        self.files[device]
            .read_exact_at(&mut record.0, at)
            .with_context(|| format!("cannot read {} at {at}", self.plan.devices[device].path))?;
        self.shared.took(begun.elapsed());
        self.shared.reads.fetch_add(1, Ordering::Relaxed);
        Ok(Record::decode(&record.0))
    }

    /// Reads a slot, another one each time, and compares it with what was written there.
    fn read_back(&self, device: usize, newest: u64) -> Result<()> {
        let layout = &self.plan.layout;
        let slot = layout.slot_of(newest.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 17);
        let expected = match layout.expected_in_slot(newest, slot) {
            Some(counter) => Slot::Written(self.identity(device, counter)),
            None => Slot::Empty,
        };
        let found = self.read(device, slot)?;
        if found != expected {
            let (path, at) = (&self.plan.devices[device].path, self.offset(device, slot));
            bail!("{path} at {at} holds {found:?}, written was {expected:?} (newest counter {newest})");
        }
        Ok(())
    }

    fn flush(&self, device: usize) -> Result<()> {
        let begun = Instant::now();
        self.files[device].sync_data().with_context(|| format!("cannot flush {}", self.plan.devices[device].path))?;
        self.shared.took(begun.elapsed());
        self.shared.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn open_direct(path: &str) -> Result<File> {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    OpenOptions::new().read(true).write(true).custom_flags(direct).open(path).with_context(|| format!("cannot open {path}"))
}

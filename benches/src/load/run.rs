//! Doing it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use snapfence_image_format::storage::Chance;

use super::report::{Direction, LogEntry, Report};
use super::target::Engine;
use super::{Job, Pattern, Target};

/// A request that has been given up on has not come back by then.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which blocks come next.
struct Order {
    pattern: Pattern,
    chance: Chance,
    blocks: u64,
    next: u64,
}

impl Order {
    fn next(&mut self) -> (Direction, u64) {
        let block = if self.pattern.is_random() {
            self.chance.below(self.blocks)
        } else {
            let block = self.next;
            self.next = (block + 1) % self.blocks;
            block
        };
        let direction = match self.pattern {
            Pattern::Read | Pattern::RandRead => Direction::Read,
            Pattern::Write | Pattern::RandWrite => Direction::Write,
            Pattern::RandRw if self.chance.below(2) == 0 => Direction::Read,
            Pattern::RandRw => Direction::Write,
        };
        (direction, block)
    }
}

/// One run of a job.
struct Run<'a> {
    job: &'a Job,
    engine: Box<dyn Engine>,
    order: Order,
    free: Vec<usize>,
    /// By slot: when the request was due, and what it is.
    begun: Vec<(Instant, Direction)>,
    report: Report,
    keeps_log: bool,
}

/// Does `job` to `target` and measures. `keeps_log`: every single request.
///
/// # Errors
/// If the target cannot be reached, or a request fails or does not come back.
pub fn run(target: &Target, job: &Job, keeps_log: bool) -> Result<Report> {
    ensure!(job.iodepth > 0 && job.queues > 0 && job.bs.0 > 0, "a load has at least one request of one byte on one queue");
    let engine = target.open(job)?;
    let bytes = job.size.map_or(engine.size(), |size| size.0.min(engine.size()));
    let blocks = bytes / job.bs.0;
    ensure!(blocks > 0, "{target} has {} bytes, which is less than a block", engine.size());
    let now = Instant::now();
    let mut run = Run {
        job,
        engine,
        order: Order { pattern: job.rw, chance: Chance::new(job.randseed), blocks, next: 0 },
        free: (0..job.slots()).rev().collect(),
        begun: vec![(now, Direction::Read); job.slots()],
        report: Report::new(job.clone()),
        keeps_log,
    };
    run.go(now)?;
    Ok(run.report)
}

impl Run<'_> {
    fn go(&mut self, began: Instant) -> Result<()> {
        // Else the system lets us sleep longer than we ask for, which would count as latency.
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
        let (start, end) = (began + self.job.ramp(), began + self.job.ramp() + self.job.measured());
        let gap = self.job.rate_iops.map(|rate| Duration::from_secs(1) / u32::try_from(rate.max(1)).unwrap_or(u32::MAX));
        let limit = end + PATIENCE;
        let mut due = began;
        let mut done = Vec::with_capacity(self.job.slots());
        loop {
            let mut now = Instant::now();
            // In an open loop everything has its turn that is due before the end, however late: what is left out would be what took longest.
            if now >= end && (gap.is_none() || due >= end) {
                break;
            }
            ensure!(now < limit, "requests do not come back");
            while !self.free.is_empty() && gap.is_none_or(|_| due <= now && due < end) {
                self.begin(gap.map_or(now, |_| due))?;
                due += gap.unwrap_or_default();
                now = Instant::now();
            }
            self.engine.submit()?;
            let wait = match gap {
                Some(_) if !self.free.is_empty() => due.saturating_duration_since(now),
                Some(_) => limit.saturating_duration_since(now),
                None => end.saturating_duration_since(now),
            };
            self.engine.complete(Some(wait.max(Duration::from_micros(1))), &mut done)?;
            self.end(&mut done, start..end);
        }
        self.report.finish(start, self.job.measured());
        while self.free.len() < self.job.slots() {
            ensure!(Instant::now() < limit, "{} requests do not come back", self.job.slots() - self.free.len());
            self.engine.complete(Some(PATIENCE), &mut done)?;
            self.end(&mut done, start..end);
        }
        Ok(())
    }

    fn begin(&mut self, due: Instant) -> Result<()> {
        let slot = self.free.pop().expect("there is one");
        let (direction, block) = self.order.next();
        self.engine.prepare(slot, direction, block * self.job.bs.0)?;
        self.begun[slot] = (due, direction);
        Ok(())
    }

    /// Counts what has come back: in an open loop what was due in the time that is measured, else what has ended in it.
    fn end(&mut self, done: &mut Vec<usize>, measured: std::ops::Range<Instant>) {
        let now = Instant::now();
        for slot in done.drain(..) {
            self.free.push(slot);
            let (due, direction) = self.begun[slot];
            let counts = if self.job.rate_iops.is_some() { due } else { now };
            if measured.contains(&counts) {
                let latency = now.saturating_duration_since(due);
                self.report.count(direction, latency);
                if self.keeps_log {
                    self.report.log.push(LogEntry { at: now - measured.start, latency, direction });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        job: Job,
    }

    fn job(arguments: &str) -> Job {
        Arguments::parse_from(std::iter::once("load").chain(arguments.split(' '))).job
    }

    /// A file of 1 MiB.
    fn file() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![0; 1 << 20]).expect("a file");
        (directory, path)
    }

    #[test]
    fn what_is_written_is_in_the_file_and_counted() {
        let (_directory, path) = file();
        let job = job("--rw write --bs 8k --iodepth 4 --size 64k --runtime 0.2 --ramp-time 0");
        let report = run(&Target::File(path.clone()), &job, true).expect("a run");
        let bytes = std::fs::read(&path).expect("a file");
        assert!(bytes[..64 << 10].iter().all(|byte| *byte != 0) && bytes[64 << 10..].iter().all(|byte| *byte == 0));
        let shown = report.to_json("disk");
        let [read, write] = ["read", "write"].map(|kind| shown["jobs"][0][kind]["total_ios"].as_u64().expect("a number"));
        assert_eq!((read, write, report.log.len() as u64), (0, report.requests(), report.requests()));
        assert!(write >= 8, "{write}");
        let latency = &shown["jobs"][0]["write"]["clat_ns"];
        assert_eq!(latency["N"].as_u64(), Some(write));
        let [median, most] = ["50.000000", "99.990000"].map(|percent| latency["percentile"][percent].as_u64().expect("a number"));
        assert!(0 < median && median <= most, "{latency}");
        let mut log = Vec::new();
        report.write_log(&mut log).expect("memory");
        assert_eq!(log.iter().filter(|byte| **byte == b'\n').count() as u64, write);
    }

    #[test]
    fn requests_of_an_open_loop_begin_at_their_rate() {
        let (_directory, path) = file();
        let job = job("--rw randread --iodepth 8 --rate-iops 500 --runtime 0.4 --ramp-time 0.1");
        let report = run(&Target::File(path), &job, false).expect("a run");
        assert_eq!(report.requests(), 200);
    }

    /// Serves nothing for a while.
    struct Stalling {
        begun: Vec<usize>,
        until: Instant,
    }

    impl Engine for Stalling {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn prepare(&mut self, slot: usize, _: Direction, _: u64) -> Result<()> {
            self.begun.push(slot);
            Ok(())
        }

        fn submit(&mut self) -> Result<()> {
            Ok(())
        }

        fn complete(&mut self, wait: Option<Duration>, done: &mut Vec<usize>) -> Result<()> {
            let now = Instant::now();
            if now >= self.until {
                done.append(&mut self.begun);
            } else {
                std::thread::sleep(wait.unwrap_or_default().min(self.until - now));
            }
            Ok(())
        }
    }

    #[test]
    fn a_stall_at_the_end_of_an_open_loop_counts_with_all_that_had_to_wait() {
        let job = job("--rw randread --iodepth 8 --rate-iops 1000 --runtime 0.2 --ramp-time 0");
        let began = Instant::now();
        let engine = Box::new(Stalling { begun: Vec::new(), until: began + Duration::from_millis(400) });
        let order = Order { pattern: job.rw, chance: Chance::new(1), blocks: 256, next: 0 };
        let begun = vec![(began, Direction::Read); 8];
        let mut run = Run { job: &job, engine, order, free: (0..8).collect(), begun, report: Report::new(job.clone()), keeps_log: true };
        run.go(began).expect("all come back");
        assert_eq!(run.report.requests(), 200);
        assert!(run.report.latency(1.0) >= Duration::from_millis(190), "{:?}", run.report.latency(1.0));
    }

    #[test]
    fn what_is_smaller_than_a_block_is_refused() {
        let (_directory, path) = file();
        let error = run(&Target::File(path), &job("--bs 2m --runtime 0.1"), false).expect_err("no block").to_string();
        assert!(error.contains("less than a block"), "{error}");
    }
}

//! What a load came to.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::Job;

/// Reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device.
    Read,
    /// To it.
    Write,
}

/// One request, for logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// When it came back, from the beginning of what is measured.
    pub at: Duration,
    /// How long it took.
    pub latency: Duration,
    /// What it was.
    pub direction: Direction,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Report {
    job: Job,
    elapsed: Duration,
    /// When the time began that is measured.
    pub start: Instant,
    /// Nanoseconds.
    reads: Histogram<u64>,
    writes: Histogram<u64>,
    /// Every request, if asked for.
    pub log: Vec<LogEntry>,
}

/// The longest latency that is told from others: 100 s.
const LONGEST: u64 = 100_000_000_000;
/// Those that fio prints.
const PERCENTILES: [f64; 17] = [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

impl Report {
    pub(super) fn new(job: Job) -> Self {
        let histogram = || Histogram::new_with_bounds(1, LONGEST, 3).expect("bounds that make sense");
        Self { job, elapsed: Duration::ZERO, start: Instant::now(), reads: histogram(), writes: histogram(), log: Vec::new() }
    }

    pub(super) fn count(&mut self, direction: Direction, latency: Duration) {
        self.histogram_mut(direction).saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(1));
    }

    pub(super) fn finish(&mut self, start: Instant, elapsed: Duration) {
        (self.start, self.elapsed) = (start, elapsed);
    }

    fn histogram_mut(&mut self, direction: Direction) -> &mut Histogram<u64> {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }

    fn histogram(&self, direction: Direction) -> &Histogram<u64> {
        match direction {
            Direction::Read => &self.reads,
            Direction::Write => &self.writes,
        }
    }

    /// Requests that came back, of both kinds.
    pub fn requests(&self) -> u64 {
        self.reads.len() + self.writes.len()
    }

    /// Requests a second, of both kinds.
    pub fn iops(&self) -> f64 {
        self.requests() as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that this share of all requests, in percent, did not exceed.
    pub fn latency(&self, percentile: f64) -> Duration {
        let mut all = self.reads.clone();
        all.add(&self.writes).expect("the same bounds");
        Duration::from_nanos(all.value_at_percentile(percentile))
    }

    fn direction(&self, direction: Direction) -> Value {
        let histogram = self.histogram(direction);
        let (count, seconds) = (histogram.len(), self.elapsed.as_secs_f64());
        let percentiles: serde_json::Map<_, _> =
            PERCENTILES.iter().map(|percent| (format!("{percent:.6}"), json!(histogram.value_at_percentile(*percent)))).collect();
        let bytes = count * self.job.bs.0;
        let latency = json!({
            "min": if count > 0 { histogram.min() } else { 0 },
            "max": histogram.max(),
            "mean": histogram.mean(),
            "stddev": histogram.stdev(),
            "N": count,
            "percentile": percentiles,
        });
        json!({
            "io_bytes": bytes,
            "io_kbytes": bytes / 1024,
            "bw_bytes": (bytes as f64 / seconds) as u64,
            "bw": (bytes as f64 / seconds / 1024.0) as u64,
            "iops": count as f64 / seconds,
            "runtime": self.elapsed.as_millis() as u64,
            "total_ios": count,
            // From when a request was due: with a rate, what fio calls the total latency, in which a late start counts. Its parsers look for
            // percentiles in the completion latency, so both are the same here.
            "clat_ns": latency,
            "lat_ns": latency,
        })
    }

    /// In the shape of fio's JSON (`fio --output-format=json`): an object of `jobs`.
    pub fn to_json(&self, target: &str) -> Value {
        json!({
            "snapfence load version": env!("CARGO_PKG_VERSION"),
            "jobs": [{
                "jobname": target,
                "error": 0,
                "job options": self.job,
                "read": self.direction(Direction::Read),
                "write": self.direction(Direction::Write),
            }],
        })
    }

    /// Writes the log in the shape of fio's latency logs: milliseconds, nanoseconds, 0 for reads and 1 for writes, bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_log(&self, mut to: impl Write) -> io::Result<()> {
        for LogEntry { at, latency, direction } in &self.log {
            let kind = u8::from(*direction == Direction::Write);
            writeln!(to, "{:.3}, {}, {kind}, {}", at.as_secs_f64() * 1e3, latency.as_nanos(), self.job.bs.0)?;
        }
        to.flush()
    }
}

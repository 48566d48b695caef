//! What fio says of a run, in its format `json+`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::report::Figures;

/// Latencies as fio counts them: how many fell into which bin, named in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Latencies {
    bins: BTreeMap<u64, u64>,
    longest_ns: u64,
}

/// What was done on one disk, or on several at once.
#[derive(Clone, Debug, Default, PartialEq)]
struct Work {
    iops: f64,
    bytes_per_second: f64,
    /// From the beginning of submission to completion, of reads and writes.
    latencies: Latencies,
    /// Of flushes.
    flushes: Latencies,
}

/// The figures of one run: of all disks together, then of each.
///
/// # Errors
/// If a disk met an error, or fio speaks otherwise than expected.
pub(crate) fn figures(output: &str) -> Result<Vec<Figures>> {
    // Notes to people may come before.
    let begin = output.find('{').with_context(|| format!("fio gives no figures: {output}"))?;
    let report: Value = serde_json::from_str(&output[begin..]).context("fio's figures")?;
    let jobs = report["jobs"].as_array().context("fio names no jobs")?;
    ensure!(!jobs.is_empty(), "fio names no jobs");
    let mut all = Work::default();
    let mut figures = Vec::new();
    for job in jobs {
        ensure!(job["error"] == 0, "{} met the error {}", job["jobname"], job["error"]);
        let work = Work::read(job)?;
        all.add(&work);
        figures.push(work.figures());
    }
    figures.insert(0, all.figures());
    Ok(figures)
}

impl Work {
    fn read(job: &Value) -> Result<Self> {
        let mut work = Self::default();
        for direction in ["read", "write"] {
            let part = &job[direction];
            work.iops += part["iops"].as_f64().context("fio gives no iops")?;
            work.bytes_per_second += part["bw_bytes"].as_f64().context("fio gives no bw_bytes")?;
            work.latencies.add(&Latencies::read(&part["lat_ns"])?);
        }
        work.flushes = Latencies::read(&job["sync"]["lat_ns"])?;
        Ok(work)
    }

    fn add(&mut self, other: &Self) {
        self.iops += other.iops;
        self.bytes_per_second += other.bytes_per_second;
        self.latencies.add(&other.latencies);
        self.flushes.add(&other.flushes);
    }

    fn figures(&self) -> Figures {
        Figures {
            iops: self.iops,
            mib_per_second: self.bytes_per_second / f64::from(1 << 20),
            p50_us: self.latencies.percentile_us(50.0),
            p99_us: self.latencies.percentile_us(99.0),
            longest_us: self.latencies.longest_ns as f64 / 1e3,
            flush_p50_us: (!self.flushes.bins.is_empty()).then(|| self.flushes.percentile_us(50.0)),
        }
    }
}

impl Latencies {
    /// Takes what fio says; it has no bins where nothing was done.
    fn read(said: &Value) -> Result<Self> {
        let mut latencies = Self { bins: BTreeMap::new(), longest_ns: said["max"].as_u64().unwrap_or(0) };
        for (ns, count) in said["bins"].as_object().into_iter().flatten() {
            let count = count.as_u64().filter(|&count| count > 0).context("an empty bin")?;
            latencies.bins.insert(ns.parse()?, count);
        }
        Ok(latencies)
    }

    fn add(&mut self, other: &Self) {
        for (&ns, count) in &other.bins {
            *self.bins.entry(ns).or_default() += count;
        }
        self.longest_ns = self.longest_ns.max(other.longest_ns);
    }

    /// The time in microseconds that `percent` of 100 did not exceed, 0 if there were none.
    fn percentile_us(&self, percent: f64) -> f64 {
        let all: u64 = self.bins.values().sum();
        let wanted = ((all as f64 * percent / 100.0).ceil() as u64).max(1);
        let mut seen = 0;
        let bin = self.bins.iter().find(|&(_, &count)| {
            seen += count;
            seen >= wanted
        });
        bin.map_or(0.0, |(&ns, _)| ns as f64 / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(error: u32) -> Value {
        serde_json::json!({
            "jobname": "vda", "error": error,
            "read": { "iops": 100.0, "bw_bytes": 1 << 20, "lat_ns": { "max": 9000, "bins": { "1000": 90, "9000": 10 } } },
            "write": { "iops": 50.0, "bw_bytes": 1 << 20, "lat_ns": { "max": 20000, "bins": { "20000": 100 } } },
            "sync": { "total_ios": 0, "lat_ns": { "max": 0 } },
        })
    }

    #[test]
    fn disks_and_directions_are_added_up() {
        let output = format!("note: something\n{}", serde_json::json!({ "jobs": [job(0), job(0)] }));
        let figures = figures(&output).unwrap();
        assert_eq!(figures.len(), 3);
        let expected = Figures { iops: 300.0, mib_per_second: 4.0, p50_us: 9.0, p99_us: 20.0, longest_us: 20.0, flush_p50_us: None };
        assert_eq!(figures[0], expected);
        assert_eq!(figures[1], Figures { iops: 150.0, mib_per_second: 2.0, ..expected });
    }

    #[test]
    fn an_error_of_one_disk_is_an_error() {
        let output = serde_json::json!({ "jobs": [job(0), job(5)] }).to_string();
        assert!(figures(&output).unwrap_err().to_string().contains("error 5"));
        assert!(figures("nothing").is_err() && figures("{\"jobs\": []}").is_err());
    }
}

//! `load`: one job to one or several targets at once, a thread for each; prints fio's JSON.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use serde_json::json;
use snapfence_benches::load::{Job, Target, run};

/// Reads and writes block devices behind vhost-user sockets, or files through io_uring, and prints what came of it as fio does
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// vhost-user:SOCKET or file:PATH; with several each is a job of its own, all at the same time
    #[arg(required = true, value_name = "TARGET")]
    targets: Vec<Target>,
    #[command(flatten)]
    job: Job,
    /// Also write the latency of every request of the first target there, as fio's latency logs
    #[arg(long, value_name = "FILE")]
    write_lat_log: Option<PathBuf>,
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(arguments: &Arguments) -> Result<()> {
    let Arguments { targets, job, write_lat_log } = arguments;
    let reports = std::thread::scope(|scope| {
        let threads: Vec<_> = targets
            .iter()
            .zip(0_u64..)
            .map(|(target, number)| {
                let job = Job { randseed: job.randseed + number, ..job.clone() };
                scope.spawn(move || run(target, &job, number == 0 && write_lat_log.is_some()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread has panicked"))?).collect::<Result<Vec<_>>>()
    })?;
    let mut all = json!({ "jobs": [] });
    for (target, report) in targets.iter().zip(&reports) {
        let mut one = report.to_json(&target.to_string());
        let jobs = one["jobs"].take();
        all["snapfence load version"] = one["snapfence load version"].take();
        all["jobs"].as_array_mut().expect("a list").extend(jobs.as_array().expect("a list").iter().cloned());
    }
    println!("{all:#}");
    if let (Some(path), Some(report)) = (write_lat_log, reports.first()) {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        report.write_log(BufWriter::new(file))?;
    }
    Ok(())
}

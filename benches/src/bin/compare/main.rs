//! snapfence beside qemu-storage-daemon and plain io_uring: the same load generator, the same kind of image, in turns.
//!
//! For each medium, image, pattern and depth all contestants are measured in short blocks, forwards and backwards in turn (A B C C B A ...), so that
//! what the machine does meanwhile hits them alike; what counts are the medians of their blocks, and the ratios of these, with intervals from
//! resampling. The load generator has the first processor and the servers the second one, if there are two. Blocks during which the hypervisor
//! took the processors away are counted, and dropped unless most are like that.

mod contestant;
mod machine;
mod page;
mod statistics;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use serde::Serialize;
use snapfence_benches::load::{Job, Pattern, Size, run};

use contestant::{Contestant, Kind};
use machine::{Machine, on_processor};
use statistics::{Ratio, median, ratio};

/// Measures snapfenced, qemu-storage-daemon and plain io_uring in turns, and writes a report
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Blocks of each contestant in each cell of the table
    #[arg(long, default_value_t = 5, value_name = "N")]
    blocks: usize,
    /// Seconds of each block
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    seconds: f64,
    /// Size of the disks
    #[arg(long, default_value = "256m", value_name = "BYTES")]
    size: Size,
    /// Where the report goes: compare.json and compare.html
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    output: PathBuf,
}

/// What an image lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Medium {
    /// Memory: what software costs.
    Tmpfs,
    /// The file system of the temporary directory, past its cache.
    Disk,
}

/// One contestant in one cell.
#[derive(Debug, Serialize)]
struct Entry {
    contestant: String,
    /// Requests a second, the median of the blocks.
    iops: f64,
    /// Latencies in microseconds, medians of the blocks.
    p50_us: f64,
    p99_us: f64,
    /// Processor time of the server for each request in microseconds, the median; none for plain io_uring, which has no server.
    cpu_us: Option<f64>,
    /// Requests a second beside those of snapfence: snapfence's divided by these.
    snapfence_ratio: Option<Ratio>,
    /// Blocks that counted, and those that were disturbed, which count only where more than half were.
    blocks: usize,
    disturbed: usize,
}

/// One cell of the table.
#[derive(Debug, Serialize)]
struct Cell {
    medium: Medium,
    image: &'static str,
    rw: Pattern,
    iodepth: usize,
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    contestants: Vec<String>,
    block_seconds: f64,
    cells: Vec<Cell>,
}

/// What one block has shown.
#[derive(Clone, Copy, Debug)]
struct Block {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us: Option<f64>,
    is_disturbed: bool,
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.blocks > 0 && arguments.seconds > 0.0, "there is nothing to measure in no time");
    let mut report = Report {
        machine: Machine::examine()?,
        contestants: contestant::present().iter().map(Kind::describe).collect(),
        block_seconds: arguments.seconds,
        cells: Vec::new(),
    };
    println!(
        "{:<6} {:<6} {:<10} {:>5}  {:<22} {:>10} {:>9} {:>9} {:>8}  snapfence is",
        "", "", "", "depth", "", "requests/s", "p50 us", "p99 us", "CPU us"
    );
    for (medium, folder) in [(Medium::Tmpfs, Path::new("/dev/shm")), (Medium::Disk, &std::env::temp_dir())] {
        for image in ["raw", "qcow2"] {
            let folder = tempfile::tempdir_in(folder)?;
            let mut contestants = Vec::new();
            for kind in contestant::present() {
                // Plain io_uring knows no formats.
                if image == "raw" || kind != Kind::IoUring {
                    contestants.push(Contestant::start(kind, folder.path(), image, arguments.size.0)?);
                }
            }
            for rw in [Pattern::RandRead, Pattern::RandWrite] {
                for iodepth in [1, 32] {
                    let cell = measure(arguments, &contestants, medium, image, rw, iodepth)?;
                    print(&cell);
                    report.cells.push(cell);
                }
            }
            for contestant in contestants {
                contestant.stop()?;
            }
        }
    }
    std::fs::create_dir_all(&arguments.output)?;
    let (json, html) = (arguments.output.join("compare.json"), arguments.output.join("compare.html"));
    std::fs::write(&json, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("cannot write {}", json.display()))?;
    std::fs::write(&html, page::page(&report)).with_context(|| format!("cannot write {}", html.display()))?;
    println!("{}\n{}", json.display(), html.display());
    Ok(())
}

fn measure(
    arguments: &Arguments,
    contestants: &[Contestant],
    medium: Medium,
    image: &'static str,
    rw: Pattern,
    iodepth: usize,
) -> Result<Cell> {
    let job = Job {
        rw,
        bs: Size(4096),
        iodepth,
        queues: 1,
        rate_iops: None,
        runtime: arguments.seconds,
        ramp_time: 0.2,
        size: None,
        hipri: false,
        randseed: 1,
    };
    let mut blocks: Vec<Vec<Block>> = vec![Vec::new(); contestants.len()];
    for round in 0..arguments.blocks {
        let mut order: Vec<usize> = (0..contestants.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let job = Job { randseed: round as u64 + 1, ..job.clone() };
            blocks[index].push(block(&contestants[index], &job)?);
        }
    }
    let kept: Vec<Vec<Block>> = blocks.iter().map(|all| undisturbed(all)).collect();
    let of = |blocks: &[Block], value: fn(&Block) -> f64| median(&blocks.iter().map(value).collect::<Vec<_>>());
    let ours: Vec<f64> = kept[0].iter().map(|block| block.iops).collect();
    let entries = contestants
        .iter()
        .zip(&kept)
        .zip(&blocks)
        .map(|((contestant, kept), all)| Entry {
            contestant: contestant.kind().name().to_owned(),
            iops: of(kept, |block| block.iops),
            p50_us: of(kept, |block| block.p50_us),
            p99_us: of(kept, |block| block.p99_us),
            cpu_us: kept.iter().all(|block| block.cpu_us.is_some()).then(|| of(kept, |block| block.cpu_us.unwrap_or(0.0))),
            snapfence_ratio: (contestant.kind() != contestants[0].kind())
                .then(|| ratio(&ours, &kept.iter().map(|block| block.iops).collect::<Vec<_>>())),
            blocks: kept.len(),
            disturbed: all.iter().filter(|block| block.is_disturbed).count(),
        })
        .collect();
    Ok(Cell { medium, image, rw, iodepth, entries })
}

/// The blocks in which nobody took the processors away; all of them, if hardly any is left.
fn undisturbed(blocks: &[Block]) -> Vec<Block> {
    let kept: Vec<Block> = blocks.iter().filter(|block| !block.is_disturbed).copied().collect();
    if kept.len() * 2 < blocks.len() { blocks.to_vec() } else { kept }
}

fn block(contestant: &Contestant, job: &Job) -> Result<Block> {
    let (before, stolen) = (contestant.cpu_time()?, machine::stolen()?);
    let report = on_processor(0, || run(contestant.target(), job, false))?;
    let (after, stolen) = (contestant.cpu_time()?, machine::stolen()? - stolen);
    // The ramp's requests have taken their share of the time, too.
    let share = job.runtime / (job.runtime + job.ramp_time);
    let cpu_us = before.zip(after).map(|(before, after)| (after - before).as_secs_f64() * 1e6 * share / report.requests() as f64);
    let in_us = |percentile| report.latency(percentile).as_secs_f64() * 1e6;
    let is_disturbed = stolen.as_secs_f64() > 0.01 * (job.runtime + job.ramp_time);
    Ok(Block { iops: report.iops(), p50_us: in_us(50.0), p99_us: in_us(99.0), cpu_us, is_disturbed })
}

fn print(cell: &Cell) {
    for entry in &cell.entries {
        let Cell { medium, image, rw, iodepth, .. } = cell;
        let (medium, rw) = (format!("{medium:?}").to_lowercase(), format!("{rw:?}").to_lowercase());
        let cpu = entry.cpu_us.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.2}"));
        let ratio = entry.snapfence_ratio.map_or_else(String::new, |ratio| ratio.to_string());
        println!(
            "{medium:<6} {image:<6} {rw:<10} {iodepth:>5}  {:<22} {:>10.0} {:>9.1} {:>9.1} {cpu:>8}  {ratio}",
            entry.contestant, entry.iops, entry.p50_us, entry.p99_us
        );
    }
}

/// Runs a program to its end.
fn command(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("{program} is missing"))?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

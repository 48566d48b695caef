//! snapfence beside qemu-storage-daemon and plain io_uring: the same load generator, the same kind of image, in turns.
//!
//! Suites measure one thing each, print tables as they go, and make up the report at the end.

mod chains;
mod contestant;
mod page;
mod plot;
mod report;
mod snapshots;
mod throughput;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use serde::Serialize;
use snapfence_benches::load::Size;
use snapfence_benches::machine::{Machine, disk_folder};

use contestant::Kind;

/// Measures snapfenced, qemu-storage-daemon and plain io_uring in turns, and writes a report
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["throughput", "snapshots"], value_name = "SUITE")]
    suites: Vec<Suite>,
    /// Blocks of each contestant in each cell of a table
    #[arg(long, default_value_t = 5, value_name = "N")]
    blocks: usize,
    /// Seconds of each block
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    seconds: f64,
    /// Size of the disks
    #[arg(long, default_value = "256m", value_name = "BYTES")]
    size: Size,
    /// Snapshots of each contestant for each number of devices
    #[arg(long, default_value_t = 40, value_name = "N")]
    snapshots: usize,
    /// How many devices are snapshotted together, in turn
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4], value_name = "N")]
    devices: Vec<usize>,
    /// Numbers of layers
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 100, 400, 1000], value_name = "N")]
    depths: Vec<usize>,
    /// Where the report goes: compare.json and compare.html
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    output: PathBuf,
}

/// Things that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Small requests at random
    Throughput,
    /// Large requests in order
    Sequential,
    /// What a snapshot does to the requests beside it
    Snapshots,
    /// Chains of different depths
    Chains,
}

/// What an image lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Medium {
    /// Memory: what software costs.
    Tmpfs,
    /// A disk, past its cache.
    Disk,
}

impl Medium {
    const ALL: [Self; 2] = [Self::Tmpfs, Self::Disk];

    fn folder(self) -> &'static Path {
        match self {
            Self::Tmpfs => Path::new("/dev/shm"),
            Self::Disk => disk_folder(),
        }
    }
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tmpfs => "in memory",
            Self::Disk => "on disk",
        })
    }
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
    ensure!(arguments.snapshots > 0 && !arguments.devices.contains(&0), "there is nothing to measure without a snapshot of a device");
    ensure!(!arguments.depths.contains(&0), "a chain has one layer at least");
    let machine = Machine::examine()?;
    let present = contestant::present();
    if !present.contains(&Kind::Qsd) {
        println!("qemu-storage-daemon is not here (Debian has it in qemu-system-common): measured without it");
    }
    let mut sections = Vec::new();
    for suite in &arguments.suites {
        sections.push(match suite {
            Suite::Throughput => throughput::small(arguments)?,
            Suite::Sequential => throughput::large(arguments)?,
            Suite::Snapshots => snapshots::measure(arguments)?,
            Suite::Chains => chains::measure(arguments)?,
        });
    }
    report::write(&arguments.output, &machine, &present.iter().map(Kind::describe).collect::<Vec<_>>(), &sections)
}

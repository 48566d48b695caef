//! Requests a second of one disk, and their latencies.

use anyhow::Result;
use serde::Serialize;
use serde_json::to_value;
use snapfence_benches::load::{Job, Pattern, Size, run};
use snapfence_benches::machine::{on_processor, stolen};
use snapfence_benches::statistics::{Ratio, median, ratio};

use super::contestant::{self, Contestant, Kind};
use super::report::{Axis, Part, Plot, Section};
use super::{Arguments, Medium};

/// Those at which latencies are told.
const PERCENTILES: [f64; 7] = [50.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99];

/// What is asked of a disk: a name for it, which requests, of how many bytes, and how many at a time.
type Load = (&'static str, Pattern, u64, usize);

const SMALL: [Load; 4] = [
    ("random reads of 4 KiB", Pattern::RandRead, 4 << 10, 1),
    ("random reads of 4 KiB", Pattern::RandRead, 4 << 10, 32),
    ("random writes of 4 KiB", Pattern::RandWrite, 4 << 10, 1),
    ("random writes of 4 KiB", Pattern::RandWrite, 4 << 10, 32),
];
const LARGE: [Load; 4] = [
    ("reads of 128 KiB in order", Pattern::Read, 128 << 10, 8),
    ("writes of 128 KiB in order", Pattern::Write, 128 << 10, 8),
    ("reads of 1 MiB in order", Pattern::Read, 1 << 20, 8),
    ("writes of 1 MiB in order", Pattern::Write, 1 << 20, 8),
];

/// One contestant in one cell.
#[derive(Debug, Serialize)]
struct Entry {
    contestant: &'static str,
    /// Requests a second, the median of the blocks.
    iops: f64,
    /// Percentiles and latencies in microseconds, medians of the blocks.
    latencies_us: Vec<(f64, f64)>,
    /// Processor time of the server for each request in microseconds, the median; none for plain io_uring, which has no server.
    cpu_us: Option<f64>,
    /// Requests a second of snapfence divided by these.
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
    bs: u64,
    iodepth: usize,
    entries: Vec<Entry>,
}

/// What one block has shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    iops: f64,
    latencies_us: [f64; PERCENTILES.len()],
    cpu_us: Option<f64>,
    is_disturbed: bool,
}

/// Small requests at random, to raw and qcow2 images, on both media.
pub(super) fn small(arguments: &Arguments) -> Result<Section> {
    measure_all(arguments, "throughput", "Small requests", &SMALL)
}

/// Large requests in order.
pub(super) fn large(arguments: &Arguments) -> Result<Section> {
    measure_all(arguments, "sequential", "Large requests", &LARGE)
}

fn measure_all(arguments: &Arguments, name: &'static str, title: &'static str, loads: &[Load]) -> Result<Section> {
    let (mut cells, mut parts) = (Vec::new(), Vec::new());
    for medium in Medium::ALL {
        for image in ["raw", "qcow2"] {
            let folder = tempfile::tempdir_in(medium.folder())?;
            // Plain io_uring knows no formats.
            let kinds: Vec<Kind> = contestant::present().into_iter().filter(|kind| image == "raw" || *kind != Kind::IoUring).collect();
            let contestants = Contestant::start_all(&kinds, folder.path(), image, arguments.size.0)?;
            for &(what, rw, bs, iodepth) in loads {
                let cell = measure(arguments, &contestants, medium, image, (rw, bs, iodepth))?;
                let part = show(&cell, format!("{what}, {iodepth} at a time, {image} {medium}"));
                part.print();
                parts.push(part);
                cells.push(cell);
            }
            for contestant in contestants {
                contestant.stop()?;
            }
        }
    }
    let method = format!(
        "One disk of {} bytes, all allocated, one queue. {} blocks of {} s for each contestant, in turns, forwards and backwards; medians of the \
         blocks, ratios of medians with intervals in which 95 of 100 resamplings have them. The load generator has the first processor, servers \
         the second.",
        arguments.size, arguments.blocks, arguments.seconds
    );
    Ok(Section { name, title, method, parts, figures: to_value(&cells)? })
}

/// A job of one queue in a closed loop.
pub(super) fn job(arguments: &Arguments, rw: Pattern, bs: u64, iodepth: usize) -> Job {
    Job {
        rw,
        bs: Size(bs),
        iodepth,
        queues: 1,
        rate_iops: None,
        runtime: arguments.seconds,
        ramp_time: 0.2,
        size: None,
        hipri: false,
        randseed: 1,
    }
}

fn measure(
    arguments: &Arguments,
    contestants: &[Contestant],
    medium: Medium,
    image: &'static str,
    (rw, bs, iodepth): (Pattern, u64, usize),
) -> Result<Cell> {
    let blocks = in_turns(arguments.blocks, contestants.len(), |round, index| {
        block(&contestants[index], &Job { randseed: round as u64 + 1, ..job(arguments, rw, bs, iodepth) })
    })?;
    let kept: Vec<Vec<Block>> = blocks.iter().map(|all| undisturbed(all)).collect();
    let of = |blocks: &[Block], value: &dyn Fn(&Block) -> f64| median(&blocks.iter().map(value).collect::<Vec<_>>());
    let ours: Vec<f64> = kept[0].iter().map(|block| block.iops).collect();
    let entries = contestants
        .iter()
        .zip(&kept)
        .zip(&blocks)
        .map(|((contestant, kept), all)| Entry {
            contestant: contestant.kind().name(),
            iops: of(kept, &|block| block.iops),
            latencies_us: (0..).zip(PERCENTILES).map(|(at, percentile)| (percentile, of(kept, &|block| block.latencies_us[at]))).collect(),
            cpu_us: kept.iter().all(|block| block.cpu_us.is_some()).then(|| of(kept, &|block| block.cpu_us.unwrap_or(0.0))),
            snapfence_ratio: (contestant.kind() != contestants[0].kind())
                .then(|| ratio(&ours, &kept.iter().map(|block| block.iops).collect::<Vec<_>>())),
            blocks: kept.len(),
            disturbed: all.iter().filter(|block| block.is_disturbed).count(),
        })
        .collect();
    Ok(Cell { medium, image, rw, bs, iodepth, entries })
}

/// Does something `rounds` times for each of several, forwards and backwards in turn (A B C C B A ...), so that what the machine does meanwhile hits
/// all alike. What came of it, for each.
pub(super) fn in_turns<T>(rounds: usize, several: usize, mut work: impl FnMut(usize, usize) -> Result<T>) -> Result<Vec<Vec<T>>> {
    let mut outcomes: Vec<Vec<T>> = (0..several).map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for place in 0..several {
            let index = if round % 2 == 1 { several - 1 - place } else { place };
            outcomes[index].push(work(round, index)?);
        }
    }
    Ok(outcomes)
}

/// The blocks in which nobody took the processors away; all of them, if hardly any is left.
fn undisturbed(blocks: &[Block]) -> Vec<Block> {
    let kept: Vec<Block> = blocks.iter().filter(|block| !block.is_disturbed).copied().collect();
    if kept.len() * 2 < blocks.len() { blocks.to_vec() } else { kept }
}

/// Requests a second, the median of the blocks that count.
pub(super) fn median_iops(blocks: &[Block]) -> f64 {
    median(&undisturbed(blocks).iter().map(|block| block.iops).collect::<Vec<_>>())
}

/// Measures one block.
pub(super) fn block(contestant: &Contestant, job: &Job) -> Result<Block> {
    let (before, stolen_before) = (contestant.cpu_time()?, stolen()?);
    let report = on_processor(0, || run(contestant.target(), job, false))?;
    let (after, stolen) = (contestant.cpu_time()?, stolen()? - stolen_before);
    // The ramp's requests have taken their share of the time, too.
    let share = job.runtime / (job.runtime + job.ramp_time);
    let cpu_us = before.zip(after).map(|(before, after)| (after - before).as_secs_f64() * 1e6 * share / report.requests() as f64);
    let latencies_us = PERCENTILES.map(|percentile| report.latency(percentile).as_secs_f64() * 1e6);
    let is_disturbed = stolen.as_secs_f64() > 0.01 * (job.runtime + job.ramp_time);
    Ok(Block { iops: report.iops(), latencies_us, cpu_us, is_disturbed })
}

fn show(cell: &Cell, title: String) -> Part {
    let row = |entry: &Entry| {
        let latency = |percentile| {
            let found = entry.latencies_us.iter().find(|(at, _)| *at == percentile);
            found.map_or_else(String::new, |(_, us)| format!("{us:.1}"))
        };
        vec![
            entry.contestant.to_owned(),
            format!("{:.0}", entry.iops),
            latency(50.0),
            latency(99.0),
            entry.cpu_us.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.2}")),
            entry.snapfence_ratio.map_or_else(String::new, |ratio| ratio.to_string()),
            format!("{} ({})", entry.blocks, entry.disturbed),
        ]
    };
    let bars = cell.entries.iter().map(|entry| (entry.contestant.to_owned(), entry.iops)).collect();
    let curves = cell.entries.iter().map(|entry| (entry.contestant.to_owned(), nines(&entry.latencies_us))).collect();
    Part {
        title,
        head: vec!["", "requests/s", "p50 \u{b5}s", "p99 \u{b5}s", "CPU \u{b5}s a request", "snapfence is", "blocks (disturbed)"],
        rows: cell.entries.iter().map(row).collect(),
        plots: vec![
            Plot::Bars { unit: "/s", bars },
            Plot::Lines {
                x: Axis { name: "one request of so many takes longer", is_logarithmic: true },
                y: Axis { name: "latency, \u{b5}s", is_logarithmic: true },
                lines: curves,
            },
        ],
    }
}

/// Percentiles as "one of so many is above", which spreads the high ones.
fn nines(latencies: &[(f64, f64)]) -> Vec<(f64, f64)> {
    latencies.iter().map(|(percentile, latency)| (100.0 / (100.0 - percentile), *latency)).collect()
}

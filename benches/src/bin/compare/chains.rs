//! Chains of different depths: requests a second, memory, and the time from the start of the server to the first answer.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use serde_json::{json, to_value};
use snapfence_benches::chain;
use snapfence_benches::load::{Job, Pattern, Size, run};
use snapfence_benches::machine::{disk_folder, on_processor};
use snapfence_benches::statistics::median;
use snapfence_image_format::storage::uring::Reactor;

use super::Arguments;
use super::contestant::{self, Contestant, Disk, Kind, image, overlay};
use super::report::{Axis, Part, Plot, Section};
use super::throughput::{block, in_turns, job, median_iops};

/// Deeper ones take qemu-storage-daemon minutes to open, or end it.
const DEEPEST_OF_QSD: usize = 400;
/// The large chain that is opened: its layers, and bytes of its disk.
const LARGE_LAYERS: usize = 1000;
const LARGE_BYTES: u64 = 1 << 40;
const WRITTEN_BYTES: u64 = 1 << 30;
const STARTS: usize = 5;

#[derive(Debug, Serialize)]
struct Entry {
    contestant: &'static str,
    depth: usize,
    /// Requests a second, medians of the blocks.
    reads: f64,
    writes: f64,
    resident_mib: f64,
}

pub(super) fn measure(arguments: &Arguments) -> Result<Section> {
    let kinds = contestant::present_with_control();
    let mut entries = Vec::new();
    for &depth in &arguments.depths {
        let kinds: Vec<Kind> = kinds.iter().copied().filter(|kind| *kind != Kind::Qsd || depth <= DEEPEST_OF_QSD).collect();
        entries.extend(at_depth(arguments, &kinds, depth)?);
    }
    let part = show(&entries);
    part.print();
    let (large, starts) = start_of_large_chain(arguments)?;
    large.print();
    let method = format!(
        "In memory, a chain of a raw base with all of its {} and overlays with 64 blocks each; reads and writes of 4 KiB at random, 32 at a time, {} \
         blocks of {} s in turns, medians. Before the writes all of the disk was written in order for two seconds. Memory is what the server has \
         resident after the reads.",
        arguments.size, arguments.blocks, arguments.seconds
    );
    let figures = json!({ "depths": to_value(&entries)?, "first_answer_ms": starts });
    Ok(Section { name: "chains", title: "Chains", method, parts: vec![part, large], figures })
}

fn at_depth(arguments: &Arguments, kinds: &[Kind], depth: usize) -> Result<Vec<Entry>> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let bytes = arguments.size.0;
    std::fs::rename(image(folder.path(), "raw", bytes)?, chain::layer_path(folder.path(), 0))?;
    // All but the top, which is each one's own.
    let shared = folder.path().to_owned();
    Reactor::new(64)?.block_on(async move { chain::make(&shared, 1..depth.saturating_sub(1).max(1), bytes, bytes).await })??;
    let contestants = kinds.iter().map(|kind| with_top(*kind, folder.path(), depth, bytes)).collect::<Result<Vec<_>>>()?;
    let measured = |rw| -> Result<Vec<f64>> {
        let blocks = in_turns(arguments.blocks, contestants.len(), |round, index| {
            block(&contestants[index], &Job { randseed: round as u64 + 1, ..job(arguments, rw, 4096, 32) })
        })?;
        Ok(blocks.iter().map(|all| median_iops(all)).collect())
    };
    let reads = measured(Pattern::RandRead)?;
    let resident = contestants.iter().map(Contestant::resident).collect::<Result<Vec<_>>>()?;
    for contestant in &contestants {
        let fill = Job { runtime: 2.0, ..job(arguments, Pattern::Write, 1 << 20, 4) };
        on_processor(0, || run(contestant.target(), &fill, false))?;
    }
    let writes = measured(Pattern::RandWrite)?;
    let entries = contestants.iter().zip(reads).zip(writes).zip(resident).map(|(((contestant, reads), writes), resident)| Entry {
        contestant: contestant.kind().name(),
        depth,
        reads,
        writes,
        resident_mib: resident.unwrap_or(0) as f64 / f64::from(1 << 20),
    });
    let entries = entries.collect();
    contestants.into_iter().try_for_each(Contestant::stop)?;
    Ok(entries)
}

/// Lets somebody serve a chain of `depth` layers, of which all but the top are there.
fn with_top(kind: Kind, folder: &Path, depth: usize, bytes: u64) -> Result<Contestant> {
    let own = folder.join(kind.folder());
    std::fs::create_dir(&own)?;
    let image = if depth == 1 {
        image(&own, "qcow2", bytes)?
    } else {
        let (top, below) = (folder.join(format!("top-{}.qcow2", kind.folder())), chain::layer_path(folder, depth - 2));
        overlay(&top, &below, Some(bytes))?;
        top
    };
    Contestant::serve(kind, &own, &[Disk { image, format: "qcow2" }], true)
}

/// How long it takes from the start of snapfenced to the first answer, with a chain of a thousand layers: cold, with nothing of it in memory, and warm.
fn start_of_large_chain(arguments: &Arguments) -> Result<(Part, serde_json::Value)> {
    let folder = tempfile::tempdir_in(disk_folder())?;
    let shared = folder.path().to_owned();
    Reactor::new(64)?.block_on(async move { chain::make(&shared, 0..LARGE_LAYERS, LARGE_BYTES, WRITTEN_BYTES).await })??;
    let top = chain::layer_path(folder.path(), LARGE_LAYERS - 1);
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for number in 0..STARTS {
        if drop_caches().is_ok() {
            cold.push(first_answer(arguments, folder.path(), &top, number * 2)?);
        }
        warm.push(first_answer(arguments, folder.path(), &top, number * 2 + 1)?);
    }
    let shown = |times: &[f64]| if times.is_empty() { "only root can tell".to_owned() } else { format!("{:.0}", median(times)) };
    let part = Part {
        title: format!("From the start of snapfenced to the first answer, {LARGE_LAYERS} layers of a disk of 1 TiB"),
        head: vec!["", "ms, median", "starts"],
        rows: [("nothing in memory", &cold), ("files in the page cache", &warm)]
            .map(|(what, times)| vec![what.to_owned(), shown(times), times.len().to_string()])
            .to_vec(),
        plots: Vec::new(),
    };
    Ok((part, json!({ "cold": cold, "warm": warm })))
}

/// Milliseconds from the start to the answer to one read.
fn first_answer(arguments: &Arguments, folder: &Path, top: &Path, number: usize) -> Result<f64> {
    let own = folder.join(format!("start-{number}"));
    std::fs::create_dir(&own)?;
    let began = Instant::now();
    let contestant = Contestant::serve(Kind::Snapfence, &own, &[Disk { image: top.to_owned(), format: "qcow2" }], true)?;
    let one = Job {
        runtime: 1e-4,
        ramp_time: 0.0,
        size: Some(Size(WRITTEN_BYTES)),
        randseed: number as u64 + 1,
        ..job(arguments, Pattern::RandRead, 4096, 1)
    };
    run(contestant.target(), &one, false)?;
    let took = began.elapsed();
    contestant.stop()?;
    Ok(took.as_secs_f64() * 1e3)
}

/// Makes the system forget what it has of files.
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    Ok(std::fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn show(entries: &[Entry]) -> Part {
    let names: Vec<&str> = entries.iter().fold(Vec::new(), |mut names, entry| {
        if !names.contains(&entry.contestant) {
            names.push(entry.contestant);
        }
        names
    });
    let lines = |what: &str, value: fn(&Entry) -> f64| -> Vec<(String, Vec<(f64, f64)>)> {
        let of =
            |name: &str| entries.iter().filter(|entry| entry.contestant == name).map(|entry| (entry.depth as f64, value(entry))).collect();
        names.iter().map(|name| (format!("{name}, {what}"), of(name))).collect()
    };
    let row = |entry: &Entry| {
        vec![
            entry.contestant.to_owned(),
            entry.depth.to_string(),
            format!("{:.0}", entry.reads),
            format!("{:.0}", entry.writes),
            format!("{:.1}", entry.resident_mib),
        ]
    };
    Part {
        title: "Requests a second at different depths".to_owned(),
        head: vec!["", "layers", "reads/s", "writes/s", "memory, MiB"],
        rows: entries.iter().map(row).collect(),
        plots: vec![Plot::Lines {
            x: Axis { name: "layers", is_logarithmic: true },
            y: Axis { name: "requests a second", is_logarithmic: true },
            lines: [lines("reads", |entry| entry.reads), lines("writes", |entry| entry.writes)].concat(),
        }],
    }
}

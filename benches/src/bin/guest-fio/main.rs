//! fio in a real guest, on three disks at once: snapfenced beside qemu-storage-daemon.
//!
//! Each side serves copies of the same images to a guest of its own; both guests run all the time, and fio works in one of them at a time, in
//! short blocks A B B A, so that what the machine does meanwhile hits both alike. Then snapfence alone, with a snapshot of the three disks as one
//! group in the midst of a block and without; last, what is written is read back and compared.
//!
//! What would make it wrong: a guest that is emulated spends most of a request's time in its own processors, so that ratios come out nearer to 1
//! than they are; the report says what made the processors.

mod disks;
mod fio;
mod jobs;
mod page;
mod report;
mod side;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use snapfence_benches::machine::{Machine, stolen};
use snapfence_tests::backend::{Kind, program};
use snapfence_tests::tools;

use crate::jobs::{Job, Jobs};
use crate::report::{Check, Measured, Report, Setup, Snapshots, Turn, medians, rows};
use crate::side::{Side, Times};

const QSD: &str = "qemu-storage-daemon";
/// More stolen time than this share of a turn spoils it.
const STOLEN: f64 = 0.01;

/// Runs fio in guests on disks of snapfenced and of qemu-storage-daemon in turns, and writes a report
#[derive(Debug, Parser)]
#[command(name = "guest-fio", version)]
struct Arguments {
    /// Blocks of each side for each job
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    blocks: u32,
    /// Seconds of each block
    #[arg(long, default_value_t = 3, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// What each block does before it counts, in milliseconds
    #[arg(long, default_value_t = 500, value_name = "MS")]
    ramp_ms: u32,
    /// Size of each disk, in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(32..=65536))]
    disk_mib: u64,
    /// Virtqueues of each disk
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: u16,
    /// A job file to run, without its ending, for example randread-4k-qd32; may be given several times [default: all]
    #[arg(long, value_name = "JOB")]
    only: Vec<String>,
    /// The job with and without a snapshot in its midst
    #[arg(long, default_value = "randrw-4k-qd32", value_name = "JOB")]
    snapshot_job: String,
    /// Folder of the job files
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/fio/guest"), value_name = "DIR")]
    jobs: PathBuf,
    /// Folder for the images, which are removed at the end [default: that for temporary files]
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Where the report goes: guest-fio.json and guest-fio.html
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-fio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(arguments: &Arguments) -> Result<()> {
    let mut only = arguments.only.clone();
    let jobs = Jobs::read(&arguments.jobs, &only)?;
    only.push(arguments.snapshot_job.clone());
    Jobs::read(&arguments.jobs, &only).context("the job with a snapshot")?;
    let folder = arguments.images.clone().unwrap_or_else(std::env::temp_dir);
    let images = tempfile::Builder::new().prefix("snapfence-guest-fio-images.").tempdir_in(&folder)?;
    let mut sides = start(arguments, images.path(), &jobs)?;
    let setup = setup(arguments, &folder, &sides)?;
    println!("guest processors by {}; {}; {}; {}", setup.accelerator, setup.snapfenced, setup.qemu, setup.guest);
    match &setup.qemu_storage_daemon {
        Some(version) => println!("beside it: {version}"),
        None => println!("{QSD} is missing: snapfence alone, nothing to compare it with"),
    }
    println!(
        "{} blocks of {} s of each side for each job, three disks at once: {}",
        arguments.blocks,
        arguments.seconds,
        setup.disks.join("; ")
    );
    let mut report = Report { setup, measured: Vec::new(), snapshots: None, checks: Vec::new() };
    for job in jobs.jobs.iter().filter(|job| job.is_timed) {
        let measured = measure(arguments, &sides, job)?;
        print(&measured);
        report.measured.push(measured);
    }
    let snapshots = snapshots(arguments, &mut sides[0])?;
    print_snapshots(&snapshots);
    report.snapshots = Some(snapshots);
    for job in jobs.jobs.iter().filter(|job| !job.is_timed) {
        for side in &sides {
            let error = side.run(&job.name).err().map(|error| format!("{error:#}"));
            println!("{} with {}: {}", job.name, side.name, error.as_deref().unwrap_or("held"));
            report.checks.push(Check { job: job.name.clone(), side: side.name.to_owned(), error });
        }
    }
    for side in sides {
        side.stop()?;
    }
    write(&arguments.output, &report)?;
    if let Some(check) = report.checks.iter().find(|check| check.error.is_some()) {
        bail!("{} failed with {}", check.job, check.side);
    }
    Ok(())
}

/// Makes the images and boots both guests, ours first; ours alone where there is no other daemon.
fn start(arguments: &Arguments, images: &Path, jobs: &Jobs) -> Result<Vec<Side>> {
    let made = images.join("made");
    std::fs::create_dir(&made)?;
    disks::make(&made, arguments.disk_mib)?;
    let times = Times { seconds: arguments.seconds, ramp_ms: arguments.ramp_ms };
    let kinds = [("snapfence", Some(Kind::Snapfenced)), (QSD, qsd_version().is_some().then_some(Kind::QemuStorageDaemonThreads))];
    let sides = kinds
        .into_iter()
        .filter_map(|(name, kind)| Some((name, kind?)))
        .map(|(name, kind)| Side::start(name, kind, &made, &images.join(name), arguments.queues, jobs, times))
        .collect::<Result<_>>()?;
    std::fs::remove_dir_all(made)?;
    Ok(sides)
}

fn setup(arguments: &Arguments, folder: &Path, sides: &[Side]) -> Result<Setup> {
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let snapfenced = program("snapfenced")?;
    let snapfenced = snapfenced.to_str().context("the path of snapfenced is not UTF-8")?;
    let file_system = tools::run("findmnt", ["-n".as_ref(), "-o".as_ref(), "FSTYPE".as_ref(), "-T".as_ref(), folder.as_os_str()])?;
    let machine = Machine::examine()?;
    Ok(Setup {
        accelerator: sides[0].guest().accelerator().name(),
        processors: machine.processors,
        host_kernel: machine.kernel,
        guest: sides[0].ask("echo Linux $(uname -r), $(fio --version), $(nproc) processors")?,
        qemu: first_line(tools::run("qemu-system-x86_64", ["--version"])?),
        snapfenced: first_line(tools::run(snapfenced, ["--version"])?),
        qemu_storage_daemon: qsd_version(),
        file_system: first_line(file_system),
        disks: disks::DISKS.map(|(name, what)| format!("{name} {what}")).to_vec(),
        disk_mib: arguments.disk_mib,
        queues: arguments.queues,
        block_seconds: arguments.seconds,
        blocks: arguments.blocks as usize,
    })
}

fn qsd_version() -> Option<String> {
    tools::run(QSD, ["--version"]).ok()?.lines().next().map(str::to_owned)
}

/// Lets all sides do the job in turns.
fn measure(arguments: &Arguments, sides: &[Side], job: &Job) -> Result<Measured> {
    let mut turns: Vec<(Turn, bool)> = Vec::new();
    for number in 0..arguments.blocks {
        let mut order: Vec<usize> = (0..sides.len()).collect();
        if number % 2 == 1 {
            order.reverse();
        }
        let (mut turn, stolen_before) = (vec![Vec::new(); sides.len()], stolen()?);
        for side in order {
            turn[side] = sides[side].run(&job.name)?;
        }
        let share = (stolen()? - stolen_before).as_secs_f64() / (f64::from(arguments.seconds) * sides.len() as f64);
        turns.push((turn, share > STOLEN));
    }
    let disturbed = turns.iter().filter(|(_, is_disturbed)| *is_disturbed).count();
    // Where most are disturbed, dropping them would leave nothing to judge by.
    let drops = disturbed * 2 < turns.len();
    let kept: Vec<Turn> = turns.into_iter().filter(|(_, is_disturbed)| !(drops && *is_disturbed)).map(|(turn, _)| turn).collect();
    let dropped = arguments.blocks as usize - kept.len();
    let rows = rows(&kept, &disks::DISKS.map(|(name, _)| name));
    Ok(Measured { job: job.name.clone(), what: job.what.clone(), turns: kept.len(), dropped, rows })
}

/// Our side with a snapshot and without, in turns.
fn snapshots(arguments: &Arguments, side: &mut Side) -> Result<Snapshots> {
    let job = &arguments.snapshot_job;
    let (mut with, mut without, mut held_us) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..arguments.blocks * 2 {
        // Without, with, with, without.
        if number % 4 == 0 || number % 4 == 3 {
            without.push(side.run(job)?[0]);
        } else {
            let (figures, snapshot) = side.run_with_snapshot(job)?;
            ensure!(snapshot.state == "frozen", "a snapshot is {}", snapshot.state);
            held_us.push(snapshot.stall_us());
            with.push(figures[0]);
        }
    }
    Ok(Snapshots {
        job: job.clone(),
        longest_with_us: with.iter().map(|figures| figures.longest_us).collect(),
        longest_without_us: without.iter().map(|figures| figures.longest_us).collect(),
        with: medians(&with),
        without: medians(&without),
        held_us,
    })
}

fn print(measured: &Measured) {
    println!("\n{}: {}", measured.job, measured.what);
    println!("  {:<4} {:<20} {:>10} {:>8} {:>9} {:>9} {:>10}", "", "", "requests/s", "MiB/s", "p50 us", "p99 us", "longest us");
    for row in &measured.rows {
        let sides = [("snapfence", Some(row.snapfence)), (QSD, row.qemu_storage_daemon)];
        for (name, figures) in sides.into_iter().filter_map(|(name, figures)| Some((name, figures?))) {
            let flush = figures.flush_p50_us.map_or_else(String::new, |us| format!("  flush p50 {us:.0} us"));
            println!(
                "  {:<4} {name:<20} {:>10.0} {:>8.1} {:>9.0} {:>9.0} {:>10.0}{flush}",
                row.disk, figures.iops, figures.mib_per_second, figures.p50_us, figures.p99_us, figures.longest_us
            );
        }
        if let Some((iops, (p50, p99))) = row.iops_ratio.zip(row.p50_ratio.zip(row.p99_ratio)) {
            let (low, high) = (iops.lowest, iops.highest);
            println!(
                "  {:<4} {:<20} {:>10.2} {:>8} {:>9.2} {:>9.2}  ({low:.2} to {high:.2} requests/s)",
                row.disk, "ratio", iops.median, "", p50.median, p99.median
            );
        }
    }
    if measured.dropped > 0 {
        println!("  {} of {} turns were disturbed and dropped", measured.dropped, measured.turns + measured.dropped);
    }
}

fn print_snapshots(snapshots: &Snapshots) {
    println!("\n{} with a group snapshot of the three disks in its midst, and without (snapfence):", snapshots.job);
    for (name, figures, longest) in
        [("with", snapshots.with, &snapshots.longest_with_us), ("without", snapshots.without, &snapshots.longest_without_us)]
    {
        let longest: Vec<String> = longest.iter().map(|us| format!("{us:.0}")).collect();
        println!(
            "  {name:<8} {:>10.0} requests/s, p50 {:.0} us, p99 {:.0} us, longest {} us",
            figures.iops,
            figures.p50_us,
            figures.p99_us,
            longest.join(", ")
        );
    }
    println!("  longest completion held by the daemon: {:?} us", snapshots.held_us);
}

fn write(folder: &Path, report: &Report) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, text) in [("guest-fio.json", serde_json::to_string_pretty(report)? + "\n"), ("guest-fio.html", page::page(report))] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

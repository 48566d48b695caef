//! The demo: a guest boots from a stack of images, writes to three disks, and is snapshotted live twenty times; then every snapshot is verified.
//!
//! It shows what happens as it happens, and ends with a table and a plot. Its status is 0 only if everything held.

mod disks;
mod plot;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use snapfence_tests::backend::{Backend, Kind, Snapshot};
use snapfence_tests::guest::{Config, Counters, Guest, Progress, Region};

use crate::disks::{DISKS, KNOWN_FILE, KNOWN_SCRIPT, LAYOUT};

/// A script gets this long in an emulated guest on a busy machine.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(120);
/// The guest reports its progress this often.
const REPORT_EVERY: Duration = Duration::from_millis(200);
/// Files in use while the snapshots are taken: eight on each disk, written anew and fsynced in turn.
const FILE_WORK: &str = "touch /run/busy; (n=0; while [ -e /run/busy ]; do for at in /srv /mnt/b /mnt/c; do \
    dd if=/dev/urandom of=$at/work.$((n % 8)) bs=32k count=4 conv=fsync; done; n=$((n + 1)); sleep 0.2; done) >/dev/null 2>&1 &";

/// Boots a guest from snapfence stacks, snapshots its disks live as one group, and verifies every snapshot.
#[derive(Parser)]
#[command(name = "snapfence-demo", version)]
struct Arguments {
    /// Folder for images, logs and the plot; what an earlier run left there is removed
    #[arg(long, default_value = "target/demo", value_name = "DIR")]
    output: PathBuf,
    /// Number of group snapshots
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    snapshots: u32,
    /// Time between two snapshots, in milliseconds
    #[arg(long, default_value_t = 700, value_name = "MS")]
    pause_ms: u64,
    /// The daemon behind the disks: snapfenced, or qsd (QEMU's, to compare)
    #[arg(long, default_value = "snapfenced", value_name = "NAME")]
    backend: Kind,
}

/// A snapshot, and what the guest had written before it was asked for and after it was done.
pub(crate) struct Taken {
    pub(crate) snapshot: Snapshot,
    pub(crate) before: Vec<u64>,
    pub(crate) after: Vec<u64>,
    /// When it was asked for and when it was done, since the guest began to write, by the guest's clock.
    pub(crate) asked: Duration,
    pub(crate) at: Duration,
    /// The guest's slowest request around the time it was taken, as the guest measured it.
    pub(crate) slowest_us: u64,
    /// Of each frozen layer, right after it was reported frozen.
    pub(crate) stamps: Vec<verify::Stamp>,
}

impl Taken {
    /// Microseconds from the first to the last queue that wrote to the overlays.
    pub(crate) fn switch_us(&self) -> u64 {
        self.snapshot.devices.iter().map(|device| device.switch_us).max().unwrap_or(0)
    }
}

fn main() -> ExitCode {
    match demo(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(arguments: &Arguments) -> Result<()> {
    let begun = Instant::now();
    let output = &arguments.output;
    let images = output.join("images");
    if images.exists() {
        fs::remove_dir_all(&images).with_context(|| format!("cannot empty {}", images.display()))?;
    }
    fs::create_dir_all(&images)?;
    let images = images.canonicalize()?;
    // Socket paths are short by nature, so sockets and what lies beside them go to the system's folder for such things.
    let run = tempfile::Builder::new().prefix("snapfence-demo.").tempdir()?;
    let outcome = act(arguments, &images, run.path());
    for log in ["backend.log", "console.log", "qemu.log"] {
        // A log is missing if its program never started.
        let _ = fs::copy(run.path().join(log), output.join(log));
    }
    match &outcome {
        Ok(()) => println!("\nDone in {:.0} s.", begun.elapsed().as_secs_f64()),
        Err(_) => eprintln!("\nImages and logs are in {}.", output.display()),
    }
    outcome
}

fn act(arguments: &Arguments, images: &Path, run: &Path) -> Result<()> {
    heading("Three disks");
    let devices = disks::make(images, run)?;
    for (disk, device) in DISKS.iter().zip(&devices) {
        println!("  {}  {:28} {}", device.name, disk.what, device.image.display());
    }

    heading("A guest boots from them");
    let mut backend = Backend::launch(arguments.backend, run, &devices)?;
    let config = Config {
        disks: devices.iter().map(|device| snapfence_tests::guest::Disk::new(&device.socket, device.queues)).collect(),
        root: Some("/dev/vda".to_owned()),
        ..Config::default()
    };
    let booting = Instant::now();
    let guest = Guest::boot(&config, run)?;
    let (ready, by) = (guest.ready(), guest.accelerator().name());
    println!("  {} processors by {by}, / on {}, up after {:.1} s", config.cpus, ready.root, booting.elapsed().as_secs_f64());
    ensure!(ready.root == "/dev/vda", "the guest did not boot from its first disk");
    let kernel = guest.run("uname -sr; . /etc/os-release; echo $PRETTY_NAME", SCRIPT_DEADLINE)?;
    println!("  {}", kernel.trim().replace('\n', ", "));
    disks::check_deep_data(&guest, run)?;
    println!("  /dev/vdc reads the same through {} layers in the guest as with qemu-img", disks::DEPTH);
    for disk in DISKS.iter().filter(|disk| disk.mount != "/") {
        let (path, mount, mib) = (disk.path, disk.mount, disk.file_system_bytes >> 20);
        guest.run(&format!("mkfs.ext4 -q -F {path} {mib}m && mkdir -p {mount} && mount {path} {mount}"), SCRIPT_DEADLINE)?;
    }
    for disk in &DISKS {
        let known = format!("{}/{KNOWN_FILE}", disk.mount.trim_end_matches('/'));
        guest.run(&format!("mkdir -p $(dirname {known}) && {KNOWN_SCRIPT} >{known} && sync"), SCRIPT_DEADLINE)?;
    }
    println!("  file systems made, files written");
    show_stacks(&backend, &devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>())?;

    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    heading(&format!("{} group snapshots while it writes", arguments.snapshots));
    println!("  {} chains write ordered counters across the {} disks; files are rewritten on all of them", LAYOUT.chains, DISKS.len());
    let regions = DISKS.iter().map(|disk| Region { path: disk.path.to_owned(), offset: disk.counters_at }).collect();
    let report_every_ms = u64::try_from(REPORT_EVERY.as_millis())?;
    guest.start_counters(&Counters { devices: regions, layout: LAYOUT, flush_every: 32, report_every_ms })?;
    guest.run(FILE_WORK, SCRIPT_DEADLINE)?;
    let (taken, history) = snapshots(arguments, &mut backend, &guest, &names)?;
    let total = guest.stop_counters()?;
    guest.run("rm -f /run/busy", SCRIPT_DEADLINE)?;
    show_stacks(&backend, &names)?;

    heading("Verification");
    let mut verdicts = verify::guest_side(&guest, &total)?;
    guest.power_off()?;
    backend.stop()?;
    let (rows, mut of_snapshots) = verify::snapshots(images, &taken)?;
    verdicts.append(&mut of_snapshots);
    verdicts.push(verify::images(images)?);

    let plot = arguments.output.join("stall.svg");
    fs::write(&plot, plot::stalls(&taken, &history, by))?;
    verify::print_table(&taken, &rows);
    println!();
    for verdict in &verdicts {
        println!("  {verdict}");
    }
    let stalls: Vec<u64> = taken.iter().map(|taken| taken.snapshot.stall_us()).collect();
    let (middle, longest) = (median(&stalls), stalls.iter().max().copied().unwrap_or(0));
    println!("\n  stall per snapshot: median {middle} µs, longest {longest} µs");
    let (with, without) = with_and_without(&taken, &history);
    println!(
        "  slowest request per {} ms as the guest saw it: median {with:.1} ms with a snapshot, {without:.1} ms without",
        REPORT_EVERY.as_millis()
    );
    println!("  plot: {}", plot.display());
    if verdicts.iter().any(|verdict| !verdict.held()) {
        bail!("not everything held, see above");
    }
    Ok(())
}

/// Takes the snapshots one after the other and says how each went. Returns them and the guest's own reports.
fn snapshots(arguments: &Arguments, backend: &mut Backend, guest: &Guest, names: &[&str]) -> Result<(Vec<Taken>, Vec<Progress>)> {
    let mut taken = Vec::new();
    let mut history: Vec<Progress> = Vec::new();
    let begun = Instant::now();
    for number in 1..=arguments.snapshots {
        std::thread::sleep(Duration::from_millis(arguments.pause_ms));
        let name = format!("demo{number:02}");
        let before = guest.progress()?;
        let snapshot = backend.snapshot(&name, names)?;
        let after = guest.progress()?;
        ensure!(snapshot.state == "frozen", "snapshot {name} is {}", snapshot.state);
        ensure!(after.errors.is_empty(), "the guest met errors: {}", after.errors.join("; "));
        let stamps = snapshot.devices.iter().map(|device| verify::Stamp::of(&device.frozen_layer)).collect::<Result<_>>()?;
        history.extend(guest.reports());
        let meanwhile = history.iter().rev().take_while(|report| report.elapsed_ms > before.elapsed_ms).map(|report| report.slowest_us);
        let slowest_us = meanwhile.max().unwrap_or(0).max(after.slowest_us);
        let freeze_us = snapshot.devices.iter().map(|device| device.freeze_us).max().unwrap_or(0);
        println!(
            "  {:5.1} s  {name}  stall {:>5} µs  frozen after {:6.1} ms  guest: counters {:>5}, {:>6} writes, slowest request {:6.1} ms",
            begun.elapsed().as_secs_f64(),
            snapshot.stall_us(),
            ms(freeze_us),
            after.counters.iter().min().copied().unwrap_or(0),
            after.writes,
            ms(slowest_us),
        );
        taken.push(Taken {
            snapshot,
            before: before.counters,
            asked: Duration::from_millis(before.elapsed_ms),
            at: Duration::from_millis(after.elapsed_ms),
            slowest_us,
            after: after.counters,
            stamps,
        });
    }
    std::thread::sleep(Duration::from_millis(arguments.pause_ms));
    history.extend(guest.reports());
    Ok((taken, history))
}

/// The guest's own view: medians of the slowest request of each interval between two of its reports, in milliseconds, for the intervals in which
/// a snapshot was under way and for the others.
fn with_and_without(taken: &[Taken], history: &[Progress]) -> (f64, f64) {
    let (mut with, mut without, mut begun) = (Vec::new(), Vec::new(), Duration::ZERO);
    for report in history {
        let ended = Duration::from_millis(report.elapsed_ms);
        let meanwhile = |taken: &Taken| taken.asked <= ended && begun <= taken.at;
        if taken.iter().any(meanwhile) {
            with.push(report.slowest_us)
        } else {
            without.push(report.slowest_us)
        }
        begun = ended;
    }
    (ms(median(&with)), ms(median(&without)))
}

/// Prints the stacks as trees, the middle of deep ones left out.
fn show_stacks(backend: &Backend, devices: &[&str]) -> Result<()> {
    const HEAD: usize = 3;
    const TAIL: usize = 2;
    println!();
    for device in devices {
        let tree = backend.stack(device)?;
        let lines: Vec<&str> = tree.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            if index < HEAD || index + TAIL >= lines.len() {
                println!("  {}", line.trim_end());
            } else if index == HEAD {
                println!("  {:>1$} ({2} layers more)", "...", index + 3, lines.len() - HEAD - TAIL);
            }
        }
    }
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Microseconds as milliseconds.
pub(crate) fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// The middle value, 0 if there is none.
pub(crate) fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

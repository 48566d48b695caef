//! What a group snapshot does to the requests beside it.
//!
//! In memory that is the cost of what is done for the snapshot; on a disk there are its flushes, too, during which many disks do nothing else.
//! Each disk gets random writes of 4 KiB in an open loop, at half of the rate that the slowest contestant reaches with all disks at once: latencies
//! count from when a request was due, so that a disk that stands still cannot hide it by getting fewer requests. Snapshots of all disks together
//! follow one another at a fixed distance. A window begins with each command; another, long after it, is what the same machine does without.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use rustix::process::{Signal, kill_process};
use serde::Serialize;
use serde_json::{Value, json, to_value};
use snapfence::client::Client;
use snapfence::protocol::{SnapshotCreate, SnapshotMember};
use snapfence_benches::load::{Job, Pattern, Report, run};
use snapfence_benches::machine::{on_processor, settle};
use snapfence_benches::statistics::{median, percentile};
use snapfence_tests::tools;

use super::contestant::{self, Contestant, Disk, Kind};
use super::report::{Axis, Part, Plot, Section};
use super::throughput::{in_turns, job};
use super::{Arguments, Medium};

/// From one command to the next.
const APART: Duration = Duration::from_millis(200);
/// How long a window is, and how long after the command the other one begins.
const WINDOW: Duration = Duration::from_millis(50);
const QUIET_AFTER: Duration = Duration::from_millis(120);
/// The time line shows so much before and after a command.
const BEFORE: Duration = Duration::from_millis(20);
const AFTER: Duration = Duration::from_millis(80);
/// Snapshots before everything is set up anew.
const IN_A_ROW: usize = 20;
/// Requests at a time in the closed loop that finds the rate.
const DEPTH: usize = 8;
/// Most requests at a time in the open loop.
const OPEN_DEPTH: usize = 64;
/// What takes longer than it should by so much has hung.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time before the first snapshot.
const RAMP: Duration = Duration::from_millis(500);

/// How many devices on what.
#[derive(Clone, Copy, Debug)]
struct Place {
    medium: Medium,
    devices: usize,
}

/// What one contestant has shown with a number of devices.
#[derive(Debug, Default, Serialize)]
struct Shown {
    /// By window: the median and the longest latency in microseconds.
    beside: Vec<(f64, f64)>,
    quiet: Vec<(f64, f64)>,
    /// From sending the command to the answer, in microseconds.
    answers_us: Vec<f64>,
    /// Requests that ended in the first half of the time after a command, and in the second.
    ended: (u64, u64),
    /// When a request was due, in milliseconds from a command, and its latency in microseconds.
    #[serde(skip)]
    around: Vec<(f64, f64)>,
}

#[derive(Debug, Serialize)]
struct Point {
    contestant: &'static str,
    medium: Medium,
    devices: usize,
    /// Requests a second of all devices together.
    rate: u64,
    snapshots: usize,
    /// Medians over all windows of their median and of their longest latency, and the longest latency that 99 of 100 windows do not exceed; then the
    /// same of windows without a snapshot. Microseconds.
    beside_us: [f64; 3],
    quiet_us: [f64; 3],
    answer_us: [f64; 2],
    /// Requests that ended in the 100 ms after a command, divided by those in the next 100 ms.
    throughput: f64,
}

pub(super) fn measure(arguments: &Arguments) -> Result<Section> {
    let kinds = contestant::present_with_control();
    let (mut points, mut parts) = (Vec::new(), Vec::new());
    for (medium, &devices) in Medium::ALL.into_iter().flat_map(|medium| arguments.devices.iter().map(move |devices| (medium, devices))) {
        let place = Place { medium, devices };
        let rate = kinds.iter().map(|kind| full_speed(arguments, *kind, place)).collect::<Result<Vec<_>>>()?;
        let rate = rate.into_iter().min().context("snapfence is there")? / 2;
        let rounds = arguments.snapshots.div_ceil(IN_A_ROW);
        let in_a_row = arguments.snapshots.div_ceil(rounds);
        let shown = in_turns(rounds, kinds.len(), |_, index| match round(arguments, kinds[index], place, rate, in_a_row) {
            Err(error) if kinds[index] != Kind::Snapfence => {
                println!("{}, {devices} devices {medium}: {error:#}; that round is left out", kinds[index].name());
                Ok(Shown::default())
            }
            outcome => outcome,
        })?;
        let shown = shown.into_iter().map(|rounds| rounds.into_iter().fold(Shown::default(), Shown::and));
        let shown: Vec<(Kind, Shown)> = kinds.iter().copied().zip(shown).filter(|(_, shown)| !shown.quiet.is_empty()).collect();
        let new: Vec<Point> = shown.iter().map(|(kind, shown)| point(*kind, place, rate, shown)).collect();
        let part = show(place, rate, &new, &shown);
        part.print();
        parts.push(part);
        points.extend(new);
    }
    let method = format!(
        "Random writes of 4 KiB to qcow2 disks of {}, in an open loop at half of the rate that the slowest reaches; group snapshots every {} ms, \
         {} for each number of devices, set up anew after {IN_A_ROW}. A window of {} ms begins with each command, another {} ms later. snapfence makes its \
         overlays as part of the command; qemu-storage-daemon, with its exports on its main loop, gets overlays that were made and opened before, with \
         parts of clusters of 4 KiB as snapfence makes them.",
        arguments.size,
        APART.as_millis(),
        arguments.snapshots,
        WINDOW.as_millis(),
        QUIET_AFTER.as_millis()
    );
    Ok(Section { name: "snapshots", title: "Group snapshots beside writes", method, parts, figures: to_value(&points)? })
}

/// Disks in a folder of their own, and who serves them.
fn set_up(arguments: &Arguments, kind: Kind, place: Place) -> Result<(tempfile::TempDir, Vec<PathBuf>, Contestant)> {
    let folder = tempfile::tempdir_in(place.medium.folder())?;
    let images: Vec<PathBuf> = (0..place.devices).map(|number| folder.path().join(format!("disk{number}.qcow2"))).collect();
    for image in &images {
        let (options, size) = (["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"], arguments.size.to_string());
        tools::qemu_img(options.map(OsStr::new).into_iter().chain([image.as_os_str(), size.as_ref()]))?;
    }
    let disks: Vec<Disk> = images.iter().map(|image| Disk { image: image.clone(), format: "qcow2" }).collect();
    let contestant = Contestant::serve(kind, folder.path(), &disks, false)?;
    Ok((folder, images, contestant))
}

/// Does the same to all disks at once, and something else meanwhile.
fn load<T>(contestant: &Contestant, job: &Job, keeps_log: bool, meanwhile: impl FnOnce() -> Result<T>) -> Result<(Vec<Report>, T)> {
    on_processor(0, || {
        std::thread::scope(|scope| {
            let threads: Vec<_> = contestant
                .targets()
                .iter()
                .zip(1_u64..)
                .map(|(target, randseed)| scope.spawn(move || run(target, &Job { randseed, ..job.clone() }, keeps_log)))
                .collect();
            let outcome = meanwhile();
            let reports = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread has panicked"))?);
            Ok((reports.collect::<Result<Vec<_>>>()?, outcome?))
        })
    })
}

/// Requests a second of all disks together in a closed loop.
fn full_speed(arguments: &Arguments, kind: Kind, place: Place) -> Result<u64> {
    let (folder, _, contestant) = set_up(arguments, kind, place)?;
    settle(folder.path())?;
    let job = job(arguments, Pattern::RandWrite, 4096, DEPTH);
    let (reports, ()) = load(&contestant, &job, false, || Ok(()))?;
    contestant.stop()?;
    Ok(reports.iter().map(Report::iops).sum::<f64>() as u64)
}

fn round(arguments: &Arguments, kind: Kind, place: Place, rate: u64, snapshots: usize) -> Result<Shown> {
    let (folder, images, contestant) = set_up(arguments, kind, place)?;
    let mut taker = Taker::new(kind, &contestant, folder.path(), images, snapshots)?;
    settle(folder.path())?;
    let job = Job {
        rate_iops: Some((rate / place.devices as u64).max(1)),
        runtime: (APART * u32::try_from(snapshots + 1)?).as_secs_f64(),
        ramp_time: RAMP.as_secs_f64(),
        ..job(arguments, Pattern::RandWrite, 4096, OPEN_DEPTH)
    };
    let (reports, commands) = within(&contestant, job.ramp() + job.measured() + PATIENCE, || {
        load(&contestant, &job, true, || {
            let begin = Instant::now() + RAMP + APART / 2;
            (0..snapshots)
                .map(|number| {
                    taker.prepare(number)?;
                    std::thread::sleep((begin + APART * u32::try_from(number)?).saturating_duration_since(Instant::now()));
                    let sent = Instant::now();
                    taker.take(number)?;
                    Ok((sent, sent.elapsed()))
                })
                .collect::<Result<Vec<_>>>()
        })
    })?;
    drop(taker);
    contestant.stop()?;
    Ok(evaluate(&reports, &commands))
}

/// Does something with a contestant that is killed if it takes too long: who waits for it goes on with an error.
fn within<T>(contestant: &Contestant, limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (running, ended) = mpsc::channel::<()>();
    let is_late = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let is_late = &is_late;
        scope.spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                is_late.store(true, Ordering::Relaxed);
                // If it has ended meanwhile, all the better.
                let _ = contestant.process().map(|process| kill_process(process, Signal::KILL));
            }
        });
        let outcome = work();
        drop(running);
        outcome.with_context(|| if is_late.load(Ordering::Relaxed) { "it has hung" } else { "it has failed" })
    })
}

/// Takes snapshots of all disks together.
struct Taker {
    kind: Kind,
    client: Client,
    folder: PathBuf,
    devices: usize,
}

impl Taker {
    /// Makes the overlays ahead for those who need them.
    fn new(kind: Kind, contestant: &Contestant, folder: &Path, images: Vec<PathBuf>, snapshots: usize) -> Result<Self> {
        let taker = Self { kind, client: contestant.control()?, folder: folder.to_owned(), devices: images.len() };
        if kind == Kind::Qsd {
            for (device, image) in images.into_iter().enumerate() {
                let mut below = image;
                for number in 0..snapshots {
                    let overlay = taker.overlay(device, number);
                    contestant::overlay(&overlay, &below, None)?;
                    below = overlay;
                }
            }
        }
        Ok(taker)
    }

    fn overlay(&self, device: usize, number: usize) -> PathBuf {
        self.folder.join(format!("disk{device}.{number}.qcow2"))
    }

    /// What the next command takes for granted.
    fn prepare(&mut self, number: usize) -> Result<()> {
        if self.kind == Kind::Qsd {
            for device in 0..self.devices {
                let file =
                    json!({ "driver": "file", "filename": self.overlay(device, number), "aio": "io_uring", "cache": { "direct": true } });
                let node = json!({ "driver": "qcow2", "node-name": node(device, number + 1), "file": file, "backing": null });
                self.client.execute("blockdev-add", node)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, number: usize) -> Result<()> {
        if self.kind == Kind::Qsd {
            let action = |device| json!({ "type": "blockdev-snapshot", "data": { "node": node(device, number), "overlay": node(device, number + 1) } });
            let actions: Vec<Value> = (0..self.devices).map(action).collect();
            self.client.execute("transaction", json!({ "actions": actions }))?;
        } else {
            let devices = (0..self.devices).map(|device| SnapshotMember { device: format!("disk{device}"), overlay: None, format: None });
            let name = format!("s{number}");
            self.client.call(&SnapshotCreate {
                name,
                devices: devices.collect(),
                create: false,
                deadline_ms: Some(10_000),
                job_id: None,
            })?;
        }
        Ok(())
    }
}

/// The name of the top of a disk after so many snapshots.
fn node(device: usize, snapshots: usize) -> String {
    if snapshots == 0 { format!("disk{device}") } else { format!("disk{device}-{snapshots}") }
}

/// A request as the windows see it.
struct Request {
    due: Instant,
    ended: Instant,
}

impl Request {
    fn latency_us(&self) -> f64 {
        (self.ended - self.due).as_secs_f64() * 1e6
    }
}

fn evaluate(reports: &[Report], commands: &[(Instant, Duration)]) -> Shown {
    let requests: Vec<Request> = reports
        .iter()
        .flat_map(|report| {
            report.log.iter().map(|entry| {
                let ended = report.start + entry.at;
                Request { due: ended.checked_sub(entry.latency).unwrap_or(report.start), ended }
            })
        })
        .collect();
    let mut shown = Shown::default();
    for &(sent, answered) in commands {
        shown.answers_us.push(answered.as_secs_f64() * 1e6);
        shown.beside.extend(window(&requests, sent));
        shown.quiet.extend(window(&requests, sent + QUIET_AFTER));
        let ended = |from: Instant, to: Instant| requests.iter().filter(|request| (from..to).contains(&request.ended)).count() as u64;
        shown.ended.0 += ended(sent, sent + APART / 2);
        shown.ended.1 += ended(sent + APART / 2, sent + APART);
        let near = requests.iter().filter(|request| request.due + BEFORE >= sent && request.due < sent + AFTER);
        let offset = |due: Instant| match due.checked_duration_since(sent) {
            Some(after) => after.as_secs_f64() * 1e3,
            None => (sent - due).as_secs_f64() * -1e3,
        };
        shown.around.extend(near.map(|request| (offset(request.due), request.latency_us())));
    }
    shown
}

/// The median and the longest latency of requests that were under way in the window from `from` on; nothing if there were none.
fn window(requests: &[Request], from: Instant) -> Option<(f64, f64)> {
    let within = requests.iter().filter(|request| request.ended >= from && request.due < from + WINDOW);
    let latencies: Vec<f64> = within.map(Request::latency_us).collect();
    (!latencies.is_empty()).then(|| (median(&latencies), latencies.iter().copied().fold(0.0, f64::max)))
}

impl Shown {
    fn and(mut self, other: Self) -> Self {
        self.beside.extend(other.beside);
        self.quiet.extend(other.quiet);
        self.answers_us.extend(other.answers_us);
        self.around.extend(other.around);
        self.ended = (self.ended.0 + other.ended.0, self.ended.1 + other.ended.1);
        self
    }
}

fn point(kind: Kind, Place { medium, devices }: Place, rate: u64, shown: &Shown) -> Point {
    let of = |windows: &[(f64, f64)]| {
        let [medians, longest]: [Vec<f64>; 2] =
            [windows.iter().map(|window| window.0).collect(), windows.iter().map(|window| window.1).collect()];
        [median(&medians), median(&longest), percentile(&longest, 99.0)]
    };
    Point {
        contestant: kind.name(),
        medium,
        devices,
        rate,
        snapshots: shown.answers_us.len(),
        beside_us: of(&shown.beside),
        quiet_us: of(&shown.quiet),
        answer_us: [median(&shown.answers_us), percentile(&shown.answers_us, 99.0)],
        throughput: shown.ended.0 as f64 / shown.ended.1 as f64,
    }
}

fn show(Place { medium, devices }: Place, rate: u64, points: &[Point], shown: &[(Kind, Shown)]) -> Part {
    let rows = points
        .iter()
        .map(|point| {
            let pair = |index: usize| format!("{:.0} ({:.0})", point.beside_us[index], point.quiet_us[index]);
            vec![
                point.contestant.to_owned(),
                point.snapshots.to_string(),
                pair(0),
                pair(1),
                pair(2),
                format!("{:.0}", point.answer_us[0]),
                format!("{:.0}", point.answer_us[1]),
                format!("{:.3}", point.throughput),
            ]
        })
        .collect();
    let lines = points.iter().zip(shown).flat_map(|(point, (_, shown))| {
        [("median", 50.0), ("99 %", 99.0)].map(|(name, share)| (format!("{}, {name}", point.contestant), time_line(&shown.around, share)))
    });
    Part {
        title: format!("{devices} devices together {medium}, {rate} writes a second"),
        head: vec![
            "latencies in \u{b5}s, without a snapshot in ()",
            "snapshots",
            "median",
            "longest, median",
            "longest, 99 %",
            "answer, median",
            "answer, 99 %",
            "throughput",
        ],
        rows,
        plots: vec![Plot::Lines {
            x: Axis { name: "a request is due so many milliseconds after the command", is_logarithmic: false },
            y: Axis { name: "latency, \u{b5}s", is_logarithmic: true },
            lines: lines.collect(),
        }],
    }
}

/// A percentile of the latencies in each millisecond.
fn time_line(around: &[(f64, f64)], share: f64) -> Vec<(f64, f64)> {
    let bins = (BEFORE + AFTER).as_millis() as usize;
    let mut latencies: Vec<Vec<f64>> = vec![Vec::new(); bins];
    for &(at, latency) in around {
        let bin = (at + BEFORE.as_secs_f64() * 1e3).floor();
        if let Some(bin) = latencies.get_mut(bin.max(0.0) as usize) {
            bin.push(latency);
        }
    }
    let start = -(BEFORE.as_secs_f64() * 1e3);
    let points = latencies.iter().enumerate().filter(|(_, bin)| !bin.is_empty());
    points.map(|(number, bin)| (start + number as f64, percentile(bin, share))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(start: Instant, due_ms: u64, took_ms: u64) -> Request {
        let due = start + Duration::from_millis(due_ms);
        Request { due, ended: due + Duration::from_millis(took_ms) }
    }

    #[test]
    fn a_window_has_what_was_under_way_in_it() {
        let start = Instant::now();
        let requests =
            [request(start, 0, 5), request(start, 95, 10), request(start, 120, 1), request(start, 149, 100), request(start, 151, 1)];
        let from = start + Duration::from_millis(100);
        assert_eq!(window(&requests, from), Some((10_000.0, 100_000.0)));
        assert_eq!(window(&requests[..1], from), None);
    }

    #[test]
    fn a_time_line_has_a_point_for_each_millisecond_with_requests() {
        assert_eq!(time_line(&[(-20.0, 1.0), (-19.5, 3.0), (0.5, 7.0), (79.9, 9.0)], 100.0), [(-20.0, 3.0), (0.0, 7.0), (79.0, 9.0)]);
    }
}

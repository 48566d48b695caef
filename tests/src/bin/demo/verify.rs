//! Whether everything held: in the guest, in each snapshot, and in the images.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::counters::{self, Cut};
use snapfence_tests::guest::{Guest, Progress};
use snapfence_tests::tools;

use crate::disks::{DISKS, KNOWN_FILE, KNOWN_SCRIPT, LAYOUT};
use crate::{Taken, ms};

/// One promise, and what contradicts it.
pub(crate) struct Verdict {
    promise: String,
    against: Vec<String>,
}

impl Verdict {
    fn new(promise: impl Into<String>, against: Vec<String>) -> Self {
        Self { promise: promise.into(), against }
    }

    /// Whether nothing contradicts it.
    pub(crate) fn held(&self) -> bool {
        self.against.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 5;
        write!(to, "{}  {}", if self.held() { "ok  " } else { "FAIL" }, self.promise)?;
        for line in self.against.iter().take(SHOWN) {
            write!(to, "\n          {line}")?;
        }
        if self.against.len() > SHOWN {
            write!(to, "\n          and {} more", self.against.len() - SHOWN)?;
        }
        Ok(())
    }
}

/// What changes if anybody writes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified: SystemTime,
}

impl Stamp {
    /// The present one.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
        Ok(Self { path: path.to_owned(), bytes: metadata.len(), modified: metadata.modified()? })
    }
}

/// How one snapshot fared.
#[derive(Debug, Default)]
pub(crate) struct Row {
    cut: Option<Cut>,
    clean_file_systems: usize,
}

/// What the guest itself noticed.
pub(crate) fn guest_side(guest: &Guest, total: &Progress) -> Result<Vec<Verdict>> {
    let mut errors = total.errors.clone();
    errors.extend(guest.disk_errors()?);
    let written = format!("{} writes, {} reads compared, {} flushes", total.writes, total.reads, total.flushes);
    let mut differing = Vec::new();
    for disk in &DISKS {
        let known = format!("{}/{KNOWN_FILE}", disk.mount.trim_end_matches('/'));
        if let Err(error) = guest.run(&format!("{KNOWN_SCRIPT} | cmp - {known}"), Duration::from_secs(60)) {
            differing.push(format!("{error:#}"));
        }
    }
    Ok(vec![
        Verdict::new(format!("the guest never saw an error ({written}; slowest {:.1} ms)", ms(total.slowest_ever_us)), errors),
        Verdict::new("the guest's files read as written", differing),
    ])
}

/// Looks into every snapshot, several at a time.
pub(crate) fn snapshots(scratch: &Path, taken: &[Taken]) -> Result<(Vec<Row>, Vec<Verdict>)> {
    let mut rows = Vec::new();
    let (mut inconsistent, mut outside, mut changed) = (Vec::new(), Vec::new(), Vec::new());
    for taken in taken {
        let name = &taken.snapshot.name;
        let mut row = Row::default();
        let regions = (0..DISKS.len())
            .map(|disk| {
                let (layer, format) = layer(taken, disk)?;
                tools::read_range(layer, format, DISKS[disk].counters_at, LAYOUT.region_bytes())
            })
            .collect::<Result<Vec<_>>>()?;
        match counters::verify(LAYOUT, &regions) {
            Ok(cut) => {
                outside.extend(cut.outside(&taken.before, &taken.after).iter().map(|violation| format!("{name}: {violation}")));
                row.cut = Some(cut);
            }
            Err(violations) => inconsistent.extend(violations.iter().map(|violation| format!("{name}: {violation}"))),
        }
        for stamp in &taken.stamps {
            if Stamp::of(&stamp.path)? != *stamp {
                changed.push(format!("{name}: {}", stamp.path.display()));
            }
        }
        rows.push(row);
    }
    let dirty = file_systems(scratch, taken, &mut rows)?;
    let count = taken.len();
    let between: usize = rows.iter().filter_map(|row| row.cut.as_ref()).map(Cut::caught_between).sum();
    Ok((
        rows,
        vec![
            Verdict::new(
                format!(
                    "all {count} snapshots are one cut through time by the ordered counters ({between} chains caught between two disks)"
                ),
                inconsistent,
            ),
            Verdict::new("each holds all that was complete before it, and nothing begun after it", outside),
            Verdict::new(format!("all {} file systems in the snapshots are clean, their files as written", count * DISKS.len()), dirty),
            Verdict::new("no frozen layer changed after it was frozen", changed),
        ],
    ))
}

/// Checks the file system of each disk in each snapshot, on as many threads as there are processors.
fn file_systems(scratch: &Path, taken: &[Taken], rows: &mut [Row]) -> Result<Vec<String>> {
    let expected = tools::run("sh", ["-c", KNOWN_SCRIPT])?.into_bytes();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    let (snapshot, disk) = (job / DISKS.len(), job % DISKS.len());
                    if snapshot >= taken.len() {
                        return;
                    }
                    let result = file_system(scratch, &taken[snapshot], disk, &expected);
                    results.lock().expect("no thread panics while it holds this").push((snapshot, disk, result));
                }
            });
        }
    });
    let mut dirty = Vec::new();
    for (snapshot, disk, result) in results.into_inner().expect("no thread panics while it holds this") {
        match result {
            Ok(()) => rows[snapshot].clean_file_systems += 1,
            Err(error) => dirty.push(format!("{} {}: {error:#}", taken[snapshot].snapshot.name, DISKS[disk].path)),
        }
    }
    Ok(dirty)
}

fn file_system(scratch: &Path, taken: &Taken, disk: usize, expected: &[u8]) -> Result<()> {
    let (layer, format) = layer(taken, disk)?;
    let copy = tempfile::Builder::new().prefix("extracted.").tempfile_in(scratch)?;
    tools::extract_range(layer, format, 0, DISKS[disk].file_system_bytes, copy.path())?;
    tools::check_ext4(copy.path())?;
    let known = tools::read_from_ext4(copy.path(), &format!("/{KNOWN_FILE}"))?;
    ensure!(known == expected, "{KNOWN_FILE} differs");
    Ok(())
}

/// The frozen layer of a disk, and its format.
fn layer(taken: &Taken, disk: usize) -> Result<(&Path, &'static str)> {
    let name = DISKS[disk].path.trim_start_matches("/dev/");
    let device = taken.snapshot.devices.iter().find(|device| device.device == name);
    let layer = device.with_context(|| format!("{} says nothing of {name}", taken.snapshot.name))?.frozen_layer.as_path();
    Ok((layer, if layer.extension().is_some_and(|extension| extension == "raw") { "raw" } else { "qcow2" }))
}

/// Checks every qcow2 image there is.
pub(crate) fn images(folder: &Path) -> Result<Verdict> {
    let mut count = 0;
    let mut against = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "qcow2") {
            continue;
        }
        count += 1;
        let found = tools::check(&path)?;
        if found != tools::Check::default() {
            against.push(format!("{}: {} corruptions, {} leaked clusters", path.display(), found.corruptions, found.leaks));
        }
    }
    Ok(Verdict::new(format!("qemu-img check is clean on all {count} qcow2 images"), against))
}

/// Prints one line for each snapshot.
pub(crate) fn print_table(taken: &[Taken], rows: &[Row]) {
    println!("\n  snapshot   stall µs  switch µs  frozen ms  guest's slowest ms  counters  caught  file systems");
    for (taken, row) in taken.iter().zip(rows) {
        let devices = &taken.snapshot.devices;
        let freeze_us = devices.iter().map(|device| device.freeze_us).max().unwrap_or(0);
        let (counter, caught) = match &row.cut {
            Some(cut) => (cut.complete().iter().sum::<u64>().to_string(), cut.caught_between().to_string()),
            None => ("WRONG".to_owned(), "-".to_owned()),
        };
        println!(
            "  {:10} {:8}  {:9}  {:9.2}  {:18.1}  {:>8}  {:>6}  {}/{} clean",
            taken.snapshot.name,
            taken.snapshot.stall_us(),
            taken.switch_us(),
            ms(freeze_us),
            ms(taken.slowest_us),
            counter,
            caught,
            row.clean_file_systems,
            DISKS.len(),
        );
    }
}

//! What is measured on, and what disturbs it.

use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// A disk is at rest when so many flushes in a row take no longer than this, or than twice the quickest.
const QUICK_FLUSHES: usize = 10;
const QUICK: Duration = Duration::from_millis(5);
/// It is not waited for longer.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// What a reader of figures has to know of where they come from.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// How many there are.
    pub processors: usize,
    /// What they are called.
    pub processor: String,
    /// Memory, in GiB.
    pub memory_gib: u64,
    /// The version of Linux.
    pub kernel: String,
}

impl Machine {
    /// Looks at this machine.
    ///
    /// # Errors
    /// If the system does not say what it is.
    pub fn examine() -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("of an unknown kind");
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let kib: u64 = meminfo.split_whitespace().nth(1).context("/proc/meminfo begins with the size of the memory")?.parse()?;
        Ok(Self {
            processors: std::thread::available_parallelism()?.get(),
            processor: processor.trim_start_matches([' ', '\t', ':']).to_owned(),
            memory_gib: kib >> 20,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        })
    }
}

/// Time that the hypervisor has given to others, of all processors, since the machine has been running.
///
/// # Errors
/// If the system does not say.
pub fn stolen() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let ticks: u64 = stat.split_whitespace().nth(8).context("/proc/stat says how much time was stolen")?.parse()?;
    Ok(ticks_to_time(ticks))
}

/// Ticks as /proc counts them.
pub fn ticks_to_time(ticks: u64) -> Duration {
    Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100)
}

/// Does something on one processor only, what it starts included, if there are several.
///
/// # Errors
/// If it may not choose, and whatever the work reports.
pub fn on_processor<T>(processor: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = sched_getaffinity(None)?;
    if before.count() > 1 && before.is_set(processor) {
        let mut only = CpuSet::new();
        only.set(processor);
        sched_setaffinity(None, &only)?;
    }
    let outcome = work();
    sched_setaffinity(None, &before)?;
    outcome
}

/// Where files lie on a real disk: the folder for temporary files or, if that is in memory, the next best.
pub fn disk_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let is_disk = |path: &Path| lies_in_memory(path).is_ok_and(|lies| !lies);
        let candidates = [std::env::temp_dir(), "/var/tmp".into(), ".".into()];
        candidates.into_iter().find(|path| is_disk(path)).unwrap_or_else(std::env::temp_dir)
    })
}

/// Waits until the disk of a folder has come to rest: what was removed or written before may keep it busy for a while.
///
/// # Errors
/// If nothing can be written there.
pub fn settle(folder: &Path) -> Result<()> {
    if lies_in_memory(folder)? {
        return Ok(());
    }
    rustix::fs::sync();
    let mut file = tempfile::tempfile_in(folder)?;
    let limit = Instant::now() + SETTLE_LIMIT;
    let (mut quick, mut quickest) = (0, Duration::MAX);
    while quick < QUICK_FLUSHES && Instant::now() < limit {
        file.rewind()?;
        file.write_all(&[0; 4096])?;
        let began = Instant::now();
        file.sync_data()?;
        let took = began.elapsed();
        quickest = quickest.min(took);
        quick = if took < QUICK.max(quickest * 2) { quick + 1 } else { 0 };
        std::thread::sleep(QUICK);
    }
    if quick < QUICK_FLUSHES {
        println!("the disk of {} has not come to rest in {} s", folder.display(), SETTLE_LIMIT.as_secs());
    }
    Ok(())
}

/// Whether a folder's files lie in memory.
fn lies_in_memory(folder: &Path) -> Result<bool> {
    let kind = rustix::fs::statfs(folder).with_context(|| folder.display().to_string())?.f_type;
    // tmpfs and ramfs, by linux/magic.h.
    Ok([0x0102_1994, 0x8584_58f6].contains(&(kind.cast_unsigned() & 0xffff_ffff)))
}

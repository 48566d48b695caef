//! A daemon with the disks, and a guest that has them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::backend::{Backend, Kind, Snapshot};
use snapfence_tests::guest::{Config, Disk, Guest};
use tempfile::TempDir;

use crate::disks;
use crate::fio::figures;
use crate::jobs::Jobs;
use crate::report::Figures;

/// A script gets this long in an emulated guest on a busy machine, beside the time it means to take.
const PATIENCE: Duration = Duration::from_secs(180);
/// Where fio and its job files are in the guest.
const FOLDER: &str = "/run/fio";

/// Has the guest flush. qemu-storage-daemon leaves the field of the cache in its configuration at 0, which says that every write is durable at once
/// (VIRTIO 1.3, 5.2.5), although none is; a guest that believes it flushes nothing, and could not be compared with one that does.
const FLUSH: &str = "for disk in /sys/block/vd*; do \
    grep -q '^write back$' $disk/queue/write_cache || echo 'write back' >$disk/cache_type; cat $disk/queue/write_cache; done";

/// How long a run takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) seconds: u32,
    pub(crate) ramp_ms: u32,
}

/// One of those compared. Its processes end with it.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) name: &'static str,
    guest: Guest,
    backend: Backend,
    times: Times,
    snapshots: usize,
    /// Sockets and logs; removed last.
    _run: TempDir,
}

impl Side {
    /// Has the daemon serve copies of the disks in `made`, which will be in `images`, and boots a guest.
    pub(crate) fn start(
        name: &'static str,
        kind: Kind,
        made: &Path,
        images: &Path,
        queues: u16,
        jobs: &Jobs,
        times: Times,
    ) -> Result<Self> {
        // Not beside the images: paths of sockets are short by nature.
        let run = tempfile::Builder::new().prefix("snapfence-guest-fio.").tempdir()?;
        let devices = disks::copied(made, images, run.path(), queues)?;
        let backend = Backend::launch(kind, run.path(), &devices)?;
        let disks = devices.iter().map(|device| Disk::new(&device.socket, device.queues)).collect();
        let guest = Guest::boot(&Config { disks, ..Config::default() }, run.path()).with_context(|| format!("the guest of {name}"))?;
        let caches = guest.run(FLUSH, PATIENCE)?;
        ensure!(caches == "write back\n".repeat(devices.len()), "the guest of {name} would not flush: {caches}");
        let files = jobs.put(times.seconds, times.ramp_ms);
        guest.run(&format!("set -e; mkdir -p {FOLDER}; cd {FOLDER}\n{files}"), PATIENCE)?;
        Ok(Self { name, guest, backend, times, snapshots: 0, _run: run })
    }

    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Asks the guest for something that a line can say.
    pub(crate) fn ask(&self, script: &str) -> Result<String> {
        Ok(self.guest.run(script, PATIENCE)?.trim().to_owned())
    }

    /// Runs a job on all disks, and returns the figures of all together and of each.
    pub(crate) fn run(&self, job: &str) -> Result<Vec<Figures>> {
        run(&self.guest, job, self.times).with_context(|| format!("{job} with {}", self.name))
    }

    /// The same with a snapshot of all disks as one group in its midst.
    pub(crate) fn run_with_snapshot(&mut self, job: &str) -> Result<(Vec<Figures>, Snapshot)> {
        let names = disks::DISKS.map(|(name, _)| name);
        let Self { guest, backend, times, snapshots, .. } = self;
        *snapshots += 1;
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(guest, job, *times));
            guest.run("until pidof fio >/dev/null; do sleep 0.05; done", PATIENCE)?;
            std::thread::sleep(Duration::from_millis(u64::from(times.ramp_ms)) + Duration::from_secs(times.seconds.into()) / 4);
            ensure!(!running.is_finished(), "{job} ended before a snapshot could be taken; its blocks are too short");
            let snapshot = backend.snapshot(&format!("s{snapshots}"), &names)?;
            Ok((running.join().expect("the thread does not panic")?, snapshot))
        })
    }

    /// Ends guest and daemon in good order, if the guest's disks have met no errors.
    pub(crate) fn stop(self) -> Result<()> {
        let errors = self.guest.disk_errors()?;
        ensure!(errors.is_empty(), "the guest of {} met errors: {}", self.name, errors.join("; "));
        self.guest.power_off()?;
        self.backend.stop()
    }
}

fn run(guest: &Guest, job: &str, times: Times) -> Result<Vec<Figures>> {
    // What fio says to people is shown if it fails only.
    let script = format!(
        "cd {FOLDER} && rm -f out && {{ fio --output-format=json+ --output=out {job}.fio >said 2>&1 || {{ status=$?; cat said out; exit $status; }}; }} \
         && cat out"
    );
    figures(&guest.run(&script, PATIENCE + Duration::from_secs(times.seconds.into()))?)
}

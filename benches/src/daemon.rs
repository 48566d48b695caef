//! What the daemon costs: how soon it is ready, the memory that it takes when idle, and what back-to-back group snapshots do to requests.
//!
//! - Ready: from starting the program to its log line, with one device over an empty qcow2 image of 1 TiB; the median of several starts, the files
//!   being in the page cache after the first.
//! - Idle: resident memory of the last of these, after the line, with nothing connected.
//! - Snapshots: four devices on the file system of the temporary directory, each with a client that writes 4 KiB at random places on four queues all
//!   the time; a group snapshot of all four, the next as soon as the daemon has answered. The clients take processor time away from the daemon:
//!   on a machine with few processors the times tell of that, too.

use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use snapfence::client::Client;
use snapfence::protocol::{Event, SnapshotCreate, SnapshotInfo, SnapshotMember};
use snapfence_benches::load::Memory;
use snapfence_image_format::qcow2::{CreateOptions, Qcow2};
use snapfence_image_format::storage::uring::{Reactor, UringEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment as _, Location};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

const STARTS: usize = 20;
const DEVICES: usize = 4;
const QUEUES: usize = 4;
/// Requests in flight on each queue.
const DEPTH: usize = 8;
const BLOCK: usize = 4096;
const DISK_BYTES: u64 = 256 << 20;
const SNAPSHOTS: usize = 100;
/// What never happens has not happened by then.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    start_up()?;
    snapshots()
}

/// A daemon in a folder, killed at the end unless it was stopped.
struct Daemon {
    child: Child,
    ready: Duration,
}

impl Daemon {
    fn start(folder: &Path, devices: &[String]) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("snapfenced");
        let mut command = Command::new(&program);
        command.arg("--control").arg(folder.join("control")).arg("--state-dir").arg(folder.join("state"));
        for device in devices {
            command.arg("--device").arg(device);
        }
        let began = Instant::now();
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("cannot start {}; build it first (make bench)", program.display()))?;
        let mut lines = BufReader::new(child.stderr.take().context("a pipe")?).lines();
        loop {
            let line = lines.next().context("the daemon has ended")??;
            if line.contains("event=\"ready\"") {
                break;
            }
        }
        let ready = began.elapsed();
        // It must not wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { child, ready })
    }

    fn resident_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn stop(mut self) -> Result<()> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the daemon ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn make_image(path: &Path, bytes: u64) -> Result<()> {
    let location = Location::Trusted(path.to_owned());
    Reactor::new(8)?.block_on(async move {
        let file = UringEnvironment.open(&location, Access::CreateNew, CacheMode::Direct).await?;
        Qcow2::<UringEnvironment>::create(&file, &CreateOptions::standalone(bytes)).await?;
        Ok(())
    })?
}

fn device(folder: &Path, name: &str, bytes: u64) -> Result<(String, PathBuf)> {
    let (image, socket) = (folder.join(format!("{name}.qcow2")), folder.join(format!("{name}.sock")));
    if !image.exists() {
        make_image(&image, bytes)?;
    }
    Ok((format!("name={name},image={},format=qcow2,socket={},queues={QUEUES}", image.display(), socket.display()), socket))
}

/// The value below which this share of the values is.
fn percentile<T: Copy + Ord>(values: &mut [T], percent: usize) -> T {
    values.sort_unstable();
    values[(values.len() - 1) * percent / 100]
}

fn start_up() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut times = Vec::new();
    let mut resident = 0;
    for _ in 0..STARTS {
        let (device, _) = device(folder.path(), "vda", 1 << 40)?;
        let daemon = Daemon::start(folder.path(), &[device])?;
        times.push(daemon.ready);
        resident = daemon.resident_kib()?;
        daemon.stop()?;
    }
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let (median, longest) = (percentile(&mut times, 50), percentile(&mut times, 100));
    println!("ready: {:.1} ms after the start (median of {STARTS}; longest {:.1} ms)", milliseconds(median), milliseconds(longest));
    println!("idle, one device: {resident} KiB resident");
    Ok(())
}

/// Writes at random places of a device until told to stop. Counts what has come back.
fn load(socket: &Path, seed: u64, stop: &AtomicBool, done: &AtomicU64) -> Result<()> {
    let features = VirtioFeatureFlags::VERSION_1.bits() | VirtioFeatureFlags::RING_EVENT_IDX.bits() | VirtioBlkFeatureFlags::all().bits();
    let path = socket.to_str().context("a path of plain characters")?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features)?);
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, QUEUES, 64)?;
    let memory = Memory::new(QUEUES * DEPTH, BLOCK)?;
    transport.map_mem_region(memory.base() as usize, memory.len(), memory.file().as_raw_fd(), 0)?;
    queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
    let calls: Vec<_> = (0..QUEUES).map(|index| transport.get_completion_fd(index)).collect();
    let mut chance = Chance::new(seed);
    let mut free: Vec<Vec<usize>> = (0..QUEUES).map(|queue| (queue * DEPTH..(queue + 1) * DEPTH).collect()).collect();
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        if stopping && free.iter().all(|slots| slots.len() == DEPTH) {
            return Ok(());
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            let mut any = false;
            while !stopping && let Some(slot) = free[index].pop() {
                // SAFETY: the block of the slot is within the mapping, which lives longer; nobody writes to it.
                let bytes = unsafe { std::slice::from_raw_parts(memory.slot(slot), BLOCK) };
                queue.write(chance.below(DISK_BYTES / BLOCK as u64) * BLOCK as u64, bytes, slot)?;
                any = true;
            }
            if any && queue.avail_notif_needed() {
                transport.get_submission_notifier(index).notify()?;
            }
        }
        let mut fds: Vec<PollFd<'_>> = calls.iter().map(|call| PollFd::new(&**call, PollFlags::IN)).collect();
        poll(&mut fds, None)?;
        let ready: Vec<usize> = (0..QUEUES).filter(|&index| !fds[index].revents().is_empty()).collect();
        for index in ready {
            calls[index].read()?;
            for completion in queues[index].completions() {
                ensure!(completion.ret == 0, "a write has failed: {}", completion.ret);
                free[index].push(completion.context);
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn take_snapshots(mut client: Client, names: &[String]) -> Result<Vec<SnapshotInfo>> {
    for number in 0..SNAPSHOTS {
        let devices = names.iter().map(|device| SnapshotMember { device: device.clone(), overlay: None, format: None }).collect();
        client.call(&SnapshotCreate { name: format!("s{number}"), devices, create: false, deadline_ms: Some(10_000), job_id: None })?;
    }
    let mut frozen = Vec::new();
    while frozen.len() < SNAPSHOTS {
        match client.next_event(Some(PATIENCE))?.context("the snapshots are frozen some time")?.event() {
            Some(Event::SnapshotFrozen(info)) => frozen.push(info),
            Some(Event::SnapshotFailed(info)) => bail!("{info:?}"),
            _ => {}
        }
    }
    Ok(frozen)
}

fn snapshots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let names: Vec<String> = (0..DEVICES).map(|number| format!("disk{number}")).collect();
    let devices = names.iter().map(|name| device(folder.path(), name, DISK_BYTES)).collect::<Result<Vec<_>>>()?;
    let options: Vec<String> = devices.iter().map(|(options, _)| options.clone()).collect();
    let daemon = Daemon::start(folder.path(), &options)?;
    let client = Client::connect(&folder.path().join("control"))?;
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let began = Instant::now();
    let frozen = std::thread::scope(|scope| {
        let (stop, done) = (&stop, &done);
        let loads: Vec<_> =
            devices.iter().enumerate().map(|(seed, (_, socket))| scope.spawn(move || load(socket, seed as u64, stop, done))).collect();
        // A snapshot of devices without work costs nothing.
        while done.load(Ordering::Relaxed) < 1000 && !loads.iter().any(|load| load.is_finished()) {
            std::thread::yield_now();
        }
        let frozen = take_snapshots(client, &names);
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            load.join().map_err(|_| anyhow::anyhow!("a client has panicked"))??;
        }
        frozen
    })?;
    let seconds = began.elapsed().as_secs_f64();
    daemon.stop()?;
    let rate = done.load(Ordering::Relaxed) as f64 / seconds;
    println!("{SNAPSHOTS} snapshots of {DEVICES} devices, back to back, under {rate:.0} writes of 4 KiB a second:");
    type Time = fn(&SnapshotInfo) -> Option<u64>;
    let times: [(&str, Time); 3] = [
        ("first to last queue switched", |info| info.switch_us),
        ("longest held completion", |info| info.hold_us),
        ("switch to frozen", |info| info.freeze_us),
    ];
    println!("{:>32} {:>10} {:>10} {:>10}", "", "median", "90 %", "longest");
    for (what, time) in times {
        let mut all = frozen.iter().map(|info| time(info).context("a frozen snapshot has all times")).collect::<Result<Vec<_>>>()?;
        let [median, most, longest] = [50, 90, 100].map(|percent| percentile(&mut all, percent));
        println!("{what:>32} {median:>7} us {most:>7} us {longest:>7} us");
    }
    Ok(())
}

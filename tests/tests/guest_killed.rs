//! The daemon is killed hundreds of times beneath a running guest, also while it takes snapshots, and started again with the same arguments. In the
//! guest fio writes, reads back and compares on two disks all the while, and never sees an error.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use serde_json::Value;
use snapfence_tests::backend::{Backend, Device, Kind, program};
use snapfence_tests::guest::{Config, Disk, Guest};
use snapfence_tests::tools;

const KILLS: usize = 200;
const DISK_MIB: u64 = 64;
const PATHS: [&str; 2] = ["/dev/vda", "/dev/vdb"];
const NAMES: [&str; 2] = ["one", "two"];

/// Runs fio time and again, until there is the file `/stop`: random writes of mixed sizes on both disks, each compared soon after and at the end of
/// its run. Says how often it ran.
fn fio() -> String {
    let jobs: String = PATHS.iter().map(|path| format!(" --name={} --filename={path}", path.trim_start_matches("/dev/"))).collect();
    format!(
        "runs=0; while [ ! -e /stop ]; do \
         fio --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=32 --iodepth_batch=16 --size={DISK_MIB}m --fsync=64 \
         --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime=5 --output-format=terse --randseed=$((runs + 1)){jobs} \
         >/fio.log 2>&1 || {{ cat /fio.log; exit 1; }}; runs=$((runs + 1)); done; echo $runs"
    )
}

/// How many requests the daemon found in flight when it started, by its log.
fn resumed(log: &str) -> u64 {
    let count = |line: &str| line.split_once("count=")?.1.split(|other: char| !other.is_ascii_digit()).next()?.parse::<u64>().ok();
    log.lines().filter(|line| line.contains("requests_resumed")).filter_map(count).sum()
}

/// The files of a device's layers.
fn layers(backend: &Backend, device: &str) -> Result<Vec<PathBuf>> {
    let stack: Value = serde_json::from_str(&backend.snapfence(&["stack", "show", device, "--json"])?)?;
    let layers = stack["layers"].as_array().context("no layers")?;
    layers.iter().map(|layer| Ok(layer["file"].as_str().context("no file")?.into())).collect()
}

/// Kills the daemon and starts it again, now and then in the midst of a snapshot. Returns the last one, and how many requests were in flight.
fn kill_often(
    mut backend: Backend,
    folder: &Path,
    devices: &[Device],
    random: &mut Rng,
    goes_on: impl Fn() -> bool,
) -> Result<(Backend, u64)> {
    let snapfence = program("snapfence")?;
    let mut requests = 0;
    for kill in 0..KILLS {
        std::thread::sleep(Duration::from_millis(random.u64(50..400)));
        ensure!(goes_on(), "fio has ended before kill {kill}");
        let snapshot = if random.u8(..3) == 0 {
            let mut command = Command::new(&snapfence);
            command.arg("--control").arg(backend.control()).args(["snapshot", "create", &format!("s{kill}")]);
            command.args(NAMES.iter().flat_map(|name| ["--device", name]));
            let snapshot = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            std::thread::sleep(Duration::from_micros(random.u64(..30_000)));
            Some(snapshot)
        } else {
            None
        };
        requests += resumed(&backend.log());
        drop(backend);
        // Done, or refused, or cut off: by now nobody is left who could answer.
        if let Some(mut snapshot) = snapshot {
            snapshot.wait()?;
        }
        backend = Backend::launch(Kind::Snapfenced, folder, devices).with_context(|| format!("kill {kill}"))?;
    }
    // The last one has found something as well, by the time that it has served something.
    std::thread::sleep(Duration::from_millis(500));
    requests += resumed(&backend.log());
    Ok((backend, requests))
}

#[test]
fn guest_sees_no_error_when_the_daemon_is_killed() -> Result<()> {
    let seed = std::env::var("SNAPFENCE_SEED").map_or_else(|_| Ok(std::process::id().into()), |seed| seed.parse())?;
    eprintln!("SNAPFENCE_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let folder = tempfile::tempdir()?;
    let devices: Vec<Device> = NAMES
        .iter()
        .map(|name| {
            let image = folder.path().join(format!("{name}.qcow2"));
            tools::create_image(&image, "qcow2", DISK_MIB << 20)?;
            let socket = folder.path().join(format!("{name}.sock"));
            Ok(Device { name: (*name).to_owned(), image, format: "qcow2".to_owned(), socket, queues: 2 })
        })
        .collect::<Result<_>>()?;
    let backend = Backend::launch(Kind::Snapfenced, folder.path(), &devices)?;
    let disks = devices.iter().map(|device| Disk::new(&device.socket, device.queues)).collect();
    let guest = Guest::boot(&Config { disks, reconnect_ms: Some(10), ..Config::default() }, folder.path())?;
    let ((backend, resumed_requests), runs) = std::thread::scope(|scope| {
        let fio = scope.spawn(|| guest.run(&fio(), Duration::from_secs(1200)));
        let killed = kill_often(backend, folder.path(), &devices, &mut random, || !fio.is_finished());
        guest.run("touch /stop", Duration::from_secs(60))?;
        let runs = fio.join().expect("the thread does not panic");
        // What fio has to say comes first: it may be why the other failed.
        let runs = runs.context("fio found wrong data, or an error")?;
        Ok::<_, anyhow::Error>((killed?, runs))
    })?;
    eprintln!("{KILLS} kills, {resumed_requests} requests in flight at them; fio ran {} times", runs.trim());
    ensure!(resumed_requests > KILLS as u64, "kills must hit requests");
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());
    guest.power_off()?;
    let stacks = NAMES.iter().map(|name| layers(&backend, name)).collect::<Result<Vec<_>>>()?;
    backend.stop()?;
    for layer in stacks.iter().flatten() {
        let found = tools::check(layer)?;
        // A kill may leave clusters that nothing refers to.
        assert_eq!(found, tools::Check { leaks: found.leaks, ..tools::Check::default() }, "{}", layer.display());
    }
    Ok(())
}

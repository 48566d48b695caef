//! Front-ends and daemon come and go: QEMU is killed or quits and another one takes its sockets, and the daemon stops and starts again beneath a
//! running guest. The ordered counters tell whether anything acknowledged was lost on the way.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use snapfence_tests::backend::{Backend, Device, Kind, Snapshot};
use snapfence_tests::counters::{self, Layout};
use snapfence_tests::guest::{Config, Counters, Disk, Guest, Progress, Region};
use snapfence_tests::qmp::Qmp;
use snapfence_tests::tools;

const MINUTE: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 << 20;
const COUNTERS_AT: u64 = 48 << 20;
const LAYOUT: Layout = Layout { chains: 2, slots: 64 };
const PATHS: [&str; 2] = ["/dev/vda", "/dev/vdb"];

fn devices(folder: &Path) -> Result<Vec<Device>> {
    ["one", "two"]
        .iter()
        .map(|name| {
            let image = folder.join(format!("{name}.qcow2"));
            tools::create_image(&image, "qcow2", DISK_BYTES)?;
            let socket = folder.join(format!("{name}.sock"));
            Ok(Device { name: (*name).to_owned(), image, format: "qcow2".to_owned(), socket, queues: 2 })
        })
        .collect()
}

fn config(devices: &[Device], reconnect_ms: Option<u32>) -> Config {
    let disks = devices.iter().map(|device| Disk::new(&device.socket, device.queues)).collect();
    Config { disks, reconnect_ms, ..Config::default() }
}

fn counters() -> Counters {
    let devices = PATHS.iter().map(|path| Region { path: (*path).to_owned(), offset: COUNTERS_AT }).collect();
    Counters { devices, layout: LAYOUT, flush_every: 16, report_every_ms: 100 }
}

/// Waits until every chain has written `more` counters beyond `from`.
fn advance(guest: &Guest, from: &[u64], more: u64) -> Result<Progress> {
    let end = Instant::now() + MINUTE;
    loop {
        let progress = guest.progress()?;
        ensure!(progress.errors.is_empty(), "the counters met errors: {:?}", progress.errors);
        if progress.counters.iter().zip(from).all(|(now, then)| *now >= then + more) {
            return Ok(progress);
        }
        ensure!(Instant::now() < end, "the counters stand still at {:?}", progress.counters);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes a snapshot of both disks while the counters run, and verifies it.
fn snapshot(backend: &mut Backend, guest: &Guest, name: &str) -> Result<Snapshot> {
    let before = guest.progress()?.counters;
    let snapshot = backend.snapshot(name, &["one", "two"])?;
    let after = guest.progress()?.counters;
    let cut = cut(&snapshot)?;
    assert_eq!(cut.outside(&before, &after), [], "{name}");
    Ok(snapshot)
}

fn cut(snapshot: &Snapshot) -> Result<counters::Cut> {
    let regions = snapshot
        .devices
        .iter()
        .map(|device| tools::read_range(&device.frozen_layer, "qcow2", COUNTERS_AT, LAYOUT.region_bytes()))
        .collect::<Result<Vec<_>>>()?;
    Ok(counters::verify(LAYOUT, &regions).expect("the snapshot is one cut"))
}

#[test]
fn disks_go_from_one_front_end_to_the_next() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let devices = devices(folder.path())?;
    let mut backend = Backend::launch(Kind::Snapfenced, folder.path(), &devices)?;
    let config = config(&devices, None);
    let mut acknowledged = vec![0; LAYOUT.chains as usize];
    let mut snapshots = Vec::new();
    for round in 0..4 {
        let guest = Guest::boot(&config, folder.path()).with_context(|| format!("round {round}"))?;
        guest.start_counters(&counters())?;
        // As soon as each chain has found out where it was.
        let begun = advance(&guest, &[0; LAYOUT.chains as usize], 1)?.counters;
        ensure!(begun.iter().zip(&acknowledged).all(|(now, then)| now >= then), "{begun:?} at the start, {acknowledged:?} before: lost");
        advance(&guest, &begun, 10)?;
        snapshots.push(snapshot(&mut backend, &guest, &format!("round{round}"))?);
        acknowledged = advance(&guest, &begun, 20)?.counters;
        // In the midst of requests, by turns without a word and in good order.
        if round % 2 == 0 {
            drop(guest);
        } else {
            Qmp::connect(&guest.qmp_socket())?.execute("quit", json!({}))?;
            guest.wait_gone()?;
        }
        let connected = backend.log().matches("front-end connected").count();
        assert_eq!(connected, (round + 1) * devices.len(), "front-ends so far");
    }
    // With nobody connected.
    let last = backend.snapshot("last", &["one", "two"])?;
    let found = cut(&last)?.complete();
    ensure!(found.iter().zip(&acknowledged).all(|(now, then)| now >= then), "{found:?} in the last snapshot, {acknowledged:?} before it");
    snapshots.push(last);
    backend.stop()?;
    for device in snapshots.iter().flat_map(|snapshot| &snapshot.devices) {
        assert_eq!(tools::check(&device.frozen_layer)?, tools::Check::default(), "{}", device.frozen_layer.display());
    }
    Ok(())
}

#[test]
fn guest_goes_on_over_a_restart_of_the_daemon() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let devices = devices(folder.path())?;
    let mut backend = Backend::launch(Kind::Snapfenced, folder.path(), &devices)?;
    let guest = Guest::boot(&config(&devices, Some(100)), folder.path())?;
    guest.start_counters(&counters())?;
    let mut snapshots = Vec::new();
    for restart in 0..3 {
        let begun = guest.progress()?.counters;
        advance(&guest, &begun, 5)?;
        snapshots.push(snapshot(&mut backend, &guest, &format!("before{restart}"))?);
        advance(&guest, &begun, 10)?;
        backend.stop().with_context(|| format!("stop {restart}"))?;
        // The same arguments: which layers are on top by now is for the daemon to know.
        backend = Backend::launch(Kind::Snapfenced, folder.path(), &devices)?;
        let tops = snapshots.last().expect("there is one").devices.iter().map(|device| device.overlay.file_name().unwrap_or_default());
        for top in tops.map(std::ffi::OsStr::to_string_lossy) {
            ensure!(backend.log().contains(&*top), "the log says nothing of {top}: {}", backend.log());
        }
    }
    let begun = guest.progress()?.counters;
    advance(&guest, &begun, 5)?;
    snapshots.push(snapshot(&mut backend, &guest, "after")?);
    let total = guest.stop_counters()?;
    ensure!(total.errors.is_empty(), "the counters met errors: {:?}", total.errors);
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());
    guest.power_off()?;
    backend.stop()?;
    let depth = tools::layers(&snapshots.last().expect("there is one").devices[0].overlay, "qcow2")?.len();
    assert_eq!(depth, snapshots.len() + 1, "one layer more for each snapshot");
    for snapshot in &snapshots {
        cut(snapshot)?;
        for device in &snapshot.devices {
            assert_eq!(tools::check(&device.frozen_layer)?, tools::Check::default(), "{}", device.frozen_layer.display());
        }
    }
    Ok(())
}

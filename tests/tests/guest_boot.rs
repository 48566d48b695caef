//! A guest boots, writes ordered counters to its disks, is snapshotted as one group, reboots and powers off; and it boots from its disk.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::backend::{Backend, Device, Kind};
use snapfence_tests::counters::{self, Layout};
use snapfence_tests::guest::{Config, Counters, Disk, Guest, Region, root_image};
use snapfence_tests::tools;

const MINUTE: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 128 << 20;
const LAYOUT: Layout = Layout { chains: 2, slots: 64 };
/// The file systems end here, the counters begin.
const COUNTERS_AT: u64 = 96 << 20;

fn qcow2_devices(folder: &Path, count: usize) -> Result<Vec<Device>> {
    (0..count)
        .map(|index| {
            let name = format!("disk{index}");
            let image = folder.join(format!("{name}.qcow2"));
            tools::create_image(&image, "qcow2", DISK_BYTES)?;
            Ok(Device { socket: folder.join(format!("{name}.sock")), name, image, format: "qcow2".to_owned(), queues: 2 })
        })
        .collect()
}

fn disks(devices: &[Device]) -> Vec<Disk> {
    devices.iter().map(|device| Disk::new(&device.socket, device.queues)).collect()
}

#[test]
fn guest_writes_ordered_counters_through_snapshots_and_reboots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let devices = qcow2_devices(folder.path(), 3)?;
    let mut backend = Backend::launch(Kind::Snapfenced, folder.path(), &devices)?;
    let guest = Guest::boot(&Config { disks: disks(&devices), ..Config::default() }, folder.path())?;
    println!("booted with {} in {:?}", guest.accelerator().name(), guest.ready().uptime);

    guest.run("mkfs.ext4 -q /dev/vda 96m && mount /dev/vda /mnt && cp /bin/busybox /mnt/ && sync", MINUTE)?;
    let regions = ["/dev/vda", "/dev/vdb", "/dev/vdc"].map(|path| Region { path: path.to_owned(), offset: COUNTERS_AT });
    let counters = Counters { devices: regions.to_vec(), layout: LAYOUT, flush_every: 16, report_every_ms: 100 };
    guest.start_counters(&counters)?;
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    for number in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        let before = guest.progress()?.counters;
        let snapshot = backend.snapshot(&format!("s{number}"), &names)?;
        let after = guest.progress()?.counters;
        let regions = snapshot
            .devices
            .iter()
            .map(|device| tools::read_range(&device.frozen_layer, "qcow2", COUNTERS_AT, LAYOUT.region_bytes()))
            .collect::<Result<Vec<_>>>()?;
        let cut = counters::verify(LAYOUT, &regions).expect("the snapshot is one cut");
        assert_eq!(cut.outside(&before, &after), []);
        println!("snapshot {number}: {} us, {cut:?}", snapshot.stall_us());
        if number == 4 {
            let extracted = folder.path().join("vda.raw");
            tools::extract_range(&snapshot.devices[0].frozen_layer, "qcow2", 0, COUNTERS_AT, &extracted)?;
            tools::check_ext4(&extracted)?;
        }
    }
    // One after the other instead of as a group: the oracle must see that.
    let mut regions = Vec::new();
    for name in &names {
        let snapshot = backend.snapshot(&format!("single-{name}"), &[name])?;
        std::thread::sleep(Duration::from_millis(200));
        regions.push(tools::read_range(&snapshot.devices[0].frozen_layer, "qcow2", COUNTERS_AT, LAYOUT.region_bytes())?);
    }
    let violations = counters::verify(LAYOUT, &regions).expect_err("disks cut at different times are no one cut");
    println!("cut at different times: {}", violations[0]);

    let total = guest.stop_counters()?;
    println!("{total:?}");
    ensure!(total.errors.is_empty(), "the counters met errors: {:?}", total.errors);
    ensure!(!guest.reports().is_empty(), "the counters sent no reports");
    ensure!(total.counters.iter().all(|counter| *counter > 5), "the counters hardly moved: {:?}", total.counters);

    guest.reboot()?;
    guest.run("mount /dev/vda /mnt && cmp /bin/busybox /mnt/busybox", MINUTE)?;
    guest.start_counters(&counters)?;
    let resumed = guest.stop_counters()?;
    ensure!(resumed.counters.iter().zip(&total.counters).all(|(now, then)| now >= then), "the counters began anew: {:?}", resumed.counters);
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());
    guest.power_off()?;
    backend.stop()?;
    ensure!(tools::check_all(folder.path())? > names.len(), "there are overlays");
    Ok(())
}

#[test]
fn guest_boots_from_its_disk() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("root.qcow2");
    let base = root_image()?;
    tools::create_overlay(&image, &base, "raw")?;
    let device = Device { name: "vda".to_owned(), image, format: "qcow2".to_owned(), socket: folder.path().join("vda.sock"), queues: 2 };
    let refused =
        Backend::launch(Kind::Snapfenced, folder.path(), std::slice::from_ref(&device)).expect_err("its backing file is elsewhere");
    let refused = refused.to_string();
    ensure!(refused.contains("vda") && refused.contains("root.raw") && refused.contains("--allow-dir"), "no help in: {refused}");
    let allowed = [base.parent().context("a file is in a folder")?];
    let backend = Backend::launch_with_backing_in(&allowed, Kind::Snapfenced, folder.path(), std::slice::from_ref(&device))?;
    let config = Config { disks: disks(&[device]), root: Some("/dev/vda".to_owned()), ..Config::default() };
    let guest = Guest::boot(&config, folder.path())?;
    println!("booted with {} in {:?}", guest.accelerator().name(), guest.ready().uptime);
    ensure!(guest.ready().root == "/dev/vda", "the root is {}", guest.ready().root);
    guest.run("grep -q Debian /etc/os-release && echo kept >/root/kept", MINUTE)?;
    guest.reboot()?;
    ensure!(guest.run("cat /root/kept", MINUTE)? == "kept\n", "a file written before the reboot is lost");
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());
    guest.power_off()?;
    backend.stop()?;
    assert_eq!(tools::check_all(folder.path())?, 1);
    Ok(())
}

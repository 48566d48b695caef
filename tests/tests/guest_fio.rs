//! fio writes and verifies on every disk of a guest while its disks are snapshotted as one group; then the front-end dies without a word, and
//! another guest takes over the same disks. Afterwards every frozen layer is looked into.
//!
//! The scenario knows the daemon only as [`Kind`]; each daemon has a test below.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::backend::{Backend, Device, Kind};
use snapfence_tests::guest::{Config, Disk, Guest};
use snapfence_tests::tools;

const MINUTE: Duration = Duration::from_secs(60);
const DISK_MIB: u64 = 96;
/// The file system takes this much of each disk, fio the rest.
const FILE_SYSTEM_MIB: u64 = 64;
const FIO_SECONDS: u64 = 6;
const SNAPSHOTS: usize = 4;
const PATHS: [&str; 3] = ["/dev/vda", "/dev/vdb", "/dev/vdc"];

/// Random writes of mixed sizes on all disks at once, each read back and compared soon after and once more at the end.
fn fio() -> String {
    let jobs: String = PATHS.iter().map(|path| format!(" --name={} --filename={path}", path.trim_start_matches("/dev/"))).collect();
    let (offset, size) = (FILE_SYSTEM_MIB, DISK_MIB - FILE_SYSTEM_MIB);
    format!(
        "fio --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=8 --offset={offset}m --size={size}m \
         --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime={FIO_SECONDS} --output-format=terse{jobs}"
    )
}

fn devices(folder: &Path) -> Result<Vec<Device>> {
    (0..PATHS.len())
        .map(|index| {
            let name = format!("disk{index}");
            let mut image = folder.join(format!("{name}.base"));
            let format = if index == 0 { "raw" } else { "qcow2" };
            tools::create_image(&image, format, DISK_MIB << 20)?;
            if index == 2 {
                let overlay = folder.join(format!("{name}.qcow2"));
                tools::create_overlay(&overlay, &image, format)?;
                image = overlay;
            }
            Ok(Device { socket: folder.join(format!("{name}.sock")), name, image, format: format.to_owned(), queues: 2 })
        })
        .collect()
}

fn scenario(kind: Kind) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let devices = devices(folder.path())?;
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    let mut backend = Backend::launch(kind, folder.path(), &devices)?;
    let disks = devices.iter().map(|device| Disk::new(&device.socket, device.queues)).collect();
    let config = Config { disks, ..Config::default() };
    let guest = Guest::boot(&config, folder.path())?;
    for path in PATHS {
        let name = path.trim_start_matches("/dev/");
        guest.run(&format!("mkfs.ext4 -q {path} {FILE_SYSTEM_MIB}m && mkdir /mnt/{name} && mount {path} /mnt/{name}"), MINUTE)?;
        guest.run(&format!("seq 1 50000 >/mnt/{name}/numbers && sync"), MINUTE)?;
    }

    let mut frozen = Vec::new();
    let verified = std::thread::scope(|scope| {
        let fio = scope.spawn(|| guest.run(&fio(), 3 * MINUTE));
        for number in 0..SNAPSHOTS {
            std::thread::sleep(Duration::from_secs(FIO_SECONDS) / (SNAPSHOTS as u32 + 1));
            let snapshot = backend.snapshot(&format!("s{number}"), &names)?;
            println!("snapshot {number}: {} us", snapshot.stall_us());
            frozen.push(snapshot);
        }
        fio.join().expect("the thread does not panic")
    });
    verified.context("fio found wrong data, or an error")?;
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());

    // Work in the page cache and in the queues, when QEMU is killed.
    guest.run("for at in /mnt/*; do dd if=/dev/zero of=$at/cut bs=64k count=200 >/dev/null 2>&1 & done", MINUTE)?;
    drop(guest);
    let guest = Guest::boot(&config, folder.path()).context("a second guest on the disks of a killed one")?;
    for path in PATHS {
        let check = format!("mount {path} /mnt && seq 1 50000 | cmp - /mnt/numbers && umount /mnt && e2fsck -f -n {path}");
        guest.run(&check, MINUTE)?;
    }
    guest.reboot()?;
    guest.run(&fio(), 3 * MINUTE).context("fio after the reboot")?;
    assert_eq!(guest.disk_errors()?, Vec::<String>::new());
    guest.power_off()?;
    backend.stop()?;

    // The bases of which one is raw, one overlay from the beginning, and those of the snapshots.
    assert_eq!(tools::check_all(folder.path())?, PATHS.len() + SNAPSHOTS * PATHS.len());
    for snapshot in &frozen {
        for (index, device) in snapshot.devices.iter().enumerate() {
            let format = if index == 0 && snapshot.name == "s0" { "raw" } else { "qcow2" };
            let copy = folder.path().join("extracted.raw");
            tools::extract_range(&device.frozen_layer, format, 0, FILE_SYSTEM_MIB << 20, &copy)?;
            tools::check_ext4(&copy).with_context(|| format!("{} of {}", device.device, snapshot.name))?;
            let numbers = tools::read_from_ext4(&copy, "/numbers")?;
            ensure!(numbers == tools::run("seq", ["1", "50000"])?.as_bytes(), "/numbers of {} in {} differs", device.device, snapshot.name);
        }
    }
    Ok(())
}

#[test]
fn fio_verifies_through_snapshots_and_a_new_guest() -> Result<()> {
    scenario(Kind::Snapfenced)
}

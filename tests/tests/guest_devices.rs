//! What the guest's own driver makes of a disk: its size, serial, queues, write cache and read-only flag are as asked for; discards and zeroes
//! give space back to the host; and a disk that is taken away leaves the others alone.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use snapfence_tests::backend::{Backend, Device, Kind};
use snapfence_tests::guest::{Config, Disk, Guest};
use snapfence_tests::tools;

const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn shows(guest: &Guest, script: &str, expected: &str) -> Result<()> {
    let found = guest.run(script, MINUTE)?;
    ensure!(found.trim() == expected, "{script} shows {:?} in the guest instead of {expected:?}", found.trim());
    Ok(())
}

/// Bytes that the image's file takes of the host's disk.
fn allocated(image: &Path) -> Result<u64> {
    Ok(tools::layers(image, "qcow2")?[0].allocated_bytes)
}

/// Space is given back behind the guest's back: after its flush, not before the answer.
fn wait_until_below(image: &Path, bytes: u64) -> Result<()> {
    let end = Instant::now() + MINUTE;
    while allocated(image)? >= bytes {
        ensure!(Instant::now() < end, "{} still takes {} bytes, not below {bytes}", image.display(), allocated(image)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn guest_sees_the_disks_that_were_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let image = path("one.qcow2");
    tools::create_image(&image, "qcow2", 128 * MIB)?;
    let one = Device { name: "one".to_owned(), image: image.clone(), format: "qcow2".to_owned(), socket: path("one.sock"), queues: 2 };
    let backend = Backend::launch(Kind::Snapfenced, folder.path(), std::slice::from_ref(&one))?;

    // The second one comes over the control socket.
    std::fs::write(path("two.raw"), vec![b'r'; 8 * MIB as usize])?;
    let added = format!(
        "name=two,image={},format=raw,socket={},readonly=on,serial=READ-ONLY 01,cache=buffered",
        path("two.raw").display(),
        path("two.sock").display()
    );
    backend.snapfence(&["device", "add", &added])?;
    let disks = vec![Disk::new(&one.socket, one.queues), Disk::new(&path("two.sock"), 1)];
    let guest = Guest::boot(&Config { disks, ..Config::default() }, folder.path())?;

    shows(&guest, "cat /sys/block/vda/size", &(128 * MIB / 512).to_string())?;
    shows(&guest, "cat /sys/block/vda/serial", "one")?;
    shows(&guest, "ls /sys/block/vda/mq | wc -l", "2")?;
    shows(&guest, "cat /sys/block/vda/ro", "0")?;
    shows(&guest, "cat /sys/block/vdb/size", &(8 * MIB / 512).to_string())?;
    shows(&guest, "cat /sys/block/vdb/serial", "READ-ONLY 01")?;
    shows(&guest, "cat /sys/block/vdb/ro", "1")?;
    shows(&guest, "dd if=/dev/vdb bs=1M 2>/dev/null | tr -d r | wc -c", "0")?;
    shows(&guest, "dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>/dev/null || echo refused", "refused")?;

    // The guest turns the write cache off and on again.
    for (cache, word) in [("write back", ""), ("write through", "write through"), ("write back", "write back")] {
        if !word.is_empty() {
            guest.run(&format!("echo '{word}' >/sys/block/vda/cache_type"), MINUTE)?;
        }
        shows(&guest, "cat /sys/block/vda/cache_type", cache)?;
        guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=16 oflag=direct 2>/dev/null", MINUTE)?;
    }

    let fill = "dd if=/dev/urandom of=/dev/vda bs=1M count=32 oflag=direct conv=fsync 2>/dev/null";
    let empty = "dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | tr -d '\\0' | wc -c";
    // Zeroes keep their space, as a guest that asks for them wants it; a discard gives it back once it is flushed.
    guest.run(fill, MINUTE)?;
    guest.run("/bin/blkdiscard -z /dev/vda", MINUTE)?;
    shows(&guest, empty, "0")?;
    guest.run(fill, MINUTE)?;
    let written = allocated(&image)?;
    ensure!(written >= 32 * MIB, "32 MiB written, {written} bytes allocated");
    guest.run("/bin/blkdiscard /dev/vda && dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=32000 conv=fsync 2>/dev/null", MINUTE)?;
    shows(&guest, empty, "0")?;
    // Meanwhile the daemon may have made some more clusters ready for new data, so not all of the 32 MiB show.
    wait_until_below(&image, written - 8 * MIB)?;

    let refusal = backend.snapfence(&["device", "remove", "two"]).expect_err("a guest is connected").to_string();
    ensure!(refusal.contains("two") && refusal.contains("force"), "no help in: {refusal}");
    backend.snapfence(&["device", "remove", "two", "--force"])?;
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=4 oflag=direct conv=fsync 2>/dev/null", MINUTE)?;
    shows(&guest, "dmesg | grep -c 'vda.*error'; true", "0")?;
    let list = backend.snapfence(&["device", "list", "--json"])?;
    ensure!(list.contains("\"one\"") && !list.contains("\"two\""), "the devices are {list}");

    guest.power_off()?;
    backend.stop()?;
    assert_eq!(tools::check(&image)?, tools::Check::default());
    let left = allocated(&image)?;
    ensure!(left < 8 * MIB, "{left} bytes are allocated for 4 MiB of data");
    ensure!(std::fs::read(path("two.raw"))?.iter().all(|byte| *byte == b'r'), "the read-only image has changed");
    Ok(())
}

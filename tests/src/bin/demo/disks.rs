//! The three disks of the demo, and what is known to be on them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use snapfence_tests::backend::Device;
use snapfence_tests::counters::Layout;
use snapfence_tests::guest::{Guest, root_image};
use snapfence_tests::tools;

const MIB: u64 = 1 << 20;

/// Number of layers of the deep chain.
pub(crate) const DEPTH: u32 = 20;
/// Number of virtqueues of each disk.
const QUEUES: u16 = 2;

/// More chains than processors, so that each queue has several requests under way.
pub(crate) const LAYOUT: Layout = Layout { chains: 4, slots: 128 };

/// A file on every file system, and the script that prints what is in it.
pub(crate) const KNOWN_FILE: &str = "srv/known";
pub(crate) const KNOWN_SCRIPT: &str = "seq 1 20000";

/// What is known of a disk beforehand. The file system is at its start, the counters behind that.
pub(crate) struct Disk {
    pub(crate) what: &'static str,
    pub(crate) path: &'static str,
    pub(crate) mount: &'static str,
    pub(crate) file_system_bytes: u64,
    pub(crate) counters_at: u64,
    bytes: u64,
}

pub(crate) const DISKS: [Disk; 3] = [
    Disk { what: "raw, the system", path: "/dev/vda", mount: "/", file_system_bytes: 512 * MIB, counters_at: 520 * MIB, bytes: 544 * MIB },
    Disk {
        what: "qcow2, empty",
        path: "/dev/vdb",
        mount: "/mnt/b",
        file_system_bytes: 192 * MIB,
        counters_at: 200 * MIB,
        bytes: 256 * MIB,
    },
    Disk {
        what: "qcow2, a chain of 20 layers",
        path: "/dev/vdc",
        mount: "/mnt/c",
        file_system_bytes: 192 * MIB,
        counters_at: 200 * MIB,
        bytes: 256 * MIB,
    },
];

/// Where the deep chain has data of all its layers: behind the counters, so that it stays as it is.
const DEEP_AT_MIB: u64 = 220;
/// What these data are, as their MD5 sum; found when they are made.
const DEEP_SUM_FILE: &str = "vdc.md5";

/// Makes the images in `images`; the sockets will be in `run`.
pub(crate) fn make(images: &Path, run: &Path) -> Result<Vec<Device>> {
    let [raw, plain, deep] = &DISKS;
    let device = |name: &str, image: std::path::PathBuf, format: &str| Device {
        name: name.to_owned(),
        image,
        format: format.to_owned(),
        socket: run.join(format!("{name}.sock")),
        queues: QUEUES,
    };

    let system = images.join("vda.raw");
    tools::run("cp", ["--sparse=always".as_ref(), root_image()?.as_os_str(), system.as_os_str()])?;
    fs::OpenOptions::new().write(true).open(&system)?.set_len(raw.bytes)?;

    let empty = images.join("vdb.qcow2");
    tools::create_image(&empty, "qcow2", plain.bytes)?;

    let mut top = images.join("vdc.00.qcow2");
    tools::create_image(&top, "qcow2", deep.bytes)?;
    for layer in 0..DEPTH {
        if layer > 0 {
            let overlay = images.join(format!("vdc.{layer:02}.qcow2"));
            tools::create_overlay(&overlay, &top, "qcow2")?;
            top = overlay;
        }
        // Each layer hides half of what the one below wrote, so that all of them are read.
        let command = format!("write -q -P {} {}k 128k", layer + 1, DEEP_AT_MIB * 1024 + u64::from(layer) * 64);
        tools::qemu_io(["-f".as_ref(), "qcow2".as_ref(), "-c".as_ref(), command.as_ref(), top.as_os_str()])?;
    }
    let data = tempfile::NamedTempFile::new()?;
    tools::extract_range(&top, "qcow2", DEEP_AT_MIB * MIB, 2 * MIB, data.path())?;
    let sum = tools::run("md5sum", [data.path()])?;
    fs::write(run.join(DEEP_SUM_FILE), sum.split(' ').next().unwrap_or_default())?;

    Ok(vec![device("vda", system, "raw"), device("vdb", empty, "qcow2"), device("vdc", top, "qcow2")])
}

/// Compares what the guest reads of the deep chain's layers with what qemu-img read before.
pub(crate) fn check_deep_data(guest: &Guest, run: &Path) -> Result<()> {
    let expected = fs::read_to_string(run.join(DEEP_SUM_FILE))?;
    let script = format!("dd if=/dev/vdc bs=1M skip={DEEP_AT_MIB} count=2 iflag=direct 2>/dev/null | md5sum");
    let found = guest.run(&script, Duration::from_secs(60))?;
    ensure!(found.starts_with(&expected), "/dev/vdc reads differently in the guest: {} instead of {expected}", found.trim());
    Ok(())
}

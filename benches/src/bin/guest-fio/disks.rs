//! The three disks, made once and copied, so that all sides serve the same.

use std::fs::File;
use std::io::{Read as _, copy, repeat};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use snapfence_tests::backend::Device;
use snapfence_tests::tools;

/// What the disks are, in the guest's order: vda, vdb, vdc.
pub(crate) const DISKS: [(&str, &str); 3] =
    [("vda", "raw"), ("vdb", "qcow2, fully allocated"), ("vdc", "qcow2, a chain of 10 layers, the top one empty")];
/// Layers of the third disk.
const DEPTH: u64 = 10;
const STRIPE_KIB: u64 = 64;

/// Makes the images of `mib` MiB in `folder`.
pub(crate) fn make(folder: &Path, mib: u64) -> Result<()> {
    let raw = folder.join("vda.raw");
    copy(&mut repeat(0x5a).take(mib << 20), &mut File::create(&raw)?)?;
    let convert = |to: &Path| {
        let arguments = ["convert", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref).into_iter().chain([raw.as_os_str(), to.as_os_str()]);
        tools::qemu_img(arguments).map(drop)
    };
    convert(&folder.join("vdb.qcow2"))?;
    convert(&layer(folder, 0))?;
    for number in 1..DEPTH {
        let (below, this) = (layer(folder, number - 1), layer(folder, number));
        tools::create_overlay(&this, &below, "qcow2")?;
        if number + 1 < DEPTH {
            // Every layer has its own stripes, and shows those of the others.
            let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
            for stripe in (0..(mib << 10) / STRIPE_KIB).filter(|stripe| stripe % DEPTH == number) {
                arguments.extend(["-c".to_owned(), format!("write -q -P {number} {}k {STRIPE_KIB}k", stripe * STRIPE_KIB)]);
            }
            tools::qemu_io(arguments.iter().map(AsRef::as_ref).chain([this.as_os_str()]))?;
        }
    }
    Ok(())
}

/// Copies what [`make`] has made in `from` to `to`, and says what to serve; the sockets will be in `run`.
pub(crate) fn copied(from: &Path, to: &Path, run: &Path, queues: u16) -> Result<Vec<Device>> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_file() {
            let copy = to.join(path.file_name().context("a file has a name")?);
            tools::run("cp", ["--sparse=auto".as_ref(), path.as_os_str(), copy.as_os_str()])?;
            // Else the kernel would be writing it while others are measured.
            File::open(copy)?.sync_all()?;
        }
    }
    let device = |name: &str, image: PathBuf, format: &str| Device {
        name: name.to_owned(),
        image,
        format: format.to_owned(),
        socket: run.join(format!("{name}.sock")),
        queues,
    };
    Ok(vec![
        device("vda", to.join("vda.raw"), "raw"),
        device("vdb", to.join("vdb.qcow2"), "qcow2"),
        device("vdc", layer(to, DEPTH - 1), "qcow2"),
    ])
}

fn layer(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("vdc.{number}.qcow2"))
}

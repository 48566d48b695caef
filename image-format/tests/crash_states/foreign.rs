//! Disks under the eyes of QEMU.

use std::process::Command;

use snapfence_image_format::storage::simulated::SimulatedEnvironment;

use crate::layout::{image_name, image_path};
use crate::pattern::{self, SECTOR, Value};
use crate::qemu;
use crate::recovery::Recovered;

/// Shows a disk to `qemu-img` as a power cut has left it, when it may leak, and as it is after recovery, when it may not and its content must be
/// what we have found.
///
/// # Panics
/// If anything else is found.
pub(crate) fn judge(found: &SimulatedEnvironment, after: &SimulatedEnvironment, top: usize, recovered: &Recovered) {
    let images: Vec<String> = (0..=top).map(image_path).collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    qemu::check(found, &images, true).unwrap_or_else(|error| panic!("as a power cut has left it: {error}"));
    qemu::check(after, &images, false).unwrap_or_else(|error| panic!("recovered: {error}"));
    let expected = recovered.contents.last().expect("a stack has layers");
    assert!(content(after, top) == *expected, "qemu-img reads something else than {expected:?}");
}

/// What `qemu-img` reads from a stack.
fn content(environment: &SimulatedEnvironment, top: usize) -> Vec<Value> {
    let scratch = tempfile::tempdir().expect("a directory for the test");
    for file in environment.files() {
        environment.export(&file, scratch.path().join(file.file_name().expect("a file"))).expect("a copy of the file");
    }
    let whole = scratch.path().join("whole");
    let command = ["convert", "-f", "qcow2", "-O", "raw"];
    let output =
        Command::new("qemu-img").args(command).arg(scratch.path().join(image_name(top))).arg(&whole).output().expect("qemu-img runs");
    assert!(output.status.success(), "qemu-img {command:?}: {}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(whole).expect("the copy");
    let value = |(sector, bytes): (u64, &[u8])| pattern::identify(sector, bytes).unwrap_or_else(|| panic!("sector {sector} is foreign"));
    (0..).zip(bytes.chunks_exact(SECTOR)).map(value).collect()
}

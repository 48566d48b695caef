//! What process 1 of the initramfs does before anything else can run.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, mount, mount_move};

/// Where the service on a disk's system finds this program: it is put there on the way over, so that the disk need not carry a copy.
const PLACE_ON_DISK_SYSTEM: &str = "/run/snapfence/agent";
const NO_DATA: Option<&CStr> = None;

/// Turns the initramfs into a system, or into the one on the disk that the kernel command line names.
pub(crate) fn prepare() -> Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), NO_DATA).with_context(|| format!("cannot mount {kind} at {at}"))?;
    }
    load_modules(Path::new("/modules"))?;
    let command_line = fs::read_to_string("/proc/cmdline")?;
    match command_line.split_whitespace().find_map(|word| word.strip_prefix("snapfence.root=")) {
        Some(disk) => move_over_to(disk),
        None => Ok(()),
    }
}

/// Loads the drivers that `order` lists, one a line, in that order: a driver comes after those it needs.
fn load_modules(folder: &Path) -> Result<()> {
    let order = fs::read_to_string(folder.join("order")).context("the initramfs has no list of drivers")?;
    for name in order.lines() {
        let file = File::open(folder.join(name)).with_context(|| format!("the initramfs lacks the driver {name}"))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("cannot load the driver {name}"))?;
    }
    Ok(())
}

/// Mounts `disk`, makes it the root, and becomes its init.
fn move_over_to(disk: &str) -> Result<()> {
    wait_for(disk)?;
    fs::create_dir_all("/disk")?;
    mount(disk, "/disk", "ext4", MountFlags::NOATIME, NO_DATA).with_context(|| format!("cannot mount {disk}"))?;
    fs::create_dir_all(Path::new(PLACE_ON_DISK_SYSTEM).parent().expect("a file in a folder"))?;
    fs::copy("/proc/self/exe", PLACE_ON_DISK_SYSTEM)?;
    fs::set_permissions(PLACE_ON_DISK_SYSTEM, fs::Permissions::from_mode(0o755))?;
    for at in ["proc", "sys", "dev", "run", "tmp"] {
        mount_move(format!("/{at}"), format!("/disk/{at}")).with_context(|| format!("{disk} has no folder {at}"))?;
    }
    std::env::set_current_dir("/disk")?;
    mount_move(".", "/").context("cannot make the disk the root")?;
    rustix::process::chroot(".").context("cannot make the disk the root")?;
    std::env::set_current_dir("/")?;
    let error = Command::new("/sbin/init").exec();
    bail!("{disk} has no init that runs: {error}")
}

/// Waits for the driver to find `disk`.
fn wait_for(disk: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let name = CString::new(disk)?;
    while rustix::fs::stat(&name).is_err() {
        if Instant::now() > deadline {
            bail!("{disk} did not appear");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

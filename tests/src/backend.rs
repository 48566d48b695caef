//! The storage daemon that serves the guest's disks.
//!
//! [`Backend::launch`] is the only place that knows how each daemon is started; snapshots are taken through [`Backend::snapshot`], whichever it
//! is. qemu-storage-daemon is here as the peer that snapfenced is compared with, and as proof that the harness works without it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::process::Process;
use crate::qmp::Qmp;
use crate::tools;

/// How long a daemon gets to open its images and listen.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The one this project makes.
    Snapfenced,
    /// QEMU's.
    QemuStorageDaemon,
    /// The same at its fastest: io_uring, and a thread of its own for each disk. Not to be snapshotted under load: 11.1 hangs then with two disks or
    /// more, 7.2 with four.
    QemuStorageDaemonThreads,
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "snapfenced" => Ok(Self::Snapfenced),
            "qsd" => Ok(Self::QemuStorageDaemon),
            other => bail!("no back-end is called {other:?}; there are snapfenced and qsd"),
        }
    }
}

/// A disk to serve.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its name in the daemon.
    pub name: String,
    /// The top image.
    pub image: PathBuf,
    /// The top image's format.
    pub format: String,
    /// Where the front-end connects.
    pub socket: PathBuf,
    /// Number of virtqueues.
    pub queues: u16,
}

/// A snapshot as the daemon reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// `frozen` when it is complete.
    pub state: String,
    /// Per device, what became of it.
    pub devices: Vec<DeviceSnapshot>,
}

/// One device's part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSnapshot {
    /// The device.
    pub device: String,
    /// The image that writes go to from now on.
    pub overlay: PathBuf,
    /// The image that holds the snapshot, and never changes again.
    pub frozen_layer: PathBuf,
    /// Microseconds from the first to the last queue switched.
    pub switch_us: u64,
    /// Microseconds of the longest held completion.
    pub hold_us: u64,
    /// Microseconds until the layer was frozen.
    pub freeze_us: u64,
}

impl Snapshot {
    /// The longest that any request of the guest was held up, in microseconds.
    #[must_use]
    pub fn stall_us(&self) -> u64 {
        self.devices.iter().map(|device| device.hold_us).max().unwrap_or(0)
    }
}

/// A running daemon. Killed when dropped; [`Backend::stop`] ends it in good order.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    control: PathBuf,
    driver: Driver,
    devices: Vec<Device>,
}

/// What differs between the daemons once they run.
#[derive(Debug)]
enum Driver {
    Snapfenced,
    /// The present top image of each device; the daemon is asked for each new one by name.
    QemuStorageDaemon {
        qmp: Qmp,
        tops: Vec<Top>,
    },
}

#[derive(Clone, Debug)]
struct Top {
    node: String,
    image: PathBuf,
}

impl Backend {
    /// Starts the daemon with its control socket, state and log in `folder`, and waits until it serves all devices.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error holds what it printed.
    pub fn launch(kind: Kind, folder: &Path, devices: &[Device]) -> Result<Self> {
        Self::launch_with_backing_in(&[], kind, folder, devices)
    }

    /// As [`Backend::launch`], for images whose backing files lie in other folders than they do.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error holds what it printed.
    pub fn launch_with_backing_in(allowed: &[&Path], kind: Kind, folder: &Path, devices: &[Device]) -> Result<Self> {
        let control = folder.join("control.sock");
        let mut command = command(kind, folder, &control, devices)?;
        if kind == Kind::Snapfenced {
            for folder in allowed {
                command.arg("--allow-dir").arg(folder);
            }
        }
        let mut process = Process::spawn(command, &folder.join("backend.log"))?;
        let driver = match kind {
            Kind::Snapfenced => {
                process.wait_until("line with `ready`", START_DEADLINE, |process| process.output().contains("ready"))?;
                Driver::Snapfenced
            }
            Kind::QemuStorageDaemon | Kind::QemuStorageDaemonThreads => {
                let own = own_monitor(&control);
                process.wait_until("control socket", START_DEADLINE, |_| UnixStream::connect(&own).is_ok())?;
                let qmp = Qmp::connect(&own)?;
                let tops = devices.iter().map(|device| Top { node: device.name.clone(), image: device.image.clone() }).collect();
                Driver::QemuStorageDaemon { qmp, tops }
            }
        };
        Ok(Self { process, control, driver, devices: devices.to_vec() })
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The daemon's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What the daemon has printed.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Takes a snapshot of the named devices as one group, with overlays that the daemon makes, and waits until it is frozen.
    ///
    /// # Errors
    ///
    /// If the daemon reports a failure.
    pub fn snapshot(&mut self, name: &str, devices: &[&str]) -> Result<Snapshot> {
        match &mut self.driver {
            Driver::Snapfenced => {
                let mut arguments = vec!["snapshot", "create", name];
                for device in devices {
                    arguments.extend(["--device", device]);
                }
                arguments.push("--json");
                let answer = self.snapfence(&arguments)?;
                serde_json::from_str(&answer).with_context(|| format!("not the expected report: {answer}"))
            }
            Driver::QemuStorageDaemon { qmp, tops } => {
                let mut actions = Vec::new();
                let mut changed = Vec::new();
                for name_of_device in devices {
                    let index = self.devices.iter().position(|device| device.name == *name_of_device).context("no such device")?;
                    let top = &tops[index];
                    let overlay = top.image.with_file_name(format!("{name_of_device}.{name}.qcow2"));
                    let node = format!("{name_of_device}.{name}");
                    actions.push(json!({ "type": "blockdev-snapshot-sync", "data": {
                        "node-name": top.node, "snapshot-node-name": node, "snapshot-file": overlay, "format": "qcow2",
                    }}));
                    changed.push((index, Top { node, image: overlay }));
                }
                let begun = Instant::now();
                qmp.execute("transaction", json!({ "actions": actions }))?;
                // It drains all queues for the whole of the transaction: that is what a request can be held up.
                let stall_us = u64::try_from(begun.elapsed().as_micros())?;
                let mut report = Snapshot { name: name.to_owned(), state: "frozen".to_owned(), devices: Vec::new() };
                for (index, top) in changed {
                    let frozen_layer = std::mem::replace(&mut tops[index], top.clone()).image;
                    let device = self.devices[index].name.clone();
                    report.devices.push(DeviceSnapshot {
                        device,
                        overlay: top.image,
                        frozen_layer,
                        switch_us: stall_us,
                        hold_us: stall_us,
                        freeze_us: stall_us,
                    });
                }
                Ok(report)
            }
        }
    }

    /// The layers of a device as a tree, for people.
    ///
    /// # Errors
    ///
    /// If the device is not there.
    pub fn stack(&self, device: &str) -> Result<String> {
        match &self.driver {
            Driver::Snapfenced => self.snapfence(&["stack", "show", device]),
            Driver::QemuStorageDaemon { tops, .. } => {
                let index = self.devices.iter().position(|known| known.name == device).context("no such device")?;
                let format = if tops[index].node == device { self.devices[index].format.as_str() } else { "qcow2" };
                let mut tree = format!("{device}\n");
                for (depth, layer) in tools::layers(&tops[index].image, format)?.iter().enumerate() {
                    let name = layer.path.file_name().unwrap_or_default().to_string_lossy();
                    let kib = layer.allocated_bytes / 1024;
                    writeln!(tree, "{:depth$}└─ {name} ({}, {kib} KiB allocated)", "", layer.format)?;
                }
                Ok(tree)
            }
        }
    }

    /// Runs the command line against this daemon.
    ///
    /// # Errors
    ///
    /// If its status is not 0; the error holds what it printed.
    pub fn snapfence(&self, arguments: &[&str]) -> Result<String> {
        let program = program("snapfence")?;
        let program = program.to_str().context("the path is not UTF-8")?;
        let control = [OsString::from("--control"), self.control.clone().into()];
        tools::run(program, control.into_iter().chain(arguments.iter().map(OsString::from)))
    }

    /// Waits for a daemon that was told to end by its control socket.
    ///
    /// # Errors
    ///
    /// If it does not end, or not with status 0.
    pub fn wait_ended(mut self) -> Result<()> {
        let status = self.process.wait(START_DEADLINE)?;
        if !status.success() {
            bail!("the daemon was told to quit and ended with {status}: {}", self.process.output().trim());
        }
        Ok(())
    }

    /// Stops the daemon in good order.
    ///
    /// # Errors
    ///
    /// If it does not end, or not with status 0.
    pub fn stop(self) -> Result<()> {
        self.process.stop()
    }
}

/// The command line that starts a daemon.
fn command(kind: Kind, folder: &Path, control: &Path, devices: &[Device]) -> Result<Command> {
    match kind {
        Kind::Snapfenced => {
            let state = folder.join("state");
            std::fs::create_dir_all(&state)?;
            let mut command = Command::new(program("snapfenced")?);
            command.arg("--control").arg(control).arg("--state-dir").arg(state);
            for Device { name, image, format, socket, queues } in devices {
                let (image, socket) = (image.display(), socket.display());
                command.arg("--device").arg(format!("name={name},image={image},format={format},socket={socket},queues={queues}"));
            }
            Ok(command)
        }
        Kind::QemuStorageDaemon | Kind::QemuStorageDaemonThreads => {
            let has_threads = kind == Kind::QemuStorageDaemonThreads;
            let aio = if has_threads { "io_uring" } else { "threads" };
            let mut command = Command::new("qemu-storage-daemon");
            for Device { name, image, format, socket, queues } in devices {
                let file = json!({
                    "driver": "file", "filename": image, "aio": aio, "cache": { "direct": true }, "discard": "unmap",
                });
                let node = json!({
                    "driver": format, "node-name": name, "file": file, "cache": { "direct": true }, "discard": "unmap",
                });
                let mut export = json!({
                    "type": "vhost-user-blk", "id": format!("export-{name}"), "node-name": name, "writable": true,
                    "addr": { "type": "unix", "path": socket }, "num-queues": queues,
                });
                if has_threads {
                    export["iothread"] = format!("thread-{name}").into();
                    command.arg("--object").arg(format!("iothread,id=thread-{name}"));
                }
                command.arg("--blockdev").arg(node.to_string()).arg("--export").arg(export.to_string());
            }
            for (id, path) in [("control", control), ("own", &own_monitor(control))] {
                let path = path.to_str().context("the path is not UTF-8")?.replace(',', ",,");
                command.arg("--chardev").arg(format!("socket,id={id},path={path},server=on,wait=off"));
                command.arg("--monitor").arg(format!("chardev={id}"));
            }
            Ok(command)
        }
    }
}

/// Where [`Backend`] speaks to qemu-storage-daemon. A monitor of QEMU's serves one client at a time, so the control socket stays free for others.
fn own_monitor(control: &Path) -> PathBuf {
    control.with_extension("own.sock")
}

/// A program of this workspace, built beside the one that runs now.
///
/// # Errors
///
/// If it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not beside {}; build the workspace first (make build)", here.display()))
}

//! A daemon in a folder of its own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use snapfence_tests::backend::program;
use snapfence_tests::process::Process;
use snapfence_tests::tools;
use tempfile::TempDir;

/// How long anything may take that takes milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A folder with disks and, at times, a daemon.
pub(crate) struct Place {
    folder: TempDir,
    runs: u32,
}

impl Place {
    /// An empty one.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, runs: 0 })
    }

    /// One with qcow2 disks of these names.
    pub(crate) fn with_disks(names: &[&str]) -> Result<Self> {
        let place = Self::new()?;
        for name in names {
            tools::create_image(&place.path(&format!("{name}.qcow2")), "qcow2", 16 << 20)?;
        }
        Ok(place)
    }

    /// A file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The specification of a disk.
    pub(crate) fn device(&self, name: &str, image: &str) -> String {
        let folder = self.folder.path().display();
        format!("name={name},image={folder}/{image},format=qcow2,socket={folder}/{name}.sock")
    }

    /// What every start says: the control socket and the state directory.
    pub(crate) fn base(&self) -> Vec<OsString> {
        ["--control".into(), self.path("control.sock").into(), "--state-dir".into(), self.path("state").into()].to_vec()
    }

    /// Starts a daemon.
    pub(crate) fn spawn(&mut self, arguments: impl IntoIterator<Item = OsString>, environment: &[(&str, &Path)]) -> Result<Process> {
        self.runs += 1;
        let mut command = Command::new(program("snapfenced")?);
        command.args(arguments).current_dir(self.folder.path()).envs(environment.iter().copied()).env_remove("SNAPFENCE_LOG");
        Process::spawn(command, &self.path(&format!("log{}", self.runs)))
    }

    /// Starts a daemon with these disks and waits until it is ready.
    pub(crate) fn serve(&mut self, devices: &[String]) -> Result<Daemon> {
        let mut arguments = self.base();
        for device in devices {
            arguments.extend(["--device".into(), device.into()]);
        }
        self.ready(arguments)
    }

    /// Starts a daemon with these arguments and waits until it is ready.
    pub(crate) fn ready(&mut self, arguments: Vec<OsString>) -> Result<Daemon> {
        let mut process = self.spawn(arguments, &[])?;
        process.wait_until("line with `ready`", PATIENCE, |process| process.output().contains("event=\"ready\""))?;
        Ok(Daemon { process, control: self.path("control.sock") })
    }

    /// The names of all files, sorted, without logs.
    pub(crate) fn files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.folder.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.retain(|name| !name.starts_with("log"));
        names.sort();
        Ok(names)
    }

    /// Has every qcow2 image checked.
    pub(crate) fn check_images(&self) -> Result<()> {
        tools::check_all(self.folder.path()).map(drop)
    }
}

/// What a run of `snapfence` came to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A daemon that is ready.
pub(crate) struct Daemon {
    pub(crate) process: Process,
    pub(crate) control: PathBuf,
}

impl Daemon {
    /// Runs `snapfence` against it.
    pub(crate) fn snapfence(&self, arguments: &[&str]) -> Result<Ended> {
        let output = Command::new(program("snapfence")?).args(arguments).env("SNAPFENCE_CONTROL", &self.control).output()?;
        Ok(Ended {
            status: output.status.code().context("it was killed")?,
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }

    /// As [`snapfence`](Self::snapfence), for what must succeed; its JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let ended = self.snapfence(&[arguments, &["--json"]].concat())?;
        if ended.status != 0 {
            bail!("{arguments:?}: {ended:?}");
        }
        serde_json::from_str(&ended.out).with_context(|| ended.out.clone())
    }

    /// Asks it to end with a signal and waits until it has. Gives its log.
    pub(crate) fn end(mut self, signal: Signal) -> Result<String> {
        self.process.signal(signal)?;
        self.ended()
    }

    /// Waits until it has ended, which must be with status 0. Gives its log.
    pub(crate) fn ended(&mut self) -> Result<String> {
        let status = self.process.wait(PATIENCE)?;
        let log = self.process.output();
        if status.code() != Some(0) {
            bail!("{status}: {log}");
        }
        Ok(log)
    }
}

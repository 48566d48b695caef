//! Programs that run beside a test, and end with it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How long a program gets to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// A running program of ours. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output and errors going to the file `log`.
    ///
    /// # Errors
    ///
    /// If the log cannot be made or the program cannot be started.
    pub fn spawn(mut command: Command, log: &Path) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("program")).to_string_lossy().into_owned();
        let file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    /// Process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the program has printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// # Errors
    ///
    /// If the program has ended; says how, and what it printed.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early ({status}): {}", self.name, self.output().trim()),
        }
    }

    /// Calls `done` until it says yes.
    ///
    /// # Errors
    ///
    /// If the program ends first, or `done` has not said yes after `deadline`.
    pub fn wait_until(&mut self, what: &str, deadline: Duration, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + deadline;
        while !done(self) {
            self.check_alive()?;
            if Instant::now() > end {
                bail!("{}: no {what} within {deadline:?}: {}", self.name, self.output().trim());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// If the program is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_child(&self.child);
        kill_process(id, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Waits for the program to end by itself.
    ///
    /// # Errors
    ///
    /// If it has not ended after `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("{} still runs after {deadline:?}: {}", self.name, self.output().trim());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks the program to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    ///
    /// If it does not end, or not with status 0.
    pub fn stop(mut self) -> Result<()> {
        self.check_alive()?;
        self.signal(Signal::TERM)?;
        let status = self.wait(PATIENCE)?;
        if !status.success() {
            bail!("{} was asked to stop and ended with {status}: {}", self.name, self.output().trim());
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

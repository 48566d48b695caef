//! What the commands do.

mod device;
mod events;
mod image;
mod job;
mod shell;
mod snapshot;
mod stack;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::Serialize;
use snapfence::client::Client;

use crate::arguments::{Arguments, Command};

/// What was asked for makes no sense. The exit status tells it from a failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// The output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the output")]
pub(crate) struct OutputError(#[source] io::Error);

/// Where the daemon is, and how to print.
#[derive(Debug)]
struct Session {
    control: PathBuf,
    json: bool,
}

impl Session {
    fn connect(&self) -> Result<Client> {
        if self.control.as_os_str().is_empty() {
            // Whoever names a daemon and has lost its name does not mean any daemon.
            return Err(UsageError("the path of the control socket is empty; see --control and SNAPFENCE_CONTROL".to_owned()).into());
        }
        Ok(Client::connect(&self.control)?)
    }

    /// Prints a value for programs, or what it looks like to people.
    fn print<T: Serialize + ?Sized>(&self, value: &T, people: impl FnOnce(&T) -> String) -> Result<()> {
        if self.json {
            let mut text = serde_json::to_string_pretty(value).context("the answer cannot be written as JSON")?;
            text.push('\n');
            output(&text)
        } else {
            output(&people(value))
        }
    }
}

/// Writes to standard output at once.
fn output(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(OutputError)?;
    Ok(())
}

/// A path as the daemon, which runs in another folder, can use it.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot make {} an absolute path", path.display()))
}

/// Does what the command line says.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { control, json, command } = arguments;
    let session = Session { control: control.into(), json };
    match command {
        Command::Device(command) => device::run(&session, command)?,
        Command::Snapshot(command) => snapshot::run(&session, command)?,
        Command::Stack(command) => stack::run(&session, command)?,
        Command::Job(command) => job::run(&session, command)?,
        Command::Image(command) => return image::run(&session, command),
        Command::Events => events::run(&session)?,
        Command::Completions { shell } => shell::completions(shell)?,
        Command::Manual { folder } => shell::manual(&folder)?,
    }
    Ok(ExitCode::SUCCESS)
}

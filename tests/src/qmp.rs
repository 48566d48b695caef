//! A small QMP client: enough to drive qemu-storage-daemon, a QEMU under test, or snapfenced's control socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};

/// A connection past the capabilities negotiation.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    next_id: u64,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    ///
    /// If nobody listens, or what answers is not QMP.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut qmp = Self { lines: BufReader::new(stream), next_id: 0, events: Vec::new() };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("{} greets with {greeting}, which is not QMP", path.display());
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and waits for its answer. Events that arrive meanwhile are kept for [`Qmp::take_events`].
    ///
    /// # Errors
    ///
    /// If the connection breaks, or the command is answered with an error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next_id += 1;
        let mut line = serde_json::to_vec(&json!({ "execute": command, "arguments": arguments, "id": self.next_id }))?;
        line.push(b'\n');
        self.lines.get_mut().write_all(&line)?;
        loop {
            let mut message = self.receive()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if message["id"] != self.next_id {
                bail!("answer with a strange id: {message}");
            } else if let Some(error) = message.get("error") {
                return Err(anyhow!("{command}: {}: {}", error["class"].as_str().unwrap_or("?"), error["desc"].as_str().unwrap_or("?")));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The events that have arrived so far.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// The first event of a kind, of those kept or still to come. Events before it are forgotten.
    ///
    /// # Errors
    ///
    /// If the connection breaks, or none comes within a minute.
    pub fn wait_event(&mut self, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut kept = self.take_events().into_iter();
        if let Some(event) = kept.by_ref().find(&is_it) {
            self.events.extend(kept);
            return Ok(event);
        }
        loop {
            let event = self.receive()?;
            if is_it(&event) {
                return Ok(event);
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("the connection was closed");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}

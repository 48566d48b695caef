//! A client of the control socket that waits for each answer.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::protocol::{Call, Event, Failure, Incoming, NEGOTIATION, Timestamp};

/// How long a daemon gets to greet: it does so at once.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the daemon could not be asked, or what it answered instead.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("no daemon listens on {}; start snapfenced with `--control {}`, or name its socket with --control or SNAPFENCE_CONTROL", path.display(), path.display())]
    NoDaemon {
        /// The control socket.
        path: PathBuf,
    },
    /// Not for this user.
    #[error("no permission for the control socket {}; only the daemon's own user and root may use it", path.display())]
    Forbidden {
        /// The control socket.
        path: PathBuf,
    },
    /// Not for another reason.
    #[error("cannot connect to the control socket {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else is there.
    #[error("{} does not greet as a control socket does; is it the socket of a device?", path.display())]
    NotControl {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon does not want this client.
    #[error("the daemon refuses the connection: {0}")]
    Refused(#[source] Failure),
    /// The connection has ended.
    #[error("the daemon has closed the connection; its log may say why")]
    Closed,
    /// The connection has broken.
    #[error("the connection to the daemon broke")]
    Broken(#[source] io::Error),
    /// The daemon says something that is not of this protocol.
    #[error("cannot make sense of the daemon's answer ({what}); are snapfence and snapfenced of the same version?")]
    Nonsense {
        /// What is wrong with it.
        what: String,
    },
    /// A command was not carried out.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// An event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// When it happened.
    pub timestamp: Timestamp,
    /// What happened.
    pub name: String,
    /// More about it.
    pub data: Value,
}

impl Received {
    /// The event, if it is one that this version knows.
    #[must_use]
    pub fn event(&self) -> Option<Event> {
        Event::parse(&self.name, &self.data).ok()
    }
}

/// A connection past the negotiation.
#[derive(Debug)]
pub struct Client {
    lines: BufReader<UnixStream>,
    /// The beginning of a line.
    partial: Vec<u8>,
    events: VecDeque<Received>,
    next_id: u64,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    ///
    /// If nobody is there, or it is no daemon of ours, or it does not want us.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NoDaemon { path: path.to_owned() },
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { path: path.to_owned() },
            _ => ClientError::Connect { path: path.to_owned(), source },
        })?;
        let mut client = Self { lines: BufReader::new(stream), partial: Vec::new(), events: VecDeque::new(), next_id: 0 };
        let not_control = || ClientError::NotControl { path: path.to_owned() };
        let line = client.line(Some(Instant::now() + GREETING_TIMEOUT))?.ok_or_else(not_control)?;
        let greeting: Value = serde_json::from_slice(&line).map_err(|_| not_control())?;
        if let Some(error) = greeting.get("error") {
            let failure = Failure::generic(error.get("desc").and_then(Value::as_str).unwrap_or("without a reason"));
            return Err(ClientError::Refused(failure));
        }
        if greeting.get("QMP").is_none() {
            return Err(not_control());
        }
        client.execute(NEGOTIATION, json!({}))?;
        Ok(client)
    }

    /// Has a command carried out. Events that arrive meanwhile are kept for [`Client::next_event`].
    ///
    /// # Errors
    ///
    /// [`ClientError::Failed`] if the daemon says no.
    pub fn call<C: Call>(&mut self, call: &C) -> Result<C::Answer, ClientError> {
        let arguments = serde_json::to_value(call).map_err(|error| Failure::generic(format_args!("{}: {error}", C::NAME)))?;
        let answer = self.execute(C::NAME, arguments)?;
        serde_json::from_value(answer).map_err(|error| ClientError::Nonsense { what: format!("{}: {error}", C::NAME) })
    }

    /// Has any command carried out, as JSON.
    ///
    /// # Errors
    ///
    /// As of [`Client::call`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.next_id += 1;
        let own = Some(Value::from(self.next_id));
        let mut line = json!({ "execute": command, "arguments": arguments, "id": own }).to_string();
        line.push('\n');
        self.lines.get_mut().write_all(line.as_bytes()).map_err(broken)?;
        loop {
            match self.receive(None)? {
                Some(Incoming::Return { value, id }) if id == own => return Ok(value),
                Some(Incoming::Error { failure, id }) if id == own => return Err(failure.into()),
                Some(Incoming::Event { name, data, timestamp }) => self.events.push_back(Received { timestamp, name, data }),
                other => return Err(ClientError::Nonsense { what: format!("an answer to something else: {other:?}") }),
            }
        }
    }

    /// The next event, or nothing if none comes within the time.
    ///
    /// # Errors
    ///
    /// If the connection ends.
    pub fn next_event(&mut self, within: Option<Duration>) -> Result<Option<Received>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.receive(within.map(|within| Instant::now() + within))? {
            None => Ok(None),
            Some(Incoming::Event { name, data, timestamp }) => Ok(Some(Received { timestamp, name, data })),
            Some(other) => Err(ClientError::Nonsense { what: format!("an answer without a question: {other:?}") }),
        }
    }

    fn receive(&mut self, until: Option<Instant>) -> Result<Option<Incoming>, ClientError> {
        let Some(line) = self.line(until)? else { return Ok(None) };
        Incoming::parse(&line).map(Some).map_err(|failure| ClientError::Nonsense { what: failure.desc })
    }

    /// The next line, or nothing if it does not come in time.
    fn line(&mut self, until: Option<Instant>) -> Result<Option<Vec<u8>>, ClientError> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.lines.get_ref().set_read_timeout(left).map_err(broken)?;
            match self.lines.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => return Ok(Some(std::mem::take(&mut self.partial))),
                Ok(_) => return Err(ClientError::Closed),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(broken(error)),
            }
        }
    }
}

fn broken(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Broken(error),
    }
}

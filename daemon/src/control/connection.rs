//! One client.
//!
//! ```text
//!  greeting ──▶ negotiating ── qmp_capabilities ──▶ commands ── end of input, hang-up, stop ──▶ flushing ──▶ gone
//! ```

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use snapfence::protocol::{
    Call as _, Command, CommandInfo, Empty, ErrorClass, Event, Failure, NEGOTIATION, QueryCommands, QueryVersion, Request, all_commands,
    typed, version,
};

use super::encode;
use super::framer::{Frame, Framer};
use super::outbox::{Outbox, Status};
use super::{Commands, Events, Reply};

/// How long a stopping server waits for a request's end and for a client to take its answer.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes read at a time; also how much is read ahead while a request is carried out.
const CHUNK: usize = 64 << 10;

/// Arguments of [`NEGOTIATION`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Negotiate {
    #[serde(default)]
    enable: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Negotiating,
    Commands,
}

/// A client's connection, run by a thread of its own.
pub(super) struct Connection {
    stream: UnixStream,
    outbox: Arc<Outbox>,
    commands: Arc<dyn Commands>,
    events: Events,
    framer: Framer,
    mode: Mode,
    /// The client sends nothing more.
    ended: bool,
    /// The client has gone altogether: poll would say so again and again.
    hung_up: bool,
    /// When bytes last came, or could have come.
    heard: Instant,
    /// How long what has begun may take to go on.
    patience: Duration,
}

impl Connection {
    pub(super) fn new(
        stream: UnixStream,
        outbox: Arc<Outbox>,
        commands: Arc<dyn Commands>,
        events: Events,
        patience: Duration,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (mode, heard) = (Mode::Negotiating, Instant::now());
        Ok(Self { stream, outbox, commands, events, framer: Framer::new(), mode, ended: false, hung_up: false, heard, patience })
    }

    /// Serves the client until it goes or the server stops.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.outbox.say(encode::greeting());
        let mut deadline = None;
        loop {
            let mut status = self.write()?;
            if !status.stopping {
                while !status.busy && status.empty {
                    let Some(frame) = self.framer.next().or_else(|| self.overdue()) else { break };
                    self.handle(frame);
                    status = self.write()?;
                }
            } else if deadline.is_none() {
                deadline = Some(Instant::now() + STOP_PATIENCE);
            }
            let over = status.stopping || (self.ended && self.framer.held() == 0);
            if over && !status.busy && status.empty {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Ok(());
            }
            self.wait(status, deadline)?;
            self.read(status)?;
        }
    }

    /// What has to be given up now, and the client with it: where its next request begins could only be guessed.
    fn overdue(&mut self) -> Option<Frame> {
        self.ended |= self.framer.waits() && self.heard.elapsed() >= self.patience;
        self.ended.then(|| self.framer.finish()).flatten()
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, status: Status, deadline: Option<Instant>) -> io::Result<()> {
        let mut wanted = PollFlags::empty();
        let wants_input = self.wants_input(status);
        wanted.set(PollFlags::IN, wants_input);
        wanted.set(PollFlags::OUT, !status.empty);
        let impatient = (!status.busy && status.empty && self.framer.waits()).then(|| self.heard + self.patience);
        // A client that has gone is not polled any more; what it has left behind is read all the same.
        let unread = (self.hung_up && wants_input).then(Instant::now);
        let until = [deadline, impatient, unread].into_iter().flatten().min();
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() }
        });
        let mut fds = vec![PollFd::from_borrowed_fd(self.outbox.wake_fd(), PollFlags::IN)];
        if !self.hung_up {
            fds.push(PollFd::new(&self.stream, wanted));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let gone = fds.get(1).is_some_and(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR));
        drop(fds);
        self.hung_up |= gone;
        if !wants_input {
            // What the client has sent may lie there unread.
            self.heard = Instant::now();
        }
        self.outbox.clear_wake();
        Ok(())
    }

    fn wants_input(&self, status: Status) -> bool {
        let room = self.framer.held() < CHUNK || (!status.busy && status.empty);
        !self.ended && !status.stopping && room
    }

    /// Takes what has come, at most one chunk: a client that never stops must not keep us from writing.
    fn read(&mut self, status: Status) -> io::Result<()> {
        if !self.wants_input(status) {
            return Ok(());
        }
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.framer.push(&chunk[..count]);
                self.heard = Instant::now();
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Sends what the client takes.
    fn write(&mut self) -> io::Result<Status> {
        while let Some((line, sent)) = self.outbox.first() {
            match self.stream.write(&line[sent..]) {
                Ok(count) => {
                    if let Some(count) = self.outbox.sent(count) {
                        self.outbox.say(encode::event(json!(Event::EventsLost { count })));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.outbox.status())
    }

    fn handle(&mut self, frame: Frame) {
        let request = match frame {
            Frame::Object(bytes) => Request::parse(&bytes),
            Frame::Bad(failure) => Err((failure, None)),
        };
        match request {
            Ok(request) => self.request(request),
            Err((failure, id)) => self.outbox.say(encode::answer(Err(failure), id)),
        }
    }

    fn request(&mut self, request: Request) {
        let Request { execute, arguments, id } = request;
        if self.mode == Mode::Commands
            && let Some(result) = own(&execute, &arguments)
        {
            self.outbox.say(encode::answer(result, id));
            return;
        }
        match (self.mode, execute.as_str()) {
            (Mode::Negotiating, NEGOTIATION) => {
                let result = negotiate(arguments);
                let agreed = result.is_ok();
                self.outbox.say(encode::answer(result, id));
                if agreed {
                    self.mode = Mode::Commands;
                    self.events.subscribe(self.outbox.clone());
                }
            }
            (Mode::Negotiating, other) => {
                let what = format_args!("expecting capabilities negotiation with '{NEGOTIATION}' before '{other}'");
                self.outbox.say(encode::answer(Err(Failure::new(ErrorClass::CommandNotFound, what)), id));
            }
            (Mode::Commands, NEGOTIATION) => {
                let what = "capabilities negotiation is already complete, command ignored";
                self.outbox.say(encode::answer(Err(Failure::new(ErrorClass::CommandNotFound, what)), id));
            }
            (Mode::Commands, _) => match Command::parse(&execute, arguments) {
                Ok(command) => {
                    self.outbox.begin();
                    let outbox = self.outbox.clone();
                    self.commands.execute(command, Reply::new(move |result| outbox.answer(encode::answer(result, id))));
                }
                Err(failure) => self.outbox.say(encode::answer(Err(failure), id)),
            },
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.events.unsubscribe(&self.outbox);
        self.outbox.close();
    }
}

fn negotiate(arguments: Map<String, Value>) -> Result<Value, Failure> {
    let wanted: Negotiate = typed(arguments)?;
    match wanted.enable.first() {
        None => Ok(json!(Empty {})),
        Some(capability) => Err(Failure::generic(format_args!("capability '{capability}' is not available"))),
    }
}

/// Answers the commands that are about the server itself.
fn own(name: &str, arguments: &Map<String, Value>) -> Option<Result<Value, Failure>> {
    let arguments = arguments.clone();
    match name {
        QueryVersion::NAME => Some(typed(arguments).map(|QueryVersion {}| json!(version()))),
        QueryCommands::NAME => Some(typed(arguments).map(|QueryCommands {}| {
            let infos: Vec<_> = all_commands().map(|name| CommandInfo { name: name.to_owned() }).collect();
            json!(infos)
        })),
        _ => None,
    }
}

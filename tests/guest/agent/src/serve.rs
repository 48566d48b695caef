//! Serves the host: reads requests from the virtio-serial port, runs each on a thread of its own, and writes what comes of it.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command as Process, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::system::RebootCommand;
use snapfence_guest_agent::protocol::{Answer, Command, Counters, Message, PORT, Progress, Request};

use crate::counters::Writers;

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// What all requests share.
struct Agent {
    to_host: Mutex<File>,
    writers: Mutex<Option<Writers>>,
}

/// Serves until the guest goes down.
pub(crate) fn serve() -> Result<Infallible> {
    let path = find_port()?;
    let mut from_host = OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"))?;
    let to_host = Mutex::new(from_host.try_clone()?);
    let agent = Arc::new(Agent { to_host, writers: Mutex::new(None) });
    agent.send(&ready()?);

    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = match from_host.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot read from the host"),
        };
        if length == 0 {
            // Nobody is at the other end. The port has no way to wait for somebody.
            std::thread::sleep(Duration::from_millis(20));
        }
        pending.extend_from_slice(&buffer[..length]);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match serde_json::from_slice::<Request>(&line) {
                Ok(request) => {
                    let agent = Arc::clone(&agent);
                    std::thread::spawn(move || agent.handle(request));
                }
                Err(error) => eprintln!("snapfence-guest-agent: not a request: {error}: {}", String::from_utf8_lossy(&line)),
            }
        }
    }
}

impl Agent {
    fn handle(self: Arc<Self>, Request { id, command }: Request) {
        let result = match command {
            Command::Run { script } => run(&script),
            Command::StartCounters(plan) => self.start(plan),
            Command::StopCounters => self.stop(),
            Command::Progress => self.progress(),
            Command::Reboot => go_down(RebootCommand::Restart, "reboot"),
            Command::PowerOff => go_down(RebootCommand::PowerOff, "poweroff"),
        };
        self.send(&Message::Reply { id, result: result.map_err(|error| format!("{error:#}")) });
    }

    fn start(self: &Arc<Self>, plan: Counters) -> Result<Answer> {
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        if writers.is_some() {
            bail!("the counters are running");
        }
        let report_every = Duration::from_millis(plan.report_every_ms);
        *writers = Some(Writers::start(plan)?);
        if !report_every.is_zero() {
            let agent = Arc::clone(self);
            std::thread::spawn(move || agent.report(report_every));
        }
        Ok(Answer::Done)
    }

    fn stop(&self) -> Result<Answer> {
        let writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Answer::Progress(writers.context("the counters are not running")?.stop()))
    }

    fn progress(&self) -> Result<Answer> {
        Ok(Answer::Progress(self.look(Writers::progress).context("the counters are not running")?))
    }

    fn look(&self, how: impl FnOnce(&Writers) -> Progress) -> Option<Progress> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(how)
    }

    /// Reports until the counters are stopped.
    fn report(&self, every: Duration) {
        let mut next = Instant::now() + every;
        loop {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next += every;
            match self.look(Writers::report) {
                Some(progress) => self.send(&Message::Progress(progress)),
                None => return,
            }
        }
    }

    fn send(&self, message: &Message) {
        let mut line = serde_json::to_vec(message).expect("a message is plain data");
        line.push(b'\n');
        let mut port = self.to_host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = port.write_all(&line) {
            eprintln!("snapfence-guest-agent: cannot write to the host: {error}");
        }
    }
}

/// The device of the port with our name. It appears a moment after its driver.
fn find_port() -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") {
            for port in ports.flatten() {
                if fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
                    return Ok(format!("/dev/{}", port.file_name().to_string_lossy()));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("no virtio-serial port is named {PORT}")
}

fn ready() -> Result<Message> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().rev().find_map(|line| {
        let mut words = line.split(' ');
        let device = words.next()?;
        (words.next() == Some("/")).then(|| device.to_owned())
    });
    let uptime = fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split(' ').next().unwrap_or_default().parse().context("/proc/uptime is not a number")?;
    let uptime_ms = u64::try_from(Duration::from_secs_f64(seconds).as_millis())?;
    Ok(Message::Ready { boot_id, root: root.unwrap_or_else(|| "rootfs".to_owned()), uptime_ms })
}

fn run(script: &str) -> Result<Answer> {
    let mut shell = Process::new("/bin/sh");
    shell.arg("-c").arg(format!("exec 2>&1\n{script}")).env("PATH", PATH).env("HOME", "/root").stdin(Stdio::null());
    let output = shell.output().context("cannot start a shell")?;
    let status = output.status.code().or(output.status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
    Ok(Answer::Ran { status, output: String::from_utf8_lossy(&output.stdout).into_owned() })
}

/// Ends the guest in good order. Returns only if that fails, or before init has got to it.
fn go_down(how: RebootCommand, applet: &str) -> Result<Answer> {
    rustix::fs::sync();
    if std::process::id() != 1 {
        // A real init stops services and unmounts the disks.
        return run(applet);
    }
    // Disks that scripts left mounted; what else is in use stays.
    run("umount -a -r -t ext4; true")?;
    rustix::fs::sync();
    rustix::system::reboot(how).context("the kernel refused to go down")?;
    Ok(Answer::Done)
}

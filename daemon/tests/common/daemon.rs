//! The daemon as a process of its own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use snapfence::client::Client;

use super::PATIENCE;

/// How often to look for something that nobody announces.
const POLL: Duration = Duration::from_millis(2);

/// A daemon that runs. Killed, with its log printed, unless it is stopped in good order.
pub(crate) struct Daemon {
    child: Child,
    directory: PathBuf,
}

impl Daemon {
    /// Starts a daemon that keeps everything in `directory`, and waits until it answers.
    pub(crate) fn start(directory: &Path, devices: &[String]) -> Self {
        Self::run(Self::command(directory, devices), directory)
    }

    /// The same with more arguments.
    pub(crate) fn start_with(directory: &Path, devices: &[String], more: &[&OsStr]) -> Self {
        let mut command = Self::command(directory, devices);
        command.args(more);
        Self::run(command, directory)
    }

    /// What [`Daemon::start`] runs, to be changed.
    pub(crate) fn command(directory: &Path, devices: &[String]) -> Command {
        Self::command_of(Path::new(env!("CARGO_BIN_EXE_snapfenced")), directory, devices)
    }

    /// The same of this copy of the program.
    pub(crate) fn command_of(program: &Path, directory: &Path, devices: &[String]) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).expect("a log");
        let mut command = Command::new(program);
        command.arg("--control").arg(directory.join("control")).arg("--state-dir").arg(directory.join("state"));
        for device in devices {
            command.arg("--device").arg(device);
        }
        command.stdin(Stdio::null()).stderr(log);
        command
    }

    /// Runs a daemon that keeps everything in `directory`, and waits until it answers.
    pub(crate) fn run(mut command: Command, directory: &Path) -> Self {
        let child = command.spawn().expect("a daemon that starts");
        let mut daemon = Self { child, directory: directory.to_owned() };
        daemon.wait_until("the control socket", |daemon| Client::connect(&daemon.control()).is_ok());
        daemon
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.directory.join("control")
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.control()).expect("a control socket")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    pub(crate) fn wait_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(self.end().is_none(), "the daemon has ended");
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(POLL);
        }
    }

    /// How it has ended, if it has.
    pub(crate) fn end(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(name)
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).expect("a living process").count()
    }

    /// Threads of its own: the kernel's, which serve its rings, come and go as the kernel likes.
    pub(crate) fn threads(&self) -> usize {
        let tasks = std::fs::read_dir(self.proc("task")).expect("a living process");
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| !name.starts_with("iou-")).count()
    }

    /// Name and niceness of each thread, the kernel's with the number of the thread that they work for.
    pub(crate) fn niceness(&self) -> Vec<(String, i32)> {
        let tasks = std::fs::read_dir(self.proc("task")).expect("a living process");
        // A thread may have ended meanwhile.
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        stats
            .map(|stat| {
                // proc_pid_stat(5): the name in parentheses, then the fields from the third on.
                let (name, fields) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")).expect("a name");
                (name.to_owned(), fields.split(' ').nth(16).expect("niceness").parse().expect("a number"))
            })
            .collect()
    }

    /// Those and the kernel's, as a limit counts them.
    pub(crate) fn all_threads(&self) -> usize {
        std::fs::read_dir(self.proc("task")).expect("a living process").count()
    }

    /// Memory mappings that are somebody's shared memory: what front-ends have sent.
    pub(crate) fn guest_mappings(&self) -> usize {
        std::fs::read_to_string(self.proc("maps")).expect("a living process").lines().filter(|line| line.contains("/memfd:")).count()
    }

    /// Bytes of memory that are resident.
    pub(crate) fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Bytes of addresses that are taken, as a limit counts them.
    pub(crate) fn addresses(&self) -> u64 {
        self.memory("VmSize:")
    }

    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("a living process");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line about it");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Those of them that are not of the program's file or its libraries', which are as large as their build made them and shared by all who run them.
    pub(crate) fn resident_of_its_own(&self) -> u64 {
        let program = std::fs::read_link(self.proc("exe")).expect("a living process");
        let (mut is_own, mut kib) = (true, 0);
        for line in std::fs::read_to_string(self.proc("smaps")).expect("a living process").lines() {
            if let Some(resident) = line.strip_prefix("Rss:") {
                let resident = resident.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
                kib += if is_own { resident } else { 0 };
            } else if line.starts_with(|first: char| first.is_ascii_digit() || first.is_ascii_lowercase()) {
                // A mapping: addresses, access, offset, device, inode and, if it has one, the name of its file.
                is_own = !line.split_whitespace().nth(5).is_some_and(|name| name.contains(".so") || program.as_os_str() == name);
            }
        }
        kib * 1024
    }

    /// Ends it at once, whatever it is doing.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("a living process");
        self.child.wait().expect("a child");
    }

    /// Asks it to end, and expects a clean end.
    pub(crate) fn stop(self) {
        self.signal(Signal::TERM);
        self.await_clean_end();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).expect("a living process");
    }

    pub(crate) fn await_clean_end(self) {
        let status = self.await_end();
        assert!(status.success(), "{status}");
    }

    /// Waits until it has ended.
    pub(crate) fn await_end(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.end() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

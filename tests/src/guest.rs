//! A Linux guest under QEMU, with disks over vhost-user and a program inside that does what the host says.
//!
//! The guest is built by `tests/guest/build.sh`. It boots within seconds even without hardware virtualisation, either from memory alone or into
//! the system on one of its disks.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use snapfence_guest_agent::protocol::{Answer, Command, Message, PORT, Request};
pub use snapfence_guest_agent::protocol::{Counters, Progress, Region};

use crate::process::Process;

/// How long a guest gets from start or reboot until it takes commands. Emulated on a busy machine it takes a while.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// How long a guest gets to power off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(60);
/// How long the trial guest gets that tells whether hardware virtualisation works.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);
/// How often a wait looks whether the guest is still well.
const LOOK: Duration = Duration::from_millis(200);

/// The guest kernel's command line. Errors of disks appear on the console. Checks that only cost time under emulation are off, and so is that of the
/// timer (`no_timer_check`): on a busy machine an emulated timer comes too late for it, and the kernel panics before it has begun.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet loglevel=5 mitigations=off nokaslr no_timer_check cryptomgr.notests audit=0 apparmor=0 random.trust_cpu=on";

/// What the guest is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its disks, in the order it names them: /dev/vda, /dev/vdb ...
    pub disks: Vec<Disk>,
    /// Number of processors.
    pub cpus: u16,
    /// Size of its memory, in MiB.
    pub memory_mib: u32,
    /// The disk to boot into, for example `/dev/vda`; none to stay in memory.
    pub root: Option<String>,
    /// After how many milliseconds QEMU tries again to reach a back-end that went away; none to give it up.
    pub reconnect_ms: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self { disks: Vec::new(), cpus: 2, memory_mib: 512, root: None, reconnect_ms: None }
    }
}

/// A disk over vhost-user.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The socket that the back-end listens on.
    pub socket: PathBuf,
    /// Number of virtqueues.
    pub queues: u16,
    /// Entries of a virtqueue.
    pub queue_size: u16,
}

impl Disk {
    /// A disk with queues of QEMU's usual size.
    #[must_use]
    pub fn new(socket: &Path, queues: u16) -> Self {
        Self { socket: socket.to_owned(), queues, queue_size: 128 }
    }
}

/// What makes the guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// The faster one that works here: hardware virtualisation only if a guest really boots with it. Found out once and remembered until this
    /// machine restarts.
    ///
    /// # Errors
    ///
    /// If the guest has not been built.
    pub fn available() -> Result<Self> {
        static FOUND: OnceLock<Accelerator> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(*found);
        }
        let memory = artifacts()?.join("accelerator");
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let known = |name: &str| format!("{name} {boot_id}");
        let found = match fs::read_to_string(&memory) {
            Ok(text) if text == known("kvm") => Self::Kvm,
            Ok(text) if text == known("tcg") => Self::Tcg,
            _ => {
                let found = if kvm_boots()? { Self::Kvm } else { Self::Tcg };
                fs::write(&memory, known(found.name()))?;
                found
            }
        };
        Ok(*FOUND.get_or_init(|| found))
    }

    /// QEMU's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

fn kvm_boots() -> Result<bool> {
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let folder = tempfile::tempdir()?;
    let trial = Guest::boot_with(&Config::default(), folder.path(), Accelerator::Kvm, PROBE_DEADLINE);
    Ok(trial.is_ok())
}

/// Where the parts of the guest are: `target/guest`, found from the program that runs now.
fn artifacts() -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().map(|folder| folder.join("guest")).find(|folder| folder.join("vmlinuz").exists());
    found.with_context(|| format!("no guest found above {}; build it first (tests/guest/build.sh)", here.display()))
}

/// The image of the guest's root disk: a raw file of 512 MiB with an ext4 file system, to be copied.
///
/// # Errors
///
/// If it has not been built.
pub fn root_image() -> Result<PathBuf> {
    let path = artifacts()?.join("root.raw");
    if !path.exists() {
        bail!("{} is missing; build it first (tests/guest/build.sh root)", path.display());
    }
    Ok(path)
}

/// The guest's kernel and initramfs.
///
/// # Errors
///
/// If they have not been built.
pub fn boot_files() -> Result<(PathBuf, PathBuf)> {
    let parts = artifacts()?;
    Ok((parts.join("vmlinuz"), parts.join("initramfs")))
}

/// What the guest said when it came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The kernel's random id of this boot.
    pub boot_id: String,
    /// What `/` is.
    pub root: String,
    /// How long the kernel had been running.
    pub uptime: Duration,
}

/// A running guest. Killed when dropped; [`Guest::power_off`] ends it in good order.
#[derive(Debug)]
pub struct Guest {
    process: Mutex<Process>,
    folder: PathBuf,
    connection: Connection,
    ready: Mutex<Ready>,
    accelerator: Accelerator,
}

impl Guest {
    /// Starts a guest, with its sockets and logs in `folder`, and waits until it takes commands.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error holds the end of its console.
    pub fn boot(config: &Config, folder: &Path) -> Result<Self> {
        Self::boot_with(config, folder, Accelerator::available()?, BOOT_DEADLINE)
    }

    fn boot_with(config: &Config, folder: &Path, accelerator: Accelerator, deadline: Duration) -> Result<Self> {
        let mut process = Process::spawn(command(config, folder, accelerator)?, &folder.join("qemu.log"))?;
        let socket = folder.join("agent.sock");
        let mut stream = None;
        process.wait_until("agent's socket", deadline, |_| {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        })?;
        let connection = Connection::new(stream.expect("connected"))?;
        let nobody = Ready { boot_id: String::new(), root: String::new(), uptime: Duration::ZERO };
        let guest = Self { process: Mutex::new(process), folder: folder.to_owned(), connection, ready: Mutex::new(nobody), accelerator };
        guest.wait_ready(deadline)?;
        Ok(guest)
    }

    /// What it said when it last came up.
    #[must_use]
    pub fn ready(&self) -> Ready {
        lock(&self.ready).clone()
    }

    /// What its processors are made by.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// QEMU's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        lock(&self.process).id()
    }

    /// QEMU's own control socket (QMP).
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.folder.join("qmp.sock")
    }

    /// What the guest's console has shown so far, from the first boot on.
    #[must_use]
    pub fn console(&self) -> String {
        fs::read(self.folder.join("console.log")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Runs a shell script in the guest and returns what it printed.
    ///
    /// # Errors
    ///
    /// If its status is not 0, or it does not end in time.
    pub fn run(&self, script: &str, deadline: Duration) -> Result<String> {
        match self.ask(Command::Run { script: script.to_owned() }, deadline)? {
            Answer::Ran { status: 0, output } => Ok(output),
            Answer::Ran { status, output } => bail!("in the guest, `{script}` ended with {status}: {}", output.trim()),
            other => bail!("the guest answered {other:?} to a script"),
        }
    }

    /// Starts the ordered counters.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn start_counters(&self, counters: &Counters) -> Result<()> {
        self.ask(Command::StartCounters(counters.clone()), BOOT_DEADLINE).map(|_| ())
    }

    /// How far the counters are.
    ///
    /// # Errors
    ///
    /// If they are not running.
    pub fn progress(&self) -> Result<Progress> {
        progress(self.ask(Command::Progress, BOOT_DEADLINE)?)
    }

    /// Stops the counters after the one each chain is at.
    ///
    /// # Errors
    ///
    /// If they are not running.
    pub fn stop_counters(&self) -> Result<Progress> {
        progress(self.ask(Command::StopCounters, BOOT_DEADLINE)?)
    }

    /// The reports that the counters have sent unasked since the last call.
    #[must_use]
    pub fn reports(&self) -> Vec<Progress> {
        std::mem::take(&mut *lock(&self.connection.inbox.reports))
    }

    /// Lines of the kernel's log and of the console that tell of trouble with a disk or a file system. Empty is good.
    ///
    /// # Errors
    ///
    /// If the guest does not answer.
    pub fn disk_errors(&self) -> Result<Vec<String>> {
        let log = self.run("dmesg", BOOT_DEADLINE)?;
        const SIGNS: [&str; 8] = [
            "I/O error",
            "Buffer I/O",
            "EXT4-fs error",
            "EXT4-fs warning",
            "JBD2: ",
            "blocked for more than",
            "Kernel panic",
            "Remounting",
        ];
        let console = self.console();
        let trouble = |line: &&str| SIGNS.iter().any(|sign| line.contains(sign));
        Ok(log.lines().chain(console.lines()).filter(trouble).map(str::to_owned).collect())
    }

    /// Reboots inside the guest and waits until it takes commands again.
    ///
    /// # Errors
    ///
    /// If it does not come back.
    pub fn reboot(&self) -> Result<()> {
        let old = self.ready().boot_id;
        self.connection.send(Command::Reboot)?;
        self.wait_ready(BOOT_DEADLINE)?;
        if self.ready().boot_id == old {
            bail!("the guest came up again without a reboot");
        }
        Ok(())
    }

    /// Powers the guest off and waits for QEMU to end.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn power_off(self) -> Result<()> {
        self.connection.send(Command::PowerOff)?;
        self.wait_gone()
    }

    /// Waits for QEMU to end, whoever has told it to.
    ///
    /// # Errors
    ///
    /// If it does not, or not with status 0.
    pub fn wait_gone(self) -> Result<()> {
        let status = lock(&self.process).wait(POWER_OFF_DEADLINE).map_err(|error| self.with_console(error))?;
        if !status.success() {
            bail!("QEMU ended with {status}: {}", lock(&self.process).output());
        }
        Ok(())
    }

    fn ask(&self, command: Command, deadline: Duration) -> Result<Answer> {
        let reply = self.connection.send(command)?;
        let result = self.wait(&reply, deadline, "answer")?;
        result.map_err(|error| anyhow!("the guest refused: {error}"))
    }

    fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let receiver = lock(&self.connection.ready);
        *lock(&self.ready) = self.wait(&receiver, deadline, "start")?;
        Ok(())
    }

    /// Waits for something from the guest, unless it is past giving it.
    fn wait<T>(&self, receiver: &Receiver<T>, deadline: Duration, what: &str) -> Result<T> {
        let end = Instant::now() + deadline;
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Disconnected) => {
                    // QEMU closes the socket a moment before it is gone.
                    let ended = lock(&self.process).wait(Duration::from_secs(1));
                    let error = ended.map_or_else(|error| error, |status| anyhow!("QEMU ended ({status}) instead of an {what}"));
                    return Err(self.with_console(error));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            lock(&self.process).check_alive().map_err(|error| self.with_console(error))?;
            if self.console().contains("Kernel panic") {
                return Err(self.with_console(anyhow!("the guest's kernel panicked")));
            }
            if Instant::now() > end {
                return Err(self.with_console(anyhow!("no {what} from the guest within {deadline:?}")));
            }
        }
    }

    fn with_console(&self, error: anyhow::Error) -> anyhow::Error {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let end = lines[lines.len().saturating_sub(25)..].join("\n");
        let qemu = lock(&self.process).output();
        error.context(format!("the guest failed. QEMU: {}\nThe end of its console:\n{end}", qemu.trim()))
    }
}

fn progress(answer: Answer) -> Result<Progress> {
    match answer {
        Answer::Progress(progress) => Ok(progress),
        other => bail!("the guest answered {other:?} instead of its progress"),
    }
}

/// What a request came to, as the guest tells it.
type Reply = Result<Answer, String>;

/// The line of messages to and from the guest.
#[derive(Debug)]
struct Connection {
    stream: Mutex<(UnixStream, u64)>,
    inbox: Arc<Inbox>,
    ready: Mutex<Receiver<Ready>>,
}

/// What the guest has said, by kind. Filled by a thread that ends with the connection.
#[derive(Debug, Default)]
struct Inbox {
    /// Who waits for which reply; none once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, Sender<Reply>>>>,
    reports: Mutex<Vec<Progress>>,
}

impl Connection {
    fn new(stream: UnixStream) -> Result<Self> {
        let inbox = Arc::new(Inbox::default());
        *lock(&inbox.waiting) = Some(HashMap::new());
        let (sender, ready) = mpsc::channel();
        let lines = BufReader::new(stream.try_clone()?);
        let filled = Arc::clone(&inbox);
        std::thread::spawn(move || filled.fill(lines, &sender));
        Ok(Self { stream: Mutex::new((stream, 0)), inbox, ready: Mutex::new(ready) })
    }

    fn send(&self, command: Command) -> Result<Receiver<Reply>> {
        let (sender, receiver) = mpsc::channel();
        let mut stream = lock(&self.stream);
        stream.1 += 1;
        let id = stream.1;
        lock(&self.inbox.waiting).as_mut().context("the guest is gone")?.insert(id, sender);
        let mut line = serde_json::to_vec(&Request { id, command })?;
        line.push(b'\n');
        stream.0.write_all(&line).context("the guest is gone")?;
        Ok(receiver)
    }
}

impl Inbox {
    fn fill(&self, lines: BufReader<UnixStream>, ready: &Sender<Ready>) {
        // A line that is no message was cut short by a reboot.
        for message in lines.split(b'\n').map_while(Result::ok).filter_map(|line| serde_json::from_slice(&line).ok()) {
            match message {
                Message::Ready { boot_id, root, uptime_ms } => {
                    // Nobody waits any more once the guest has been dropped.
                    let _ = ready.send(Ready { boot_id, root, uptime: Duration::from_millis(uptime_ms) });
                }
                Message::Reply { id, result } => {
                    if let Some(sender) = lock(&self.waiting).as_mut().and_then(|waiting| waiting.remove(&id)) {
                        // Whoever asked may have lost patience.
                        let _ = sender.send(result);
                    }
                }
                Message::Progress(progress) => lock(&self.reports).push(progress),
            }
        }
        // Dropping the senders ends every wait.
        *lock(&self.waiting) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The QEMU command line.
fn command(config: &Config, folder: &Path, accelerator: Accelerator) -> Result<Program> {
    let (kernel, initramfs) = boot_files()?;
    let mut command = Program::new("qemu-system-x86_64");
    let mut option = |name: &str, value: String| {
        command.arg(name).arg(value);
    };
    // A comma ends a value, unless doubled.
    let path = |path: &Path| path.to_str().map(|path| path.replace(',', ",,")).context("the path is not UTF-8");
    let memory = config.memory_mib;
    option("-accel", accelerator.name().to_owned());
    option("-cpu", if accelerator == Accelerator::Kvm { "host" } else { "max" }.to_owned());
    option("-smp", config.cpus.to_string());
    option("-m", format!("{memory}M"));
    option("-object", format!("memory-backend-memfd,id=memory,size={memory}M,share=on"));
    option("-machine", "q35,memory-backend=memory".to_owned());
    option("-kernel", path(&kernel)?);
    option("-initrd", path(&initramfs)?);
    let root = config.root.as_ref().map(|disk| format!(" snapfence.root={disk}")).unwrap_or_default();
    option("-append", format!("{KERNEL_ARGUMENTS}{root}"));
    option("-chardev", format!("file,id=console,path={}", path(&folder.join("console.log"))?));
    option("-serial", "chardev:console".to_owned());
    option("-device", "virtio-serial-pci".to_owned());
    option("-chardev", format!("socket,id=agent,path={},server=on,wait=off", path(&folder.join("agent.sock"))?));
    option("-device", format!("virtserialport,chardev=agent,name={PORT}"));
    option("-qmp", format!("unix:{},server=on,wait=off", path(&folder.join("qmp.sock"))?));
    for (index, disk) in config.disks.iter().enumerate() {
        let reconnect = config.reconnect_ms.map(|ms| format!(",reconnect-ms={ms}")).unwrap_or_default();
        option("-chardev", format!("socket,id=disk{index},path={}{reconnect}", path(&disk.socket)?));
        let (queues, size) = (disk.queues, disk.queue_size);
        option(
            "-device",
            format!("vhost-user-blk-pci,id=blk{index},chardev=disk{index},num-queues={queues},queue-size={size},config-wce=on"),
        );
    }
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    Ok(command)
}

//! Those who serve a disk.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::FallocateFlags;
use rustix::process::{Pid, Signal, kill_process};
use snapfence::client::{Client, ClientError};
use snapfence_benches::load::Target;
use snapfence_benches::machine::{on_processor, settle, ticks_to_time};
use snapfence_tests::tools;

/// What is not ready by then never is.
const PATIENCE: Duration = Duration::from_secs(30);
const QSD: &str = "qemu-storage-daemon";
/// Name of the control socket in a contestant's folder.
const CONTROL: &str = "control";

/// Who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// snapfenced as it is.
    Snapfence,
    /// snapfenced that never polls.
    SnapfenceSleeping,
    /// qemu-storage-daemon with an iothread of its own.
    Qsd,
    /// The file itself, by the load generator.
    IoUring,
}

/// Those that this machine has, snapfence first.
pub(super) fn present() -> Vec<Kind> {
    let has_qsd = Command::new(QSD).arg("--version").output().is_ok_and(|output| output.status.success());
    let qsd = has_qsd.then_some(Kind::Qsd);
    [Kind::Snapfence, Kind::SnapfenceSleeping].into_iter().chain(qsd).chain([Kind::IoUring]).collect()
}

/// Those of them with a control socket, snapfence as it is.
pub(super) fn present_with_control() -> Vec<Kind> {
    present().into_iter().filter(|kind| matches!(kind, Kind::Snapfence | Kind::Qsd)).collect()
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Snapfence => "snapfence",
            Self::SnapfenceSleeping => "snapfence, no polling",
            Self::Qsd => QSD,
            Self::IoUring => "io_uring on the file",
        }
    }

    /// The name for a folder.
    pub(super) fn folder(self) -> String {
        self.name().replace([' ', ','], "-")
    }

    /// The name with the version.
    pub(super) fn describe(&self) -> String {
        let version = || {
            let output = Command::new(QSD).arg("--version").output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
        };
        match self {
            Self::Qsd => version().unwrap_or_else(|| QSD.to_owned()),
            Self::Snapfence | Self::SnapfenceSleeping => format!("{} {}", self.name(), env!("CARGO_PKG_VERSION")),
            Self::IoUring => self.name().to_owned(),
        }
    }
}

/// An image to be served.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) image: PathBuf,
    pub(super) format: &'static str,
}

/// One of them, with its disks.
#[derive(Debug)]
pub(super) struct Contestant {
    kind: Kind,
    folder: PathBuf,
    targets: Vec<Target>,
    server: Option<Child>,
}

impl Contestant {
    /// Lets each of them serve a disk of its own of `bytes` bytes in `folder`, all of which are allocated.
    pub(super) fn start_all(kinds: &[Kind], folder: &Path, format: &'static str, bytes: u64) -> Result<Vec<Self>> {
        let folders: Vec<PathBuf> = kinds.iter().map(|kind| folder.join(kind.folder())).collect();
        folders.iter().try_for_each(std::fs::create_dir)?;
        let images = copies(&image(folder, format, bytes)?, &folders)?;
        settle(folder)?;
        let disks = images.into_iter().map(|image| [Disk { image, format }]);
        kinds.iter().zip(&folders).zip(disks).map(|((kind, folder), disks)| Self::serve(*kind, folder, &disks, true)).collect()
    }

    /// Lets it serve some disks from one process, each with a queue; `folder` is for what it needs besides. `in_thread`: exports of
    /// qemu-storage-daemon have a thread of their own besides the main loop.
    pub(super) fn serve(kind: Kind, folder: &Path, disks: &[Disk], in_thread: bool) -> Result<Self> {
        let sockets: Vec<PathBuf> = (0..disks.len()).map(|number| folder.join(format!("{number}.sock"))).collect();
        let server = match kind {
            Kind::IoUring => {
                let targets = disks.iter().map(|disk| Target::File(disk.image.clone())).collect();
                return Ok(Self { kind, folder: folder.to_owned(), targets, server: None });
            }
            Kind::Snapfence | Kind::SnapfenceSleeping => {
                let mut server = Command::new(snapfenced()?);
                server.arg("--control").arg(folder.join(CONTROL)).arg("--state-dir").arg(folder.join("state"));
                for (number, (Disk { image, format }, socket)) in disks.iter().zip(&sockets).enumerate() {
                    let device = format!("name=disk{number},image={},format={format},socket={}", image.display(), socket.display());
                    server.arg("--device").arg(device);
                }
                if kind == Kind::SnapfenceSleeping {
                    server.args(["--poll-max-us", "0"]);
                }
                server
            }
            Kind::Qsd => {
                let mut server = Command::new(QSD);
                server.arg("--chardev").arg(format!("socket,id=control,path={},server=on,wait=off", folder.join(CONTROL).display()));
                server.args(["--monitor", "chardev=control", "--object", "iothread,id=thread"]);
                let thread = if in_thread { ",iothread=thread" } else { "" };
                for (number, (Disk { image, format }, socket)) in disks.iter().zip(&sockets).enumerate() {
                    let file = format!("driver=file,filename={},node-name=file{number},aio=io_uring,cache.direct=on", image.display());
                    server.arg("--blockdev").arg(file);
                    server.arg("--blockdev").arg(format!("driver={format},file=file{number},node-name=disk{number}"));
                    server.arg("--export").arg(format!(
                        "type=vhost-user-blk,id=export{number},node-name=disk{number},addr.type=unix,addr.path={},writable=on{thread}",
                        socket.display()
                    ));
                }
                server
            }
        };
        Self::launch(kind, folder, server, sockets)
    }

    fn launch(kind: Kind, folder: &Path, mut server: Command, sockets: Vec<PathBuf>) -> Result<Self> {
        let log = folder.join("log");
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
        let server = Some(on_processor(1, || server.spawn().with_context(|| format!("{} cannot be started", kind.name())))?);
        let targets = sockets.iter().cloned().map(Target::VhostUser).collect();
        let mut contestant = Self { kind, folder: folder.to_owned(), targets, server };
        let limit = Instant::now() + PATIENCE;
        while !sockets.iter().all(|socket| socket.exists()) {
            let ended = contestant.server.as_mut().and_then(|server| server.try_wait().transpose()).transpose()?;
            ensure!(ended.is_none() && Instant::now() < limit, "{} does not start: {}", kind.name(), std::fs::read_to_string(&log)?);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(contestant)
    }

    /// A connection to its control socket, which speaks the same protocol for all of them.
    pub(super) fn control(&self) -> Result<Client> {
        let path = self.folder.join(CONTROL);
        let limit = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&path) {
                // It may come after the disks.
                Err(ClientError::NoDaemon { .. }) if Instant::now() < limit => std::thread::sleep(Duration::from_millis(1)),
                outcome => return outcome.with_context(|| format!("{} at {}", self.kind.name(), path.display())),
            }
        }
    }

    /// Its process, if it has one of its own.
    pub(super) fn process(&self) -> Option<Pid> {
        self.server.as_ref().map(Pid::from_child)
    }

    /// Resident memory of the server in bytes.
    pub(super) fn resident(&self) -> Result<Option<u64>> {
        let Some(server) = &self.server else { return Ok(None) };
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in a process's status")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(Some(kib << 10))
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The first of its disks.
    pub(super) fn target(&self) -> &Target {
        &self.targets[0]
    }

    /// All of its disks.
    pub(super) fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Processor time that the server has had, its kernel threads included.
    pub(super) fn cpu_time(&self) -> Result<Option<Duration>> {
        let Some(server) = &self.server else { return Ok(None) };
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.id()))?;
        // After the name, which is in parentheses, utime and stime are the 12th and the 13th field.
        let fields = stat.rsplit_once(')').context("a name in parentheses")?.1;
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap_or(0)).sum();
        Ok(Some(ticks_to_time(ticks)))
    }

    /// Ends it in good order.
    pub(super) fn stop(mut self) -> Result<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        kill_process(Pid::from_child(&server), Signal::TERM)?;
        let status = server.wait()?;
        ensure!(status.success(), "{} ends with {status}", self.kind.name());
        Ok(())
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // It may have ended already.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// Makes an image that has all of its bytes.
pub(super) fn image(folder: &Path, format: &str, bytes: u64) -> Result<PathBuf> {
    let raw = folder.join("disk.raw");
    let mut file = std::fs::File::create(&raw)?;
    let mut pattern = std::io::Read::take(std::io::repeat(0x5a), bytes);
    std::io::copy(&mut pattern, &mut file)?;
    file.sync_all()?;
    match format {
        "raw" => Ok(raw),
        "qcow2" => {
            let image = folder.join("disk.qcow2");
            let [from, to] = [&raw, &image].map(|path| path.to_str().map(str::to_owned));
            let (from, to) = from.zip(to).context("a path in UTF-8")?;
            tools::qemu_img(["convert", "-q", "-f", "raw", "-O", "qcow2", "-t", "none", &from, &to])
                .or_else(|_| tools::qemu_img(["convert", "-q", "-f", "raw", "-O", "qcow2", &from, &to]))?;
            std::fs::remove_file(raw)?;
            Ok(image)
        }
        other => bail!("no image of the format {other} can be made"),
    }
}

/// An overlay with parts of clusters of 4 KiB, as snapfence makes them, for everybody. Where the size of the disk is given, the chain beneath is not
/// looked at.
pub(super) fn overlay(image: &Path, below: &Path, bytes: Option<u64>) -> Result<()> {
    let format = if below.extension().is_some_and(|extension| extension == "raw") { "raw" } else { "qcow2" };
    let options = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "-F", format, "-b"].map(OsStr::new);
    let named = options.into_iter().chain([below.as_os_str()]);
    match bytes.map(|bytes| bytes.to_string()) {
        Some(size) => tools::qemu_img(named.chain(["-u".as_ref(), image.as_os_str(), size.as_ref()])),
        None => tools::qemu_img(named.chain([image.as_os_str()])),
    }
    .map(drop)
}

/// Moves a file into each of the folders. They are filled at the same time, some of each in turn: not all memory is equally fast, and whoever is first
/// would get the best of it, or the worst.
fn copies(file: &Path, folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let name = file.file_name().context("the path of a file")?;
    let paths: Vec<PathBuf> = folders.iter().map(|folder| folder.join(name)).collect();
    let mut copies = paths.iter().map(std::fs::File::create).collect::<Result<Vec<_>, _>>()?;
    let mut source = std::fs::File::options().read(true).write(true).open(file)?;
    let (mut at, mut piece) = (0, vec![0; 1 << 20]);
    loop {
        let len = source.read(&mut piece)?;
        if len == 0 {
            break;
        }
        copies.iter_mut().try_for_each(|copy| copy.write_all(&piece[..len]))?;
        // What has been moved takes no space any more, where that can be.
        let _ = rustix::fs::fallocate(&source, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len as u64);
        at += len as u64;
    }
    copies.iter().try_for_each(std::fs::File::sync_all)?;
    std::fs::remove_file(file)?;
    Ok(paths)
}

/// The daemon that was built with this program.
fn snapfenced() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("snapfenced");
    ensure!(path.exists(), "{} is missing: make bench builds it", path.display());
    Ok(path)
}

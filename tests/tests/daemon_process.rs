//! The daemon as a program: it says when it is ready, takes little memory, ends in good order, goes on where it was after a stop and after being
//! killed, and refuses in one line what would harm an image.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use snapfence_tests::backend::program;
use snapfence_tests::process::Process;
use snapfence_tests::tools;

const DEADLINE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// A folder with what a daemon needs, and the ways to run it there.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a qcow2 image of 1 GiB.
    fn image(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        tools::create_image(&path, "qcow2", 1024 * MIB)?;
        Ok(path)
    }

    /// The value of `--device` for a device called `name`.
    fn device(&self, name: &str, image: &str) -> String {
        let (image, socket) = (self.path(image), self.path(&format!("{name}.sock")));
        format!("name={name},image={},format=qcow2,socket={},queues=4", image.display(), socket.display())
    }

    fn command(&self, devices: &[String]) -> Result<Command> {
        let mut command = Command::new(program("snapfenced")?);
        command.arg("--control").arg(self.path("control.sock")).arg("--state-dir").arg(self.path("state"));
        for device in devices {
            command.args(["--device", device]);
        }
        Ok(command)
    }

    fn start(&self, devices: &[String]) -> Result<Process> {
        let mut process = Process::spawn(self.command(devices)?, &self.path("daemon.log"))?;
        process.wait_until("line with `ready`", DEADLINE, |process| process.output().contains("ready"))?;
        Ok(process)
    }

    /// Starts a daemon that has to refuse, and returns its status and its last line.
    fn refused(&self, devices: &[String]) -> Result<(i32, String)> {
        let output = self.command(devices)?.output()?;
        let text = String::from_utf8(output.stderr)?;
        // Its log is there for other reasons; the error is the one line that its name begins.
        let errors: Vec<&str> = text.lines().filter(|line| !line.contains(" INFO ") && !line.contains(" WARN ")).collect();
        let [line] = errors[..] else { anyhow::bail!("not one line: {text}") };
        ensure!(line.starts_with("snapfenced: "), "whose line is {line:?}?");
        Ok((output.status.code().context("it has not been killed")?, line.to_owned()))
    }

    fn snapfence(&self, arguments: &[&str]) -> Result<String> {
        let control = self.path("control.sock");
        let program = program("snapfence")?;
        let all = ["--control", control.to_str().context("the path is not UTF-8")?].into_iter().chain(arguments.iter().copied());
        tools::run(program.to_str().context("the path is not UTF-8")?, all)
    }
}

/// What a process has in memory, its shared parts included, in bytes.
fn resident_bytes(process: &Process) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(kib.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[test]
fn idle_daemon_is_small() -> Result<()> {
    let place = Place::new()?;
    place.image("a.qcow2")?;
    let begun = Instant::now();
    let daemon = place.start(&[place.device("a", "a.qcow2")])?;
    println!("ready after {:?}", begun.elapsed());
    let resident = resident_bytes(&daemon)?;
    println!("{} KiB resident", resident / 1024);
    ensure!(resident < 10 * MIB, "{resident} bytes are resident");
    daemon.stop()
}

#[test]
fn readiness_is_told_to_systemd() -> Result<()> {
    let place = Place::new()?;
    place.image("a.qcow2")?;
    let socket = UnixDatagram::bind(place.path("notify.sock"))?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let mut command = place.command(&[place.device("a", "a.qcow2")])?;
    command.env("NOTIFY_SOCKET", place.path("notify.sock"));
    let daemon = Process::spawn(command, &place.path("daemon.log"))?;
    let mut text = [0; 256];
    let length = socket.recv(&mut text)?;
    ensure!(String::from_utf8_lossy(&text[..length]).lines().any(|line| line == "READY=1"), "told: {:?}", &text[..length]);
    // What has been told is true.
    place.snapfence(&["device", "list"])?;
    daemon.stop()
}

#[test]
fn either_signal_and_quit_end_it_in_good_order() -> Result<()> {
    let place = Place::new()?;
    let image = place.image("a.qcow2")?;
    for how in ["TERM", "INT", "quit"] {
        let mut daemon = place.start(&[place.device("a", "a.qcow2")])?;
        match how {
            "TERM" => daemon.signal(Signal::TERM)?,
            "INT" => daemon.signal(Signal::INT)?,
            _ => {
                snapfence_tests::qmp::Qmp::connect(&place.path("control.sock"))?.execute("quit", serde_json::json!({}))?;
            }
        }
        let status = daemon.wait(DEADLINE)?;
        ensure!(status.success(), "{how}: {status}: {}", daemon.output());
        for socket in ["a.sock", "control.sock"] {
            ensure!(!place.path(socket).exists(), "{how} leaves {socket} behind");
        }
        assert_eq!(tools::check(&image)?, tools::Check::default(), "{how}");
    }
    Ok(())
}

#[test]
fn catalogue_decides_what_is_on_top() -> Result<()> {
    let place = Place::new()?;
    place.image("a.qcow2")?;
    let device = place.device("a", "a.qcow2");
    let first = place.start(std::slice::from_ref(&device))?;
    place.snapfence(&["snapshot", "create", "one", "--device", "a"])?;
    place.snapfence(&["snapshot", "create", "two", "--device", "a"])?;
    // Killed: the next one finds sockets and locks that nobody holds.
    drop(first);
    let again = place.start(std::slice::from_ref(&device))?;
    let (base, top) = (place.path("a.qcow2"), place.path("a.two.qcow2"));
    ensure!(again.output().contains(&*top.to_string_lossy()), "the log says nothing of the top: {}", again.output());
    let stack = place.snapfence(&["stack", "show", "a"])?;
    ensure!(stack.find("a.two.qcow2") < stack.find("a.one.qcow2") && stack.find("a.one.qcow2") < stack.find("a.qcow2"), "{stack}");
    let listed = place.snapfence(&["snapshot", "list"])?;
    ensure!(listed.contains("one") && listed.contains("two"), "{listed}");
    again.stop()?;

    // A stranger under the name of a known disk.
    place.image("b.qcow2")?;
    let (status, line) = place.refused(&[place.device("a", "b.qcow2")])?;
    ensure!(status == 1 && line.contains("b.qcow2") && line.contains("--forget a"), "{status}: {line}");
    // A frozen layer under another name.
    let (status, line) = place.refused(&[place.device("b", "a.one.qcow2")])?;
    ensure!(status == 1 && line.contains("a.one.qcow2"), "{status}: {line}");
    let (status, line) = place.refused(&[place.device("b", "a.qcow2")])?;
    ensure!(status == 1 && line.contains(&*base.to_string_lossy()), "{status}: {line}");
    Ok(())
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() -> Result<()> {
    let place = Place::new()?;
    place.image("a.qcow2")?;
    let a = place.device("a", "a.qcow2");
    fs::write(place.path("text.qcow2"), "this is no image")?;
    tools::create_overlay(&place.path("orphan.qcow2"), &place.image("gone.qcow2")?, "qcow2")?;
    fs::remove_file(place.path("gone.qcow2"))?;
    let cases: [(i32, Vec<String>, &[&str]); 7] = [
        (1, vec![place.device("a", "missing.qcow2")], &["'a'", "missing.qcow2"]),
        (1, vec![place.device("a", "text.qcow2")], &["'a'", "text.qcow2"]),
        (1, vec![place.device("a", "orphan.qcow2")], &["'a'", "gone.qcow2"]),
        (2, vec![a.clone(), a.clone()], &["name", "`a`"]),
        (2, vec!["name=a".to_owned()], &["a", "image"]),
        (2, vec![format!("{a},colour=red")], &["a", "colour"]),
        (2, vec![format!("{a},queue-size=100")], &["a", "queue-size"]),
    ];
    for (status, devices, words) in cases {
        let (found, line) = place.refused(&devices)?;
        println!("{line}");
        ensure!(found == status && words.iter().all(|word| line.contains(word)), "{devices:?}: {found}: {line}");
    }
    // While another program writes to the image, and while another daemon has the state directory.
    let holder = qemu_io_that_holds(&place.path("a.qcow2"), &place)?;
    let (status, line) = place.refused(std::slice::from_ref(&a))?;
    println!("{line}");
    ensure!(status == 1 && line.contains("a.qcow2"), "{status}: {line}");
    drop(holder);
    let daemon = place.start(std::slice::from_ref(&a))?;
    let (status, line) = place.refused(&[])?;
    println!("{line}");
    ensure!(status == 1, "{status}: {line}");
    // The one that was there first does not suffer.
    place.snapfence(&["snapshot", "create", "one", "--device", "a"])?;
    daemon.stop()
}

/// A program that has the image open for writing until it is dropped.
fn qemu_io_that_holds(image: &Path, place: &Place) -> Result<Process> {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-c", "sleep 60000"]).arg(image);
    let mut process = Process::spawn(command, &place.path("holder.log"))?;
    let name = image.to_str().context("the path is not UTF-8")?;
    process.wait_until("lock", DEADLINE, |_| tools::qemu_img(["info", "-f", "qcow2", name]).is_err())?;
    Ok(process)
}

//! From ready to stopped, and again.

use std::ffi::OsString;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use snapfence_tests::tools;

use super::support::{PATIENCE, Place};

#[test]
fn command_line_and_file_are_joined() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b", "c"])?;
    let folder = place.path("").display().to_string();
    let config = format!(
        "control = '/nowhere/else.sock'\nstate-dir = '{folder}state'\nallow-dir = ['{folder}']\n\
         [[device]]\nname = 'b'\nimage = '{folder}b.qcow2'\nformat = 'qcow2'\nsocket = '{folder}b.sock'\nqueues = 3\nserial = 'B 1'\n\
         [[device]]\nname = 'c'\nimage = 'c.qcow2'\nformat = 'qcow2'\nsocket = 'c.sock'\nreadonly = true\ncache = 'buffered'\nqueue-size = 64\n"
    );
    std::fs::write(place.path("daemon.toml"), config)?;
    let mut arguments: Vec<OsString> = ["--control", "control.sock", "--config", "daemon.toml", "--device"].map(OsString::from).to_vec();
    arguments.push(place.device("a", "a.qcow2").into());
    let daemon = place.ready(arguments)?;
    let listed = daemon.json(&["device", "list"])?;
    let shown: Vec<String> = listed
        .as_array()
        .into_iter()
        .flatten()
        .map(|device| {
            ["name", "queues", "queue-size", "readonly", "serial", "cache", "state", "connected", "depth"]
                .map(|key| device[key].to_string())
                .join(" ")
        })
        .collect();
    let expected = [
        r#""a" 1 256 false "a" "direct" "ready" false 1"#,
        r#""b" 3 256 false "B 1" "direct" "ready" false 1"#,
        r#""c" 1 64 true "c" "buffered" "ready" false 1"#,
    ];
    ensure!(shown == expected, "{shown:#?}");
    ensure!(listed[2]["image"] == place.path("c.qcow2").display().to_string(), "relative paths start at the working directory: {listed}");
    let only_read = daemon.snapfence(&["snapshot", "create", "s", "--device", "c"])?;
    ensure!(only_read.status == 1 && only_read.err.contains("device 'c' is read-only"), "{only_read:?}");
    daemon.process.stop()
}

/// The flags with which a process has a file open, once for each descriptor.
fn open_flags(process: u32, file: &Path) -> Result<Vec<i32>> {
    let of_process = Path::new("/proc").join(process.to_string());
    let mut flags = Vec::new();
    for entry in std::fs::read_dir(of_process.join("fd"))? {
        let entry = entry?;
        // Others may be closed meanwhile.
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == file) {
            let info = std::fs::read_to_string(of_process.join("fdinfo").join(entry.file_name()))?;
            let octal = info.lines().find_map(|line| line.strip_prefix("flags:")).context("a line with the flags")?;
            flags.push(i32::from_str_radix(octal.trim(), 8)?);
        }
    }
    Ok(flags)
}

#[test]
fn images_are_read_and_written_past_the_page_cache_unless_buffered() -> Result<()> {
    let direct = OFlags::DIRECT.bits() as i32;
    let mut place = Place::with_disks(&["a", "b", "c"])?;
    if rustix::fs::open(place.path("a.qcow2"), OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_err() {
        snapfence_tests::skipped("the temporary directory has no O_DIRECT");
        return Ok(());
    }
    let options = ["", ",cache=direct", ",cache=buffered"];
    let devices: Vec<_> =
        ["a", "b", "c"].iter().zip(options).map(|(name, more)| place.device(name, &format!("{name}.qcow2")) + more).collect();
    let daemon = place.serve(&devices)?;
    daemon.json(&["snapshot", "create", "s", "--device", "a", "--device", "b", "--device", "c"])?;
    for (name, is_direct) in [("a", true), ("b", true), ("c", false)] {
        for file in [format!("{name}.qcow2"), format!("{name}.s.qcow2")] {
            let flags = open_flags(daemon.process.id(), &place.path(&file))?;
            ensure!(!flags.is_empty() && flags.iter().all(|flags| (flags & direct != 0) == is_direct), "{file}: {flags:x?}");
        }
    }
    daemon.process.stop()
}

#[test]
fn every_way_to_stop_is_clean() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let devices = [place.device("vda", "a.qcow2"), place.device("vdb", "b.qcow2")];
    for (round, signal) in [Some(Signal::TERM), Some(Signal::INT), None].into_iter().enumerate() {
        let mut daemon = place.serve(&devices)?;
        ensure!(place.path("vda.sock").exists() && place.path("control.sock").exists(), "it listens");
        daemon.json(&["snapshot", "create", &format!("s{round}"), "--device", "vda", "--device", "vdb"])?;
        let log = match signal {
            Some(signal) => daemon.end(signal)?,
            None => {
                super::wire::Client::connect(&daemon.control)?.ask(r#"{"execute":"quit"}"#)?;
                daemon.ended()?
            }
        };
        ensure!(log.trim_end().ends_with("event=\"stopped\""), "{log}");
        for socket in ["vda.sock", "vdb.sock", "control.sock"] {
            ensure!(!place.path(socket).exists(), "{socket} is left");
        }
        place.check_images()?;
    }
    ensure!(tools::layers(&place.path("a.s2.qcow2"), "qcow2")?.len() == 4, "three snapshots");
    Ok(())
}

#[test]
fn the_same_arguments_find_the_recorded_top_and_the_log_says_so() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let devices = [place.device("vda", "a.qcow2")];
    let daemon = place.serve(&devices)?;
    ensure!(!daemon.process.output().contains("recorded_top"), "nothing is recorded yet");
    daemon.json(&["snapshot", "create", "s1", "--device", "vda"])?;
    daemon.process.stop()?;
    let daemon = place.serve(&devices)?;
    let log = daemon.process.output();
    let (image, top) = (place.path("a.qcow2").display().to_string(), place.path("a.s1.qcow2").display().to_string());
    let line = log.lines().find(|line| line.contains("recorded_top")).unwrap_or_default();
    ensure!(line.contains(&format!("image={image}")) && line.contains(&format!("top={top}")), "{log}");
    ensure!(daemon.json(&["device", "list"])?[0]["image"] == top, "the overlay is served");
    let stack = daemon.json(&["stack", "show", "vda"])?;
    ensure!(stack["layers"][1]["snapshot"] == "s1" && stack["layers"][1]["state"] == "frozen", "{stack}");
    let snapshots = daemon.json(&["snapshot", "list"])?;
    ensure!(snapshots[0]["name"] == "s1" && snapshots[0]["state"] == "frozen", "{snapshots}");
    daemon.process.stop()
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_goes_on() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let devices = [place.device("vda", "a.qcow2"), place.device("vdb", "b.qcow2")];
    for round in 0..3 {
        let mut daemon = place.serve(&devices)?;
        let name = format!("s{round}");
        let created = daemon.snapfence(&["snapshot", "create", &name, "--device", "vda", "--device", "vdb", "--no-wait"])?;
        ensure!(created.status == 0, "{created:?}");
        daemon.process.signal(Signal::KILL)?;
        daemon.process.wait(PATIENCE)?;
        ensure!(place.path("vda.sock").exists(), "a killed daemon leaves its sockets");
    }
    let daemon = place.serve(&devices)?;
    for device in ["vda", "vdb"] {
        let stack = daemon.json(&["stack", "show", device])?;
        ensure!(stack["layers"].as_array().map(Vec::len) == Some(4), "what was answered as switched has switched: {stack}");
    }
    for snapshot in daemon.json(&["snapshot", "list"])?.as_array().into_iter().flatten() {
        ensure!(snapshot["state"] == "frozen" || (snapshot["state"] == "failed" && snapshot["error"].is_string()), "{snapshot}");
    }
    daemon.process.stop()?;
    place.check_images()
}

#[test]
fn the_service_manager_is_told() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let path = place.path("notify.sock");
    let notified = UnixDatagram::bind(&path)?;
    notified.set_read_timeout(Some(PATIENCE))?;
    let mut arguments = place.base();
    arguments.extend(["--device".into(), place.device("vda", "a.qcow2").into()]);
    let process = place.spawn(arguments, &[("NOTIFY_SOCKET", &path)])?;
    let mut message = [0; 100];
    let length = notified.recv(&mut message)?;
    ensure!(message[..length].starts_with(b"READY=1"), "{:?}", String::from_utf8_lossy(&message[..length]));
    ensure!(process.output().contains("ready"), "the log says it first");
    process.stop()?;
    let length = notified.recv(&mut message)?;
    ensure!(message[..length].starts_with(b"STOPPING=1"), "{:?}", String::from_utf8_lossy(&message[..length]));
    Ok(())
}

#[test]
fn images_are_locked_against_qemu_while_they_are_served() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let devices = [place.device("vda", "a.qcow2")];
    let daemon = place.serve(&devices)?;
    let write = |image: &str| tools::qemu_io([OsString::from("-c"), "write 0 4k".into(), place.path(image).into()]);
    let read = |image: &str| tools::qemu_img([OsString::from("check"), place.path(image).into()]);
    let refused = |result: Result<String>| result.is_err_and(|error| format!("{error:#}").contains("lock"));
    ensure!(refused(write("a.qcow2")) && refused(read("a.qcow2")), "the top is ours alone");
    tools::qemu_img([OsString::from("info"), "-U".into(), place.path("a.qcow2").into()])?;
    daemon.json(&["snapshot", "create", "s1", "--device", "vda"])?;
    ensure!(refused(write("a.qcow2")), "a frozen layer does not change");
    read("a.qcow2")?;
    ensure!(refused(write("a.s1.qcow2")) && refused(read("a.s1.qcow2")), "the overlay is the top now");
    daemon.process.stop()?;
    read("a.s1.qcow2")?;
    Ok(())
}

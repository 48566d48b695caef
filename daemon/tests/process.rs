//! The daemon as a process among others: its log, its signals, and what it says of a start that fails.

mod common;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::daemon::Daemon;
use common::make_qcow2;
use rustix::process::Signal;
use serde_json::json;
use snapfence::protocol::{SnapshotCreate, SnapshotMember};
use snapfence_image_format::qcow2::CreateOptions;

/// A device with a new image, as the command line describes it.
fn device(directory: &Path, name: &str) -> String {
    let path = |suffix| directory.join(format!("{name}.{suffix}"));
    make_qcow2(&path("qcow2"), CreateOptions::standalone(1 << 20));
    format!("name={name},image={},format=qcow2,socket={}", path("qcow2").display(), path("sock").display())
}

fn take_snapshot(daemon: &Daemon, name: &str) {
    let member = SnapshotMember { device: "vda".into(), overlay: None, format: None };
    let asked = SnapshotCreate { name: name.into(), devices: vec![member], create: false, deadline_ms: None, job_id: None };
    daemon.client().call(&asked).expect("a snapshot");
}

#[test]
fn threads_for_which_guests_wait_go_before_the_others() {
    let directory = tempfile::tempdir().expect("a directory");
    let own = rustix::process::getpriority_process(None).expect("a priority");
    let daemon = Daemon::start(directory.path(), &[device(directory.path(), "vda")]);
    // It makes the threads that blocking work runs on.
    take_snapshot(&daemon, "s1");
    let others = (own + 10).min(19);
    let (mut served, mut behind) = (0, 0);
    for (name, niceness) in daemon.niceness().into_iter().filter(|(name, _)| !name.starts_with("iou-")) {
        let goes_first = ["queues 0", "fences", "signals", "foreground"].contains(&name.as_str());
        assert_eq!(niceness, if goes_first { own } else { others }, "{name}");
        served += usize::from(name == "queues 0");
        behind += usize::from(["snapfenced", "catalogue", "offload"].contains(&name.as_str()));
    }
    assert!(served == 1 && behind >= 3, "{:?}", daemon.niceness());
    daemon.stop();
}

#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let nobody_reads = || Stdio::from(std::io::pipe().expect("a pipe").1);
    let full_disk = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").expect("a device"));
    for log in [nobody_reads(), full_disk()] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = Daemon::command(directory.path(), &[device(directory.path(), "vda")]);
        command.stderr(log);
        let daemon = Daemon::run(command, directory.path());
        take_snapshot(&daemon, "s1");
        // A refusal is logged as well.
        let refused = daemon.client().execute("device-remove", json!({ "name": "vdb" }));
        assert!(refused.expect_err("no such device").to_string().contains("vdb"));
        take_snapshot(&daemon, "s2");
        daemon.stop();
        assert!(!directory.path().join("vda.sock").exists() && !directory.path().join("control").exists());
    }
}

#[test]
fn a_log_that_nobody_reads_any_more_stops_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let (_unread, log) = std::io::pipe().expect("a pipe");
    let mut command = Daemon::command(directory.path(), &[device(directory.path(), "vda")]);
    command.stderr(log);
    let daemon = Daemon::run(command, directory.path());
    let mut client = daemon.client();
    // More than the 64 KiB that a pipe holds.
    for _ in 0..1_000 {
        client.execute("device-remove", json!({ "name": "n".repeat(100) })).expect_err("a refusal is logged");
    }
    take_snapshot(&daemon, "s1");
    daemon.stop();
}

#[test]
fn each_signal_to_end_ends_in_good_order() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let directory = tempfile::tempdir().expect("a directory");
        let plain = Daemon::command(directory.path(), &[device(directory.path(), "vda")]);
        // Whoever runs the tests may ignore the hang-up, which the daemon would inherit, and respect.
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP").arg(plain.get_program()).args(plain.get_args());
        let daemon = Daemon::run(command, directory.path());
        daemon.signal(signal);
        daemon.await_clean_end();
        assert!(!directory.path().join("vda.sock").exists() && !directory.path().join("control").exists(), "{signal:?}");
    }
}

#[test]
fn nohup_keeps_it_running_without_its_terminal() {
    let directory = tempfile::tempdir().expect("a directory");
    let plain = Daemon::command(directory.path(), &[device(directory.path(), "vda")]);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(plain.get_program()).args(plain.get_args());
    let daemon = Daemon::run(command, directory.path());
    daemon.signal(Signal::HUP);
    take_snapshot(&daemon, "s1");
    daemon.stop();
}

/// Runs a daemon that does not start, and gives its exit status and what it says.
fn refused(mut command: Command) -> (Option<i32>, String) {
    let ended = command.stderr(Stdio::piped()).output().expect("a program that ends");
    (ended.status.code(), String::from_utf8(ended.stderr).expect("text"))
}

#[test]
fn a_wrong_log_filter_is_wrong_usage() {
    for wrong in ["debgu", "info,verbose", "snapfenced=loud", "info=debug=trace"] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = Daemon::command(directory.path(), &[]);
        command.env("SNAPFENCE_LOG", wrong);
        let (status, text) = refused(command);
        assert_eq!(status, Some(2), "{text}");
        assert!(text.starts_with(&format!("snapfenced: SNAPFENCE_LOG={wrong}: expected ")) && text.lines().count() == 1, "{text}");
    }
    for right in ["", "warn", "info,snapfenced::control=trace", "OFF"] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = Daemon::command(directory.path(), &[]);
        command.env("SNAPFENCE_LOG", right);
        Daemon::run(command, directory.path()).stop();
    }
}

#[test]
fn only_what_is_recorded_can_be_forgotten() {
    let directory = tempfile::tempdir().expect("a directory");
    let forgetting = |names: &[&str]| {
        let mut command = Daemon::command(directory.path(), &[]);
        for name in names {
            command.args(["--forget", name]);
        }
        command
    };
    let (status, text) = refused(forgetting(&["vda"]));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("--forget vda: no device is recorded"), "{text}");

    Daemon::start(directory.path(), &["vdb", "vda"].map(|name| device(directory.path(), name))).stop();
    let (status, text) = refused(forgetting(&["vda", "vdc"]));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("--forget vdc: no such device is recorded; those that are: vda, vdb"), "{text}");

    Daemon::run(forgetting(&["vda"]), directory.path()).stop();
    let (_, text) = refused(forgetting(&["vda"]));
    assert!(text.contains("those that are: vdb"), "{text}");
}

#[test]
fn sockets_have_directories_of_their_own() {
    let directory = tempfile::tempdir().expect("a directory");
    for name in ["images", "sockets"] {
        std::fs::create_dir(directory.path().join(name)).expect("a directory");
    }
    let add = |daemon: &Daemon, socket: &str| {
        let image = directory.path().join("images/vda.raw");
        std::fs::File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
        let arguments = json!({ "name": "vda", "image": image, "format": "raw", "socket": directory.path().join(socket) });
        daemon.client().execute("device-add", arguments).map_err(|error| error.to_string())
    };
    for bound in ["--allow-dir", "--socket-dir"] {
        let mut command = Daemon::command(directory.path(), &[]);
        command.arg("--socket-dir").arg(directory.path().join("sockets"));
        command.arg(bound).arg(directory.path().join(if bound == "--allow-dir" { "images" } else { "sockets" }));
        let daemon = Daemon::run(command, directory.path());
        // The control socket's directory, and all beneath it.
        for socket in ["vda.sock", "sockets/vda.sock"] {
            add(&daemon, socket).expect(socket);
            daemon.client().execute("device-remove", json!({ "name": "vda" })).expect("it is there");
        }
        let outside = directory.path().parent().expect("it is somewhere").join("vda.sock");
        let refused = add(&daemon, outside.to_str().expect("text")).expect_err("outside");
        assert!(refused.contains("lies outside the directories for sockets") && refused.contains("--socket-dir"), "{refused}");
        daemon.stop();
    }
}

#[test]
fn a_device_says_who_may_connect() {
    let directory = tempfile::tempdir().expect("a directory");
    let own = rustix::process::getegid().as_raw();
    let devices = [
        device(directory.path(), "vda"),
        format!("{},socket-mode=0666", device(directory.path(), "vdb")),
        format!("{},socket-group={own}", device(directory.path(), "vdc")),
    ];
    let daemon = Daemon::start(directory.path(), &devices);
    for (name, expected) in [("vda", 0o600), ("vdb", 0o666), ("vdc", 0o660)] {
        let file = std::fs::metadata(directory.path().join(format!("{name}.sock"))).expect("a socket");
        assert_eq!((file.mode() & 0o777, file.gid()), (expected, own), "{name}");
    }
    daemon.stop();
    let wrong = format!("{},socket-group=no-such-group", device(directory.path(), "vdd"));
    let (status, text) = refused(Daemon::command(directory.path(), &[wrong]));
    assert!(status == Some(1) && text.contains("device 'vdd'") && text.contains("no group 'no-such-group'"), "{text}");
}

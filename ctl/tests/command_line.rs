//! The program `snapfence` against a daemon that is made up here: what it asks, what it prints, and with which status it ends.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

/// What the daemon sends in answer to a command: lines without their `id` and `timestamp`, which are added.
type Script = fn(&str, &Value) -> Vec<Value>;

/// Listens, notes the commands, and answers by its script.
struct Daemon {
    control: PathBuf,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    folder: TempDir,
}

fn start(script: Script) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let log = log.clone();
            thread::spawn(move || serve(stream.unwrap(), script, &log));
        }
    });
    Daemon { control, asked, folder }
}

fn serve(mut stream: UnixStream, script: Script, log: &Mutex<Vec<(String, Value)>>) {
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut send = move |line: Value| stream.write_all(format!("{line}\r\n").as_bytes());
    send(json!({ "QMP": { "version": { "qemu": { "major": 0, "minor": 0, "micro": 0 }, "package": "" }, "capabilities": [] } })).unwrap();
    for line in lines {
        let Ok(line) = line else { return };
        let request: Value = serde_json::from_str(&line).unwrap();
        let (command, arguments) = (request["execute"].as_str().unwrap().to_owned(), request["arguments"].clone());
        let answers = if command == "qmp_capabilities" { vec![json!({ "return": {} })] } else { script(&command, &arguments) };
        if command != "qmp_capabilities" {
            log.lock().unwrap().push((command, arguments));
        }
        for mut answer in answers {
            if answer.get("event").is_some() {
                answer["timestamp"] = json!({ "seconds": 1_735_689_600, "microseconds": 5 });
            } else {
                answer["id"] = request["id"].clone();
            }
            // The program may have seen enough.
            if send(answer).is_err() {
                return;
            }
        }
    }
}

impl Daemon {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapfence"));
        command.env("SNAPFENCE_CONTROL", &self.control).current_dir(self.folder.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        Ended::from(self.command(arguments).output().unwrap())
    }

    fn asked(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

#[derive(Debug)]
struct Ended {
    status: i32,
    out: String,
    err: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { status: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ended {
    fn done(&self) -> &str {
        assert_eq!((self.status, self.err.as_str()), (0, ""), "{self:?}");
        &self.out
    }

    fn json(&self) -> Value {
        serde_json::from_str(self.done()).unwrap()
    }

    fn failed(&self, expected: &str) {
        assert!(self.status == 1 && self.err.starts_with("snapfence: ") && self.err.contains(expected), "{self:?}");
    }
}

fn error(class: &str, desc: &str) -> Vec<Value> {
    vec![json!({ "error": { "class": class, "desc": desc } })]
}

fn snapshot(state: &str) -> Value {
    let mut snapshot = json!({
        "name": "s1", "state": state, "created": "2025-01-01T00:00:00.000001Z", "job": "j1", "switch_us": 12,
        "devices": [{ "device": "vda", "overlay": "/d/vda.s1.qcow2", "frozen_layer": "/d/vda.raw", "switch_us": 12 }],
    });
    // Before the end completions may still be held.
    if state == "frozen" {
        for (time, value) in [("hold_us", 345), ("freeze_us", 67_890)] {
            snapshot[time] = json!(value);
            snapshot["devices"][0][time] = json!(value);
        }
    }
    if state == "failed" {
        snapshot["error"] = json!("no space left");
    }
    snapshot
}

#[test]
fn lists_are_tables_or_json() {
    let daemon = start(|command, _| {
        let answer = match command {
            "device-list" => json!([{
                "name": "vda", "image": "/d/a.qcow2", "format": "qcow2", "socket": "/d/a.sock", "queues": 4, "queue-size": 256,
                "readonly": false, "serial": "vda", "cache": "direct", "virtual-size": 1 << 30, "connected": true, "depth": 3, "state": "ready",
                "on-no-space": "hold", "io-status": "nospace",
            }]),
            "snapshot-list" => json!([snapshot("frozen"), snapshot("switched")]),
            "query-jobs" => json!([
                { "id": "j1", "type": "snapshot", "status": "running", "current-progress": 1, "total-progress": 4 },
            ]),
            "stack-show" => json!({ "device": "vda", "layers": [
                { "file": "/d/a.qcow2", "format": "qcow2", "virtual-size": 4096, "allocated-bytes": 512, "state": "active" },
                { "file": "/d/b.raw", "format": "raw", "virtual-size": 4096, "allocated-bytes": 0, "state": "frozen", "snapshot": "s1" },
            ] }),
            other => panic!("{other}"),
        };
        vec![json!({ "return": answer })]
    });
    let expected = "\
NAME  STATE  I/O      FRONT-END   SIZE  LAYERS  QUEUES  ACCESS      CACHE   FORMAT  IMAGE       SOCKET
vda   ready  nospace  connected  1 GiB       3   4x256  read-write  direct  qcow2   /d/a.qcow2  /d/a.sock
";
    assert_eq!(daemon.run(&["device", "list"]).done(), expected);
    assert_eq!(daemon.run(&["device", "list", "--json"]).json()[0]["queue-size"], 256);
    let expected = "\
NAME  STATE     CREATED                      SWITCH    HOLD    FREEZE  DEVICES
s1    frozen    2025-01-01T00:00:00.000001Z   12 µs  345 µs  67.89 ms  vda
s1    switched  2025-01-01T00:00:00.000001Z   12 µs       -         -  vda
";
    assert_eq!(daemon.run(&["snapshot", "list"]).done(), expected);
    assert_eq!(daemon.run(&["--json", "snapshot", "list"]).json(), json!([snapshot("frozen"), snapshot("switched")]));
    assert!(daemon.run(&["job", "list"]).done().contains("j1  snapshot  running      25 %  -"));
    let expected = "\
vda in /d
├─ a.qcow2  qcow2  4 KiB  512 B allocated  active
└─ b.raw    raw    4 KiB    0 B allocated  frozen: s1
";
    assert_eq!(daemon.run(&["stack", "show", "vda"]).done(), expected);
    assert_eq!(daemon.run(&["stack", "show", "vda", "--json"]).json()["layers"][1]["snapshot"], "s1");
}

#[test]
fn devices_are_added_and_removed_by_absolute_paths() {
    let daemon = start(|command, arguments| match command {
        "device-add" => {
            let mut device = arguments.clone();
            for (key, value) in [("queues", json!(1)), ("queue-size", json!(256)), ("readonly", json!(false)), ("serial", json!(""))] {
                device[key] = value;
            }
            for (key, value) in [
                ("virtual-size", json!(512)),
                ("connected", json!(false)),
                ("depth", json!(1)),
                ("state", json!("ready")),
                ("io-status", json!("ok")),
            ] {
                device[key] = value;
            }
            vec![json!({ "return": device })]
        }
        _ => error("DeviceNotFound", "there is no device or node called 'vdx'"),
    });
    let folder = daemon.folder.path().canonicalize().unwrap();
    daemon.run(&["device", "add", "name=vda,image=a.raw,format=raw,socket=/run/a.sock"]).done();
    let expected = json!({ "name": "vda", "image": folder.join("a.raw"), "format": "raw", "socket": "/run/a.sock", "cache": "direct", "on-no-space": "hold" });
    assert_eq!(daemon.asked(), [("device-add".to_owned(), expected)]);
    daemon.run(&["device", "remove", "vdx", "--force"]).failed("'vdx'");
    assert_eq!(daemon.asked(), [("device-remove".to_owned(), json!({ "name": "vdx", "force": true }))]);
    daemon.run(&["device", "resume", "vdx"]).failed("'vdx'");
    assert_eq!(daemon.asked(), [("device-resume".to_owned(), json!({ "name": "vdx" }))]);
}

#[test]
fn snapshot_create_waits_until_frozen() {
    let daemon = start(|command, arguments| {
        let event = |name: &str, data: Value| json!({ "event": name, "data": data });
        match (command, arguments["name"].as_str().unwrap()) {
            ("snapshot-create", "s1") => {
                let mut other = snapshot("failed");
                other["name"] = json!("other");
                vec![
                    event("SNAPSHOT_SWITCHED", snapshot("switched")),
                    json!({ "return": snapshot("switched") }),
                    event("SNAPSHOT_FAILED", other),
                    event("NEWER_THAN_THIS", json!({})),
                    event("SNAPSHOT_FROZEN", snapshot("frozen")),
                ]
            }
            // The event is before the answer.
            ("snapshot-create", "early") => {
                vec![event("SNAPSHOT_FROZEN", snapshot("frozen")), json!({ "return": snapshot("switched") })]
            }
            // No event at all: the daemon is asked.
            ("snapshot-create", "lost") => vec![json!({ "return": snapshot("switched") })],
            ("snapshot-show", "s1") => vec![json!({ "return": snapshot("frozen") })],
            ("snapshot-create", "later") => vec![json!({ "return": snapshot("switched") }), event("SNAPSHOT_FAILED", snapshot("failed"))],
            ("snapshot-create", "never") => error("GenericError", "vda is at its deadline"),
            other => panic!("{other:?}"),
        }
    });
    let create = |name: &str, more: &[&str]| {
        let all: Vec<_> = ["snapshot", "create", name, "--device", "vda"].iter().chain(more).copied().collect();
        daemon.run(&all)
    };
    assert_eq!(create("s1", &["--json"]).json(), snapshot("frozen"));
    let folder = daemon.folder.path().canonicalize().unwrap();
    create("s1", &["--device", "vdb=b.qcow2", "--create", "--deadline-ms", "50"]).done();
    let members = json!([{ "device": "vda" }, { "device": "vdb", "overlay": folder.join("b.qcow2") }]);
    let expected = [
        ("snapshot-create".to_owned(), json!({ "name": "s1", "devices": [{ "device": "vda" }] })),
        ("snapshot-create".to_owned(), json!({ "name": "s1", "devices": members, "create": true, "deadline-ms": 50 })),
    ];
    assert_eq!(daemon.asked(), expected);
    assert_eq!(create("s1", &["--json", "--no-wait"]).json(), snapshot("switched"));
    let text = create("s1", &["--no-wait"]);
    assert!(text.done().contains("\nfirst to last queue switched 12 µs\n"), "what is not known is not said: {text:?}");
    let text = create("early", &[]);
    assert!(
        text.done().contains("\nfirst to last queue switched 12 µs, longest held completion 345 µs, frozen after 67.89 ms\n"),
        "{text:?}"
    );
    assert_eq!(create("lost", &["--json"]).json(), snapshot("frozen"));
    create("later", &[]).failed("no space left");
    create("never", &[]).failed("deadline");
}

#[test]
fn job_wait_ends_with_the_job() {
    let daemon = start(|command, _| {
        assert_eq!(command, "query-jobs");
        let job =
            |id: &str, status: &str| json!({ "id": id, "type": "snapshot", "status": status, "current-progress": 4, "total-progress": 4 });
        let mut bad = job("bad", "concluded");
        bad["error"] = json!("the medium fails");
        // The job of the name "slow" has ended when it is looked at again.
        static LOOKED: Mutex<u32> = Mutex::new(0);
        let mut looked = LOOKED.lock().unwrap();
        *looked += 1;
        let slow = job("slow", if *looked > 1 { "concluded" } else { "running" });
        let event = json!({ "event": "JOB_STATUS_CHANGE", "data": { "id": "slow", "status": "concluded" } });
        vec![json!({ "return": [slow, bad] }), event]
    });
    assert_eq!(daemon.run(&["job", "wait", "slow", "--json"]).json()["status"], "concluded");
    assert_eq!(daemon.asked().len(), 2);
    let ended = daemon.run(&["job", "wait", "bad"]);
    ended.failed("the medium fails");
    assert!(ended.out.contains("concluded"), "{ended:?}");
    daemon.run(&["job", "wait", "none"]).failed("no job 'none'");
}

#[test]
fn events_are_followed_until_the_reader_has_enough() {
    // The connection's negotiation is answered; events come with the next command, which never comes: so they come with the first.
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                stream.write_all(b"{\"QMP\": {}}\r\n").unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                stream.write_all(b"{\"return\": {}, \"id\": 1}\r\n").unwrap();
                let event = json!({
                    "event": "DEVICE_CONNECTED", "data": { "device": "vda" }, "timestamp": { "seconds": 1_735_689_600, "microseconds": 5 },
                });
                let other = |name: &str, data| json!({ "event": name, "data": data, "timestamp": { "seconds": 1, "microseconds": 0 } });
                let (switched, frozen) = (snapshot("switched"), snapshot("frozen"));
                let more = [other("OTHER", json!({})), other("SNAPSHOT_SWITCHED", switched), other("SNAPSHOT_FROZEN", frozen)];
                let lines: String = [event].iter().chain(&more).map(|line| format!("{line}\r\n")).collect();
                while stream.write_all(lines.as_bytes()).is_ok() {}
            });
        }
    });
    let follow = |json: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapfence"));
        command.arg("--control").arg(&control).arg("events").args(json.then_some("--json")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = [(); 4].map(|()| lines.next().unwrap().unwrap());
        drop(lines);
        let status = child.wait().unwrap();
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((status.code(), err.as_str()), (Some(0), ""));
        first
    };
    let expected = [
        "2025-01-01T00:00:00.000005Z  a front-end has connected to vda",
        "1970-01-01T00:00:01.000000Z  OTHER {}",
        "1970-01-01T00:00:01.000000Z  snapshot s1 of vda has switched: first to last queue switched 12 µs",
        "1970-01-01T00:00:01.000000Z  snapshot s1 of vda is frozen: first to last queue switched 12 µs, longest held completion 345 µs, \
         frozen after 67.89 ms",
    ];
    assert_eq!(follow(false), expected);
    let event: Value = serde_json::from_str(&follow(true)[0]).unwrap();
    assert_eq!((&event["event"], &event["data"]["device"]), (&json!("DEVICE_CONNECTED"), &json!("vda")));
}

#[test]
fn an_overlay_that_is_missing_can_be_made() {
    let daemon = start(|_, _| error("GenericError", "overlay /o: there is no such file"));
    daemon.run(&["snapshot", "create", "s", "--device", "vda=none.qcow2"]).failed("none.qcow2 is not there; --create has it made");
    for arguments in [&["--device", "vda=none.qcow2", "--create"][..], &["--device", "vda=control.sock"], &["--device", "vda"]] {
        let ended = daemon.run(&[&["snapshot", "create", "s"], arguments].concat());
        assert!(ended.status == 1 && !ended.err.contains("--create"), "{ended:?}");
    }
}

#[test]
fn failures_say_what_to_do_and_usage_has_its_own_status() {
    let daemon = start(|_, _| vec![json!({ "return": "nonsense" })]);
    daemon.run(&["device", "list"]).failed("same version");
    let nowhere = daemon.folder.path().join("nowhere.sock");
    let nowhere = nowhere.to_str().unwrap();
    daemon.run(&["--control", nowhere, "device", "list"]).failed(&format!("no daemon listens on {nowhere}; start snapfenced"));
    drop(UnixListener::bind(nowhere).unwrap());
    daemon.run(&["device", "list", "--control", nowhere]).failed(&format!("no daemon listens on {nowhere}"));

    let refusing = daemon.folder.path().join("refusing.sock");
    let listener = UnixListener::bind(&refusing).unwrap();
    let refuser = thread::spawn(move || {
        for line in ["{\"error\":{\"class\":\"GenericError\",\"desc\":\"there are 64 already\"}}\r\n", "SSH-2.0\r\n", ""] {
            listener.accept().unwrap().0.write_all(line.as_bytes()).unwrap();
        }
    });
    let refusing = refusing.to_str().unwrap();
    daemon.run(&["--control", refusing, "device", "list"]).failed("there are 64 already");
    daemon.run(&["--control", refusing, "device", "list"]).failed("does not greet as a control socket does");
    daemon.run(&["--control", refusing, "device", "list"]).failed("closed the connection");
    refuser.join().unwrap();

    // A variable that is set and empty matters to those only who need a daemon.
    let without_path = |arguments: &[&str]| {
        let mut command = daemon.command(arguments);
        Ended::from(command.env("SNAPFENCE_CONTROL", "").output().unwrap())
    };
    without_path(&["image", "create", "a.raw", "1M", "--format", "raw"]).done();
    let ended = without_path(&["device", "list"]);
    assert!(ended.status == 2 && ended.err.contains("the path of the control socket is empty"), "{ended:?}");

    for wrong in [&["device"][..], &["snapshot", "create", "s"], &["device", "add", "name=x"], &["no-such"]] {
        assert_eq!(daemon.run(wrong).status, 2, "{wrong:?}");
    }
    assert_eq!(daemon.run(&["--help"]).status, 0);
    assert_eq!(daemon.asked().len(), 1);
}

#[test]
fn completions_and_manual_cover_every_command() {
    let daemon = start(|_, _| Vec::new());
    for shell in ["bash", "zsh", "fish"] {
        assert!(daemon.run(&["completions", shell]).done().contains("deadline-ms"), "{shell}");
    }
    daemon.run(&["manual", "."]).done();
    let page = std::fs::read_to_string(daemon.folder.path().join("snapfence-snapshot-create.1")).unwrap();
    assert!(page.contains("deadline"), "{page}");
    daemon.run(&["manual", "no/such/folder"]).failed("no/such/folder");
}

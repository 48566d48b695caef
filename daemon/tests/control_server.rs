//! The control server over a real socket, with commands that do nothing: QMP's wire rules hold, whatever a client sends, takes or leaves.

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use snapfence::protocol::{Command, DeviceEvent, Event, Failure};
use snapfenced::control::{Commands, Events, Reply, Server, ServerError, ServerOptions};
use tempfile::TempDir;

/// Notes each command, and answers with its name; but `stack-show` is handed to the test, and `quit` is dropped.
struct Fake {
    executed: Mutex<Vec<Command>>,
    held: Mutex<Sender<Reply>>,
}

impl Commands for Fake {
    fn execute(&self, command: Command, reply: Reply) {
        self.executed.lock().unwrap().push(command.clone());
        match command {
            Command::StackShow(_) => self.held.lock().unwrap().send(reply).unwrap(),
            Command::Quit(_) => drop(reply),
            Command::JobCancel(cancel) if cancel.id == "panic" => panic!("as the test wants it"),
            Command::JobCancel(cancel) => reply.fail(Failure::no_device(&cancel.id)),
            // Answered from another thread.
            other => drop(thread::spawn(move || reply.ok(json!({ "did": other.name() })))),
        }
    }
}

struct Running {
    server: Server,
    fake: Arc<Fake>,
    held: Receiver<Reply>,
    events: Events,
    path: PathBuf,
    _folder: TempDir,
}

fn start() -> Running {
    start_with(|_| {})
}

fn start_with(change: impl FnOnce(&mut ServerOptions)) -> Running {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (sender, held) = mpsc::channel();
    let fake = Arc::new(Fake { executed: Mutex::default(), held: Mutex::new(sender) });
    let events = Events::new();
    let mut options = ServerOptions::new(path.clone());
    change(&mut options);
    let server = Server::start(options, fake.clone(), events.clone()).unwrap();
    Running { server, fake, held, events, path, _folder: folder }
}

impl Running {
    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Client { lines: BufReader::new(stream) }
    }

    fn negotiated(&self) -> Client {
        let mut client = self.connect();
        assert!(client.receive().get("QMP").is_some());
        assert_eq!(client.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
        client
    }
}

struct Client {
    lines: BufReader<UnixStream>,
}

impl Client {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.lines.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the server has closed the connection");
        assert!(line.ends_with("\r\n") && line.is_ascii(), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, line: &str) -> Value {
        self.send(line);
        self.send("\n");
        self.receive()
    }

    fn alive(&mut self) {
        let answer = self.ask(r#"{"execute":"query-version","id":"alive"}"#);
        assert_eq!(answer["id"], "alive", "{answer}");
    }

    fn closed(mut self) {
        let mut rest = Vec::new();
        match self.lines.read_to_end(&mut rest) {
            Ok(count) => assert_eq!(count, 0, "{}", String::from_utf8_lossy(&rest)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

fn class(answer: &Value) -> &str {
    answer["error"]["class"].as_str().unwrap_or_else(|| panic!("expected an error: {answer}"))
}

fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("expected an error: {answer}"))
}

#[test]
fn negotiation_comes_first_and_once() {
    let running = start();
    let mut client = running.connect();
    let greeting = client.receive();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
    assert!(greeting["QMP"]["version"]["package"].is_string(), "{greeting}");
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));

    for early in ["query-version", "query-jobs", "no-such-command"] {
        let answer = client.ask(&json!({ "execute": early, "id": [early] }).to_string());
        assert_eq!((class(&answer), &answer["id"]), ("CommandNotFound", &json!([early])));
        assert!(desc(&answer).contains("qmp_capabilities"), "{answer}");
    }
    running.events.emit(Event::DeviceConnected(DeviceEvent { device: "early".to_owned() }));
    let answer = client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    assert!(desc(&answer).contains("'oob'"), "{answer}");
    assert_eq!(class(&client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[1]}}"#)), "GenericError");
    assert_eq!(class(&client.ask(r#"{"execute":"qmp_capabilities","arguments":{"other":[]}}"#)), "GenericError");
    assert_eq!(client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":null}"#), json!({ "return": {}, "id": null }));
    assert_eq!(class(&client.ask(r#"{"execute":"qmp_capabilities"}"#)), "CommandNotFound");
    let names = client.ask(r#"{"execute":"query-commands"}"#);
    for name in ["quit", "transaction", "snapshot-create", "query-version", "qmp_capabilities"] {
        assert!(names["return"].as_array().unwrap().contains(&json!({ "name": name })), "{name}");
    }
    assert!(running.fake.executed.lock().unwrap().is_empty());
    client.alive();
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_done() {
    let running = start();
    let mut client = running.negotiated();
    let deep = format!("{{\"execute\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let table = [
        ("hello", "JSON parse error"),
        ("{ \"execute\": }", "JSON parse error"),
        ("{'execute':'quit\"}", "JSON parse error"),
        ("[]", "JSON parse error"),
        ("}", "JSON parse error"),
        ("{\"execute\":\"quit", "JSON parse error"),
        ("\u{1}", "JSON parse error"),
        ("{\"execute\":\"quit\\ud800\"}", "JSON parse error"),
        (&deep, "JSON parse error, recursion limit"),
        (r#"{"execute":"quit","execute":"quit"}"#, "'execute' is there twice"),
        (r#"{"execute":"quit","arguments":{"a":{"b":1,"b":2}}}"#, "'b' is there twice"),
        ("{}", "'execute'"),
        (r#"{"execute":7}"#, "'execute'"),
        (r#"{"exec-oob":"quit"}"#, "'exec-oob'"),
        (r#"{"execute":"quit","arguments":[]}"#, "'arguments'"),
        (r#"{"execute":"quit","argument":{}}"#, "'argument'"),
        (r#"{"execute":"quit","arguments":{"fast":true}}"#, "fast"),
        (r#"{"execute":"query-version","arguments":{"no":1}}"#, "no"),
        (r#"{"execute":"job-cancel"}"#, "id"),
        (r#"{"execute":"job-cancel","arguments":{"id":7}}"#, "'id'"),
        (r#"{"execute":"job-cancel","arguments":{"id":null}}"#, "'id'"),
        (r#"{"execute":"snapshot-create","arguments":{"name":"s","devices":[{"device":"a"},{"device":7}]}}"#, "'devices[1].device'"),
        (r#"{"execute":"snapshot-create","arguments":{"name":"s","devices":[{"devise":"a"}]}}"#, "devise"),
        (r#"{"execute":"snapshot-create","arguments":{"name":"s","devices":[],"deadline-ms":-1}}"#, "'deadline-ms'"),
        (r#"{"execute":"snapshot-create","arguments":{"name":"s","devices":[],"create":1}}"#, "'create'"),
        (r#"{"execute":"transaction","arguments":{"actions":[{"type":"abort","data":{}}]}}"#, "'abort'"),
        (r#"{"execute":"transaction","arguments":{"actions":[{"type":"blockdev-snapshot","data":{"node":1,"overlay":"x"}}]}}"#, "'node'"),
        (r#"{"execute":"transaction","arguments":{"actions":[{"type":"blockdev-snapshot","data":{"node":"n"}}]}}"#, "overlay"),
        (r#"{"execute":"blockdev-snapshot-sync","arguments":{"device":"a"}}"#, "snapshot-file"),
        (r#"{"execute":"blockdev-snapshot-sync","arguments":{"device":"a","snapshot-file":"f","mode":"new"}}"#, "'mode'"),
        (r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"n","file":{"driver":"http","filename":"f"}}}"#, "http"),
        (
            r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"n","file":"f0"}}"#,
            "argument 'file': invalid type: string \"f0\", expected an object with 'driver' and 'filename'",
        ),
        (r#"{"execute":"snapshot-create","arguments":{"name":"s","devices":["vda"]}}"#, "string \"vda\", expected an object"),
        (r#"{"execute":"transaction","arguments":{"actions":["x"]}}"#, "string \"x\", expected an object"),
        (
            r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"f"},"backing":{}}}"#,
            "'backing'",
        ),
    ];
    for (line, expected) in table {
        let answer = client.ask(line);
        assert_eq!(class(&answer), "GenericError", "{line}");
        assert!(desc(&answer).contains(expected), "{line}: {answer}");
        client.alive();
    }
    let answer = client.ask(r#"{"execute":"no-such-command","id":{"a":1}}"#);
    assert_eq!((class(&answer), &answer["id"]), ("CommandNotFound", &json!({ "a": 1 })));
    assert!(running.fake.executed.lock().unwrap().is_empty());
}

#[test]
fn requests_arrive_in_any_portions() {
    let running = start();
    let mut client = running.negotiated();
    for byte in br#"{"execute": "device-list", "id": 1}"# {
        client.send([*byte]);
    }
    assert_eq!(client.receive(), json!({ "return": { "did": "device-list" }, "id": 1 }));
    assert_eq!(
        client.ask("{'execute': \"query-jobs\", 'id': 'it\\'s \"one\"'}"),
        json!({ "return": { "did": "query-jobs" }, "id": "it's \"one\"" })
    );
    client.send("{\r\n  \"execute\":\r\n  \"snapshot-list\"\r\n}\r\n");
    assert_eq!(client.receive(), json!({ "return": { "did": "snapshot-list" } }));
    // More than the server reads ahead, answered one by one, while the client does not read.
    let mut writer = client.lines.get_ref().try_clone().unwrap();
    let sender = thread::spawn(move || {
        for id in 0..5000 {
            writer.write_all(format!("{{\"execute\":\"query-jobs\",\"id\":{id}}}").as_bytes()).unwrap();
        }
    });
    for id in 0..5000 {
        assert_eq!(client.receive(), json!({ "return": { "did": "query-jobs" }, "id": id }));
    }
    sender.join().unwrap();
}

#[test]
fn a_request_may_take_its_time_and_is_never_cut_up() {
    let running = start();
    let mut client = running.negotiated();
    client.send("{\"execute\": \"snapshot-list\",\n");
    // Longer than any clock that would cut it up; what comes then would be a request of its own.
    thread::sleep(Duration::from_millis(1500));
    client.send("\"id\":\n{\"execute\": \"device-list\"}\n}\n");
    assert_eq!(client.receive(), json!({ "return": { "did": "snapshot-list" }, "id": { "execute": "device-list" } }));
    client.alive();
    assert_eq!(running.fake.executed.lock().unwrap().len(), 1);
}

#[test]
fn a_request_that_never_ends_costs_its_connection_in_the_end() {
    let running = start_with(|options| options.patience = Duration::from_millis(200));
    let mut idle = running.negotiated();
    for beginning in ["{\"execute\":\n{\"execute\": \"device-list\"}\n", "{\"execute\"", "hello"] {
        let mut client = running.negotiated();
        client.send(beginning);
        assert!(desc(&client.receive()).contains("ends within an object"));
        client.closed();
    }
    // Not while a command keeps the rest from being read.
    let mut busy = running.negotiated();
    busy.send(r#"{"execute":"stack-show","arguments":{"device":"a"}}"#);
    let reply = running.held.recv().unwrap();
    let mut rest = format!("{{\"execute\": \"device-list\",{}", " ".repeat(200_000)).into_bytes();
    rest.extend(b"\"id\": 1}");
    busy.send(rest);
    thread::sleep(Duration::from_millis(400));
    reply.ok("late");
    assert_eq!(busy.receive(), json!({ "return": "late" }));
    assert_eq!(busy.receive(), json!({ "return": { "did": "device-list" }, "id": 1 }));
    idle.alive();
    assert_eq!(running.fake.executed.lock().unwrap().len(), 2);
}

#[test]
fn a_line_of_100_megabytes_is_one_error() {
    let running = start();
    let mut client = running.negotiated();
    let mut other = running.negotiated();
    let mut writer = client.lines.get_ref().try_clone().unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(b"{\"execute\":\"").unwrap();
        for _ in 0..100 {
            writer.write_all(&vec![b'x'; 1 << 20]).unwrap();
        }
        writer.write_all(b"\"}\n").unwrap();
    });
    let answer = client.receive();
    assert!(desc(&answer).contains("1 MiB"), "{answer}");
    other.alive();
    sender.join().unwrap();
    client.alive();
}

#[test]
fn a_slow_command_delays_its_own_connection_only() {
    let running = start();
    let mut slow = running.negotiated();
    slow.send(
        r#"{"execute":"stack-show","arguments":{"device":"a"},"id":1}{"execute":"query-version","id":2}{"execute":"device-list","id":3}"#,
    );
    let reply = running.held.recv().unwrap();
    let mut quick = running.negotiated();
    assert_eq!(quick.ask(r#"{"execute":"device-list"}"#), json!({ "return": { "did": "device-list" } }));
    quick.alive();
    let listed = running.fake.executed.lock().unwrap().iter().filter(|command| matches!(command, Command::DeviceList(_))).count();
    assert_eq!(listed, 1, "the slow connection's next command has not begun");
    reply.ok("late");
    assert_eq!(slow.receive(), json!({ "return": "late", "id": 1 }));
    assert_eq!(slow.receive()["id"], 2);
    assert_eq!(slow.receive()["id"], 3);
}

#[test]
fn every_command_is_answered() {
    let running = start();
    let mut client = running.negotiated();
    let answer = client.ask(r#"{"execute":"quit","id":1}"#);
    assert!(desc(&answer).contains("abandoned") && answer["id"] == 1, "{answer}");
    let answer = client.ask(r#"{"execute":"job-cancel","arguments":{"id":"vda"}}"#);
    assert_eq!(class(&answer), "DeviceNotFound");
    assert!(desc(&answer).contains("'vda'"), "{answer}");

    // A command that panics costs its own connection.
    let mut unlucky = running.negotiated();
    unlucky.send(r#"{"execute":"job-cancel","arguments":{"id":"panic"}}"#);
    unlucky.closed();
    client.alive();

    // A client that goes before the answer costs nothing.
    let mut hasty = running.negotiated();
    hasty.send(r#"{"execute":"stack-show","arguments":{"device":"a"}}"#);
    let reply = running.held.recv().unwrap();
    drop(hasty);
    client.alive();
    reply.done();
    client.alive();
}

#[test]
fn a_client_that_has_said_all_still_gets_its_answers() {
    let running = start();
    let mut client = running.connect();
    client.send("{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"stack-show\",\"arguments\":{\"device\":\"a\"}}\n{\"execute\":\"device-list\"}\n{\"exe");
    client.lines.get_ref().shutdown(Shutdown::Write).unwrap();
    assert!(client.receive().get("QMP").is_some());
    assert_eq!(client.receive(), json!({ "return": {} }));
    running.held.recv().unwrap().ok(5);
    assert_eq!(client.receive(), json!({ "return": 5 }));
    assert_eq!(client.receive(), json!({ "return": { "did": "device-list" } }));
    assert!(desc(&client.receive()).contains("ends within an object"));
    client.closed();

    // Gone at once: what it had sent is carried out.
    let mut client = running.negotiated();
    client.send("{\"execute\":\"stack-show\",\"arguments\":{\"device\":\"b\"}}");
    drop(client);
    drop(running.held.recv().unwrap());
}

#[test]
fn events_reach_all_who_have_negotiated() {
    let running = start();
    let mut silent = running.connect();
    assert!(silent.receive().get("QMP").is_some());
    let mut clients = [running.negotiated(), running.negotiated()];
    for device in ["one", "two", "\u{e4}"] {
        running.events.emit(Event::DeviceDisconnected(DeviceEvent { device: device.to_owned() }));
    }
    for client in &mut clients {
        for device in ["one", "two", "\u{e4}"] {
            let event = client.receive();
            assert_eq!((&event["event"], &event["data"]), (&json!("DEVICE_DISCONNECTED"), &json!({ "device": device })));
            assert!(event["timestamp"]["seconds"].as_i64().unwrap() > 0 && event["timestamp"]["microseconds"].is_u64(), "{event}");
        }
        client.alive();
    }
    assert_eq!(silent.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
}

#[test]
fn a_client_that_does_not_read_delays_nobody() {
    let running = start();
    let mut lazy = running.negotiated();
    let mut busy = running.negotiated();
    let device = "x".repeat(1000);
    let emitted = 4000;
    for number in 0..emitted {
        running.events.emit(Event::DeviceConnected(DeviceEvent { device: format!("{number} {device}") }));
        assert_eq!(busy.receive()["event"], "DEVICE_CONNECTED");
    }
    busy.alive();
    let (mut received, mut lost) = (0, 0);
    while received + lost < emitted {
        let event = lazy.receive();
        match event["event"].as_str().unwrap() {
            "DEVICE_CONNECTED" => received += 1,
            "EVENTS_LOST" => lost += event["data"]["count"].as_u64().unwrap(),
            other => panic!("{other}"),
        }
    }
    assert!(lost > 0 && received >= 1024, "{received} received, {lost} lost");
    lazy.alive();
}

#[test]
fn stopping_answers_what_is_under_way_and_closes() {
    let running = start();
    let mut idle = running.connect();
    assert!(idle.receive().get("QMP").is_some());
    let mut waiting = running.negotiated();
    waiting.send(r#"{"execute":"stack-show","arguments":{"device":"a"}}"#);
    let reply = running.held.recv().unwrap();
    let (path, server) = (running.path.clone(), running.server);
    let stopper = thread::spawn(move || server.stop());
    idle.closed();
    reply.ok("the last word");
    assert_eq!(waiting.receive(), json!({ "return": "the last word" }));
    waiting.closed();
    stopper.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn only_so_many_may_connect() {
    let running = start_with(|options| options.max_connections = 2);
    let first = running.negotiated();
    let mut second = running.negotiated();
    let mut third = running.connect();
    assert!(desc(&third.receive()).contains("2 control connections"));
    third.closed();
    second.alive();
    drop(first);
    // The place is free once the server has noticed; until then it refuses.
    loop {
        let mut next = running.connect();
        if next.receive().get("QMP").is_some() {
            break;
        }
    }
}

#[test]
fn the_socket_takes_only_a_place_that_is_free() {
    let running = start();
    assert_eq!(fs::metadata(&running.path).unwrap().permissions().mode() & 0o7777, 0o600);
    let again = |path: PathBuf| Server::start(ServerOptions::new(path), running.fake.clone(), Events::new());
    let error = again(running.path.clone()).unwrap_err();
    assert!(matches!(error, ServerError::InUse { .. }), "{error}");
    running.negotiated().alive();

    let folder = tempfile::tempdir().unwrap();
    let stale = folder.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let server = again(stale.clone()).unwrap();
    drop(UnixStream::connect(&stale).unwrap());

    // Somebody else's socket has taken the place meanwhile: it stays.
    fs::remove_file(&stale).unwrap();
    let _other = UnixListener::bind(&stale).unwrap();
    server.stop();
    assert!(stale.exists());

    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let error = again(file.clone()).unwrap_err();
    assert!(matches!(error, ServerError::NotASocket { .. }), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let error = again(folder.path().join("x".repeat(120))).unwrap_err();
    assert!(matches!(error, ServerError::TooLong { .. }), "{error}");
    let error = again(folder.path().join("no/such/folder.sock")).unwrap_err();
    assert!(matches!(error, ServerError::Listen { .. }), "{error}");
}

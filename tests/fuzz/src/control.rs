//! Bytes on the control socket of a daemon.
//!
//! The server, its parser and the manager are the real ones; the manager's disk is simulated. Nothing panics; every line that comes back is one of
//! QMP's; a command that is refused changes nothing; and a command is taken as what it says: a list is no object.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use snapfence::protocol::{Command, Failure, Request};
use snapfence_image_format::storage::simulated::Simulation;
use snapfenced::control::{Commands, Events, Reply, Server, ServerOptions};
use tempfile::TempDir;

use crate::support::World;

/// Most commands of a run that reach the manager.
const MAX_COMMANDS: usize = 16;

/// What the client's and the connection's thread tell the manager's.
enum Message {
    Command(Command, Reply),
    /// The connection has ended, and this is what came.
    Ended(Vec<u8>),
}

/// Hands commands to the manager's thread.
struct Forward(Mutex<Sender<Message>>);

impl Forward {
    fn send(&self, message: Message) {
        self.0.lock().expect("no panics").send(message).expect("the manager's thread waits");
    }
}

impl Commands for Forward {
    fn execute(&self, command: Command, reply: Reply) {
        self.send(Message::Command(command, reply));
    }
}

/// A control socket, and a client's thread that writes what it is given and reads all that comes.
struct Setting {
    inputs: Option<Sender<Vec<u8>>>,
    messages: Receiver<Message>,
    client: Option<JoinHandle<()>>,
    _server: Server,
    _folder: TempDir,
}

impl Setting {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control");
        let (sender, messages) = channel();
        let forward = Arc::new(Forward(Mutex::new(sender)));
        let server = Server::start(ServerOptions::new(path.clone()), forward.clone(), Events::new()).expect("a server");
        let (inputs, given) = channel::<Vec<u8>>();
        let talk = move || {
            for input in given {
                let mut stream = UnixStream::connect(&path).expect("a server that listens");
                // A server that has had enough does not read to the end.
                let _ = stream.write_all(&input);
                let _ = stream.shutdown(Shutdown::Write);
                let mut answers = Vec::new();
                let _ = stream.read_to_end(&mut answers);
                forward.send(Message::Ended(answers));
            }
        };
        let client = std::thread::spawn(talk);
        Self { inputs: Some(inputs), messages, client: Some(client), _server: server, _folder: folder }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        drop(self.inputs.take());
        // It has told of its panic.
        let _ = self.client.take().map(JoinHandle::join);
    }
}

thread_local! {
    static SETTING: Setting = Setting::new();
}

/// One run.
///
/// # Panics
/// If a promise is broken.
pub fn run(input: &[u8]) {
    // A few inputs are for what comes before the negotiation.
    let bytes = match input.split_first() {
        Some((b'!', rest)) => rest.to_vec(),
        _ => [br#"{"execute":"qmp_capabilities"}"#, input].concat(),
    };
    for line in input.split(|byte| *byte == b'\n') {
        assert_taken_as_said(line);
    }
    SETTING.with(|setting| {
        setting.inputs.as_ref().expect("until it is dropped").send(bytes).expect("a client");
        let mut daemon = None;
        let mut count = 0;
        loop {
            match setting.messages.recv().expect("a client") {
                Message::Ended(answers) => return assert_answers(&answers),
                Message::Command(command, reply) if count < MAX_COMMANDS => {
                    count += 1;
                    daemon.get_or_insert_with(Daemon::new).carry_out(command, reply);
                }
                Message::Command(_, reply) => reply.fail(Failure::generic("enough")),
            }
        }
    });
}

/// A manager with two devices.
struct Daemon {
    simulation: Simulation,
    world: World,
}

impl Daemon {
    fn new() -> Self {
        let mut simulation = Simulation::new(1);
        let environment = simulation.environment().clone();
        let world = simulation.block_on(async move {
            let world = World::new(&environment);
            world.serve_new("vda").await;
            world.serve_new("vdb").await;
            world
        });
        Self { simulation, world }
    }

    /// Whatever a client can see of the daemon and its files, but for the list of jobs, which holds those that have failed.
    fn state(&mut self) -> Value {
        let world = self.world.clone();
        self.simulation.block_on(async move {
            let devices = world.done("device-list", json!({})).await;
            let snapshots = world.done("snapshot-list", json!({})).await;
            let mut stacks = Vec::new();
            for device in devices.as_array().expect("a list") {
                stacks.push(world.done("stack-show", json!({ "device": device["name"] })).await);
            }
            json!([devices, snapshots, stacks, world.files()])
        })
    }

    fn carry_out(&mut self, command: Command, reply: Reply) {
        self.simulation.run_until_stalled();
        let before = self.state();
        let name = command.name();
        let (given, answer) = Reply::channel();
        let world = self.world.clone();
        self.simulation.block_on(async move { world.manager.execute(command, given) });
        self.simulation.run_until_stalled();
        let result = answer.try_recv().unwrap_or_else(|_| panic!("{name} is not answered"));
        if let Err(failure) = &result {
            let after = self.state();
            assert!(before == after, "{name} was refused ({failure}), and has changed {before} to {after}");
        }
        match result {
            Ok(value) => reply.ok(value),
            Err(failure) => reply.fail(failure),
        }
    }
}

/// If the line is a command, that it is taken for what it says.
fn assert_taken_as_said(line: &[u8]) {
    let Ok(request) = Request::parse(line) else { return };
    let given = Value::Object(request.arguments.clone());
    if let Ok(command) = Command::parse(&request.execute, request.arguments) {
        let taken = arguments(&command);
        assert!(is_same_shape(&given, &taken), "{given} was taken for {taken}");
    }
}

/// Whether each object is an object and each list a list of as many things. Members at their defaults may have gone.
fn is_same_shape(given: &Value, taken: &Value) -> bool {
    match (given, taken) {
        (Value::Object(given), Value::Object(taken)) => {
            given.iter().all(|(key, value)| taken.get(key).is_none_or(|taken| is_same_shape(value, taken)))
        }
        (Value::Array(given), Value::Array(taken)) => {
            given.len() == taken.len() && given.iter().zip(taken).all(|(given, taken)| is_same_shape(given, taken))
        }
        (Value::Object(_) | Value::Array(_), _) | (_, Value::Object(_) | Value::Array(_)) => false,
        _ => true,
    }
}

fn arguments(command: &Command) -> Value {
    macro_rules! each {
        ($($kind:ident),+) => {
            match command {
                $(Command::$kind(arguments) => serde_json::to_value(arguments),)+
            }
        };
    }
    let value = each!(
        DeviceList,
        DeviceAdd,
        DeviceRemove,
        DeviceResume,
        SnapshotCreate,
        SnapshotList,
        SnapshotShow,
        StackShow,
        QueryJobs,
        JobCancel,
        QueryNamedBlockNodes,
        Transaction,
        BlockdevSnapshot,
        BlockdevSnapshotSync,
        BlockdevAdd,
        BlockdevDel,
        Quit
    );
    value.expect("arguments can be written as JSON")
}

/// Every line is a greeting, a return or an error of QMP's, the greeting first and once.
fn assert_answers(bytes: &[u8]) {
    let text = std::str::from_utf8(bytes).expect("ASCII");
    assert!(text.is_ascii() && (text.is_empty() || text.ends_with("\r\n")), "{text:?}");
    for (number, line) in text.lines().enumerate() {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let object = value.as_object().unwrap_or_else(|| panic!("{line}"));
        let keys: Vec<&str> = object.keys().map(String::as_str).filter(|key| *key != "id").collect();
        match keys[..] {
            ["QMP"] => assert_eq!(number, 0, "{line}"),
            ["return"] => assert_ne!(number, 0, "{line}"),
            ["error"] => {
                assert_ne!(number, 0, "{line}");
                let error = object["error"].as_object().unwrap_or_else(|| panic!("{line}"));
                assert!(error.len() == 2 && error["class"].is_string() && error["desc"].is_string(), "{line}");
            }
            _ => panic!("not QMP's: {line}"),
        }
    }
}

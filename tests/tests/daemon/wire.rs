//! The control socket of the real daemon: whatever comes in a wrong shape changes nothing, and strangers are kept out.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::support::{PATIENCE, Place};

/// Sends lines as they are.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn connect(control: &Path) -> Result<Self> {
        let stream = UnixStream::connect(control)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self(BufReader::new(stream));
        ensure!(client.receive()?.get("QMP").is_some(), "no greeting");
        ensure!(client.ask(r#"{"execute":"qmp_capabilities"}"#)?["return"].is_object(), "no negotiation");
        Ok(client)
    }

    /// The answer to a line; events are passed over.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Value> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let answer = self.receive()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the connection was closed");
        serde_json::from_str(&line).with_context(|| line.clone())
    }
}

#[test]
fn what_does_not_fit_changes_nothing() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let devices = [place.device("vda", "a.qcow2"), place.device("vdb", "b.qcow2")];
    let daemon = place.serve(&devices)?;
    daemon.json(&["snapshot", "create", "s1", "--device", "vda"])?;
    let state = |client: &mut Client| -> Result<(Vec<String>, Vec<Value>)> {
        let questions = ["device-list", "snapshot-list", "query-named-block-nodes", "query-jobs"];
        let answers = questions.map(|question| client.ask(&format!(r#"{{"execute":"{question}"}}"#)));
        Ok((place.files()?, answers.into_iter().collect::<Result<_>>()?))
    };
    let mut client = Client::connect(&daemon.control)?;
    let before = state(&mut client)?;
    let command = |name: &str, arguments: &str| format!(r#"{{"execute":"{name}","arguments":{arguments},"id":"x"}}"#);
    let table = [
        ("GenericError", r#"{"execute":}"#.to_owned()),
        ("GenericError", "[1,2]".to_owned()),
        ("GenericError", r#""device-list""#.to_owned()),
        ("GenericError", r#"{"execute":"device-list","execute":"quit"}"#.to_owned()),
        ("GenericError", r#"{"execute":"device-list","colour":"red"}"#.to_owned()),
        ("GenericError", r#"{"execute":7}"#.to_owned()),
        ("GenericError", r#"{"arguments":{}}"#.to_owned()),
        ("GenericError", r#"{"execute":"device-list","arguments":[]}"#.to_owned()),
        ("CommandNotFound", command("device-destroy", "{}")),
        ("CommandNotFound", command("Device-List", "{}")),
        ("CommandNotFound", command("qmp_capabilities", "{}")),
        ("GenericError", command("device-list", r#"{"verbose":true}"#)),
        ("GenericError", command("quit", r#"{"now":true}"#)),
        ("GenericError", command("device-remove", "{}")),
        ("GenericError", command("device-remove", r#"{"name":"vdb","force":"yes"}"#)),
        ("DeviceNotFound", command("device-remove", r#"{"name":"vdz"}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda"}],"creat":true}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda","overlay":7}]}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":"vda"}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[]}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda"}],"deadline-ms":-1}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda"}],"deadline-ms":0}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda"},{"device":"vda"}]}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"../s2","devices":[{"device":"vda"}]}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s1","devices":[{"device":"vda"}]}"#)),
        ("DeviceNotFound", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda"},{"device":"vdz"}]}"#)),
        ("GenericError", command("snapshot-create", r#"{"name":"s2","devices":[{"device":"vda","overlay":"/etc/x"}],"create":true}"#)),
        ("GenericError", command("device-add", r#"{"name":"vdc","image":"c.raw","socket":"c.sock"}"#)),
        ("GenericError", command("device-add", r#"{"name":"vdc","image":"c.raw","format":"qed","socket":"c.sock"}"#)),
        ("GenericError", command("device-add", r#"{"name":"vdc","image":"c.raw","format":"raw","socket":"c.sock","queues":1.5}"#)),
        ("GenericError", command("device-add", r#"{"name":"vdc","image":"c.raw","format":"raw","socket":"c.sock","queues":70000}"#)),
        ("GenericError", command("device-add", r#"{"name":"vdc","image":"none.raw","format":"raw","socket":"c.sock"}"#)),
        ("GenericError", command("job-cancel", r#"{"id":"none"}"#)),
        ("GenericError", command("snapshot-show", r#"{"name":"none"}"#)),
        ("DeviceNotFound", command("stack-show", r#"{"device":"none"}"#)),
    ];
    for (class, line) in table {
        let answer = client.ask(&line)?;
        ensure!(answer["error"]["class"] == class && answer["error"]["desc"].is_string(), "{line}: {answer}");
        ensure!(!line.contains(r#""id""#) || answer["id"] == "x", "{line}: {answer}");
        let mut after = state(&mut client)?;
        // A snapshot that was begun and refused has left its job.
        after.1[3] = before.1[3].clone();
        ensure!(after == before, "{line} has changed something: {after:#?}");
    }
    daemon.process.stop()
}

/// Connects to the path that it is given, tries to end the daemon, and prints all it is told. One who is refused may be closed out
/// before the commands are sent; the refusal is there to read even so.
const STRANGER: &str = r#"
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.settimeout(30)
try:
    s.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n')
except BrokenPipeError:
    pass
data = b''
while True:
    try:
        part = s.recv(4096)
    except ConnectionError:
        break
    if not part:
        break
    data += part
print(data.decode())
"#;

#[test]
fn strangers_are_kept_out() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        snapfence_tests::skipped("only root can be somebody else");
        return Ok(());
    }
    let mut place = Place::with_disks(&["a"])?;
    let devices = [place.device("vda", "a.qcow2")];
    let daemon = place.serve(&devices)?;
    let mode = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    ensure!(std::fs::metadata(&daemon.control)?.permissions().mode() & 0o777 == 0o600, "only the owner may connect");
    mode(&place.path(""), 0o755)?;
    let nobody = |script: &str| -> Result<String> {
        let output =
            Command::new("/usr/bin/python3").args(["-c", script]).arg(&daemon.control).uid(65534).gid(65534).current_dir("/").output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let said = nobody(STRANGER)?;
    ensure!(said.contains("PermissionError"), "the file keeps strangers away: {said}");
    // Even where the file lets everybody in, as through a wrong umask or a helpful administrator.
    mode(&daemon.control, 0o666)?;
    let said = nobody(STRANGER)?;
    ensure!(said.contains("\"error\"") && !said.contains("\"QMP\"") && !said.contains("\"return\""), "{said}");
    ensure!(daemon.snapfence(&["device", "list"])?.status == 0, "the daemon goes on");
    ensure!(daemon.process.output().contains("65534"), "the log names the stranger: {}", daemon.process.output());
    daemon.process.stop()
}

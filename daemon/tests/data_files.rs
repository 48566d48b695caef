//! qcow2 images that keep their data in a file beside them, as QEMU makes them: they are served for reading, if the operator allows the data file by
//! its name, on the command line or in the configuration file; otherwise neither the operator nor the control socket gets at them.

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::daemon::Daemon;
use common::machine::{Data, IN, Machine, OUT};
use serde_json::json;
use snapfence::client::ClientError;

const DISK_BYTES: usize = 1 << 20;

struct Images {
    directory: tempfile::TempDir,
    image: PathBuf,
    data: PathBuf,
}

/// An image with `0x5a` in its second 64 KiB, the rest empty.
fn images() -> Images {
    let directory = tempfile::tempdir().expect("a directory");
    let (image, data) = (directory.path().join("vda.qcow2"), directory.path().join("vda.data"));
    let data_file = format!("data_file={}", data.display());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data_file, &image.display().to_string(), &DISK_BYTES.to_string()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 64k 64k", &image.display().to_string()]);
    Images { directory, image, data }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("QEMU's tools");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Images {
    fn device(&self, more: &str) -> String {
        let directory = self.directory.path().display();
        format!("name=vda,image={},format=qcow2,socket={directory}/vda.sock{more}", self.image.display())
    }

    /// How a daemon with this device ends that does not start.
    fn refusal(&self, device: &str, more: &[&OsStr]) -> String {
        let path = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapfenced"));
        command.arg("--control").arg(path("control")).arg("--state-dir").arg(path("state")).arg("--device").arg(device).args(more);
        let output = command.output().expect("a daemon");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What a guest reads, and that it cannot write.
    fn check_served(&self) {
        let mut machine = Machine::new(1);
        let link = machine.connect(&self.directory.path().join("vda.sock"));
        let queue = &mut machine.queues[0];
        for (piece, expected) in [(0, 0), (1, 0x5a), (2, 0)] {
            assert_eq!(queue.request(IN, piece * 128, Data::In(64 << 10)).status, 0);
            assert!(queue.data(0, 64 << 10).iter().all(|byte| *byte == expected), "64 KiB at {piece} are not {expected:#x}");
        }
        assert_ne!(queue.request(OUT, 0, Data::Out(&[1; 512])).status, 0);
        drop(link);
    }
}

#[test]
fn an_image_with_a_data_file_is_refused_unless_that_is_allowed() {
    let images = images();
    let before = std::fs::read(&images.data).expect("a file");
    let names = |error: &str, what: &str| {
        assert!(error.contains(&images.image.display().to_string()) && error.contains(what), "{what}: {error}");
    };
    names(&images.refusal(&images.device(",readonly=on"), &[]), "must be allowed by name");
    // Another file of the same directory is not that one.
    let other = images.directory.path().join("other");
    std::fs::write(&other, [0; 512]).expect("a file");
    let allow = |path: &Path| [OsStr::new("--allow-data-file").to_owned(), path.as_os_str().to_owned()];
    let refusal = images.refusal(&images.device(",readonly=on"), &allow(&other).each_ref().map(|argument| argument.as_os_str()));
    names(&refusal, "must be allowed by name");
    // Such images are never written to.
    let refusal = images.refusal(&images.device(""), &allow(&images.data).each_ref().map(|argument| argument.as_os_str()));
    names(&refusal, "read");

    let daemon = Daemon::start(images.directory.path(), &[]);
    let socket = images.directory.path().join("vda.sock");
    let device = json!({ "name": "vda", "image": images.image, "format": "qcow2", "socket": socket, "readonly": true });
    let Err(ClientError::Failed(failure)) = daemon.client().execute("device-add", device) else { panic!("it was added") };
    names(&failure.desc, "must be allowed by name");
    daemon.stop();
    assert!(std::fs::read(&images.data).expect("a file") == before);
}

#[test]
fn an_allowed_data_file_is_read() {
    let images = images();
    let before = std::fs::read(&images.data).expect("a file");
    let daemon = Daemon::start_with(
        images.directory.path(),
        &[images.device(",readonly=on")],
        &["--allow-data-file".as_ref(), images.data.as_ref()],
    );
    images.check_served();
    daemon.stop();

    let config = images.directory.path().join("daemon.toml");
    std::fs::write(&config, format!("allow-data-file = ['{}']\n", images.data.display())).expect("a file");
    let daemon = Daemon::start_with(images.directory.path(), &[images.device(",readonly=on")], &["--config".as_ref(), config.as_ref()]);
    images.check_served();
    daemon.stop();
    assert!(std::fs::read(&images.data).expect("a file") == before);
}

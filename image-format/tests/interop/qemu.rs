//! QEMU's programs.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use rustix::fs::{StatVfs, statvfs};
use snapfence_image_format::chain::Format;

use crate::operation::{Fill, Operation};

/// Bytes that must be free for a folder in memory.
const ROOM: u64 = 2 << 30;
/// How often to try what a lock may be in the way of. While another thread starts a program, that one shares the locks of all our open files
/// for a moment, even of those that we close meanwhile.
pub(crate) const LOCK_TRIES: usize = 500;
/// How long to wait in between.
pub(crate) const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A folder with the files of one case.
#[derive(Debug)]
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    /// A new one, for most cases in memory: every image costs several flushes, and nothing here depends on them.
    pub(crate) fn new(in_memory: bool) -> Self {
        let shared = Path::new("/dev/shm");
        let has_room = |space: StatVfs| space.f_bavail.saturating_mul(space.f_frsize) >= ROOM;
        let folder = if in_memory && statvfs(shared).is_ok_and(has_room) { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
        Self(folder.expect("a temporary folder"))
    }

    /// The absolute path, without symbolic links, of a file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.0.path().canonicalize().expect("the folder is there")
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        for _ in 0..LOCK_TRIES {
            let output = Command::new(program).args(arguments).current_dir(self.0.path()).output();
            let output =
                output.unwrap_or_else(|error| panic!("cannot run {program}: {error}; tests/setup/install.sh installs what the tests need"));
            if !text(&output).contains("Is another process using the image") {
                return output;
            }
            thread::sleep(LOCK_PAUSE);
        }
        panic!("{program} {arguments:?}: the image stays locked")
    }

    /// Runs `qemu-img` with arguments that hold no blanks.
    pub(crate) fn qemu_img(&self, line: &str) {
        let output = self.run("qemu-img", &line.split_whitespace().collect::<Vec<_>>());
        assert!(output.status.success(), "qemu-img {line}: {}", text(&output));
    }

    /// Has `qemu-io` do operations. Returns those that it did: a compressed write, for example, fails where something is allocated.
    pub(crate) fn qemu_io(&self, name: &str, format: Format, operations: &[Operation]) -> Vec<Operation> {
        let commands: Vec<String> = operations.iter().map(command).collect();
        let mut arguments = vec!["-d", "unmap", "-f", format.name()];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(name);
        let output = self.run("qemu-io", &arguments);
        let all = text(&output);
        // One line for each, in order.
        let outcomes = ["wrote ", "discard ", "write failed", "discard failed"];
        let mut lines = all.lines().filter(|line| outcomes.iter().any(|outcome| line.starts_with(outcome)));
        let mut done = Vec::new();
        for operation in operations.iter().filter(|operation| **operation != Operation::Flush) {
            let range = operation.range();
            let len = range.end - range.start;
            let verb = if matches!(operation, Operation::Discard { .. }) { "discard" } else { "wrote" };
            match lines.next() {
                Some(line) if line == format!("{verb} {len}/{len} bytes at offset {}", range.start) => done.push(*operation),
                Some("write failed: Input/output error") if matches!(operation, Operation::Compress { .. }) => {}
                other => panic!("{name}: {operation:?} of {commands:?}: {other:?}: {all}"),
            }
        }
        assert_eq!(lines.next(), None, "{name}: {commands:?}: {all}");
        done
    }

    /// Has `qemu-io` do operations, flush, and be killed. All of them must succeed; what it would print is lost.
    pub(crate) fn killed_qemu_io(&self, name: &str, operations: &[Operation]) {
        let commands: Vec<String> = operations.iter().map(command).chain(["flush".to_owned(), "sigraise 9".to_owned()]).collect();
        let mut arguments = vec!["-d", "unmap", "-f", "qcow2"];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(name);
        let output = self.run("qemu-io", &arguments);
        assert_eq!(output.status.signal(), Some(9), "{name}: {commands:?}: {}", text(&output));
    }

    /// Both images read the same.
    pub(crate) fn compare(&self, one: (&str, Format), other: (&str, Format)) {
        self.qemu_img(&format!("compare -f {} -F {} {} {}", one.1, other.1, one.0, other.0));
    }

    pub(crate) fn check(&self, name: &str) {
        self.qemu_img(&format!("check -f qcow2 {name}"));
    }
}

fn command(operation: &Operation) -> String {
    match *operation {
        Operation::Write { at, len, fill: Fill::Byte(byte) } => format!("write -P {byte} {at} {len}"),
        Operation::Write { fill: Fill::Seed(_), .. } => panic!("qemu-io writes equal bytes only"),
        Operation::Zero { at, len, unmap: true } => format!("write -z -u {at} {len}"),
        Operation::Zero { at, len, unmap: false } => format!("write -z {at} {len}"),
        Operation::Discard { at, len } => format!("discard {at} {len}"),
        Operation::Compress { at, len, byte } => format!("write -c -P {byte} {at} {len}"),
        Operation::Flush => "flush".to_owned(),
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The last part of a path as text.
pub(crate) fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).expect("a plain name")
}

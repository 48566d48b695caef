//! A folder for one test, and the programs of QEMU that judge what is in it.

use std::path::PathBuf;
use std::process::Command;

/// A folder for one test, removed at its end.
#[derive(Debug)]
pub(crate) struct Scratch(tempfile::TempDir);

/// What `qemu-img check` says of an image that it can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Sound,
    /// Clusters are counted that nothing uses; nothing worse.
    Leaks,
    Corrupt,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(program).args(arguments).current_dir(self.0.path()).output().expect("QEMU's tools are installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text)
    }

    /// Runs `qemu-img` in the folder and expects success.
    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        let (status, text) = self.run("qemu-img", arguments);
        assert_eq!(status, Some(0), "qemu-img {arguments:?}: {text}");
        text
    }

    /// Runs commands of `qemu-io` on a file in the folder and expects success of each.
    pub(crate) fn qemu_io(&self, file: &str, format: &str, commands: &[&str]) {
        let arguments: Vec<&str> = ["-f", format].into_iter().chain(commands.iter().flat_map(|line| ["-c", line])).chain([file]).collect();
        let (status, text) = self.run("qemu-io", &arguments);
        let failed = ["failed", "error", "mismatch"].iter().any(|word| text.contains(word));
        assert!(status == Some(0) && !failed, "qemu-io {arguments:?}: {text}");
    }

    /// Runs commands of `qemu-io` on an image and ends it without closing the image.
    pub(crate) fn abandon(&self, image: &str, commands: &[&str]) {
        let lines = commands.iter().chain(&["abort"]).flat_map(|line| ["-c", line]);
        let arguments: Vec<&str> = ["-f", "qcow2", "-d", "unmap"].into_iter().chain(lines).chain([image]).collect();
        let (status, text) = self.run("qemu-io", &arguments);
        assert!(status.is_none(), "qemu-io {arguments:?} should have been killed by its own signal: {text}");
    }

    /// What `qemu-img check` finds, and what it says about it.
    pub(crate) fn check(&self, image: &str) -> (Verdict, String) {
        let (status, text) = self.run("qemu-img", &["check", "-f", "qcow2", image]);
        let verdict = match status {
            Some(0) => Verdict::Sound,
            Some(3) => Verdict::Leaks,
            Some(2) => Verdict::Corrupt,
            _ => panic!("{image} cannot be checked: {text}"),
        };
        (verdict, text)
    }

    /// Expects that the image is as it should be after an orderly end.
    pub(crate) fn expect_sound(&self, image: &str, context: &str) {
        let (verdict, text) = self.check(image);
        assert_eq!(verdict, Verdict::Sound, "{context}: {text}");
    }

    /// Expects that a guest would see these bytes.
    pub(crate) fn expect_content(&self, image: &str, bytes: &[u8], context: &str) {
        std::fs::write(self.path("expected.raw"), bytes).expect("the folder is writable");
        let (status, text) = self.run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, "expected.raw"]);
        assert_eq!(status, Some(0), "{context}: {text}");
    }

    /// What a guest would see.
    pub(crate) fn content(&self, image: &str, options: &[&str]) -> Vec<u8> {
        let arguments = [&["convert", "-f", "qcow2", "-O", "raw"], options, &[image, "content.raw"]].concat();
        self.qemu_img(&arguments);
        std::fs::read(self.path("content.raw")).expect("qemu-img has written it")
    }
}

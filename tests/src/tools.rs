//! QEMU's image tools and the file system tools, with errors that name the command.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::backend::program;

/// Runs a program to its end and returns its standard output.
///
/// # Errors
///
/// If it cannot be started or its status is not 0; the error holds the whole command line and what it printed.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<String> {
    let (output, line) = run_any(program, arguments)?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("`{line}` failed ({}): {}", output.status, String::from_utf8_lossy(&said).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program to its end whatever its status, and returns its output and the command line as text.
///
/// # Errors
///
/// If it cannot be started.
pub fn run_any<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<(Output, String)> {
    let arguments: Vec<OsString> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
    let line = arguments.iter().fold(program.to_owned(), |line, argument| format!("{line} {}", argument.to_string_lossy()));
    let output =
        Command::new(program).args(&arguments).output().with_context(|| format!("cannot run `{line}`; is {program} installed?"))?;
    Ok((output, line))
}

/// Runs `qemu-img`.
///
/// # Errors
///
/// As [`run`].
pub fn qemu_img<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    run("qemu-img", arguments)
}

/// Runs `qemu-io`.
///
/// # Errors
///
/// As [`run`].
pub fn qemu_io<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    run("qemu-io", arguments)
}

/// Makes an image without backing file.
///
/// # Errors
///
/// If qemu-img fails.
pub fn create_image(path: &Path, format: &str, bytes: u64) -> Result<()> {
    qemu_img([OsStr::new("create"), "-q".as_ref(), "-f".as_ref(), format.as_ref(), path.as_ref(), bytes.to_string().as_ref()])?;
    Ok(())
}

/// Makes a qcow2 overlay on `backing`. The overlay names it without its folder if both lie in the same one.
///
/// # Errors
///
/// If qemu-img fails.
pub fn create_overlay(path: &Path, backing: &Path, backing_format: &str) -> Result<()> {
    let named = if path.parent() == backing.parent() { Path::new(backing.file_name().context("an image has a name")?) } else { backing };
    let options = ["create", "-q", "-f", "qcow2", "-F", backing_format, "-b"].map(OsStr::new);
    qemu_img(options.into_iter().chain([named.as_os_str(), path.as_os_str()]))?;
    Ok(())
}

/// Copies a range of what a guest would see of an image, which may be in use, into a raw file.
///
/// # Errors
///
/// If qemu-img fails.
pub fn extract_range(image: &Path, format: &str, offset: u64, bytes: u64, to: &Path) -> Result<()> {
    let options = serde_json::json!({
        "driver": "raw", "offset": offset, "size": bytes,
        "file": { "driver": format, "file": { "driver": "file", "filename": image.to_str().context("the path is not UTF-8")? } },
    });
    let source = format!("json:{options}");
    qemu_img([OsStr::new("convert"), "-U".as_ref(), "-O".as_ref(), "raw".as_ref(), source.as_ref(), to.as_ref()])?;
    Ok(())
}

/// Reads a range of what a guest would see of an image, which may be in use.
///
/// # Errors
///
/// If qemu-img fails.
pub fn read_range(image: &Path, format: &str, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let to = tempfile::NamedTempFile::new()?;
    extract_range(image, format, offset, bytes, to.path())?;
    Ok(std::fs::read(to.path())?)
}

/// What a check of an image counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Wrong metadata.
    pub corruptions: u64,
    /// Clusters allocated but not used.
    pub leaks: u64,
}

/// Checks a qcow2 image that nobody writes, with QEMU's program and with ours, which must come to the same verdict.
///
/// # Errors
///
/// If one of them cannot check it at all, or they contradict each other. What they find is no error here.
pub fn check(image: &Path) -> Result<Check> {
    let theirs = checked_by("qemu-img", &["check", "-f", "qcow2", "--output=json"], image)?;
    let ours = program("snapfence")?;
    let ours = checked_by(ours.to_str().context("the path is not UTF-8")?, &["image", "check", "--format", "qcow2", "--json"], image)?;
    if ours != theirs {
        bail!("{}: qemu-img found {theirs:?}, snapfence {ours:?}", image.display());
    }
    Ok(theirs)
}

fn checked_by(program: &str, arguments: &[&str], image: &Path) -> Result<Check> {
    let (output, line) = run_any(program, arguments.iter().map(OsStr::new).chain([image.as_os_str()]))?;
    let found: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("`{line}` gives no result: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
    if found["check-errors"] != 0 {
        bail!("`{line}` met errors: {found}");
    }
    let count = |name: &str| found[name].as_u64().unwrap_or(0);
    Ok(Check { corruptions: count("corruptions"), leaks: count("leaks") })
}

/// Checks all qcow2 images of a folder after a clean stop, when nothing at all may be wrong with them. Says how many there are.
///
/// # Errors
///
/// If one of them has corruptions or leaks, or cannot be checked.
pub fn check_all(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let mut magic = [0; 4];
        let is_qcow2 = path.is_file() && File::open(&path)?.read_exact(&mut magic).is_ok() && magic == *b"QFI\xfb";
        if is_qcow2 {
            let found = check(&path)?;
            if found != Check::default() {
                bail!("{}: {found:?}", path.display());
            }
            count += 1;
        }
    }
    Ok(count)
}

/// One layer of a backing chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// Size that a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// Bytes it takes on the host's disk.
    pub allocated_bytes: u64,
}

/// The layers of an image, which may be in use, from the top down.
///
/// # Errors
///
/// If qemu-img fails.
pub fn layers(image: &Path, format: &str) -> Result<Vec<Layer>> {
    let options = ["info", "-U", "--backing-chain", "--output=json", "-f", format].map(OsStr::new);
    let text = qemu_img(options.into_iter().chain([image.as_os_str()]))?;
    let infos: Vec<Value> = serde_json::from_str(&text)?;
    infos
        .iter()
        .map(|info| {
            Ok(Layer {
                path: info["filename"].as_str().context("qemu-img info names no file")?.into(),
                format: info["format"].as_str().context("qemu-img info names no format")?.to_owned(),
                virtual_bytes: info["virtual-size"].as_u64().context("qemu-img info gives no size")?,
                allocated_bytes: info["actual-size"].as_u64().unwrap_or(0),
            })
        })
        .collect()
}

/// Replays the journal of the ext4 file system at the start of the raw file `image`, and then checks it without changing anything.
///
/// The file is changed by the replay: give it a copy. A file system cut while it was mounted needs the replay, as after a power cut, and may have
/// files to finish deleting; after that, nothing may be left to repair.
///
/// # Errors
///
/// If the check finds anything at all; the error holds what e2fsck said.
pub fn check_ext4(image: &Path) -> Result<()> {
    // Preening replays and deletes, and refuses to repair anything that is wrong.
    let (replay, line) = run_any("e2fsck", [OsStr::new("-p"), image.as_ref()])?;
    // 1: it has changed something.
    if !matches!(replay.status.code(), Some(0 | 1)) {
        let said = [replay.stdout, replay.stderr].concat();
        bail!("`{line}` failed ({}): {}", replay.status, String::from_utf8_lossy(&said).trim());
    }
    run("e2fsck", [OsStr::new("-f"), "-n".as_ref(), image.as_ref()])?;
    Ok(())
}

/// Copies a file out of the ext4 file system in the raw file `image`.
///
/// # Errors
///
/// If there is no such file.
pub fn read_from_ext4(image: &Path, path: &str) -> Result<Vec<u8>> {
    let (output, line) = run_any("debugfs", [OsStr::new("-R"), format!("cat {path}").as_ref(), image.as_ref()])?;
    // Its status is 0 whatever happens. Its version is the one thing it always says.
    let errors = String::from_utf8_lossy(&output.stderr);
    if let Some(error) = errors.lines().find(|line| !line.starts_with("debugfs ")) {
        bail!("`{line}`: {error}");
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn failing_command_names_itself() {
        let error = run("sh", ["-c", "echo wrong >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("wrong") && error.contains('3'), "{error}");
    }

    #[test]
    fn range_of_a_chain_is_what_the_guest_would_see() {
        let folder = tempfile::tempdir().unwrap();
        let (base, top) = (folder.path().join("base,with=signs.raw"), folder.path().join("top.qcow2"));
        let mut bytes = vec![0x11; 1 << 20];
        std::fs::write(&base, &bytes).unwrap();
        create_overlay(&top, &base, "raw").unwrap();
        qemu_io(["-f", "qcow2", "-c", "write -P 0x22 512k 4k", top.to_str().unwrap()]).unwrap();
        bytes[512 << 10..516 << 10].fill(0x22);

        assert_eq!(read_range(&top, "qcow2", 508 << 10, 12 << 10).unwrap(), bytes[508 << 10..520 << 10]);
        assert_eq!(check_all(folder.path()).unwrap(), 1);
        // The count of the second cluster of tables, found by both programs.
        let file = std::fs::OpenOptions::new().write(true).open(&top).unwrap();
        file.write_all_at(&[0, 9], (2 << 16) + 2).unwrap();
        assert_eq!(check(&top).unwrap(), Check { corruptions: 0, leaks: 1 });
        assert!(check_all(folder.path()).unwrap_err().to_string().contains("top.qcow2"));
        let layers = layers(&top, "qcow2").unwrap();
        assert_eq!(layers.iter().map(|layer| layer.format.as_str()).collect::<Vec<_>>(), ["qcow2", "raw"]);
        assert_eq!(layers[1].path, base);
    }
}

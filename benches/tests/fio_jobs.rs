//! fio takes every job file in `benches/fio` as it is.
//!
//! A fio without the engine libblkio cannot look at options of that engine. They are few, so there they are compared with the list below, and fio is
//! given the rest with an engine that it has.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The engine's options that the job files use, with their values.
const ENGINE: [&str; 3] = ["ioengine=libblkio", "libblkio_driver=virtio-blk-vhost-user", "libblkio_path=${SOCKET}"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fio").join(name)
}

/// The job files of a folder by name.
fn jobs(folder: &Path) -> Result<BTreeSet<String>> {
    let names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    Ok(names.collect::<Result<BTreeSet<_>>>()?.into_iter().filter(|name| name.ends_with(".fio")).collect())
}

/// Has fio parse a job file, and returns what it makes of it: its command line.
///
/// fio ends with 0 even where it refuses a part of a file; but then it says something.
fn parsed(job: &Path) -> Result<String> {
    let output = Command::new("fio").args(["--parse-only", "--showcmd"]).arg(job).env("SOCKET", "/nowhere.sock").output();
    let output = output.context("fio is missing; tests/setup/install.sh installs it")?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaints.is_empty(), "fio does not take {}: {complaints}", job.display());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn sections(command: &str) -> Vec<&str> {
    command.split_whitespace().filter_map(|word| word.strip_prefix("--name=")).collect()
}

#[test]
fn both_forms_have_the_same_jobs() -> Result<()> {
    let [ours, guest] = [jobs(&folder("libblkio"))?, jobs(&folder("guest"))?];
    ensure!(ours == guest && ours.len() == 11, "{ours:?} and {guest:?}");
    let text = std::fs::read_to_string(folder("README.md"))?;
    for name in &ours {
        let name = name.trim_end_matches(".fio");
        ensure!(text.contains(&format!("`{name}`")), "benches/fio/README.md does not mention {name}");
    }
    Ok(())
}

#[test]
fn fio_takes_the_jobs_for_a_guest() -> Result<()> {
    for name in jobs(&folder("guest"))? {
        let command = parsed(&folder("guest").join(&name))?;
        ensure!(sections(&command) == ["vda", "vdb", "vdc"], "{name}: {command}");
        ensure!(command.contains("--direct=1") && command.contains("--rw="), "{name}: {command}");
    }
    Ok(())
}

#[test]
fn fio_takes_the_jobs_for_the_socket() -> Result<()> {
    let has_engine = Command::new("fio").arg("--enghelp=libblkio").output().context("fio is missing")?.status.success();
    let own = tempfile::tempdir()?;
    let from = folder("libblkio");
    for entry in std::fs::read_dir(&from)? {
        let (path, name) = {
            let entry = entry?;
            (entry.path(), entry.file_name())
        };
        let mut text = std::fs::read_to_string(path)?;
        if !has_engine {
            let lines = text.lines().filter(|line| !line.starts_with("libblkio_") && !line.starts_with("ioengine="));
            text = format!("{}\n", lines.collect::<Vec<_>>().join("\n"));
        }
        std::fs::write(own.path().join(name), text)?;
    }
    let common = std::fs::read_to_string(from.join("common.inc"))?;
    let of_engine: Vec<&str> = common.lines().filter(|line| line.starts_with("libblkio_") || line.starts_with("ioengine=")).collect();
    ensure!(of_engine == ENGINE, "{of_engine:?}");
    for name in jobs(&from)? {
        let command = parsed(&own.path().join(&name))?;
        ensure!(sections(&command) == ["disk"] && command.contains("--rw="), "{name}: {command}");
        // Only memory that the engine makes can be mapped by the daemon.
        ensure!(!command.contains("--mem=") && !command.contains("--iomem="), "{name}: {command}");
        ensure!(!has_engine || command.contains("--libblkio_path=/nowhere.sock"), "{name}: {command}");
    }
    Ok(())
}

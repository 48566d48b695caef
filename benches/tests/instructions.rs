//! Instructions that the daemon's own code takes for a request of 4 KiB, counted by callgrind: unlike times, they are the same on a busy machine. A
//! rise of more than 3 % over what is recorded in `instructions.json` fails; whoever changes the data path on purpose records anew, with
//! `SNAPFENCE_RECORD=1 cargo test -p snapfence-benches --test instructions`, and so shows the change in the diff.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// Requests of the two runs whose difference is counted.
const COUNTS: [u64; 2] = [1600, 4800];
const KINDS: [&str; 5] = ["raw-read", "raw-write", "read", "overwrite", "first-write"];
/// How many more, in percent, are a failure: with the compiler of the record, and with any other one.
const TOLERANCE: u64 = 3;
const TOLERANCE_OF_OTHERS: u64 = 20;

#[derive(Debug, Deserialize, Serialize)]
struct Record {
    /// Which compiler built what was counted.
    compiler: String,
    /// Instructions per request, by kind.
    instructions: BTreeMap<String, u64>,
}

#[test]
fn the_data_path_takes_no_more_instructions_than_recorded() -> Result<()> {
    let program = build()?;
    let folder = tempfile::tempdir()?;
    let mut found = Record { compiler: compiler()?, instructions: BTreeMap::new() };
    for kind in KINDS {
        let [few, many] = COUNTS.map(|count| instructions(&program, kind, count, folder.path()));
        found.instructions.insert(kind.to_owned(), (many? - few?) / (COUNTS[1] - COUNTS[0]));
    }
    println!("{found:?}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
    if std::env::var_os("SNAPFENCE_RECORD").is_some() {
        std::fs::write(path, serde_json::to_string_pretty(&found)? + "\n")?;
        return Ok(());
    }
    let recorded: Record = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let tolerance = if recorded.compiler == found.compiler { TOLERANCE } else { TOLERANCE_OF_OTHERS };
    for (kind, instructions) in &found.instructions {
        let before = recorded.instructions.get(kind).with_context(|| format!("nothing is recorded for {kind}"))?;
        ensure!(
            instructions * 100 <= before * (100 + tolerance),
            "{kind} takes {instructions} instructions a request, {before} are recorded"
        );
        println!("{kind}: {instructions} instructions a request, {before} recorded");
    }
    Ok(())
}

/// Builds the data path as it is released.
fn build() -> Result<PathBuf> {
    let arguments = ["build", "--release", "--package", "snapfence-benches", "--bin", "datapath", "--message-format", "json"];
    let output = Command::new(env!("CARGO")).args(arguments).output()?;
    ensure!(output.status.success(), "the data path does not build: {}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout)?;
    let program = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find_map(|message| {
        let is_program = message["target"]["name"] == "datapath" && message["reason"] == "compiler-artifact";
        is_program.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    program.context("cargo does not say where the program is")
}

fn compiler() -> Result<String> {
    let output = Command::new("rustc").arg("--version").output().context("rustc")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Instructions of all requests of one run.
fn instructions(program: &Path, kind: &str, count: u64, folder: &Path) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*datapath*serve*"])
        .arg(format!("--callgrind-out-file={}", folder.join("callgrind").display()))
        .arg(program)
        .args([kind, &count.to_string()])
        .output()
        .context("valgrind is missing; tests/setup/install.sh installs it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "counting {count} of {kind}: {said}");
    let collected = said.lines().find_map(|line| line.split_once("Collected :")).with_context(|| format!("no count in: {said}"))?;
    Ok(collected.1.trim().parse()?)
}

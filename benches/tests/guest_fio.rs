//! `make guest-fio` in small: every part of it once.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// The job files with less to verify, which an emulated guest is slow at.
fn small_jobs(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fio/guest"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?.replace("size=32m", "size=4m");
        fs::write(folder.join(path.file_name().context("a file has a name")?), text)?;
    }
    Ok(())
}

#[test]
fn fio_runs_in_guests_of_both_daemons() -> Result<()> {
    let (jobs, output) = (tempfile::tempdir()?, tempfile::tempdir()?);
    small_jobs(jobs.path())?;
    let said = Command::new(env!("CARGO_BIN_EXE_guest-fio"))
        .args(["--blocks", "1", "--seconds", "1", "--ramp-ms", "100", "--disk-mib", "48"])
        .args(["--only", "flush-4k", "--only", "verify"])
        .args(["--jobs".as_ref(), jobs.path(), "--output".as_ref(), output.path()])
        .output()?;
    let (out, errors) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    println!("{out}{errors}");
    ensure!(said.status.success(), "guest-fio ends with {}", said.status);

    let report: Value = serde_json::from_str(&fs::read_to_string(output.path().join("guest-fio.json"))?)?;
    let has_peer = report["setup"]["qemu_storage_daemon"].is_string();
    let measured = report["measured"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(measured.iter().map(|measured| &measured["job"]).collect::<Vec<_>>() == ["flush-4k"], "{measured:?}");
    for row in measured.iter().flat_map(|measured| measured["rows"].as_array().into_iter().flatten()) {
        let is_sound = |figures: &Value| figures["iops"].as_f64() > Some(0.0) && figures["p50_us"].as_f64() > Some(0.0);
        ensure!(is_sound(&row["snapfence"]) && (!has_peer || is_sound(&row["qemu_storage_daemon"])), "{row}");
    }
    ensure!(measured[0]["rows"][0]["snapfence"]["flush_p50_us"].as_f64() > Some(0.0), "no flush was seen: {}", measured[0]);
    let disks: Vec<&Value> = measured[0]["rows"].as_array().into_iter().flatten().map(|row| &row["disk"]).collect();
    ensure!(disks == ["all", "vda", "vdb", "vdc"], "{disks:?}");
    ensure!(report["snapshots"]["held_us"].as_array().map(Vec::len) == Some(1), "{}", report["snapshots"]);
    let checks = report["checks"].as_array().map_or(0, Vec::len);
    ensure!(checks == 1 + usize::from(has_peer), "{}", report["checks"]);
    let page = fs::read_to_string(output.path().join("guest-fio.html"))?;
    ensure!(page.contains("<section id=\"guest-fio\">") && page.matches("<table>").count() == 2, "{page}");
    Ok(())
}

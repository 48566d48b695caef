//! `make guest-fio` in small: every part of it once.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::Value;

#[test]
fn fio_runs_in_guests_of_both_daemons() -> Result<()> {
    let output = tempfile::tempdir()?;
    let said = Command::new(env!("CARGO_BIN_EXE_guest-fio"))
        .args(["--blocks", "1", "--seconds", "1", "--ramp-ms", "100", "--disk-mib", "48"])
        .args(["--only", "randread-4k-qd32", "--only", "flush-4k", "--only", "verify", "--output"])
        .arg(output.path())
        .output()?;
    let (out, errors) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    println!("{out}{errors}");
    ensure!(said.status.success(), "guest-fio ends with {}", said.status);

    let report: Value = serde_json::from_str(&std::fs::read_to_string(output.path().join("guest-fio.json"))?)?;
    let has_peer = report["setup"]["qemu_storage_daemon"].is_string();
    let measured = report["measured"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(measured.iter().map(|measured| &measured["job"]).collect::<Vec<_>>() == ["randread-4k-qd32", "flush-4k"], "{measured:?}");
    for row in measured.iter().flat_map(|measured| measured["rows"].as_array().into_iter().flatten()) {
        let is_sound = |figures: &Value| figures["iops"].as_f64() > Some(0.0) && figures["p50_us"].as_f64() > Some(0.0);
        ensure!(is_sound(&row["snapfence"]) && (!has_peer || is_sound(&row["qemu_storage_daemon"])), "{row}");
    }
    ensure!(measured[1]["rows"][0]["snapfence"]["flush_p50_us"].as_f64() > Some(0.0), "no flush was seen: {}", measured[1]);
    let disks: Vec<&Value> = measured[0]["rows"].as_array().into_iter().flatten().map(|row| &row["disk"]).collect();
    ensure!(disks == ["all", "vda", "vdb", "vdc"], "{disks:?}");
    ensure!(report["snapshots"]["held_us"].as_array().map(Vec::len) == Some(1), "{}", report["snapshots"]);
    let checks = report["checks"].as_array().map_or(0, Vec::len);
    ensure!(checks == 1 + usize::from(has_peer), "{}", report["checks"]);
    let page = std::fs::read_to_string(output.path().join("guest-fio.html"))?;
    ensure!(page.contains("<section id=\"guest-fio\">") && page.matches("<table>").count() == 3, "{page}");
    Ok(())
}

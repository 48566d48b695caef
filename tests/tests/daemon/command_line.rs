//! Every form of `snapfence` against the real daemon, with and without `--json`, and its exit status.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapfence_tests::backend::program;
use snapfence_tests::tools;

use super::support::Place;

#[test]
fn devices_snapshots_stacks_and_jobs() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    tools::create_image(&place.path("c.raw"), "raw", 1 << 20)?;
    let daemon = place.serve(&[place.device("vda", "a.qcow2")])?;
    let says = |arguments: &[&str], status: i32, parts: &[&str]| -> Result<()> {
        let ended = daemon.snapfence(arguments)?;
        ensure!(ended.status == status, "{arguments:?}: {ended:?}");
        let text = if status == 0 { &ended.out } else { &ended.err };
        for part in parts {
            ensure!(text.contains(part), "{arguments:?}: no {part:?} in {ended:?}");
        }
        Ok(())
    };
    let add_b = place.device("vdb", "b.qcow2");
    says(&["device", "add", &add_b], 0, &["vdb", "16 MiB"])?;
    says(&["device", "add", &add_b], 1, &["snapfence: device 'vdb': there already is a device of this name"])?;
    says(&["device", "add", "name=vdx"], 2, &["'image=' is missing"])?;
    let folder = place.path("").display().to_string();
    let added = daemon.json(&["device", "add", &format!("name=vdc,image={folder}c.raw,format=raw,socket={folder}c.sock,readonly=on")])?;
    ensure!(added["readonly"] == true && added["virtual-size"] == 1 << 20, "{added}");
    says(&["device", "list"], 0, &["NAME", "vda", "vdb", "vdc", "read-only"])?;
    ensure!(daemon.json(&["device", "list"])?.as_array().map(Vec::len) == Some(3), "three devices");
    says(&["device", "remove", "vdc"], 0, &["vdc removed"])?;
    says(&["device", "remove", "vdc"], 1, &["vdc"])?;
    ensure!(!place.path("c.sock").exists(), "its socket goes with it");

    // Overlays: ours beside the top, ours where we want it, one of qemu-img's.
    says(&["snapshot", "create", "s1", "--device", "vda", "--device", "vdb"], 0, &["s1: frozen", "a.s1.qcow2", "b.s1.qcow2"])?;
    let given = place.path("given.qcow2");
    tools::create_overlay(&given, &place.path("a.s1.qcow2"), "qcow2")?;
    let to_given = format!("vda={}", given.display());
    let report = daemon.json(&["snapshot", "create", "s2", "--device", &to_given])?;
    ensure!(report["state"] == "frozen" && report["devices"][0]["overlay"] == given.display().to_string(), "{report}");
    for time in ["switch_us", "hold_us", "freeze_us"] {
        ensure!(report["devices"][0][time].is_u64(), "{report}");
    }
    let made = place.path("made.qcow2").display().to_string();
    let to_made = format!("vda={made}");
    says(&["snapshot", "create", "s3", "--device", &to_made], 1, &[&made, "there is no such file"])?;
    says(&["snapshot", "create", "s3", "--device", &to_made, "--create", "--deadline-ms", "500"], 0, &["s3: frozen", &made])?;
    says(&["snapshot", "create", "s4", "--device", &to_made, "--create"], 1, &[&made, "it exists already"])?;
    says(&["snapshot", "create", "s3", "--device", "vda"], 1, &["there already is a snapshot 's3'"])?;
    says(&["snapshot", "create", "s5", "--device", "vdz"], 1, &["vdz"])?;
    says(&["snapshot", "create", "s5"], 2, &["--device"])?;
    says(&["snapshot", "create", "s5", "--device", "vda", "--deadline-ms", "0"], 2, &["--deadline-ms"])?;
    let quick = daemon.json(&["snapshot", "create", "s6", "--device", "vdb", "--no-wait"])?;
    let job = quick["job"].as_str().context("a job")?.to_owned();
    ensure!(quick["state"] == "switched" || quick["state"] == "frozen", "{quick}");

    says(&["job", "wait", &job], 0, &[&job, "concluded"])?;
    ensure!(daemon.json(&["job", "wait", &job])?["status"] == "concluded", "it has ended");
    says(&["job", "wait", "none"], 1, &["none"])?;
    says(&["job", "list"], 0, &["ID", "job1", &job])?;
    let failed = daemon.json(&["job", "list"])?;
    let failed = failed.as_array().into_iter().flatten().find(|job| job["error"].is_string()).context("one has failed")?;
    says(&["job", "wait", failed["id"].as_str().context("a name")?], 1, &["no such file"])?;
    says(&["job", "cancel", &job], 1, &["cannot be cancelled any more"])?;
    says(&["job", "cancel", "none"], 1, &["there is no job 'none'"])?;

    says(&["snapshot", "list"], 0, &["NAME", "s1", "s2", "s3", "s6"])?;
    ensure!(daemon.json(&["snapshot", "list"])?.as_array().map(Vec::len) == Some(4), "the refused ones are not there");
    says(&["snapshot", "show", "s1"], 0, &["s1: frozen", "vda", "vdb"])?;
    ensure!(daemon.json(&["snapshot", "show", "s1"])?["devices"][1]["device"] == "vdb", "the second");
    says(&["snapshot", "show", "none"], 1, &["there is no snapshot 'none'"])?;
    let tree = ["├─ made.qcow2", "├─ given.qcow2", "├─ a.s1.qcow2", "└─ a.qcow2", "frozen: s1", "frozen: s2", "frozen: s3", "active"];
    says(&["stack", "show", "vda"], 0, &tree)?;
    let stack = daemon.json(&["stack", "show", "vda"])?;
    let seen: Vec<_> =
        stack["layers"].as_array().into_iter().flatten().map(|layer| layer["file"].as_str().unwrap_or_default().to_owned()).collect();
    let by_qemu = tools::layers(&place.path("made.qcow2"), "qcow2")?;
    let by_qemu: Vec<_> = by_qemu.iter().map(|layer| layer.path.display().to_string()).collect();
    ensure!(seen == by_qemu, "QEMU sees the same layers: {seen:?} {by_qemu:?}");
    says(&["stack", "show", "none"], 1, &["none"])?;
    says(&["stack"], 2, &[])?;
    daemon.process.stop()?;
    place.check_images()
}

#[test]
fn without_a_daemon_it_says_what_to_do() -> Result<()> {
    let place = Place::with_disks(&["a"])?;
    let control = place.path("none.sock");
    let run =
        |arguments: &[&str]| Command::new(program("snapfence")?).arg("--control").arg(&control).args(arguments).output().context("it runs");
    let lost = run(&["device", "list"])?;
    let said = String::from_utf8_lossy(&lost.stderr).into_owned();
    ensure!(lost.status.code() == Some(1) && said.contains("no daemon listens on") && said.lines().count() == 1, "{said}");
    let image = run(&["image", "info", &place.path("a.qcow2").display().to_string()])?;
    ensure!(image.status.code() == Some(0), "images need no daemon: {}", String::from_utf8_lossy(&image.stderr));
    Ok(())
}

#[test]
fn events_are_followed() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let daemon = place.serve(&[place.device("vda", "a.qcow2")])?;
    let mut follower = Command::new(program("snapfence")?)
        .args(["events", "--json"])
        .env("SNAPFENCE_CONTROL", &daemon.control)
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(follower.stdout.take().context("a pipe")?).lines();
    // It takes a moment to subscribe, so there are snapshots until the first event comes through.
    let (sender, events) = std::sync::mpsc::channel::<Value>();
    let reader = std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let event = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    let mut count = 0;
    let mut seen: Vec<Value> = Vec::new();
    while seen.is_empty() {
        count += 1;
        ensure!(count < 50, "no event comes");
        daemon.json(&["snapshot", "create", &format!("warm{count}"), "--device", "vda"])?;
        seen.extend(events.recv_timeout(std::time::Duration::from_millis(200)));
    }
    daemon.json(&["snapshot", "create", "last", "--device", "vda"])?;
    let of_last = |event: &Value| event["data"]["name"] == "last";
    while seen.iter().filter(|event| of_last(event)).count() < 2 {
        seen.push(events.recv_timeout(super::support::PATIENCE)?);
    }
    let names: Vec<_> = seen.iter().filter(|event| of_last(event)).map(|event| event["event"].clone()).collect();
    ensure!(names == ["SNAPSHOT_SWITCHED", "SNAPSHOT_FROZEN"], "{names:?}");
    ensure!(seen.iter().any(|event| event["event"] == "JOB_STATUS_CHANGE"), "{seen:?}");
    // It ends with the daemon, and says so.
    daemon.process.stop()?;
    let status = follower.wait()?;
    ensure!(status.code() == Some(1), "{status}");
    reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    Ok(())
}

#[test]
fn a_stock_pipe_reader_ends_it_quietly() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let daemon = place.serve(&[place.device("vda", "a.qcow2")])?;
    let script = OsString::from("\"$0\" device list | head -c 1 >/dev/null; echo ${PIPESTATUS[0]}");
    let output =
        Command::new("bash").arg("-c").arg(script).arg(program("snapfence")?).env("SNAPFENCE_CONTROL", &daemon.control).output()?;
    ensure!(output.stdout == b"0\n" && output.stderr.is_empty(), "{output:?}");
    daemon.process.stop()
}

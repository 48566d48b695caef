//! What a control client learns of front-ends, QEMU being the front-end: that one has come, and that it has gone, whether it took its leave or not.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use snapfence_tests::process::Process;
use snapfence_tests::qmp::Qmp;

use super::support::{PATIENCE, Place};

/// A QEMU whose guest never runs: its devices connect all the same.
fn qemu(folder: &Path, socket: &Path) -> Result<Process> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-S", "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64M", "-machine", "q35,memory-backend=memory"]);
    command.args(["-object", "memory-backend-memfd,id=memory,size=64M,share=on", "-device", "vhost-user-blk-pci,chardev=disk"]);
    command.arg("-chardev").arg(format!("socket,id=disk,path={}", socket.display()));
    command.arg("-qmp").arg(format!("unix:{}/qmp.sock,server=on,wait=off", folder.display()));
    Process::spawn(command, &folder.join("qemu.log"))
}

#[test]
fn clients_are_told_when_front_ends_come_and_go() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let daemon = place.serve(&[place.device("vda", "a.qcow2"), place.device("vdb", "b.qcow2")])?;
    let mut client = Qmp::connect(&daemon.control)?;
    for (device, killed) in [("vda", false), ("vdb", true)] {
        let mut process = qemu(&place.path(""), &place.path(&format!("{device}.sock")))?;
        let connected = client.wait_event(|event| event["event"].as_str().is_some_and(|name| name.starts_with("DEVICE_")))?;
        ensure!(connected["event"] == "DEVICE_CONNECTED" && connected["data"] == json!({ "device": device }), "{connected}");
        let shown = |client: &mut Qmp| -> Result<Value> {
            let devices = client.execute("device-list", json!({}))?;
            let found = devices.as_array().into_iter().flatten().find(|shown| shown["name"] == device).cloned();
            Ok(found.context("the device is listed")?["connected"].clone())
        };
        ensure!(shown(&mut client)? == true);
        if killed {
            process.signal(Signal::KILL)?;
        } else {
            // The device connects before QEMU listens here.
            let mut monitor = None;
            process.wait_until("monitor", PATIENCE, |_| {
                monitor = Qmp::connect(&place.path("qmp.sock")).ok();
                monitor.is_some()
            })?;
            monitor.context("there is a monitor")?.execute("quit", json!({}))?;
        }
        process.wait(PATIENCE)?;
        let gone = client.wait_event(|event| event["event"].as_str().is_some_and(|name| name.starts_with("DEVICE_")))?;
        ensure!(gone["event"] == "DEVICE_DISCONNECTED" && gone["data"] == json!({ "device": device }), "{gone}");
        ensure!(shown(&mut client)? == false);
        std::fs::remove_file(place.path("qmp.sock")).ok();
    }
    drop(client);
    daemon.process.stop()
}

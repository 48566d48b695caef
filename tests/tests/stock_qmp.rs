//! The stock QMP client (the Python package qemu.qmp, in the environment that tests/setup/install.sh makes) drives a daemon's control socket.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use snapfence_tests::backend::{Backend, Device, Kind};
use snapfence_tests::tools;

/// The Python with the client in it: `venv` in the folder cargo builds into.
fn python() -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().map(|folder| folder.join("venv/bin/python3")).find(|path| path.exists());
    found.context("no venv with the QMP client; run tests/setup/install.sh first")
}

fn scenario(kind: Kind) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let devices = ["one", "two"]
        .map(|name| Device {
            name: name.to_owned(),
            image: folder.path().join(format!("{name}.qcow2")),
            format: "qcow2".to_owned(),
            socket: folder.path().join(format!("{name}.sock")),
            queues: 1,
        })
        .to_vec();
    for device in &devices {
        tools::create_image(&device.image, "qcow2", 64 << 20)?;
    }
    let backend = Backend::launch(kind, folder.path(), &devices)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp/stock_client.py");
    let arguments = [script.as_os_str(), backend.control().as_os_str(), folder.path().as_os_str(), "one".as_ref(), "two".as_ref()];
    println!("{}", tools::run(python()?.to_str().context("the path is not UTF-8")?, arguments)?);
    backend.wait_ended()?;
    for (index, device) in devices.iter().enumerate() {
        let mut names = vec![format!("{}.qcow2", device.name)];
        let made = [("stock", true), ("alone", index == 0), ("made", true), ("named", kind == Kind::Snapfenced)];
        names.extend(made.iter().filter(|(_, is_made)| *is_made).map(|(name, _)| format!("{}.{name}.qcow2", device.name)));
        let expected: Vec<_> = names.iter().rev().map(|name| folder.path().join(name)).collect();
        let layers = tools::layers(&expected[0], "qcow2")?;
        assert_eq!(layers.into_iter().map(|layer| layer.path).collect::<Vec<_>>(), expected);
    }
    tools::check_all(folder.path())?;
    Ok(())
}

#[test]
fn stock_client_snapshots_two_disks_of_qemu_storage_daemon() -> Result<()> {
    scenario(Kind::QemuStorageDaemon)
}

#[test]
fn stock_client_snapshots_two_disks_of_snapfenced() -> Result<()> {
    scenario(Kind::Snapfenced)
}

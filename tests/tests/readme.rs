//! What the README tells to do is done, line by line, in other folders: a disk is made and served, QEMU is attached, snapshots are taken, and the
//! daemon starts again from the configuration file.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::backend::program;
use snapfence_tests::guest::boot_files;
use snapfence_tests::tools;

const README: &str = include_str!("../../README.md");

/// The code blocks of a language, in order.
fn blocks(language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    README.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap_or_default().to_owned()).collect()
}

/// The README's commands, with this machine's folders and programs in place of those it names.
fn here(text: &str, folder: &Path) -> Result<String> {
    let programs = program("snapfenced")?.parent().context("a file is in a folder")?.display().to_string();
    let folder = folder.display().to_string();
    let mut text = text.to_owned();
    for (named, instead) in [
        ("make build\n", ""),
        ("$PWD/target/release", programs.as_str()),
        ("/run/snapfence", &format!("{folder}/run")),
        ("/srv/vm", &format!("{folder}/images")),
        ("/srv/golden", &format!("{folder}/golden")),
        // Any machine can emulate; and a guest that only boots is content with less.
        ("-accel kvm", "-accel tcg"),
        ("2G", "512M"),
    ] {
        text = text.replace(named, instead);
    }
    Ok(text)
}

#[test]
fn commands_of_the_readme_work() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [serve, attach, snapshot, more] = &blocks("sh")[..] else { panic!("the README has other blocks than this test knows") };
    let [config] = &blocks("toml")[..] else { panic!("the README has one configuration file") };
    let at = folder.path().display();
    let (kernel, initramfs) = boot_files()?;
    let (kernel, initramfs) = (kernel.display(), initramfs.display());
    fs::create_dir(folder.path().join("golden"))?;
    fs::write(folder.path().join("snapfence.toml"), here(config, folder.path())?)?;
    let (serve, attach) = (here(serve, folder.path())?, here(attach, folder.path())?);
    let (snapshot, more) = (here(snapshot, folder.path())?, here(more, folder.path())?);
    let attach = attach.trim_end();
    let script = format!(
        r#"
        set -euo pipefail
        daemon=
        trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
        # Tries a command again until it succeeds.
        until_done() {{ for _ in $(seq 600); do if "$@" >/dev/null 2>&1; then return; fi; sleep 0.1; done; echo "never: $*" >&2; exit 1; }}
        exec 2>&1
        {serve}
        daemon=$!
        until_done snapfence device list
        {attach} -kernel {kernel} -initrd {initramfs} -append 'console=ttyS0 no_timer_check' -nodefaults -display none -serial file:{at}/console &
        until_done grep -q '\[vda\] 41943040 512-byte' {at}/console
        {snapshot}
        {more}
        kill $daemon
        wait $daemon
        truncate -s 1G {at}/images/vdc.raw
        snapfenced --config {at}/snapfence.toml &
        until_done snapfence device list
        snapfence device list
        "#
    );
    let output = tools::run("bash", ["-c", &script])?;
    println!("{output}");
    ensure!(output.contains("frozen: monday"), "no layer is frozen by the first snapshot");
    ensure!(output.contains("vdc.raw"), "the configuration file's second disk is not there");
    let layers: Vec<_> = tools::layers(&folder.path().join("images/other.friday.qcow2"), "qcow2")?;
    let names: Vec<_> = layers.iter().map(|layer| layer.path.file_name().unwrap_or_default().to_string_lossy()).collect();
    assert_eq!(
        names,
        ["other.friday.qcow2", "other.qcow2", "mine.qcow2", "vda.tuesday.qcow2", "vda.monday.qcow2", "vda.qcow2"],
        "the layers of vda"
    );
    Ok(())
}

//! Whatever keeps the daemon from starting is told in one line that names it, with status 1, or 2 for wrong usage; and nothing is left behind.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use snapfence_tests::tools;

use super::support::{PATIENCE, Place};

/// The daemon ends by itself with this status and one line that has all of `expected` in it.
fn refuses(place: &mut Place, arguments: Vec<OsString>, status: i32, expected: &[&str]) -> Result<()> {
    let shown = format!("{arguments:?}");
    let before = place.files()?;
    let mut process = place.spawn(arguments, &[])?;
    let ended = process.wait(PATIENCE).with_context(|| shown.clone())?;
    let output = process.output();
    // Log lines begin with their time.
    let lines: Vec<_> = output.lines().filter(|line| !line.starts_with("20")).collect();
    ensure!(ended.code() == Some(status), "{shown}: {ended}: {output}");
    ensure!(lines.len() == 1 && lines[0].starts_with("snapfenced: "), "{shown}: not one line: {output}");
    for part in expected {
        ensure!(lines[0].contains(part), "{shown}: no {part:?} in: {output}");
    }
    ensure!(!output.contains("event=\"ready\""), "{shown}: it was ready: {output}");
    let mut after = place.files()?;
    after.retain(|name| name != "state" || before.contains(name));
    ensure!(after == before, "{shown}: it left {after:?}, and there was {before:?}");
    Ok(())
}

fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

#[test]
fn wrong_usage_is_one_line_and_status_2() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    let good = "name=a,image=a.qcow2,format=qcow2,socket=a.sock";
    std::fs::write(place.path("bad.toml"), "control = 'c'\n[[device]\n")?;
    std::fs::write(place.path("unknown.toml"), "control = 'c'\nstate-dir = 's'\ncolour = 'red'\n")?;
    std::fs::write(place.path("device.toml"), "[[device]]\nname = 'a'\nimage = 'a.qcow2'\nsocket = 'a.sock'\n")?;
    let base = "--control c.sock --state-dir state";
    let table = [
        ("--state-dir state".to_owned(), "--control PATH is missing"),
        ("--control c.sock".to_owned(), "--state-dir DIR is missing"),
        (format!("{base} --speed 9"), "'--speed'"),
        (format!("{base} --device name=a,image=a.qcow2,socket=a.sock"), "device a: 'format=' is missing"),
        (format!("{base} --device name=a,image=a.qcow2,format=vmdk,socket=a.sock"), "device a: 'format=vmdk': expected raw or qcow2"),
        (format!("{base} --device {good},queues=0"), "device a: 'queues=0'"),
        (format!("{base} --device {good},queue-size=100"), "device a: 'queue-size=100': expected a power of two"),
        (format!("{base} --device {good},serial=123456789012345678901"), "device a: 'serial="),
        (format!("{base} --device {good},colour=red"), "device a: "),
        (format!("{base} --device {good} --device {good}"), "two devices have the name `a`"),
        (format!("{base} --device {good} --device name=b,image=b,format=raw,socket=a.sock"), "two devices have the socket `a.sock`"),
        (format!("{base} --device name=../a,image=a.qcow2,format=qcow2,socket=a.sock"), "device ../a: 'name=../a'"),
        (format!("{base} --config none.toml"), "configuration file none.toml"),
        (format!("{base} --config bad.toml"), "bad.toml: line 2"),
        (format!("{base} --config unknown.toml"), "unknown.toml: line 3: unknown field `colour`"),
        (format!("{base} --config device.toml"), "device.toml: line 1: missing field `format`"),
    ];
    for (arguments, expected) in table {
        refuses(&mut place, words(&arguments), 2, &[expected])?;
    }
    Ok(())
}

#[test]
fn whatever_cannot_be_served_is_named() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let image = |name: &str| place.path(name);
    std::fs::write(image("text"), "this is not an image of any kind\n".repeat(50))?;
    std::fs::write(image("ragged"), vec![0; 700])?;
    std::fs::write(image("empty"), [])?;
    std::fs::create_dir(image("folder"))?;
    let elsewhere = Place::with_disks(&["base"])?;
    tools::create_overlay(&image("escapes.qcow2"), &elsewhere.path("base.qcow2"), "qcow2")?;
    tools::create_overlay(&image("orphan.qcow2"), &image("b.qcow2"), "qcow2")?;
    tools::qemu_img(
        ["rebase", "-u", "-F", "qcow2", "-b", "none.qcow2"].map(OsString::from).into_iter().chain([image("orphan.qcow2").into()]),
    )?;
    tools::create_overlay(&image("loop1.qcow2"), &image("a.qcow2"), "qcow2")?;
    tools::create_overlay(&image("loop2.qcow2"), &image("loop1.qcow2"), "qcow2")?;
    tools::qemu_img(
        ["rebase", "-u", "-F", "qcow2", "-b", "loop2.qcow2"].map(OsString::from).into_iter().chain([image("loop1.qcow2").into()]),
    )?;
    tools::create_overlay(&image("covered.qcow2"), &image("b.qcow2"), "qcow2")?;
    tools::create_overlay(&image("above.qcow2"), &image("covered.qcow2"), "qcow2")?;
    tools::qemu_io(["-f", "qcow2", "-c", "write -P 7 0 4k"].map(OsString::from).into_iter().chain([image("above.qcow2").into()]))?;
    std::fs::write(image("file.sock"), "precious")?;
    let _taken = UnixListener::bind(image("taken.sock"))?;
    let long = format!("{}.sock", "x".repeat(120));
    let spec = |name: &str, format: &str, socket: &str| format!("name=vda,image={name},format={format},socket={socket}");
    let table: [(String, &[&str]); 17] = [
        (spec("none.qcow2", "qcow2", "s"), &["device 'vda'", "none.qcow2: cannot be opened for writing: No such file"]),
        (spec("nowhere/i", "raw", "s"), &["device 'vda'", "the directory of ", "nowhere/i cannot be used: No such file"]),
        (spec("a.qcow2", "qcow2", "nowhere/s"), &["device 'vda'", "the directory of ", "nowhere/s cannot be used: No such file"]),
        (spec("text", "qcow2", "s"), &["device 'vda'", "text: it is not a qcow2 image"]),
        (spec("empty", "qcow2", "s"), &["device 'vda'", "empty: the file is empty or too short"]),
        (spec("empty", "raw", "s"), &["device 'vda'", "empty has no size"]),
        (spec("ragged", "raw", "s"), &["device 'vda'", "ragged: ", "not a multiple of 512"]),
        (spec("folder", "raw", "s"), &["device 'vda'", "folder: cannot be opened for writing"]),
        (spec("escapes.qcow2", "qcow2", "s"), &["device 'vda'", "base.qcow2 lies outside the allowed directories", "--allow-dir"]),
        (spec("orphan.qcow2", "qcow2", "s"), &["device 'vda'", "none.qcow2: cannot be opened for reading: No such file"]),
        (spec("loop1.qcow2", "qcow2", "s"), &["device 'vda'", "loop1.qcow2: is in the chain twice"]),
        (spec("covered.qcow2", "qcow2", "s"), &["device 'vda'", "covered.qcow2: must not be written to: ", "above.qcow2 depends on it"]),
        (spec("a.qcow2", "qcow2", "file.sock"), &["device 'vda'", "file.sock: there is something other than a socket"]),
        (spec("a.qcow2", "qcow2", "taken.sock"), &["device 'vda'", "taken.sock: somebody listens there already"]),
        (spec("a.qcow2", "qcow2", &long), &["device 'vda'", &long]),
        (spec("a.qcow2", "qcow2", "control.sock"), &["control.sock"]),
        (format!("{} --device name=vdb,image=a.qcow2,format=qcow2,socket=t", spec("a.qcow2", "qcow2", "s")), &["a.qcow2: is in use"]),
    ];
    let base = place.base();
    for (device, expected) in table {
        let given = words(&format!("--device {device}"));
        refuses(&mut place, [base.clone(), given].concat(), 1, expected)?;
    }
    ensure!(std::fs::read(place.path("file.sock"))? == b"precious", "a file is no socket to be replaced");
    // What stood in the way is gone, and so are all locks.
    let device = place.device("vda", "a.qcow2");
    place.serve(&[device])?.process.stop()
}

#[test]
fn the_daemons_own_places_must_be_usable() -> Result<()> {
    let mut place = Place::with_disks(&["a"])?;
    std::fs::write(place.path("file"), "precious")?;
    let _taken = UnixListener::bind(place.path("taken.sock"))?;
    let broken = place.path("broken");
    std::fs::create_dir(&broken)?;
    std::fs::write(broken.join("catalogue.redb"), vec![7; 9000])?;
    let table: [(&str, &[&str]); 9] = [
        ("--control nowhere/c --state-dir state", &["nowhere/c"]),
        ("--control file --state-dir state", &["file"]),
        ("--control taken.sock --state-dir state", &["taken.sock"]),
        ("--control c --state-dir file", &["cannot make the state directory file"]),
        ("--control c --state-dir file/state", &["cannot make the state directory file/state"]),
        ("--control c --state-dir /proc/state", &["cannot make the state directory /proc/state"]),
        ("--control c --state-dir broken", &["broken/catalogue.redb: the catalogue is damaged and was left as it is"]),
        ("--control c --state-dir state --allow-dir nowhere", &["allowed directory nowhere"]),
        ("--control c --state-dir state --allow-dir file", &["allowed directory file is not a directory"]),
    ];
    for (arguments, expected) in table {
        refuses(&mut place, words(arguments), 1, expected)?;
    }
    ensure!(std::fs::read(place.path("file"))? == b"precious", "it was overwritten");
    let device = place.device("vda", "a.qcow2");
    let first = place.serve(&[device])?;
    let second = words("--control other.sock --state-dir state");
    refuses(&mut place, second, 1, &["the state directory state is in use by another snapfenced"])?;
    let third = words("--control control.sock --state-dir state2");
    std::fs::create_dir(place.path("state2"))?;
    refuses(&mut place, third, 1, &["control.sock"])?;
    let fourth = words("--control other.sock --state-dir state3 --device name=x,image=a.qcow2,format=qcow2,socket=x.sock");
    std::fs::create_dir(place.path("state3"))?;
    refuses(&mut place, fourth, 1, &["device 'x'", "a.qcow2: is in use: another program or device holds its image lock against writing"])?;
    ensure!(first.snapfence(&["device", "list"])?.status == 0, "the first goes on");
    first.process.stop()
}

#[test]
fn an_image_of_another_stack_is_refused_with_the_way_out() -> Result<()> {
    let mut place = Place::with_disks(&["a", "b"])?;
    let device = place.device("vda", "a.qcow2");
    let daemon = place.serve(std::slice::from_ref(&device))?;
    daemon.json(&["snapshot", "create", "s1", "--device", "vda"])?;
    daemon.process.stop()?;
    let other = [place.base(), words(&format!("--device {}", place.device("vda", "b.qcow2")))].concat();
    let top = place.path("a.s1.qcow2").display().to_string();
    let way_out = format!("give image={top} to go on with it, choose another name, or start once with --forget vda");
    refuses(&mut place, other, 1, &["device 'vda'", "b.qcow2 is not in the recorded stack", &way_out])?;
    let beneath = [place.base(), words(&format!("--device {}", place.device("vdb", "a.qcow2")))].concat();
    refuses(&mut place, beneath, 1, &["device 'vdb'", "a.qcow2: must not be written to: device `vda` depends on it"])?;
    let forget = [place.base(), words(&format!("--forget vda --device {}", place.device("vda", "b.qcow2")))].concat();
    let daemon = place.ready(forget)?;
    ensure!(daemon.json(&["device", "list"])?[0]["image"] == Path::new(&place.path("b.qcow2")).display().to_string(), "b is the top");
    daemon.process.stop()
}

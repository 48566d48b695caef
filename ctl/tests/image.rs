//! `snapfence image` beside QEMU's own tools, on images that these have made.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

/// Images in a run.
const IMAGES: u32 = 40;

/// A small generator (xorshift64*), so that a run can be repeated from its seed.
struct Chance(u64);

impl Chance {
    /// From `SNAPFENCE_TEST_SEED`, or anew; printed in any case.
    fn new() -> Self {
        let given = std::env::var("SNAPFENCE_TEST_SEED").ok().map(|seed| seed.parse().expect("SNAPFENCE_TEST_SEED is a number"));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock is after 1970");
        let seed = given.unwrap_or(u64::from(now.subsec_nanos()) + 1);
        println!("SNAPFENCE_TEST_SEED={seed}");
        Self(seed.max(1))
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit
    }

    fn one_of<T: Copy>(&mut self, among: &[T]) -> T {
        among[usize::try_from(self.below(among.len() as u64)).expect("an index")]
    }
}

/// A folder for many images, in memory where there is room: each costs several flushes, and nothing here depends on them.
fn folder() -> tempfile::TempDir {
    const ROOM: u64 = 2 << 30;
    let shared = Path::new("/dev/shm");
    let has_room = rustix::fs::statvfs(shared).is_ok_and(|space| space.f_bavail.saturating_mul(space.f_frsize) >= ROOM);
    if has_room { tempfile::tempdir_in(shared).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn run(program: &str, folder: &Path, arguments: &[String]) -> Output {
    let output = Command::new(program).current_dir(folder).args(arguments).output();
    output.unwrap_or_else(|error| panic!("cannot run {program}: {error}; tests/setup/install.sh installs what the tests need"))
}

fn done(program: &str, folder: &Path, arguments: &[String]) -> String {
    let output = run(program, folder, arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn snapfence(folder: &Path, line: &str) -> Output {
    run(env!("CARGO_BIN_EXE_snapfence"), folder, &words(line))
}

fn snapfence_json(folder: &Path, line: &str) -> Value {
    let text = done(env!("CARGO_BIN_EXE_snapfence"), folder, &words(&format!("{line} --json")));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
}

/// A chain of one to four images in `folder`, and the name and format of the top.
fn random_chain(folder: &Path, chance: &mut Chance) -> (String, &'static str) {
    let mut below: Option<(String, &'static str)> = None;
    for layer in 0..=chance.below(4) {
        let size = 512 * (1 + chance.below(16 << 11));
        let format = if layer == 0 { chance.one_of(&["raw", "qcow2"]) } else { "qcow2" };
        let name = format!("{layer}.{format}");
        let mut create = words(&format!("create -q -f {format}"));
        let mut compressible = false;
        let mut cluster_bytes = 512;
        if format == "qcow2" {
            let extended_l2 = chance.one_of(&["on", "off"]);
            cluster_bytes = 1 << if extended_l2 == "on" { 14 + chance.below(5) } else { 9 + chance.below(10) };
            compressible = extended_l2 == "off" && cluster_bytes >= 4096;
            let compat = if extended_l2 == "off" { chance.one_of(&["0.10", "1.1"]) } else { "1.1" };
            create.extend(words(&format!("-o cluster_size={cluster_bytes},extended_l2={extended_l2},compat={compat}")));
        }
        if let Some((name, format)) = &below {
            create.extend(words(&format!("-b {name} -F {format}")));
        }
        create.extend([name.clone(), size.to_string()]);
        done("qemu-img", folder, &create);
        let mut operations = words(&format!("-f {format}"));
        for _ in 0..chance.below(12) {
            let start = 512 * chance.below(size / 512);
            let longest = 1 << chance.below(12);
            let length = (512 * (1 + chance.below(longest))).min(size - start);
            let operation = match chance.below(6) {
                0 => format!("write -z {start} {length}"),
                1 => format!("write -z -u {start} {length}"),
                2 => format!("discard {start} {length}"),
                3 if compressible && size >= cluster_bytes => {
                    format!("write -c -P 7 {} {cluster_bytes}", cluster_bytes * chance.below(size / cluster_bytes))
                }
                _ => format!("write -P {} {start} {length}", 1 + layer),
            };
            operations.extend(["-c".to_owned(), operation]);
        }
        operations.push(name.clone());
        // What does not fit the image's version is refused, and that is as good.
        run("qemu-io", folder, &operations);
        below = Some((name, format));
    }
    below.expect("at least one layer")
}

/// The map as both programs have to agree on: where bytes have to be read, from where; what is zero, and who says so.
///
/// QEMU also tells where zeros have space, and looks for holes inside of allocated clusters.
fn comparable(map: &Value) -> Vec<Value> {
    let mut entries: Vec<Value> = Vec::new();
    for entry in map.as_array().expect("a map is a list") {
        let mut entry = entry.clone();
        if entry["data"] == true {
            entry["zero"] = json!(false);
        } else {
            entry.as_object_mut().expect("an entry is an object").remove("offset");
        }
        let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or_else(|| panic!("{key} of {value}"));
        if let Some(last) = entries.last_mut() {
            let same = ["depth", "present", "zero", "data", "compressed"].iter().all(|key| last[*key] == entry[*key]);
            let adjoining = match (last.get("offset"), entry.get("offset")) {
                (None, None) => true,
                (Some(_), Some(_)) => number(last, "offset") + number(last, "length") == number(&entry, "offset"),
                _ => false,
            };
            assert_eq!(number(last, "start") + number(last, "length"), number(&entry, "start"), "a gap before {entry}");
            if same && adjoining {
                last["length"] = json!(number(last, "length") + number(&entry, "length"));
                continue;
            }
        }
        entries.push(entry);
    }
    entries
}

#[test]
fn map_and_info_agree_with_qemu_img() {
    let mut chance = Chance::new();
    for image in 0..IMAGES {
        let folder = folder();
        let (top, format) = random_chain(folder.path(), &mut chance);
        let theirs = done("qemu-img", folder.path(), &words(&format!("map --output=json -f {format} {top}")));
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        let ours = snapfence_json(folder.path(), &format!("image map -f {format} {top}"));
        assert_eq!(comparable(&ours), comparable(&theirs), "image {image}");

        let theirs = done("qemu-img", folder.path(), &words(&format!("info --backing-chain --output=json -f {format} {top}")));
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        let ours = snapfence_json(folder.path(), &format!("image info --backing-chain -f {format} {top}"));
        let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
        assert_eq!(ours.len(), theirs.len(), "image {image}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            for key in
                ["format", "virtual-size", "actual-size", "dirty-flag", "cluster-size", "backing-filename", "backing-filename-format"]
            {
                assert_eq!(ours.get(key), theirs.get(key), "{key} of image {image}: {ours} and {theirs}");
            }
            if let Some(theirs) = theirs["format-specific"]["data"].as_object().filter(|_| ours["format"] == "qcow2") {
                for (key, value) in theirs {
                    // QEMU leaves out what version 2 does not have.
                    assert_eq!(&ours["format-specific"]["data"][key], value, "{key} of image {image}");
                }
            }
        }
    }
}

#[test]
fn the_text_forms_name_what_people_look_for() {
    let folder = tempfile::tempdir().unwrap();
    done("qemu-img", folder.path(), &words("create -q -f raw base.raw 1M"));
    done("qemu-img", folder.path(), &words("create -q -f qcow2 -o extended_l2=on,cluster_size=128k -b base.raw -F raw top.qcow2 2M"));
    done("qemu-io", folder.path(), &["-c".to_owned(), "write 64k 4k".to_owned(), "top.qcow2".to_owned()]);
    let text = |line: &str| {
        let output = snapfence(folder.path(), line);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let info = text("image info top.qcow2");
    for line in
        ["format: qcow2", "virtual size: 2 MiB (2097152 bytes)", "backing file: base.raw (raw)", "clusters: 128 KiB, sub-clusters of 4 KiB"]
    {
        assert!(info.lines().any(|known| known == line), "{line}: {info}");
    }
    let map = text("image map top.qcow2");
    assert!(map.starts_with(" OFFSET  LENGTH  MAPPED TO  DEPTH  FILE\n"), "{map}");
    let last = map.lines().last().unwrap();
    assert!(last.starts_with("0x10000  0x1000 ") && last.ends_with("/top.qcow2"), "{map}");
}

#[test]
fn refusals_name_the_file_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let far = elsewhere.path().canonicalize().unwrap().join("far.raw");
    done("qemu-img", folder.path(), &words(&format!("create -q -f raw {} 1M", far.display())));
    done("qemu-img", folder.path(), &words(&format!("create -q -f qcow2 -b {} -F raw top.qcow2", far.display())));
    let failed = |line: &str, expected: &[&str]| {
        let output = snapfence(folder.path(), line);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}: {err}");
        for expected in expected {
            assert!(err.contains(expected), "{line}: {err}");
        }
    };
    failed("image info nothing.qcow2", &["nothing.qcow2"]);
    failed(&format!("image info {}", far.display()), &["far.raw", "--format raw"]);
    failed(&format!("image map {}", far.display()), &["far.raw", "--format raw"]);
    failed("image map top.qcow2", &["top.qcow2", "far.raw", "--allow-dir"]);
    failed("image info --backing-chain top.qcow2", &["top.qcow2", "far.raw", "--allow-dir"]);
    failed("image map top.qcow2 --allow-dir no-such-folder", &["no-such-folder"]);
    let allowed = format!("image map top.qcow2 --allow-dir {}", elsewhere.path().display());
    assert!(snapfence_json(folder.path(), &allowed).as_array().unwrap().iter().all(|entry| entry["depth"] == 1));
}

/// A layout that both `qemu-img create` and we understand: QEMU's options, and ours.
fn random_layout(chance: &mut Chance, is_overlay: bool) -> (String, String) {
    let compat = chance.one_of(&["0.10", "1.1", "1.1", "1.1"]);
    let extended_l2 = compat == "1.1" && chance.below(2) == 0;
    let cluster_size = 1_u64 << (if extended_l2 { 14 + chance.below(8) } else { 9 + chance.below(13) });
    let switch = |on| if on { "on" } else { "off" };
    let mut theirs = format!("compat={compat},cluster_size={cluster_size},extended_l2={}", switch(extended_l2));
    let mut ours = format!("--compat {compat} --cluster-size {cluster_size} --extended-l2 {}", switch(extended_l2));
    if compat == "1.1" {
        let refcount_bits = 1 << chance.below(7);
        let compression = chance.one_of(&["zlib", "zstd"]);
        let lazy = switch(chance.below(2) == 0);
        theirs += &format!(",refcount_bits={refcount_bits},compression_type={compression},lazy_refcounts={lazy}");
        ours += &format!(" --refcount-bits {refcount_bits} --compression-type {compression} --lazy-refcounts {lazy}");
    }
    if (!is_overlay || extended_l2) && chance.below(3) == 0 {
        theirs += ",preallocation=metadata";
        ours += " --preallocation metadata";
    }
    (theirs, ours)
}

#[test]
fn created_images_are_as_qemu_img_makes_them() {
    let mut chance = Chance::new();
    for image in 0..IMAGES {
        let scratch = folder();
        let folder = scratch.path();
        let is_overlay = chance.below(2) == 0;
        let (theirs, ours) = random_layout(&mut chance, is_overlay);
        let base_size = 512 * (1 + chance.below(8 << 11));
        let size = 512 * (1 + chance.below(8 << 11));
        let base_format = chance.one_of(&["raw", "qcow2"]);
        let (mut their_backing, mut our_backing, mut size) = (String::new(), String::new(), size.to_string());
        if is_overlay {
            done("qemu-img", folder, &words(&format!("create -q -f {base_format} base {base_size}")));
            done("qemu-io", folder, &["-f".into(), base_format.into(), "-c".into(), format!("write -P 3 0 {base_size}"), "base".into()]);
            their_backing = format!("-b base -F {base_format}");
            our_backing = format!("--backing-file base --backing-format {base_format}");
            if chance.below(2) == 0 {
                size.clear();
            }
        }
        done("qemu-img", folder, &words(&format!("create -q -f qcow2 -o {theirs} {their_backing} theirs {size}")));
        let told = snapfence_json(folder, &format!("image create ours {size} {ours} {our_backing}"));
        let info = |name: &str| -> Value {
            serde_json::from_str(&done("qemu-img", folder, &words(&format!("info --output=json -f qcow2 {name}")))).unwrap()
        };
        let (theirs, ours) = (info("theirs"), info("ours"));
        for key in ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format-specific", "dirty-flag"] {
            assert_eq!(ours.get(key), theirs.get(key), "image {image}: {key}");
        }
        assert_eq!(told["virtual-size"], ours["virtual-size"], "image {image}");
        for name in ["ours", "theirs"] {
            done("qemu-img", folder, &words(&format!("check -q -f qcow2 {name}")));
            let check = snapfence_json(folder, &format!("image check {name}"));
            assert_eq!((&check["corruptions"], &check["leaks"]), (&json!(0), &json!(0)), "image {image}: {check}");
        }
        done("qemu-img", folder, &words("compare -f qcow2 -F qcow2 ours theirs"));
        let write = |name: &str| ["-f", "qcow2", "-c", "write -P 9 0 512", "-c", "write -zu 0 512", name].map(str::to_owned).to_vec();
        if size.is_empty() || size.parse::<u64>().unwrap() >= 512 {
            for name in ["ours", "theirs"] {
                // Version 2 has no zero clusters and writes zeros.
                done("qemu-io", folder, &write(name));
                done("qemu-img", folder, &words(&format!("check -q -f qcow2 {name}")));
            }
        }
        done("qemu-img", folder, &words("compare -f qcow2 -F qcow2 ours theirs"));
    }
}

#[test]
fn overlays_have_our_layout_and_the_size_of_what_is_beneath() {
    let folder = tempfile::tempdir().unwrap();
    done("qemu-img", folder.path(), &words("create -q -f raw base.raw 3M"));
    let info = snapfence_json(folder.path(), "image create top.qcow2 -b base.raw -F raw");
    assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&json!(3 << 20), &json!(128 << 10)));
    assert_eq!(info["format-specific"]["data"]["extended-l2"], json!(true));
    let info = snapfence_json(folder.path(), "image create next.qcow2 5M -b top.qcow2 -F qcow2 --cluster-size 4k");
    assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&json!(5 << 20), &json!(4096)));
    assert_eq!(info["format-specific"]["data"]["extended-l2"], json!(false));
    let info = snapfence_json(folder.path(), "image create alone.qcow2 1G");
    assert_eq!((&info["cluster-size"], &info["format-specific"]["data"]["extended-l2"]), (&json!(65_536), &json!(false)));
    let info = snapfence_json(folder.path(), "image create plain.raw 2M --format raw");
    assert_eq!((&info["format"], &info["virtual-size"]), (&json!("raw"), &json!(2 << 20)));
    assert_eq!(folder.path().join("plain.raw").metadata().unwrap().len(), 2 << 20);
}

#[test]
fn what_cannot_be_created_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    done("qemu-img", folder.path(), &words("create -q -f raw base.raw 1M"));
    std::fs::write(folder.path().join("there"), "precious").unwrap();
    for (line, status, expected) in [
        ("there 1M", 1, "there exists already and is never overwritten; remove it first"),
        ("there 1M -f raw", 1, "there"),
        ("new 1M -b missing -F raw", 1, "missing"),
        ("new 1M -b base.raw -F qcow2", 1, "base.raw"),
        ("new 1M -b nbd:localhost -F raw", 2, "not a plain path"),
        ("no-such-folder/new 1M", 1, "no-such-folder"),
        ("new 1000", 2, "multiple of 512"),
        ("new 1M --cluster-size 5000", 2, "power of two"),
        ("new 1M --cluster-size 256", 2, "2^9"),
        ("new 1M --cluster-size 4M", 2, "2^21"),
        ("new 1M --cluster-size 8k --extended-l2 on", 2, "2^14"),
        ("new 1M --refcount-bits 3", 2, "refcount"),
        ("new 1M --compat 0.10 --lazy-refcounts on", 2, "version 2"),
        ("new 1M --compat 0.10 --compression-type zstd", 2, "version 2"),
        ("new 7E --cluster-size 512", 2, "virtual size"),
        ("new -b base.raw -F raw --extended-l2 off --preallocation metadata", 2, "extended L2"),
        ("new 1M -f raw --cluster-size 64k", 2, "--cluster-size"),
        ("new 1M -f raw -b base.raw -F raw", 2, "--backing-file"),
        ("new 1M --backing-format raw", 2, "--backing-file"),
        ("new 1M -b base.raw", 2, "--backing-format"),
        ("new", 2, "SIZE"),
    ] {
        let output = snapfence(folder.path(), &format!("image create {line}"));
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {err}");
        assert!(err.contains(expected), "{line}: {err}");
        assert!(!folder.path().join("new").exists(), "{line}");
    }
    assert_eq!(std::fs::read(folder.path().join("there")).unwrap(), b"precious");
}

/// Removes the list of internal snapshots and nothing else: everything that only they used leaks.
fn forget_snapshots(image: &Path) {
    let mut bytes = std::fs::read(image).unwrap();
    bytes[60..72].fill(0);
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn checks_tell_leaks_from_corruption_and_repair_only_leaks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let image = folder.join("a.qcow2");
    done("qemu-img", folder, &words("create -q -f qcow2 a.qcow2 4M"));
    let write = |line: &str| done("qemu-io", folder, &["-c".to_owned(), line.to_owned(), "a.qcow2".to_owned()]);
    write("write -P 1 0 1M");
    done("qemu-img", folder, &words("snapshot -c s a.qcow2"));
    write("write -P 2 0 512k");
    let clean = snapfence(folder, "image check a.qcow2");
    let text = String::from_utf8(clean.stdout).unwrap();
    assert_eq!(clean.status.code(), Some(0), "{text}");
    assert!(text.starts_with("no errors were found\n16 of 64 clusters allocated (25 %)"), "{text}");

    forget_snapshots(&image);
    let theirs = run("qemu-img", folder, &words("check --output=json a.qcow2"));
    assert_eq!(theirs.status.code(), Some(3));
    let theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
    let ours = snapfence(folder, "image check a.qcow2 --json");
    assert_eq!(ours.status.code(), Some(1));
    let ours: Value = serde_json::from_slice(&ours.stdout).unwrap();
    for key in ["format", "check-errors", "image-end-offset", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters"] {
        assert_eq!(ours[key], theirs[key], "{key}: {ours} and {theirs}");
    }
    assert_eq!(ours["findings"].as_array().unwrap().len() as u64, ours["leaks"].as_u64().unwrap());
    let text = String::from_utf8(snapfence(folder, "image check a.qcow2").stdout).unwrap();
    assert!(text.contains("is leaked: its refcount is") && text.contains("--repair leaks frees it"), "{text}");

    let sound = std::fs::read(&image).unwrap();
    let mut corrupt = sound.clone();
    corrupt[0x30007] = 1; // a reserved bit in the first entry of the L1 table, where QEMU puts it
    std::fs::write(&image, &corrupt).unwrap();
    let output = snapfence(folder, "image check a.qcow2 --repair leaks");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("1 corruptions") && text.contains("leaks are not repaired"), "{text}");
    assert!(std::fs::read(&image).unwrap() == corrupt);

    std::fs::write(&image, &sound).unwrap();
    let output = snapfence(folder, "image check a.qcow2 --repair leaks");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("leaked clusters were freed\nno errors were found\n"), "{text}");
    done("qemu-img", folder, &words("check a.qcow2"));
    write("read -P 2 0 512k");
    write("read -P 1 512k 512k");
}

#[test]
fn images_in_use_and_raw_ones_are_not_checked() {
    let folder = tempfile::tempdir().unwrap();
    done("qemu-img", folder.path(), &words("create -q -f qcow2 a.qcow2 4M"));
    let mut user = Command::new("qemu-io")
        .current_dir(folder.path())
        .arg("a.qcow2")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = user.stdin.take().unwrap();
    // The answer tells that the image is open and locked.
    std::io::Write::write_all(&mut stdin, b"length\n").unwrap();
    let mut answer = String::new();
    let mut stdout = std::io::BufReader::new(user.stdout.take().unwrap());
    while !answer.contains("4 MiB") {
        answer.clear();
        assert!(std::io::BufRead::read_line(&mut stdout, &mut answer).unwrap() > 0, "qemu-io ended");
    }
    done("qemu-img", folder.path(), &words("create -q -f qcow2 -b a.qcow2 -F qcow2 above.qcow2"));
    for (line, shareable) in [
        ("image check a.qcow2", true),
        ("image map a.qcow2", true),
        ("image map above.qcow2", true),
        ("image check a.qcow2 --repair leaks", false),
    ] {
        let output = snapfence(folder.path(), line);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("a.qcow2") && err.contains("is in use") && err.contains("-U") == shareable, "{line}: {err}");
    }
    for line in ["image check -U a.qcow2", "image map a.qcow2 --force-share", "image map above.qcow2 -U", "image info -U a.qcow2"] {
        snapfence_json(folder.path(), line);
    }
    // Overlays are made above disks in use.
    snapfence_json(folder.path(), "image create top.qcow2 -b a.qcow2 -F qcow2");
    drop(stdin);
    user.wait().unwrap();
    assert_eq!(snapfence(folder.path(), "image check a.qcow2").status.code(), Some(0));
    let output = snapfence(folder.path(), "image check a.qcow2 -f raw");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(snapfence(folder.path(), "image check missing.qcow2").status.code(), Some(1));
}

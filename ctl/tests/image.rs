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
        let folder = tempfile::tempdir().unwrap();
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

//! Our check beside `qemu-img check`, on images that QEMU made and on the same ones damaged.

use std::collections::BTreeMap;
use std::process::Command;

use crate::qcow2::testing::{MemoryFile, MemoryOnly, Scratch, run};
use crate::qcow2::{OpenOptions, Qcow2};
use crate::storage::Chance;

use super::*;

/// What `qemu-img check` says about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Theirs {
    status: i32,
    numbers: BTreeMap<String, u64>,
    text: String,
}

impl Theirs {
    fn of(scratch: &Scratch, name: &str) -> Self {
        let output = Command::new("qemu-img").args(["check", "--output=json", "-f", "qcow2"]).arg(scratch.path(name)).output();
        let output = output.expect("qemu-img runs");
        let json = String::from_utf8_lossy(&output.stdout).into_owned();
        // One member to a line; only the numbers matter.
        let numbers = json.lines().filter_map(|line| {
            let (key, value) = line.split_once(':')?;
            Some((key.trim().trim_matches('"').to_owned(), value.trim().trim_end_matches(',').parse().ok()?))
        });
        let text = json.clone() + &String::from_utf8_lossy(&output.stderr);
        Self { status: output.status.code().expect("an exit status"), numbers: numbers.collect(), text }
    }

    fn number(&self, key: &str) -> u64 {
        self.numbers.get(key).copied().unwrap_or(0)
    }
}

fn ours(file: &MemoryFile, repair: Repair) -> Result<CheckReport, CheckError> {
    let file = file.clone();
    run(async move { check(&file, &CheckOptions { repair, ..CheckOptions::default() }).await })
}

/// Checks that both say the same about the image in `name`.
fn agree(scratch: &Scratch, name: &str, context: &str) -> CheckReport {
    let theirs = Theirs::of(scratch, name);
    let ours = ours(&scratch.load(name), Repair::None).unwrap_or_else(|error| panic!("{context}: {error}; {}", theirs.text));
    let status = match (&ours.corruptions, &ours.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    };
    assert_eq!(status, theirs.status, "{context}: {ours:#?}: {}", theirs.text);
    for (key, value) in [
        ("leaks", ours.leaks),
        ("corruptions", ours.corruptions),
        ("image-end-offset", ours.image_end),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
    ] {
        assert_eq!(value, theirs.number(key), "{context}: {key}: {ours:#?}: {}", theirs.text);
    }
    ours
}

/// Images of every kind, each with some history.
const KINDS: [&str; 9] = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=1024,refcount_bits=32",
    "cluster_size=2M,refcount_bits=64",
    "extended_l2=on,cluster_size=16k,refcount_bits=8",
    "extended_l2=on,cluster_size=128k,compression_type=zstd",
    "preallocation=metadata,lazy_refcounts=on,cluster_size=8k",
];

fn make(scratch: &Scratch, kind: &str, chance: &mut Chance) {
    const SIZE: u64 = 3 << 20;
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, "a.qcow2", &SIZE.to_string()]);
    let is_v2 = kind.contains("0.10");
    // Snapshots need refcounts above one.
    let snapshots = if kind.contains("refcount_bits=1") { 0 } else { chance.below(3) };
    for round in 0..=snapshots {
        let mut commands = Vec::new();
        for _ in 0..chance.below(10) {
            let at = chance.below(SIZE / 512) * 512;
            let longest = 1 << chance.below(9);
            let len = (512 * (1 + chance.below(longest))).min(SIZE - at);
            commands.push(match chance.below(8) {
                0 if !is_v2 => format!("write -z {at} {len}"),
                1 if !is_v2 => format!("write -z -u {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", chance.below(256)),
            });
        }
        if chance.happens(1, 3) && !kind.contains("extended") && !kind.contains("prealloc") {
            // Fails on clusters that are in use already, which is as good.
            let at = chance.below(SIZE / (2 << 20)) * (2 << 20);
            commands.push(format!("write -c -P 7 {at} 2M"));
        }
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        for line in &commands {
            command.args(["-c", line]);
        }
        command.arg(scratch.path("a.qcow2")).output().expect("qemu-io runs");
        if round < snapshots {
            scratch.qemu_img(&["snapshot", "-c", &format!("s{round}"), "a.qcow2"]);
        }
    }
    if !is_v2 && chance.happens(1, 2) {
        scratch.qemu_img(&["bitmap", "-f", "qcow2", "--add", "a.qcow2", "b0"]);
        scratch.qemu_img(&["bitmap", "-f", "qcow2", "--add", "-g", "512", "a.qcow2", "b1"]);
    }
}

fn for_seeds(name: &str, usual: u64, mut test: impl FnMut(u64, &mut Chance)) {
    let seeds = match std::env::var("SNAPFENCE_SEED").ok().map(|seed| seed.parse::<u64>().expect("a number")) {
        Some(seed) => seed..seed + 1,
        None => 0..usual,
    };
    for seed in seeds {
        eprintln!("{name}: SNAPFENCE_SEED={seed}");
        test(seed, &mut Chance::new(seed));
    }
}

#[test]
fn sound_images_are_sound() {
    for_seeds("sound images", 27, |seed, chance| {
        let scratch = Scratch::new();
        let kind = KINDS[seed as usize % KINDS.len()];
        make(&scratch, kind, chance);
        let report = agree(&scratch, "a.qcow2", kind);
        assert!(report.is_clean(), "{kind}: {report:?}");
    });
}

/// The header and every word of a table in the file: its kind and its position.
fn words(file: &MemoryFile) -> (Header, Vec<(Structure, u64)>) {
    let file = file.clone();
    run(async move {
        let header = Header::read(&file).await.expect("a header");
        let bytes = file.to_bytes();
        let word_at = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().expect("eight bytes"));
        let mut words = Vec::new();
        let cluster = header.geometry().cluster_bytes();
        let mut tables: Vec<(u64, u64)> = vec![(header.l1_offset.get(), u64::from(header.l1_entries))];
        let snapshots = crate::qcow2::snapshot::Snapshots::read(&file, &header).await.expect("a snapshot table");
        tables.extend(snapshots.list.iter().map(|snapshot| (snapshot.l1_offset.get(), u64::from(snapshot.l1_entries))));
        for (at, entries) in tables {
            for entry in (at..).step_by(8).take(entries as usize) {
                words.push((Structure::L1Table, entry));
                let table = word_at(entry) & 0x00ff_ffff_ffff_fe00;
                if table != 0 {
                    words.extend((table..table + cluster).step_by(8).map(|at| (Structure::L2Table, at)));
                }
            }
        }
        let at = header.refcount_table_offset.get();
        for entry in (at..at + u64::from(header.refcount_table_clusters) * cluster).step_by(8) {
            words.push((Structure::RefcountTable, entry));
            let block = word_at(entry);
            if block != 0 {
                // Counts of what is in the file, not of the rest.
                let end = (bytes.len() as u64 / cluster * u64::from(header.geometry().refcount_bits()) / 8 + 8).min(cluster);
                words.extend((block..block + end / 8 * 8).step_by(8).map(|at| (Structure::RefcountBlock, at)));
            }
        }
        (header, words)
    })
}

#[test]
fn damaged_images_are_found_as_qemu_img_finds_them() {
    let mut found = [0_u64; 4];
    for_seeds("damaged images", 45, |seed, chance| {
        let scratch = Scratch::new();
        let kind = KINDS[seed as usize % KINDS.len()];
        make(&scratch, kind, chance);
        let mut bytes = scratch.load("a.qcow2").to_bytes();
        let (header, words) = words(&scratch.load("a.qcow2"));
        let set: Vec<_> = words.iter().filter(|(_, at)| bytes[*at as usize..*at as usize + 8] != [0; 8]).collect();
        let (mut damage, mut follows_nonsense) = (Vec::new(), false);
        for _ in 0..=chance.below(2) {
            let kinds = [Structure::L2Table, Structure::RefcountBlock, Structure::L2Table, Structure::L1Table, Structure::RefcountTable];
            let wanted = kinds[chance.index(kinds.len())];
            let among: Vec<_> = set.iter().filter(|(what, _)| *what == wanted).collect();
            if among.is_empty() {
                continue;
            }
            let (what, at) = *among[chance.index(among.len())];
            let place = &mut bytes[*at as usize..*at as usize + 8];
            let word = u64::from_be_bytes((&*place).try_into().expect("eight bytes"));
            let new = match chance.below(6) {
                0 => 0,
                1 => word ^ 1 << 63,
                2 => word ^ 1 << 62,
                _ => word ^ 1 << chance.below(64),
            };
            place.copy_from_slice(&new.to_be_bytes());
            let (host, cluster_bytes) = (new & 0x00ff_ffff_ffff_fe00, header.geometry().cluster_bytes());
            follows_nonsense |= *what == Structure::L1Table && new != 0 && (host == 0 || host % cluster_bytes != 0);
            damage.push(format!("{what} {at:#x}: {word:#x} -> {new:#x}"));
        }
        std::fs::write(scratch.path("a.qcow2"), &bytes).expect("written");
        let context = format!("{kind}: {damage:?}");
        let theirs = Theirs::of(&scratch, "a.qcow2");
        let ours = ours(&scratch.load("a.qcow2"), Repair::None);
        match (theirs.status, &ours) {
            (1, Ok(report)) => assert!(report.is_corrupt(), "{context}: {report:#?}: {}", theirs.text),
            (1, Err(_)) => {}
            (_, Err(error)) => panic!("{context}: {error}: {}", theirs.text),
            // QEMU goes on with the header, or with half of two clusters, as an L2 table.
            (2, Ok(report)) if follows_nonsense => assert!(report.is_corrupt(), "{context}: {report:#?}: {}", theirs.text),
            (_, Ok(report)) => {
                let numbers = (report.leaks, report.corruptions);
                assert_eq!(numbers, (theirs.number("leaks"), theirs.number("corruptions")), "{context}: {report:#?}: {}", theirs.text);
            }
        }
        found[theirs.status as usize] += 1;
    });
    eprintln!("clean, unreadable, corrupt, leaking: {found:?}");
}

/// An image whose snapshots are gone while everything that they used is still counted.
fn leaking(scratch: &Scratch, kind: &str, chance: &mut Chance) -> Vec<u8> {
    loop {
        make(scratch, kind, chance);
        let mut bytes = scratch.load("a.qcow2").to_bytes();
        if bytes[60..64] != [0; 4] {
            bytes[60..72].fill(0);
            return bytes;
        }
        std::fs::remove_file(scratch.path("a.qcow2")).expect("removed");
    }
}

#[test]
fn leaks_are_repaired_and_nothing_else_changes() {
    for_seeds("leaks", 18, |seed, chance| {
        let kinds: Vec<_> = KINDS.into_iter().filter(|kind| !kind.contains("refcount_bits=1")).collect();
        let kind = kinds[seed as usize % kinds.len()];
        let scratch = Scratch::new();
        let mut bytes = leaking(&scratch, kind, chance);
        let marks_dirty = !kind.contains("0.10") && chance.happens(1, 2);
        if marks_dirty {
            bytes[79] |= 1;
        }
        std::fs::write(scratch.path("a.qcow2"), &bytes).expect("written");
        std::fs::write(scratch.path("b.qcow2"), &bytes).expect("written");
        let before = agree(&scratch, "a.qcow2", kind);
        assert!(before.leaks > 0 && !before.is_corrupt() && before.dirty == marks_dirty, "{kind}: {before:?}");

        let file = scratch.load("a.qcow2");
        let report = ours(&file, Repair::Leaks).expect("checked");
        assert!(report.is_clean() && !report.dirty && report.leaks_fixed == before.leaks, "{kind}: {report:?}");
        scratch.store("a.qcow2", &file);
        assert!(agree(&scratch, "a.qcow2", kind).is_clean());
        assert_eq!(file.to_bytes()[..79], bytes[..79], "the header but for the dirty bit");
        assert_eq!(file.to_bytes()[79], bytes[79] & !1);
        scratch.qemu_img(&["compare", "-U", "-f", "qcow2", "-F", "qcow2", "a.qcow2", "b.qcow2"]);
        assert_eq!(ours(&file, Repair::Leaks).expect("checked").leaks_fixed, 0);
    });
}

#[test]
fn leaks_of_corrupt_images_stay() {
    let scratch = Scratch::new();
    let mut bytes = leaking(&scratch, "compat=1.1", &mut Chance::new(1));
    let (_, words) = words(&MemoryFile::from_bytes(bytes.clone()));
    let &(_, at) = words.iter().find(|(what, _)| *what == Structure::L1Table).expect("an L1 table");
    bytes[at as usize + 7] |= 1;
    let file = MemoryFile::from_bytes(bytes.clone());
    let report = ours(&file, Repair::Leaks).expect("checked");
    assert!(report.corruptions == 1 && report.leaks > 0 && report.leaks_fixed == 0, "{report:?}");
    assert!(file.to_bytes() == bytes);
}

#[test]
fn a_refcount_table_that_ends_behind_the_file_is_corrupt_to_both() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let mut bytes = scratch.load("a.qcow2").to_bytes();
    // Behind all others, as a copy; its former place, the second cluster, is free.
    bytes.resize(0x40000, 0);
    bytes.extend_from_within(0x10000..0x20000);
    bytes[48..56].copy_from_slice(&0x40000_u64.to_be_bytes());
    for (clusters, corrupt) in [(1_u32, false), (2, true)] {
        bytes[56..60].copy_from_slice(&clusters.to_be_bytes());
        bytes[0x20000..0x2000c].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, u8::from(corrupt)]);
        std::fs::write(scratch.path("a.qcow2"), &bytes).expect("written");
        assert_eq!(agree(&scratch, "a.qcow2", "behind the file").is_corrupt(), corrupt);
        let file = scratch.load("a.qcow2");
        let opened = run(async move { Qcow2::<MemoryOnly>::open(file, OpenOptions::writing()).await.map(drop) });
        assert_eq!(opened.is_err(), corrupt, "{opened:?}");
    }
}

#[test]
fn metadata_that_the_guest_could_overwrite_is_found_whatever_its_refcount() {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    scratch.qemu_io("a.qcow2", "qcow2", &["write 0 64k".to_owned()]);
    let mut bytes = scratch.load("a.qcow2").to_bytes();
    // As QEMU lays it out: header, refcount table, refcount block, L1 table, L2 table. The second cluster of the disk is the L1 table, counted
    // twice and not marked as copied.
    bytes[0x40008..0x40010].copy_from_slice(&0x30000_u64.to_be_bytes());
    bytes[0x20006..0x20008].copy_from_slice(&2_u16.to_be_bytes());
    std::fs::write(scratch.path("a.qcow2"), &bytes).expect("written");
    assert_eq!(Theirs::of(&scratch, "a.qcow2").status, 0);
    let report = ours(&scratch.load("a.qcow2"), Repair::None).expect("checked");
    assert_eq!((report.corruptions, report.leaks, report.contradictions), (0, 0, 1));
    assert_eq!(report.findings[0].to_string(), "the cluster at 0x30000 is claimed by L1 table and data");
    assert!(report.is_corrupt() && !report.is_clean());
}

#[test]
fn descriptions_and_memory_are_bounded() {
    let scratch = Scratch::new();
    let bytes = leaking(&scratch, "cluster_size=512", &mut Chance::new(2));
    let file = MemoryFile::from_bytes(bytes);
    let few = file.clone();
    let report = run(async move { check(&few, &CheckOptions { max_findings: 3, ..CheckOptions::default() }).await }).expect("checked");
    assert!(report.leaks > 3 && report.findings.len() == 3 && report.findings_omitted == report.leaks - 3, "{report:?}");
    assert!(report.findings.iter().all(|finding| finding.fault.is_leak()));
    let error = run(async move { check(&file, &CheckOptions { memory_limit: 10_000, ..CheckOptions::default() }).await });
    assert_eq!(error.expect_err("too little").to_string(), "counting the references takes more than 10000 bytes of memory");
}

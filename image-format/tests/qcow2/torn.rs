//! Metadata that was written in part, not at all, or elsewhere: `check` finds it, as QEMU does, in every kind of table.
//!
//! What it cannot find, whoever looks: damaged data, of which there is no checksum; and a table whose old and new entries claim the same clusters
//! equally often (one that says zeros where there was data in the same place, sub-clusters, two entries that have changed places). Nor does anybody
//! mind the counts of clusters past the end of the file: whatever they are, nothing is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use snapfence_image_format::qcow2::{CheckOptions, CreateOptions, Qcow2, check};
use snapfence_image_format::storage::simulated::{SimulatedEnvironment, Simulation};
use snapfence_image_format::storage::{Access, Chance};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Request, open_file, open_stack};
use crate::tools::Scratch;

const IMAGE: &str = "/a.qcow2";
const CLUSTER: usize = 4096;
const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Metadata {
    Header,
    RefcountTable,
    RefcountBlock,
    L1,
    L2,
}

fn word(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes")) as usize
}

/// Every cluster of metadata, by its position, but for refcount blocks for clusters past the end of the file.
fn tables(bytes: &[u8]) -> BTreeMap<usize, Metadata> {
    const PLACE: usize = 0x00ff_ffff_ffff_fe00;
    let half_word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    let mut tables = BTreeMap::from([(0, Metadata::Header)]);
    let (refcounts, l1) = (word(bytes, 48), word(bytes, 40));
    let table = refcounts..refcounts + half_word(56) * CLUSTER;
    tables.extend(table.clone().step_by(CLUSTER).map(|at| (at, Metadata::RefcountTable)));
    let reach = CLUSTER / 8 * CLUSTER;
    let blocks = table.step_by(8).map(|at| word(bytes, at) & PLACE).take(bytes.len().div_ceil(reach));
    tables.extend(blocks.filter(|block| *block != 0).map(|block| (block, Metadata::RefcountBlock)));
    let end = l1 + half_word(36) * 8;
    tables.extend((l1..end).step_by(CLUSTER).map(|at| (at, Metadata::L1)));
    let l2 = (l1..end).step_by(8).map(|at| word(bytes, at) & PLACE).filter(|table| *table != 0);
    tables.extend(l2.map(|table| (table, Metadata::L2)));
    tables
}

/// Writes new clusters, makes the disk larger, writes there too, and closes the image.
fn go_on(environment: &SimulatedEnvironment, writes: &'static [(u64, u64)], grow_to: Option<u64>) -> Vec<u8> {
    let inner = environment.clone();
    Simulation::on(environment.clone()).block_on(async move {
        if let Some(size) = grow_to {
            open_stack(&inner, Path::new(IMAGE), None).await.grow(size).await.expect("grown");
        }
        let stack = open_stack(&inner, Path::new(IMAGE), None).await;
        for (start, len) in writes {
            let range = GuestRange::new(GuestOffset::new(start << 10), len << 10);
            Request::new(Kind::Write, range, &mut Chance::new(*start)).send(&stack).await;
        }
        stack.close().await.expect("closed");
    });
    environment.bytes(IMAGE).expect("the image exists")
}

/// The image earlier and later.
fn images() -> (Vec<u8>, Vec<u8>) {
    let environment = SimulatedEnvironment::new(1);
    let inner = environment.clone();
    Simulation::on(environment.clone()).block_on(async move {
        let file = open_file(&inner, Path::new(IMAGE), Access::CreateNew).await;
        let options = CreateOptions { cluster_bits: 12, refcount_bits: 64, ..CreateOptions::standalone(6 << 20) };
        Qcow2::<SimulatedEnvironment>::create(&file, &options).await.expect("created");
    });
    let earlier = go_on(&environment, &[(0, 700), (3000, 500)], None);
    let environment = environment.restarted();
    // New clusters only: each sector of a table that differs then claims others.
    let later = go_on(&environment, &[(1000, 900), (4000, 2000), (7000, 300), (12_000, 6000)], Some(24 << 20));
    (earlier, later)
}

/// Whether our check and QEMU's find anything in an image.
fn found(scratch: &Scratch, bytes: &[u8]) -> (bool, bool) {
    let environment = SimulatedEnvironment::new(1);
    environment.put(IMAGE, bytes);
    let inner = environment.clone();
    let ours = Simulation::on(environment).block_on(async move {
        let file = open_file(&inner, Path::new(IMAGE), Access::Read).await;
        !check(&file, &CheckOptions::default()).await.is_ok_and(|report| report.is_clean())
    });
    std::fs::write(scratch.path("damaged.qcow2"), bytes).expect("the folder is writable");
    let command = ["check", "-f", "qcow2", "damaged.qcow2"];
    let folder = scratch.path("");
    let output = std::process::Command::new("qemu-img").args(command).current_dir(folder).output().expect("QEMU's tools are installed");
    (ours, !output.status.success())
}

/// Expects that both find it.
fn expect_found(scratch: &Scratch, bytes: &[u8], what: &str) {
    assert_eq!(found(scratch, bytes), (true, true), "found by us, by QEMU: {what}");
}

#[test]
fn torn_and_lost_writes_of_every_kind_of_table_are_found() {
    let scratch = Scratch::new();
    let (mut earlier, later) = images();
    earlier.resize(later.len(), 0);
    assert_eq!(found(&scratch, &later), (false, false), "the image is sound");
    let mut torn = BTreeMap::<Metadata, u32>::new();
    for (at, table) in tables(&later) {
        let sectors = (at..at + CLUSTER).step_by(SECTOR).map(|sector| sector..sector + SECTOR);
        for sector in sectors.filter(|sector| earlier[sector.clone()] != later[sector.clone()]) {
            let mut damaged = later.clone();
            damaged[sector.clone()].copy_from_slice(&earlier[sector.clone()]);
            expect_found(&scratch, &damaged, &format!("{table:?} at {at} is old in {sector:?}"));
            *torn.entry(table).or_default() += 1;
        }
        if earlier[at..at + CLUSTER] != later[at..at + CLUSTER] {
            let mut damaged = later.clone();
            damaged[at..at + CLUSTER].copy_from_slice(&earlier[at..at + CLUSTER]);
            expect_found(&scratch, &damaged, &format!("{table:?} at {at} is old"));
        }
    }
    println!("torn sectors found: {torn:?}");
    assert_eq!(torn.len(), 5, "every kind of table: {torn:?}");
}

#[test]
fn tables_written_over_others_are_found() {
    let scratch = Scratch::new();
    let (_, image) = images();
    let tables = tables(&image);
    let mut pairs = BTreeSet::new();
    for (from, kind) in &tables {
        for (to, over) in tables.iter().filter(|(to, _)| image[*from..from + CLUSTER] != image[**to..**to + CLUSTER]) {
            if (*kind, *over) == (Metadata::RefcountBlock, Metadata::RefcountBlock) {
                // Where all clusters are in use, they differ in what is past the end of the file.
                continue;
            }
            let mut damaged = image.clone();
            damaged.copy_within(*from..from + CLUSTER, *to);
            expect_found(&scratch, &damaged, &format!("{kind:?} at {from} is written to {to}, over {over:?}"));
            pairs.insert((*kind, *over));
        }
    }
    println!("kinds of tables over others found: {}", pairs.len());
    // Each kind over each other, and one L2 table over another.
    assert_eq!(pairs.len(), 21, "{pairs:?}");
}

/// What the above says cannot be found.
#[test]
fn torn_data_is_not_found_by_anybody() {
    let scratch = Scratch::new();
    let (_, mut image) = images();
    let tables = tables(&image);
    let data =
        (0..image.len()).step_by(CLUSTER).find(|at| !tables.contains_key(at) && image[*at..at + CLUSTER].iter().any(|byte| *byte != 0));
    let data = data.expect("there is data");
    image[data..data + SECTOR].fill(0);
    assert_eq!(found(&scratch, &image), (false, false));
}

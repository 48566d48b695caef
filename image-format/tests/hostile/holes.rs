//! Images whose claims are backed by holes: a small file that is very long, so that sizes and positions are all inside of it.

use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, MemoryEnvironment, Storage};

use crate::image::*;
use crate::memory::peak_of;
use crate::ordeal::{Outcome, endure};

/// Most memory for tables of the largest size: 32 MiB of L1 table, a few times over.
const MEMORY_LIMIT: u64 = 512 << 20;
const PATH: &str = "/images/long.qcow2";

/// Puts an image of `len` bytes through everything.
fn outcome(image: &Image, len: u64) -> Outcome {
    let environment = MemoryEnvironment::new();
    environment.put(PATH, &image.0);
    let inner = environment.clone();
    environment.block_on(async move {
        let file = inner.open(&Location::Trusted(PATH.into()), Access::Write, CacheMode::Direct).await.expect("it is there");
        file.set_len(len).await.expect("holes cost nothing");
    });
    let (outcome, peak) = peak_of(|| endure(&environment, PATH));
    assert!(peak < MEMORY_LIMIT, "{peak} bytes of memory: {outcome:?}");
    outcome
}

/// The sound image with its L1 table at the end, of the largest size, and every entry set.
fn with_largest_l1(entry: impl Fn(u64) -> u64) -> (Image, u64) {
    const ENTRIES: usize = 4 << 20;
    let mut image = Image::sound();
    let at = image.0.len();
    image.put32(60, 0).put64(24, 1 << 51).put32(36, ENTRIES as u32).put64(40, at as u64);
    image.0.extend((0..ENTRIES as u64).flat_map(|index| entry(index).to_be_bytes()));
    let len = image.0.len() as u64;
    (image, len)
}

#[test]
fn the_longest_file_is_not_counted() {
    let outcome = outcome(&Image::sound(), (i64::MAX as u64) & !0xffff);
    assert_eq!((&outcome.open, &outcome.read), (&None, &None));
    let check = outcome.check.expect("too many clusters");
    assert!(check.contains("more than the limit of 2147483647"), "{check}");
}

#[test]
fn one_table_that_is_named_millions_of_times_is_read_once() {
    let (image, len) = with_largest_l1(|_| L2 as u64 | COPIED);
    let outcome = outcome(&image, len);
    assert_eq!((&outcome.open, &outcome.read), (&None, &None));
    let writing = outcome.open_for_writing.expect("overlaps");
    assert!(writing.contains("the L2 table and the L2 table overlap at 0x40000"), "{writing}");
    let check = outcome.check.expect("counts are wrong");
    assert!(check.contains("the cluster at 0x40000 has the refcount 1, but there are 65535 references"), "{check}");
    assert!(check.contains("has more references than the refcount width holds (65535) (4128769 times)"), "{check}");
}

#[test]
fn tables_in_holes_are_listed_within_bounds() {
    let (image, len) = with_largest_l1(|index| if index % 64 == 0 { ((1 << 30) + (index << 16)) | COPIED } else { 0 });
    let outcome = outcome(&image, len + (4 << 36) + (1 << 30));
    assert_eq!((&outcome.open, &outcome.read), (&None, &None));
    assert!(outcome.check.is_some_and(|check| check.contains("has the refcount 0, but there are 1 references")));
}

#[test]
fn all_snapshots_with_the_largest_tables_are_refused() {
    let mut image = Image::sound();
    image.put32(60, 65_536).put64(64, (CLUSTERS * CLUSTER) as u64);
    for index in 0..65_536_u64 {
        let mut entry = [0; 56];
        entry[..8].copy_from_slice(&((1 << 32) + (index << 16)).to_be_bytes());
        entry[8..12].copy_from_slice(&(4_u32 << 20).to_be_bytes());
        entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
        image.0.extend(entry);
    }
    let outcome = outcome(&image, 16 << 30);
    assert_eq!((&outcome.open, &outcome.read), (&None, &None));
    assert!(outcome.open_for_writing.is_some_and(|error| error.contains("overlap")));
    assert!(outcome.check.is_some_and(|error| error.contains("the L1 tables of the internal snapshots overlap: together they have")));
}

#[test]
fn the_largest_refcount_table_is_read_within_bounds() {
    let mut image = Image::sound();
    image.put64(48, 1 << 30).put32(56, 128);
    let outcome = outcome(&image, 2 << 30);
    assert_eq!((&outcome.open, &outcome.read, &outcome.open_for_writing), (&None, &None, &None));
    assert!(outcome.check.is_some_and(|check| check.contains("has the refcount 0, but there are 1 references")));
}

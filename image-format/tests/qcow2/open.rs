//! Opening for writing: what is repaired, what is forgotten, what is kept, and what is refused. Images are QEMU's, damaged by hand where
//! QEMU would not.

use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::{Access, Chance, MemoryEnvironment};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use crate::disk::{Kind, Model, Request, expect_disk, on_a_ring, open_file, open_real, open_stack};
use crate::tools::{Scratch, Verdict};

const MIB: usize = 1 << 20;

/// Makes an image by `qemu-img create -o` and writes to it by commands of `qemu-io`.
fn made_by_qemu(options: &str, commands: &[&str]) -> Scratch {
    let scratch = Scratch::new();
    scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "4M"]);
    if !commands.is_empty() {
        scratch.qemu_io("a.qcow2", "qcow2", commands);
    }
    scratch
}

fn image(scratch: &Scratch) -> Vec<u8> {
    std::fs::read(scratch.path("a.qcow2")).expect("the image exists")
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// Position that a table entry points to.
fn place(entry: u64) -> usize {
    (entry & 0x00ff_ffff_ffff_fe00) as usize
}

/// Opens these bytes for writing, in memory, and returns the error if there is one, and what is in the file afterwards.
fn open_for_writing(bytes: &[u8]) -> (Result<(), String>, Vec<u8>) {
    let environment = MemoryEnvironment::new();
    environment.put("/a.qcow2", bytes);
    let inner = environment.clone();
    let result = environment.block_on(async move {
        let file = open_file(&inner, "/a.qcow2".as_ref(), Access::Write).await;
        Qcow2::<MemoryEnvironment>::open(file, OpenOptions::writing()).await.map(drop).map_err(|error| error.to_string())
    });
    (result, environment.bytes("/a.qcow2").expect("the image exists"))
}

/// Opening these bytes for writing is refused in these words, and changes nothing.
fn expect_refused(bytes: &[u8], words: &str) {
    let (result, after) = open_for_writing(bytes);
    let error = result.expect_err(&format!("should be refused: {words}"));
    assert!(error.contains(words), "{error}");
    assert!(after == bytes, "{error}: but the file has changed");
}

/// Sends one request to an image in memory.
fn request(bytes: &[u8], kind: Kind, at: u64, len: u64) -> (Result<(), LayerError>, Vec<u8>) {
    let environment = MemoryEnvironment::new();
    environment.put("/a.qcow2", bytes);
    let inner = environment.clone();
    let result = environment.block_on(async move {
        let stack = open_stack(&inner, "/a.qcow2".as_ref(), None).await;
        let request = Request::new(kind, GuestRange::new(GuestOffset::new(at), len), &mut Chance::new(1));
        let result = request.try_send(&stack).await;
        // Whatever was refused: nothing may reach the file any more.
        match result {
            Ok(()) => stack.view().flush().await,
            refused => refused,
        }
    });
    (result, environment.bytes("/a.qcow2").expect("the image exists"))
}

#[test]
fn refcounts_that_others_left_out_of_date_are_counted_anew() {
    let mut verdicts = Vec::new();
    for options in ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,extended_l2=on,cluster_size=16k"] {
        let scratch = made_by_qemu(options, &["write -P 1 0 2M"]);
        scratch.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
        // Raised and lowered: new clusters, some of them in the place of others, and some unmapped.
        scratch.abandon("a.qcow2", &["write -P 2 1M 2M", "flush", "write -P 3 100k 3k", "discard 2M 256k", "flush"]);
        let (verdict, text) = scratch.check("a.qcow2");
        assert!(image(&scratch)[79] & 1 == 1 && verdict != Verdict::Sound, "{options}: the refcounts should be out of date: {text}");
        verdicts.push(verdict);
        let mut bytes = [vec![1; MIB], vec![2; 2 * MIB], vec![0; MIB]].concat();
        bytes[100 << 10..103 << 10].fill(3);
        bytes[2 * MIB..2 * MIB + (256 << 10)].fill(0);
        let top = scratch.path("a.qcow2");
        let model = on_a_ring(async move {
            let mut model = Model { bytes, chance: Chance::new(1) };
            let stack = open_real(&top, None).await;
            expect_disk(&stack, &model.bytes, "after counting anew").await;
            for _ in 0..10 {
                model.batch(&stack, 64 << 10).await;
            }
            stack.close().await.expect("closed");
            model
        });
        scratch.expect_sound("a.qcow2", options);
        scratch.expect_content("a.qcow2", &model.bytes, options);
        let snapshot = scratch.content("a.qcow2", &["-l", "snapshot.name=one"]);
        assert!(snapshot == [vec![1; 2 * MIB], vec![0; 2 * MIB]].concat(), "{options}: the snapshot has changed");
    }
    assert!(verdicts.contains(&Verdict::Corrupt), "some refcounts were too low, not only too high");
}

#[test]
fn a_dirty_image_with_worse_faults_is_refused() {
    let scratch = made_by_qemu("lazy_refcounts=on", &[]);
    scratch.abandon("a.qcow2", &["write 0 1M", "flush"]);
    let mut bytes = image(&scratch);
    let l2 = place(word(&bytes, place(word(&bytes, 40))));
    put(&mut bytes, l2, 1 << 63 | 0x7_0000_0000);
    expect_refused(&bytes, "reaches past the end of the file");
    // The refcount table itself as the guest's cluster.
    let table = word(&bytes, 48);
    put(&mut bytes, l2, 1 << 63 | table);
    expect_refused(&bytes, "is claimed by");
}

#[test]
fn what_no_program_keeps_up_is_cleared_and_all_else_is_kept() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 64k"]);
    let mut bytes = image(&scratch);
    // Unknown autoclear and compatible features, and an unknown extension after the end of the known ones.
    bytes[95] |= 0x20;
    bytes[87] |= 0x40;
    let end = (112..4096).step_by(8).find(|&at| word(&bytes, at) == 0).expect("the extensions end");
    put(&mut bytes, end, 0x1234_5678_0000_0008);
    put(&mut bytes, end + 8, 0x0102_0304_0506_0708);
    let (result, after) = open_for_writing(&bytes);
    assert_eq!(result, Ok(()));
    assert_eq!(after[95], 0);
    bytes[95] = 0;
    assert!(after == bytes, "something else has changed");
}

#[test]
fn bitmaps_are_given_up_when_the_image_is_written_to() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 64k"]);
    scratch.qemu_img(&["bitmap", "--add", "-f", "qcow2", "a.qcow2", "marks"]);
    let top = scratch.path("a.qcow2");
    let model = on_a_ring(async move {
        let mut bytes = vec![0; 4 * MIB];
        bytes[..64 << 10].fill(1);
        let mut model = Model { bytes, chance: Chance::new(1) };
        let stack = open_real(&top, None).await;
        for _ in 0..10 {
            model.batch(&stack, 64 << 10).await;
        }
        stack.close().await.expect("closed");
        model
    });
    // As the format has it: the bitmap's clusters are leaked until the next repair.
    let (verdict, text) = scratch.check("a.qcow2");
    assert_eq!(verdict, Verdict::Leaks, "{text}");
    scratch.qemu_img(&["check", "-q", "-f", "qcow2", "-r", "leaks", "a.qcow2"]);
    scratch.expect_content("a.qcow2", &model.bytes, "beside a bitmap");
    assert!(!scratch.qemu_img(&["info", "a.qcow2"]).contains("marks"));
}

#[test]
fn images_that_must_not_be_written_to_are_refused() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 64k"]);
    let good = image(&scratch);
    let patched = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    expect_refused(&patched(79, 2), "marked as corrupt");
    expect_refused(&patched(78, 1), "bit 8");
    expect_refused(&patched(39, 0), "L1 table");
    expect_refused(&patched(3, 0), "not a qcow2 image");
    // The name of an unknown feature comes from the image's own table.
    let mut bytes = patched(78, 1);
    let names = (112..4096).step_by(8).find(|&at| bytes[at..at + 4] == [0x68, 0x03, 0xf8, 0x57]).expect("QEMU writes feature names");
    bytes[names + 8..names + 8 + 10].copy_from_slice(b"\0\x08telepat\0");
    expect_refused(&bytes, "\"telepat\" (bit 8)");

    let scratch = made_by_qemu("data_file=a.data", &[]);
    expect_refused(&image(&scratch), "a.data");
}

#[test]
fn an_image_marked_as_corrupt_can_be_read() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 64k"]);
    let mut bytes = image(&scratch);
    bytes[79] = 2;
    let environment = MemoryEnvironment::new();
    environment.put("/a.qcow2", &bytes);
    let inner = environment.clone();
    environment.block_on(async move {
        let file = open_file(&inner, "/a.qcow2".as_ref(), Access::Read).await;
        Qcow2::<MemoryEnvironment>::open(file, OpenOptions::reading()).await.expect("opens for reading");
    });
}

#[test]
fn metadata_that_overlaps_is_refused() {
    let scratch = made_by_qemu("cluster_size=4k", &["write -P 1 0 4M"]);
    let good = image(&scratch);
    let l1 = place(word(&good, 40));
    let mut bytes = good.clone();
    let first = word(&good, l1);
    put(&mut bytes, l1 + 8, first);
    expect_refused(&bytes, "the L2 table and the L2 table overlap");
    put(&mut bytes, l1 + 8, 1 << 63 | word(&good, 48));
    expect_refused(&bytes, "overlap");
}

#[test]
fn guest_data_is_never_written_over_metadata() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 1M"]);
    let good = image(&scratch);
    let (l1, table) = (place(word(&good, 40)), place(word(&good, 48)));
    let (l2, block) = (place(word(&good, l1)), place(word(&good, table)));
    for target in [l1, table, l2, block] {
        for copied in [0, 1 << 63] {
            let mut bytes = good.clone();
            put(&mut bytes, l2, copied | target as u64);
            for (kind, len) in
                [(Kind::Write, 512), (Kind::Write, 64 << 10), (Kind::Discard, 64 << 10), (Kind::Zero { unmap: true }, 64 << 10)]
            {
                let (result, after) = request(&bytes, kind, 0, len);
                assert!(result.is_err(), "{kind:?} of {len} bytes at {target:#x} has not been refused");
                assert!(after[target..target + (64 << 10)] == bytes[target..target + (64 << 10)], "{kind:?}: {target:#x} has changed");
            }
        }
    }
}

#[test]
fn clusters_with_metadata_that_are_counted_as_free_are_not_given_away() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 64k"]);
    let good = image(&scratch);
    let (l1, table) = (place(word(&good, 40)), place(word(&good, 48)));
    let block = place(word(&good, table));
    for target in [l1, table, block] {
        let mut bytes = good.clone();
        let count = block + (target >> 16) * 2;
        bytes[count..count + 2].fill(0);
        let (result, after) = request(&bytes, Kind::Write, 1 << 20, 64 << 10);
        let error = result.expect_err("a cluster with metadata was given away").to_string();
        assert!(error.contains("refcount zero"), "{error}");
        assert!(after[..good.len()] == bytes, "the file has changed");
    }
}

#[test]
fn entries_that_make_no_sense_are_not_followed() {
    let scratch = made_by_qemu("compat=1.1", &["write -P 1 0 1M"]);
    let good = image(&scratch);
    let l2 = place(word(&good, place(word(&good, 40))));
    let past_the_end = 1 << 63 | 0x7_0000_0000;
    for entry in [past_the_end, 1 << 63 | 0x5_0200, 2 | 1 << 63 | 0x5_0000] {
        let mut bytes = good.clone();
        put(&mut bytes, l2, entry);
        let (result, after) = request(&bytes, Kind::Write, 0, 64 << 10);
        assert!(matches!(result, Err(LayerError::Corrupt { .. })), "{entry:#x}: {result:?}");
        assert!(after == bytes);
    }
}

#[test]
fn a_read_only_layer_reads_what_a_writer_refuses() {
    let scratch = made_by_qemu("lazy_refcounts=on", &[]);
    scratch.abandon("a.qcow2", &["write -P 5 0 1M", "flush"]);
    let environment = MemoryEnvironment::new();
    environment.put("/a.qcow2", &image(&scratch));
    let inner = environment.clone();
    environment.block_on(async move {
        let file = open_file(&inner, "/a.qcow2".as_ref(), Access::Read).await;
        let image = Qcow2::<MemoryEnvironment>::open(file, OpenOptions::reading()).await.expect("dirty images can be read");
        let domain = FenceDomain::new(|| Duration::ZERO);
        let stack = Stack::new(inner, &domain, vec![Arc::new(Layer::Qcow2(image))], true);
        expect_disk(&stack, &[vec![5; MIB], vec![0; 3 * MIB]].concat(), "dirty").await;
    });
}

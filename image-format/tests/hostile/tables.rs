//! Mapping tables, reference counts, compressed clusters.

use crate::image::*;
use crate::{Damage, Step, refuse};

use Step::{Check, Close, Nothing, Open, OpenForWriting, Read, Write};

#[test]
fn hostile_l1_tables_are_refused() {
    let damages: &[Damage] = &[
        ("reserved low bit", |i| i.put64(L1, L2 as u64 | COPIED | 1), Open, "L1 entry 0: reserved bits of an L1 entry are set"),
        ("reserved high bit", |i| i.put64(L1, L2 as u64 | COMPRESSED), Open, "L1 entry 0: reserved bits of an L1 entry are set"),
        ("unaligned", |i| i.put64(L1, 0x40200 | COPIED), Open, "L1 entry 0: an L1 entry points between clusters"),
        ("the header", |i| i.put64(L1, COPIED), Open, "L1 entry 0: an L1 entry points to the header"),
        ("after the end", |i| i.put64(L1, 0x90000 | COPIED), Open, "L1 entry 0 points to 0x90000, outside the file"),
        ("far away", |i| i.put64(L1, 0x00ff_ffff_ffff_0000 | COPIED), Open, "L1 entry 0 points to 0xffffffffff0000, outside"),
        ("the L1 table", |i| i.put64(L1, L1 as u64 | COPIED), OpenForWriting, "the L1 table and the L2 table overlap at 0x30000"),
        ("the refcount table", |i| i.put64(L1, 0x10000 | COPIED), OpenForWriting, "the refcount table and the L2 table overlap at 0x10000"),
        ("the refcount block", |i| i.put64(L1, 0x20000), OpenForWriting, "the refcount block and the L2 table overlap at 0x20000"),
        ("the snapshot table", |i| i.put64(L1, 0x60000), OpenForWriting, "the snapshot table and the L2 table overlap at 0x60000"),
        (
            "the same table twice",
            |i| i.put64(24, 600 << 20).put32(36, 2).put64(L1 + 8, L2 as u64 | COPIED),
            OpenForWriting,
            "the L2 table and the L2 table overlap at 0x40000",
        ),
        ("a table of the snapshot that is nowhere", |i| i.put64(SNAPSHOT_L1, 0x90000), Check, "the L2 table at 0x90000"),
        ("no claim to be alone", |i| i.put64(L1, L2 as u64), Check, "has the refcount 1, but its entry does not say so"),
    ];
    refuse(Image::sound, damages);
}

#[test]
fn hostile_l2_tables_are_refused() {
    let damages: &[Damage] = &[
        ("reserved low bit", |i| i.put64(L2, DATA as u64 | 2), Read, "reserved bits of an entry are set"),
        ("reserved high bit", |i| i.put64(L2, DATA as u64 | 1 << 56), Read, "reserved bits of an entry are set"),
        ("unaligned", |i| i.put64(L2, 0x50200 | COPIED), Read, "L2 table at 0x40000: an entry points between clusters"),
        ("the header", |i| i.put64(L2, COPIED), Read, "an entry points to the header"),
        ("after the end", |i| i.put64(L2, 0x90000 | COPIED), Write, "an entry points past the end of the file"),
        ("far away", |i| i.put64(L2, 0x00ff_ffff_ffff_0000 | COPIED), Write, "an entry points past the end of the file"),
        ("the refcount table", |i| i.put64(L2, 0x10000 | COPIED), Write, "guest data and metadata share a cluster"),
        ("the refcount block", |i| i.put64(L2, 0x20000 | COPIED), Write, "guest data and metadata share a cluster"),
        ("the L1 table", |i| i.put64(L2, L1 as u64 | COPIED), Write, "guest data and metadata share a cluster"),
        ("its own table", |i| i.put64(L2, L2 as u64 | COPIED), Write, "guest data and metadata share a cluster"),
        ("the snapshot table", |i| i.put64(L2, SNAPSHOTS as u64 | COPIED), Write, "guest data and metadata share a cluster"),
        ("the L1 table of the snapshot", |i| i.put64(L2, 0x70000 | COPIED), Write, "guest data and metadata share a cluster"),
        (
            "data twice",
            |i| i.put64(L2 + 24, DATA as u64 | COPIED),
            Close,
            "refcount block at 0x50000: a cluster that was in use has the refcount zero",
        ),
        ("no claim to be alone", |i| i.put64(L2, DATA as u64), Check, "has the refcount 1, but its entry does not say so"),
        ("a false claim to be alone", |i| i.count(DATA, 2), Check, "has the refcount 2, but its entry says it is 1"),
    ];
    refuse(Image::sound, damages);
    let damages: &[Damage] = &[
        ("zeros in version 2", |i| i.put64(L2 + 16, 1), Read, "a zero cluster in a version 2 image"),
        ("fields of version 3 in version 2", |i| i.put64(72, u64::MAX).put32(96, 9).put32(100, 5), Open, "extension"),
    ];
    refuse(Image::version_2, damages);
    let damages: &[Damage] = &[
        ("allocated and zero", |i| i.put64(L2 + 8, 1 << 32 | 1), Read, "a sub-cluster is both allocated and zero"),
        ("allocated nowhere", |i| i.put64(L2 + 40, 1), Read, "a sub-cluster is allocated without a cluster"),
        ("compressed with sub-clusters", |i| i.put64(L2 + 24, 1), Read, "a compressed cluster has a sub-cluster bitmap"),
        ("the zero flag of plain entries", |i| i.put64(L2, DATA as u64 | COPIED | 1), Read, "the zero flag of a plain one"),
        ("a place without bytes", |i| i.put64(L2 + 8, 0), Nothing, ""),
    ];
    refuse(Image::extended, damages);
}

#[test]
fn hostile_compressed_clusters_are_refused() {
    let damages: &[Damage] = &[
        ("in the header", |i| i.put64(L2 + 8, COMPRESSED | 100), Read, "a compressed cluster lies in the header"),
        ("after the end", |i| i.put64(L2 + 8, COMPRESSED | 0xa0000), Read, "compressed cluster at 0xa0000"),
        ("far away", |i| i.put64(L2 + 8, COMPRESSED | ((1 << 54) - 1)), Read, "compressed cluster at 0x3fffffffffffff"),
        ("writable in place", |i| i.put64(L2 + 8, COPIED | COMPRESSED | 0x80000), Read, "claims to be writable in place"),
        (
            "as long as can be",
            |i| i.put64(L2 + 8, COMPRESSED | 0xff << 54 | 0x80000),
            Close,
            "refcount block at 0x90000: a cluster that was in use has the refcount zero",
        ),
        ("in the refcount block", |i| i.put64(L2 + 8, COMPRESSED | 0x20000), Read, "compressed cluster at 0x20000"),
        ("no stream", |i| i.put(COMPRESSED_DATA, &[0xff; 512]), Read, "the bytes cannot be decompressed"),
        ("a stream too short", |i| i.put(COMPRESSED_DATA, &deflate(&[7; 1000])), Read, "end before the cluster is full"),
        ("a stream far too long", |i| i.put(COMPRESSED_DATA, &bomb()), Nothing, ""),
        ("zstd that is none", |i| i.put64(72, 8).put(104, &[1]), Read, "the bytes cannot be decompressed"),
        (
            "zstd that wants a large window",
            |i| {
                // RFC 8878, 3.1.1: magic, no checksum nor size, a window of 2^31 bytes, one block.
                i.put64(72, 8).put(104, &[1]).put(COMPRESSED_DATA, &[0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 0x0b, 0, 8, 7])
            },
            Read,
            "the bytes cannot be decompressed",
        ),
    ];
    refuse(Image::sound, damages);
}

/// Bytes that decompress to 100 MB.
fn bomb() -> Vec<u8> {
    let bytes = deflate(&vec![7; 40_000_000]);
    bytes[..512.min(bytes.len())].to_vec()
}

#[test]
fn hostile_refcounts_are_refused() {
    let damages: &[Damage] = &[
        (
            "entry unaligned",
            |i| i.put64(REFCOUNT_TABLE, 0x20200),
            OpenForWriting,
            "entry 0 of the refcount table, 0x20200, is not the position",
        ),
        ("entry with reserved bits", |i| i.put64(REFCOUNT_TABLE, 0x20001), OpenForWriting, "entry 0 of the refcount table, 0x20001"),
        (
            "entry after the end",
            |i| i.put64(REFCOUNT_TABLE, 0x90000),
            OpenForWriting,
            "entry 0 of the refcount table points to 0x90000, outside",
        ),
        (
            "entry far away",
            |i| i.put64(REFCOUNT_TABLE + 8, !0xffff),
            OpenForWriting,
            "entry 1 of the refcount table points to 0xffffffffffff0000",
        ),
        (
            "block twice",
            |i| i.put64(REFCOUNT_TABLE + 8, 0x20000),
            OpenForWriting,
            "the refcount block and the refcount block overlap at 0x20000",
        ),
        (
            "block in the header of a table",
            |i| i.put64(REFCOUNT_TABLE, 0x10000),
            OpenForWriting,
            "the refcount table and the refcount block overlap",
        ),
        ("block in the L1 table", |i| i.put64(REFCOUNT_TABLE, L1 as u64), OpenForWriting, "the L1 table and the refcount block overlap"),
        ("block in the L2 table", |i| i.put64(REFCOUNT_TABLE, L2 as u64), OpenForWriting, "the refcount block and the L2 table overlap"),
        ("no block at all", |i| i.put64(REFCOUNT_TABLE, 0), Write, "a cluster with metadata has the refcount zero"),
        ("metadata not counted", |i| i.count(L1, 0).put64(L2, 0), Write, "a cluster with metadata has the refcount zero"),
        ("the header not counted", |i| i.count(0, 0), Check, "the cluster at 0x0 has the refcount 0"),
        ("data not counted", |i| i.count(DATA, 0), Close, "a cluster that was in use has the refcount zero"),
        ("a leak", |i| i.put64(L2, 0), Check, "the cluster at 0x50000 is leaked: its refcount is 1, but there are 0 references"),
        ("a refcount as high as can be", |i| i.put64(L2, DATA as u64).count(DATA, u16::MAX), Check, "its refcount is 65535"),
    ];
    refuse(Image::sound, damages);
}

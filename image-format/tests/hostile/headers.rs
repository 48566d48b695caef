//! Headers, their extensions, and the table of internal snapshots.

use crate::image::*;
use crate::{Damage, Step, refuse};

use Step::{Nothing, Open, OpenForWriting};

#[test]
fn hostile_headers_are_refused() {
    let damages: &[Damage] = &[
        ("empty file", |i| i.truncate(0), Open, "the file is empty or too short for a header: 0 bytes"),
        ("half a header", |i| i.truncate(71), Open, "too short for a header: 71 bytes"),
        ("another file", |i| i.put(0, b"\x7fELF"), Open, "it is not a qcow2 image: it begins with [7f, 45, 4c, 46]"),
        ("version 0", |i| i.put32(4, 0), Open, "qcow2 version 0 is not supported"),
        ("version 1", |i| i.put32(4, 1), Open, "qcow2 version 1 is not supported"),
        ("version 4", |i| i.put32(4, 4), Open, "qcow2 version 4 is not supported"),
        ("version huge", |i| i.put32(4, u32::MAX), Open, "qcow2 version 4294967295 is not supported"),
        ("clusters of a byte", |i| i.put32(20, 0), Open, "the cluster size 2^0 is outside"),
        ("clusters of 256 bytes", |i| i.put32(20, 8), Open, "the cluster size 2^8 is outside"),
        ("clusters of 4 MiB", |i| i.put32(20, 22), Open, "the cluster size 2^22 is outside"),
        ("clusters beyond 64 bits", |i| i.put32(20, 64), Open, "the cluster size 2^64 is outside"),
        ("cluster bits huge", |i| i.put32(20, u32::MAX), Open, "the cluster size 2^4294967295 is outside"),
        ("header length 0", |i| i.put32(100, 0), Open, "the header length 0 is below 104"),
        ("header length of version 2", |i| i.put32(100, 72), Open, "the header length 72 is below 104"),
        ("header length ragged", |i| i.put32(100, 107), Open, "the header length 107"),
        ("header longer than a cluster", |i| i.put32(100, 65_544), Open, "above the cluster size"),
        ("header length huge", |i| i.put32(100, u32::MAX - 7), Open, "the header length 4294967288"),
        ("size huge", |i| i.put64(24, u64::MAX), Open, "the virtual size of 18446744073709551615 bytes is more than"),
        ("size one above the limit", |i| i.put64(24, (1 << 51) + 512), Open, "is more than the 2251799813685248 bytes"),
        ("size beyond the L1 table", |i| i.put64(24, 513 << 20), Open, "the L1 table has 1 entries, but a disk of"),
        ("size of part of a sector", |i| i.put64(24, SIZE - 100), Nothing, ""),
        ("encrypted with AES", |i| i.put32(32, 1), Open, "the image is encrypted (method 1)"),
        ("encrypted with LUKS", |i| i.put32(32, 2), Open, "the image is encrypted (method 2)"),
        ("encryption huge", |i| i.put32(32, u32::MAX), Open, "the image is encrypted (method 4294967295)"),
        ("L1 entries none", |i| i.put32(36, 0), Open, "the L1 table has 0 entries, but a disk of 1048576 bytes needs 1"),
        ("L1 entries too many", |i| i.put32(36, (4 << 20) + 1), Open, "the L1 table has 4194305 entries, more than the limit"),
        ("L1 entries huge", |i| i.put32(36, u32::MAX), Open, "the L1 table has 4294967295 entries, more than the limit"),
        ("L1 entries beyond the file", |i| i.put32(36, 4 << 20), Open, "the L1 table at 0x30000 is outside the file"),
        ("L1 unaligned", |i| i.put64(40, L1 as u64 + 512), Open, "the L1 table at 0x30200 is not on a cluster boundary"),
        ("L1 in the header", |i| i.put64(40, 0), Open, "the header and the L1 table overlap"),
        ("L1 in the refcount table", |i| i.put64(40, REFCOUNT_TABLE as u64), Open, "the L1 table and the refcount table overlap"),
        ("L1 after the end", |i| i.put64(40, (CLUSTERS * CLUSTER) as u64), Open, "the L1 table at 0x90000 is outside the file"),
        ("L1 offset huge", |i| i.put64(40, !0xffff), Open, "the L1 table at 0xffffffffffff0000 is outside the file"),
        ("refcount table unaligned", |i| i.put64(48, 0x10008), Open, "the refcount table at 0x10008 is not on a cluster boundary"),
        ("refcount table in the header", |i| i.put64(48, 0), Open, "the header and the refcount table overlap"),
        ("refcount table after the end", |i| i.put64(48, 0xa0000), Open, "the refcount table at 0xa0000 is outside the file"),
        ("refcount table offset huge", |i| i.put64(48, !0xffff), Open, "the refcount table at 0xffffffffffff0000 is outside"),
        (
            "refcount table over the end",
            |i| {
                let table = i.0[REFCOUNT_TABLE..][..CLUSTER].to_vec();
                i.0.extend(table);
                i.count(CLUSTERS * CLUSTER, 1).put64(48, (CLUSTERS * CLUSTER) as u64).put32(56, 2)
            },
            OpenForWriting,
            "the refcount table at 0x90000 is outside the file",
        ),
        ("refcount table empty", |i| i.put32(56, 0), Open, "the refcount table has no clusters"),
        ("refcount table too large", |i| i.put32(56, 129), Open, "the refcount table has 129 clusters, more than the limit of 8 MiB"),
        ("refcount table huge", |i| i.put32(56, u32::MAX), Open, "the refcount table has 4294967295 clusters"),
        ("refcount table over the L1 table", |i| i.put32(56, 3), Open, "the L1 table and the refcount table overlap"),
        (
            "refcount table over its block",
            |i| i.put32(56, 2),
            OpenForWriting,
            "entry 8192 of the refcount table, 0x1000100010001, is not the position",
        ),
        ("snapshots too many", |i| i.put32(60, 65_537), Open, "the image says it has 65537 internal snapshots"),
        ("snapshots huge", |i| i.put32(60, u32::MAX), Open, "the image says it has 4294967295 internal snapshots"),
        ("snapshots beyond the file", |i| i.put32(60, 65_536), Open, "internal snapshots: "),
        ("snapshot table unaligned", |i| i.put64(64, 0x60010), Open, "the snapshot table at 0x60010 is not on a cluster boundary"),
        ("snapshot table in the header", |i| i.put64(64, 0), Open, "the header and the snapshot table overlap"),
        ("snapshot table in the L1 table", |i| i.put64(64, L1 as u64), Open, "the L1 table and the snapshot table overlap"),
        ("snapshot table after the end", |i| i.put64(64, 0xa0000), Open, "the snapshot table at 0xa0000 is outside the file"),
        ("snapshot table offset huge", |i| i.put64(64, !0xffff), Open, "the snapshot table at 0xffffffffffff0000 is outside"),
        ("refcounts of 128 bits", |i| i.put32(96, 7), Open, "refcounts of 2^7 bits are wider than 64 bits"),
        ("refcount order huge", |i| i.put32(96, u32::MAX), Open, "refcounts of 2^4294967295 bits"),
        ("compression without its bit", |i| i.put(104, &[1]), Open, "compression type 1 does not fit the compression feature bit"),
        ("compression bit without a type", |i| i.put64(72, 8), Open, "compression type 0 does not fit"),
        ("compression unknown", |i| i.put64(72, 8).put(104, &[2]), Open, "compression type 2 is not supported"),
        ("feature unknown", |i| i.put64(72, 1 << 5), Open, "incompatible features that this program does not know: bit 5"),
        ("features all", |i| i.put64(72, u64::MAX), Open, "bit 62, bit 63"),
        ("raw external data without the file", |i| i.put64(88, 2), Open, "the raw-data-file feature bit is set without"),
        ("sub-clusters in small clusters", |i| i.put32(20, 9).put64(72, 16), Open, "need clusters of 2^14 bytes at least, not 2^9"),
        ("compatible features all", |i| i.put64(80, u64::MAX), Nothing, ""),
        ("marked as corrupt", |i| i.put64(72, 2), OpenForWriting, "marked as corrupt, so it can be opened for reading only"),
    ];
    refuse(Image::sound, damages);
}

#[test]
fn hostile_extensions_are_refused() {
    let damages: &[Damage] = &[
        ("extension to the end of the cluster", |i| i.extend(7, b"", 65_416), Nothing, ""),
        ("extension past the cluster", |i| i.extend(7, b"", 65_417), Open, "type 0x00000007 with 65417 bytes at 0x70 reaches past"),
        ("extension length huge", |i| i.extend(7, b"", u32::MAX), Open, "with 4294967295 bytes at 0x70 reaches past"),
        ("extension twice", |i| i.extend(7, b"a", 1).extend(7, b"b", 1), Open, "extension of type 0x00000007 is there twice"),
        ("extensions unknown", |i| i.extend(7, b"a", 1).extend(8, b"b", 1), Nothing, ""),
        ("backing format empty", |i| i.extend(0xe279_2aca, b"", 0), Open, "the format of the backing file in its header extension is"),
        ("backing format with a line break", |i| i.extend(0xe279_2aca, b"raw\n", 4), Open, "the format of the backing file in"),
        ("backing format no text", |i| i.extend(0xe279_2aca, b"\xff\xfe", 2), Open, "the format of the backing file in"),
        ("data file name empty", |i| i.extend(0x4441_5441, b"", 0), Open, "the name of the data file in its header extension is"),
        ("data file name with a zero", |i| i.extend(0x4441_5441, b"a\0b", 3), Open, "the name of the data file in its"),
        ("encryption extension", |i| i.extend(0x0537_be77, &[0; 16], 16), Open, "an encryption extension is there without encryption"),
        (
            "feature with a hostile name",
            |i| {
                let mut entry = [0; 48];
                entry[1] = 9;
                entry[2..14].copy_from_slice(b"\x1b[31m evil\n\r");
                i.put64(72, 1 << 9).extend(0x6803_f857, &entry, 48)
            },
            Open,
            "\"?[31m evil??\" (bit 9)",
        ),
        ("feature names cut short", |i| i.put64(72, 1 << 9).extend(0x6803_f857, &[0, 9, b'x'], 3), Open, "know: bit 9"),
        ("bitmaps without their extension", |i| i.put64(88, 1), Open, "its feature bit is set, but it is missing"),
        ("bitmaps too short", |i| i.put64(88, 1).extend(0x2385_2875, &[0; 16], 16), Open, "it is not 24 bytes long"),
        ("bitmaps none", |i| bitmaps(i, 0, 64, 0x50000), Open, "the number of bitmaps is not 1 to 65535"),
        ("bitmaps huge", |i| bitmaps(i, u32::MAX, 64, 0x50000), Open, "the number of bitmaps is not 1 to 65535"),
        ("bitmap directory unaligned", |i| bitmaps(i, 1, 64, 0x50008), Open, "the directory is not on a cluster boundary"),
        ("bitmap directory nowhere", |i| bitmaps(i, 1, 64, 0), Open, "the directory is not on a cluster boundary"),
        ("bitmap directory too short", |i| bitmaps(i, 3, 64, 0x50000), Open, "the size of the directory does not fit"),
        ("bitmap directory huge", |i| bitmaps(i, 1, u64::MAX, 0x50000), Open, "the size of the directory does not fit"),
        ("bitmap directory wraps around", |i| bitmaps(i, 1, 0x10000, !0xffff), Open, "the directory is outside the file"),
    ];
    refuse(Image::sound, damages);
}

fn bitmaps(image: &mut Image, count: u32, bytes: u64, at: u64) -> &mut Image {
    let mut data = [0; 24];
    data[..4].copy_from_slice(&count.to_be_bytes());
    data[8..16].copy_from_slice(&bytes.to_be_bytes());
    data[16..].copy_from_slice(&at.to_be_bytes());
    image.put64(88, 1).extend(0x2385_2875, &data, 24)
}

#[test]
fn hostile_snapshot_tables_are_refused() {
    let damages: &[Damage] = &[
        ("extra data too long", |i| i.put32(SNAPSHOTS + 36, 1025), Open, "entry 0 has 1025 bytes of extra data"),
        ("extra data huge", |i| i.put32(SNAPSHOTS + 36, u32::MAX), Open, "entry 0 has 4294967295 bytes of extra data"),
        (
            "name past the end",
            |i| {
                i.put64(64, COMPRESSED_DATA as u64).put32(COMPRESSED_DATA + 36, 0);
                i.put(COMPRESSED_DATA + 12, &[0xff; 4])
            },
            Open,
            "internal snapshots: entry 0 reaches past the end of the file",
        ),
        ("second entry past the end", |i| i.put32(60, 2).truncate(SNAPSHOTS + 64), Open, "internal snapshots: "),
        ("L1 unaligned", |i| i.put64(SNAPSHOTS, 0x70008), Open, "the L1 table of snapshot 0 at 0x70008 is not on a cluster boundary"),
        ("L1 outside", |i| i.put64(SNAPSHOTS, 0xa0000), Open, "the L1 table of snapshot 0 at 0xa0000 is outside the file"),
        ("L1 offset huge", |i| i.put64(SNAPSHOTS, !0xffff), Open, "snapshot 0 at 0xffffffffffff0000 is outside the file"),
        ("L1 entries huge", |i| i.put32(SNAPSHOTS + 8, u32::MAX), Open, "snapshot 0 has 4294967295 entries, more than the limit"),
        ("L1 entries beyond the file", |i| i.put32(SNAPSHOTS + 8, 1 << 20), Open, "the L1 table of snapshot 0 at 0x70000 is outside"),
        ("L1 in the active one", |i| i.put64(SNAPSHOTS, L1 as u64), OpenForWriting, "the L1 table and the L1 table of a snapshot overlap"),
        ("L1 in the refcount block", |i| i.put64(SNAPSHOTS, 0x20000), OpenForWriting, "refcount block"),
        ("size huge", |i| i.put64(SNAPSHOTS + 48, u64::MAX), Nothing, ""),
    ];
    refuse(Image::sound, damages);
}

#[test]
fn truncated_files_are_refused() {
    let damages: &[Damage] = &[
        ("no refcount table", |i| i.truncate(CLUSTER), Open, "is outside the file"),
        ("no refcount block", |i| i.put32(60, 0).truncate(2 * CLUSTER), Open, "the L1 table at 0x30000 is outside the file"),
        ("no L1 table", |i| i.put32(60, 0).truncate(3 * CLUSTER), Open, "the L1 table at 0x30000 is outside the file"),
        ("no L2 table", |i| i.put32(60, 0).truncate(4 * CLUSTER), Open, "L1 entry 0 points to 0x40000, outside the file"),
        ("no data", |i| i.put32(60, 0).truncate(5 * CLUSTER), Step::Read, "compressed cluster at 0x80000"),
        ("no snapshot table", |i| i.truncate(6 * CLUSTER), Open, "the snapshot table at 0x60000 is outside the file"),
        ("no L1 table of the snapshot", |i| i.truncate(7 * CLUSTER), Open, "the L1 table of snapshot 0 at 0x70000 is outside"),
        ("no compressed bytes", |i| i.truncate(8 * CLUSTER), Step::Read, "compressed cluster at 0x80000"),
    ];
    refuse(Image::sound, damages);
}

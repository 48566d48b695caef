//! Names of other files, and where they lead.

use crate::image::*;
use crate::{Damage, Step, refuse};

use Step::{Nothing, Open};

#[test]
fn hostile_names_are_not_followed() {
    let damages: &[Damage] = &[
        ("name in the header", |i| i.put64(8, 100).put32(16, 4), Open, "the name of the backing file at 0x64 is not within"),
        ("name after the first cluster", |i| i.put64(8, 0x10000).put32(16, 4), Open, "the name of the backing file at 0x10000 is not"),
        ("name far away", |i| i.put64(8, u64::MAX).put32(16, 4), Open, "the name of the backing file at 0xffffffffffffffff is not"),
        ("name empty", |i| i.put64(8, 0x1000), Open, "the name of the backing file is empty or contains a zero byte"),
        ("name with a zero", |i| i.back(b"base\0.raw", Some("raw")), Open, "the name of the backing file is empty or contains a zero"),
        ("name too long", |i| i.back(&[b'a'; 1024], Some("raw")), Open, "the name of the backing file has 1024 bytes"),
        ("name huge", |i| i.back(b"base.raw", Some("raw")).put32(16, u32::MAX), Open, "the name of the backing file has 4294967295"),
        ("name across the cluster's end", |i| i.put64(8, 0xfff0).put32(16, 100), Open, "the name of the backing file has 100 bytes"),
        ("no format", |i| i.back(b"base.raw", None), Open, "names the backing file `base.raw` without its format"),
        ("unknown format", |i| i.back(b"base.raw", Some("vmdk")), Open, "`base.raw` has an unknown image format `vmdk`"),
        ("wrong format", |i| i.back(b"base.raw", Some("qcow2")), Open, "base.raw: it is not a qcow2 image"),
        ("missing", |i| i.back(b"none", Some("raw")), Open, "none: cannot be opened for reading"),
        ("itself", |i| i.back(b"hostile.qcow2", Some("qcow2")), Open, "is in the chain twice"),
        ("itself by another name", |i| i.back(b"./x/../hostile.qcow2", Some("qcow2")), Open, "is in the chain twice"),
        ("itself as raw", |i| i.back(b"hostile.qcow2", Some("raw")), Open, "is in the chain twice"),
        ("absolute", |i| i.back(b"/secret", Some("raw")), Open, "/secret lies outside the allowed directories (/"),
        ("upwards", |i| i.back(b"../secret", Some("raw")), Open, "/secret lies outside the allowed directories"),
        ("upwards in the middle", |i| i.back(b"a/../../secret", Some("raw")), Open, "/secret lies outside the allowed directories"),
        ("above the root", |i| i.back(b"../../../x", Some("raw")), Open, "leads out of the file system"),
        ("the directory itself", |i| i.back(b".", Some("raw")), Open, "lies outside the allowed directories"),
        ("a sibling of the directory", |i| i.back(b"/images2/a", Some("raw")), Open, "/images2/a lies outside the allowed"),
        ("JSON", |i| i.back(b"json:{\"driver\":\"file\"}", Some("raw")), Open, "is not a plain path; URLs, protocols and JSON"),
        ("NBD", |i| i.back(b"nbd://localhost/x", Some("raw")), Open, "`nbd://localhost/x` is not a plain path"),
        ("HTTP", |i| i.back(b"https://example.org/x", Some("raw")), Open, "`https://example.org/x` is not a plain path"),
        ("a directory as FAT", |i| i.back(b"fat:rw:/", Some("raw")), Open, "`fat:rw:/` is not a plain path"),
        ("a file URL", |i| i.back(b"file:///secret", Some("raw")), Open, "`file:///secret` is not a plain path"),
        ("a colon later on", |i| i.back(b"./fat:x", Some("raw")), Open, "fat:x: cannot be opened for reading"),
        ("data file unnamed", |i| i.put64(72, 4).put32(60, 0), Open, "keeps its data in an external data file, which must be allowed"),
        ("data file", |i| data_file(i, b"base.raw"), Open, "an external data file (\"base.raw\"), which must be allowed by name"),
        ("data file outside", |i| data_file(i, b"/secret"), Open, "its external data file is not opened: /secret lies outside"),
        ("data file as JSON", |i| data_file(i, b"json:{}"), Open, "its external data file is not opened: `json:{}` is not a plain"),
        ("data file and snapshots", |i| data_file(i, b"x").put32(60, 1), Open, "internal snapshots contradict an external data file"),
        (
            "raw data file and backing file",
            |i| data_file(i, b"x").put64(88, 2).back(b"base.raw", Some("raw")),
            Open,
            "contradicts a backing",
        ),
        ("a data file's name without the bit", |i| i.extend(0x4441_5441, b"/secret", 7), Nothing, ""),
    ];
    refuse(Image::sound, damages);
}

fn data_file<'a>(image: &'a mut Image, name: &[u8]) -> &'a mut Image {
    image.put64(72, 4).put32(60, 0).extend(0x4441_5441, name, name.len() as u32)
}

//! `snapfence image info`, in the shape of QEMU's `ImageInfo`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use snapfence_image_format::chain::{self, Format, MAX_DEPTH};
use snapfence_image_format::qcow2::{Compression, Header};
use snapfence_image_format::raw::Raw;
use snapfence_image_format::storage::uring::{UringEnvironment, UringFile};
use snapfence_image_format::storage::{CacheMode, Location, Storage as _};

use super::{Named, block_on};
use crate::commands::Session;
use crate::render;

/// QEMU's `ImageInfo`, as far as a header tells it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ImageInfo {
    filename: PathBuf,
    format: &'static str,
    virtual_size: u64,
    actual_size: u64,
    dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<FormatSpecific>,
    /// Ours: QEMU lists them.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot_count: Option<u32>,
}

#[derive(Debug, Serialize)]
struct FormatSpecific {
    #[serde(rename = "type")]
    kind: &'static str,
    data: Qcow2Info,
}

/// QEMU's `ImageInfoSpecificQCow2`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Info {
    compat: &'static str,
    compression_type: &'static str,
    refcount_bits: u32,
    lazy_refcounts: bool,
    extended_l2: bool,
    corrupt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
}

pub(super) fn run(session: &Session, image: Named, backing_chain: bool) -> Result<()> {
    let infos = block_on(collect(image, backing_chain))?;
    if backing_chain {
        session.print(&infos, |infos| text(infos))
    } else {
        session.print(&infos[0], |info| text(std::slice::from_ref(info)))
    }
}

/// The image, and with `whole_chain` those beneath, the top first.
pub(super) async fn collect(image: Named, whole_chain: bool) -> Result<Vec<ImageInfo>> {
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((image.location(), image.format));
    while let Some((location, format)) = next.take() {
        let path = location.path();
        if infos.len() == MAX_DEPTH {
            bail!("{} lies beneath {MAX_DEPTH} layers, which is the limit", path.display());
        }
        let file = open(&location).await?;
        if !seen.insert(file.identity()) {
            bail!("{} is in the chain twice: a chain cannot lead back to itself", path.display());
        }
        let named = || path.display().to_string();
        let actual_size = file.allocated_bytes().await.with_context(named)?;
        infos.push(match format {
            Format::Raw => ImageInfo {
                filename: path.clone(),
                format: format.name(),
                virtual_size: Raw::<UringEnvironment>::open(file, false).await.with_context(named)?.virtual_size(),
                actual_size,
                dirty_flag: false,
                cluster_size: None,
                backing_filename: None,
                full_backing_filename: None,
                backing_filename_format: None,
                format_specific: None,
                snapshot_count: None,
            },
            Format::Qcow2 => {
                let header = Header::read(&file).await.with_context(named)?;
                if whole_chain {
                    next = chain::backing(&path, &header, &image.allowed).with_context(named)?;
                }
                of_header(path, actual_size, &header)
            }
        });
        if !whole_chain {
            break;
        }
    }
    Ok(infos)
}

pub(super) async fn open(location: &Location) -> Result<UringFile> {
    // Through the page cache: what is read is little, and a device whose sectors are large needs no exception.
    let file = chain::open_file(&UringEnvironment, location, false, CacheMode::Buffered).await;
    file.with_context(|| location.path().display().to_string())
}

fn of_header(path: PathBuf, actual_size: u64, header: &Header) -> ImageInfo {
    let backing = header.backing();
    let data = Qcow2Info {
        compat: if header.version() == 2 { "0.10" } else { "1.1" },
        compression_type: match header.compression() {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        },
        refcount_bits: header.geometry().refcount_bits(),
        lazy_refcounts: header.lazy_refcounts(),
        extended_l2: header.geometry().extended_l2(),
        corrupt: header.is_corrupt(),
        data_file: header.data_file_name().map(|name| name.to_string_lossy().into_owned()),
        data_file_raw: header.has_data_file().then(|| header.data_file_is_raw()),
    };
    ImageInfo {
        format: Format::Qcow2.name(),
        virtual_size: header.virtual_size(),
        actual_size,
        dirty_flag: header.is_dirty(),
        cluster_size: Some(header.geometry().cluster_bytes()),
        backing_filename: backing.map(|backing| backing.name.to_string_lossy().into_owned()),
        full_backing_filename: backing.zip(path.parent()).map(|(backing, folder)| folder.join(&backing.name)),
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        format_specific: Some(FormatSpecific { kind: Format::Qcow2.name(), data }),
        snapshot_count: Some(header.snapshot_count()),
        filename: path,
    }
}

pub(super) fn text(infos: &[ImageInfo]) -> String {
    infos.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn one(info: &ImageInfo) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name}: {value}");
    };
    line("image", info.filename.display().to_string());
    line("format", info.format.to_owned());
    line("virtual size", format!("{} ({} bytes)", render::bytes(info.virtual_size), info.virtual_size));
    line("allocated", render::bytes(info.actual_size));
    if let Some(name) = &info.backing_filename {
        line("backing file", format!("{name} ({})", info.backing_filename_format.as_deref().unwrap_or("format not stated")));
    }
    if let (Some(cluster_size), Some(FormatSpecific { data, .. })) = (info.cluster_size, &info.format_specific) {
        let unit = if data.extended_l2 { format!(", sub-clusters of {}", render::bytes(cluster_size / 32)) } else { String::new() };
        line("clusters", render::bytes(cluster_size) + &unit);
        line("compatibility", data.compat.to_owned());
        line("refcount width", format!("{} bits{}", data.refcount_bits, if data.lazy_refcounts { ", lazy" } else { "" }));
        line("compression", data.compression_type.to_owned());
        if let Some(name) = &data.data_file {
            line("external data file", name.clone());
        }
        if let Some(count) = info.snapshot_count.filter(|count| *count > 0) {
            line("internal snapshots", count.to_string());
        }
        if info.dirty_flag {
            line("dirty", "reference counts may be wrong; `snapfence image check` tells".to_owned());
        }
        if data.corrupt {
            line("corrupt", "marked as corrupt, so it is opened for reading only".to_owned());
        }
    }
    text
}

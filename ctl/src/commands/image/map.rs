//! `snapfence image map`, in the shape of `qemu-img map --output=json`.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::Serialize;
use snapfence_image_format::chain::{ChainLayer, ChainOptions, Format, open_chain, open_chain_unlocked};
use snapfence_image_format::extent::{Extent, ExtentList, Mapping};
use snapfence_image_format::storage::CacheMode;
use snapfence_image_format::storage::uring::UringEnvironment;
use snapfence_image_format::units::{GuestOffset, GuestRange, HostOffset};

use super::{Named, block_on};
use crate::commands::{Session, output};
use crate::render::{Edge, Table};

/// The disk is mapped in pieces of this size, so that memory does not grow with it.
const WINDOW_BYTES: u64 = 1 << 30;

/// A run of bytes with one origin. QEMU's `MapEntry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Entry {
    start: u64,
    length: u64,
    /// Layers above the one that decides.
    depth: usize,
    /// Whether that layer has an entry for it, even if only to say that it is zero.
    present: bool,
    /// Whether it reads as zeros.
    zero: bool,
    /// Whether bytes have to be read.
    data: bool,
    compressed: bool,
    /// Where they are in that layer's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Entry {
    fn continues_with(&self, next: &Self) -> bool {
        let flags = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        let adjoining = match (self.offset, next.offset) {
            (Some(offset), Some(after)) => offset + self.length == after,
            (None, None) => true,
            _ => false,
        };
        flags(self) == flags(next) && adjoining && self.start + self.length == next.start
    }
}

/// One layer as the map needs it.
struct Source {
    open: ChainLayer<UringEnvironment>,
    /// A raw image's file once more, to ask for its holes.
    holes: Option<File>,
}

pub(super) fn run(session: &Session, image: Named) -> Result<()> {
    let json = session.json;
    block_on(async move {
        let options = ChainOptions { cache: CacheMode::Buffered, ..ChainOptions::reading(&image.allowed) };
        let mut sources = Vec::new();
        let location = image.location();
        let layers = if image.shared {
            open_chain_unlocked(&UringEnvironment, &location, image.format, options).await?
        } else {
            open_chain(&UringEnvironment, &location, image.format, options).await?
        };
        for open in layers {
            let holes = match open.format {
                Format::Raw => Some(File::open(&open.path).with_context(|| format!("cannot open {}", open.path.display()))?),
                Format::Qcow2 => None,
            };
            sources.push(Source { open, holes });
        }
        let names: Vec<PathBuf> = sources.iter().rev().map(|source| source.open.path.clone()).collect();
        let mut printer = Printer::new(json, names);
        map(&sources, |entry| printer.add(entry)).await?;
        printer.finish()
    })
}

/// Walks over the whole disk.
async fn map(sources: &[Source], mut found: impl FnMut(Entry) -> Result<()>) -> Result<()> {
    let size = sources.last().context("the chain has no layers")?.open.layer.virtual_size();
    let mut pending: Option<Entry> = None;
    let mut start = 0;
    while start < size {
        let length = WINDOW_BYTES.min(size - start);
        for entry in window(sources, GuestRange::new(GuestOffset::new(start), length)).await? {
            match &mut pending {
                Some(last) if last.continues_with(&entry) => last.length += entry.length,
                _ => {
                    if let Some(last) = pending.replace(entry) {
                        found(last)?;
                    }
                }
            }
        }
        start += length;
    }
    pending.map_or(Ok(()), found)
}

/// The entries of one part of the disk, in order.
async fn window(sources: &[Source], range: GuestRange) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut open = vec![range];
    for (depth, source) in sources.iter().rev().enumerate() {
        let layer = &source.open.layer;
        let beneath = sources.len().checked_sub(depth + 2).map(|index| &sources[index].open.layer);
        let mut extents = ExtentList::new();
        let mut below = Vec::new();
        for range in open {
            extents.clear();
            layer.map(range, &mut extents).await.with_context(|| source.open.path.display().to_string())?;
            for extent in extents.as_slice() {
                match extent.mapping {
                    Mapping::Unallocated => {
                        // What lies past the end of the layer beneath is decided here: it reads as zeros.
                        let end = GuestOffset::new(beneath.map_or(0, |layer| layer.virtual_size()))
                            .max(extent.range.start)
                            .min(extent.range.end());
                        let deeper = GuestRange::between(extent.range.start, end);
                        if !deeper.is_empty() {
                            below.push(deeper);
                        }
                        let here = GuestRange::between(end, extent.range.end());
                        if !here.is_empty() {
                            entries.push(entry(here, depth, false, true, None));
                        }
                    }
                    Mapping::Zero => entries.push(entry(extent.range, depth, true, true, None)),
                    Mapping::Compressed => entries.push(Entry { compressed: true, ..entry(extent.range, depth, true, false, None) }),
                    Mapping::Data { host, .. } => data(source, *extent, host, depth, &mut entries)?,
                }
            }
        }
        open = below;
        if open.is_empty() {
            break;
        }
    }
    entries.sort_unstable_by_key(|entry| entry.start);
    Ok(entries)
}

fn entry(range: GuestRange, depth: usize, present: bool, zero: bool, offset: Option<u64>) -> Entry {
    Entry { start: range.start.get(), length: range.len, depth, present, zero, data: !zero, compressed: false, offset }
}

/// Data as entries; for a raw image its holes apart.
fn data(source: &Source, extent: Extent, host: HostOffset, depth: usize, entries: &mut Vec<Entry>) -> Result<()> {
    let Some(file) = &source.holes else {
        entries.push(entry(extent.range, depth, true, false, Some(host.get())));
        return Ok(());
    };
    let end = extent.range.end().get();
    let mut at = extent.range.start.get();
    while at < end {
        let (next, zero) =
            extent_of_file(file, at, end).with_context(|| format!("cannot find the holes of {}", source.open.path.display()))?;
        entries.push(entry(GuestRange::between(GuestOffset::new(at), GuestOffset::new(next)), depth, true, zero, Some(at)));
        at = next;
    }
    Ok(())
}

/// Where the data or the hole at `at` ends, `end` at most, and whether it is a hole.
fn extent_of_file(file: &File, at: u64, end: u64) -> Result<(u64, bool), Errno> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) if data > at => Ok((data.min(end), true)),
        Ok(_) => Ok((seek(file, SeekFrom::Hole(at))?.clamp(at + 1, end), false)),
        Err(Errno::NXIO) => Ok((end, true)),
        // Block devices, and file systems that cannot tell.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((end, false)),
        Err(error) => Err(error),
    }
}

/// Prints entries as they come, for programs, or those with data in the end, for people.
struct Printer {
    json: bool,
    first: bool,
    /// The files of the layers, the top first.
    names: Vec<PathBuf>,
    table: Table,
    text: String,
}

impl Printer {
    fn new(json: bool, names: Vec<PathBuf>) -> Self {
        let columns =
            [("OFFSET", Edge::Right), ("LENGTH", Edge::Right), ("MAPPED TO", Edge::Right), ("DEPTH", Edge::Right), ("FILE", Edge::Left)];
        Self { json, first: true, names, table: Table::new(&columns), text: String::new() }
    }

    fn add(&mut self, entry: Entry) -> Result<()> {
        if !self.json {
            if entry.data {
                let place = entry.offset.map_or_else(|| "compressed".to_owned(), |offset| format!("{offset:#x}"));
                let name = self.names.get(entry.depth).map(PathBuf::as_path).unwrap_or(Path::new("")).display().to_string();
                self.table.row([format!("{:#x}", entry.start), format!("{:#x}", entry.length), place, entry.depth.to_string(), name]);
            }
            return Ok(());
        }
        let start = if std::mem::take(&mut self.first) { "[" } else { ",\n" };
        let object = serde_json::to_string(&entry).context("an entry cannot be written as JSON")?;
        // Writing to a string cannot fail.
        let _ = write!(self.text, "{start}{object}");
        if self.text.len() > 64 << 10 {
            output(&std::mem::take(&mut self.text))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        if !self.json {
            return output(&self.table.text());
        }
        if self.first {
            self.text.push('[');
        }
        self.text.push_str("]\n");
        output(&self.text)
    }
}

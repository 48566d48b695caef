//! One case: a chain of images, written by turns.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::path::PathBuf;

use snapfence_image_format::chain::Format;
use snapfence_image_format::storage::{CacheMode, Chance};

use crate::disk::Disk;
use crate::geometry::{Geometry, size};
use crate::operation::{Area, Fill, Operation};
use crate::ours::{self, Opening};
use crate::qemu::{Folder, file_name};

/// What a run has done, for people.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals(BTreeMap<&'static str, u64>);

impl Totals {
    fn add(&mut self, what: &'static str, count: usize) {
        *self.0.entry(what).or_default() += count as u64;
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        for (what, count) in other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }
}

/// One image of the chain.
#[derive(Clone, Debug)]
struct Image {
    path: PathBuf,
    format: Format,
    /// `None`: a raw image.
    geometry: Option<Geometry>,
    /// Guest data is in a file of its own, and only QEMU writes to such images.
    data_file: Option<PathBuf>,
}

struct Case {
    folder: Folder,
    chance: Chance,
    totals: Totals,
    chain: Vec<Image>,
    disk: Disk,
    cache: CacheMode,
    /// Internal snapshots of the top.
    snapshots: Vec<(String, Disk)>,
}

/// Runs a case.
///
/// # Panics
/// If anything is not as it must be.
pub(crate) fn run(seed: u64) -> Totals {
    let mut chance = Chance::new(seed);
    let cache = if chance.happens(1, 2) { CacheMode::Direct } else { CacheMode::Buffered };
    let mut case = Case {
        folder: Folder::new(!seed.is_multiple_of(5)),
        chance,
        totals: Totals::default(),
        chain: Vec::new(),
        disk: Disk::default(),
        cache,
        snapshots: Vec::new(),
    };
    let layers = 1 + case.chance.index(4);
    for layer in 0..layers {
        case.add_image();
        let turns = if layer + 1 == layers { 1 + case.chance.index(4) } else { case.chance.index(2) };
        for _ in 0..turns {
            case.turn();
        }
        if layer + 1 == layers || case.chance.happens(1, 4) {
            case.read_by_qemu();
        }
        case.compare_snapshots();
    }
    case.totals.add("cases", 1);
    case.totals.add("layers", layers);
    case.totals
}

impl Case {
    fn top(&self) -> &Image {
        self.chain.last().expect("there is a layer")
    }

    fn top_name(&self) -> String {
        file_name(&self.top().path).to_owned()
    }

    fn context(&self) -> String {
        let chain: Vec<_> = self.chain.iter().map(|image| format!("{} {:?}", file_name(&image.path), image.geometry)).collect();
        format!("chain {chain:?}, {:?}, disk of {} bytes", self.cache, self.disk.len())
    }

    /// Puts a new image on top of the chain, or begins it.
    fn add_image(&mut self) {
        let chance = &mut self.chance;
        let number = self.chain.len();
        let size = if number > 0 && chance.happens(1, 2) { self.disk.len() } else { size(chance) };
        let kind = if number == 0 { chance.below(8) } else { 7 };
        match kind {
            0 | 1 => self.add_raw(size),
            2 => self.add_converted(size),
            3 => self.add_with_data_file(size),
            _ => self.add_qcow2(size),
        }
        self.snapshots.clear();
    }

    fn push(&mut self, name: &str, geometry: Option<Geometry>, disk: Disk) {
        let format = if geometry.is_some() { Format::Qcow2 } else { Format::Raw };
        self.chain.push(Image { path: self.folder.path(name), format, geometry, data_file: None });
        self.disk = disk;
    }

    /// A raw image, sometimes with bytes already and sometimes not of whole sectors.
    fn add_raw(&mut self, size: u64) {
        let mut bytes = vec![0; size as usize];
        if self.chance.happens(1, 2) {
            let half = bytes.len() / 1024 * 512;
            Fill::Seed(self.chance.number()).put(&mut bytes[half..]);
        }
        let disk = Disk::new(bytes);
        disk.store(&self.folder.path("0.raw"));
        self.push("0.raw", None, disk);
        self.totals.add("raw bases", 1);
    }

    /// A qcow2 image all of whose clusters are compressed.
    fn add_converted(&mut self, size: u64) {
        let geometry = Geometry { preallocates: false, ..Geometry::new(&mut self.chance, false) };
        let mut bytes = vec![0; size as usize];
        for piece in bytes.chunks_mut(3000) {
            // Some compress well, some not at all, some are zeros.
            match self.chance.below(3) {
                0 => Fill::Seed(self.chance.number()).put(piece),
                1 => piece.fill(self.chance.below(256) as u8),
                _ => {}
            }
        }
        let disk = Disk::new(bytes);
        disk.store(&self.folder.path("source.raw"));
        self.folder.qemu_img(&format!("convert -c -f raw -O qcow2 -o {} source.raw 0.qcow2", geometry.for_qemu()));
        self.push("0.qcow2", Some(geometry), disk);
        self.totals.add("compressed bases", 1);
    }

    fn add_with_data_file(&mut self, size: u64) {
        let geometry = Geometry { version: 3, preallocates: false, ..Geometry::new(&mut self.chance, false) };
        let raw = if self.chance.happens(1, 2) { "on" } else { "off" };
        let options = geometry.for_qemu();
        self.folder.qemu_img(&format!("create -q -f qcow2 -o {options},data_file=0.data,data_file_raw={raw} 0.qcow2 {size}"));
        self.push("0.qcow2", Some(geometry), Disk::new(vec![0; size as usize]));
        let data_file = self.folder.path("0.data");
        if let Some(image) = self.chain.last_mut() {
            image.data_file = Some(data_file);
        }
        self.totals.add("external data files", 1);
    }

    /// A qcow2 image of QEMU's or of ours, above the present top if there is one.
    fn add_qcow2(&mut self, size: u64) {
        let geometry = Geometry::new(&mut self.chance, !self.chain.is_empty());
        let name = format!("{}.qcow2", self.chain.len());
        let below = self.chain.last().map(|image| (file_name(&image.path).to_owned(), image.format.name()));
        if self.chance.happens(1, 2) {
            let backing = below.as_ref().map(|(name, format)| (name.as_str(), *format));
            ours::create(&self.folder.path(&name), geometry.for_us(size, backing));
            self.totals.add("images of ours", 1);
        } else {
            let backing = below.map(|(name, format)| format!("-b {name} -F {format}")).unwrap_or_default();
            self.folder.qemu_img(&format!("create -q -f qcow2 -o {} {backing} {name} {size}", geometry.for_qemu()));
            self.totals.add("images of QEMU's", 1);
        }
        let disk = self.disk.overlaid(size);
        self.push(&name, Some(geometry), disk);
    }

    /// Somebody writes to the top.
    fn turn(&mut self) {
        let image = self.top().clone();
        let cluster = image.geometry.as_ref().map_or(4096, Geometry::cluster);
        let area = Area::new(&mut self.chance, self.disk.len(), cluster);
        let is_lazy = image.geometry.as_ref().is_some_and(|geometry| geometry.lazy_refcounts);
        if is_lazy && image.data_file.is_none() && self.chance.happens(1, 3) {
            self.crash_qemu(&image, area);
            self.write_by_us(area);
        } else if self.chance.happens(1, 2) && image.data_file.is_none() {
            self.write_by_us(area);
        } else {
            self.write_by_qemu(&image, area);
        }
        if self.chance.happens(1, 5) {
            self.grow(&image);
        }
        let takes_snapshots = image.data_file.is_none() && image.geometry.as_ref().is_some_and(|geometry| geometry.refcount_bits >= 16);
        if takes_snapshots && self.chance.happens(1, 3) {
            let name = format!("s{}", self.snapshots.len());
            self.folder.qemu_img(&format!("snapshot -c {name} {}", file_name(&image.path)));
            self.snapshots.push((name, self.disk.clone()));
            self.totals.add("internal snapshots", 1);
        }
    }

    fn write_by_qemu(&mut self, image: &Image, area: Area) {
        // Compressed sub-clusters do not exist, but compressed clusters beside them do. External data files hold none.
        let compresses = image.geometry.is_some() && image.data_file.is_none();
        let operations = if compresses && self.chance.happens(1, 3) {
            area.compressed_for_qemu(&mut self.chance)
        } else {
            area.for_qemu(&mut self.chance)
        };
        let done = self.folder.qemu_io(file_name(&image.path), image.format, &operations);
        for operation in &done {
            self.disk.apply(operation);
        }
        self.totals.add("operations of QEMU's", done.len());
        let actual = self.opening().read();
        self.settle(&actual, "our reading after QEMU's writing", &done);
    }

    /// QEMU writes, and is killed before it has brought the refcounts up to date.
    fn crash_qemu(&mut self, image: &Image, area: Area) {
        let operations = area.for_qemu(&mut self.chance);
        self.folder.killed_qemu_io(file_name(&image.path), &operations);
        for operation in &operations {
            self.disk.apply(operation);
        }
        self.totals.add("crashes of QEMU's", 1);
    }

    /// Somebody makes the disk larger.
    fn grow(&mut self, image: &Image) {
        const MOST: u64 = 64 << 20;
        let Some(geometry) = image.geometry.as_ref().filter(|_| image.data_file.is_none()) else { return };
        // Version 2 can hide nothing that lies beneath, and does not know how large the disk of a snapshot is.
        let can_grow = geometry.version == 3 || (self.chain.len() == 1 && self.snapshots.is_empty());
        let size = (self.disk.len() + 512 * (1 + self.chance.below(1 << 13))).min(MOST);
        if !can_grow || size <= self.disk.len() {
            return;
        }
        let by_us = self.chance.happens(1, 2);
        if by_us {
            self.opening().grow(size);
        } else {
            self.folder.qemu_img(&format!("resize -q -f qcow2 {} {size}", file_name(&image.path)));
        }
        self.disk.grow(size);
        self.totals.add("disks grown", 1);
        let actual = self.opening().read();
        self.settle(&actual, if by_us { "our reading after growing" } else { "our reading after QEMU's growing" }, &[]);
    }

    fn write_by_us(&mut self, area: Area) {
        let count = 1 + self.chance.index(40);
        let operations: Vec<_> = (0..count).map(|_| area.for_us(&mut self.chance)).collect();
        for operation in &operations {
            self.disk.apply(operation);
        }
        self.totals.add("operations of ours", operations.len());
        let chance = self.chance.fork();
        let actual = self.opening().write(operations.clone(), chance);
        self.settle(&actual, "our reading before closing", &operations);
        let actual = self.opening().read();
        self.settle(&actual, "our reading after opening again", &operations);
        if self.chance.happens(1, 2) {
            self.read_by_qemu();
        }
    }

    fn settle(&mut self, actual: &[u8], what: &str, operations: &[Operation]) {
        if let Err(difference) = self.disk.settle(actual) {
            panic!("{what}: {difference}; {}, after {operations:?}", self.context());
        }
    }

    fn opening(&self) -> Opening {
        let top = self.top();
        let data_files = self.chain.iter().filter_map(|image| image.data_file.clone()).collect();
        Opening { top: top.path.clone(), format: top.format, data_files, cache: self.cache }
    }

    /// QEMU reads what the model says, and finds nothing wrong.
    fn read_by_qemu(&mut self) {
        self.disk.store(&self.folder.path("model.raw"));
        let (name, format) = (self.top_name(), self.top().format);
        self.folder.compare((&name, format), ("model.raw", Format::Raw));
        if format == Format::Qcow2 {
            self.folder.check(&name);
        }
        self.totals.add("comparisons by QEMU", 1);
    }

    fn compare_snapshots(&mut self) {
        let name = self.top_name();
        for (snapshot, disk) in std::mem::take(&mut self.snapshots) {
            self.folder.qemu_img(&format!("convert -l snapshot.name={snapshot} -f qcow2 -O raw {name} snapshot.raw"));
            let bytes = std::fs::read(self.folder.path("snapshot.raw")).expect("converted");
            // QEMU reads a snapshot with the size that the disk has now.
            let bytes = &bytes[..(disk.len() as usize).min(bytes.len())];
            if let Err(difference) = disk.clone().settle(bytes) {
                panic!("snapshot {snapshot}: {difference}; {}", self.context());
            }
        }
    }
}

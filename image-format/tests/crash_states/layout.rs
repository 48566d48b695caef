//! Stacks that are so small that all disks that a crash may leave can be looked at.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use snapfence_image_format::buffer::AlignedBuffer;
use snapfence_image_format::chain::{AllowedDirectories, ChainOptions, Format, open_chain};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, Header, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::kept::{MemoryKeeper, TestKeeper};
use snapfence_image_format::storage::simulated::SimulatedEnvironment;
use snapfence_image_format::storage::{Access, CacheMode, Environment, Location, Sharing, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange, SECTOR_BYTES};

use crate::course::Step;
use crate::pattern::{self, SECTOR, Value};

pub(crate) type SimulatedStack = Stack<SimulatedEnvironment>;

/// Where the images are.
pub(crate) const FOLDER: &str = "/images";
/// What the disk has at first where the first image has something.
pub(crate) const FIRST: Value = Value(1);
/// What the raw image has that lies beneath all others.
pub(crate) const BASE: Value = Value(2);

/// A kind of stack.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) sectors: u64,
    /// Whether a raw image lies beneath all others.
    pub(crate) raw_base: bool,
    /// Of all images.
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) extended_l2: bool,
    /// Sectors that the first image has at the beginning.
    pub(crate) filled: std::ops::Range<u64>,
    /// Sectors of the first image that have no place at the beginning.
    pub(crate) new: std::ops::Range<u64>,
    /// The same, beneath a table of which there is none either, if the disk has several.
    pub(crate) far: std::ops::Range<u64>,
}

/// Clusters of one sector, so that everything but the data lies in tables; clusters with sub-clusters of two sectors, as our own overlays have
/// them in large, so that a write of one sector brings another along from beneath.
pub(crate) const LAYOUTS: [Layout; 2] = [
    Layout {
        name: "clusters of 512 bytes",
        sectors: 72,
        raw_base: false,
        version: 3,
        cluster_bits: 9,
        refcount_bits: 16,
        extended_l2: false,
        filled: 0..2,
        new: 2..3,
        far: 65..67,
    },
    Layout {
        name: "sub-clusters of 1 KiB over a raw image",
        sectors: 72,
        raw_base: true,
        version: 3,
        cluster_bits: 15,
        refcount_bits: 16,
        extended_l2: true,
        filled: 0..2,
        new: 5..6,
        far: 64..66,
    },
];

impl Layout {
    /// The alphabet of short histories.
    pub(crate) fn letters(&self) -> Vec<Step> {
        vec![
            Step::Write(self.filled.clone()),
            Step::Write(self.new.clone()),
            Step::Write(self.far.clone()),
            Step::Discard(0..self.cluster_sectors()),
            Step::Zero(0..self.new.end),
            Step::Flush,
            Step::Snapshot,
        ]
    }

    fn cluster_sectors(&self) -> u64 {
        (1_u64 << self.cluster_bits) / SECTOR_BYTES
    }

    /// What each sector has at the beginning.
    pub(crate) fn values(&self) -> impl Iterator<Item = Value> {
        let beneath = if self.raw_base { BASE } else { Value::ZERO };
        (0..self.sectors).map(move |sector| if self.filled.contains(&sector) { FIRST } else { beneath })
    }

    fn options(&self, backing: Option<(String, Format)>) -> CreateOptions {
        CreateOptions {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_bits: self.refcount_bits,
            extended_l2: self.extended_l2,
            backing: backing.map(|(name, format)| (name.into(), format.name().to_owned())),
            ..CreateOptions::standalone(self.sectors * SECTOR_BYTES)
        }
    }

    /// Makes the stack, with what it has at the beginning.
    pub(crate) async fn make(&self, environment: &SimulatedEnvironment) {
        if self.raw_base {
            let mut bytes = vec![0; (self.sectors * SECTOR_BYTES) as usize];
            (0..).zip(bytes.chunks_exact_mut(SECTOR)).for_each(|(sector, bytes)| pattern::fill(BASE, sector, bytes));
            environment.put(format!("{FOLDER}/base"), &bytes);
        }
        let file = self.new_file(environment, 0).await.expect("a new image");
        file.flush().await.expect("durable");
        drop(file);
        let stack = Opened::open(environment, 0).await.expect("a new image opens").stack;
        write(&stack, self.filled.clone(), FIRST).await.expect("written");
        stack.close().await.expect("closed");
    }

    async fn new_file(&self, environment: &SimulatedEnvironment, number: usize) -> io::Result<<SimulatedEnvironment as Environment>::File> {
        let backing = match number {
            0 if self.raw_base => Some(("base".to_owned(), Format::Raw)),
            0 => None,
            _ => Some((image_name(number - 1), Format::Qcow2)),
        };
        let location = Location::Trusted(image_path(number).into());
        let file = environment.open(&location, Access::CreateNew, CacheMode::Direct).await?;
        Qcow2::<SimulatedEnvironment>::create(&file, &self.options(backing)).await.map_err(io::Error::other)?;
        Ok(file)
    }

    /// Makes an overlay and gets it ready, as the daemon does.
    ///
    /// # Errors
    /// Whatever fails; what has been made so far stays.
    pub(crate) async fn make_overlay(
        &self,
        environment: &SimulatedEnvironment,
        number: usize,
        keeper: &Arc<dyn MemoryKeeper>,
    ) -> io::Result<Arc<Layer<SimulatedEnvironment>>> {
        let file = self.new_file(environment, number).await?;
        file.flush().await?;
        drop(file);
        let location = Location::Trusted(image_path(number).into());
        let file = environment.open(&location, Access::Write, CacheMode::Direct).await?;
        file.set_sharing(Sharing::Writer).await.expect("nobody uses it");
        let header = Header::read(&file).await.map_err(io::Error::other)?;
        let image = Qcow2::open_with_header(file, header, OpenOptions::writing()).await.map_err(io::Error::other)?;
        let layer = Layer::Qcow2(image);
        layer.keep(keeper).await.map_err(io::Error::other)?;
        layer.warm().await.map_err(io::Error::other)?;
        layer.flush().await.map_err(io::Error::other)?;
        environment.flush_directory(FOLDER.as_ref()).await?;
        Ok(Arc::new(layer))
    }

    /// Number of the layer that image `number` is, from the base.
    pub(crate) fn layer(&self, number: usize) -> usize {
        number + usize::from(self.raw_base)
    }
}

pub(crate) fn image_name(number: usize) -> String {
    format!("{number}.qcow2")
}

pub(crate) fn image_path(number: usize) -> String {
    format!("{FOLDER}/{}", image_name(number))
}

/// A stack in use.
pub(crate) struct Opened {
    pub(crate) stack: Arc<SimulatedStack>,
    pub(crate) domain: Arc<FenceDomain>,
    pub(crate) keeper: Arc<dyn MemoryKeeper>,
}

impl Opened {
    /// Opens the stack whose top is image `top` as a daemon does after the machine has been started.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) async fn open(environment: &SimulatedEnvironment, top: usize) -> Result<Self, String> {
        Self::open_for(environment, top, true).await
    }

    /// As [`open`](Self::open), perhaps for reading only.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) async fn open_for(environment: &SimulatedEnvironment, top: usize, writable: bool) -> Result<Self, String> {
        let keeper: Arc<dyn MemoryKeeper> = Arc::<TestKeeper>::default();
        let allowed = AllowedDirectories::default().with_directory_of(&PathBuf::from(image_path(top)));
        let options = ChainOptions { writable, keeper: Some(&keeper), ..ChainOptions::reading(&allowed) };
        let location = Location::Trusted(image_path(top).into());
        let layers = open_chain(environment, &location, Format::Qcow2, options).await.map_err(|error| error.to_string())?;
        let clock = environment.clone();
        let domain = FenceDomain::new(move || clock.now());
        let layers = layers.into_iter().map(|layer| layer.layer).collect();
        Ok(Self { stack: Stack::new(environment.clone(), &domain, layers, !writable), domain, keeper })
    }
}

/// The sectors as bytes of the disk.
pub(crate) fn range(sectors: &std::ops::Range<u64>) -> GuestRange {
    GuestRange::between(GuestOffset::new(sectors.start * SECTOR_BYTES), GuestOffset::new(sectors.end * SECTOR_BYTES))
}

/// Writes one value to some sectors.
///
/// # Errors
/// If the stack fails.
pub(crate) async fn write(stack: &SimulatedStack, sectors: std::ops::Range<u64>, value: Value) -> Result<(), LayerError> {
    let range = range(&sectors);
    let mut bytes = AlignedBuffer::zeroed(range.len as usize);
    sectors.zip(bytes.chunks_exact_mut(SECTOR)).for_each(|(sector, bytes)| pattern::fill(value, sector, bytes));
    stack.view().write(range.start, bytes.into()).await.0
}

/// What each sector of a stack has.
///
/// # Errors
/// If it cannot be read, or a sector has what nobody wrote.
pub(crate) async fn read_all(stack: &SimulatedStack) -> Result<Vec<Value>, String> {
    let bytes = AlignedBuffer::zeroed(stack.virtual_size() as usize);
    let (result, buffer) = stack.view().read(GuestOffset::ZERO, bytes.into()).await;
    result.map_err(|error| format!("cannot read: {error}"))?;
    let bytes = buffer.into_owned();
    let value = |(sector, bytes): (u64, &[u8])| {
        pattern::identify(sector, bytes).ok_or_else(|| format!("sector {sector} is {}", pattern::describe(sector, bytes)))
    };
    (0..).zip(bytes.chunks_exact(SECTOR)).map(value).collect()
}

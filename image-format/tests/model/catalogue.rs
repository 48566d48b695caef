//! What the daemon's catalogue would remember of a group of disks, and opening disks by it.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::chain::{AllowedDirectories, ChainLayer, ChainOptions, Format, open_chain};
use snapfence_image_format::qcow2::CreateOptions;
use snapfence_image_format::stack::{FenceDomain, Stack};
use snapfence_image_format::storage::simulated::SimulatedEnvironment;
use snapfence_image_format::storage::{Chance, Environment, Location};

use crate::pattern::{self, SECTOR, Value};
use crate::qcow2::{create_image, some_options};
use crate::queues::SimulatedStack;

/// The directory of all images.
pub(crate) const DIRECTORY: &str = "/images";

/// One image file.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) path: String,
    pub(crate) format: Format,
}

/// A layer that a snapshot has frozen.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) image: Image,
    /// What the disk contains down from this layer.
    pub(crate) content: Rc<Vec<u8>>,
    /// What the file contains.
    pub(crate) file: Rc<Vec<u8>>,
}

/// One disk.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Where writes go, or will go after a restart.
    pub(crate) top: Image,
    /// Layers that will not change again, by what has been told to the user.
    pub(crate) frozen: Vec<Frozen>,
    /// Overlays made so far, for their names.
    pub(crate) overlays: u64,
}

/// All disks of a group. What is in here is as durable as a catalogue: a crash leaves it as it was at that moment.
pub(crate) type Catalogue = Vec<Record>;

impl Image {
    fn new(name: &str, format: Format) -> Self {
        Self { path: format!("{DIRECTORY}/{name}"), format }
    }

    /// An overlay's name.
    pub(crate) fn overlay(disk: usize, number: u64) -> Self {
        Self::new(&format!("{disk}.{number}"), Format::Qcow2)
    }

    /// Its name without the directory.
    pub(crate) fn name(&self) -> &str {
        &self.path[DIRECTORY.len() + 1..]
    }
}

/// Makes a disk: one layer, or several, with or without content. Returns its record and what each sector contains.
pub(crate) fn make_disk(environment: &SimulatedEnvironment, disk: usize, sectors: u64, chance: &mut Chance) -> (Record, Vec<Value>) {
    let mut values = vec![Value::ZERO; sectors as usize];
    let beneath = match chance.below(4) {
        0 => None,
        shape => {
            // Raw content, of a disk that may be smaller or larger than the one on top.
            let image = Image::new(&format!("{disk}.raw"), Format::Raw);
            let len = if shape == 1 { sectors / 2 + chance.below(sectors) } else { sectors };
            let mut bytes = vec![0; len as usize * SECTOR];
            for (sector, bytes) in (0..).zip(bytes.chunks_exact_mut(SECTOR)) {
                // The first sector is for counters.
                if sector > 0 && chance.happens(3, 4) {
                    let value = Value(1 << 20 | (disk as u64) << 16 | sector);
                    pattern::fill(value, sector, bytes);
                    if let Some(known) = values.get_mut(sector as usize) {
                        *known = value;
                    }
                }
            }
            environment.put(&image.path, &bytes);
            if shape == 3 {
                return (Record { top: image, frozen: Vec::new(), overlays: 0 }, values);
            }
            Some(image)
        }
    };
    let image = Image::new(&format!("{disk}.qcow2"), Format::Qcow2);
    create_image(environment, &image.path, &overlay_options(chance, sectors, beneath.as_ref()));
    (Record { top: image, frozen: Vec::new(), overlays: 0 }, values)
}

/// Some layout of an image over `beneath`: often the one that we make ourselves.
pub(crate) fn overlay_options(chance: &mut Chance, sectors: u64, beneath: Option<&Image>) -> CreateOptions {
    let size = sectors * SECTOR as u64;
    let Some(beneath) = beneath else { return some_options(chance, size) };
    let ours = CreateOptions::overlay(size, beneath.name(), beneath.format.name());
    if chance.happens(1, 2) {
        return ours;
    }
    let other = some_options(chance, size);
    CreateOptions { backing: ours.backing, preallocate: ours.preallocate, ..other }
}

/// Opens an image with all that lies beneath it, as the daemon does.
///
/// # Errors
/// Which layer, and what is wrong with it.
pub(crate) async fn open_layers(
    environment: &SimulatedEnvironment,
    top: &Image,
    writable: bool,
) -> Result<Vec<ChainLayer<SimulatedEnvironment>>, String> {
    let allowed = AllowedDirectories::default().with_directory_of(&PathBuf::from(&top.path));
    let options = ChainOptions { writable, ..ChainOptions::reading(&allowed) };
    let top = (Location::Trusted(top.path.clone().into()), top.format);
    open_chain(environment, &top.0, top.1, options).await.map_err(|error| format!("cannot open: {error}"))
}

/// Opens a disk.
///
/// # Errors
/// As [`open_layers`].
pub(crate) async fn open_stack(
    environment: SimulatedEnvironment,
    domain: Arc<FenceDomain>,
    top: Image,
    writable: bool,
    map_budget: usize,
) -> Result<Arc<SimulatedStack>, String> {
    let layers = open_layers(&environment, &top, writable).await?.into_iter().map(|layer| layer.layer).collect();
    Ok(Stack::with_map_budget(environment, &domain, layers, !writable, map_budget))
}

/// A domain on the simulation's clock.
pub(crate) fn domain(environment: &SimulatedEnvironment) -> Arc<FenceDomain> {
    let clock = environment.clone();
    FenceDomain::new(move || clock.now())
}

//! Group snapshots as the daemon takes them: overlays are made, warmed and recorded, all views are published, the fence is passed, and the layers
//! beneath are frozen; meanwhile everything else goes on.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{Header, OpenOptions, Qcow2};
use snapfence_image_format::stack::{FenceDomain, FenceOutcome, Stack};
use snapfence_image_format::storage::simulated::SimulatedEnvironment;
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location, Sharing, Storage};

use crate::catalogue::{Catalogue, DIRECTORY, Frozen, Image, open_layers, overlay_options};
use crate::clients::Shared;
use crate::pattern::{self, SECTOR, Value};
use crate::queues::{SimulatedStack, next_turn, read_stack};

/// What taking snapshots needs.
pub(crate) struct Snapshots {
    pub(crate) environment: SimulatedEnvironment,
    pub(crate) domain: Arc<FenceDomain>,
    pub(crate) stacks: Vec<Arc<SimulatedStack>>,
    pub(crate) shared: Vec<Rc<Shared>>,
    pub(crate) catalogue: Rc<RefCell<Catalogue>>,
    /// Whether sector 0 of all disks has counters that one client raises in the order of the disks.
    pub(crate) counters: bool,
}

impl Snapshots {
    /// Takes some snapshots, one after another.
    pub(crate) async fn take(self, number: u64, mut chance: Chance) {
        for _ in 0..number {
            let pause = Duration::from_nanos(chance.below(2_000_000));
            self.environment.sleep_until(self.environment.now() + pause).await;
            // Mostly all disks.
            let all = chance.happens(3, 4);
            let mut disks: Vec<usize> = (0..self.stacks.len()).filter(|_| all || chance.happens(1, 2)).collect();
            if disks.is_empty() {
                disks.push(0);
            }
            // A snapshot that comes to nothing is no error while operations are made to fail.
            if let Err(error) = self.take_one(&disks, &mut chance).await {
                self.shared[0].journal.note(format_args!("snapshot failed: {error}"));
                if !self.shared[0].faults {
                    self.shared[0].fail(format_args!("a snapshot failed: {error}"));
                }
            }
        }
    }

    async fn take_one(&self, disks: &[usize], chance: &mut Chance) -> Result<(), String> {
        let journal = &self.shared[0].journal;
        let mut overlays = Vec::new();
        for &disk in disks {
            overlays.push(self.make_overlay(disk, chance).await?);
        }
        // The intent: after a crash from here on, the overlays are on top.
        let old: Vec<Image> = disks.iter().map(|&disk| self.catalogue.borrow()[disk].top.clone()).collect();
        for (&disk, (image, _)) in disks.iter().zip(&overlays) {
            self.catalogue.borrow_mut()[disk].top = image.clone();
        }
        let fence = self.domain.fence();
        let views: Vec<_> =
            disks.iter().zip(&overlays).map(|(&disk, (_, layer))| self.stacks[disk].prepare_overlay(Arc::clone(layer), &fence)).collect();

        let mut generations = vec![None; self.stacks.len()];
        let mut cuts = Vec::new();
        for (&disk, view) in disks.iter().zip(&views) {
            let generation = view.layers().len() as u64;
            generations[disk] = Some(generation);
            cuts.push(self.shared[disk].history.borrow_mut().cut(generation));
        }
        let group = journal.cut(generations);
        journal.note(format_args!("snapshot {group} of disks {disks:?} begins"));
        let began = self.environment.now();
        let mut old_views = Vec::new();
        for (&disk, view) in disks.iter().zip(views) {
            old_views.push(self.stacks[disk].publish(view));
            // Other threads do not stand still meanwhile, even if this one does.
            for _ in 0..chance.below(3) {
                next_turn().await;
            }
            if chance.happens(1, 4) {
                self.environment.sleep_until(self.environment.now() + Duration::from_nanos(chance.below(2_000_000))).await;
            }
        }
        fence.switch();
        let deadline = Duration::from_nanos([0, 100_000, 1 << 40, 1 << 40][chance.index(4)]);
        let outcome = {
            let deadline = std::pin::pin!(self.environment.sleep_until(began + deadline));
            match select(std::pin::pin!(fence.ended()), deadline).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => fence.expire(),
            }
        };
        journal.note(format_args!("snapshot {group}: {outcome:?}"));

        let freezing = disks.iter().zip(old_views).map(|(&disk, view)| {
            let layers = view.layers().to_vec();
            async move {
                self.stacks[disk].freeze_below(view).await.map_err(|error| format!("disk {disk} does not freeze: {error}"))?;
                Ok::<_, String>(layers)
            }
        });
        let frozen: Result<Vec<_>, String> = join_all(freezing).await.into_iter().collect();
        let frozen = frozen?;
        journal.note(format_args!("snapshot {group}: frozen"));
        let mut counters = Vec::new();
        for (((&disk, layers), cut), image) in disks.iter().zip(frozen).zip(cuts).zip(old) {
            let content = self.check_member(disk, layers, cut, image).await?;
            counters.push(content);
        }
        if outcome == FenceOutcome::Released {
            if !journal.is_one_point(group) {
                self.shared[0].fail(format_args!("snapshot {group} has a request that the guest began after one that it does not have"));
            }
            if self.counters {
                self.check_counters(disks, &counters);
            }
        }
        self.shared[0].report.borrow_mut().snapshots += 1;
        Ok(())
    }

    /// Compares a frozen disk with the oracle, and remembers it. Returns its first sector.
    async fn check_member(
        &self,
        disk: usize,
        layers: Vec<Arc<Layer<SimulatedEnvironment>>>,
        cut: usize,
        image: Image,
    ) -> Result<Vec<u8>, String> {
        let layer = Arc::clone(&layers[layers.len() - 1]);
        layer.file().set_sharing(Sharing::Reader).await.map_err(|error| format!("the lock cannot be lowered: {error}"))?;
        let file = Rc::new(self.environment.bytes(&image.path).expect("the file is there"));
        let stack = Stack::new(self.environment.clone(), &self.domain, layers, true);
        let content = Rc::new(read_stack(stack).await?);
        let shared = &self.shared[disk];
        let compared = shared.history.borrow_mut().check_cut(cut, &content);
        compared.unwrap_or_else(|error| shared.fail(error));
        let first = content[..SECTOR].to_vec();
        self.catalogue.borrow_mut()[disk].frozen.push(Frozen { image, content, file });
        Ok(first)
    }

    /// Each disk's counter is as high as the next one's or one higher, and no two differ by more than one.
    fn check_counters(&self, disks: &[usize], sectors: &[Vec<u8>]) {
        let counter = |bytes: &Vec<u8>| pattern::identify(0, bytes).unwrap_or_else(|| self.shared[0].fail("a counter is torn")).0;
        let counters: Vec<u64> = sectors.iter().map(counter).collect();
        let falls = counters.is_sorted_by(|before, after| before >= after);
        let span = counters[0].saturating_sub(counters[counters.len() - 1]);
        if !falls || span > 1 {
            self.shared[0].fail(format_args!("counters of disks {disks:?} in a snapshot, raised in this order: {counters:?}"));
        }
    }

    /// Makes an overlay, durably, and gets it ready.
    async fn make_overlay(&self, disk: usize, chance: &mut Chance) -> Result<(Image, Arc<Layer<SimulatedEnvironment>>), String> {
        let (image, beneath) = {
            let record = &mut self.catalogue.borrow_mut()[disk];
            record.overlays += 1;
            (Image::overlay(disk, record.overlays), record.top.clone())
        };
        let options = overlay_options(chance, self.stacks[disk].virtual_size() / SECTOR as u64, Some(&beneath));
        let temporary = format!("{}.new", image.path);
        let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what} the overlay: {error}");
        let location = Location::Trusted(temporary.clone().into());
        let file = self.environment.open(&location, Access::CreateNew, CacheMode::Direct).await.map_err(failed("create"))?;
        Qcow2::<SimulatedEnvironment>::create(&file, &options).await.map_err(|error| error.to_string())?;
        file.flush().await.map_err(failed("flush"))?;
        self.environment.rename(Path::new(&temporary), Path::new(&image.path)).await.map_err(failed("rename"))?;
        self.environment.flush_directory(Path::new(DIRECTORY)).await.map_err(failed("flush the directory of"))?;
        let location = Location::Trusted(image.path.clone().into());
        let file = self.environment.open(&location, Access::Write, CacheMode::Direct).await.map_err(failed("open"))?;
        file.set_sharing(Sharing::Writer).await.map_err(failed("lock"))?;
        let header = Header::read(&file).await.map_err(|error| error.to_string())?;
        let layer = Qcow2::open_with_header(file, header, OpenOptions::writing()).await.map_err(|error| error.to_string())?;
        let layer = Layer::Qcow2(layer);
        layer.warm().await.map_err(|error| error.to_string())?;
        layer.flush().await.map_err(|error| error.to_string())?;
        Ok((image, Arc::new(layer)))
    }
}

/// Whether all that has been frozen, by the catalogue, is as it was.
///
/// # Errors
/// What is not.
pub(crate) async fn check_frozen(environment: SimulatedEnvironment, catalogue: Catalogue) -> Result<(), String> {
    for record in catalogue {
        for frozen in record.frozen {
            let path = &frozen.image.path;
            if environment.bytes(path).ok().as_ref() != Some(&*frozen.file) {
                return Err(format!("{path} has changed since it was frozen"));
            }
            let layers = open_layers(&environment, &frozen.image, false).await?.into_iter().map(|layer| layer.layer).collect();
            let domain = crate::catalogue::domain(&environment);
            let content = read_stack(Stack::new(environment.clone(), &domain, layers, true)).await?;
            if content != *frozen.content {
                return Err(format!("the disk below {path} reads otherwise than when it was frozen"));
            }
        }
    }
    Ok(())
}

/// One client that raises counters in sector 0 of all disks, in the order of the disks.
pub(crate) async fn count<D: crate::disk::Disk>(disks: Vec<(Arc<D>, Rc<Shared>)>, rounds: u64, mut chance: Chance) {
    for round in 1..=rounds {
        for (disk, shared) in &disks {
            if !crate::clients::write_value(&**disk, shared, &mut chance, 0..1, Value(round)).await {
                return;
            }
        }
    }
}

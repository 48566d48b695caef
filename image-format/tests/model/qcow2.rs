//! One qcow2 image, of any layout that we can make, as a disk.

use std::rc::Rc;
use std::sync::Arc;

use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, Header, OpenOptions, Preallocate, Qcow2};
use snapfence_image_format::storage::simulated::{Fault, OperationKind, SimulatedEnvironment};
use snapfence_image_format::storage::{Access, CacheMode, Chance, Environment, Location, MemoryEnvironment, Storage};

use crate::disk::Subject;
use crate::layer::{LayerDisk, open_image};
use crate::workload::{Plan, run, run_with};
use crate::{for_seeds, qemu};

/// A qcow2 image with nothing beneath.
#[derive(Debug)]
pub(crate) struct Qcow2Subject(pub(crate) CreateOptions);

const IMAGE: &str = "/image";

impl Qcow2Subject {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self(some_options(&mut Chance::new(plan.seed ^ 0x9c02), plan.sectors * 512))
    }
}

/// Some layout of an image without a backing file.
pub(crate) fn some_options(chance: &mut Chance, virtual_size: u64) -> CreateOptions {
    let version = if chance.happens(1, 5) { 2 } else { 3 };
    let extended_l2 = version == 3 && chance.happens(1, 3);
    let cluster_bits = if extended_l2 { [14, 14, 16, 17] } else { [9, 12, 16, 12] }[chance.index(4)];
    let refcount_bits = if version == 2 { 16 } else { [1, 16, 16, 64][chance.index(4)] };
    let preallocate = if chance.happens(1, 8) { Preallocate::Metadata } else { Preallocate::None };
    CreateOptions { version, extended_l2, cluster_bits, refcount_bits, preallocate, ..CreateOptions::standalone(virtual_size) }
}

/// Makes an image, durably.
pub(crate) fn create_image(environment: &SimulatedEnvironment, path: &str, options: &CreateOptions) {
    let memory = MemoryEnvironment::new();
    let (used, options) = (memory.clone(), options.clone());
    let created = memory.block_on(async move {
        let file = used.open(&Location::Trusted("/new".into()), Access::CreateNew, CacheMode::Direct).await.expect("a new file");
        Qcow2::<MemoryEnvironment>::create(&file, &options).await.map_err(|error| format!("{options:?}: {error}"))
    });
    created.expect("options that can be had");
    environment.put(path, &memory.bytes("/new").expect("it was just made"));
}

impl Subject for Qcow2Subject {
    type Disk = LayerDisk;

    fn create(&self, environment: &SimulatedEnvironment, sectors: u64) {
        assert_eq!(self.0.virtual_size, sectors * 512);
        create_image(environment, IMAGE, &self.0);
    }

    async fn open(self: Rc<Self>, environment: SimulatedEnvironment) -> Result<LayerDisk, String> {
        let file = open_image(&environment, IMAGE, Access::Write).await?;
        file.set_sharing(snapfence_image_format::storage::Sharing::Writer).await.map_err(|error| error.to_string())?;
        let header = Header::read(&file).await.map_err(|error| error.to_string())?;
        let image = Qcow2::open_with_header(file, header, OpenOptions::writing()).await.map_err(|error| error.to_string())?;
        Ok(LayerDisk::new(Layer::Qcow2(image)))
    }

    async fn close(self: Rc<Self>, disk: Arc<LayerDisk>) -> Result<(), String> {
        disk.layer().freeze().await.map_err(|error| error.to_string())
    }

    fn check(&self, environment: &SimulatedEnvironment, after_crash: bool) -> Result<bool, String> {
        qemu::check(environment, &[IMAGE], after_crash).map(|()| true)
    }
}

#[test]
fn a_qcow2_image_keeps_what_was_flushed() {
    for_seeds("qcow2", 200, |seed| {
        let plan = Plan::new(seed);
        run(Qcow2Subject::new(&plan), plan)
    });
}

#[test]
fn a_qcow2_image_whose_operations_fail_keeps_what_was_flushed() {
    const KINDS: [OperationKind; 6] = [
        OperationKind::Write,
        OperationKind::Flush,
        OperationKind::Punch,
        OperationKind::Read,
        OperationKind::Allocate,
        OperationKind::SetLen,
    ];
    for_seeds("qcow2 with faults", 300, |seed| {
        let plan = Plan::new(seed);
        run_with(Qcow2Subject::new(&plan), plan, |environment| {
            let mut chance = Chance::new(seed ^ 0xfa17);
            let (kind, after) = (KINDS[chance.index(KINDS.len())], chance.below(12));
            environment.inject(if chance.happens(1, 2) { Fault::once(kind, after) } else { Fault::lasting(kind, after) });
            true
        })
    });
}

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;

use snapfence_image_format::chain::Format;

use super::super::records::{DeviceRecord, DeviceTimes, LayerRecord, Making, SnapshotDevice, SnapshotRecord, SnapshotState};
use super::*;

pub(crate) fn layer(path: &str) -> LayerRecord {
    LayerRecord { path: PathBuf::from(path), format: Format::Qcow2 }
}

pub(crate) fn intent(name: &str, device: &str, frozen: &str, overlay: &str) -> SnapshotRecord {
    let member = SnapshotDevice {
        device: device.to_owned(),
        frozen: layer(frozen),
        overlay: layer(overlay),
        created_overlay: true,
        times: DeviceTimes::default(),
    };
    SnapshotRecord { name: name.to_owned(), created_us: 1, state: SnapshotState::Intended, devices: vec![member], error: None }
}

fn times(switch_us: u64) -> DeviceTimes {
    DeviceTimes { switch_us: Some(switch_us), hold_us: Some(0), freeze_us: None }
}

const PAGE: usize = 4096;

/// A disk whose writes are lost by a crash unless a sync came after them.
#[derive(Clone, Debug, Default)]
struct VolatileDisk(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Pages that the next sync makes durable.
    dirty: BTreeSet<usize>,
    /// A sync that fails forgets what it was to make durable, as Linux does; otherwise it has done it all the same.
    forgets: bool,
    /// What the disk would hold after a crash at each write or sync so far: nothing or everything since the last sync survives.
    crashes: Vec<Vec<u8>>,
    /// So many writes and syncs go well, then so many fail.
    failures: (u64, u64),
}

impl VolatileDisk {
    fn holding(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Contents { durable: bytes.clone(), now: bytes, ..Contents::default() })))
    }

    /// What is there after a power cut.
    fn after_power_cut(&self) -> Self {
        Self::holding(self.0.lock().expect("no panics").durable.clone())
    }

    fn fail_after(&self, passing: u64, failing: u64) {
        self.0.lock().expect("no panics").failures = (passing, failing);
    }

    /// As a disk that is full for a while.
    fn admit(&self) -> Result<(), std::io::Error> {
        match &mut self.0.lock().expect("no panics").failures {
            (0, 0) => return Ok(()),
            (0, failing) => *failing -= 1,
            (passing, _) => {
                *passing -= 1;
                return Ok(());
            }
        }
        Err(std::io::ErrorKind::StorageFull.into())
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut contents = self.0.lock().expect("no panics");
        change(&mut contents.now);
        let (durable, now) = (contents.durable.clone(), contents.now.clone());
        contents.crashes.extend([durable, now]);
    }
}

impl StorageBackend for VolatileDisk {
    fn len(&self) -> Result<u64, std::io::Error> {
        Ok(self.0.lock().expect("no panics").now.len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        let start = usize::try_from(offset).expect("small");
        out.copy_from_slice(&self.0.lock().expect("no panics").now[start..start + out.len()]);
        Ok(())
    }
    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.admit()?;
        self.change(|bytes| bytes.resize(usize::try_from(len).expect("small"), 0));
        Ok(())
    }
    fn sync_data(&self) -> Result<(), std::io::Error> {
        let admitted = self.admit();
        let mut contents = self.0.lock().expect("no panics");
        let Contents { now, durable, dirty, forgets, .. } = &mut *contents;
        durable.resize(now.len(), 0);
        let pages = std::mem::take(dirty);
        if admitted.is_ok() || !*forgets {
            for page in pages {
                let range = page * PAGE..now.len().min((page + 1) * PAGE);
                durable[range.clone()].copy_from_slice(&now[range]);
            }
        }
        admitted
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.admit()?;
        let start = usize::try_from(offset).expect("small");
        self.change(|bytes| bytes[start..start + data.len()].copy_from_slice(data));
        self.0.lock().expect("no panics").dirty.extend(start / PAGE..(start + data.len()).div_ceil(PAGE));
        Ok(())
    }
}

#[test]
fn a_stack_grows_by_its_snapshots_and_survives_reopening() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("catalogue.redb");
    let mut store = Store::open(&path).expect("new");
    let mut device = DeviceRecord { name: "vda".into(), layers: vec![layer("/base"), layer("/top")] };
    store.put_device(&device).expect("writable");
    store.put_device(&DeviceRecord { name: "vdab".into(), layers: vec![layer("/other")] }).expect("writable");
    store.intend(&intent("s1", "vda", "/top", "/s1"), None).expect("a new name");
    assert!(matches!(store.intend(&intent("s1", "vda", "/top", "/s1"), None), Err(CatalogueError::SnapshotExists(_))));
    store.adopt_overlays("s1", &[("vda".into(), times(5))], SnapshotState::Switched, None).expect("intended");
    drop(store);

    let mut store = Store::open(&path).expect("there");
    device.layers.push(layer("/s1"));
    assert_eq!(store.device("vda").expect("readable"), Some(device.clone()));
    assert_eq!(store.devices().expect("readable").len(), 2);
    let concluded = store.conclude("s1", &[("vda".into(), times(5))], SnapshotState::Frozen, None).expect("switched");
    assert_eq!(concluded.devices[0].times.switch_us, Some(5));
    assert_eq!(store.snapshot("s1").expect("readable"), Some(concluded));
    let beneath: Vec<_> = layers_beneath(&store).expect("readable").into_iter().map(|(layer, _)| layer.path).collect();
    assert_eq!(beneath, [PathBuf::from("/base"), "/top".into(), "/top".into()]);

    store.forget_device("vda").expect("writable");
    assert_eq!(store.device("vda").expect("readable"), None);
    assert_eq!(store.snapshots().expect("readable"), []);
    assert_eq!(store.devices().expect("readable").len(), 1);
}

#[test]
fn a_snapshot_takes_no_step_that_its_state_does_not_allow() {
    use SnapshotState::*;
    let all = [Intended, Switched, Frozen, Failed];
    let allowed = [(Intended, Switched), (Intended, Failed), (Switched, Frozen), (Switched, Failed)];
    for from in all {
        for to in all {
            assert_eq!(from.may_become(to), allowed.contains(&(from, to)), "{from:?} to {to:?}");
        }
    }
    let mut store = Store::with_backend(VolatileDisk::default()).expect("memory");
    assert!(matches!(store.conclude("s", &[], Frozen, None), Err(CatalogueError::NoSnapshot(_))));
    store.intend(&intent("s", "vda", "/a", "/b"), None).expect("a new name");
    for end in [Frozen, Failed] {
        assert!(matches!(store.conclude("s", &[], end, None), Err(CatalogueError::Transition { .. })));
    }
    store.drop_intent(&intent("s", "vda", "/a", "/other"), None).expect("writable");
    assert!(store.snapshot("s").expect("readable").is_some(), "another's");
    let making = Making { mark: 7, overlays: vec!["/b".into()] };
    store.drop_intent(&intent("s", "vda", "/a", "/b"), Some(&making)).expect("writable");
    assert_eq!(store.snapshot("s").expect("readable"), None);
    assert_eq!(store.making().expect("readable"), [making], "somebody has to remove what was made");
    store.end_making(7).expect("writable");
    assert_eq!(store.making().expect("readable"), []);
}

#[test]
fn a_newer_layout_is_refused() {
    let disk = VolatileDisk::default();
    drop(Store::with_backend(disk.clone()).expect("new"));
    let database = Database::builder().create_with_backend(disk.clone()).expect("there");
    let transaction = database.begin_write().expect("writable");
    transaction.open_table(META).expect("there").insert("schema", SCHEMA + 1).expect("writable");
    transaction.commit().expect("writable");
    drop(database);
    assert!(matches!(Store::with_backend(disk), Err(CatalogueError::Schema { found }) if found == SCHEMA + 1));
}

#[test]
fn a_failure_that_passes_costs_nothing_and_a_lasting_one_no_more_than_its_step() {
    type Step = fn(&mut Store) -> Result<(), CatalogueError>;
    let steps: [Step; 4] = [
        |store| store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }),
        |store| store.intend(&intent("s", "vda", "/base", "/s"), None),
        |store| store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).map(drop),
        |store| store.conclude("s", &[], SnapshotState::Frozen, None).map(drop),
    ];
    let state = |store: &Store| {
        let layers = store.device("vda").expect("readable").map_or(0, |device| device.layers.len());
        (layers, store.snapshot("s").expect("readable").map(|snapshot| snapshot.state.name()))
    };
    let states = [(0, None), (1, None), (1, Some("intended")), (2, Some("switched")), (2, Some("frozen"))];
    for at in 0..steps.len() {
        for passing in 0..12 {
            for (failing, forgets) in [(1, false), (1, true), (1000, false), (1000, true)] {
                let disk = VolatileDisk::default();
                disk.0.lock().expect("no panics").forgets = forgets;
                let mut store = Store::with_backend(disk.clone()).expect("new");
                steps[..at].iter().for_each(|step| step(&mut store).expect("writable"));
                disk.fail_after(passing, failing);
                let result = steps[at](&mut store);
                disk.fail_after(0, 0);
                let found = state(&store);
                if failing == 1 {
                    result.unwrap_or_else(|error| panic!("step {at}, one failure after {passing}: {error}"));
                    let durable = Store::with_backend(disk.after_power_cut()).expect("a power cut leaves a catalogue");
                    assert_eq!(state(&durable), states[at + 1], "step {at}, one failure after {passing}, then a power cut");
                }
                // The whole step or nothing of it; a failed one can be done again, and the next one goes on from there.
                let done = found == states[at + 1];
                assert!(done || failing > 1 && found == states[at], "step {at}, {failing} after {passing}: {found:?}");
                let rest = if done { at + 1 } else { at };
                steps[rest..].iter().for_each(|step| step(&mut store).expect("writable"));
                assert_eq!(state(&store), states[4], "step {at}, {failing} after {passing}");
                let durable = Store::with_backend(disk.after_power_cut()).expect("a power cut leaves a catalogue");
                assert_eq!(state(&durable), states[4], "step {at}, {failing} after {passing}, then a power cut");
            }
        }
    }
}

#[test]
fn a_failed_snapshot_is_failed_whatever_was_recorded() {
    for recorded in 0..4 {
        let mut store = Store::with_backend(VolatileDisk::default()).expect("new");
        store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
        store.intend(&intent("s", "vda", "/base", "/s"), None).expect("a new name");
        match recorded {
            0 => {}
            1 => {
                // The next snapshot of the device was recorded, this one was not.
                store.intend(&intent("t", "vda", "/s", "/t"), None).expect("a new name");
                store.adopt_overlays("t", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
            }
            _ => {
                store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
                if recorded == 3 {
                    store.conclude("s", &[], SnapshotState::Frozen, None).expect("switched");
                }
            }
        }
        for _ in 0..2 {
            store.fail("s", "no").expect("writable");
        }
        let failed = store.snapshot("s").expect("readable").expect("recorded");
        assert_eq!((failed.state, failed.error.as_deref()), (SnapshotState::Failed, Some("no")));
        let top = store.device("vda").expect("readable").expect("recorded").top().cloned();
        assert_eq!(top, Some(layer(if recorded == 1 { "/t" } else { "/s" })));
    }
}

#[test]
fn a_crash_while_it_is_made_leaves_nothing_in_the_way() {
    let disk = VolatileDisk::default();
    drop(Store::with_backend(disk.clone()).expect("new"));
    let crashes = std::mem::take(&mut disk.0.lock().expect("no panics").crashes);
    let half_made = |bytes: &Vec<u8>| Store::with_backend(VolatileDisk::holding(bytes.clone())).is_err();
    assert!(crashes.iter().any(half_made), "some of them are no database");
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (number, bytes) in crashes.iter().enumerate() {
        let path = directory.path().join(format!("{number}.redb"));
        std::fs::write(path.with_extension("new"), bytes).expect("a file");
        let mut store = Store::open(&path).expect("a new one");
        assert_eq!(store.devices().expect("readable"), []);
        store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
        drop(store);
        assert_eq!(Store::open(&path).expect("there").devices().expect("readable").len(), 1, "{number}");
        assert!(!path.with_extension("new").exists());
    }
}

#[test]
fn after_a_crash_each_step_has_happened_or_has_not() {
    let disk = VolatileDisk::default();
    let mut store = Store::with_backend(disk.clone()).expect("new");
    store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
    drop(store);
    // From here on every state of the disk after a crash is kept.
    let start = disk.0.lock().expect("no panics").now.clone();
    let disk = VolatileDisk::holding(start);
    let mut store = Store::with_backend(disk.clone()).expect("there");
    assert_eq!(store.making().expect("readable"), [], "none has ever been recorded");
    let making = Making { mark: 7, overlays: vec!["/s".into()] };
    store.begin_making(&making).expect("writable");
    store.intend(&intent("s", "vda", "/base", "/s"), Some(7)).expect("a new name");
    store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
    store.conclude("s", &[], SnapshotState::Frozen, None).expect("switched");

    let crashes = std::mem::take(&mut disk.0.lock().expect("no panics").crashes);
    assert!(crashes.len() > 6, "the steps write");
    let (mut seen, mut seen_being_made) = (BTreeSet::new(), false);
    for bytes in crashes {
        let store = Store::with_backend(VolatileDisk::holding(bytes)).expect("a crash leaves a catalogue");
        let state = store.snapshot("s").expect("readable").map(|snapshot| snapshot.state);
        let layers = store.device("vda").expect("readable").expect("recorded").layers.len();
        let being_made = store.making().expect("readable");
        assert!(being_made.is_empty() || state.is_none() && being_made == [making.clone()], "{state:?}: {being_made:?}");
        seen_being_made |= !being_made.is_empty();
        let adopted = matches!(state, Some(SnapshotState::Switched | SnapshotState::Frozen));
        assert_eq!(layers, if adopted { 2 } else { 1 }, "{state:?}");
        seen.insert(state.map(SnapshotState::name));
    }
    assert!(seen.len() >= 3 && seen_being_made, "crashes between the steps are among them: {seen:?}");
}

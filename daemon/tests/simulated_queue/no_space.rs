//! A queue on a disk that is full, or whose quota is used up: what needs space waits, and is lost by no snapshot and no stop; everything else goes
//! on.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use snapfenced::space::{RETRY_AFTER, Shortage};

use super::*;

const CLUSTER_SECTORS: u64 = 128;
/// Clusters for which there is space, roughly: tables need some, too.
const CLUSTERS_LEFT: u64 = 6;

/// Why there is no more space.
#[derive(Clone, Copy, Debug)]
enum Limit {
    Disk,
    Quota,
}

/// A device whose disk has become full.
struct Full {
    setting: Setting,
    /// What the device has told.
    told: Arc<Mutex<Vec<Shortage>>>,
    /// Requests that have completed, and how.
    done: BTreeMap<u16, u8>,
    /// A sector of which the cluster has space.
    old: u64,
    /// One of which it has none.
    new: u64,
    overlay: Arc<Layer<SimulatedEnvironment>>,
}

impl Full {
    fn new(of: Limit, policy: NoSpacePolicy) -> Self {
        Self::with_record(seed(), of, policy, None)
    }

    fn with_record(seed: u64, of: Limit, policy: NoSpacePolicy, record: Option<InflightQueue>) -> Self {
        let mut simulation = Simulation::new(seed);
        create_qcow2(&mut simulation, "/disk", CreateOptions::standalone(DISK_BYTES));
        create_qcow2(&mut simulation, "/overlay", CreateOptions::overlay(DISK_BYTES, "/disk", "qcow2"));
        let (layer, overlay) = (open_qcow2(&mut simulation, "/disk"), open_qcow2(&mut simulation, "/overlay"));
        let mut setting = Setting::with_policy(simulation, vec![layer], policy);
        if record.is_some() {
            setting.restart(record);
        }
        let used: usize = ["/disk", "/overlay"].map(|file| setting.environment.bytes(file).expect("a file").len()).iter().sum();
        let limit = Some(used as u64 + CLUSTERS_LEFT * 65536);
        match of {
            Limit::Disk => setting.environment.set_space_limit(limit),
            Limit::Quota => setting.environment.set_quota(limit),
        }
        let told = Arc::default();
        let heard: Arc<Mutex<Vec<_>>> = Arc::clone(&told);
        setting.device.space().report_to(move |shortage| heard.lock().expect("no panic").push(shortage));
        let mut full = Self { setting, told, done: BTreeMap::new(), old: 0, new: 0, overlay };
        // The first that does not fit stays in slot 1, if it is held.
        for cluster in 0..DISK_BYTES / 65536 {
            full.new = cluster * CLUSTER_SECTORS;
            full.submit_write(1, full.new, 1);
            full.until("a write to end or to lack space", |full| full.done.contains_key(&1) || !full.told().is_empty());
            if !full.told().is_empty() {
                break;
            }
            assert_eq!(full.done.remove(&1), Some(0));
            full.old = full.new;
        }
        assert!(full.new > full.old, "the disk is full before it has all of the image");
        full
    }

    fn told(&self) -> Vec<Shortage> {
        self.told.lock().expect("no panic").clone()
    }

    fn submit_write(&mut self, slot: u16, sector: u64, byte: u8) {
        self.setting.submit(slot, OUT, sector, Ok(&[byte; 4096]));
    }

    /// Lets things happen until `condition` holds. With something held, there is always something to come.
    fn until(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let mut steps = 0;
        while !condition(self) {
            steps += 1;
            assert!(self.setting.simulation.step() && steps < 100_000, "nothing more happens before {what}");
            for (slot, status) in self.setting.completed() {
                assert_eq!(self.done.insert(slot, status), None, "slot {slot} completes twice");
            }
        }
    }

    fn until_done(&mut self, slot: u16) -> u8 {
        self.until("completion", |full| full.done.contains_key(&slot));
        self.done.remove(&slot).expect("just seen")
    }

    fn pass(&mut self, time: Duration) {
        let end = self.setting.environment.now() + time;
        self.until("time", |full| full.setting.environment.now() >= end);
    }

    fn held(&self) -> usize {
        self.setting.device.space().held()
    }

    fn free(&self) {
        self.setting.environment.set_space_limit(None);
        self.setting.environment.set_quota(None);
    }

    fn read(&mut self, sector: u64) -> Vec<u8> {
        self.setting.submit(9, IN, sector, Err(4096));
        assert_eq!(self.until_done(9), 0);
        self.setting.driver.read(DATA + 9 * SLOT_BYTES + 0x1000, 4096)
    }
}

#[test]
fn what_needs_space_waits_for_it_and_nothing_else_does() {
    for limit in [Limit::Disk, Limit::Quota] {
        let mut full = Full::new(limit, NoSpacePolicy::Hold);
        assert_eq!(full.told().len(), 1);
        assert!(full.told()[0].is_held, "{:?}", full.told());
        let (old, new) = (full.old, full.new);
        full.submit_write(2, old, 2);
        assert_eq!(full.until_done(2), 0, "an overwrite");
        assert_eq!(full.read(old), [2; 4096]);
        assert_eq!(full.read(new), [0; 4096]);
        full.setting.submit(3, FLUSH, 0, Ok(&[]));
        assert_eq!(full.until_done(3), 0, "a flush of what has completed");
        full.submit_write(4, new + CLUSTER_SECTORS, 4);
        full.pass(10 * RETRY_AFTER);
        assert_eq!((full.held(), full.done.len()), (2, 0));
        assert_eq!(full.told().len(), 1, "told once for all, however often it is tried");
        full.free();
        assert_eq!((full.until_done(1), full.until_done(4)), (0, 0), "nobody need say so");
        assert_eq!((full.held(), full.told().len()), (0, 1));
        assert_eq!((full.read(new), full.read(new + CLUSTER_SECTORS)), (vec![1; 4096], vec![4; 4096]));
        assert_eq!(full.setting.device.failures(), 0);
    }
}

#[test]
fn a_call_to_go_on_is_heard_at_once() {
    const RUNS: u64 = 16;
    let seed = seed();
    let mut at_once = 0;
    for run in 0..RUNS {
        let mut full =
            Full::with_record(seed.wrapping_add(run), if run % 2 == 0 { Limit::Disk } else { Limit::Quota }, NoSpacePolicy::Hold, None);
        full.setting.device.space().resume();
        full.until("it is told again", |full| full.told().len() == 2);
        let began = full.setting.environment.now();
        full.free();
        full.setting.device.space().resume();
        assert_eq!(full.until_done(1), 0);
        at_once += u64::from(full.setting.environment.now() - began < RETRY_AFTER / 2);
    }
    // Simulated time may pass before a thread has its turn, so it is not so in every run.
    assert!(at_once >= RUNS / 2, "{at_once} of {RUNS}");
}

#[test]
fn the_guest_is_told_where_that_is_the_policy() {
    for limit in [Limit::Disk, Limit::Quota] {
        let mut full = Full::new(limit, NoSpacePolicy::Report);
        assert_eq!(full.until_done(1), 1);
        assert!(!full.told()[0].is_held && full.held() == 0);
        let new = full.new;
        full.submit_write(1, new, 1);
        assert_eq!(full.until_done(1), 1);
        assert_eq!(full.told().len(), 1, "no more than one a second");
        full.free();
        full.submit_write(1, new, 3);
        assert_eq!(full.until_done(1), 0);
        assert_eq!(full.read(new), [3; 4096]);
    }
}

#[test]
fn a_held_write_goes_above_the_cut_and_holds_no_layer_up() {
    for limit in [Limit::Disk, Limit::Quota] {
        let mut full = Full::new(limit, NoSpacePolicy::Hold);
        let stack = Arc::clone(full.setting.device.stack());
        let fence = full.setting.domain.fence();
        let view = stack.prepare_overlay(Arc::clone(&full.overlay), &fence);
        let before = stack.publish(view);
        fence.switch();
        let frozen = Rc::new(Cell::new(None));
        let slot = Rc::clone(&frozen);
        full.setting.simulation.executor().spawn(async move { slot.set(Some(stack.freeze_below(before).await.is_ok())) });
        let ended = Rc::clone(&frozen);
        full.until("the freeze", |_| ended.get().is_some());
        assert_eq!((frozen.get(), fence.outcome()), (Some(true), Some(FenceOutcome::Released)));
        assert_eq!(full.held(), 1);
        let bytes = full.setting.environment.bytes("/disk").expect("a file");
        full.free();
        assert_eq!(full.until_done(1), 0);
        let new = full.new;
        assert_eq!(full.read(new), [1; 4096]);
        assert!(full.setting.environment.bytes("/disk").expect("a file") == bytes, "the frozen layer has changed");
    }
}

#[test]
fn a_ring_with_a_record_stops_at_once_and_goes_on_with_what_was_held() {
    for limit in [Limit::Disk, Limit::Quota] {
        let (layout, file) = InflightLog::create(1, QUEUE_SIZE, (1, QUEUE_SIZE)).expect("memory");
        let log = InflightLog::map(layout, file.into(), (1, QUEUE_SIZE)).expect("just made");
        let mut full = Full::with_record(seed(), limit, NoSpacePolicy::Hold, log.queue(0));
        let stopped = full.setting.queue.stop();
        full.setting.simulation.run_until_stalled();
        assert!(stopped.try_recv().is_ok());
        assert_eq!((full.held(), full.setting.device.stragglers().count()), (0, 0));
        assert_eq!(full.setting.completed(), [], "nobody is told that it has failed");
        full.free();
        full.setting.restart(log.queue(0));
        assert_eq!(full.setting.completed(), [(1, 0)]);
        let new = full.new;
        assert_eq!(full.read(new), [1; 4096]);
    }
}

#[test]
fn who_does_not_wait_any_longer_has_them_back_as_failed() {
    let mut full = Full::new(Limit::Disk, NoSpacePolicy::Hold);
    let paused = full.setting.queue.disable();
    full.pass(5 * RETRY_AFTER);
    assert_eq!(paused.try_recv(), Err(TryRecvError::Empty));
    full.setting.queue.give_up_held();
    assert_eq!(full.until_done(1), 1);
    full.until("the pause", |full| full.held() == 0);
    full.setting.simulation.run_until_stalled();
    assert_eq!(paused.try_recv(), Ok(()));
    full.setting.queue.enable();
    let new = full.new;
    full.submit_write(2, new, 2);
    full.until("it is held", |full| full.held() == 1);
    let stopped = full.setting.queue.stop();
    full.pass(5 * RETRY_AFTER);
    assert_eq!(stopped.try_recv(), Err(TryRecvError::Empty), "without a record, it would be forgotten");
    let abandoned = full.setting.queue.abandon();
    assert_eq!(full.until_done(2), 1);
    full.setting.simulation.run_until_stalled();
    assert!(abandoned.try_recv().is_ok());
    assert_eq!((full.held(), full.setting.device.stragglers().count()), (0, 0));
    full.free();
    full.setting.start();
    assert_eq!(full.read(new), [0; 4096], "what has failed is not done later");
}

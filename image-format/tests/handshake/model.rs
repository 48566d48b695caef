//! Queue threads, devices and a control thread around the real fence, with a guest whose requests follow from one another.
//!
//! A queue thread serves one queue of one device, or one of every device, as the daemon's workers can: it begins its turn, reads what the guest has seen completed
//! (the ring's index), looks whether its views are stale, takes requests, and parks when nothing moves. A request keeps its view, writes to the
//! view's top layer, waits for [`FenceMember::hold_completion`], and is published once. The control thread puts one layer after another on all
//! devices and freezes what lies beneath.
//!
//! What is checked, in every interleaving:
//! - what was taken after a completion had been seen never lies in an older layer than the request that completed: on one device always, over
//!   all devices if the fence was released (the cut is consistent);
//! - no write reaches a layer that is frozen;
//! - every request is published, once; every thread ends (the checker reports a deadlock otherwise).
//!
//! A layer is its number here, and the present view lies behind a mutex in the place of arc-swap. Both are linearisable, but the mutex also orders
//! what its users do before and after, which arc-swap does not promise. So interleavings are explored as they are, while an access of the fence
//! that is weaker than sequentially consistent can go unseen: reading the marks, or the generation after `LOOKING`, relaxed is not found.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::Poll;
use std::time::Duration;

use crate::fence::{Fence, FenceDomain, FenceMember, FenceOutcome, Marks};
use crate::primitives::{block_on, spawn};
use crate::retire::{Retirement, Retirements};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// What happens to a fence beside its being passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It is waited for.
    Waits,
    /// It expires at any time once it can be found: by a watch over deadlines, or by the control thread.
    Expires,
    /// It is given up before the views are published.
    Aborted,
}

/// The size of a run.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) devices: usize,
    /// Queues per device.
    pub(crate) queues: usize,
    /// Whether a queue thread serves one queue of every device instead of one queue of one device.
    pub(crate) shared_threads: bool,
    /// Whether threads ask if their views are stale after reading what has completed. If they do, holding completions until the generation has
    /// advanced is enough for a consistent cut; only without it do releases show that come after that but too early.
    pub(crate) looks_twice: bool,
    /// Requests per queue of each device.
    pub(crate) requests: usize,
    /// One snapshot each, in turn.
    pub(crate) snapshots: Vec<Ending>,
}

struct View {
    layer: usize,
    member: Option<FenceMember>,
    retirement: Arc<Retirement>,
}

impl Drop for View {
    fn drop(&mut self) {
        self.retirement.complete();
    }
}

struct Device {
    marks: Arc<Marks>,
    present: Mutex<Arc<View>>,
    retirements: Retirements,
    /// By layer.
    frozen: Vec<AtomicBool>,
}

impl Device {
    fn new(snapshots: usize) -> Self {
        let retirements = Retirements::default();
        let retirement = retirements.add(0);
        retirements.publish(&retirement);
        let present = Mutex::new(Arc::new(View { layer: 0, member: None, retirement }));
        Self { marks: Arc::default(), present, retirements, frozen: (0..=snapshots).map(|_| AtomicBool::new(false)).collect() }
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.present.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn prepare(&self, fence: &Arc<Fence>) -> Arc<View> {
        let layer = self.view().layer + 1;
        Arc::new(View { layer, member: Some(fence.add_member(&self.marks)), retirement: self.retirements.add(layer) })
    }

    fn publish(&self, view: Arc<View>) -> Arc<View> {
        self.retirements.publish(&view.retirement);
        std::mem::replace(&mut *self.present.lock().unwrap_or_else(PoisonError::into_inner), view)
    }
}

/// One request, as the oracle sees it.
struct Taken {
    device: usize,
    layer: usize,
    /// Which requests had completed when the guest submitted it.
    after: u64,
}

/// What happened in one run. No part of what is explored, so with primitives that the checker does not see.
#[derive(Default)]
struct History(std::sync::Mutex<std::collections::BTreeMap<usize, Taken>>);

struct Host {
    domain: Arc<FenceDomain>,
    devices: Vec<Device>,
    /// The requests that the guest has seen completed, one bit each.
    completed: AtomicU64,
    history: History,
}

impl Host {
    async fn serve(&self, device: usize, view: Arc<View>, id: usize) {
        assert!(!self.devices[device].frozen[view.layer].load(SeqCst), "request {id} writes to a frozen layer");
        if let Some(member) = &view.member {
            member.hold_completion().await;
        }
        let before = self.completed.fetch_or(1 << id, SeqCst);
        assert_eq!(before & (1 << id), 0, "request {id} is published twice");
    }

    /// Takes `requests` from queue `queue` of each of the devices, of `queues`.
    fn run_queue(&self, served: Range<usize>, queue: usize, queues: usize, requests: usize, looks_twice: bool) {
        let mut participant = self.domain.join();
        let devices = &self.devices[served.clone()];
        let _attachments: Vec<_> = devices.iter().map(|device| participant.attach(&device.marks)).collect();
        let mut views: Vec<Arc<View>> = Vec::new();
        let mut in_flight: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
        let mut taken = 0;
        block_on(poll_fn(|context| {
            loop {
                participant.begin_turn(|| views = devices.iter().map(Device::view).collect());
                let mut moved = false;
                if taken < requests {
                    let after = self.completed.load(SeqCst);
                    if looks_twice && participant.is_stale() {
                        continue;
                    }
                    for (device, view) in served.clone().zip(&views) {
                        let id = (taken * queues + queue) * self.devices.len() + device;
                        self.history.0.lock().unwrap().insert(id, Taken { device, layer: view.layer, after });
                        in_flight.push(Box::pin(self.serve(device, Arc::clone(view), id)));
                    }
                    taken += 1;
                    moved = true;
                }
                in_flight.retain_mut(|request| {
                    let ended = request.as_mut().poll(context).is_ready();
                    moved |= ended;
                    !ended
                });
                if taken == requests && in_flight.is_empty() {
                    return Poll::Ready(());
                }
                if !moved {
                    views.clear();
                    participant.park();
                    return Poll::Pending;
                }
            }
        }));
    }

    /// Puts one layer on every device. Gives the outcome.
    fn snapshot(self: &Arc<Self>, ending: Ending) -> FenceOutcome {
        let fence = self.domain.fence();
        let prepared: Vec<_> = self.devices.iter().map(|device| device.prepare(&fence)).collect();
        if ending == Ending::Aborted {
            return fence.expire();
        }
        let watch = (ending == Ending::Expires).then(|| {
            let host = Arc::clone(self);
            spawn(move || drop(host.domain.expire_due(Duration::ZERO)))
        });
        let old: Vec<_> = self.devices.iter().zip(prepared).map(|(device, view)| device.publish(view)).collect();
        fence.switch_until(if ending == Ending::Expires { Duration::ZERO } else { Duration::MAX });
        let outcome = match ending {
            Ending::Expires => fence.expire(),
            _ => block_on(fence.ended()),
        };
        if ending == Ending::Waits {
            assert_eq!(outcome, FenceOutcome::Released);
        }
        if let Some(watch) = watch {
            watch.join().expect("it looks once");
        }
        for (device, view) in self.devices.iter().zip(old) {
            let layer = view.layer;
            drop(view);
            block_on(device.retirements.all_up_to(layer));
            device.frozen[layer].store(true, SeqCst);
        }
        assert_eq!(fence.outcome(), Some(outcome), "an outcome is final");
        outcome
    }
}

/// One run, within the checker.
pub(crate) fn run(shape: &Shape) {
    let host = Arc::new(Host {
        domain: FenceDomain::new(|| Duration::ZERO),
        devices: (0..shape.devices).map(|_| Device::new(shape.snapshots.len())).collect(),
        completed: AtomicU64::new(0),
        history: History::default(),
    });
    let devices_per_thread = if shape.shared_threads { shape.devices } else { 1 };
    let mut threads = Vec::new();
    for queue in 0..shape.queues {
        for first in (0..shape.devices).step_by(devices_per_thread) {
            let (served, looks_twice) = (first..first + devices_per_thread, shape.looks_twice);
            let (host, queues, requests) = (Arc::clone(&host), shape.queues, shape.requests);
            threads.push(spawn(move || host.run_queue(served, queue, queues, requests, looks_twice)));
        }
    }
    // By layer, whether it was put on with one point in time.
    let mut one_cut = BTreeSet::new();
    let mut layer = 0;
    for ending in &shape.snapshots {
        let outcome = host.snapshot(*ending);
        if *ending != Ending::Aborted {
            layer += 1;
            if outcome == FenceOutcome::Released {
                one_cut.insert(layer);
            }
        }
    }
    threads.into_iter().for_each(|thread| thread.join().expect("queue threads end by themselves"));

    let history = host.history.0.lock().unwrap();
    let count = shape.devices * shape.queues * shape.requests;
    assert_eq!(host.completed.load(SeqCst), (1 << count) - 1, "every request is published");
    for (id, later) in history.iter() {
        for (other, earlier) in history.iter().filter(|(other, _)| later.after & (1 << **other) != 0) {
            if earlier.layer <= later.layer {
                continue;
            }
            assert_ne!(earlier.device, later.device, "request {id}, made after {other} had completed, went beneath it");
            let torn = (later.layer + 1..=earlier.layer).find(|layer| one_cut.contains(layer));
            assert_eq!(torn, None, "the cut has request {id} but not {other}, from which it follows");
        }
    }
}

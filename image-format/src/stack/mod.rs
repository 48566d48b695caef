//! A stack of layers as one disk: what the daemon's queues read and write.
//!
//! - [`Stack`] holds what outlives snapshots: the present [`View`], the chain map, and which layers are frozen.
//! - [`View`] is the stack at one time. Requests keep the view with which they were taken until they end. A view that nobody uses any more is
//!   *retired*; that is how the stack learns that no request can touch a layer, or a freed cluster, any more.
//! - [`Fence`] and its domain switch any number of stacks to new views at one point in time.

mod fence;
#[cfg(test)]
mod fence_tests;
mod grow;
mod map;
mod read;
mod retire;
#[cfg(test)]
mod retire_tests;
mod settle;
mod write;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::error::LayerError;
use crate::layer::Layer;
use crate::storage::Environment;
use crate::units::{GuestOffset, GuestRange, SECTOR_BYTES};

pub use fence::{Attachment, Fence, FenceDomain, FenceMember, FenceOutcome, FenceTimes, Participant};
pub use map::{Piece, Place};

use fence::Marks;
use map::{ChainMap, UNIT_BYTES};
use retire::{Retirement, Retirements};
use settle::Settling;

/// The number of layers that a stack can have: layers are numbered in 16 bits.
pub const MAX_LAYERS: usize = 65_535;

/// How long after the answer that a flush has failed the guest certainly has it.
const TOLD_AFTER: Duration = Duration::from_millis(100);

/// Memory for the chain map of one stack unless set otherwise, in bytes.
pub const DEFAULT_MAP_BUDGET: usize = 128 << 20;

/// A disk: an ordered list of layers of which only the top is written.
pub struct Stack<E: Environment> {
    environment: E,
    domain: Arc<FenceDomain>,
    marks: Arc<Marks>,
    virtual_size: u64,
    read_only: bool,
    map_budget: usize,
    present: ArcSwap<View<E>>,
    retirements: Retirements,
    /// Number of the lowest layer that is not frozen: a flush covers the layers from it up to the top.
    unfrozen_from: AtomicUsize,
    /// Whether the layers are durable that lay beneath at opening.
    settling: Settling,
    /// A flush failed before the stack was opened, and the guest did not know then.
    untold: bool,
    /// When the guest was first answered that a flush has failed.
    first_told: OnceLock<Duration>,
    /// That it knows will be remembered.
    telling: AtomicBool,
    /// Excludes two changes of the present view from one another.
    publishing: Mutex<()>,
}

/// The stack at one time: which layers there are, and the fence with which they became so.
pub struct View<E: Environment> {
    stack: std::sync::Weak<Stack<E>>,
    layers: Arc<[Arc<Layer<E>>]>,
    map: Arc<ChainMap>,
    fence: Option<FenceMember>,
    retirement: Arc<Retirement>,
}

impl<E: Environment> Stack<E> {
    /// A stack over `layers`, base first, at least one and at most [`MAX_LAYERS`]. All but the top are never written to, nor is the top if
    /// `read_only`.
    ///
    /// # Panics
    /// If there is no layer or too many, which whoever opened them has checked.
    pub fn new(environment: E, domain: &Arc<FenceDomain>, layers: Vec<Arc<Layer<E>>>, read_only: bool) -> Arc<Self> {
        Self::with_map_budget(environment, domain, layers, read_only, DEFAULT_MAP_BUDGET)
    }

    /// As [`new`](Self::new), with about `map_budget` bytes for the chain map.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_map_budget(
        environment: E,
        domain: &Arc<FenceDomain>,
        layers: Vec<Arc<Layer<E>>>,
        read_only: bool,
        map_budget: usize,
    ) -> Arc<Self> {
        assert!((1..=MAX_LAYERS).contains(&layers.len()), "a stack has from 1 to {MAX_LAYERS} layers");
        let virtual_size = layers[layers.len() - 1].virtual_size();
        let retirements = Retirements::default();
        let never_written = layers.len() - usize::from(!read_only);
        let untold = layers.iter().any(|layer| layer.earlier_failure().is_some_and(|failure| !failure.told));
        let map = Arc::new(ChainMap::new(virtual_size, grain(&layers), map_budget));
        Arc::new_cyclic(|stack| {
            let retirement = retirements.add(layers.len() - 1);
            retirements.publish(&retirement);
            let view = View { stack: stack.clone(), layers: layers.into(), map, fence: None, retirement };
            Self {
                environment,
                domain: Arc::clone(domain),
                marks: Arc::default(),
                virtual_size,
                read_only,
                map_budget,
                present: ArcSwap::from_pointee(view),
                retirements,
                unfrozen_from: AtomicUsize::new(never_written),
                settling: Settling::new(never_written),
                untold,
                first_told: OnceLock::new(),
                telling: AtomicBool::new(false),
                publishing: Mutex::new(()),
            }
        })
    }

    /// Time and tasks, as the layers have them.
    pub fn environment(&self) -> &E {
        &self.environment
    }

    /// Size of the disk in bytes: that of the top layer, and of every overlay put on it later.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Whether requests that change the disk are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The present view.
    pub fn view(&self) -> Arc<View<E>> {
        self.present.load_full()
    }

    /// Announces that `participant` takes requests for this stack, for as long as the attachment lives. Call before its first
    /// [`view`](Self::view).
    pub fn attach(&self, participant: &Participant) -> Attachment {
        participant.attach(&self.marks)
    }

    /// Builds the view that has `overlay` above the present top, and makes this stack a member of the fence. Not visible before
    /// [`publish`](Self::publish). The overlay is warm, empty, and of the same virtual size. Only one overlay may be on its way at a time.
    ///
    /// # Panics
    /// If the stack has [`MAX_LAYERS`] layers already.
    pub fn prepare_overlay(self: &Arc<Self>, overlay: Arc<Layer<E>>, fence: &Arc<Fence>) -> Arc<View<E>> {
        let present = self.view();
        assert!(present.layers.len() < MAX_LAYERS, "whoever opens overlays counts layers");
        let layers: Arc<[_]> = present.layers.iter().cloned().chain([overlay]).collect();
        let finest = grain(&layers);
        // A finer unit needs finer entries: the old map stays with the old views, and a new one is filled from the tables.
        let map = if finest < present.map.grain() {
            Arc::new(ChainMap::new(self.virtual_size, finest, self.map_budget))
        } else {
            Arc::clone(&present.map)
        };
        let member = fence.add_member(&self.marks);
        let retirement = self.retirements.add(layers.len() - 1);
        Arc::new(View { stack: Arc::downgrade(self), layers, map, fence: Some(member), retirement })
    }

    /// Makes a prepared view the present one: what is taken from the next turn of each queue on goes to it. Returns the view before. Follow
    /// with [`Fence::switch`]. Does not block, allocate or do I/O.
    pub fn publish(&self, view: Arc<View<E>>) -> Arc<View<E>> {
        let _publishing = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
        self.retirements.publish(&view.retirement);
        self.present.swap(view)
    }

    /// Ends when no request uses `view` any more, which must not be the present one; then freezes the layer that was its top, after all those
    /// beneath that are not frozen yet: each gives its reserved space back, is made durable, and is not written to any more.
    ///
    /// # Errors
    /// If a layer cannot be made durable. It stays unfrozen with all above it, and flushes go on covering it (and failing). If it is only doubtful
    /// ([`doubtful_layer`](Self::doubtful_layer)), it is at rest all the same.
    pub async fn freeze_below(&self, view: Arc<View<E>>) -> Result<(), LayerError> {
        let number = view.top_number();
        let layers = Arc::clone(&view.layers);
        // It is waited for until nobody uses it.
        drop(view);
        self.settle().await?;
        for number in self.unfrozen_from.load(Ordering::Acquire)..=number {
            self.retirements.all_up_to(number).await;
            // Requests of the views above may still be reading where the map pointed before the last changes of this layer.
            self.freeze_layer(&layers, number, self.grace_period()).await?;
        }
        match lowest_doubtful(&layers[..=number], self.settling.layers()) {
            Some(layer) => Err(LayerError::Doubtful { layer }),
            None => Ok(()),
        }
    }

    /// Ends writing for good: waits until no request uses the layers beneath the top, gives reserved space back and makes everything durable.
    /// Whoever takes requests must have stopped, and all requests have ended.
    ///
    /// # Errors
    /// The first, if layers cannot be made durable. The others are brought to rest all the same.
    pub async fn close(&self) -> Result<(), LayerError> {
        let mut outcome = self.settle().await;
        let view = self.view();
        for number in self.unfrozen_from.load(Ordering::Acquire)..view.layers.len() {
            if number < view.top_number() {
                self.retirements.all_up_to(number).await;
            }
            outcome = outcome.and(self.freeze_layer(&view.layers, number, std::future::ready(())).await);
        }
        outcome
    }

    /// Brings one layer to rest, to which nobody writes any more. `readers_gone`: see [`Layer::freeze_after`].
    async fn freeze_layer(
        &self,
        layers: &[Arc<Layer<E>>],
        number: usize,
        readers_gone: impl Future<Output = ()>,
    ) -> Result<(), LayerError> {
        let layer = &layers[number];
        layer.freeze_after(readers_gone).await?;
        // Only in order: a flush covers the lowest layer that is not durable, whatever became of those above.
        let _ = self.unfrozen_from.compare_exchange(number, number + 1, Ordering::AcqRel, Ordering::Relaxed);
        Ok(())
    }

    /// Why flushes fail, now and until the stack is opened again: the first layer that is not frozen and cannot be made durable.
    pub fn failure(&self) -> Option<LayerError> {
        if let Some(failure) = self.settling_failure() {
            return Some(failure.clone());
        }
        let unfrozen_from = self.unfrozen_from.load(Ordering::Acquire);
        self.view().layers.iter().skip(unfrozen_from).find_map(|layer| layer.admit_write().err().filter(LayerError::is_failure))
    }

    /// The lowest layer of which a flush had failed before it was opened ([`Layer::earlier_failure`]). Nothing that lies on it can be called durable, so
    /// no snapshot of it can be complete. Requests know nothing of it, and nor do flushes once the guest has been told.
    pub fn doubtful_layer(&self) -> Option<usize> {
        lowest_doubtful(self.view().layers(), self.settling.layers())
    }

    /// What a guest is answered whose flush, begun at `began`, came to `flushed`. If a flush had failed before the stack was opened and the guest may
    /// not know, because the failure was met by something else or the process was killed before the answer, its flushes fail until one begins when it
    /// certainly knows: what the others would stand for may be lost.
    fn tell(self: &Arc<Self>, began: Duration, flushed: Result<(), LayerError>) -> Result<(), LayerError> {
        if flushed.is_ok() && !self.untold {
            return Ok(());
        }
        let now = self.environment.now();
        let first_told = *self.first_told.get_or_init(|| now);
        let is_lie = self.untold && began.saturating_sub(first_told) < TOLD_AFTER;
        if flushed.is_ok() && !is_lie {
            return Ok(());
        }
        if !self.telling.swap(true, Ordering::AcqRel) {
            // Who waits for the end of the stack's files does not wait for this.
            let (stack, environment) = (Arc::downgrade(self), self.environment.clone());
            self.environment.spawn(async move {
                environment.sleep_until(now + TOLD_AFTER).await;
                if let Some(stack) = stack.upgrade() {
                    stack.telling.store(false, Ordering::Release);
                    stack.view().layers().iter().for_each(|layer| layer.note_told());
                }
            });
        }
        let layer = self.doubtful_layer().unwrap_or_default();
        flushed.and(Err(LayerError::Doubtful { layer }))
    }

    /// Publishes an equal view in the place of the present one, and ends when no request uses any view from before: a grace period, after which
    /// no request can still be reading or writing where the map pointed before.
    async fn grace_period(&self) {
        let before = {
            let _publishing = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
            let present = self.view();
            let retirement = self.retirements.add(present.top_number());
            let successor = View {
                stack: std::sync::Weak::clone(&present.stack),
                layers: Arc::clone(&present.layers),
                map: Arc::clone(&present.map),
                fence: present.fence.clone(),
                retirement: Arc::clone(&retirement),
            };
            self.retirements.publish(&retirement);
            self.present.store(Arc::new(successor));
            retirement
        };
        self.domain.advance();
        self.retirements.all_before(&before).await;
    }
}

/// `never_written`: so many of the layers have not been written to by this process, which does not hear of all that others meet there.
fn lowest_doubtful<E: Environment>(layers: &[Arc<Layer<E>>], never_written: usize) -> Option<usize> {
    let is_doubtful = |(number, layer): (usize, &Arc<Layer<E>>)| {
        let failure = if number < never_written { layer.present_failure() } else { layer.earlier_failure() };
        failure.is_some()
    };
    layers.iter().enumerate().position(is_doubtful)
}

impl<E: Environment> View<E> {
    /// Layers, base first.
    pub fn layers(&self) -> &[Arc<Layer<E>>] {
        &self.layers
    }

    /// Memory that the chain map takes, in bytes.
    pub fn map_bytes(&self) -> usize {
        self.map.memory_bytes()
    }

    /// The layer that is written to.
    pub fn top(&self) -> &Arc<Layer<E>> {
        &self.layers[self.top_number()]
    }

    fn top_number(&self) -> usize {
        self.layers.len() - 1
    }

    /// Number of the top layer as the map stores it.
    fn top_in_map(&self) -> u16 {
        u16::try_from(self.top_number()).expect("a stack has at most MAX_LAYERS layers")
    }

    /// The stack. Requests only exist while somebody holds it.
    fn stack(&self) -> Option<Arc<Stack<E>>> {
        self.stack.upgrade()
    }

    /// This stack's part in the fence that made it so, if one did.
    pub fn fence(&self) -> Option<&FenceMember> {
        self.fence.as_ref()
    }

    /// Ends when the results of requests of this view may be made visible: at once, but for the moment in which its fence is being passed.
    /// Every request awaits this just before its completion is published.
    pub async fn completions_released(&self) {
        if let Some(fence) = &self.fence {
            fence.hold_completion().await;
        }
    }

    /// Makes every write that completed before durable, in every layer that is not frozen yet, oldest first; those of earlier processes included.
    ///
    /// # Errors
    /// If a layer cannot be made durable.
    pub async fn flush(self: &Arc<Self>) -> Result<(), LayerError> {
        let Some(stack) = self.stack() else { return Ok(()) };
        let began = stack.environment.now();
        let flushed = self.flush_layers(&stack).await;
        stack.tell(began, flushed)
    }

    async fn flush_layers(&self, stack: &Arc<Stack<E>>) -> Result<(), LayerError> {
        stack.settle().await?;
        let first = stack.unfrozen_from.load(Ordering::Acquire);
        for layer in self.layers.iter().skip(first) {
            layer.flush().await?;
        }
        let top = Arc::clone(self.top());
        let unmapped = top.take_unmapped();
        if !unmapped.is_empty() {
            let stack = Arc::clone(stack);
            stack.environment.clone().spawn(async move {
                stack.grace_period().await;
                if let Err(error) = top.release(unmapped).await {
                    tracing::warn!(event = "release_failed", cause = %error, "freed clusters stay allocated until the image is checked");
                }
            });
        }
        Ok(())
    }

    fn check_range(&self, range: GuestRange, size: u64) -> Result<(), LayerError> {
        let end = range.start.checked_add(range.len);
        if end.is_none_or(|end| end.get() > size) || !range.is_aligned(SECTOR_BYTES) {
            return Err(LayerError::OutOfRange { range, size });
        }
        Ok(())
    }

    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.top().virtual_size()
    }
}

/// The smallest unit at which the layers' mappings can differ.
fn grain<E: Environment>(layers: &[Arc<Layer<E>>]) -> u64 {
    layers.iter().filter_map(|layer| layer.mapping_unit()).min().unwrap_or(UNIT_BYTES).min(UNIT_BYTES)
}

impl<E: Environment> std::fmt::Debug for Stack<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let present = self.present.load();
        f.debug_struct("Stack").field("layers", &present.layers.len()).field("virtual_size", &self.virtual_size).finish_non_exhaustive()
    }
}

impl<E: Environment> std::fmt::Debug for View<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("layers", &self.layers.len()).field("fence", &self.fence).finish_non_exhaustive()
    }
}

impl<E: Environment> Drop for View<E> {
    fn drop(&mut self) {
        self.retirement.complete();
    }
}

/// The bytes from the start of the disk to its end.
fn whole_disk(size: u64) -> GuestRange {
    GuestRange::new(GuestOffset::ZERO, size)
}

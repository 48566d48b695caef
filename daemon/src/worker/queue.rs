//! One virtqueue on its worker: from the ring to the stack and back.
//!
//! ```text
//!           start                stop               nothing in flight
//! stopped ─────────▶ running ───────────▶ draining ───────────────────▶ stopped
//!    ▲                │   ▲ enable, disable
//!    └──── abandon ───┘
//! ```
//!
//! An abandoned ring leaves requests behind that nobody waits for any more: [`Stragglers`]. Where the front-end keeps a
//! record of what is in flight they stay marked there, and the next start of the ring serves them again, after they have ended. Without one
//! they are given back at once, as failed.
//!
//! A request for which there is no space is held ([`Space`](crate::space::Space)). What is held keeps no ring from stopping that has a record: it
//! is in there for the next start. Other rings wait as for all requests, and whoever loses patience has it given back as failed.
//!
//! A request is one task. It keeps the view with which it was taken, serves itself, waits for the fence of that view, and only then writes its
//! status and comes back; the queue gives all that have come back to the driver at once.

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::select;
use snapfence::protocol::NoSpacePolicy;
use snapfence_image_format::error::LayerError;
use snapfence_image_format::runtime::{Executor, WaitQueue};
use snapfence_image_format::stack::{Attachment, Participant, View};
use snapfence_image_format::storage::Environment;
use tracing::{debug, info, warn};

use super::Doorbells;
use super::command::{Answer, Command, Start};
use crate::device::{Device, Stragglers};
use crate::space::RETRY_AFTER;
use crate::vring::request::{Parsed, Request};
use crate::vring::{Broken, Limits, Ring, Signal, Status, Used};

/// Most bytes of one queue in flight, unless a single request has more. What is copied on the way to the image takes so much memory, whatever
/// the driver asks for at once.
const MAX_BYTES_IN_FLIGHT: u64 = 64 << 20;
/// Most chains that one turn takes from one queue: few, so that the thread's other queues need not wait for more; and where the medium is so fast that what is
/// taken has been served when the turn is over, the driver works on some while we do on others.
const MAX_TAKEN_AT_ONCE: usize = 4;

/// A virtqueue.
pub(super) struct Queue<E: Environment, B> {
    id: u64,
    index: u16,
    device: Rc<Counted<Device<E>>>,
    /// Fences of the device's stack wait for this thread.
    _attachment: Attachment,
    /// The present view, as long as requests are being taken with it.
    view: Option<Rc<Counted<View<E>>>>,
    state: State<B>,
    /// Memory for what is given back at once.
    batch: Vec<Used>,
}

/// One count of something that threads share, so that requests count on their own thread only.
struct Counted<T>(Arc<T>);

impl<T> Deref for Counted<T> {
    type Target = Arc<T>;
    fn deref(&self) -> &Arc<T> {
        &self.0
    }
}

enum State<B> {
    Stopped {
        /// Where a restart goes on.
        next_avail: u16,
    },
    Running(Box<Running<B>>),
}

/// A ring that runs.
struct Running<B> {
    ring: Ring,
    _bell: B,
    call: Option<Arc<Signal>>,
    error: Option<Arc<Signal>>,
    flow: Flow,
    /// Taken and not given back.
    in_flight: usize,
    /// Whether the last turn left chains for the next one, which takes them at once.
    goes_on: bool,
    /// Given back since the driver was last interrupted, and whether it wants to be.
    unannounced: usize,
    is_call_due: bool,
    /// One per start of a ring, so that requests of an abandoned one never come into another.
    ledger: Rc<Ledger>,
    /// Held by each request in flight that uses the present memory.
    memory_in_use: Rc<()>,
    /// Memory tables before, and who waits until they are not used any more.
    memories_before: Vec<(Rc<()>, Answer<()>)>,
    /// The memory table has no place for the ring. Nothing is taken before another one has: front-ends change a region by removing and adding it.
    is_unmapped: bool,
    /// A task waits for the device's stragglers, and will wake the worker.
    is_awaiting_stragglers: Rc<Cell<bool>>,
    /// Whether a chain of this ring has been reported as malformed. The rest is for those who debug: a guest must not fill the log.
    has_complained: bool,
}

/// What requests tell their queue.
struct Ledger {
    /// Requests that have ended.
    ended: RefCell<Vec<Used>>,
    /// Bytes of the chains that have not.
    bytes_in_flight: Cell<u64>,
    /// The ring is gone: the driver may use the memory of its requests for something else.
    is_closed: Cell<bool>,
    /// Nothing is held any more: what would be fails.
    is_impatient: Cell<bool>,
    /// Requests that wait for space, and are not being tried just now.
    held: Cell<usize>,
    /// Something has changed that those look at.
    changed: WaitQueue,
    /// Where those count that end afterwards.
    stragglers: Arc<Stragglers>,
}

impl Ledger {
    fn new(stragglers: Arc<Stragglers>) -> Self {
        Self {
            ended: RefCell::default(),
            bytes_in_flight: Cell::default(),
            is_closed: Cell::default(),
            is_impatient: Cell::default(),
            held: Cell::default(),
            changed: WaitQueue::new(),
            stragglers,
        }
    }

    /// Whether nothing is to be held.
    fn gives_up(&self) -> bool {
        self.is_closed.get() || self.is_impatient.get()
    }

    fn has_room(&self) -> bool {
        self.bytes_in_flight.get() < MAX_BYTES_IN_FLIGHT
    }
}

/// Whether chains are taken.
enum Flow {
    /// Yes.
    Enabled,
    /// Not before it is enabled; those wait for nothing to be in flight.
    Disabled(Vec<Answer<()>>),
    /// Never again; when nothing is in flight the ring is gone.
    Stopping(Answer<u16>),
    /// Never again, by the driver's fault, until the ring is started again; those wait for nothing to be in flight.
    Broken(Vec<Answer<()>>),
}

impl<B> Drop for Running<B> {
    fn drop(&mut self) {
        // Whatever ends the ring, the driver hears of what was given back.
        if self.is_call_due
            && let Some(call) = &self.call
        {
            call.raise();
        }
        self.ledger.is_closed.set(true);
        self.ledger.stragglers.add(self.in_flight - self.ledger.ended.borrow().len());
        self.ledger.changed.notify_all();
    }
}

impl<B> Running<B> {
    /// Whether no more may be in flight. A driver cannot have more chains out than descriptors: one that claims to waits.
    fn is_full(&self) -> bool {
        self.in_flight >= usize::from(self.ring.size()) || !self.ledger.has_room()
    }

    /// Whether chains may be taken as far as this ring knows.
    fn is_open(&self) -> bool {
        matches!(self.flow, Flow::Enabled) && !self.is_unmapped
    }

    /// Whether the driver may be interrupted in a later turn. An interrupt can take as long as several requests on a fast medium; where more chains
    /// are about to be served, the driver hears of most of them at once, but still has time to make others available before they are done.
    fn can_call_later(&self) -> bool {
        self.goes_on && self.unannounced * 2 < usize::from(self.ring.left_to_take()) * 3
    }

    /// Gives everything back that is in flight, as failed. It goes on nevertheless.
    fn give_up(&mut self, limits: Limits) {
        let mut batch = self.ledger.ended.take();
        batch.extend(
            self.ring
                .outstanding()
                .filter(|chain| batch.iter().all(|used| used.head != chain.head))
                .map(|chain| {
                    let parsed = Parsed::new(chain, limits);
                    if let Some(place) = &parsed.status {
                        place.copy_in(0, &[Status::IoError as u8]);
                    }
                    Used { head: parsed.head, written: 0 }
                })
                .collect::<Vec<_>>(),
        );
        self.is_call_due |= self.ring.publish(&batch);
    }
}

impl<E: Environment, B> Queue<E, B> {
    /// A queue whose ring does not run.
    pub(super) fn new(id: u64, device: Arc<Device<E>>, index: u16, participant: &Participant) -> Self {
        let _attachment = device.stack().attach(participant);
        Self {
            id,
            index,
            device: Rc::new(Counted(device)),
            _attachment,
            view: None,
            state: State::Stopped { next_avail: 0 },
            batch: Vec::new(),
        }
    }

    /// Its name on the worker.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The next request is taken with whatever is the present view then.
    pub(super) fn forget_view(&mut self) {
        self.view = None;
    }

    /// Does as told.
    pub(super) fn obey(&mut self, command: Command, doorbells: &impl Doorbells<Bell = B>) {
        let running = match &mut self.state {
            State::Running(running) => running,
            State::Stopped { next_avail } => {
                match command {
                    Command::Start { start, answer } => self.start(*start, &answer, doorbells),
                    Command::Stop { answer } | Command::Abandon { answer } => tell(&answer, *next_avail),
                    Command::Disable { answer } | Command::Memory { answer, .. } => tell(&answer, ()),
                    Command::GiveUpHeld | Command::Enable | Command::Kick(_) | Command::Call(_) | Command::Error(_) | Command::Detach => {}
                }
                return;
            }
        };
        match command {
            Command::Start { start, answer } => self.start(*start, &answer, doorbells),
            Command::Stop { answer } => running.flow = Flow::Stopping(answer),
            Command::Abandon { answer } => {
                let next_avail = running.ring.next_avail();
                let (device, queue, in_flight) = (self.device.name(), self.index, running.in_flight);
                if running.ring.has_record() {
                    warn!(
                        event = "ring_abandoned",
                        device, queue, in_flight, "what is in flight is served again when the ring starts again"
                    );
                } else {
                    warn!(event = "ring_abandoned", device, queue, in_flight, "what is in flight is given back as failed");
                    running.give_up(self.device.limits());
                }
                self.state = State::Stopped { next_avail };
                tell(&answer, next_avail);
            }
            Command::GiveUpHeld => {
                running.ledger.is_impatient.set(true);
                running.ledger.changed.notify_all();
            }
            Command::Enable => {
                running.ledger.is_impatient.set(false);
                if let Flow::Disabled(_) = running.flow {
                    running.flow = Flow::Enabled;
                }
            }
            Command::Disable { answer } => match &mut running.flow {
                Flow::Enabled => running.flow = Flow::Disabled(vec![answer]),
                Flow::Disabled(waiting) | Flow::Broken(waiting) => waiting.push(answer),
                // Whoever has asked for the stop has given up waiting for it.
                Flow::Stopping(_) => {}
            },
            Command::Kick(kick) => running._bell = doorbells.watch(kick.into()),
            Command::Call(call) => {
                // What was given back just now, through the descriptor that the front-end does not look at any more, is made up for. One call
                // too many is harmless.
                if let Some(call) = &call {
                    call.raise();
                }
                running.call = call;
            }
            Command::Error(error) => {
                if let (Flow::Broken(_), Some(error)) = (&running.flow, &error) {
                    error.raise();
                }
                running.error = error;
            }
            Command::Memory { memory, answer } => {
                let before = std::mem::replace(&mut running.memory_in_use, Rc::new(()));
                running.memories_before.push((before, answer));
                let outcome = running.ring.set_memory(memory);
                running.is_unmapped = outcome.is_err();
                if let Err(cause) = outcome {
                    let (device, queue) = (self.device.name(), self.index);
                    warn!(event = "ring_unmapped", device, queue, %cause, "nothing is taken until the ring is in memory again");
                }
            }
            Command::Detach => {}
        }
    }

    fn start(&mut self, start: Start, answer: &Answer<Result<(), crate::vring::RingError>>, doorbells: &impl Doorbells<Bell = B>) {
        let Start { layout, features, base, memory, record, kick, call, error, enabled } = start;
        let ring = match Ring::new(memory, layout, features, base, record) {
            Ok(ring) => ring,
            Err(error) => return tell(answer, Err(error)),
        };
        if ring.next_avail() != base {
            let (device, queue) = (self.device.name(), self.index);
            debug!(event = "ring_base", device, queue, base, resumed_at = ring.next_avail(), "front-end's base is not used");
        }
        if ring.left_over() > 0 {
            let (device, queue) = (self.device.name(), self.index);
            info!(
                event = "requests_resumed",
                device,
                queue,
                count = ring.left_over(),
                "requests that were in flight before are served again"
            );
        }
        if ring.has_past()
            && let Some(call) = &call
        {
            // Whoever served the ring may have gone between giving back and calling. One call too many is harmless.
            call.raise();
        }
        self.state = State::Running(Box::new(Running {
            ring,
            _bell: doorbells.watch(kick.into()),
            call,
            error,
            flow: if enabled { Flow::Enabled } else { Flow::Disabled(Vec::new()) },
            in_flight: 0,
            goes_on: false,
            unannounced: 0,
            is_call_due: false,
            ledger: Rc::new(Ledger::new(Arc::clone(self.device.stragglers()))),
            memory_in_use: Rc::new(()),
            memories_before: Vec::new(),
            is_unmapped: false,
            is_awaiting_stragglers: Rc::default(),
            has_complained: false,
        }));
        tell(answer, Ok(()));
    }

    /// Takes what the driver has made available, as far as it may be in flight, and makes a task of each chain. Returns how many there were.
    pub(super) fn take(&mut self, executor: &Executor, participant: &Participant) -> usize {
        let State::Running(running) = &mut self.state else { return 0 };
        running.goes_on = false;
        if !running.is_open() {
            return 0;
        }
        let stragglers = self.device.stragglers();
        if stragglers.count() > 0 {
            if !running.is_awaiting_stragglers.replace(true) {
                let (device, queue, count) = (self.device.name(), self.index, stragglers.count());
                warn!(event = "requests_awaited", device, queue, count, "nothing is taken before requests have ended that were given up");
                let (stragglers, is_awaiting) = (Arc::clone(stragglers), Rc::clone(&running.is_awaiting_stragglers));
                // Its end wakes this worker, whose next turn looks again.
                executor.spawn(async move {
                    stragglers.gone().await;
                    is_awaiting.set(false);
                });
            }
            return 0;
        }
        match running.ring.waiting() {
            Ok(0) => return 0,
            Ok(_) => running.ring.suppress_kicks(),
            Err(broken) => {
                self.break_down(broken);
                return 0;
            }
        }
        // Only now, after the look at the ring: what is in there may follow from results in newer views than the turn began with.
        if participant.is_stale() {
            self.view = None;
        }
        let view = self.view.get_or_insert_with(|| Rc::new(Counted(self.device.stack().view())));
        let limits = self.device.limits();
        for taken in 0..MAX_TAKEN_AT_ONCE {
            if running.is_full() {
                return taken;
            }
            let chain = match running.ring.take() {
                Ok(Some(chain)) => chain,
                Ok(None) => return taken,
                Err(broken) => {
                    self.break_down(broken);
                    return taken;
                }
            };
            let bytes = chain.bytes();
            running.in_flight += 1;
            running.ledger.bytes_in_flight.update(|before| before + bytes);
            let parsed = Parsed::new(chain, limits);
            if let Err(refusal) = &parsed.request {
                let (device, queue, head) = (self.device.name(), self.index, parsed.head);
                if running.has_complained {
                    debug!(event = "request_refused", device, queue, head, cause = %refusal, "request makes no sense");
                } else {
                    running.has_complained = true;
                    warn!(event = "request_refused", device, queue, head, cause = %refusal, "request makes no sense; further ones of this queue go to the debug log");
                }
            }
            let request = Task {
                parsed,
                device: Rc::clone(&self.device),
                view: Rc::clone(view),
                bytes,
                ledger: Rc::clone(&running.ledger),
                memory_in_use: Rc::clone(&running.memory_in_use),
            };
            executor.spawn(request.run());
        }
        running.goes_on = running.ring.left_to_take() > 0 && !running.is_full();
        MAX_TAKEN_AT_ONCE
    }

    /// Gives back what has ended, and answers those who have waited for it.
    pub(super) fn give_back(&mut self) {
        let State::Running(running) = &mut self.state else { return };
        std::mem::swap(&mut self.batch, &mut running.ledger.ended.borrow_mut());
        if !self.batch.is_empty() {
            running.in_flight -= self.batch.len();
            running.is_call_due |= running.ring.publish(&self.batch);
            running.unannounced += self.batch.len();
            self.batch.clear();
        }
        if running.is_call_due && !running.can_call_later() {
            running.is_call_due = false;
            running.unannounced = 0;
            if let Some(call) = &running.call {
                call.raise();
            }
        }
        running.memories_before.retain(|(in_use, answer)| {
            let is_used = Rc::strong_count(in_use) > 1;
            if !is_used {
                tell(answer, ());
            }
            is_used
        });
        if running.in_flight > 0 {
            if let Flow::Stopping(answer) = &running.flow
                && running.ring.has_record()
                && running.in_flight == running.ledger.held.get()
            {
                let next_avail = running.ring.next_avail();
                let (device, queue, count) = (self.device.name(), self.index, running.in_flight);
                warn!(event = "requests_left", device, queue, count, "requests that wait for space are served when the ring starts again");
                tell(answer, next_avail);
                self.state = State::Stopped { next_avail };
            }
            return;
        }
        match &mut running.flow {
            Flow::Enabled => {}
            Flow::Disabled(waiting) | Flow::Broken(waiting) => waiting.drain(..).for_each(|answer| tell(&answer, ())),
            Flow::Stopping(answer) => {
                let next_avail = running.ring.next_avail();
                tell(answer, next_avail);
                self.state = State::Stopped { next_avail };
            }
        }
    }

    /// Before the worker sleeps: asks for kicks. `true` if there is something to take after all.
    pub(super) fn ask_for_kick(&mut self) -> bool {
        let State::Running(running) = &mut self.state else { return false };
        // A ring that may not be taken from needs no kicks; a full one goes on when something has ended.
        if !running.is_open() || running.is_full() {
            return false;
        }
        if self.device.stragglers().count() > 0 {
            // Their end wakes the worker if somebody waits for it; else the next turn sees to that.
            return !running.is_awaiting_stragglers.get();
        }
        match running.ring.ask_for_kick() {
            Ok(waiting) => waiting,
            Err(broken) => {
                self.break_down(broken);
                false
            }
        }
    }

    fn break_down(&mut self, cause: Broken) {
        let State::Running(running) = &mut self.state else { return };
        let (device, queue) = (self.device.name(), self.index);
        warn!(event = "ring_broken", device, queue, %cause, "nothing is taken until the front-end sets the ring up again");
        if let Some(error) = &running.error {
            error.raise();
        }
        running.goes_on = false;
        running.flow = match std::mem::replace(&mut running.flow, Flow::Enabled) {
            Flow::Enabled => Flow::Broken(Vec::new()),
            Flow::Disabled(waiting) | Flow::Broken(waiting) => Flow::Broken(waiting),
            // It still gets its answer.
            Flow::Stopping(answer) => Flow::Stopping(answer),
        };
    }
}

/// Answers, if anybody still waits.
fn tell<T>(answer: &Answer<T>, value: T) {
    // The channel has room for its one answer; if it is closed, whoever asked has given up.
    let _ = answer.try_send(value);
}

/// A request on its way.
struct Task<E: Environment> {
    parsed: Parsed,
    device: Rc<Counted<Device<E>>>,
    view: Rc<Counted<View<E>>>,
    bytes: u64,
    ledger: Rc<Ledger>,
    memory_in_use: Rc<()>,
}

impl<E: Environment> Task<E> {
    async fn run(self) {
        let Self { parsed, device, view, bytes, ledger, memory_in_use } = self;
        let (head, data_bytes) = (parsed.head, parsed.data_bytes());
        let (status, filled, view) = match &parsed.request {
            Ok(request) => {
                let (mut outcome, mut view) = (request.serve(&view, device.serial(), device.cache()).await, view);
                if let Err(error) = &outcome
                    && request.needs_space()
                    && device.lacks_space(error)
                {
                    // Seldom, so every other task is smaller without it.
                    (outcome, view) = Box::pin(without_space(request, error.clone(), &device, view, &ledger, bytes)).await;
                }
                match outcome {
                    Ok(filled) => (Status::Ok, filled, view),
                    Err(error) => {
                        if !ledger.is_closed.get() {
                            device.note_failure(&error);
                        }
                        (Status::from(&error), 0, view)
                    }
                }
            }
            Err(refusal) => (refusal.status(), 0, view),
        };
        // Nothing of the answer may be seen before the fence is passed, the status byte included.
        view.completions_released().await;
        if ledger.is_closed.get() {
            ledger.stragglers.remove();
            return;
        }
        let written = match parsed.status {
            Some(place) => {
                place.copy_in(0, &[status as u8]);
                Parsed::written(data_bytes, filled)
            }
            None => 0,
        };
        ledger.ended.borrow_mut().push(Used { head, written });
        ledger.bytes_in_flight.update(|before| before - bytes);
        if ledger.held.get() > 0 {
            // There may be room for them now.
            ledger.changed.notify_all();
        }
        drop(memory_in_use);
    }
}

/// Goes on with a request that has failed with `error`, for want of space: as the device's policy says, holds it until there is some. Returns what
/// became of it, and the view from which it was served last.
async fn without_space<E: Environment>(
    request: &Request,
    mut error: LayerError,
    device: &Device<E>,
    mut view: Rc<Counted<View<E>>>,
    ledger: &Ledger,
    bytes: u64,
) -> (Result<usize, LayerError>, Rc<Counted<View<E>>>) {
    let space = device.space();
    if space.policy() == NoSpacePolicy::Report {
        space.note_failed(&error, device.stack().environment().now());
        return (Err(error), view);
    }
    let held = space.hold();
    let mut resumptions = space.resumptions();
    loop {
        if ledger.gives_up() {
            return (Err(error), view);
        }
        held.note_refused(&error);
        // Neither a layer that is being frozen waits for it, nor other requests for the memory that it would take.
        drop(view);
        ledger.bytes_in_flight.update(|before| before - bytes);
        ledger.held.update(|before| before + 1);
        wait_for_space(device, ledger, resumptions).await;
        ledger.held.update(|before| before - 1);
        ledger.bytes_in_flight.update(|before| before + bytes);
        // The newest: the one before may have been cut, and its layer may not change any more. Nothing of the request has been seen yet.
        view = Rc::new(Counted(device.stack().view()));
        if ledger.gives_up() {
            return (Err(error), view);
        }
        resumptions = space.resumptions();
        match request.serve(&view, device.serial(), device.cache()).await {
            Err(again) if device.lacks_space(&again) => error = again,
            outcome => return (outcome, view),
        }
    }
}

/// Ends when a held request is to be tried again, or given up. `resumptions`: as there were when it was tried last.
async fn wait_for_space<E: Environment>(device: &Device<E>, ledger: &Ledger, resumptions: u64) {
    let environment = device.stack().environment();
    let time = std::pin::pin!(environment.sleep_until(environment.now() + RETRY_AFTER));
    let resumption = std::pin::pin!(device.space().resumed_since(resumptions));
    let end = std::pin::pin!(ledger.changed.wait_until(|| ledger.gives_up().then_some(())));
    select(select(time, resumption), end).await;
    ledger.changed.wait_until(|| (ledger.gives_up() || ledger.has_room()).then_some(())).await;
}

//! One thread's place to wait: its ring, its tasks, its watches.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::probe::{self, Capable, Tier};
use super::ring::{self, Handle, Ring};
use crate::runtime::{Executor, Unpark};

/// One io_uring with the tasks of its thread. Clones share both; none leaves the thread that made it.
#[derive(Clone)]
pub struct Reactor {
    // Dropped first: tasks hold futures, whose operations the ring then waits for.
    executor: Executor,
    ring: Rc<Ring>,
}

/// How long a [`Reactor::turn`] may wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all. Without anything to submit or to fetch this makes no system call.
    No,
    /// As long as it takes.
    Forever,
    /// Until this time on the clock of [`Environment::now`](crate::storage::Environment::now) (`CLOCK_MONOTONIC`).
    Until(Duration),
}

/// What every ring holds open.
static HELD: OnceLock<OwnedFd> = OnceLock::new();

/// Lets every ring that this process makes from now on hold `descriptor` open until its last operation has ended, which can be after the end of the
/// process: the kernel goes on with what is in flight. Whoever sees the descriptor closed, by a lock on it, knows that nothing of the process
/// reaches files or memory any more. Only the first call counts.
pub fn hold_while_in_flight(descriptor: OwnedFd) {
    let _ = HELD.set(descriptor);
}

impl Reactor {
    /// A reactor for the calling thread, whose ring takes `entries` submissions at a time. More operations than that may be under way.
    ///
    /// # Errors
    /// With an explanation, if the system forbids io_uring or its kernel is too old.
    pub fn new(entries: u32) -> io::Result<Self> {
        let capable = probe::build(entries)?;
        if let Some(descriptor) = HELD.get() {
            capable.uring.submitter().register_files(&[descriptor.as_raw_fd()])?;
        }
        Self::over(capable)
    }

    pub(super) fn over(capable: Capable) -> io::Result<Self> {
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let ring = Rc::new(Ring::new(capable, Arc::clone(&wake)));
        Ok(Self { executor: Executor::new(WakeDescriptor(wake)), ring })
    }

    /// How this kernel delivers completions.
    pub fn tier(&self) -> Tier {
        self.ring.tier()
    }

    /// The executor whose wakers end this reactor's waits.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Makes this the thread's current reactor, which files and environment use, until the answer is dropped.
    pub fn enter(&self) -> Entered<'_> {
        Entered { outer: ring::set_current(Some(Rc::clone(&self.ring))), reactor: PhantomData }
    }

    /// Reports `token` through [`take_events`](Self::take_events) whenever `fd` becomes readable, at first at once if it is already. The
    /// descriptor is never read: for an eventfd each signal is a new readiness, for others the owner reads until there is nothing left.
    ///
    /// A descriptor whose other end is closed, or that cannot be waited for, is reported a last time and then no more.
    pub fn watch(&self, fd: OwnedFd, token: u64) -> Watch {
        Watch { handle: self.ring.watch(fd, token) }
    }

    /// Appends the tokens of the watches that have become ready since the last call, each once.
    pub fn take_events(&self, into: &mut Vec<u64>) {
        self.ring.take_events(into);
    }

    /// Hands queued submissions to the kernel, waits as far as `wait` allows and nothing is ready (no task, no event, no completion), and
    /// processes the completions that have arrived. Returns early for signals and wake-ups.
    ///
    /// # Errors
    /// If the kernel does not accept the ring's submissions at all, which has no remedy.
    pub fn turn(&self, wait: Wait) -> io::Result<()> {
        self.turn_unless(wait, self.ring.has_events())
    }

    /// A turn that does not wait if `something_to_do`.
    fn turn_unless(&self, wait: Wait, something_to_do: bool) -> io::Result<()> {
        let sleeps = wait != Wait::No && !something_to_do && !self.ring.has_completions() && self.executor.prepare_park();
        let entered = self.ring.submit(if sleeps { wait } else { Wait::No });
        if sleeps {
            self.executor.end_park();
        }
        self.ring.dispatch();
        entered
    }

    /// Runs this thread's tasks and `future` until it ends, as the thread's current reactor.
    ///
    /// # Errors
    /// If the ring fails; the future then stays behind as a task.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> io::Result<T> {
        let _entered = self.enter();
        let result = Rc::new(Cell::new(None));
        let slot = Rc::clone(&result);
        self.executor.spawn(async move { slot.set(Some(future.await)) });
        loop {
            self.executor.run_ready();
            if let Some(value) = result.take() {
                return Ok(value);
            }
            // Events are for whoever calls `take_events` later.
            self.turn_unless(Wait::Forever, false)?;
        }
    }
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reactor({}, {:?})", self.ring.tier(), self.executor)
    }
}

/// Keeps a reactor the current one of its thread.
#[derive(Debug)]
pub struct Entered<'a> {
    outer: Option<Rc<Ring>>,
    reactor: PhantomData<&'a Reactor>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Outside of the borrow: the last handle of a ring waits for its operations.
        let inner = ring::set_current(self.outer.take());
        drop(inner);
    }
}

/// A descriptor that is being watched. Dropping it ends that, and events of it that were not taken yet are forgotten.
#[derive(Debug)]
pub struct Watch {
    #[expect(dead_code, reason = "what counts is that it is dropped")]
    handle: Handle,
}

struct WakeDescriptor(Arc<OwnedFd>);

impl Unpark for WakeDescriptor {
    fn unpark(&self) {
        // It fails only if the counter is full, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Poll;

    use super::*;
    use crate::runtime::{self, WaitQueue};
    use crate::storage::Environment;
    use crate::storage::uring::UringEnvironment;

    /// A reactor of each tier that this kernel knows.
    fn reactors() -> impl Iterator<Item = Reactor> {
        probe::tests::every_tier(8).into_iter().map(|capable| Reactor::over(capable).expect("a reactor"))
    }

    fn eventfd() -> OwnedFd {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
    }

    fn signal(fd: &OwnedFd) {
        rustix::io::write(fd, &1_u64.to_ne_bytes()).expect("an eventfd takes a signal");
    }

    fn events(reactor: &Reactor) -> Vec<u64> {
        let mut events = Vec::new();
        reactor.take_events(&mut events);
        events
    }

    #[test]
    fn a_waker_on_another_thread_ends_the_wait() {
        for reactor in reactors() {
            let shared = Arc::new((AtomicUsize::new(0), WaitQueue::new()));
            let other = Arc::clone(&shared);
            let setter = std::thread::spawn(move || {
                for _ in 0..1000 {
                    other.0.fetch_add(1, Ordering::SeqCst);
                    other.1.notify_all();
                }
            });
            let seen = reactor.block_on(async move {
                for count in 1..=1000 {
                    shared.1.wait_until(|| (shared.0.load(Ordering::SeqCst) >= count).then_some(())).await;
                }
                shared.0.load(Ordering::SeqCst)
            });
            assert_eq!(seen.expect("the ring works"), 1000);
            setter.join().expect("the setter does not panic");
        }
    }

    #[test]
    fn a_watched_eventfd_is_reported_for_each_signal_without_being_read() {
        for reactor in reactors() {
            let (kick, other) = (eventfd(), eventfd());
            let watch = reactor.watch(kick.try_clone().expect("a second descriptor"), 7);
            let _second = reactor.watch(other.try_clone().expect("a second descriptor"), 8);
            reactor.turn(Wait::No).expect("a turn");
            assert_eq!(events(&reactor), []);
            for _ in 0..100 {
                signal(&kick);
                while !reactor.ring.has_events() {
                    reactor.turn(Wait::Forever).expect("a turn");
                }
                assert_eq!(events(&reactor), [7]);
            }
            signal(&other);
            signal(&kick);
            while reactor.ring.event_count() < 2 {
                reactor.turn(Wait::No).expect("a turn");
            }
            // An event that nobody has taken keeps the thread awake, and dies with its watch.
            reactor.turn(Wait::Forever).expect("a turn");
            drop(watch);
            assert_eq!(events(&reactor), [8]);
            signal(&kick);
            signal(&other);
            while !reactor.ring.has_events() {
                reactor.turn(Wait::Forever).expect("a turn");
            }
            assert_eq!(events(&reactor), [8]);
            assert_eq!(reactor.ring.operation_count(), 1, "the dropped watch is gone");
        }
    }

    #[test]
    fn a_descriptor_that_is_readable_already_is_reported_at_once() {
        for reactor in reactors() {
            let kick = eventfd();
            signal(&kick);
            let _watch = reactor.watch(kick, 3);
            while !reactor.ring.has_events() {
                reactor.turn(Wait::Forever).expect("a turn");
            }
            assert_eq!(events(&reactor), [3]);
        }
    }

    #[test]
    fn a_closed_peer_is_reported_once_more_and_not_for_ever() {
        for reactor in reactors() {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
            let watch = reactor.watch(ours.into(), 5);
            drop(theirs);
            while !reactor.ring.has_events() {
                reactor.turn(Wait::Forever).expect("a turn");
            }
            assert_eq!(events(&reactor), [5]);
            reactor.turn(Wait::Until(UringEnvironment.now() + Duration::from_millis(20))).expect("a turn");
            assert!(events(&reactor).is_empty());
            drop(watch);
            while reactor.ring.operation_count() > 0 {
                reactor.turn(Wait::Forever).expect("a turn");
            }
        }
    }

    #[test]
    fn descriptors_that_are_always_ready_do_not_keep_the_thread_busy() {
        for reactor in reactors() {
            let files = [tempfile::tempfile(), std::fs::File::open("/dev/zero"), std::fs::File::open("/proc/self/mountinfo")];
            let _watches: Vec<_> =
                files.into_iter().zip(0..).map(|(file, token)| reactor.watch(file.expect("a file").into(), token)).collect();
            let deadline = UringEnvironment.now() + Duration::from_millis(20);
            let (mut reports, mut turns) = (Vec::new(), 0);
            while UringEnvironment.now() < deadline {
                reactor.turn(Wait::Until(deadline)).expect("a turn");
                reactor.take_events(&mut reports);
                turns += 1;
            }
            assert!(reports.len() <= 6 && turns <= 20, "{} reports in {turns} turns", reports.len());
        }
    }

    #[test]
    fn timers_end_in_the_order_of_their_deadlines() {
        for reactor in reactors() {
            let order = reactor.block_on(async {
                let order = Rc::new(RefCell::new(Vec::new()));
                let done = Rc::new(WaitQueue::new());
                let start = UringEnvironment.now();
                for number in [3_u64, 1, 2, 0] {
                    let (order, done) = (Rc::clone(&order), Rc::clone(&done));
                    let deadline = start + Duration::from_millis(10 * number);
                    runtime::spawn(async move {
                        UringEnvironment.sleep_until(deadline).await;
                        assert!(UringEnvironment.now() >= deadline);
                        order.borrow_mut().push(number);
                        done.notify_all();
                    });
                }
                done.wait_until(|| (order.borrow().len() == 4).then_some(())).await;
                order.take()
            });
            assert_eq!(order.expect("the ring works"), [0, 1, 2, 3]);
        }
    }

    #[test]
    fn a_dropped_timer_is_cancelled() {
        for reactor in reactors() {
            let far = UringEnvironment.now() + Duration::from_secs(1 << 30);
            let ring = Rc::clone(&reactor.ring);
            reactor
                .block_on(async move {
                    for _ in 0..100 {
                        let mut sleep = Box::pin(UringEnvironment.sleep_until(far));
                        std::future::poll_fn(|context| {
                            assert!(sleep.as_mut().poll(context).is_pending());
                            Poll::Ready(())
                        })
                        .await;
                    }
                    while ring.operation_count() > 0 {
                        UringEnvironment.sleep_until(UringEnvironment.now() + Duration::from_millis(1)).await;
                    }
                })
                .expect("the ring works");
        }
    }

    #[test]
    fn a_turn_until_a_deadline_ends_without_any_event() {
        for reactor in reactors() {
            let deadline = UringEnvironment.now() + Duration::from_millis(5);
            while UringEnvironment.now() < deadline {
                reactor.turn(Wait::Until(deadline)).expect("a turn");
            }
        }
    }

    #[test]
    fn the_inner_reactor_is_current_until_its_guard_goes() {
        let (outer, inner) = (Reactor::new(8).expect("a reactor"), Reactor::new(8).expect("a reactor"));
        let _outer = outer.enter();
        {
            let _inner = inner.enter();
            assert!(Rc::ptr_eq(&ring::current(), &inner.ring));
        }
        assert!(Rc::ptr_eq(&ring::current(), &outer.ring));
    }
}

//! Several threads of a program in one thread of the system, and the world's clock, turn by turn as the seed has it.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use super::SimulatedEnvironment;
use crate::runtime::{Executor, Unpark};
use crate::storage::{Chance, Environment};

/// More turns than any test takes: something goes round for ever.
const MAX_TURNS: u64 = 200_000_000;

/// Nothing that is so far away is waited for while a thread has work: deadlines of seconds pass because something hangs, not because nothing
/// else is to be waited for.
const MOST_WAIT: Duration = Duration::from_millis(100);

/// One thread of the simulated program.
pub trait SimulatedThread {
    /// Whether a turn now would do anything.
    fn has_work(&self) -> bool;

    /// Does what there is to do, once, without waiting.
    fn turn(&mut self);
}

impl SimulatedThread for Executor {
    fn has_work(&self) -> bool {
        self.has_ready()
    }

    fn turn(&mut self) {
        self.run_ready();
    }
}

/// Nothing sleeps in a simulation: who has work is looked at before every turn.
struct NoUnpark;

impl Unpark for NoUnpark {
    fn unpark(&self) {}
}

/// A program of any number of threads on a simulated disk.
pub struct Simulation {
    environment: SimulatedEnvironment,
    executor: Executor,
    threads: Vec<Box<dyn SimulatedThread>>,
    chance: Chance,
    turns: u64,
}

impl Simulation {
    /// One thread and an empty disk.
    pub fn new(seed: u64) -> Self {
        Self::on(SimulatedEnvironment::new(seed))
    }

    /// One thread, and a disk that is there already, perhaps after a crash.
    pub fn on(environment: SimulatedEnvironment) -> Self {
        let executor = Executor::new(NoUnpark);
        let chance = Chance::new(environment.seed() ^ 0x5c4e_d01e);
        Self { environment, executor: executor.clone(), threads: vec![Box::new(executor)], chance, turns: 0 }
    }

    /// The disk and the clock.
    pub fn environment(&self) -> &SimulatedEnvironment {
        &self.environment
    }

    /// The first thread's tasks.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Adds a thread that runs tasks.
    pub fn add_executor(&mut self) -> Executor {
        let executor = Executor::new(NoUnpark);
        self.threads.push(Box::new(executor.clone()));
        executor
    }

    /// An executor for a thread that is added later, with a loop of its own.
    pub fn new_executor(&self) -> Executor {
        Executor::new(NoUnpark)
    }

    /// Adds a thread with a loop of its own.
    pub fn add_thread(&mut self, thread: impl SimulatedThread + 'static) {
        self.threads.push(Box::new(thread));
    }

    /// Lets one thread have a turn, or the next thing happen on the disk. `false`: neither is possible.
    ///
    /// # Panics
    /// If the simulation goes round for ever.
    pub fn step(&mut self) -> bool {
        self.turns += 1;
        assert!(self.turns < MAX_TURNS, "seed {}: the simulation does not end", self.environment.seed());
        let ready: Vec<usize> = (0..self.threads.len()).filter(|thread| self.threads[*thread].has_work()).collect();
        // Now and then the disk is faster than every thread.
        if ready.is_empty() || self.chance.happens(1, 8) {
            let is_soon = |at: Duration| at <= self.environment.now() + MOST_WAIT;
            if (ready.is_empty() || self.environment.next_event().is_some_and(is_soon)) && self.environment.advance() {
                return true;
            }
            if ready.is_empty() {
                return false;
            }
        }
        let chosen = ready[self.chance.index(ready.len())];
        self.threads[chosen].turn();
        true
    }

    /// Goes on until nothing is left to do.
    pub fn run_until_stalled(&mut self) {
        while self.step() {}
    }

    /// Runs `future` on the first thread, beside everything else, until it ends: or `None` if nothing can go on before.
    pub fn run<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> Option<T> {
        let result = Rc::new(Cell::new(None));
        let slot = Rc::clone(&result);
        self.executor.spawn(async move { slot.set(Some(future.await)) });
        loop {
            if let Some(value) = result.take() {
                return Some(value);
            }
            if !self.step() {
                return None;
            }
        }
    }

    /// As [`run`](Self::run), for what must end.
    ///
    /// # Panics
    /// If it does not.
    pub fn block_on<T: 'static>(&mut self, future: impl Future<Output = T> + 'static) -> T {
        let ended = self.run(future);
        ended.unwrap_or_else(|| panic!("seed {}: deadlock, nothing can go on", self.environment.seed()))
    }
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Simulation(seed {}, {} threads, {} turns)", self.environment.seed(), self.threads.len(), self.turns)
    }
}

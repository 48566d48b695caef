//! The queue threads, shared by all devices.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use snapfence_image_format::stack::FenceDomain;
use snapfence_image_format::storage::uring::UringEnvironment;

use super::priority::Foreground;
use crate::worker::{WorkerHandle, WorkerThread};

/// Submissions that the ring of a queue thread takes at a time.
const RING_ENTRIES: u32 = 128;

/// Queue threads. Each new queue gets a thread of its own until there are as many threads as processors; after that the threads that have least
/// take one more.
#[derive(Debug)]
pub(super) struct Workers {
    foreground: Rc<Foreground>,
    threads: Vec<Member>,
    limit: usize,
    /// Longest wait that each spends looking for work.
    polling: Duration,
}

#[derive(Debug)]
struct Member {
    thread: WorkerThread<UringEnvironment>,
    queues: usize,
}

/// Which threads serve a device's queues: to be given back with [`Workers::give_back`].
#[derive(Debug)]
pub(super) struct Assignment(Vec<usize>);

impl Workers {
    /// No threads, and at most `limit` of them later, made by `foreground`, which spend waits of up to `polling` looking for work.
    pub(super) fn new(foreground: Rc<Foreground>, limit: usize, polling: Duration) -> Self {
        Self { foreground, threads: Vec::new(), limit: limit.max(1), polling }
    }

    /// A thread for each of `queues` queues.
    ///
    /// # Errors
    /// If the system gives no thread or no ring.
    pub(super) fn assign(
        &mut self,
        queues: u16,
        domain: &Arc<FenceDomain>,
    ) -> io::Result<(Assignment, Vec<WorkerHandle<UringEnvironment>>)> {
        let mut assignment = Assignment(Vec::new());
        let mut handles = Vec::new();
        for _ in 0..queues {
            match self.least_busy(domain) {
                Ok(index) => {
                    self.threads[index].queues += 1;
                    handles.push(self.threads[index].thread.handle().clone());
                    assignment.0.push(index);
                }
                Err(error) => {
                    self.give_back(assignment);
                    return Err(error);
                }
            }
        }
        Ok((assignment, handles))
    }

    /// Those queues are no more.
    pub(super) fn give_back(&mut self, assignment: Assignment) {
        for index in assignment.0 {
            self.threads[index].queues -= 1;
        }
    }

    fn least_busy(&mut self, domain: &Arc<FenceDomain>) -> io::Result<usize> {
        let least = (0..self.threads.len()).min_by_key(|&index| self.threads[index].queues);
        match least {
            Some(index) if self.threads[index].queues == 0 || self.threads.len() >= self.limit => Ok(index),
            _ => {
                let (name, polling, domain) = (format!("queues {}", self.threads.len()), self.polling, Arc::clone(domain));
                let thread = self.foreground.run(move || WorkerThread::spawn(name, RING_ENTRIES, polling, &domain)).flatten()?;
                self.threads.push(Member { thread, queues: 0 });
                Ok(self.threads.len() - 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_spread_over_a_limited_number_of_threads() {
        let domain = FenceDomain::new(|| Duration::ZERO);
        let foreground = Rc::new(Foreground::new().expect("a thread"));
        let mut workers = Workers::new(foreground, 3, Duration::ZERO);
        let (first, handles) = workers.assign(2, &domain).expect("threads");
        assert_eq!((first.0.clone(), handles.len()), (vec![0, 1], 2));
        let (second, _) = workers.assign(4, &domain).expect("threads");
        assert_eq!(second.0, [2, 0, 1, 2]);
        workers.give_back(first);
        let (third, _) = workers.assign(2, &domain).expect("threads");
        assert_eq!(third.0, [0, 1]);
        assert_eq!(workers.threads.len(), 3);
    }
}

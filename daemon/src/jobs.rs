//! Jobs: what goes on for longer than a command, with QEMU's states.
//!
//! ```text
//! created ──▶ running ──▶ waiting ──▶ pending ──▶ concluded ──▶ null
//!    │           │                                   ▲
//!    └───────────┴────────────▶ aborting ────────────┘
//! ```
//!
//! A job is `created` while it waits in line. `waiting` and `pending` last no time, as for QEMU's jobs that finalise by themselves. A concluded
//! job stays listed until enough younger ones have concluded; then it is `null`, which is only ever seen in an event.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use snapfence::protocol::{Event, JobInfo, JobStatus, JobStatusChange};
use snapfence_image_format::runtime::WaitQueue;

use crate::name;

/// Concluded jobs that are still listed.
const KEPT: usize = 128;
/// Jobs that may be under way at once.
const MAX_ACTIVE: usize = 4096;

/// Where events go. Connections of devices use it from threads of their own.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// All jobs of the daemon. Belongs to the control thread.
pub struct Jobs {
    /// In the order in which they were made.
    list: RefCell<VecDeque<Rc<Job>>>,
    next_number: Cell<u64>,
    events: EventSink,
}

/// One job, for whoever does its work.
pub struct Job {
    id: String,
    kind: &'static str,
    status: Cell<JobStatus>,
    current: Cell<u64>,
    total: u64,
    error: RefCell<Option<String>>,
    cancellation: Cell<Cancellation>,
    cancelled: WaitQueue,
    events: EventSink,
}

/// How a job takes being cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cancellation {
    Possible,
    Asked,
    TooLate,
}

/// Why a job cannot be made or cancelled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The name is taken.
    #[error("there already is a job '{0}'")]
    Exists(String),
    /// The name breaks the rule for names.
    #[error("'{0}' cannot be a job's name: a name has {rule}", rule = name::RULE)]
    Name(String),
    /// Too many at once.
    #[error("{MAX_ACTIVE} jobs are under way; wait for one to conclude")]
    TooMany,
    /// No job of that name.
    #[error("there is no job '{0}'; query-jobs lists those there are")]
    Unknown(String),
    /// It has gone too far.
    #[error("job '{id}' is {status} and cannot be cancelled any more")]
    TooLate {
        /// Which job.
        id: String,
        /// Its status.
        status: &'static str,
    },
}

impl Jobs {
    /// No jobs yet.
    pub fn new(events: EventSink) -> Self {
        Self { list: RefCell::default(), next_number: Cell::new(1), events }
    }

    /// Makes a job of `total` steps, named by the caller or by number.
    ///
    /// # Errors
    /// If the name is taken or not possible, or too many jobs are under way.
    pub fn create(&self, kind: &'static str, id: Option<String>, total: u64) -> Result<Rc<Job>, JobError> {
        let active = self.list.borrow().iter().filter(|job| !job.status.get().is_over()).count();
        if active >= MAX_ACTIVE {
            return Err(JobError::TooMany);
        }
        let id = match id {
            Some(id) if name::check(&id).is_err() => return Err(JobError::Name(id)),
            Some(id) if self.find(&id).is_some() => return Err(JobError::Exists(id)),
            Some(id) => id,
            None => self.number(),
        };
        let job = Rc::new(Job {
            id,
            kind,
            status: Cell::new(JobStatus::Undefined),
            current: Cell::new(0),
            total,
            error: RefCell::default(),
            cancellation: Cell::new(Cancellation::Possible),
            cancelled: WaitQueue::new(),
            events: Arc::clone(&self.events),
        });
        self.list.borrow_mut().push_back(Rc::clone(&job));
        job.go_to(JobStatus::Created);
        Ok(job)
    }

    /// The jobs under way and the last of those that concluded, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        self.list.borrow().iter().map(|job| job.info()).collect()
    }

    /// Asks a job to end early.
    ///
    /// # Errors
    /// If there is no such job or it has gone too far.
    pub fn cancel(&self, id: &str) -> Result<(), JobError> {
        let job = self.find(id).ok_or_else(|| JobError::Unknown(id.to_owned()))?;
        match job.cancellation.get() {
            Cancellation::TooLate => Err(JobError::TooLate { id: id.to_owned(), status: job.status.get().as_str() }),
            Cancellation::Possible | Cancellation::Asked => {
                job.cancellation.set(Cancellation::Asked);
                job.cancelled.notify_all();
                Ok(())
            }
        }
    }

    /// Records how a job ended. The oldest concluded jobs beyond the number kept are dropped.
    pub fn conclude(&self, job: &Job, outcome: Result<(), String>) {
        job.seal();
        match outcome {
            Ok(()) => {
                job.current.set(job.total);
                for status in [JobStatus::Waiting, JobStatus::Pending, JobStatus::Concluded] {
                    job.go_to(status);
                }
            }
            Err(error) => {
                job.error.replace(Some(error));
                job.go_to(JobStatus::Aborting);
                job.go_to(JobStatus::Concluded);
            }
        }
        loop {
            let dropped = {
                let mut list = self.list.borrow_mut();
                let over = list.iter().filter(|job| job.status.get().is_over()).count();
                let oldest = list.iter().position(|job| job.status.get().is_over());
                oldest.filter(|_| over > KEPT).and_then(|at| list.remove(at))
            };
            match dropped {
                Some(job) => job.go_to(JobStatus::Null),
                None => return,
            }
        }
    }

    fn find(&self, id: &str) -> Option<Rc<Job>> {
        self.list.borrow().iter().find(|job| job.id == id).cloned()
    }

    fn number(&self) -> String {
        loop {
            let number = self.next_number.get();
            self.next_number.set(number + 1);
            let id = format!("job{number}");
            if self.find(&id).is_none() {
                return id;
            }
        }
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list.borrow().iter()).finish()
    }
}

impl Job {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Leaves the line.
    pub fn run(&self) {
        self.go_to(JobStatus::Running);
    }

    /// One more step is done.
    pub fn step(&self) {
        self.current.set((self.current.get() + 1).min(self.total));
    }

    /// Whether somebody has asked for the end.
    pub fn is_cancelled(&self) -> bool {
        self.cancellation.get() == Cancellation::Asked
    }

    /// From here on the job cannot be cancelled. `false` if that has been asked for already.
    pub fn seal(&self) -> bool {
        if self.is_cancelled() {
            return false;
        }
        self.cancellation.set(Cancellation::TooLate);
        true
    }

    /// Ends when somebody asks for the end.
    pub async fn wait_cancelled(&self) {
        self.cancelled.wait_until(|| self.is_cancelled().then_some(())).await;
    }

    /// As it is listed.
    pub fn info(&self) -> JobInfo {
        JobInfo {
            id: self.id.clone(),
            kind: self.kind.to_owned(),
            status: self.status.get(),
            current_progress: self.current.get(),
            total_progress: self.total,
            error: self.error.borrow().clone(),
        }
    }

    fn go_to(&self, status: JobStatus) {
        let from = self.status.replace(status);
        assert!(may_follow(from, status), "job {} goes from {from:?} to {status:?}", self.id);
        (self.events)(Event::JobStatusChange(JobStatusChange { id: self.id.clone(), status }));
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({} {:?})", self.id, self.status.get())
    }
}

/// The picture at the top of this file.
const fn may_follow(from: JobStatus, to: JobStatus) -> bool {
    use JobStatus::{Aborting, Concluded, Created, Null, Pending, Running, Undefined, Waiting};
    matches!(
        (from, to),
        (Undefined, Created)
            | (Created, Running | Aborting)
            | (Running, Waiting | Aborting)
            | (Waiting, Pending)
            | (Pending | Aborting, Concluded)
            | (Concluded, Null)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn jobs() -> (Jobs, Arc<Mutex<Vec<String>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let sink: EventSink = Arc::new(move |event| match event {
            Event::JobStatusChange(change) => log.lock().expect("no panics").push(format!("{} {}", change.id, change.status.as_str())),
            other => panic!("{other:?}"),
        });
        (Jobs::new(sink), seen)
    }

    #[test]
    fn every_status_is_announced() {
        let (jobs, seen) = jobs();
        let good = jobs.create("snapshot", Some("good".into()), 3).expect("a new name");
        good.run();
        good.step();
        assert_eq!(good.info().current_progress, 1);
        jobs.conclude(&good, Ok(()));
        let bad = jobs.create("snapshot", None, 1).expect("a new name");
        jobs.conclude(&bad, Err("no".into()));
        let expected = [
            "good created",
            "good running",
            "good waiting",
            "good pending",
            "good concluded",
            "job1 created",
            "job1 aborting",
            "job1 concluded",
        ];
        assert_eq!(*seen.lock().expect("no panics"), expected);
        let listed: Vec<_> = jobs.list().into_iter().map(|job| (job.id, job.current_progress, job.error)).collect();
        assert_eq!(listed, [("good".into(), 3, None), ("job1".into(), 0, Some("no".into()))]);
    }

    #[test]
    fn names_are_unique_and_numbers_avoid_them() {
        let (jobs, _) = jobs();
        jobs.create("snapshot", Some("job1".into()), 1).expect("a new name");
        assert_eq!(jobs.create("snapshot", Some("job1".into()), 1).expect_err("taken"), JobError::Exists("job1".into()));
        assert_eq!(jobs.create("snapshot", Some("a/b".into()), 1).expect_err("a path"), JobError::Name("a/b".into()));
        assert_eq!(jobs.create("snapshot", None, 1).expect("a number").id(), "job2");
    }

    #[test]
    fn cancelling_is_possible_until_the_job_is_sealed() {
        let (jobs, _) = jobs();
        assert_eq!(jobs.cancel("x"), Err(JobError::Unknown("x".into())));
        let job = jobs.create("snapshot", Some("x".into()), 1).expect("a new name");
        jobs.cancel("x").expect("possible");
        jobs.cancel("x").expect("once more says nothing new");
        assert!(job.is_cancelled() && !job.seal());
        let sealed = jobs.create("snapshot", Some("y".into()), 1).expect("a new name");
        sealed.run();
        assert!(sealed.seal());
        assert_eq!(jobs.cancel("y"), Err(JobError::TooLate { id: "y".into(), status: "running" }));
        assert!(!sealed.is_cancelled());
    }

    #[test]
    fn old_jobs_make_room() {
        let (jobs, seen) = jobs();
        let running = jobs.create("snapshot", Some("running".into()), 1).expect("a new name");
        for _ in 0..KEPT + 2 {
            let job = jobs.create("snapshot", None, 1).expect("a number");
            job.run();
            jobs.conclude(&job, Ok(()));
        }
        let listed: Vec<_> = jobs.list().into_iter().map(|job| job.id).collect();
        assert_eq!(listed.len(), KEPT + 1);
        assert_eq!(listed[..2], ["running".to_owned(), "job3".to_owned()]);
        assert!(seen.lock().expect("no panics").contains(&"job2 null".to_owned()));
        jobs.conclude(&running, Err("ends".into()));
    }
}

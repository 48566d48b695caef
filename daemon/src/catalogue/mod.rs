//! What outlives the daemon: which layers each device has, and the snapshots.
//!
//! The database blocks, so it has a thread of its own ([`Catalogue::start`]); tasks hand it closures and wait for the answer. In simulation
//! the same closures run in place ([`Catalogue::in_place`]), which keeps runs repeatable.

mod kept;
mod records;
mod state_dir;
mod store;
mod trial;
mod watched;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use snapfence_image_format::runtime::WaitQueue;

pub use kept::FileKeeper;
pub use records::{DeviceRecord, DeviceTimes, LayerRecord, Making, SnapshotDevice, SnapshotRecord, SnapshotState, microseconds};
pub use state_dir::StateDir;
pub use store::{CatalogueError, SCHEMA, Store, layers_beneath};

/// A way to the catalogue; clones lead to the same one.
#[derive(Clone)]
pub struct Catalogue(Arc<Mode>);

enum Mode {
    Thread { operations: Mutex<Option<mpsc::Sender<Operation>>>, thread: Mutex<Option<JoinHandle<()>>> },
    InPlace(Mutex<Store>),
}

type Operation = Box<dyn FnOnce(&mut Store) + Send>;

impl Catalogue {
    /// Locks the state directory, opens the database in it, and starts its thread. Memory that outlives the daemon is kept there as well.
    ///
    /// # Errors
    /// If the directory is in use or cannot be used, or the database makes no sense.
    pub fn start(directory: &Path) -> Result<(Self, FileKeeper), CatalogueError> {
        let state_dir = StateDir::lock(directory)?;
        let kept = state_dir.kept_memory();
        let keeper = FileKeeper::new(&kept).map_err(|source| CatalogueError::StateDirectory {
            action: "keep memory in",
            path: kept.clone(),
            source,
        })?;
        let path = state_dir.database();
        let mut store = Store::open(&path).map_err(|source| CatalogueError::File { path, source: Box::new(source) })?;
        state_dir.flush()?;
        let (operations, received) = mpsc::channel::<Operation>();
        let run = move || {
            // Held for as long as the store is open.
            let _state_dir = state_dir;
            while let Ok(operation) = received.recv() {
                operation(&mut store);
            }
        };
        let thread = std::thread::Builder::new()
            .name("catalogue".to_owned())
            .spawn(run)
            .map_err(|source| CatalogueError::StateDirectory { action: "start a thread for", path: directory.to_owned(), source })?;
        let mode = Mode::Thread { operations: Mutex::new(Some(operations)), thread: Mutex::new(Some(thread)) };
        Ok((Self(Arc::new(mode)), keeper))
    }

    /// A catalogue whose operations run on the caller's thread.
    pub fn in_place(store: Store) -> Self {
        Self(Arc::new(Mode::InPlace(Mutex::new(store))))
    }

    /// Runs `operation` on the database, after those asked for before, and gives its result. It runs even if the future is dropped.
    ///
    /// # Errors
    /// Those of the operation, and [`CatalogueError::Stopped`].
    pub async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Store) -> Result<T, CatalogueError> + Send + 'static,
    ) -> Result<T, CatalogueError> {
        let operations = match &*self.0 {
            Mode::InPlace(store) => return operation(&mut lock(store)),
            Mode::Thread { operations, .. } => operations,
        };
        let answer = Arc::new(Answer { value: Mutex::new(None), arrived: WaitQueue::new() });
        let promise = Promise(Arc::clone(&answer));
        let boxed: Operation = Box::new(move |store| promise.keep(operation(store)));
        if let Some(sender) = lock(operations).as_ref() {
            // If the thread has gone, the promise is dropped with the message and answers.
            let _ = sender.send(boxed);
        } else {
            drop(boxed);
        }
        answer.arrived.wait_until(|| lock(&answer.value).take()).await
    }

    /// Finishes what was asked for, closes the database and gives the state directory up. Blocks. Later operations fail.
    pub fn close(&self) {
        if let Mode::Thread { operations, thread } = &*self.0 {
            lock(operations).take();
            if let Some(thread) = lock(thread).take() {
                // A panic there has been reported by the panic hook; there is nothing left to do about it.
                let _ = thread.join();
            }
        }
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Mode::Thread { .. } => f.write_str("Catalogue(thread)"),
            Mode::InPlace(_) => f.write_str("Catalogue(in place)"),
        }
    }
}

/// Where the answer to one operation arrives.
struct Answer<T> {
    value: Mutex<Option<Result<T, CatalogueError>>>,
    arrived: WaitQueue,
}

/// The duty to answer: one that is dropped says that the catalogue has stopped, so that nobody waits for ever.
struct Promise<T>(Arc<Answer<T>>);

impl<T> Promise<T> {
    fn keep(self, value: Result<T, CatalogueError>) {
        *lock(&self.0.value) = Some(value);
        // Dropping notifies.
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        lock(&self.0.value).get_or_insert(Err(CatalogueError::Stopped));
        self.0.arrived.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapfence_image_format::runtime::{Executor, Unpark};

    struct Unparker(std::thread::Thread);
    impl Unpark for Unparker {
        fn unpark(&self) {
            self.0.unpark();
        }
    }

    pub(super) fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
        let executor = Executor::new(Unparker(std::thread::current()));
        let other = executor.clone();
        executor.block_on(future, move || {
            if other.prepare_park() {
                std::thread::park();
                other.end_park();
            }
        })
    }

    #[test]
    fn operations_run_in_order_and_answer() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (catalogue, _) = Catalogue::start(directory.path()).expect("a new directory");
        let device = DeviceRecord { name: "vda".into(), layers: vec![store::tests::layer("/a")] };
        let expected = device.clone();
        let used = catalogue.clone();
        let found = block_on(async move {
            used.run(move |store| store.put_device(&device)).await?;
            used.run(|store| store.device("vda")).await
        });
        assert_eq!(found.expect("readable"), Some(expected));
        catalogue.close();
        assert!(matches!(block_on(async move { catalogue.run(|store| store.devices()).await }), Err(CatalogueError::Stopped)));
    }

    #[test]
    fn a_state_directory_has_one_daemon_at_a_time() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("made").join("here");
        let (first, _) = Catalogue::start(&path).expect("a new directory");
        let refused = Catalogue::start(&path).expect_err("in use").to_string();
        assert!(refused.contains("in use by another snapfenced"), "{refused}");
        first.close();
        Catalogue::start(&path).expect("free again").0.close();
    }

    #[test]
    fn the_database_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("catalogue.redb");
        let mode = || std::fs::metadata(&file).expect("a file").permissions().mode() & 0o777;
        Catalogue::start(directory.path()).expect("a new directory").0.close();
        assert_eq!(mode(), 0o600);
        // As older versions made it.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("ours");
        Catalogue::start(directory.path()).expect("an old directory").0.close();
        assert_eq!(mode(), 0o600);
    }

    #[test]
    fn an_operation_that_panics_answers_all_who_wait() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (catalogue, _) = Catalogue::start(directory.path()).expect("a new directory");
        let used = catalogue.clone();
        let answers = block_on(async move {
            let broken = used.run(|_| -> Result<(), CatalogueError> { panic!("a defect, on purpose") }).await;
            (broken, used.run(|store| store.devices()).await)
        });
        assert!(matches!(answers, (Err(CatalogueError::Stopped), Err(CatalogueError::Stopped))));
        catalogue.close();
    }

    #[test]
    fn a_file_that_is_no_database_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("catalogue.redb");
        std::fs::write(&file, vec![7; 9000]).expect("writable");
        let refused = Catalogue::start(directory.path()).expect_err("no database").to_string();
        assert!(refused.starts_with(&format!("{}: the catalogue is damaged", file.display())), "{refused}");
    }
}

//! The catalogue's tables. Every function is one transaction and blocks until it is durable.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema` | version of this layout |
//! | `layers` | device, index from the base | [`LayerRecord`](super::LayerRecord) as JSON |
//! | `snapshots` | name | [`SnapshotRecord`](super::SnapshotRecord) as JSON |
//! | `making` | mark | [`Making`](super::Making) as JSON; there since the first was recorded |
//!
//! Layers have rows of their own so that a snapshot of a deep stack adds one row and rewrites none.
//!
//! redb refuses everything after the first error of its file, a full disk that is freed a moment later included. So a database that has failed is
//! closed, and opened again for the next transaction (see [`Watched`] for what a failed sync means for it). A commit that has failed may be there
//! all the same: every change is tried a second time on the database opened again, and finds what is there. If that fails too, it is unknown which
//! of the two states the next start finds.

mod devices;
mod error;
mod making;
mod snapshots;
#[cfg(test)]
pub(crate) mod tests;

use std::cell::RefCell;
use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, StorageBackend, TableDefinition, WriteTransaction};

use self::error::{file_error, open_error, read_error, write_error};
use super::trial::{contained, content, try_copy};
use super::watched::Watched;

pub use self::devices::layers_beneath;
pub use self::error::CatalogueError;

/// Version of the layout that this program writes.
pub const SCHEMA: u64 = 1;

/// Memory for cached pages. The catalogue is small and rarely read.
pub(super) const CACHE_BYTES: usize = 1 << 20;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const LAYERS: TableDefinition<(&str, u32), &[u8]> = TableDefinition::new("layers");
type LayersTable<'a> = redb::Table<'a, (&'static str, u32), &'static [u8]>;
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");

/// The database.
pub struct Store {
    /// Closed after a failure.
    database: RefCell<Option<Database>>,
    open: Box<dyn Fn() -> Result<Database, DatabaseError> + Send>,
}

/// The database's file, made if need be. Only its owner may read it, whatever the umask and whoever made it: it names files that are
/// nobody else's business.
fn private_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

impl Store {
    /// Opens the database at `path` or makes an empty one, whose name the caller makes durable.
    ///
    /// # Errors
    /// If it cannot be opened or has a newer layout.
    pub fn open(path: &Path) -> Result<Self, CatalogueError> {
        let is_there = match path.metadata() {
            Ok(facts) => facts.len() > 0,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(file_error(error)),
        };
        if is_there {
            try_copy(std::fs::read(path).map_err(file_error)?)?;
        } else {
            Self::make(path)?;
        }
        let path = path.to_owned();
        Self::over(move || FileBackend::new(private_file(&path)?))
    }

    /// Makes an empty database. It gets its name when it is whole and durable: what a crash leaves half made is no database, and a file that is none
    /// is refused.
    fn make(path: &Path) -> Result<(), CatalogueError> {
        let new = path.with_extension("new");
        let file = private_file(&new).map_err(file_error)?;
        file.set_len(0).map_err(file_error)?;
        let backend = FileBackend::new(file.try_clone().map_err(file_error)?).map_err(open_error)?;
        drop(Self::initialise(Database::builder().create_with_backend(backend).map_err(open_error)?)?);
        file.sync_all().map_err(file_error)?;
        std::fs::rename(&new, path).map_err(file_error)
    }

    /// The same on any storage: memory, a simulated disk. Clones lead to the same bytes.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn with_backend(backend: impl StorageBackend + Clone) -> Result<Self, CatalogueError> {
        try_copy(content(&backend).map_err(file_error)?)?;
        Self::over(move || Ok(backend.clone()))
    }

    fn over<B: StorageBackend>(backend: impl Fn() -> Result<B, DatabaseError> + Send + 'static) -> Result<Self, CatalogueError> {
        let sync_failed = Arc::default();
        let open = move || {
            let backend = Watched::new(backend()?, &sync_failed)?;
            Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend)
        };
        let store = Self { database: RefCell::new(None), open: Box::new(open) };
        store.attempt(|_| Ok(()))?;
        Ok(store)
    }

    /// Runs `operation` on the database, which is closed if that fails.
    fn attempt<T>(&self, operation: impl FnOnce(&Database) -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
        let mut slot = self.database.borrow_mut();
        let present = slot.take();
        contained(|| {
            let database = match present {
                Some(database) => database,
                None => Self::initialise((self.open)().map_err(open_error)?)?,
            };
            let result = operation(&database);
            if !matches!(result, Err(CatalogueError::Database { .. })) {
                *slot = Some(database);
            }
            result
        })
    }

    fn read<T>(&self, operation: impl FnOnce(&ReadTransaction) -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
        self.attempt(|database| operation(&database.begin_read().map_err(read_error)?))
    }

    /// Runs `change` in a transaction and makes that durable. If the database fails it is done once more: `change` finds then that what it
    /// wants is not there yet, or is there already.
    fn write<T>(&mut self, change: impl Fn(&WriteTransaction) -> Result<T, CatalogueError>) -> Result<T, CatalogueError> {
        let once = |database: &Database| {
            let transaction = database.begin_write().map_err(write_error)?;
            let value = change(&transaction)?;
            transaction.commit().map_err(write_error)?;
            Ok(value)
        };
        match self.attempt(once) {
            Err(error @ CatalogueError::Database { .. }) => {
                tracing::warn!(event = "catalogue_reopened", cause = %error, "the database has failed and is opened again");
                self.attempt(once)
            }
            result => result,
        }
    }

    /// Checks the layout; writes only if the database is new, so that a start costs no flush.
    pub(super) fn initialise(database: Database) -> Result<Database, CatalogueError> {
        let found = {
            let transaction = database.begin_read().map_err(open_error)?;
            match transaction.open_table(META) {
                Ok(meta) => meta.get("schema").map_err(open_error)?.map(|version| version.value()),
                Err(redb::TableError::TableDoesNotExist(_)) => None,
                Err(error) => return Err(open_error(error)),
            }
        };
        match found {
            Some(SCHEMA) => {}
            Some(found) => return Err(CatalogueError::Schema { found }),
            None => {
                let transaction = database.begin_write().map_err(open_error)?;
                transaction.open_table(META).map_err(open_error)?.insert("schema", SCHEMA).map_err(open_error)?;
                transaction.open_table(LAYERS).map_err(open_error)?;
                transaction.open_table(SNAPSHOTS).map_err(open_error)?;
                transaction.commit().map_err(open_error)?;
            }
        }
        Ok(database)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("is_open", &self.database.borrow().is_some()).finish_non_exhaustive()
    }
}

fn encode(record: &impl serde::Serialize, what: impl FnOnce() -> String) -> Result<Vec<u8>, CatalogueError> {
    serde_json::to_vec(record).map_err(|source| CatalogueError::Record { what: what(), source })
}

fn decode<T: serde::de::DeserializeOwned>(value: &[u8], what: impl FnOnce() -> String) -> Result<T, CatalogueError> {
    serde_json::from_slice(value).map_err(|source| CatalogueError::Record { what: what(), source })
}

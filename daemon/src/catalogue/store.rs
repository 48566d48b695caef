//! The catalogue's tables. Every function is one transaction and blocks until it is durable.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema` | version of this layout |
//! | `layers` | device, index from the base | [`LayerRecord`] as JSON |
//! | `snapshots` | name | [`SnapshotRecord`] as JSON |
//!
//! Layers have rows of their own so that a snapshot of a deep stack adds one row and rewrites none.
//!
//! redb refuses everything after the first error of its file, a full disk that is freed a moment later included. So a database that has failed is
//! closed, and opened again for the next transaction (see [`Watched`] for what a failed sync means for it). A commit that has failed may be there all the same: every change is tried a second
//! time on the database opened again, and finds what is there. If that fails too, it is unknown which of the two states the next start finds.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, WriteTransaction};

use super::records::{DeviceRecord, DeviceTimes, LayerRecord, SnapshotRecord, SnapshotState};
use super::trial::{contained, content, try_copy};
use super::watched::Watched;

/// Version of the layout that this program writes.
pub const SCHEMA: u64 = 1;

/// Memory for cached pages. The catalogue is small and rarely read.
pub(super) const CACHE_BYTES: usize = 1 << 20;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const LAYERS: TableDefinition<(&str, u32), &[u8]> = TableDefinition::new("layers");
type LayersTable<'a> = redb::Table<'a, (&'static str, u32), &'static [u8]>;
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");

/// Why the catalogue could not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Another daemon uses the state directory.
    #[error("the state directory {0} is in use by another snapfenced; stop it or use another directory")]
    InUse(PathBuf),
    /// The state directory cannot be used.
    #[error("cannot {action} {path}: {source}")]
    StateDirectory {
        /// "make", "open" and so on.
        action: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file of the catalogue cannot be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<CatalogueError>,
    },
    /// The database refuses.
    #[error("the catalogue cannot be {action}: {source}")]
    Database {
        /// "opened", "read", "written".
        action: &'static str,
        /// Why.
        #[source]
        source: redb::Error,
    },
    /// What is in the file is no database of ours, or was changed by something else.
    #[error(
        "the catalogue is damaged and was left as it is; put a copy in its place, or move it away and name each device's topmost image: {cause}"
    )]
    Damaged {
        /// What was found first.
        cause: String,
    },
    /// A newer program wrote it.
    #[error("the catalogue has layout {found} and this program knows layouts up to {SCHEMA}: use the newer snapfenced that wrote it")]
    Schema {
        /// The version found.
        found: u64,
    },
    /// A row that this program did not write.
    #[error("the catalogue's record of {what} makes no sense: {source}")]
    Record {
        /// Of what.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A snapshot name that is taken.
    #[error("there already is a snapshot `{0}`")]
    SnapshotExists(String),
    /// A snapshot name that is not known.
    #[error("there is no snapshot `{0}`")]
    NoSnapshot(String),
    /// A step that the snapshot's state does not allow.
    #[error("snapshot `{name}` is {} and cannot become {}", from.name(), to.name())]
    Transition {
        /// Which snapshot.
        name: String,
        /// Its state.
        from: SnapshotState,
        /// The state asked for.
        to: SnapshotState,
    },
    /// The thread of the catalogue has ended, because of a defect that it has reported.
    #[error("the catalogue has stopped working")]
    Stopped,
}

fn read_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "read", source: source.into() }
}

fn write_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "written", source: source.into() }
}

fn open_error(source: impl Into<redb::Error>) -> CatalogueError {
    CatalogueError::Database { action: "opened", source: source.into() }
}

fn file_error(source: io::Error) -> CatalogueError {
    open_error(redb::StorageError::Io(source))
}

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

    /// Every recorded device, in order of names.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn devices(&self) -> Result<Vec<DeviceRecord>, CatalogueError> {
        self.read(|transaction| {
            let table = transaction.open_table(LAYERS).map_err(read_error)?;
            let mut devices: Vec<DeviceRecord> = Vec::new();
            for row in table.iter().map_err(read_error)? {
                let (key, value) = row.map_err(read_error)?;
                let (name, _) = key.value();
                let layer = decode(value.value(), || format!("device `{name}`"))?;
                match devices.last_mut() {
                    Some(last) if last.name == name => last.layers.push(layer),
                    _ => devices.push(DeviceRecord { name: name.to_owned(), layers: vec![layer] }),
                }
            }
            Ok(devices)
        })
    }

    /// The record of one device.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn device(&self, name: &str) -> Result<Option<DeviceRecord>, CatalogueError> {
        self.read(|transaction| {
            let table = transaction.open_table(LAYERS).map_err(read_error)?;
            let mut layers = Vec::new();
            for row in table.range((name, 0)..=(name, u32::MAX)).map_err(read_error)? {
                let (_, value) = row.map_err(read_error)?;
                layers.push(decode(value.value(), || format!("device `{name}`"))?);
            }
            Ok((!layers.is_empty()).then(|| DeviceRecord { name: name.to_owned(), layers }))
        })
    }

    /// Replaces the record of one device.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub fn put_device(&mut self, record: &DeviceRecord) -> Result<(), CatalogueError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(LAYERS).map_err(write_error)?;
            table.retain_in((record.name.as_str(), 0)..=(record.name.as_str(), u32::MAX), |_, _| false).map_err(write_error)?;
            for (index, layer) in (0_u32..).zip(&record.layers) {
                let value = encode(layer, || format!("device `{}`", record.name))?;
                table.insert((record.name.as_str(), index), value.as_slice()).map_err(write_error)?;
            }
            Ok(())
        })
    }

    /// Drops the record of a device and its part in every snapshot. The others' parts stay: an intent may be all that tells where they write.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub fn forget_device(&mut self, name: &str) -> Result<(), CatalogueError> {
        let mut changed = self.snapshots()?;
        changed.retain_mut(|snapshot| {
            let before = snapshot.devices.len();
            snapshot.devices.retain(|member| member.device != name);
            snapshot.devices.len() < before
        });
        self.write(|transaction| {
            let mut layers = transaction.open_table(LAYERS).map_err(write_error)?;
            layers.retain_in((name, 0)..=(name, u32::MAX), |_, _| false).map_err(write_error)?;
            let mut snapshots = transaction.open_table(SNAPSHOTS).map_err(write_error)?;
            for snapshot in &changed {
                if snapshot.devices.is_empty() {
                    snapshots.remove(snapshot.name.as_str()).map_err(write_error)?;
                } else {
                    put_snapshot(&mut snapshots, snapshot)?;
                }
            }
            Ok(())
        })
    }

    /// Every snapshot, oldest first.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>, CatalogueError> {
        self.read(|transaction| {
            let table = transaction.open_table(SNAPSHOTS).map_err(read_error)?;
            let mut snapshots = Vec::new();
            for row in table.iter().map_err(read_error)? {
                let (key, value) = row.map_err(read_error)?;
                snapshots.push(decode(value.value(), || format!("snapshot `{}`", key.value()))?);
            }
            snapshots.sort_by(|one: &SnapshotRecord, other| (one.created_us, &one.name).cmp(&(other.created_us, &other.name)));
            Ok(snapshots)
        })
    }

    /// One snapshot.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn snapshot(&self, name: &str) -> Result<Option<SnapshotRecord>, CatalogueError> {
        self.read(|transaction| {
            let table = transaction.open_table(SNAPSHOTS).map_err(read_error)?;
            let value = table.get(name).map_err(read_error)?;
            value.map(|value| decode(value.value(), || format!("snapshot `{name}`"))).transpose()
        })
    }

    /// Records a new snapshot as intended.
    ///
    /// # Errors
    /// If the name is taken or the database cannot be written.
    pub fn intend(&mut self, snapshot: &SnapshotRecord) -> Result<(), CatalogueError> {
        let tried = Cell::new(false);
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS).map_err(write_error)?;
            let is_ours = |found| tried.get() && found == *snapshot;
            let is_taken = find_snapshot(&table, &snapshot.name)?.is_some_and(|found| !is_ours(found));
            tried.set(true);
            if is_taken {
                return Err(CatalogueError::SnapshotExists(snapshot.name.clone()));
            }
            put_snapshot(&mut table, snapshot)?;
            Ok(())
        })
    }

    /// Takes back an intent of which nothing has happened, if it is there. Another snapshot of that name stays.
    ///
    /// # Errors
    /// If the database cannot be written: it is unknown then whether the intent is there.
    pub fn drop_intent(&mut self, intent: &SnapshotRecord) -> Result<(), CatalogueError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS).map_err(write_error)?;
            if find_snapshot(&table, &intent.name)?.as_ref() == Some(intent) {
                table.remove(intent.name.as_str()).map_err(write_error)?;
            }
            Ok(())
        })
    }

    /// Records that the devices in `adopted` have their overlays on top, and brings the snapshot into `state` (`Switched` or `Failed`).
    ///
    /// # Errors
    /// If the snapshot is not known or not intended, or the database cannot be written.
    pub fn adopt_overlays(
        &mut self,
        name: &str,
        adopted: &[(String, DeviceTimes)],
        state: SnapshotState,
        error: Option<String>,
    ) -> Result<SnapshotRecord, CatalogueError> {
        self.change_snapshot(name, (SnapshotState::Intended, state), error.as_deref(), |transaction, snapshot| {
            let mut layers = transaction.open_table(LAYERS).map_err(write_error)?;
            for (device, times) in adopted {
                let Some(member) = snapshot.device_mut(device) else { continue };
                member.times = *times;
                let index = recorded_top(&layers, device)?.map_or(0, |(index, _)| index + 1);
                put_layer(&mut layers, device, index, &member.overlay)?;
            }
            Ok(())
        })
    }

    /// Records the end of a snapshot whose devices have switched: `Frozen`, or `Failed` with the reason. An intended one stays as it is: its
    /// overlays are in no device's record yet, and start-up has to look for them.
    ///
    /// # Errors
    /// If the snapshot is not known or its state does not allow it, or the database cannot be written.
    pub fn conclude(
        &mut self,
        name: &str,
        times: &[(String, DeviceTimes)],
        state: SnapshotState,
        error: Option<String>,
    ) -> Result<SnapshotRecord, CatalogueError> {
        self.change_snapshot(name, (SnapshotState::Switched, state), error.as_deref(), |_, snapshot| {
            for (device, times) in times {
                if let Some(member) = snapshot.device_mut(device) {
                    member.times = *times;
                }
            }
            Ok(())
        })
    }

    /// Records that a snapshot has failed after its devices had begun to switch, whatever was recorded before: its clients have been told.
    /// Overlays that no device's record has yet are put on top, unless a later snapshot has done so with its own.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub fn fail(&mut self, name: &str, error: &str) -> Result<(), CatalogueError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS).map_err(write_error)?;
            let Some(mut snapshot) = find_snapshot(&table, name)? else { return Ok(()) };
            if snapshot.state == SnapshotState::Intended {
                let mut layers = transaction.open_table(LAYERS).map_err(write_error)?;
                for member in &snapshot.devices {
                    if let Some((index, top)) = recorded_top(&layers, &member.device)?
                        && top == member.frozen
                    {
                        put_layer(&mut layers, &member.device, index + 1, &member.overlay)?;
                    }
                }
            }
            if snapshot.state != SnapshotState::Failed {
                snapshot.state = SnapshotState::Failed;
                snapshot.error = Some(error.to_owned());
            }
            put_snapshot(&mut table, &snapshot)
        })
    }

    fn change_snapshot(
        &mut self,
        name: &str,
        (from, to): (SnapshotState, SnapshotState),
        error: Option<&str>,
        change: impl Fn(&WriteTransaction, &mut SnapshotRecord) -> Result<(), CatalogueError>,
    ) -> Result<SnapshotRecord, CatalogueError> {
        // What was there before a commit failed: if it is not there any more, the commit is.
        let before = RefCell::new(None);
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS).map_err(write_error)?;
            let mut snapshot = find_snapshot(&table, name)?.ok_or_else(|| CatalogueError::NoSnapshot(name.to_owned()))?;
            let is_done = before.replace(Some(snapshot.state)) == Some(from) && snapshot.state == to;
            if !is_done {
                if snapshot.state != from || !from.may_become(to) {
                    return Err(CatalogueError::Transition { name: name.to_owned(), from: snapshot.state, to });
                }
                snapshot.state = to;
                snapshot.error = error.map(str::to_owned);
                change(transaction, &mut snapshot)?;
            }
            // Written anew if it was there: now it is durable.
            put_snapshot(&mut table, &snapshot)?;
            Ok(snapshot)
        })
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("is_open", &self.database.borrow().is_some()).finish_non_exhaustive()
    }
}

fn find_snapshot(table: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<SnapshotRecord>, CatalogueError> {
    let value = table.get(name).map_err(write_error)?;
    value.map(|value| decode(value.value(), || format!("snapshot `{name}`"))).transpose()
}

/// The index and record of a device's top layer.
fn recorded_top(layers: &LayersTable<'_>, device: &str) -> Result<Option<(u32, LayerRecord)>, CatalogueError> {
    let last = layers.range((device, 0)..=(device, u32::MAX)).map_err(write_error)?.next_back().transpose().map_err(write_error)?;
    last.map(|(key, value)| Ok((key.value().1, decode(value.value(), || format!("device `{device}`"))?))).transpose()
}

fn put_layer(layers: &mut LayersTable<'_>, device: &str, index: u32, layer: &LayerRecord) -> Result<(), CatalogueError> {
    let value = encode(layer, || format!("device `{device}`"))?;
    layers.insert((device, index), value.as_slice()).map_err(write_error)?;
    Ok(())
}

fn put_snapshot(table: &mut redb::Table<'_, &str, &[u8]>, snapshot: &SnapshotRecord) -> Result<(), CatalogueError> {
    let value = encode(snapshot, || format!("snapshot `{}`", snapshot.name))?;
    table.insert(snapshot.name.as_str(), value.as_slice()).map_err(write_error)?;
    Ok(())
}

fn encode(record: &impl serde::Serialize, what: impl FnOnce() -> String) -> Result<Vec<u8>, CatalogueError> {
    serde_json::to_vec(record).map_err(|source| CatalogueError::Record { what: what(), source })
}

fn decode<T: serde::de::DeserializeOwned>(value: &[u8], what: impl FnOnce() -> String) -> Result<T, CatalogueError> {
    serde_json::from_slice(value).map_err(|source| CatalogueError::Record { what: what(), source })
}

/// Layers that some record names as lying beneath another one: never to be opened for writing.
///
/// # Errors
/// If the database cannot be read.
pub fn layers_beneath(store: &Store) -> Result<Vec<(LayerRecord, String)>, CatalogueError> {
    let mut beneath = Vec::new();
    for device in store.devices()? {
        let covered = device.layers.len().saturating_sub(1);
        beneath.extend(device.layers.into_iter().take(covered).map(|layer| (layer, format!("device `{}`", device.name))));
    }
    for snapshot in store.snapshots()? {
        // A failed one may have happened or not: the device's record above tells. An intent that start-up could not settle may have happened
        // as well, and no record tells.
        if snapshot.state != SnapshotState::Failed {
            beneath.extend(snapshot.devices.into_iter().map(|member| (member.frozen, format!("snapshot `{}`", snapshot.name))));
        }
    }
    Ok(beneath)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use snapfence_image_format::chain::Format;

    use super::super::records::SnapshotDevice;
    use super::*;

    pub(crate) fn layer(path: &str) -> LayerRecord {
        LayerRecord { path: PathBuf::from(path), format: Format::Qcow2 }
    }

    pub(crate) fn intent(name: &str, device: &str, frozen: &str, overlay: &str) -> SnapshotRecord {
        let member = SnapshotDevice {
            device: device.to_owned(),
            frozen: layer(frozen),
            overlay: layer(overlay),
            created_overlay: true,
            times: DeviceTimes::default(),
        };
        SnapshotRecord { name: name.to_owned(), created_us: 1, state: SnapshotState::Intended, devices: vec![member], error: None }
    }

    fn times(switch_us: u64) -> DeviceTimes {
        DeviceTimes { switch_us: Some(switch_us), hold_us: Some(0), freeze_us: None }
    }

    const PAGE: usize = 4096;

    /// A disk whose writes are lost by a crash unless a sync came after them.
    #[derive(Clone, Debug, Default)]
    struct VolatileDisk(Arc<Mutex<Contents>>);

    #[derive(Debug, Default)]
    struct Contents {
        now: Vec<u8>,
        durable: Vec<u8>,
        /// Pages that the next sync makes durable.
        dirty: BTreeSet<usize>,
        /// A sync that fails forgets what it was to make durable, as Linux does; otherwise it has done it all the same.
        forgets: bool,
        /// What the disk would hold after a crash at each write or sync so far: nothing or everything since the last sync survives.
        crashes: Vec<Vec<u8>>,
        /// So many writes and syncs go well, then so many fail.
        failures: (u64, u64),
    }

    impl VolatileDisk {
        fn holding(bytes: Vec<u8>) -> Self {
            Self(Arc::new(Mutex::new(Contents { durable: bytes.clone(), now: bytes, ..Contents::default() })))
        }

        /// What is there after a power cut.
        fn after_power_cut(&self) -> Self {
            Self::holding(self.0.lock().expect("no panics").durable.clone())
        }

        fn fail_after(&self, passing: u64, failing: u64) {
            self.0.lock().expect("no panics").failures = (passing, failing);
        }

        /// As a disk that is full for a while.
        fn admit(&self) -> Result<(), std::io::Error> {
            match &mut self.0.lock().expect("no panics").failures {
                (0, 0) => return Ok(()),
                (0, failing) => *failing -= 1,
                (passing, _) => {
                    *passing -= 1;
                    return Ok(());
                }
            }
            Err(std::io::ErrorKind::StorageFull.into())
        }

        fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
            let mut contents = self.0.lock().expect("no panics");
            change(&mut contents.now);
            let (durable, now) = (contents.durable.clone(), contents.now.clone());
            contents.crashes.extend([durable, now]);
        }
    }

    impl StorageBackend for VolatileDisk {
        fn len(&self) -> Result<u64, std::io::Error> {
            Ok(self.0.lock().expect("no panics").now.len() as u64)
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
            let start = usize::try_from(offset).expect("small");
            out.copy_from_slice(&self.0.lock().expect("no panics").now[start..start + out.len()]);
            Ok(())
        }
        fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
            self.admit()?;
            self.change(|bytes| bytes.resize(usize::try_from(len).expect("small"), 0));
            Ok(())
        }
        fn sync_data(&self) -> Result<(), std::io::Error> {
            let admitted = self.admit();
            let mut contents = self.0.lock().expect("no panics");
            let Contents { now, durable, dirty, forgets, .. } = &mut *contents;
            durable.resize(now.len(), 0);
            let pages = std::mem::take(dirty);
            if admitted.is_ok() || !*forgets {
                for page in pages {
                    let range = page * PAGE..now.len().min((page + 1) * PAGE);
                    durable[range.clone()].copy_from_slice(&now[range]);
                }
            }
            admitted
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
            self.admit()?;
            let start = usize::try_from(offset).expect("small");
            self.change(|bytes| bytes[start..start + data.len()].copy_from_slice(data));
            self.0.lock().expect("no panics").dirty.extend(start / PAGE..(start + data.len()).div_ceil(PAGE));
            Ok(())
        }
    }

    #[test]
    fn a_stack_grows_by_its_snapshots_and_survives_reopening() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("catalogue.redb");
        let mut store = Store::open(&path).expect("new");
        let mut device = DeviceRecord { name: "vda".into(), layers: vec![layer("/base"), layer("/top")] };
        store.put_device(&device).expect("writable");
        store.put_device(&DeviceRecord { name: "vdab".into(), layers: vec![layer("/other")] }).expect("writable");
        store.intend(&intent("s1", "vda", "/top", "/s1")).expect("a new name");
        assert!(matches!(store.intend(&intent("s1", "vda", "/top", "/s1")), Err(CatalogueError::SnapshotExists(_))));
        store.adopt_overlays("s1", &[("vda".into(), times(5))], SnapshotState::Switched, None).expect("intended");
        drop(store);

        let mut store = Store::open(&path).expect("there");
        device.layers.push(layer("/s1"));
        assert_eq!(store.device("vda").expect("readable"), Some(device.clone()));
        assert_eq!(store.devices().expect("readable").len(), 2);
        let concluded = store.conclude("s1", &[("vda".into(), times(5))], SnapshotState::Frozen, None).expect("switched");
        assert_eq!(concluded.devices[0].times.switch_us, Some(5));
        assert_eq!(store.snapshot("s1").expect("readable"), Some(concluded));
        let beneath: Vec<_> = layers_beneath(&store).expect("readable").into_iter().map(|(layer, _)| layer.path).collect();
        assert_eq!(beneath, [PathBuf::from("/base"), "/top".into(), "/top".into()]);

        store.forget_device("vda").expect("writable");
        assert_eq!(store.device("vda").expect("readable"), None);
        assert_eq!(store.snapshots().expect("readable"), []);
        assert_eq!(store.devices().expect("readable").len(), 1);
    }

    #[test]
    fn a_snapshot_takes_no_step_that_its_state_does_not_allow() {
        use SnapshotState::*;
        let all = [Intended, Switched, Frozen, Failed];
        let allowed = [(Intended, Switched), (Intended, Failed), (Switched, Frozen), (Switched, Failed)];
        for from in all {
            for to in all {
                assert_eq!(from.may_become(to), allowed.contains(&(from, to)), "{from:?} to {to:?}");
            }
        }
        let mut store = Store::with_backend(VolatileDisk::default()).expect("memory");
        assert!(matches!(store.conclude("s", &[], Frozen, None), Err(CatalogueError::NoSnapshot(_))));
        store.intend(&intent("s", "vda", "/a", "/b")).expect("a new name");
        for end in [Frozen, Failed] {
            assert!(matches!(store.conclude("s", &[], end, None), Err(CatalogueError::Transition { .. })));
        }
        store.drop_intent(&intent("s", "vda", "/a", "/other")).expect("writable");
        assert!(store.snapshot("s").expect("readable").is_some(), "another's");
        store.drop_intent(&intent("s", "vda", "/a", "/b")).expect("writable");
        assert_eq!(store.snapshot("s").expect("readable"), None);
    }

    #[test]
    fn a_newer_layout_is_refused() {
        let disk = VolatileDisk::default();
        drop(Store::with_backend(disk.clone()).expect("new"));
        let database = Database::builder().create_with_backend(disk.clone()).expect("there");
        let transaction = database.begin_write().expect("writable");
        transaction.open_table(META).expect("there").insert("schema", SCHEMA + 1).expect("writable");
        transaction.commit().expect("writable");
        drop(database);
        assert!(matches!(Store::with_backend(disk), Err(CatalogueError::Schema { found }) if found == SCHEMA + 1));
    }

    #[test]
    fn a_failure_that_passes_costs_nothing_and_a_lasting_one_no_more_than_its_step() {
        type Step = fn(&mut Store) -> Result<(), CatalogueError>;
        let steps: [Step; 4] = [
            |store| store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }),
            |store| store.intend(&intent("s", "vda", "/base", "/s")),
            |store| store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).map(drop),
            |store| store.conclude("s", &[], SnapshotState::Frozen, None).map(drop),
        ];
        let state = |store: &Store| {
            let layers = store.device("vda").expect("readable").map_or(0, |device| device.layers.len());
            (layers, store.snapshot("s").expect("readable").map(|snapshot| snapshot.state.name()))
        };
        let states = [(0, None), (1, None), (1, Some("intended")), (2, Some("switched")), (2, Some("frozen"))];
        for at in 0..steps.len() {
            for passing in 0..12 {
                for (failing, forgets) in [(1, false), (1, true), (1000, false), (1000, true)] {
                    let disk = VolatileDisk::default();
                    disk.0.lock().expect("no panics").forgets = forgets;
                    let mut store = Store::with_backend(disk.clone()).expect("new");
                    steps[..at].iter().for_each(|step| step(&mut store).expect("writable"));
                    disk.fail_after(passing, failing);
                    let result = steps[at](&mut store);
                    disk.fail_after(0, 0);
                    let found = state(&store);
                    if failing == 1 {
                        result.unwrap_or_else(|error| panic!("step {at}, one failure after {passing}: {error}"));
                        let durable = Store::with_backend(disk.after_power_cut()).expect("a power cut leaves a catalogue");
                        assert_eq!(state(&durable), states[at + 1], "step {at}, one failure after {passing}, then a power cut");
                    }
                    // The whole step or nothing of it; a failed one can be done again, and the next one goes on from there.
                    let done = found == states[at + 1];
                    assert!(done || failing > 1 && found == states[at], "step {at}, {failing} after {passing}: {found:?}");
                    let rest = if done { at + 1 } else { at };
                    steps[rest..].iter().for_each(|step| step(&mut store).expect("writable"));
                    assert_eq!(state(&store), states[4], "step {at}, {failing} after {passing}");
                    let durable = Store::with_backend(disk.after_power_cut()).expect("a power cut leaves a catalogue");
                    assert_eq!(state(&durable), states[4], "step {at}, {failing} after {passing}, then a power cut");
                }
            }
        }
    }

    #[test]
    fn a_failed_snapshot_is_failed_whatever_was_recorded() {
        for recorded in 0..4 {
            let mut store = Store::with_backend(VolatileDisk::default()).expect("new");
            store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
            store.intend(&intent("s", "vda", "/base", "/s")).expect("a new name");
            match recorded {
                0 => {}
                1 => {
                    // The next snapshot of the device was recorded, this one was not.
                    store.intend(&intent("t", "vda", "/s", "/t")).expect("a new name");
                    store.adopt_overlays("t", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
                }
                _ => {
                    store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
                    if recorded == 3 {
                        store.conclude("s", &[], SnapshotState::Frozen, None).expect("switched");
                    }
                }
            }
            for _ in 0..2 {
                store.fail("s", "no").expect("writable");
            }
            let failed = store.snapshot("s").expect("readable").expect("recorded");
            assert_eq!((failed.state, failed.error.as_deref()), (SnapshotState::Failed, Some("no")));
            let top = store.device("vda").expect("readable").expect("recorded").top().cloned();
            assert_eq!(top, Some(layer(if recorded == 1 { "/t" } else { "/s" })));
        }
    }

    #[test]
    fn a_crash_while_it_is_made_leaves_nothing_in_the_way() {
        let disk = VolatileDisk::default();
        drop(Store::with_backend(disk.clone()).expect("new"));
        let crashes = std::mem::take(&mut disk.0.lock().expect("no panics").crashes);
        let half_made = |bytes: &Vec<u8>| Store::with_backend(VolatileDisk::holding(bytes.clone())).is_err();
        assert!(crashes.iter().any(half_made), "some of them are no database");
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (number, bytes) in crashes.iter().enumerate() {
            let path = directory.path().join(format!("{number}.redb"));
            std::fs::write(path.with_extension("new"), bytes).expect("a file");
            let mut store = Store::open(&path).expect("a new one");
            assert_eq!(store.devices().expect("readable"), []);
            store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
            drop(store);
            assert_eq!(Store::open(&path).expect("there").devices().expect("readable").len(), 1, "{number}");
            assert!(!path.with_extension("new").exists());
        }
    }

    #[test]
    fn after_a_crash_each_step_has_happened_or_has_not() {
        let disk = VolatileDisk::default();
        let mut store = Store::with_backend(disk.clone()).expect("new");
        store.put_device(&DeviceRecord { name: "vda".into(), layers: vec![layer("/base")] }).expect("writable");
        drop(store);
        // From here on every state of the disk after a crash is kept.
        let start = disk.0.lock().expect("no panics").now.clone();
        let disk = VolatileDisk::holding(start);
        let mut store = Store::with_backend(disk.clone()).expect("there");
        store.intend(&intent("s", "vda", "/base", "/s")).expect("a new name");
        store.adopt_overlays("s", &[("vda".into(), times(1))], SnapshotState::Switched, None).expect("intended");
        store.conclude("s", &[], SnapshotState::Frozen, None).expect("switched");

        let crashes = std::mem::take(&mut disk.0.lock().expect("no panics").crashes);
        assert!(crashes.len() > 6, "the steps write");
        let mut seen = BTreeSet::new();
        for bytes in crashes {
            let store = Store::with_backend(VolatileDisk::holding(bytes)).expect("a crash leaves a catalogue");
            let state = store.snapshot("s").expect("readable").map(|snapshot| snapshot.state);
            let layers = store.device("vda").expect("readable").expect("recorded").layers.len();
            let adopted = matches!(state, Some(SnapshotState::Switched | SnapshotState::Frozen));
            assert_eq!(layers, if adopted { 2 } else { 1 }, "{state:?}");
            seen.insert(state.map(SnapshotState::name));
        }
        assert!(seen.len() >= 3, "crashes between the steps are among them: {seen:?}");
    }
}

//! The snapshots, and the steps that they take.

use std::cell::{Cell, RefCell};

use redb::{ReadableTable, WriteTransaction};

use super::super::records::{DeviceTimes, Making, SnapshotRecord, SnapshotState};
use super::devices::{put_layer, recorded_top};
use super::error::{read_error, write_error};
use super::making::{drop_making, put_making};
use super::{CatalogueError, LAYERS, SNAPSHOTS, Store, decode, encode};

impl Store {
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

    /// Records a new snapshot as intended. From here on this record has the overlays that were `made` for it.
    ///
    /// # Errors
    /// If the name is taken or the database cannot be written.
    pub fn intend(&mut self, snapshot: &SnapshotRecord, made: Option<u64>) -> Result<(), CatalogueError> {
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
            made.map_or(Ok(()), |mark| drop_making(transaction, mark))
        })
    }

    /// Takes back an intent of which nothing has happened, if it is there. Another snapshot of that name stays. The overlays that were `made` for it
    /// are being made again: somebody has to remove them.
    ///
    /// # Errors
    /// If the database cannot be written: it is unknown then whether the intent is there.
    pub fn drop_intent(&mut self, intent: &SnapshotRecord, made: Option<&Making>) -> Result<(), CatalogueError> {
        self.write(|transaction| {
            made.map_or(Ok(()), |making| put_making(transaction, making))?;
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

fn find_snapshot(table: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<SnapshotRecord>, CatalogueError> {
    let value = table.get(name).map_err(write_error)?;
    value.map(|value| decode(value.value(), || format!("snapshot `{name}`"))).transpose()
}

pub(super) fn put_snapshot(table: &mut redb::Table<'_, &str, &[u8]>, snapshot: &SnapshotRecord) -> Result<(), CatalogueError> {
    let value = encode(snapshot, || format!("snapshot `{}`", snapshot.name))?;
    table.insert(snapshot.name.as_str(), value.as_slice()).map_err(write_error)?;
    Ok(())
}

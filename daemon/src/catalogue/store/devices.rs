//! The devices and their layers.

use redb::ReadableTable;

use super::super::records::{DeviceRecord, LayerRecord, SnapshotState};
use super::error::{read_error, write_error};
use super::snapshots::put_snapshot;
use super::{CatalogueError, LAYERS, LayersTable, SNAPSHOTS, Store, decode, encode};

impl Store {
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
}

/// The index and record of a device's top layer.
pub(super) fn recorded_top(layers: &LayersTable<'_>, device: &str) -> Result<Option<(u32, LayerRecord)>, CatalogueError> {
    let last = layers.range((device, 0)..=(device, u32::MAX)).map_err(write_error)?.next_back().transpose().map_err(write_error)?;
    last.map(|(key, value)| Ok((key.value().1, decode(value.value(), || format!("device `{device}`"))?))).transpose()
}

pub(super) fn put_layer(layers: &mut LayersTable<'_>, device: &str, index: u32, layer: &LayerRecord) -> Result<(), CatalogueError> {
    let value = encode(layer, || format!("device `{device}`"))?;
    layers.insert((device, index), value.as_slice()).map_err(write_error)?;
    Ok(())
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

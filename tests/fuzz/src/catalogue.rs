//! The catalogue's file, damaged.
//!
//! An input changes bytes of a sound one, and goes on with what a daemon does. No panic gets out; a file that is refused is as it was; and what a
//! catalogue that was opened says does not depend on when it is asked.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use redb::StorageBackend;
use snapfence_image_format::chain::Format;
use snapfenced::catalogue::{DeviceRecord, LayerRecord, Store};

use crate::source::Source;

/// Most places that are damaged, and operations.
const MAX_DAMAGES: usize = 6;
const MAX_OPERATIONS: usize = 8;
/// Longest file.
const MAX_BYTES: u64 = 64 << 20;

/// A file in memory. Clones are the same one.
#[derive(Clone, Debug, Default)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Bytes {
    fn with<T>(&self, work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        work(&mut self.0.lock().expect("nothing panics with the lock"))
    }
}

fn range(bytes: &[u8], offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).map_err(io::Error::other)?;
    let end = start.checked_add(len).filter(|end| *end <= bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(start..end)
}

impl StorageBackend for Bytes {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|bytes| bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|bytes| {
            out.copy_from_slice(&bytes[range(bytes, offset, out.len())?]);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.with(|bytes| bytes.resize(len as usize, 0));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|bytes| {
            let place = range(bytes, offset, data.len())?;
            bytes[place].copy_from_slice(data);
            Ok(())
        })
    }
}

fn device(name: &str) -> DeviceRecord {
    let layer = |path: &str| LayerRecord { path: path.into(), format: Format::Qcow2 };
    DeviceRecord { name: name.into(), layers: vec![layer("/base"), layer("/top")] }
}

/// A sound file, and where it has something but zeros.
fn sound() -> &'static (Vec<u8>, Vec<usize>) {
    static SOUND: OnceLock<(Vec<u8>, Vec<usize>)> = OnceLock::new();
    SOUND.get_or_init(|| {
        let file = Bytes::default();
        let mut store = Store::with_backend(file.clone()).expect("a new catalogue");
        for name in ["vda", "vdb"] {
            store.put_device(&device(name)).expect("a catalogue");
        }
        drop(store);
        let bytes = file.with(|bytes| bytes.clone());
        let used = (0..bytes.len()).step_by(8).filter(|at| bytes[*at..(*at + 8).min(bytes.len())].iter().any(|byte| *byte != 0)).collect();
        (bytes, used)
    })
}

/// One run.
///
/// # Panics
/// If a promise is broken.
pub fn run(input: &[u8]) {
    let mut source = Source::new(input);
    let (bytes, used) = sound();
    let file = Bytes::default();
    file.with(|file| file.clone_from(bytes));
    let count = source.below(MAX_DAMAGES + 1);
    for _ in 0..count {
        let kind = source.u8();
        let place = if kind & 0x80 != 0 { source.below(512) } else { used[source.below(used.len())] + usize::from(kind >> 4) };
        file.with(|bytes| match kind & 7 {
            0 => bytes.truncate(place.max(1)),
            1 => bytes.resize(bytes.len() + place, 0),
            2..=4 => {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 1 << (source.u8() & 7);
                }
            }
            _ => {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte = source.u8();
                }
            }
        });
    }
    let before = file.with(|bytes| bytes.clone());
    let mut store = match Store::with_backend(file.clone()) {
        Ok(store) => store,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(file.with(|bytes| *bytes == before), "a catalogue was refused ({error}), and its file has changed");
            return;
        }
    };
    for _ in 0..MAX_OPERATIONS {
        if source.is_empty() {
            break;
        }
        // An error is an answer.
        match source.u8() & 3 {
            0 => drop(store.devices()),
            1 => drop(store.snapshots()),
            2 => drop(store.put_device(&device("vdc"))),
            _ => drop(store.forget_device("vda")),
        }
    }
    assert_eq!(store.devices().ok(), store.devices().ok());
    if count == 0 {
        store.devices().expect("a sound catalogue");
    }
}

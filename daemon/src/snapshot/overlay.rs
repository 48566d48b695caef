//! Getting an overlay ready to take over: everything that needs time happens here, before the fence.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapfence_image_format::chain::{self, AllowedDirectories, ChainCause, Format, NameError, Protection};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::extent::{ExtentList, Mapping};
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{CreateOptions, Draft, DraftError, Header, HeaderError, OpenError, OpenOptions, Qcow2};
use snapfence_image_format::storage::kept::MemoryKeeper;
use snapfence_image_format::storage::{Access, CacheMode, Environment, FileIdentity, Location, Storage};
use snapfence_image_format::units::{GuestOffset, GuestRange};

use super::Overlay;
use crate::catalogue::LayerRecord;

/// Bytes of the disk that are looked at in one go when an overlay must be empty.
const EMPTY_CHECK_STEP: u64 = 64 << 30;
/// Longest file name on every file system that matters.
const MAX_FILE_NAME: usize = 255;

/// The layer that the overlay will cover, and what applies to the overlay.
#[derive(Clone, Debug)]
pub(crate) struct Below {
    pub(crate) record: LayerRecord,
    pub(crate) identity: FileIdentity,
    /// Size of the disk in bytes.
    pub(crate) virtual_size: u64,
    /// Where the overlay, and names inside it, may be.
    pub(crate) allowed: AllowedDirectories,
    pub(crate) cache: CacheMode,
}

/// Who else has to do with a file.
pub(crate) struct Others<'a> {
    /// The device that has the file as a layer.
    pub(crate) serving: &'a dyn Fn(FileIdentity) -> Option<String>,
    /// What depends on the file as it is.
    pub(crate) protected: &'a dyn Protection,
    /// Where the overlay keeps what must not be lost with the daemon.
    pub(crate) keeper: &'a Arc<dyn MemoryKeeper>,
    /// Whether anybody waits for the overlay any more: if not, no further file is made.
    pub(crate) wanted: &'a dyn Fn() -> bool,
}

/// An overlay that only needs to be published.
#[derive(Debug)]
pub(crate) struct Prepared<E: Environment> {
    pub(crate) record: LayerRecord,
    pub(crate) identity: FileIdentity,
    pub(crate) layer: Arc<Layer<E>>,
    /// Whether we have made the file, and remove it if nothing comes of it.
    pub(crate) created: bool,
    location: Location,
}

/// Why an overlay cannot be used: which, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("overlay {path}: {cause}")]
pub struct OverlayError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub cause: OverlayCause,
}

/// What is wrong with an overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayCause {
    /// It may not be there.
    #[error(transparent)]
    Place(#[from] NameError),
    /// There is nothing beside the top that keeps a file.
    #[error("its top {} is a block device, beside which no overlay is made; give the overlay's path", .0.display())]
    BesideDevice(PathBuf),
    /// What is in that directory is gone with the next start of the machine.
    #[error("{} is for device nodes and kept in memory; give a path on a disk", .0.display())]
    AmongDevices(PathBuf),
    /// Its name, made from the snapshot's, is too long.
    #[error("the file name is longer than {MAX_FILE_NAME} bytes; give the overlay's path")]
    NameTooLong,
    /// It is not there although it is not to be made.
    #[error("there is no such file, and it is not asked to be made")]
    Missing,
    /// It is there although it is to be made.
    #[error("it exists already; choose another name, or use it as it is (without creating it)")]
    Exists,
    /// The snapshot has failed meanwhile.
    #[error("it came too late")]
    TooLate,
    /// Somebody has put another file in the place of the one that was made.
    #[error("another file has taken its place while it was being made")]
    Replaced,
    /// It cannot be made.
    #[error("cannot {action}: {source}")]
    Make {
        /// "create the file" and so on.
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The image cannot be made.
    #[error(transparent)]
    Draft(#[from] DraftError),
    /// It cannot be opened or locked.
    #[error(transparent)]
    Open(#[from] ChainCause),
    /// It has no header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It is no image that can be written to.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// It is one of the device's layers, or another device's.
    #[error("it is already a layer of device '{0}'")]
    InUse(String),
    /// Something would break.
    #[error("it must not be written to: {0} depends on it as a backing file")]
    Protected(String),
    /// It is another disk.
    #[error("its virtual size is {found} bytes, and the device has {expected}")]
    Size {
        /// Its size.
        found: u64,
        /// The device's.
        expected: u64,
    },
    /// It covers nothing.
    #[error("it names no backing file, but must name the present top: `qemu-img rebase -u -F {} -b {} FILE`", top.format, top.path.display())]
    NoBacking {
        /// The present top.
        top: LayerRecord,
    },
    /// It covers something else.
    #[error("its backing file is {}, and must be the present top {} ({})", found.display(), top.path.display(), top.format)]
    OtherBacking {
        /// What it names.
        found: PathBuf,
        /// The present top.
        top: LayerRecord,
    },
    /// It says that the top has another format.
    #[error("it says that {} is {found}, but it is {}", top.path.display(), top.format)]
    OtherBackingFormat {
        /// What it says.
        found: Format,
        /// The present top.
        top: LayerRecord,
    },
    /// The guest's disk would change at once.
    #[error("it is not empty: it has data at {0}")]
    NotEmpty(GuestOffset),
    /// It cannot be read or written.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

/// The path that an overlay gets if none is given: beside the top, with the name of the snapshot in place of the one that made the top.
pub(crate) fn path_beside(top: &Path, top_snapshot: Option<&str>, snapshot: &str) -> PathBuf {
    let stem = top.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // Otherwise the names would grow with each snapshot, up to where no file system takes them.
    let made_by = top_snapshot.map(|name| format!(".{name}"));
    let stem = made_by.and_then(|suffix| stem.strip_suffix(&suffix).map(str::to_owned)).unwrap_or(stem);
    top.with_file_name(format!("{stem}.{snapshot}.qcow2"))
}

/// The path under which an overlay with this mark is written before it gets its own.
pub(crate) fn temporary_path(overlay: &Path, mark: u64) -> PathBuf {
    let name = overlay.file_name().unwrap_or_default().to_string_lossy();
    overlay.with_file_name(format!(".{name}.{:08x}", mark & 0xffff_ffff))
}

/// Makes or opens the overlay, checks that it may cover the present top, and gets it ready for quick writes. Everything is durable then but its name,
/// for which the caller flushes the directory. What is made bears `mark`, which the catalogue knows already.
///
/// # Errors
/// What is wrong with it. A file that was made is removed again.
pub(crate) async fn prepare<E: Environment>(
    environment: &E,
    below: &Below,
    path: &Path,
    (wanted, mark): (&Overlay, u64),
    others: &Others<'_>,
) -> Result<Prepared<E>, OverlayError> {
    let failed = |cause| OverlayError { path: path.to_owned(), cause };
    if *wanted == Overlay::Create && below.identity.is_block_device() {
        return Err(failed(OverlayCause::BesideDevice(below.record.path.clone())));
    }
    let location = below.allowed.locate(path).map_err(|error| failed(error.into()))?;
    let path = &location.path();
    let created = !matches!(wanted, Overlay::Existing(_));
    let opened = if created {
        create(environment, below, mark, &location, others).await
    } else {
        adopt(environment, below, &location, others).await
    };
    let (identity, image) = opened.map_err(failed)?;
    let record = LayerRecord { path: path.to_owned(), format: Format::Qcow2 };
    Ok(Prepared { record, identity, layer: Arc::new(image), created, location })
}

/// Takes back what was prepared.
pub(crate) async fn discard<E: Environment>(environment: &E, keeper: &Arc<dyn MemoryKeeper>, prepared: Prepared<E>) {
    if prepared.created {
        give_back(&prepared.record.path, &prepared.layer).await;
        let Prepared { identity, layer, location, .. } = prepared;
        drop(layer);
        remove(environment, keeper, &location, identity).await;
    } else {
        // The file is not ours: only what was reserved in it is given back.
        leave(prepared).await;
    }
}

/// Closes what was prepared. The file stays, as empty as it was.
pub(crate) async fn leave<E: Environment>(prepared: Prepared<E>) {
    give_back(&prepared.record.path, &prepared.layer).await;
}

/// Removes a file that we have made, if it still has its name.
async fn remove<E: Environment>(environment: &E, keeper: &Arc<dyn MemoryKeeper>, location: &Location, identity: FileIdentity) {
    if let Err(error) = remove_file(environment, keeper, location, identity).await {
        let path = location.path();
        tracing::warn!(event = "overlay_left_behind", overlay = %path.display(), cause = %error, "an unused overlay cannot be removed");
    }
}

/// Removes the file of this identity, if it still has its name, and memory that was kept for it: closing the image may have failed to, and nobody
/// opens it any more. Nothing of that name is as good.
///
/// # Errors
/// If it cannot be looked at, or not be removed.
pub(crate) async fn remove_file<E: Environment>(
    environment: &E,
    keeper: &Arc<dyn MemoryKeeper>,
    location: &Location,
    identity: FileIdentity,
) -> std::io::Result<()> {
    let file = match environment.open(location, Access::Read, CacheMode::Buffered).await {
        Ok(file) => file,
        // Somebody was faster. What is kept for it stays: another file may have its number by now.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if file.identity() == identity {
        environment.remove(&location.path()).await?;
        // While the file is open, no other has its number.
        keeper.retain(identity, 0);
    }
    Ok(())
}

/// Makes a new image under a temporary name and gives it its own, which nothing may have had. Returns it open, and says which file it is.
///
/// Giving a file a name would replace another file of that name, whoever has made that in the meantime; only making a file is refused then. So an
/// empty one is made first, in whose place the image comes at once.
async fn create<E: Environment>(
    environment: &E,
    below: &Below,
    mark: u64,
    location: &Location,
    others: &Others<'_>,
) -> Result<(FileIdentity, Layer<E>), OverlayCause> {
    let still_wanted = || if (others.wanted)() { Ok(()) } else { Err(OverlayCause::TooLate) };
    let make = |action| move |source| OverlayCause::Make { action, source };
    let path = &location.path();
    let temporary = temporary_path(path, mark);
    let is_too_long = |path: &Path| path.file_name().is_some_and(|name| name.len() > MAX_FILE_NAME);
    if is_too_long(path) || is_too_long(&temporary) {
        return Err(OverlayCause::NameTooLong);
    }
    match environment.open(location, Access::Read, below.cache).await {
        Ok(_) => return Err(OverlayCause::Exists),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(OverlayCause::Make { action: "look for the file", source }),
    }
    still_wanted()?;
    let temporary = below.allowed.locate(&temporary)?;
    let file = environment.open(&temporary, Access::CreateNew, below.cache).await.map_err(make("create the file"))?;
    let identity = file.identity();
    let mut may_be_named = false;
    let made = async {
        chain::lock_file(&file, true).await?;
        let backing = backing_name(&below.record.path, path);
        let options = CreateOptions { mark: Some(mark), ..CreateOptions::overlay(below.virtual_size, backing, below.record.format.name()) };
        let draft = Draft::<E>::make(file, &options, others.keeper).await?;
        covers(environment, below, path, &draft.header()).await?;
        let image = draft.finish().await?;
        still_wanted()?;
        let place = environment.open(location, Access::CreateNew, below.cache).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => OverlayCause::Exists,
            _ => OverlayCause::Make { action: "create the file", source: error },
        })?;
        may_be_named = true;
        if let Err(source) = environment.rename(&temporary.path(), path).await {
            remove(environment, others.keeper, location, place.identity()).await;
            return Err(OverlayCause::Make { action: "give the file its name", source });
        }
        match environment.identities(std::slice::from_ref(path)).await.pop() {
            Some(Ok(found)) if found == identity => Ok(Layer::Qcow2(image)),
            Some(Err(source)) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(OverlayCause::Make { action: "look at the file", source })
            }
            _ => Err(OverlayCause::Replaced),
        }
    };
    match made.await {
        Ok(image) => Ok((identity, image)),
        Err(cause) => {
            remove(environment, others.keeper, &temporary, identity).await;
            if may_be_named {
                remove(environment, others.keeper, location, identity).await;
            }
            Err(cause)
        }
    }
}

/// How an overlay names the top: by the plain name where they are neighbours, so that the folder can be moved.
fn backing_name(top: &Path, overlay: &Path) -> PathBuf {
    match top.file_name() {
        // A name with a colon would be taken for a protocol.
        Some(name) if top.parent() == overlay.parent() && !name.as_encoded_bytes().contains(&b':') => name.into(),
        _ => top.to_owned(),
    }
}

/// Opens an image that is there, sees to it that it may cover the present top, and gets it ready for quick writes, durably.
async fn adopt<E: Environment>(
    environment: &E,
    below: &Below,
    location: &Location,
    others: &Others<'_>,
) -> Result<(FileIdentity, Layer<E>), OverlayCause> {
    let path = &location.path();
    let file = match environment.open(location, Access::Write, below.cache).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(OverlayCause::Missing),
        Err(source) => return Err(ChainCause::Open { writing: true, source }.into()),
    };
    let identity = file.identity();
    if let Some(device) = (others.serving)(identity) {
        return Err(OverlayCause::InUse(device));
    }
    if let Some(dependant) = others.protected.dependant(identity) {
        return Err(OverlayCause::Protected(dependant));
    }
    chain::lock_file(&file, true).await?;
    let header = Header::read(&file).await?;
    covers(environment, below, path, &header).await?;
    let opening = OpenOptions { keeper: Some(Arc::clone(others.keeper)), keep_later: true, ..OpenOptions::writing() };
    let image = Layer::Qcow2(Qcow2::open_with_header(file, header, opening).await?);
    let ready = async {
        if let Some(at) = first_data(&image, below.virtual_size).await? {
            return Err(OverlayCause::NotEmpty(at));
        }
        image.keep(others.keeper).await?;
        Ok(image.warm().await?)
    };
    match ready.await {
        Ok(()) => Ok((identity, image)),
        Err(cause) => {
            give_back(path, &image).await;
            Err(cause)
        }
    }
}

/// Takes out of the file what writing needs: reserved space, and where unwritten changes would be kept.
async fn give_back<E: Environment>(path: &Path, image: &Layer<E>) {
    if let Err(error) = image.freeze().await {
        tracing::warn!(event = "overlay_not_restored", overlay = %path.display(), cause = %error, "reserved clusters leak");
    }
}

/// Whether an image with this header, at `path`, may cover the present top.
///
/// # Errors
/// Why not.
pub(crate) async fn covers<E: Environment>(environment: &E, below: &Below, path: &Path, header: &Header) -> Result<(), OverlayCause> {
    if header.virtual_size() != below.virtual_size {
        return Err(OverlayCause::Size { found: header.virtual_size(), expected: below.virtual_size });
    }
    let top = || below.record.clone();
    let Some((location, format)) = chain::backing(path, header, &below.allowed)? else {
        return Err(OverlayCause::NoBacking { top: top() });
    };
    let named = match environment.open(&location, Access::Read, CacheMode::Buffered).await {
        Ok(file) => Some(file.identity()),
        // The top is there.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(ChainCause::Open { writing: false, source }.into()),
    };
    if named != Some(below.identity) {
        return Err(OverlayCause::OtherBacking { found: location.path(), top: top() });
    }
    if format != below.record.format {
        return Err(OverlayCause::OtherBackingFormat { found: format, top: top() });
    }
    Ok(())
}

/// Where the overlay has something of its own.
pub(crate) async fn first_data<E: Environment>(image: &Layer<E>, size: u64) -> Result<Option<GuestOffset>, LayerError> {
    let disk = GuestRange::new(GuestOffset::ZERO, size);
    let mut extents = ExtentList::new();
    for part in disk.split_at_multiples(EMPTY_CHECK_STEP) {
        extents.clear();
        image.map(part, &mut extents).await?;
        let own = extents.as_slice().iter().find(|extent| extent.mapping != Mapping::Unallocated);
        if let Some(extent) = own {
            return Ok(Some(extent.range.start));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_are_named_after_the_snapshot_and_names_do_not_grow() {
        let table = [
            ("/i/base.raw", None, "s1", "/i/base.s1.qcow2"),
            ("/i/base.s1.qcow2", Some("s1"), "s2", "/i/base.s2.qcow2"),
            ("/i/base.s1.qcow2", None, "s2", "/i/base.s1.s2.qcow2"),
            ("/i/base.s1.qcow2", Some("other"), "s2", "/i/base.s1.s2.qcow2"),
            ("/i/base", None, "s1", "/i/base.s1.qcow2"),
            ("/i/.hidden", None, "s1", "/i/.hidden.s1.qcow2"),
            ("/i/v1.2.img", None, "s.1", "/i/v1.2.s.1.qcow2"),
            ("/i/v1.2.s.1.qcow2", Some("s.1"), "t", "/i/v1.2.t.qcow2"),
        ];
        for (top, by, snapshot, expected) in table {
            assert_eq!(path_beside(Path::new(top), by, snapshot), Path::new(expected), "{top}");
        }
    }

    #[test]
    fn neighbours_are_named_without_their_directory() {
        let table = [("/i/top", "/i/overlay", "top"), ("/i/top", "/j/overlay", "/i/top"), ("/i/nbd:top", "/i/overlay", "/i/nbd:top")];
        for (top, overlay, expected) in table {
            assert_eq!(backing_name(Path::new(top), Path::new(overlay)), Path::new(expected));
        }
    }
}

//! Opening an image and everything beneath it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::layer::Layer;
use crate::qcow2::{Header, HeaderError, OpenError, OpenOptions, Qcow2};
use crate::raw::{Raw, RawOpenError};
use crate::storage::kept::MemoryKeeper;
use crate::storage::{Access, CacheMode, Environment, FileIdentity, Location, Sharing, Storage};

use super::{AllowedDirectories, Format, MAX_DEPTH, NameError, UnknownFormat};

/// Layers that are opened at a time.
const AT_ONCE: usize = 64;
/// Expected files that are opened together, perhaps one after the other on one thread: where each takes its time, on a file server, a chain is opened
/// later so than if all had threads of their own, and where it does not, much earlier.
const GROUP: usize = 16;
/// Such groups that are opened at a time.
const GROUPS_AT_ONCE: usize = 16;

/// How a chain is opened.
#[derive(Clone, Debug)]
pub struct ChainOptions<'a> {
    /// Where names inside images may lead.
    pub allowed: &'a AllowedDirectories,
    /// Absolute paths of external data files that may be opened, for reading.
    pub data_files: &'a [PathBuf],
    /// Whether transfers pass the page cache.
    pub cache: CacheMode,
    /// Whether the top layer will be written to.
    pub writable: bool,
    /// Files that must not be written to, whatever the locks say, because something depends on them.
    pub protected: &'a dyn Protection,
    /// Where to keep, while the top is written to, what must not be lost with the process, and where an earlier process has left it.
    pub keeper: Option<&'a Arc<dyn MemoryKeeper>>,
    /// Absolute paths and formats of files that were beneath the top when last seen. They are opened all at once, and not one after the other as
    /// their headers lead to them; what the headers say counts nevertheless.
    pub expected: &'a [(PathBuf, Format)],
}

impl<'a> ChainOptions<'a> {
    /// To be read past the page cache, where nothing is protected and nothing kept.
    pub fn reading(allowed: &'a AllowedDirectories) -> Self {
        Self { allowed, data_files: &[], cache: CacheMode::Direct, writable: false, protected: &Unprotected, keeper: None, expected: &[] }
    }
}

/// Knows files that must not be opened for writing.
pub trait Protection: std::fmt::Debug {
    /// What depends on this file, in words that go on with "depends on it"; `None` if nothing does.
    fn dependant(&self, file: FileIdentity) -> Option<String>;
}

/// Protects nothing: for images that stand alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unprotected;

impl Protection for Unprotected {
    fn dependant(&self, _file: FileIdentity) -> Option<String> {
        None
    }
}

/// One layer of an open chain.
#[derive(Debug)]
pub struct ChainLayer<E: Environment> {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Which file it is.
    pub identity: FileIdentity,
    /// The open image.
    pub layer: Arc<Layer<E>>,
}

/// Why a chain cannot be opened: which file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {cause}")]
pub struct ChainError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub cause: ChainCause,
}

/// What is wrong with one file of a chain.
#[derive(Debug, thiserror::Error)]
pub enum ChainCause {
    /// The system does not open it.
    #[error("cannot be opened for {}: {source}{hint}", if *.writing { "writing" } else { "reading" }, hint = open_hint(source))]
    Open {
        /// Whether it was to be written to.
        writing: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another program excludes us.
    #[error("is in use: another program or device holds its image lock against {}", if *.writing { "writing" } else { "reading" })]
    InUse {
        /// Whether it was to be written to.
        writing: bool,
    },
    /// The locks cannot be had for another reason.
    #[error("its image lock cannot be taken: {0}")]
    Lock(#[source] io::Error),
    /// Something would break.
    #[error("must not be written to: {dependant} depends on it as a backing file; serve what depends on it, or this read-only")]
    Protected {
        /// What would.
        dependant: String,
    },
    /// No qcow2 header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// No qcow2 image.
    #[error(transparent)]
    Qcow2(#[from] OpenError),
    /// No raw image.
    #[error(transparent)]
    Raw(#[from] RawOpenError),
    /// The format of the backing file is a matter of guessing.
    #[error(
        "names the backing file `{backing}` without its format, which is never guessed; if it is raw, say so with \
         `qemu-img rebase -u -F raw -b {backing} FILE`"
    )]
    NoBackingFormat {
        /// The name of the backing file.
        backing: String,
    },
    /// The format of the backing file is none that we know.
    #[error("its backing file `{backing}` has an {source}")]
    BackingFormat {
        /// The name of the backing file.
        backing: String,
        /// Its format.
        #[source]
        source: UnknownFormat,
    },
    /// The name of the backing file is not followed.
    #[error("its backing file is not opened: {0}")]
    BackingName(#[source] NameError),
    /// The name of the data file is not followed.
    #[error("its external data file is not opened: {0}")]
    DataFileName(#[source] NameError),
    /// The chain leads back to itself.
    #[error("is in the chain twice: a chain cannot lead back to itself")]
    Twice,
    /// The chain does not end.
    #[error("lies beneath {limit} layers, which is the limit")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
}

fn open_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ELOOP) => " (a symbolic link is on the way; names inside images and on the control socket may not pass one)",
        Some(libc::EMFILE) => " (raise the limit of open files: LimitNOFILE= or `ulimit -n`)",
        _ => "",
    }
}

/// Opens the image `top`, which the operator named, and all that lie beneath it. The answer has the base first.
///
/// Only the top is opened for writing, if at all. Every layer is locked as QEMU does: the top as a writer's, the others as readers'.
///
/// # Errors
/// Which file cannot be opened or makes no sense. Nothing is held then.
pub async fn open_chain<E: Environment>(
    environment: &E,
    top: &Location,
    format: Format,
    options: ChainOptions<'_>,
) -> Result<Vec<ChainLayer<E>>, ChainError> {
    open_limited(environment, top, format, options, MAX_DEPTH, true).await
}

/// As [`open_chain`], but only to look: nothing is opened for writing, and no lock is taken. A layer that somebody else writes to may look as it
/// never was.
///
/// # Errors
/// As of [`open_chain`].
pub async fn open_chain_unlocked<E: Environment>(
    environment: &E,
    top: &Location,
    format: Format,
    options: ChainOptions<'_>,
) -> Result<Vec<ChainLayer<E>>, ChainError> {
    open_limited(environment, top, format, ChainOptions { writable: false, keeper: None, ..options }, MAX_DEPTH, false).await
}

async fn open_limited<E: Environment>(
    environment: &E,
    top: &Location,
    format: Format,
    options: ChainOptions<'_>,
    limit: usize,
    locked: bool,
) -> Result<Vec<ChainLayer<E>>, ChainError> {
    let found = walk(environment, top, format, &options, limit, locked).await?;
    let is_kept = found.iter().any(|file| file.is_kept);
    // What each has in store takes several looks into its file, and they do not depend on one another.
    let open = |found| open_layer(environment, found, &options, locked);
    let mut layers: Vec<_> = stream::iter(found).map(open).buffered(AT_ONCE).try_collect().await?;
    if let (Some(keeper), Some(ChainLayer { path, layer, .. })) = (options.keeper.filter(|_| options.writable && !is_kept), layers.first())
    {
        layer.keep(keeper).await.map_err(|error| ChainError { path: path.clone(), cause: OpenError::Layer(error).into() })?;
    }
    layers.reverse();
    Ok(layers)
}

/// A file of the chain, locked, of which no more has been read than what lies beneath it.
struct Found<E: Environment> {
    path: PathBuf,
    file: E::File,
    /// Of a qcow2 image; others have none.
    header: Option<Header>,
    writable: bool,
    /// It is the top, and a killed process has left something of it in memory.
    is_kept: bool,
}

/// A file that is expected in the chain, opened for reading and locked.
struct Ahead<E: Environment> {
    file: E::File,
    /// Of a qcow2 image.
    header: Option<Header>,
}

/// Opens the files that are expected beneath the top. What fails here is left to whoever follows the chain, and may not even be in it.
async fn open_ahead<E: Environment>(environment: &E, options: &ChainOptions<'_>, locked: bool) -> HashMap<PathBuf, Ahead<E>> {
    let located = options.expected.iter().filter_map(|(path, format)| Some((options.allowed.locate(path).ok()?, *format)));
    let located: Vec<(Location, Format)> = located.collect();
    let look = async |file: E::File, (location, format): &(Location, Format)| {
        if locked {
            lock_file(&file, false).await.ok()?;
        }
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Header::read(&file).await.ok()?),
        };
        Some((location.path(), Ahead { file, header }))
    };
    let groups = stream::iter(located.chunks(GROUP)).map(|group| async move {
        let locations: Vec<_> = group.iter().map(|(location, _)| location.clone()).collect();
        let files = environment.open_all(&locations, Access::Read, options.cache).await;
        stream::iter(files.into_iter().zip(group).filter_map(|(file, known)| Some((file.ok()?, known))))
    });
    let opened = groups.buffer_unordered(GROUPS_AT_ONCE).flatten();
    let looked = opened.map(|(file, known)| look(file, known)).buffer_unordered(AT_ONCE);
    looked.filter_map(std::future::ready).collect().await
}

/// Follows the chain from its top to the base, and locks all of it.
async fn walk<E: Environment>(
    environment: &E,
    top: &Location,
    format: Format,
    options: &ChainOptions<'_>,
    limit: usize,
    locked: bool,
) -> Result<Vec<Found<E>>, ChainError> {
    let mut ahead = open_ahead(environment, options, locked).await;
    let mut chain = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((top.clone(), format));
    while let Some((location, format)) = next.take() {
        let path = location.path();
        let failed = |cause| ChainError { path: path.clone(), cause };
        if chain.len() == limit {
            return Err(failed(ChainCause::TooDeep { limit }));
        }
        let writable = options.writable && chain.is_empty();
        let (mut file, is_locked, known) = match ahead.remove(&path).filter(|_| !writable) {
            Some(Ahead { file, header }) => (file, locked, header),
            None => (open_file(environment, &location, writable, options.cache).await.map_err(failed)?, false, None),
        };
        let identity = file.identity();
        if !seen.insert(identity) {
            return Err(failed(ChainCause::Twice));
        }
        if let Some(dependant) = options.protected.dependant(identity).filter(|_| writable) {
            return Err(failed(ChainCause::Protected { dependant }));
        }
        if locked && !is_locked {
            lock_file(&file, writable).await.map_err(failed)?;
        }
        let (mut header, mut is_kept) = (None, false);
        if format == Format::Qcow2 {
            let mut read = match known {
                Some(known) => known,
                None => Header::read(&file).await.map_err(|error| failed(error.into()))?,
            };
            is_kept = has_left(&read, options.keeper);
            if !writable && is_kept {
                // It was the top of the stack when its process was killed.
                is_kept = false;
                // A file server is told in its own time that it is closed, and the lock has to be gone by then.
                let _ = file.set_sharing(Sharing::None).await;
                drop(file);
                restore(environment, &location, options).await.map_err(failed)?;
                file = open_file(environment, &location, false, options.cache).await.map_err(failed)?;
                lock_file(&file, false).await.map_err(failed)?;
                read = Header::read(&file).await.map_err(|error| failed(error.into()))?;
            }
            next = backing(&path, &read, options.allowed).map_err(failed)?;
            header = Some(read);
        }
        chain.push(Found { path, file, header, writable, is_kept });
    }
    Ok(chain)
}

/// Opens the image in a file that has been found.
async fn open_layer<E: Environment>(
    environment: &E,
    found: Found<E>,
    options: &ChainOptions<'_>,
    locked: bool,
) -> Result<ChainLayer<E>, ChainError> {
    let Found { path, file, header, writable, is_kept } = found;
    let failed = |cause| ChainError { path: path.clone(), cause };
    let identity = file.identity();
    let (format, layer) = match header {
        None => (Format::Raw, Layer::Raw(Raw::open(file, writable).await.map_err(|error| failed(error.into()))?)),
        Some(header) => {
            let data_file = open_data_file(environment, &path, &header, options, locked).await.map_err(failed)?;
            // An image with nothing left is not changed before all beneath it has been found good.
            let opening = OpenOptions { writable, data_file, l2_cache_bytes: None, keeper: options.keeper.cloned(), keep_later: !is_kept };
            let image = Qcow2::open_with_header(file, header, opening).await;
            (Format::Qcow2, Layer::Qcow2(image.map_err(|error| failed(error.into()))?))
        }
    };
    if let Some(keeper) = options.keeper {
        layer.remember_failures(keeper);
    }
    Ok(ChainLayer { path, format, identity, layer: Arc::new(layer) })
}

/// Whether a process was killed that has not written everything to the image which it had acknowledged, and has left it in memory.
fn has_left(header: &Header, keeper: Option<&Arc<dyn MemoryKeeper>>) -> bool {
    let find = |keeper: &Arc<dyn MemoryKeeper>| keeper.find(header.kept_number());
    // What cannot be accessed is an error when the image is opened for writing.
    header.kept_number() != 0 && keeper.is_some_and(|keeper| !matches!(find(keeper), Ok(None)))
}

/// Writes to an image what its last process had no time for.
async fn restore<E: Environment>(environment: &E, location: &Location, options: &ChainOptions<'_>) -> Result<(), ChainCause> {
    let file = open_file(environment, location, true, options.cache).await?;
    lock_file(&file, true).await?;
    let image = Qcow2::<E>::open(file, OpenOptions { keeper: options.keeper.cloned(), ..OpenOptions::writing() }).await?;
    let layer = Layer::Qcow2(image);
    layer.freeze().await.map_err(OpenError::Layer)?;
    Ok(())
}

/// The file that `header`, of the image at `path`, names as its backing file, with its format.
///
/// # Errors
/// If the name is not followed or the format is missing or unknown.
pub fn backing(path: &Path, header: &Header, allowed: &AllowedDirectories) -> Result<Option<(Location, Format)>, ChainCause> {
    let Some(backing) = header.backing() else { return Ok(None) };
    let name = || backing.name.to_string_lossy().into_owned();
    let location = allowed.resolve(path, backing.name.as_encoded_bytes()).map_err(ChainCause::BackingName)?;
    let format = backing.format.as_deref().ok_or_else(|| ChainCause::NoBackingFormat { backing: name() })?;
    let format = format.parse().map_err(|source| ChainCause::BackingFormat { backing: name(), source })?;
    Ok(Some((location, format)))
}

/// Opens one file, not yet locked.
///
/// # Errors
/// What the system says.
pub async fn open_file<E: Environment>(
    environment: &E,
    location: &Location,
    writable: bool,
    cache: CacheMode,
) -> Result<E::File, ChainCause> {
    let access = if writable { Access::Write } else { Access::Read };
    environment.open(location, access, cache).await.map_err(|source| ChainCause::Open { writing: writable, source })
}

/// Takes the image lock of a file that will be written to, or only read.
///
/// # Errors
/// If another program excludes that.
pub async fn lock_file(file: &impl Storage, writable: bool) -> Result<(), ChainCause> {
    let sharing = if writable { Sharing::Writer } else { Sharing::Reader };
    file.set_sharing(sharing).await.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => ChainCause::InUse { writing: writable },
        _ => ChainCause::Lock(error),
    })
}

async fn open_data_file<E: Environment>(
    environment: &E,
    path: &Path,
    header: &Header,
    options: &ChainOptions<'_>,
    locked: bool,
) -> Result<Option<E::File>, ChainCause> {
    use std::os::unix::ffi::OsStrExt;
    let Some(name) = header.data_file_name().filter(|_| header.has_data_file()) else { return Ok(None) };
    let location = options.allowed.resolve(path, name.as_bytes()).map_err(ChainCause::DataFileName)?;
    if !options.data_files.contains(&location.path()) {
        return Ok(None); // Opening the image says that it must be allowed by name.
    }
    let file = open_file(environment, &location, false, options.cache).await?;
    if locked {
        lock_file(&file, false).await?;
    }
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::plain_header;
    use crate::storage::MemoryEnvironment;
    use crate::storage::simulated::{SimulatedEnvironment, Simulation};

    const MEGABYTE: u64 = 1 << 20;

    /// An empty qcow2 image: header, refcount table, refcount block, L1 table, one cluster each.
    fn image(backing: Option<(&str, Option<&str>)>) -> Vec<u8> {
        const CLUSTER: usize = 0x1_0000;
        let mut bytes = plain_header();
        bytes.resize(4 * CLUSTER, 0);
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let mut at = 104;
        if let Some((name, format)) = backing {
            if let Some(format) = format {
                put(at, &0xe279_2aca_u32.to_be_bytes());
                put(at + 4, &u32::try_from(format.len()).expect("short").to_be_bytes());
                put(at + 8, format.as_bytes());
                at += 8 + format.len().next_multiple_of(8);
            }
            put(8, &u64::try_from(at + 8).expect("small").to_be_bytes());
            put(16, &u32::try_from(name.len()).expect("short").to_be_bytes());
            put(at + 8, name.as_bytes());
        }
        put(CLUSTER, &0x2_0000_u64.to_be_bytes());
        for cluster in 0..4 {
            put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
        }
        bytes
    }

    /// Says that one file is needed.
    #[derive(Debug)]
    struct Needed(FileIdentity);

    impl Protection for Needed {
        fn dependant(&self, file: FileIdentity) -> Option<String> {
            (file == self.0).then(|| "device `vdb`".to_owned())
        }
    }

    fn environment(files: &[(&str, Vec<u8>)]) -> MemoryEnvironment {
        let environment = MemoryEnvironment::new();
        for (path, bytes) in files {
            environment.put(path, bytes);
        }
        environment
    }

    type Opened = Result<Vec<ChainLayer<MemoryEnvironment>>, ChainError>;

    fn open(environment: &MemoryEnvironment, top: &str, format: Format, writable: bool) -> Opened {
        open_protected(environment, top, format, writable, None)
    }

    fn open_protected(
        environment: &MemoryEnvironment,
        top: &str,
        format: Format,
        writable: bool,
        protected: Option<FileIdentity>,
    ) -> Opened {
        let (used, top) = (environment.clone(), PathBuf::from(top));
        environment.block_on(async move {
            let allowed = AllowedDirectories::default().with_directory_of(&top);
            let needed = protected.map(Needed);
            let protected: &dyn Protection = needed.as_ref().map_or(&Unprotected, |needed| needed);
            let options = ChainOptions { writable, protected, ..ChainOptions::reading(&allowed) };
            open_chain(&used, &Location::Trusted(top.clone()), format, options).await
        })
    }

    fn three() -> MemoryEnvironment {
        environment(&[
            ("/i/base.raw", vec![7; 4096]),
            ("/i/middle", image(Some(("base.raw", Some("raw"))))),
            ("/i/top", image(Some(("/i/middle", Some("qcow2"))))),
        ])
    }

    #[test]
    fn a_chain_opens_down_to_its_base() {
        let environment = three();
        let layers = open(&environment, "/i/top", Format::Qcow2, true).expect("whole");
        let found: Vec<_> =
            layers.iter().map(|layer| (layer.path.to_str().expect("UTF-8"), layer.format, layer.layer.virtual_size())).collect();
        let expected = [("/i/base.raw", Format::Raw, 4096), ("/i/middle", Format::Qcow2, MEGABYTE), ("/i/top", Format::Qcow2, MEGABYTE)];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_expected_beneath_changes_nothing_but_the_time_it_takes() {
        let of = |list: &[(&str, Format)]| list.iter().map(|(path, format)| (PathBuf::from(path), *format)).collect::<Vec<_>>();
        let (raw, qcow2) = (Format::Raw, Format::Qcow2);
        let table = [
            of(&[("/i/base.raw", raw), ("/i/middle", qcow2)]),
            // Nothing of that is so any more.
            of(&[("/i/base.raw", qcow2), ("/i/middle", raw), ("/i/top", qcow2)]),
            of(&[("/i/none", qcow2), ("/i/other", raw), ("/secret", raw), ("/i/to-middle", qcow2)]),
        ];
        for expected in table {
            for writable in [false, true] {
                let environment = three();
                environment.put("/i/other", &[0; 512]);
                environment.put("/secret", &[0; 512]);
                environment.symlink("/i/middle", "/i/to-middle").expect("a new name");
                let (used, given) = (environment.clone(), expected.clone());
                let layers = environment.block_on(async move {
                    let allowed = AllowedDirectories::new(["/i".into()]);
                    let options = ChainOptions { writable, expected: &given, ..ChainOptions::reading(&allowed) };
                    open_chain(&used, &Location::Trusted("/i/top".into()), qcow2, options).await.expect("whole")
                });
                let found: Vec<_> = layers.iter().map(|layer| (layer.path.to_str().expect("UTF-8"), layer.format)).collect();
                assert_eq!(found, [("/i/base.raw", raw), ("/i/middle", qcow2), ("/i/top", qcow2)], "{expected:?}");
                let refused = open(&environment, "/i/middle", qcow2, true).expect_err("locked").to_string();
                assert!(refused.starts_with("/i/middle: is in use: "), "{refused}");
                open(&environment, "/i/other", raw, true).expect("nothing that is not in the chain is held");
            }
        }
    }

    /// The files of a chain take a while each, but not after one another.
    #[test]
    fn what_was_expected_beneath_is_opened_at_the_same_time() {
        let took = |ahead: bool| {
            let disk = SimulatedEnvironment::new(4);
            disk.put("/i/0", &[0; 512]);
            let mut expected = vec![(PathBuf::from("/i/0"), Format::Raw)];
            for layer in 1..60 {
                let format = if layer == 1 { "raw" } else { "qcow2" };
                disk.put(format!("/i/{layer}"), &image(Some((&(layer - 1).to_string(), Some(format))))[..]);
                expected.push((PathBuf::from(format!("/i/{layer}")), Format::Qcow2));
            }
            expected.truncate(if ahead { 59 } else { 0 });
            let used = disk.clone();
            Simulation::on(disk).block_on(async move {
                let allowed = AllowedDirectories::new(["/i".into()]);
                let options = ChainOptions { writable: true, expected: &expected, ..ChainOptions::reading(&allowed) };
                let began = used.now();
                let layers = open_chain(&used, &Location::Trusted("/i/59".into()), Format::Qcow2, options).await.expect("whole");
                assert_eq!(layers.len(), 60);
                used.now() - began
            })
        };
        let (one_by_one, at_once) = (took(false), took(true));
        assert!(at_once * 4 < one_by_one, "{at_once:?} against {one_by_one:?}");
    }

    #[test]
    fn layers_beneath_are_shared_and_the_top_is_not() {
        let environment = three();
        environment.put("/i/other", &image(Some(("middle", Some("qcow2")))));
        let first = open(&environment, "/i/top", Format::Qcow2, true).expect("whole");
        open(&environment, "/i/other", Format::Qcow2, true).expect("shares the layers beneath");
        for (path, writable) in [("/i/top", true), ("/i/top", false), ("/i/middle", true)] {
            let refused = open(&environment, path, Format::Qcow2, writable).expect_err("locked").to_string();
            assert!(refused.starts_with(&format!("{path}: is in use: ")), "{refused}");
        }
        drop(first);
        open(&environment, "/i/top", Format::Qcow2, true).expect("free again");
    }

    #[test]
    fn a_file_that_others_depend_on_is_not_written_to() {
        let environment = three();
        let middle = open(&environment, "/i/middle", Format::Qcow2, false).expect("whole")[1].identity;
        let refused = open_protected(&environment, "/i/middle", Format::Qcow2, true, Some(middle)).expect_err("protected").to_string();
        assert_eq!(
            refused,
            "/i/middle: must not be written to: device `vdb` depends on it as a backing file; serve what depends on it, or this read-only"
        );
        open_protected(&environment, "/i/middle", Format::Qcow2, false, Some(middle)).expect("for reading");
        open_protected(&environment, "/i/top", Format::Qcow2, true, Some(middle)).expect("only read beneath");
    }

    #[test]
    fn what_makes_no_chain_is_refused_by_name() {
        let raw_ragged = vec![0; 1000];
        let table: [(&str, Vec<u8>, &str); 12] = [
            ("self", image(Some(("self", Some("qcow2")))), "/i/self: is in the chain twice"),
            ("loop1", image(Some(("loop2", Some("qcow2")))), "/i/loop1: is in the chain twice"),
            ("link", image(Some(("to-base", Some("raw")))), "/i/to-base: cannot be opened for reading"),
            ("noformat", image(Some(("base.raw", None))), "/i/noformat: names the backing file `base.raw` without its format"),
            ("vmdk", image(Some(("base.raw", Some("vmdk")))), "/i/vmdk: its backing file `base.raw` has an unknown image format `vmdk`"),
            ("outside", image(Some(("/etc/shadow", Some("raw")))), "/i/outside: its backing file is not opened: /etc/shadow lies outside"),
            ("up", image(Some(("../secret", Some("raw")))), "/i/up: its backing file is not opened: /secret lies outside"),
            (
                "url",
                image(Some(("nbd://host/x", Some("raw")))),
                "/i/url: its backing file is not opened: `nbd://host/x` is not a plain path",
            ),
            ("json", image(Some(("json:{}", Some("raw")))), "/i/json: its backing file is not opened: `json:{}` is not a plain path"),
            ("missing", image(Some(("nothing", Some("raw")))), "/i/nothing: cannot be opened for reading: "),
            ("lies", image(Some(("base.raw", Some("qcow2")))), "/i/base.raw: it is not a qcow2 image"),
            ("ragged", raw_ragged, "/i/ragged: it is not a qcow2 image"),
        ];
        let environment = three();
        environment.put("/i/loop2", &image(Some(("loop1", Some("qcow2")))));
        environment.put("/secret", &[0; 512]);
        environment.symlink("/i/base.raw", "/i/to-base").expect("a new name");
        for (name, bytes, expected) in table {
            let path = format!("/i/{name}");
            environment.put(&path, &bytes);
            for writable in [false, true] {
                let refused = open(&environment, &path, Format::Qcow2, writable).expect_err(name).to_string();
                assert!(refused.starts_with(expected), "{name}: {refused}");
            }
        }
        let refused = open(&environment, "/i/ragged", Format::Raw, true).expect_err("ragged").to_string();
        assert!(refused.contains("not a multiple of 512"), "{refused}");
        open(&environment, "/i/ragged", Format::Raw, false).expect("for reading");
        open(&environment, "/i/top", Format::Qcow2, true).expect("nothing is held after a refusal");
    }

    #[test]
    fn a_chain_may_be_deep_and_ends_at_the_limit() {
        let environment = MemoryEnvironment::new();
        environment.put("/i/0", &[0; 512]);
        for layer in 1..500 {
            let format = if layer == 1 { "raw" } else { "qcow2" };
            environment.put(format!("/i/{layer}"), &image(Some((&(layer - 1).to_string(), Some(format))))[..]);
        }
        assert_eq!(open(&environment, "/i/499", Format::Qcow2, true).expect("whole").len(), 500);
        let used = environment.clone();
        let limited = environment.block_on(async move {
            let allowed = AllowedDirectories::new(["/i".into()]);
            let cache = CacheMode::Direct;
            let options = ChainOptions { cache, ..ChainOptions::reading(&allowed) };
            open_limited(&used, &Location::Trusted("/i/499".into()), Format::Qcow2, options, 499, true).await
        });
        assert_eq!(limited.expect_err("one too many").to_string(), "/i/0: lies beneath 499 layers, which is the limit");
    }
}

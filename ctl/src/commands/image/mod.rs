//! `snapfence image`

mod check;
mod create;
mod info;
mod map;

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use snapfence_image_format::chain::{AllowedDirectories, ChainCause, ChainError, Format};
use snapfence_image_format::qcow2::HeaderError;
use snapfence_image_format::storage::Location;
use snapfence_image_format::storage::uring::Reactor;

use super::Session;
use crate::arguments::{Image, ImageCommand};

/// Submissions at a time; these commands do little at once.
const RING_ENTRIES: u32 = 32;

/// An image that the user has named, its path resolved.
#[derive(Clone, Debug)]
struct Named {
    path: PathBuf,
    format: Format,
    /// Where names inside the image may lead.
    allowed: AllowedDirectories,
    /// Whether it is looked at even while others write to it.
    shared: bool,
}

impl Named {
    fn location(&self) -> Location {
        Location::Trusted(self.path.clone())
    }
}

impl TryFrom<Image> for Named {
    type Error = anyhow::Error;

    fn try_from(image: Image) -> Result<Self> {
        let Image { path, format, allow_dir, force_share } = image;
        // The allowed directories have to be free of symbolic links, and the names in the image are relative to where it really is.
        let path = fs::canonicalize(&path).with_context(|| format!("cannot find the image {}", path.display()))?;
        let mut allowed = AllowedDirectories::default().with_directory_of(&path);
        for directory in allow_dir {
            allowed.allow(fs::canonicalize(&directory).with_context(|| format!("cannot find the directory {}", directory.display()))?);
        }
        Ok(Self { path, format: format.into(), allowed, shared: force_share })
    }
}

pub(super) fn run(session: &Session, command: ImageCommand) -> Result<ExitCode> {
    match command {
        ImageCommand::Create(arguments) => create::run(session, arguments)?,
        ImageCommand::Check { image, repair } => return of(image, |image| check::run(session, image, repair)),
        ImageCommand::Info { image, backing_chain } => of(image, |image| info::run(session, image, backing_chain))?,
        ImageCommand::Map { image } => of(image, |image| map::run(session, image))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Does something with an image. A failure that comes from a wrong format says how to state the right one, one that comes from a lock how to do
/// without.
fn of<T>(image: Image, action: impl FnOnce(Named) -> Result<T>) -> Result<T> {
    let image = Named::try_from(image)?;
    let path = image.path.clone();
    action(image).map_err(|error| match error {
        error if is_not_qcow2(&error, &path) => error.context(FormatHint(path)),
        error if is_in_use(&error) => error.context("-U (--force-share) looks at images in use as well"),
        error => error,
    })
}

/// Whether the error is that somebody else writes to what was only to be read.
fn is_in_use(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<ChainError>().map(|error| &error.cause).or_else(|| error.downcast_ref::<ChainCause>());
    matches!(cause, Some(ChainCause::InUse { writing: false }))
}

#[derive(Debug, thiserror::Error)]
#[error("{} is no qcow2 image; if it is raw, say so with --format raw", .0.display())]
struct FormatHint(PathBuf);

/// Whether the error is that the image at `path` itself, and not one beneath, has no qcow2 header.
fn is_not_qcow2(error: &anyhow::Error, path: &Path) -> bool {
    let header = match error.downcast_ref::<ChainError>() {
        Some(ChainError { path: at, cause: ChainCause::Header(header) }) if at == path => Some(header),
        Some(_) => None,
        None => error.downcast_ref::<HeaderError>(),
    };
    matches!(header, Some(HeaderError::Magic(_) | HeaderError::TooShort(_)))
}

/// Runs a future that does I/O.
fn block_on<T: 'static>(future: impl Future<Output = Result<T>> + 'static) -> Result<T> {
    let reactor = Reactor::new(RING_ENTRIES).context("cannot set up io_uring")?;
    reactor.block_on(future).context("io_uring fails")?
}

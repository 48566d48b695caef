//! What is left of overlays that were being made for a snapshot that did not come to be.
//!
//! A file is removed if it certainly is ours and holds nothing:
//!
//! | file | ours if |
//! |---|---|
//! | under the temporary name | it has it: the name has a random number, which was recorded before the file was made |
//! | under the overlay's name, empty | the temporary one is there as well, which was about to take its place |
//! | under the overlay's name, an image | its header has the recorded mark; then no record may name it, nobody may use it, no file beside it may lie on it, and it may have no data |
//!
//! An image that does not have the mark is somebody else's. Whatever else is found stays, and the log says where.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use snapfence_image_format::chain::{self, ChainCause};
use snapfence_image_format::error::LayerError;
use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{Header, HeaderError, OpenError, OpenOptions, Qcow2};
use snapfence_image_format::storage::{Access, CacheMode, Environment, FileIdentity, Location, Storage};

use super::Manager;
use super::host::Host;
use crate::catalogue::{CatalogueError, Making, Store};
use crate::snapshot::overlay::{self, first_data};
use crate::tasks::Tasks;

/// How long a start waits for the files to be gone. Whoever asks for the same snapshot again finds none in the way; a disk that hangs keeps nobody
/// waiting, and its files are removed when it answers.
const START_LIMIT: Duration = Duration::from_secs(2);

/// What is at a path.
enum Found<F> {
    Nothing,
    Empty(FileIdentity),
    Image(F, Box<Header>),
    /// Anything else.
    Other(FileIdentity),
}

/// Why it is unknown what is left: the next start looks again.
#[derive(Debug, thiserror::Error)]
enum Unclear {
    #[error("cannot be looked at or removed ({0})")]
    File(#[from] io::Error),
    #[error("cannot be opened ({0})")]
    Open(#[from] OpenError),
    #[error("cannot be locked ({0})")]
    Lock(#[from] ChainCause),
    #[error("cannot be read ({0})")]
    Read(#[from] LayerError),
    #[error("may be named by a record ({0})")]
    Catalogue(#[from] CatalogueError),
}

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// Removes what the last run has left.
    pub(super) async fn clear_all_remains(self: &Rc<Self>) -> Result<(), CatalogueError> {
        let tasks = Rc::<Tasks>::default();
        for making in self.catalogue.run(|store| store.making()).await? {
            let manager = Rc::clone(self);
            tasks.spawn(&self.environment, async move { manager.clear_remains(&making).await });
        }
        select(std::pin::pin!(tasks.all_ended()), std::pin::pin!(self.patience(START_LIMIT))).await;
        Ok(())
    }

    /// Removes what is left of overlays that nobody makes any more and that no intent has, and then the record of them.
    pub(crate) async fn clear_remains(&self, making: &Making) {
        let mut is_clear = true;
        for path in &making.overlays {
            if let Err(error) = self.clear_overlay(path, making.mark).await {
                tracing::warn!(
                    event = "overlay_left_behind", overlay = %path.display(), cause = %error,
                    "what a snapshot has left that did not come to be; the next start tries again to remove it"
                );
                is_clear = false;
            }
        }
        if !is_clear {
            return;
        }
        let mark = making.mark;
        if let Err(error) = self.catalogue.run(move |store| store.end_making(mark)).await {
            tracing::warn!(event = "catalogue_failed", cause = %error, "the next start looks once more for overlays that are gone");
        }
    }

    async fn clear_overlay(&self, path: &Path, mark: u64) -> Result<(), Unclear> {
        let temporary = overlay::temporary_path(path, mark);
        let was_begun = match self.look(&temporary).await? {
            Found::Nothing => false,
            Found::Image(_, header) if header.mark() != Some(mark) => {
                report(&temporary, "it is no image of ours");
                false
            }
            Found::Image(file, _) => self.remove_remains(&temporary, file.identity()).await.map(|()| true)?,
            Found::Empty(identity) | Found::Other(identity) => self.remove_remains(&temporary, identity).await.map(|()| true)?,
        };
        match self.look(path).await? {
            Found::Empty(identity) if was_begun => self.remove_remains(path, identity).await?,
            Found::Empty(_) => report(path, "it is empty, and somebody else may have made it"),
            Found::Image(file, header) if header.mark() == Some(mark) => {
                let identity = file.identity();
                match self.use_of(path, file, *header).await? {
                    Some(reason) => report(path, &reason),
                    None => self.remove_remains(path, identity).await?,
                }
            }
            // An image of somebody else's, or nothing of the kind.
            Found::Nothing | Found::Image(..) | Found::Other(_) => {}
        }
        match self.environment.flush_directory(path.parent().unwrap_or(Path::new("/"))).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn look(&self, path: &Path) -> io::Result<Found<E::File>> {
        let file = match self.environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Buffered).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(error),
        };
        let identity = file.identity();
        match Header::read(&file).await {
            Ok(header) => Ok(Found::Image(file, Box::new(header))),
            Err(HeaderError::TooShort(0)) => Ok(Found::Empty(identity)),
            Err(HeaderError::Read(source)) => Err(source),
            Err(_) => Ok(Found::Other(identity)),
        }
    }

    /// What an overlay with our mark is good for, if it is for anything.
    async fn use_of(&self, path: &Path, file: E::File, header: Header) -> Result<Option<String>, Unclear> {
        let owned = path.to_owned();
        if self.catalogue.run(move |store| Ok(named_by_records(store)?.contains(&owned))).await? {
            return Ok(Some("a device or a snapshot has it".to_owned()));
        }
        let identity = file.identity();
        if let Some(device) = self.device_with_layer(identity) {
            return Ok(Some(format!("it is a layer of device '{device}'")));
        }
        // As if to write: nobody else may have it open.
        match chain::lock_file(&file, true).await {
            Err(ChainCause::InUse { .. }) => return Ok(Some("another program uses it".to_owned())),
            other => other?,
        }
        if let Some(overlay) = self.any_overlay_beside(path, identity).await {
            return Ok(Some(format!("{overlay} has it as its backing file")));
        }
        let image = Layer::Qcow2(Qcow2::<E>::open_with_header(file, header, OpenOptions::reading()).await?);
        let data = first_data(&image, image.virtual_size()).await?;
        Ok(data.map(|at| format!("it has data at {at}")))
    }

    async fn remove_remains(&self, path: &Path, identity: FileIdentity) -> io::Result<()> {
        overlay::remove_file(&self.environment, &self.keeper, &Location::Trusted(path.to_owned()), identity).await?;
        tracing::info!(event = "overlay_removed", overlay = %path.display(), "it was begun for a snapshot that did not come to be");
        Ok(())
    }
}

fn report(path: &Path, reason: &str) {
    tracing::warn!(
        event = "overlay_left_behind", overlay = %path.display(), cause = reason,
        "it may have been made for a snapshot that did not come to be; it stays, and is not looked at again"
    );
}

fn named_by_records(store: &Store) -> Result<BTreeSet<PathBuf>, CatalogueError> {
    let mut named: BTreeSet<_> = store.devices()?.into_iter().flat_map(|device| device.layers).map(|layer| layer.path).collect();
    let members = store.snapshots()?.into_iter().flat_map(|snapshot| snapshot.devices);
    named.extend(members.flat_map(|member| [member.frozen.path, member.overlay.path]));
    Ok(named)
}

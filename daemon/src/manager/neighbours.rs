//! Overlays beside an image that no record knows.
//!
//! A device that is served for the first time under its name, or after its state directory was lost, may be given an image that lies beneath others:
//! writing to it would change them. The records do not tell, so the headers of the files in the same directory are asked, once. Overlays
//! that hold nothing are left out: they lose nothing, and somebody may have made them for the first snapshot. But one that names the image and
//! cannot be read further may hold anything, so it counts.

use std::path::Path;

use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{Header, HeaderError, OpenOptions, Qcow2};
use snapfence_image_format::storage::{Access, CacheMode, Environment, FileIdentity, Location};

use super::Manager;
use super::host::Host;
use crate::snapshot::overlay::first_data;

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// An overlay with data in the directory of `image` whose header names that file as its backing file. A file whose header cannot be read
    /// names nothing, and if it seems to have one, the log says so.
    pub(super) async fn overlay_beside(&self, image: &Path, identity: FileIdentity) -> Option<String> {
        self.find_overlay(image, identity, false).await
    }

    /// The same, whether or not it has data.
    pub(super) async fn any_overlay_beside(&self, image: &Path, identity: FileIdentity) -> Option<String> {
        self.find_overlay(image, identity, true).await
    }

    async fn find_overlay(&self, image: &Path, identity: FileIdentity, with_empty: bool) -> Option<String> {
        let directory = image.parent()?;
        let files = self.host.files_in(directory).await.ok()?;
        for path in files.iter().filter(|path| path.as_path() != image) {
            let Some((file, header)) = self.overlay_of(path, directory, (image, identity)).await else { continue };
            if with_empty || Self::may_have_data(file, header).await {
                return Some(path.display().to_string());
            }
        }
        None
    }

    /// The file at `path`, if its header names `image`.
    async fn overlay_of(&self, path: &Path, directory: &Path, (image, beneath): (&Path, FileIdentity)) -> Option<(E::File, Header)> {
        let opened = self.environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Buffered).await;
        let file = opened.ok()?;
        let header = match Header::read(&file).await {
            Ok(header) => header,
            Err(HeaderError::Magic(_) | HeaderError::TooShort(_)) => return None,
            Err(error) => {
                tracing::warn!(
                    event = "neighbour_unknown", file = %path.display(), image = %image.display(), cause = %error,
                    "it is unknown whether this file depends on the image"
                );
                return None;
            }
        };
        let backing = header.backing()?;
        // The plain text of the name, relative to the directory: whatever else the name may be, it is not this file.
        let backing = directory.join(&backing.name);
        let names_image = match self.identity(&backing).await {
            Ok(identity) => identity == beneath,
            Err(_) => backing == image,
        };
        names_image.then_some((file, header))
    }

    async fn may_have_data(file: E::File, header: Header) -> bool {
        let Ok(overlay) = Qcow2::<E>::open_with_header(file, header, OpenOptions::reading()).await else { return true };
        let overlay = Layer::Qcow2(overlay);
        !matches!(first_data(&overlay, overlay.virtual_size()).await, Ok(None))
    }
}

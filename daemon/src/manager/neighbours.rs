//! Overlays beside an image that no record knows.
//!
//! A device that is served for the first time under its name, or after its state directory was lost, may be given an image that lies beneath others:
//! writing to it would change them. The records do not tell, so the headers of the files in the same directory are asked, once. Overlays
//! that hold nothing are left out: they lose nothing, and somebody may have made them for the first snapshot.

use std::path::Path;

use snapfence_image_format::layer::Layer;
use snapfence_image_format::qcow2::{Header, OpenOptions, Qcow2};
use snapfence_image_format::storage::{Access, CacheMode, Environment, FileIdentity, Location};

use super::Manager;
use super::host::Host;
use crate::snapshot::overlay::first_data;

impl<E: Environment, H: Host<E>> Manager<E, H> {
    /// An overlay with data in the directory of `image` whose header names that file as its backing file. What cannot be read depends on nothing.
    pub(super) async fn overlay_beside(&self, image: &Path, identity: FileIdentity) -> Option<String> {
        let directory = image.parent()?;
        let files = self.host.files_in(directory).await.ok()?;
        for path in files.iter().filter(|path| path.as_path() != image) {
            if self.is_written_overlay(path, directory, identity).await == Some(true) {
                return Some(path.display().to_string());
            }
        }
        None
    }

    async fn is_written_overlay(&self, path: &Path, directory: &Path, beneath: FileIdentity) -> Option<bool> {
        let file = self.environment.open(&Location::Trusted(path.to_owned()), Access::Read, CacheMode::Buffered).await.ok()?;
        let header = Header::read(&file).await.ok()?;
        // The plain text of the name, relative to the directory: whatever else the name may be, it is not this file.
        let backing = directory.join(&header.backing()?.name);
        if self.identity(&backing).await.ok()? != beneath {
            return Some(false);
        }
        let overlay = Layer::<E>::Qcow2(Qcow2::open_with_header(file, header, OpenOptions::reading()).await.ok()?);
        Some(first_data(&overlay, overlay.virtual_size()).await.ok()?.is_some())
    }
}

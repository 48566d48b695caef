//! Where files may be that the control socket or an image names.
//!
//! - The operator's own words (command line, configuration file) lead anywhere, through symbolic links too; the directory that counts for what
//!   follows is that of the real file.
//! - Names inside images lead into the allowed directories and those of the device's own layers. Of layers that are block devices only the
//!   device itself is allowed: beside it are all the disks of the host.
//! - Overlays named on the control socket lie in the same.
//! - External data files are those that the operator names one by one.
//! - Images of devices added on the control socket lie in the allowed directories, if any are given; otherwise anywhere, for whoever may speak on
//!   that socket could as well start the daemon.
//! - Sockets of such devices lie in directories of their own, as soon as images or sockets are bound: those of the sockets that the operator has
//!   named, and those that he allows for sockets. Directories for images are none for sockets: VMMs are let into these.

use std::path::{Path, PathBuf};

use snapfence_image_format::chain::{AllowedDirectories, NameError};
use snapfence_image_format::storage::Location;

use super::PathKind;

/// What the operator has allowed.
#[derive(Clone, Debug, Default)]
pub struct Places {
    allowed: AllowedDirectories,
    strict: bool,
    data_files: Vec<PathBuf>,
    sockets: Vec<PathBuf>,
    strict_sockets: bool,
}

/// A socket where the control socket may put none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "socket {} lies outside the directories for sockets ({}); allow its directory with --socket-dir, or put the socket elsewhere",
    path.display(), display_list(allowed)
)]
pub struct SocketPlaceError {
    /// Where it was to be.
    path: PathBuf,
    /// Where it may be.
    allowed: Vec<PathBuf>,
}

fn display_list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Places {
    /// Exactly these directories: absolute, without symbolic links.
    pub fn new(allowed: impl IntoIterator<Item = PathBuf>) -> Self {
        let allowed = AllowedDirectories::new(allowed);
        Self { strict: allowed != AllowedDirectories::default(), allowed, ..Self::default() }
    }

    /// As before, and images may have these external data files: absolute, their directories without symbolic links.
    #[must_use]
    pub fn with_data_files(self, data_files: Vec<PathBuf>) -> Self {
        Self { data_files, ..self }
    }

    /// As before, and sockets lie in these directories: absolute, without symbolic links. With `strict` in no others, otherwise only if images are
    /// bound, too.
    #[must_use]
    pub fn with_socket_directories(self, sockets: Vec<PathBuf>, strict: bool) -> Self {
        Self { sockets, strict_sockets: strict || self.strict, ..self }
    }

    /// External data files that images may have.
    pub fn data_files(&self) -> &[PathBuf] {
        &self.data_files
    }

    /// Where names inside these images may lead.
    pub fn around<'a>(&self, layers: impl IntoIterator<Item = (&'a Path, PathKind)>) -> AllowedDirectories {
        layers.into_iter().fold(self.allowed.clone(), |allowed, (layer, kind)| match kind {
            PathKind::Neighbour => allowed.with_directory_of(layer),
            PathKind::Alone => allowed.with_file(layer, false),
            PathKind::AloneByLink => allowed.with_file(layer, true),
        })
    }

    /// Whether the control socket may name any path.
    pub fn are_open(&self) -> bool {
        !self.strict
    }

    /// Whether the control socket may put a new device's socket at this absolute path, whose directory has no symbolic links.
    ///
    /// # Errors
    /// If it may not.
    pub fn admit_socket(&self, path: &Path) -> Result<(), SocketPlaceError> {
        let inside = path.parent().is_some_and(|directory| self.sockets.iter().any(|allowed| directory.starts_with(allowed)));
        if inside || !self.strict_sockets {
            return Ok(());
        }
        Err(SocketPlaceError { path: path.to_owned(), allowed: self.sockets.clone() })
    }

    /// Where an image leads that the control socket names for a new device.
    ///
    /// # Errors
    /// If it is outside.
    pub fn admit(&self, path: &Path) -> Result<Location, NameError> {
        if self.strict { self.allowed.locate(path) } else { Ok(Location::Trusted(path.to_owned())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_socket_is_bound_by_what_is_allowed() {
        let open = Places::default();
        let strict = Places::new(["/images".into()]);
        let path = Path::new("/elsewhere/a");
        assert_eq!(open.admit(path), Ok(Location::Trusted(path.into())));
        assert!(strict.admit(path).is_err());
        assert!(strict.admit(Path::new("/images/a")).is_ok());
        assert_eq!(open.admit_socket(path), Ok(()));
        let sockets = || vec!["/run".into(), "/vm".into()];
        assert_eq!(Places::default().with_socket_directories(sockets(), false).admit_socket(path), Ok(()));
        for bound in [strict.clone().with_socket_directories(sockets(), false), open.clone().with_socket_directories(sockets(), true)] {
            for inside in ["/run/a", "/run/vms/a", "/vm/a"] {
                assert_eq!(bound.admit_socket(Path::new(inside)), Ok(()));
            }
            for outside in ["/running", "/images/a", "/elsewhere/a"] {
                let refused = bound.admit_socket(Path::new(outside)).expect_err(outside).to_string();
                assert!(refused.contains(&format!("socket {outside} ")) && refused.contains("(/run, /vm)"), "{refused}");
            }
        }
        for places in [open, strict] {
            let paths = [("/vm/top", PathKind::Neighbour), ("/base/b", PathKind::Neighbour), ("/dev/sdb", PathKind::Alone)];
            let around = places.around(paths.map(|(path, kind)| (Path::new(path), kind)));
            assert!(around.locate(Path::new("/dev/sdb")).is_ok());
            assert!(around.locate(Path::new("/dev/sda")).is_err());
            assert!(around.locate(Path::new("/vm/overlay")).is_ok());
            assert!(around.locate(Path::new("/base/sub/overlay")).is_ok());
            assert!(around.locate(path).is_err());
        }
    }
}

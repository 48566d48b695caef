//! Names of files inside images, and where they may lead.
//!
//! A name in a header is written by a stranger. It is taken as a plain local path, never as a URL, a protocol or JSON, and it must lie beneath a
//! directory that the operator allows, with no symbolic link on the way ([`Location::Beneath`]).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::storage::Location;

/// Longest name that a qcow2 header can hold (qemu's docs/interop/qcow2.rst).
pub const MAX_NAME_BYTES: usize = 1023;

/// The power to open files that other files name. Whoever opens a chain is handed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedDirectories {
    directories: Vec<PathBuf>,
    /// Single files, by the location that leads there.
    files: Vec<Location>,
}

/// Why a name from an image is not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// Longer than any header can say.
    #[error("the name is longer than {MAX_NAME_BYTES} bytes")]
    TooLong,
    /// No path has it.
    #[error("the name has a NUL byte in it")]
    Nul,
    /// QEMU would not take it as a path.
    #[error("`{0}` is not a plain path; URLs, protocols and JSON are never followed (for a file of that name write `./{0}`)")]
    NotPlain(String),
    /// It goes up past the root.
    #[error("`{0}` leads out of the file system")]
    AboveRoot(String),
    /// It leads where nothing was allowed.
    #[error("{path} lies outside the allowed directories ({allowed}); allow its directory with --allow-dir or move the file")]
    Outside {
        /// Where it leads.
        path: PathBuf,
        /// What is allowed.
        allowed: String,
    },
}

impl AllowedDirectories {
    /// Files beneath any of these absolute directories. They should be free of symbolic links themselves: comparisons are by name.
    pub fn new(directories: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut allowed = Self::default();
        for directory in directories {
            allowed.allow(directory);
        }
        allowed
    }

    /// One directory more.
    pub fn allow(&mut self, directory: PathBuf) {
        if !self.directories.contains(&directory) {
            self.directories.push(directory);
        }
    }

    /// The same and the directory of `image`.
    #[must_use]
    pub fn with_directory_of(&self, image: &Path) -> Self {
        let mut more = self.clone();
        if let Some(directory) = image.parent() {
            more.allow(directory.to_owned());
        }
        more
    }

    /// The same and the file at this absolute path, but not its neighbours. If its name is a symbolic link, it is followed: only for links
    /// that nobody can change whose word does not count.
    #[must_use]
    pub fn with_file(mut self, path: &Path, is_link: bool) -> Self {
        let location = match (path.parent(), path.file_name()) {
            (Some(directory), Some(name)) if !is_link => Location::Beneath { directory: directory.to_owned(), name: name.into() },
            _ => Location::Trusted(path.to_owned()),
        };
        if !self.files.contains(&location) {
            self.files.push(location);
        }
        self
    }

    /// Where `name`, found in the image at the absolute path `image`, leads.
    ///
    /// # Errors
    /// If it is no plain path or leads outside.
    pub fn resolve(&self, image: &Path, name: &[u8]) -> Result<Location, NameError> {
        let name = plain(name)?;
        let directory = image.parent().unwrap_or(Path::new("/"));
        self.locate(&directory.join(name))
    }

    /// Where an absolute path that somebody else than the operator gave leads.
    ///
    /// # Errors
    /// If it leads outside.
    pub fn locate(&self, path: &Path) -> Result<Location, NameError> {
        let path = normalise(path)?;
        let inside = self.directories.iter().find_map(|directory| {
            let name = path.strip_prefix(directory).ok()?;
            (name.components().next().is_some()).then(|| Location::Beneath { directory: directory.clone(), name: name.to_owned() })
        });
        let inside = inside.or_else(|| self.files.iter().find(|file| file.path() == path).cloned());
        inside.ok_or_else(|| NameError::Outside { path: path.clone(), allowed: self.describe() })
    }

    fn describe(&self) -> String {
        let files = self.files.iter().map(|file| format!("the file {}", file.path().display()));
        let names: Vec<_> = self.directories.iter().map(|directory| directory.display().to_string()).chain(files).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }
}

/// A name as a path, if QEMU would take it as one as well.
fn plain(name: &[u8]) -> Result<&Path, NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong);
    }
    if name.contains(&0) {
        return Err(NameError::Nul);
    }
    let first_part = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    if first_part.contains(&b':') {
        return Err(NameError::NotPlain(String::from_utf8_lossy(name).into_owned()));
    }
    Ok(Path::new(OsStr::from_bytes(name)))
}

/// The path without `.` and `..`. Those go by name, which is right because no symbolic link is followed when it is opened.
fn normalise(path: &Path) -> Result<PathBuf, NameError> {
    let mut normal = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                if !normal.pop() {
                    return Err(NameError::AboveRoot(path.display().to_string()));
                }
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beneath(directory: &str, name: &str) -> Result<Location, NameError> {
        Ok(Location::Beneath { directory: directory.into(), name: name.into() })
    }

    #[test]
    fn names_lead_beneath_allowed_directories_or_nowhere() {
        let allowed = AllowedDirectories::new(["/images".into(), "/vm/one".into()]);
        let image = Path::new("/vm/one/top.qcow2");
        let table = [
            ("base.raw", beneath("/vm/one", "base.raw")),
            ("./base.raw", beneath("/vm/one", "base.raw")),
            ("sub/../base.raw", beneath("/vm/one", "base.raw")),
            ("a/b:c", beneath("/vm/one", "a/b:c")),
            ("./nbd:x", beneath("/vm/one", "nbd:x")),
            ("/images/x/base", beneath("/images", "x/base")),
            ("../../images/base", beneath("/images", "base")),
        ];
        for (name, expected) in table {
            assert_eq!(allowed.resolve(image, name.as_bytes()), expected, "{name}");
        }
        let outside =
            ["/etc/shadow", "../two/base", "/images", "/images/", "/imagesx/a", "/images/../etc/passwd", "..", "/", "/vm/one/../a"];
        for name in outside {
            assert!(matches!(allowed.resolve(image, name.as_bytes()), Err(NameError::Outside { .. })), "{name}");
        }
        assert!(matches!(allowed.resolve(image, b"../../../../x"), Err(NameError::AboveRoot(_))));
    }

    #[test]
    fn only_plain_paths_are_names() {
        let allowed = AllowedDirectories::new(["/".into()]);
        let image = Path::new("/a/top");
        for name in ["nbd://host/x", "json:{\"driver\":\"raw\"}", "fat:rw:/tmp", "file:base", "http://x", ":", "a:b"] {
            assert_eq!(allowed.resolve(image, name.as_bytes()), Err(NameError::NotPlain(name.into())));
        }
        assert_eq!(allowed.resolve(image, b""), Err(NameError::Empty));
        assert_eq!(allowed.resolve(image, b"a\0b"), Err(NameError::Nul));
        assert_eq!(allowed.resolve(image, &[b'a'; MAX_NAME_BYTES + 1]), Err(NameError::TooLong));
        let outside = AllowedDirectories::default().resolve(image, b"b").expect_err("nothing is allowed").to_string();
        assert_eq!(outside, "/a/b lies outside the allowed directories (none); allow its directory with --allow-dir or move the file");
    }

    #[test]
    fn the_directory_of_an_image_can_be_allowed() {
        let allowed = AllowedDirectories::default().with_directory_of(Path::new("/a/top"));
        assert_eq!(allowed.resolve(Path::new("/a/top"), b"base"), beneath("/a", "base"));
        assert_eq!(allowed.with_directory_of(Path::new("/a/other")), allowed);
    }

    #[test]
    fn a_file_can_be_allowed_without_its_neighbours() {
        let allowed = AllowedDirectories::default().with_file(Path::new("/dev/sdb"), false).with_file(Path::new("/dev/vg/lv"), true);
        let image = Path::new("/dev/sdb");
        assert_eq!(allowed.resolve(image, b"sdb"), beneath("/dev", "sdb"));
        assert_eq!(allowed.resolve(image, b"vg/lv"), Ok(Location::Trusted("/dev/vg/lv".into())));
        for name in ["sda", "sdb1", "sdb/x", "vg/other", ".."] {
            assert!(matches!(allowed.resolve(image, name.as_bytes()), Err(NameError::Outside { .. })), "{name}");
        }
    }
}

//! Names of files that are not the system's: directories exist as soon as something is in them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::ops::Bound;
use std::path::{Component, Path, PathBuf};

use super::Location;

/// How many symbolic links Linux follows in one path.
const MAX_LINKS: usize = 40;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry<F> {
    /// A file.
    File(F),
    /// A symbolic link.
    Link(PathBuf),
}

/// Absolute paths without `.` and `..`, and what they stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names<F> {
    entries: BTreeMap<PathBuf, Entry<F>>,
}

impl<F> Default for Names<F> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
    }
}

impl<F: Clone> Names<F> {
    /// The path that `at` really means. The last part need not exist.
    pub(super) fn resolve(&self, at: &Location) -> io::Result<PathBuf> {
        match at {
            Location::Trusted(path) => self.walk(PathBuf::from("/"), path, true, true),
            Location::Beneath { directory, name } => {
                let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                if !name.components().all(inside) {
                    return Err(io::Error::from_raw_os_error(libc::EXDEV));
                }
                let start = self.walk(PathBuf::from("/"), directory, true, true)?;
                self.walk(start, name, false, true)
            }
        }
    }

    /// As for a trusted path, but a link in the last place is itself meant.
    pub(super) fn resolve_name(&self, path: &Path) -> io::Result<PathBuf> {
        self.walk(PathBuf::from("/"), path, true, false)
    }

    /// The file of a resolved path.
    pub(super) fn file(&self, path: &Path) -> io::Result<F> {
        match self.entries.get(path) {
            Some(Entry::File(file)) => Ok(file.clone()),
            Some(Entry::Link(_)) => Err(io::Error::from_raw_os_error(libc::ELOOP)),
            None if self.is_directory(path) => Err(io::ErrorKind::InvalidInput.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Gives a new entry a resolved name.
    pub(super) fn insert_new(&mut self, path: PathBuf, entry: Entry<F>) -> io::Result<()> {
        if self.entries.contains_key(&path) || self.is_directory(&path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    /// Renames, replacing what had the name. Resolved paths.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        if self.is_directory(from) || self.is_directory(to) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let entry = self.entries.remove(from).ok_or(io::ErrorKind::NotFound)?;
        self.entries.insert(to.to_owned(), entry);
        Ok(())
    }

    /// Removes a resolved name.
    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        if self.is_directory(path) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.entries.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// What a resolved name stands for.
    pub(super) fn get(&self, path: &Path) -> Option<&Entry<F>> {
        self.entries.get(path)
    }

    /// Sets or takes away what a resolved name stands for, without asking.
    pub(super) fn set(&mut self, path: &Path, entry: Option<Entry<F>>) {
        match entry {
            Some(entry) => self.entries.insert(path.to_owned(), entry),
            None => self.entries.remove(path),
        };
    }

    /// All names with what they stand for, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&PathBuf, &Entry<F>)> {
        self.entries.iter()
    }

    fn is_directory(&self, path: &Path) -> bool {
        path == Path::new("/")
            || self
                .entries
                .range::<Path, _>((Bound::Excluded(path), Bound::Unbounded))
                .next()
                .is_some_and(|(name, _)| name.starts_with(path))
    }

    /// Follows `path` from the directory `from` on.
    fn walk(&self, from: PathBuf, path: &Path, links: bool, last_link: bool) -> io::Result<PathBuf> {
        let mut place = from;
        let mut todo: Vec<OsString> = parts(path);
        let mut followed = 0;
        if path.is_absolute() {
            place = PathBuf::from("/");
        }
        while let Some(part) = todo.pop() {
            if part == ".." {
                place.pop();
                continue;
            }
            place.push(&part);
            match self.entries.get(&place) {
                Some(Entry::Link(_)) if todo.is_empty() && !last_link => {}
                Some(Entry::Link(target)) => {
                    followed += 1;
                    if !links || followed > MAX_LINKS {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    place.pop();
                    if target.is_absolute() {
                        place = PathBuf::from("/");
                    }
                    todo.extend(parts(target));
                }
                Some(Entry::File(_)) if !todo.is_empty() => return Err(io::ErrorKind::NotADirectory.into()),
                Some(Entry::File(_)) | None => {}
            }
        }
        Ok(place)
    }
}

/// The parts of a path, last first.
fn parts(path: &Path) -> Vec<OsString> {
    let meant = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().rev().filter_map(meant).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names<u32> {
        let mut names = Names::default();
        names.set(Path::new("/images/base"), Some(Entry::File(1)));
        names.set(Path::new("/secret"), Some(Entry::File(2)));
        names.set(Path::new("/images/out"), Some(Entry::Link("../secret".into())));
        names.set(Path::new("/images/round"), Some(Entry::Link("round".into())));
        names.set(Path::new("/other"), Some(Entry::Link("/images".into())));
        names
    }

    fn beneath(name: &str) -> Location {
        Location::Beneath { directory: "/images".into(), name: name.into() }
    }

    #[test]
    fn trusted_names_follow_links() {
        let names = names();
        for (path, meant) in [("/images/out", "/secret"), ("/other/./base", "/images/base"), ("images/../secret", "/secret")] {
            assert_eq!(names.resolve(&Location::Trusted(path.into())).unwrap(), Path::new(meant), "{path}");
        }
        let error = names.resolve(&Location::Trusted("/images/round".into())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        assert_eq!(names.resolve_name(Path::new("/other/out")).unwrap(), Path::new("/images/out"));
    }

    #[test]
    fn names_beneath_a_directory_stay_there_and_pass_no_link() {
        let names = names();
        assert_eq!(names.resolve(&beneath("./base")).unwrap(), Path::new("/images/base"));
        for (name, error) in [("out", libc::ELOOP), ("../secret", libc::EXDEV), ("/secret", libc::EXDEV), ("x/../base", libc::EXDEV)] {
            assert_eq!(names.resolve(&beneath(name)).unwrap_err().raw_os_error(), Some(error), "{name}");
        }
        assert_eq!(names.resolve(&beneath("base/more")).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn a_directory_is_no_file_and_takes_no_files_name() {
        let mut names = names();
        assert_eq!(names.file(Path::new("/images")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(names.insert_new("/images".into(), Entry::File(3)).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names.remove(Path::new("/images")).unwrap_err().kind(), io::ErrorKind::IsADirectory);
        assert_eq!(names.file(Path::new("/image")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

//! What the simulated medium holds: what readers see, what is durable, and the changes in between.
//!
//! Every change (bytes, a hole, space, a length, a name) waits in the volatile cache until a flush covers it. At a crash each piece of each
//! waiting change is there or is not, independently of all others: bytes and holes in pieces of one sector, everything else whole.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::names::{Entry, Names};
use super::super::sparse::SparseBytes;

/// What is written atomically.
pub(super) const SECTOR: u64 = 512;

/// Longer holes are torn into this many pieces, because nobody can look at the subsets of a million sectors.
const HOLE_PIECES: u64 = 128;

/// A change of one file.
#[derive(Clone, Debug)]
pub(super) enum FileChange {
    /// Bytes from a position on. Growing the file is a change of its own.
    Bytes {
        at: u64,
        bytes: Arc<[u8]>,
    },
    /// Bytes that become zero and lose their space.
    Hole {
        at: u64,
        len: u64,
    },
    /// Space for bytes.
    Space {
        at: u64,
        len: u64,
    },
    /// The file gets at least this length.
    Grow(u64),
    Length(u64),
}

/// A change of names.
#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Create { path: PathBuf, inode: u64 },
    Remove { path: PathBuf, entry: Entry<u64> },
    Rename { from: PathBuf, to: PathBuf, entry: Entry<u64> },
}

/// A change that no flush has covered, with the number that orders it among all changes of the disk.
#[derive(Clone, Debug)]
struct Waiting<C> {
    number: u64,
    change: C,
}

#[derive(Clone, Debug, Default)]
struct File {
    visible: SparseBytes,
    durable: SparseBytes,
    waiting: Vec<Waiting<FileChange>>,
}

/// The whole medium. Cloning is cheap: pages are shared.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    files: BTreeMap<u64, File>,
    names: Names<u64>,
    durable_names: Names<u64>,
    waiting_names: Vec<Waiting<NameChange>>,
    next_inode: u64,
    next_change: u64,
}

/// Says of each piece, by its number, whether it survives.
pub(super) type Survives<'a> = &'a mut dyn FnMut(usize) -> bool;

impl FileChange {
    /// Into how many pieces a crash may tear it.
    pub(super) fn pieces(&self) -> usize {
        match self {
            Self::Bytes { at, bytes } => {
                let end = at + bytes.len() as u64;
                if bytes.is_empty() { 0 } else { (end.div_ceil(SECTOR) - at / SECTOR) as usize }
            }
            Self::Hole { at, len } => (at + len - at / SECTOR * SECTOR).div_ceil(hole_piece(*at, *len)) as usize,
            Self::Space { .. } | Self::Grow(_) | Self::Length(_) => 1,
        }
    }

    /// Makes those pieces of the change happen that survive. `len` is kept beside the bytes, which may be there without the length.
    fn apply(&self, content: &mut SparseBytes, len: &mut u64, survives: Survives<'_>) {
        match self {
            Self::Bytes { at, bytes } => {
                for piece in 0..self.pieces() {
                    let start = ((at / SECTOR + piece as u64) * SECTOR).max(*at);
                    let end = ((at / SECTOR + piece as u64 + 1) * SECTOR).min(at + bytes.len() as u64);
                    if survives(piece) {
                        let bytes = &bytes[(start - at) as usize..(end - at) as usize];
                        content.write_bytes(start, bytes).expect("a position that was admitted");
                    }
                }
            }
            Self::Hole { at, len } => {
                let (first, unit) = (at / SECTOR * SECTOR, hole_piece(*at, *len));
                let mut run: Option<Range<u64>> = None;
                for piece in 0..=self.pieces() {
                    let start = (first + piece as u64 * unit).clamp(*at, at + len);
                    let end = (first + (piece as u64 + 1) * unit).min(at + len);
                    let kept = start < end && survives(piece);
                    // Neighbours go together: only whole pages lose their space.
                    match &mut run {
                        Some(run) if kept => run.end = end,
                        None if kept => run = Some(start..end),
                        _ => {
                            if let Some(run) = run.take() {
                                content.punch(run.start, run.end - run.start).expect("a position that was admitted");
                            }
                        }
                    }
                }
            }
            Self::Space { at, len } => {
                if survives(0) {
                    content.allocate(*at, *len).expect("a position that was admitted");
                }
            }
            Self::Grow(to) => {
                if survives(0) {
                    *len = (*len).max(*to);
                }
            }
            Self::Length(to) => {
                if survives(0) {
                    if *to < *len {
                        content.set_len(*to).expect("a length that was admitted");
                    }
                    *len = *to;
                }
            }
        }
    }
}

/// The length of one piece of a hole.
fn hole_piece(at: u64, len: u64) -> u64 {
    let aligned = at + len - at / SECTOR * SECTOR;
    SECTOR.max(aligned.div_ceil(HOLE_PIECES).next_multiple_of(SECTOR))
}

impl NameChange {
    fn apply(&self, names: &mut Names<u64>) {
        match self {
            Self::Create { path, inode } => names.set(path, Some(Entry::File(*inode))),
            Self::Remove { path, entry } => remove_entry(names, path, entry),
            Self::Rename { from, to, entry } => {
                remove_entry(names, from, entry);
                names.set(to, Some(entry.clone()));
            }
        }
    }

    /// Whether flushing `directory` covers it.
    fn is_in(&self, directory: &Path) -> bool {
        let path = match self {
            Self::Create { path, .. } | Self::Remove { path, .. } => path,
            Self::Rename { to, .. } => to,
        };
        path.parent() == Some(directory)
    }
}

/// Takes a name away from what had it; something newer of that name, durable already, stays.
fn remove_entry(names: &mut Names<u64>, path: &Path, entry: &Entry<u64>) {
    if names.get(path) == Some(entry) {
        names.set(path, None);
    }
}

impl Disk {
    /// The names as programs see them.
    pub(super) fn names(&self) -> &Names<u64> {
        &self.names
    }

    /// The number that the next change will have: a flush that begins now covers all below.
    pub(super) fn next_change(&self) -> u64 {
        self.next_change
    }

    /// The bytes as readers see them.
    pub(super) fn visible(&self, inode: u64) -> &SparseBytes {
        &self.files.get(&inode).expect("files stay for ever").visible
    }

    /// Bytes as only readers see them: a write of which a part can be seen before it has ended.
    pub(super) fn show(&mut self, inode: u64, at: u64, bytes: &[u8]) {
        self.file(inode).visible.write_bytes(at, bytes).expect("a position that was admitted");
    }

    /// A durable file. Replaces what has the name.
    pub(super) fn put(&mut self, path: &Path, bytes: SparseBytes) {
        let inode = self.new_inode();
        self.files.insert(inode, File { visible: bytes.clone(), durable: bytes, waiting: Vec::new() });
        self.names.set(path, Some(Entry::File(inode)));
        self.durable_names.set(path, Some(Entry::File(inode)));
    }

    /// A durable symbolic link.
    pub(super) fn put_link(&mut self, path: &Path, target: PathBuf) -> io::Result<()> {
        self.names.insert_new(path.to_owned(), Entry::Link(target.clone()))?;
        self.durable_names.set(path, Some(Entry::Link(target)));
        Ok(())
    }

    /// A new file, whose name is not durable yet.
    pub(super) fn create(&mut self, path: PathBuf) -> io::Result<u64> {
        let inode = self.next_inode;
        self.names.insert_new(path.clone(), Entry::File(inode))?;
        self.new_inode();
        self.files.insert(inode, File::default());
        self.change_names(NameChange::Create { path, inode });
        Ok(inode)
    }

    /// Renames; not durable yet.
    pub(super) fn rename(&mut self, from: PathBuf, to: PathBuf) -> io::Result<()> {
        let entry = self.names.get(&from).cloned().ok_or(io::ErrorKind::NotFound)?;
        self.names.rename(&from, &to)?;
        self.change_names(NameChange::Rename { from, to, entry });
        Ok(())
    }

    /// Removes a name; not durable yet.
    pub(super) fn remove(&mut self, path: PathBuf) -> io::Result<()> {
        let entry = self.names.get(&path).cloned();
        self.names.remove(&path)?;
        if let Some(entry) = entry {
            self.change_names(NameChange::Remove { path, entry });
        }
        Ok(())
    }

    /// Makes a change that readers see from now on, not durable yet. Positions have been checked.
    pub(super) fn change(&mut self, inode: u64, change: FileChange) {
        let number = self.new_change();
        let file = self.file(inode);
        let mut len = file.visible.len();
        change.apply(&mut file.visible, &mut len, &mut |_| true);
        // `Bytes` alone grow the content; their `Grow` follows at once.
        let len = len.max(file.visible.len());
        file.visible.set_len(len).expect("a length that was admitted");
        file.waiting.push(Waiting { number, change });
    }

    /// Makes all changes of a file below `bound` durable.
    pub(super) fn flush(&mut self, inode: u64, bound: u64) {
        let file = self.file(inode);
        let covered = file.waiting.iter().take_while(|waiting| waiting.number < bound).count();
        let mut len = file.durable.len();
        for waiting in file.waiting.drain(..covered) {
            waiting.change.apply(&mut file.durable, &mut len, &mut |_| true);
        }
        file.durable.set_len(len).expect("a length that was admitted");
    }

    /// What a flush that fails does: every waiting change below `bound` leaves the cache. Pieces that survive are durable; the others never
    /// will be, though readers still see them.
    pub(super) fn fail_flush(&mut self, inode: u64, bound: u64, mut survives: impl FnMut() -> bool) {
        let file = self.file(inode);
        let covered = file.waiting.iter().take_while(|waiting| waiting.number < bound).count();
        let mut len = file.durable.len();
        for waiting in file.waiting.drain(..covered) {
            waiting.change.apply(&mut file.durable, &mut len, &mut |_| survives());
        }
        file.durable.set_len(len).expect("a length that was admitted");
    }

    /// Makes all changes of names in `directory` below `bound` durable.
    pub(super) fn flush_directory(&mut self, directory: &Path, bound: u64) {
        let (covered, waiting) =
            self.waiting_names.drain(..).partition::<Vec<_>, _>(|waiting| waiting.number < bound && waiting.change.is_in(directory));
        self.waiting_names = waiting;
        for waiting in covered {
            waiting.change.apply(&mut self.durable_names);
        }
    }

    /// Space that files with a name occupy.
    pub(super) fn used_space(&self) -> u64 {
        self.names
            .iter()
            .filter_map(|(_, entry)| if let Entry::File(inode) = entry { Some(self.visible(*inode).allocated()) } else { None })
            .sum()
    }

    /// How many pieces each waiting change has, in the order in which [`crashed`](Self::crashed) asks for them.
    pub(super) fn waiting_pieces(&self) -> Vec<usize> {
        let of_files = self.files.values().flat_map(|file| file.waiting.iter()).map(|waiting| waiting.change.pieces());
        of_files.chain(self.waiting_names.iter().map(|_| 1)).collect()
    }

    /// The disk after a crash, on which `survives(change, piece)` says what is left. Everything on it is durable.
    pub(super) fn crashed(&self, mut survives: impl FnMut(usize, usize) -> bool) -> Self {
        let mut number = 0;
        let mut files = BTreeMap::new();
        for (inode, file) in &self.files {
            let mut content = file.durable.clone();
            let mut len = content.len();
            for waiting in &file.waiting {
                waiting.change.apply(&mut content, &mut len, &mut |piece| survives(number, piece));
                number += 1;
            }
            content.set_len(len).expect("a length that was admitted");
            files.insert(*inode, File { visible: content.clone(), durable: content, waiting: Vec::new() });
        }
        let mut names = self.durable_names.clone();
        for waiting in &self.waiting_names {
            if survives(number, 0) {
                waiting.change.apply(&mut names);
            }
            number += 1;
        }
        let named: Vec<u64> =
            names.iter().filter_map(|(_, entry)| if let Entry::File(inode) = entry { Some(*inode) } else { None }).collect();
        files.retain(|inode, _| named.contains(inode));
        Self {
            files,
            durable_names: names.clone(),
            names,
            waiting_names: Vec::new(),
            next_inode: self.next_inode,
            next_change: self.next_change,
        }
    }

    /// The bytes of a file that are durable.
    pub(super) fn durable(&self, inode: u64) -> &SparseBytes {
        &self.files.get(&inode).expect("files stay for ever").durable
    }

    /// The changes of a file that no flush has covered, oldest first, with their numbers.
    pub(super) fn waiting(&self, inode: u64) -> impl Iterator<Item = (u64, &FileChange)> {
        self.files.get(&inode).expect("files stay for ever").waiting.iter().map(|waiting| (waiting.number, &waiting.change))
    }

    /// All that may stand in the directories after a crash.
    pub(super) fn possible_names(&self) -> Vec<Names<u64>> {
        let mut possible = vec![self.durable_names.clone()];
        for waiting in &self.waiting_names {
            for mut names in possible.clone() {
                waiting.change.apply(&mut names);
                if !possible.contains(&names) {
                    possible.push(names);
                }
            }
        }
        possible
    }

    /// A disk with these names and files, all of it durable.
    pub(super) fn with(&self, names: Names<u64>, files: impl Iterator<Item = (u64, SparseBytes)>) -> Self {
        let durable = |bytes: SparseBytes| File { visible: bytes.clone(), durable: bytes, waiting: Vec::new() };
        Self {
            files: files.map(|(inode, bytes)| (inode, durable(bytes))).collect(),
            durable_names: names.clone(),
            names,
            waiting_names: Vec::new(),
            next_inode: self.next_inode,
            next_change: self.next_change,
        }
    }

    fn file(&mut self, inode: u64) -> &mut File {
        self.files.get_mut(&inode).expect("files stay for ever")
    }

    fn change_names(&mut self, change: NameChange) {
        let number = self.new_change();
        self.waiting_names.push(Waiting { number, change });
    }

    fn new_inode(&mut self) -> u64 {
        self.next_inode += 1;
        self.next_inode - 1
    }

    fn new_change(&mut self) -> u64 {
        self.next_change += 1;
        self.next_change - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "/file";

    fn disk_with(bytes: &[u8]) -> (Disk, u64) {
        let mut disk = Disk::default();
        let mut sparse = SparseBytes::default();
        sparse.write_bytes(0, bytes).unwrap();
        disk.put(Path::new(FILE), sparse);
        let inode = disk.names().file(Path::new(FILE)).unwrap();
        (disk, inode)
    }

    fn write(disk: &mut Disk, inode: u64, at: u64, bytes: &[u8]) {
        disk.change(inode, FileChange::Bytes { at, bytes: bytes.into() });
        disk.change(inode, FileChange::Grow(at + bytes.len() as u64));
    }

    fn content(disk: &Disk) -> Vec<u8> {
        let bytes = disk.visible(disk.names().file(Path::new(FILE)).unwrap());
        bytes.to_vec(0..bytes.len())
    }

    #[test]
    fn unflushed_sectors_are_lost_one_by_one() {
        let (mut disk, inode) = disk_with(&[1; 1024]);
        write(&mut disk, inode, 256, &[2; 512]);
        assert_eq!(disk.waiting_pieces(), [2, 1]);
        let crashed = content(&disk.crashed(|_, piece| piece == 1));
        assert_eq!((crashed[256], crashed[511], crashed[512], crashed[767], crashed[768]), (1, 1, 2, 2, 1));
        assert_eq!(content(&disk.crashed(|_, _| false)), [1; 1024]);
        let bound = disk.next_change();
        write(&mut disk, inode, 0, &[3; 512]);
        disk.flush(inode, bound);
        let crashed = content(&disk.crashed(|_, _| false));
        assert_eq!((crashed[0], crashed[256], crashed[767], crashed[768]), (1, 2, 2, 1));
    }

    #[test]
    fn length_and_bytes_survive_apart() {
        let (mut disk, inode) = disk_with(&[]);
        write(&mut disk, inode, 0, &[2; 512]);
        assert_eq!(content(&disk), [2; 512]);
        assert_eq!(content(&disk.crashed(|change, _| change == 0)), []);
        assert_eq!(content(&disk.crashed(|change, _| change == 1)), [0; 512]);
        disk.change(inode, FileChange::Length(100));
        disk.change(inode, FileChange::Length(512));
        assert_eq!(content(&disk)[99..101], [2, 0]);
        assert_eq!(content(&disk.crashed(|change, _| change < 2)), [2; 512]);
    }

    #[test]
    fn names_survive_apart_until_their_directory_is_flushed() {
        let (mut disk, _) = disk_with(&[]);
        disk.create("/d/new".into()).unwrap();
        disk.rename("/d/new".into(), FILE.into()).unwrap();
        let names = |disk: &Disk| disk.names().iter().map(|(name, _)| name.display().to_string()).collect::<Vec<_>>();
        assert_eq!(names(&disk), ["/file"]);
        assert_eq!(names(&disk.crashed(|change, _| change == 0)), ["/d/new", "/file"]);
        disk.flush_directory(Path::new("/d"), disk.next_change());
        assert_eq!(names(&disk.crashed(|_, _| false)), ["/d/new", "/file"]);
        assert_eq!(names(&disk.crashed(|_, _| true)), ["/file"]);
    }

    #[test]
    fn a_failed_flush_leaves_nothing_for_the_next_one() {
        let (mut disk, inode) = disk_with(&[1; 512]);
        write(&mut disk, inode, 0, &[2; 512]);
        disk.fail_flush(inode, disk.next_change(), || false);
        disk.flush(inode, disk.next_change());
        assert_eq!(content(&disk), [2; 512]);
        assert_eq!(content(&disk.crashed(|_, _| true)), [1; 512]);
    }

    #[test]
    fn large_holes_are_torn_into_few_pieces() {
        let hole = FileChange::Hole { at: 100, len: 1 << 40 };
        assert!(hole.pieces() <= HOLE_PIECES as usize);
        let small = FileChange::Hole { at: 100, len: 1024 };
        assert_eq!(small.pieces(), 3);
        let mut content = SparseBytes::default();
        content.write_bytes(0, &[1; 2048]).unwrap();
        small.apply(&mut content, &mut 2048, &mut |piece| piece != 1);
        let bytes = content.to_vec(0..2048);
        assert_eq!((bytes[99], bytes[100], bytes[511], bytes[512], bytes[1024], bytes[1123], bytes[1124]), (1, 0, 0, 1, 0, 0, 1));
    }
}

//! Memory that outlives the daemon, as files that are mapped: what a killed process has written there is in the page cache, and the next one maps
//! the same pages.
//!
//! The files lie in a directory that is named after the present boot of the machine. Those of other boots mean nothing and are removed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt, FileExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::LocalBoxFuture;
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use rustix::mm::Advice;
use snapfence_image_format::runtime::offload;
use snapfence_image_format::storage::FileIdentity;
use snapfence_image_format::storage::kept::{Failure, Incarnation, KeptMemory, MemoryKeeper};
use vm_memory::{FileOffset, MmapRegion};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The file that says of which files a flush has failed.
const FAILURES: &str = "failures";

/// Keeps memory in a directory.
#[derive(Debug)]
pub struct FileKeeper {
    directory: PathBuf,
    failures: Failures,
    /// The process ends: tasks that are dropped now say nothing about files.
    ended: AtomicBool,
}

/// Files of which a flush has failed: as many as there are entries, and if they are more, all files.
///
/// ```text
/// entry:  what is known, device, inode, time of birth
/// ```
///
/// An entry counts once its first word is stored after the others; the process may end between any two stores. That word has the bits `IN_USE`, `TOLD`
/// and `REWRITTEN`.
#[derive(Debug)]
struct Failures {
    memory: Arc<dyn KeptMemory>,
    /// There is an entry. Mostly there is none, and then nothing of the table is looked at, which would bring it into memory.
    has_any: AtomicBool,
    /// Whoever adds an entry.
    adding: Mutex<()>,
}

const IN_USE: u64 = 1;
const TOLD: u64 = 2;
const REWRITTEN: u64 = 4;
const ENTRY_WORDS: usize = 4;
/// As many as the deepest chain has files.
const MOST_FAILURES: usize = 65_536;

impl Failures {
    fn entries(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.memory.words().chunks_exact(ENTRY_WORDS)
    }

    fn in_use(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.entries().take_while(|entry| entry[0].load(Ordering::Acquire) != 0)
    }

    fn is_full(&self) -> bool {
        self.entries().last().is_some_and(|entry| entry[0].load(Ordering::Acquire) != 0)
    }

    fn find(&self, file: Incarnation) -> Option<&AtomicU64> {
        let is_it = |entry: &&[AtomicU64]| {
            let [device, inode, born] = [1, 2, 3].map(|word: usize| entry[word].load(Ordering::Relaxed));
            file.may_be(Incarnation { file: FileIdentity { device, inode }, born })
        };
        self.in_use().find(is_it).map(|entry| &entry[0])
    }

    fn known(&self, file: Incarnation) -> Option<Failure> {
        if !self.has_any.load(Ordering::Acquire) {
            return None;
        }
        let known = self.find(file).map(|known| known.load(Ordering::Relaxed));
        let known = known.or_else(|| self.is_full().then_some(IN_USE))?;
        Some(Failure { told: known & TOLD != 0, rewritten: known & REWRITTEN != 0 })
    }

    fn note(&self, file: Incarnation) {
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.find(file) {
            known.store(IN_USE, Ordering::Release);
            return;
        }
        let Some(free) = self.entries().find(|entry| entry[0].load(Ordering::Relaxed) == 0) else { return };
        for (place, word) in free[1..].iter().zip([file.file.device, file.file.inode, file.born]) {
            place.store(word, Ordering::Relaxed);
        }
        free[0].store(IN_USE, Ordering::Release);
        self.has_any.store(true, Ordering::Release);
    }

    fn add(&self, file: Incarnation, news: Failure) {
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.find(file) {
            let bits = if news.told { TOLD } else { 0 } | if news.rewritten { REWRITTEN } else { 0 };
            known.fetch_or(bits, Ordering::Release);
        }
    }
}

/// One file.
#[derive(Debug)]
struct Mapped {
    file: Arc<File>,
    region: MmapRegion,
    words: usize,
    /// Bytes that there is room for, if this process has made it.
    room: Mutex<Option<usize>>,
}

impl Mapped {
    fn reserve(&self, bytes: usize) -> io::Result<()> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let there = room.ok_or(io::ErrorKind::Unsupported)?;
        let wanted = whole_pages(bytes).min(self.words * size_of::<u64>());
        if wanted > there {
            reserve(&self.file, there, wanted)?;
            *room = Some(wanted);
        }
        Ok(())
    }
}

/// So many bytes and the rest of the last page: a store finds room for the whole page, or ends the process, though it changes one word.
fn whole_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(rustix::param::page_size())
}

/// Makes room for all bytes of a file up to `end`, of which it has those up to `start`.
fn reserve(file: &File, start: usize, end: usize) -> io::Result<()> {
    let more = end - start;
    match retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), start as u64, more as u64)) {
        // Written, it has its space as well.
        Err(rustix::io::Errno::OPNOTSUPP) => file.write_all_at(&vec![0; more], start as u64),
        other => Ok(other?),
    }
}

impl KeptMemory for Mapped {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, has so many words (`FileKeeper::map`), and lives as long as `self`. This process, the only one that
        // uses the file, accesses it through this slice of atomics only.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().cast::<AtomicU64>(), self.words) }
    }

    fn make_room(self: Arc<Self>, words: usize) -> LocalBoxFuture<'static, io::Result<()>> {
        Box::pin(async move { offload(move || self.reserve(words * size_of::<u64>())).await? })
    }
}

impl FileKeeper {
    /// Keeps memory beneath `directory`, which is ours alone; removes there what is from before the machine was started.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn new(directory: &Path) -> io::Result<Self> {
        Self::with_room(directory, MOST_FAILURES)
    }

    fn with_room(directory: &Path, failures: usize) -> io::Result<Self> {
        let boot = std::fs::read_to_string(BOOT_ID)?;
        let present = directory.join(boot.trim());
        DirBuilder::new().recursive(true).mode(0o700).create(&present)?;
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path != present {
                std::fs::remove_dir_all(path)?;
            }
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(present.join(FAILURES))?;
        let mut first = [0; size_of::<u64>()];
        let there = (&file).read(&mut first)?;
        let bytes = failures * ENTRY_WORDS * size_of::<u64>();
        let memory = Self::map_with_room(file, bytes, bytes)?;
        let has_any = AtomicBool::new(there == first.len() && first != [0; 8]);
        let failures = Failures { memory, has_any, adding: Mutex::default() };
        Ok(Self { directory: present, failures, ended: AtomicBool::new(false) })
    }

    /// The process is about to end. What is still under way is dropped without anybody knowing how it ends, as if the process had been killed: that is
    /// not noted as a failure.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    fn name(owner: FileIdentity, number: u32) -> String {
        format!("{number:08x}.{:x}.{:x}", owner.device, owner.inode)
    }

    /// Files whose name `is_it` likes.
    fn files(&self, is_it: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(&is_it) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }

    /// Maps a file with room for the first `room` bytes of `bytes`, so that no access to those finds the file system full. It has as much room as it is
    /// long; what is in it stays.
    fn map_with_room(file: File, bytes: usize, room: usize) -> io::Result<Arc<Mapped>> {
        let there = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let room = whole_pages(room).min(bytes);
        if there < room {
            reserve(&file, there, room)?;
        }
        if there.max(room) < bytes {
            file.set_len(bytes as u64)?;
        }
        let memory = Self::map(file, bytes, Some(room))?;
        // Few pages are used as a rule, and the kernel would read, or make, those around each as well. Without the advice it does.
        // SAFETY: the range is that of the mapping, and the advice changes nothing of what is in it.
        let _ = unsafe { rustix::mm::madvise(memory.words().as_ptr().cast_mut().cast(), bytes, Advice::Random) };
        Ok(memory)
    }

    fn map(file: File, bytes: usize, room: Option<usize>) -> io::Result<Arc<Mapped>> {
        let file = Arc::new(file);
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), bytes).map_err(io::Error::other)?;
        Ok(Arc::new(Mapped { file, region, words: bytes / size_of::<u64>(), room: room.into() }))
    }
}

impl MemoryKeeper for FileKeeper {
    fn create(&self, owner: FileIdentity, words: usize, room: usize) -> io::Result<(u32, Arc<dyn KeptMemory>)> {
        loop {
            // The hash of nothing, with random keys: truncation leaves 32 random bits.
            let number = RandomState::new().build_hasher().finish() as u32;
            if number == 0 || self.find(number)?.is_some() {
                continue;
            }
            let path = self.directory.join(Self::name(owner, number));
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            let [bytes, room] = [words, room].map(|words| words * size_of::<u64>());
            return match Self::map_with_room(file, bytes, room) {
                Ok(memory) => Ok((number, memory)),
                Err(error) => {
                    // The error says why; an empty file more or less does not matter.
                    let _ = std::fs::remove_file(path);
                    Err(error)
                }
            };
        }
    }

    fn find(&self, number: u32) -> io::Result<Option<Arc<dyn KeptMemory>>> {
        let prefix = format!("{number:08x}.");
        let Some(path) = self.files(|name| name.starts_with(&prefix))?.pop() else { return Ok(None) };
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if bytes == 0 {
            // Its maker was killed before it could be of use.
            return Ok(None);
        }
        Ok(Some(Self::map(file, bytes, None)?))
    }

    fn retain(&self, owner: FileIdentity, number: u32) {
        let (own, kept) = (Self::name(owner, 0), Self::name(owner, number));
        let suffix = own.trim_start_matches('0');
        // What cannot be removed is of no harm: no image names it.
        for path in self.files(|name| name.ends_with(suffix) && (number == 0 || name != kept)).unwrap_or_default() {
            let _ = std::fs::remove_file(path);
        }
    }

    fn note_failure(&self, file: Incarnation) {
        if !self.ended.load(Ordering::Acquire) {
            self.failures.note(file);
        }
    }

    fn failure(&self, file: Incarnation) -> Option<Failure> {
        self.failures.known(file)
    }

    fn add_to_failure(&self, file: Incarnation, news: Failure) {
        self.failures.add(file, news);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::catalogue::tests::block_on;

    const OWNER: FileIdentity = FileIdentity { device: 0x10, inode: 7 };
    const OTHER: FileIdentity = FileIdentity { device: 0x10, inode: 0x17 };

    #[test]
    fn failures_are_known_to_those_who_come_after() {
        let directory = tempfile::tempdir().expect("a directory");
        let keeper = FileKeeper::with_room(directory.path(), 8).expect("a keeper");
        let file = |inode, born| Incarnation { file: FileIdentity { device: 0x10, inode }, born };
        let has_failed = |keeper: &FileKeeper, file| keeper.failure(file).is_some();
        assert!(!has_failed(&keeper, file(0, 0)), "nothing has");
        keeper.add_to_failure(file(7, 5), Failure { told: true, rewritten: true });
        for _ in 0..2 {
            keeper.note_failure(file(7, 5));
        }
        keeper.note_failure(file(8, 0));
        keeper.end();
        keeper.note_failure(file(9, 5));
        drop(keeper);
        let keeper = FileKeeper::with_room(directory.path(), 8).expect("a keeper");
        for (inode, born, failed) in [(7, 5, true), (7, 6, false), (7, 0, true), (8, 6, true), (9, 5, false)] {
            assert_eq!(keeper.failure(file(inode, born)), failed.then(Failure::default), "{inode} of {born}");
        }
        keeper.retain(OWNER, 0);
        for (news, known) in [((false, true), (false, true)), ((true, false), (true, true)), ((false, false), (true, true))] {
            keeper.add_to_failure(file(7, 5), Failure { told: news.0, rewritten: news.1 });
            assert_eq!(keeper.failure(file(7, 5)), Some(Failure { told: known.0, rewritten: known.1 }));
        }
        assert_eq!(keeper.failure(file(8, 0)), Some(Failure::default()));
        keeper.note_failure(file(7, 5));
        assert_eq!(keeper.failure(file(7, 5)), Some(Failure::default()), "of a new one nobody knows");
        // Two are known, and one more fits.
        for inode in 100..105 {
            keeper.note_failure(file(inode, 1));
        }
        assert!(!has_failed(&keeper, file(9, 5)));
        keeper.note_failure(file(50, 1));
        assert!(has_failed(&keeper, file(9, 5)), "which have failed cannot be told any more");
        keeper.note_failure(file(51, 1));
    }

    #[test]
    fn memory_is_found_by_those_who_come_after() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(directory.path().join("another-boot")).expect("a directory");
        let keeper = FileKeeper::new(directory.path()).expect("a keeper");
        assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1, "only this boot's");
        let (number, memory) = keeper.create(OWNER, 1000, 1000).expect("room");
        memory.words()[999].store(7, Ordering::Relaxed);
        let (other, _) = keeper.create(OTHER, 1000, 1000).expect("room");
        drop((keeper, memory));
        let keeper = FileKeeper::new(directory.path()).expect("a keeper");
        let found = keeper.find(number).expect("no error").expect("it was kept");
        assert_eq!((found.words().len(), found.words()[999].load(Ordering::Relaxed)), (1000, 7));
        let (next, _) = keeper.create(OWNER, 8, 8).expect("room");
        keeper.retain(OWNER, next);
        let is_there = |number| keeper.find(number).expect("no error").is_some();
        assert_eq!([number, next, other].map(is_there), [false, true, true]);
        keeper.retain(OWNER, 0);
        assert_eq!([number, next, other].map(is_there), [false, false, true]);
        found.words()[0].store(1, Ordering::Relaxed);
    }

    #[test]
    fn memory_takes_the_room_that_is_made() {
        let directory = tempfile::tempdir().expect("a directory");
        let keeper = FileKeeper::new(directory.path()).expect("a keeper");
        let words = (8 << 20) / size_of::<u64>();
        // Of the last page one word, but nobody else gets the rest of it.
        let (number, memory) = keeper.create(OWNER, words, (1 << 13) - 511).expect("room");
        let path = keeper.directory.join(FileKeeper::name(OWNER, number));
        let taken = || path.metadata().expect("a file").blocks() * 512;
        assert_eq!((path.metadata().expect("a file").len(), taken()), (8 << 20, 1 << 16));
        memory.words()[(1 << 13) - 1].store(7, Ordering::Relaxed);
        for (room, expected) in [((1 << 14) - 1, 1 << 17), (1 << 13, 1 << 17), (1 << 17, 1 << 20), (words - 1, 8 << 20)] {
            block_on(Arc::clone(&memory).make_room(room)).expect("room");
            assert_eq!(taken(), expected, "for {room} words");
            assert_eq!(memory.words()[(1 << 13) - 1].load(Ordering::Relaxed), 7, "what is there stays");
        }
        let found = keeper.find(number).expect("no error").expect("it was kept");
        assert_eq!((found.words().len(), taken()), (words, 8 << 20));
        block_on(found.make_room(words)).expect_err("of what was left nothing is changed");
    }
}

//! Memory that somebody else shares with us and can take away again.
//!
//! A front-end may give a file that is shorter than what it claims, or make it shorter later; then the next access raises SIGBUS, which would end
//! the process with the disks of every other guest in it. So files are looked at before they are mapped, and every mapping that is accessed is
//! [`Watched`]: if it breaks, zeros of our own are put in its place, the access goes on, and whoever watches learns that the memory is lost. System
//! calls that reach such memory just fail.
//!
//! Seals that keep a file from shrinking are not demanded: QEMU and Cloud Hypervisor do not set them.

use std::fs::File;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// File systems whose files may be memory: a page of one is there as soon as it is asked for. On others, such as those that a program of somebody
/// else serves, a thread that touches a page could wait for ever.
const FILE_SYSTEMS: [(i64, &str); 5] =
    [(0x0102_1994, "tmpfs"), (0x9584_58f6, "hugetlbfs"), (0xef53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683e, "btrfs")];

/// Checks that `len` bytes of `file` from `offset` on can be mapped and accessed.
///
/// # Errors
/// If it does not have them, or lies on a file system whose files are no memory.
pub(super) fn admit(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let size = rustix::fs::fstat(file)?.st_size;
    let has = u64::try_from(size).unwrap_or(0);
    if offset.checked_add(len).is_none_or(|end| end > has) {
        let what = format!("{len} bytes at {offset} are asked for, and the file has {has}");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
    }
    let kind = rustix::fs::fstatfs(file)?.f_type;
    if !FILE_SYSTEMS.iter().any(|&(known, _)| known == kind) {
        let known = FILE_SYSTEMS.map(|(_, name)| name).join(", ");
        let what = format!("the file lies on a file system of type {kind:#x}; memory must be on {known}");
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    Ok(())
}

/// A mapping for which somebody is told if it breaks. Must be dropped before the mapping goes.
#[derive(Debug)]
pub(super) struct Watched(&'static Entry);

/// One place in the list that the signal handler reads. Entries are never freed, and used again.
#[derive(Debug)]
struct Entry {
    /// Zero while the entry is not used.
    start: AtomicUsize,
    len: AtomicUsize,
    is_lost: AtomicBool,
    /// Written once, before the entry is in the list.
    next: AtomicPtr<Entry>,
}

/// The first entry.
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(null_mut());
/// Entries that are not used. Never locked by the handler.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());
/// What was done about SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn free() -> std::sync::MutexGuard<'static, Vec<&'static Entry>> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watched {
    /// Watches the `len` bytes mapped at `start`, whole pages.
    pub(super) fn new(start: usize, len: usize) -> Self {
        install();
        let entry = free().pop().unwrap_or_else(|| {
            let entry: &'static Entry = Box::leak(Box::new(Entry {
                start: AtomicUsize::new(0),
                len: AtomicUsize::new(0),
                is_lost: AtomicBool::new(false),
                next: AtomicPtr::new(null_mut()),
            }));
            let _ = ENTRIES.fetch_update(Ordering::AcqRel, Ordering::Acquire, |first| {
                entry.next.store(first, Ordering::Relaxed);
                Some(std::ptr::from_ref(entry).cast_mut())
            });
            entry
        });
        entry.is_lost.store(false, Ordering::Relaxed);
        entry.len.store(len, Ordering::Release);
        entry.start.store(start, Ordering::Release);
        Self(entry)
    }

    /// Whether the memory was taken away: it contains nothing of the guest's any more.
    pub(super) fn is_lost(&self) -> bool {
        self.0.is_lost.load(Ordering::Acquire)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
        free().push(self.0);
    }
}

/// Puts our handler in front of the one that was there, once.
fn install() {
    BEFORE.get_or_init(|| {
        // SAFETY: all zeros are a valid value of this struct of integers and a function's address.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = handle as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structs are valid for the call. The handler does only what handlers may do: see there.
        let failed = unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut before) };
        assert_eq!(failed, 0, "the signal exists and may be handled");
        before
    });
}

/// Runs on the thread whose access has failed. Takes no lock, allocates nothing, calls nothing but `mmap` and `sigaction`.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let description = unsafe { &*info };
    // SAFETY: for SIGBUS it has an address.
    let address = unsafe { description.si_addr() } as usize;
    if replace(address) {
        return;
    }
    let Some(before) = BEFORE.get() else { return };
    match before.sa_sigaction {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            // The access is repeated after the return, and ends the process as it would have without us.
            // SAFETY: a valid structure; the old one is not asked for.
            unsafe { libc::sigaction(signal, before, null_mut()) };
        }
        // SAFETY: a handler with these arguments, as its flags say; one without `SA_SIGINFO` takes the first and ignores the others.
        other => unsafe {
            std::mem::transmute::<usize, extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void)>(other)(signal, info, context)
        },
    }
}

/// Puts zeros in the place of the watched mapping around `address`. `false` if there is none.
fn replace(address: usize) -> bool {
    let mut found = None;
    // More than one may watch the same mapping, and each shall know before there are zeros that it could take for the guest's.
    for entry in entries() {
        let (start, len) = (entry.start.load(Ordering::Acquire), entry.len.load(Ordering::Acquire));
        // The mapping around the address is watched as long as this thread uses it, but another entry may just have got its next use: then
        // start and length would not belong together.
        let is_whole = start != 0 && start == entry.start.load(Ordering::Acquire);
        if is_whole && (start..start.saturating_add(len)).contains(&address) {
            entry.is_lost.store(true, Ordering::Release);
            found.get_or_insert((start, len));
        }
    }
    let Some((start, len)) = found else { return false };
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    // SAFETY: the mapping is ours from start to end for as long as it is watched, and accessed through raw pointers only.
    let mapped = unsafe { libc::mmap(start as *mut libc::c_void, len, protection, flags | libc::MAP_NORESERVE, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// All entries that there have ever been.
fn entries() -> impl Iterator<Item = &'static Entry> {
    // SAFETY: entries are never freed.
    let entry = |at: *mut Entry| unsafe { at.as_ref() };
    std::iter::successors(entry(ENTRIES.load(Ordering::Acquire)), move |before| entry(before.next.load(Ordering::Relaxed)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::ptr::NonNull;

    use rustix::fs::MemfdFlags;
    use vm_memory::{FileOffset, MmapRegion};

    use super::*;

    fn memfd(len: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, len).expect("a length");
        file
    }

    #[test]
    fn files_must_have_what_is_asked_for() {
        let file = File::from(memfd(8192));
        assert!(admit(&file, 0, 8192).is_ok());
        assert!(admit(&file, 4096, 4096).is_ok());
        for (offset, len) in [(0, 8193), (4096, 4097), (8192, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(admit(&file, offset, len).is_err(), "{len} at {offset}");
        }
        let pipe = File::from(OwnedFd::from(std::io::pipe().expect("a pipe").0));
        assert!(admit(&pipe, 0, 0).is_err(), "no memory");
    }

    #[test]
    fn memory_that_is_taken_away_is_zeros_and_known_to_be_lost() {
        let file = memfd(3 << 12);
        let region = |file: &OwnedFd| {
            let file = File::from(file.try_clone().expect("a descriptor"));
            MmapRegion::<()>::from_file(FileOffset::new(file, 0), 3 << 12).expect("a mapping")
        };
        let (lost, kept) = (region(&file), region(&memfd(3 << 12)));
        let watch = |region: &MmapRegion| Watched::new(region.as_ptr() as usize, region.size());
        let (first, second, other) = (watch(&lost), watch(&lost), watch(&kept));
        // SAFETY: within the mapping.
        let last = unsafe { NonNull::new(lost.as_ptr()).expect("a mapping").add((3 << 12) - 1) };
        // SAFETY: mapped, and accessed by nobody else.
        unsafe { last.write_volatile(7) };
        rustix::fs::ftruncate(&file, 0).expect("no seals");
        // SAFETY: as above; the page is gone, which the handler makes good.
        assert_eq!(unsafe { last.read_volatile() }, 0);
        assert!(first.is_lost() && second.is_lost() && !other.is_lost());
        // SAFETY: as above; there are pages again.
        unsafe { last.write_volatile(8) };
        drop((first, second));
        // An entry that is used again has forgotten.
        assert!(!watch(&kept).is_lost());
    }

    #[test]
    fn nobody_sees_zeros_before_the_loss() {
        const BYTES: usize = 4096;
        for _ in 0..100 {
            let file = memfd(BYTES as u64);
            let shared = File::from(file.try_clone().expect("a descriptor"));
            let region = MmapRegion::<()>::from_file(FileOffset::new(shared, 0), BYTES).expect("a mapping");
            let start = region.as_ptr() as usize;
            // SAFETY: within the mapping.
            unsafe { region.as_ptr().write_volatile(7) };
            // Many, so that whoever goes through them takes some time.
            let watching: Vec<_> = (0..500).map(|_| Watched::new(start, BYTES)).collect();
            rustix::fs::ftruncate(&file, 0).expect("no seals");
            std::thread::scope(|scope| {
                for watched in [&watching[0], &watching[499]] {
                    scope.spawn(move || {
                        // SAFETY: mapped, or made good by the handler; nobody writes.
                        let value = unsafe { (start as *const u8).read_volatile() };
                        assert_eq!((value, watched.is_lost()), (0, true));
                    });
                }
            });
        }
    }
}

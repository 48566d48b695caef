//! What the system says about an open file. Where it may take a file server to find out, it is asked for through the ring.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use io_uring::{opcode, types};
use rustix::fs::{AtFlags, Statx, StatxFlags};
use rustix::io::retry_on_intr;

use super::environment::call;
use super::operation::CallKind;

/// Who answers for what is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The kernel, out of its own memory.
    Memory,
    /// The kernel and its devices.
    Local,
    /// A file system over others (overlayfs), taken to be local ones; but what it is asked about a file, it asks them.
    Stacked,
    /// Perhaps another program or machine, which may take for ever.
    Served,
}

/// File systems in memory (linux/magic.h).
const MEMORY: [u64; 2] = [
    0x0102_1994, // tmpfs, and the directory of block devices
    0x8584_58f6, // ramfs
];

/// File systems of which nothing but the kernel and its devices answers (linux/magic.h; zfs and bcachefs have theirs in their own sources).
const LOCAL: [u64; 6] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0xf2f5_2010, // F2FS
    0x2fc1_2fc1, // ZFS
    0xca45_1a4e, // bcachefs
];

/// Overlayfs (linux/magic.h).
const OVERLAYFS: u64 = 0x794c_7630;

impl Medium {
    /// What an open file lies on. Whoever serves it is asked, so it may take for ever.
    pub(super) fn of(file: &OwnedFd) -> Self {
        match rustix::fs::fstatfs(file).map(|system| system.f_type.cast_unsigned() & 0xffff_ffff) {
            Ok(system) if MEMORY.contains(&system) => Self::Memory,
            Ok(system) if LOCAL.contains(&system) => Self::Local,
            Ok(OVERLAYFS) => Self::Stacked,
            _ => Self::Served,
        }
    }
}

/// Asks for what `mask` names at once. Whoever serves the file is asked, so it may take for ever.
///
/// # Errors
/// Whatever the system reports.
pub(super) fn look(file: impl AsFd, mask: StatxFlags) -> io::Result<Statx> {
    Ok(retry_on_intr(|| rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, mask))?)
}

/// Memory of a question about an open file.
struct Question<F> {
    file: F,
    answer: UnsafeCell<MaybeUninit<Statx>>,
}

// The kernel writes a whole `struct statx`, which has this size for ever (linux/stat.h).
const _: () = assert!(size_of::<Statx>() == 256);

/// As [`look`], through the ring: gives the file back with the answer.
///
/// # Errors
/// Whatever the system reports.
pub(super) async fn examine<F: AsFd + 'static>(file: F, mask: StatxFlags) -> io::Result<(F, Statx)> {
    let question = Rc::new(Question { file, answer: UnsafeCell::new(MaybeUninit::uninit()) });
    let answer = question.answer.get().cast::<types::statx>();
    let entry = opcode::Statx::new(types::Fd(question.file.as_fd().as_raw_fd()), c"".as_ptr(), answer)
        .flags(libc::AT_EMPTY_PATH)
        .mask(mask.bits())
        .build();
    let keep = Rc::clone(&question);
    // SAFETY: the descriptor and the answer belong to what is kept and does not move; the empty name is static.
    unsafe { call(entry, CallKind::Plain, keep) }.await?;
    let question = Rc::into_inner(question).expect("an operation that has ended keeps nothing");
    let answer = question.answer.into_inner();
    // SAFETY: the kernel has reported success, so it has written the whole structure, any bytes of which are a valid one.
    Ok((question.file, unsafe { answer.assume_init() }))
}

#[cfg(test)]
mod tests {
    use super::super::Reactor;
    use super::*;

    /// Files on a file server are asked about so.
    #[test]
    fn the_ring_finds_out_what_the_system_says() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(777).expect("a length");
        let mask = StatxFlags::SIZE | StatxFlags::INO;
        let said = look(&file, mask).expect("an answer");
        let asked = async move { examine(file, mask).await };
        let (file, answer) = Reactor::new(8).expect("a reactor").block_on(asked).expect("the ring works").expect("an answer");
        assert_eq!((answer.stx_size, answer.stx_ino), (777, said.stx_ino));
        assert_eq!(file.metadata().expect("the file itself").len(), 777);
    }
}

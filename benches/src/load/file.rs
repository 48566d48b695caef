//! Requests to a file, as directly as io_uring makes them: registered file and memory, a single issuer.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};

use super::Job;
use super::memory::Memory;
use super::report::Direction;
use super::target::Engine;

pub(super) struct FileEngine {
    // Its operations end before their memory goes.
    ring: IoUring,
    size: u64,
    polls: bool,
    memory: Memory,
    _file: File,
}

impl FileEngine {
    pub(super) fn open(path: &Path, job: &Job) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
        let file = match direct {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => options.open(path),
            other => other,
        };
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        // A file in memory needs no waiting, but does not say so: without the flag the ring has each transfer done by another thread (Linux 6.5).
        const TMPFS: u64 = 0x0102_1994;
        if rustix::fs::fstatfs(&file)?.f_type.cast_unsigned() & 0xffff_ffff == TMPFS {
            rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? | rustix::fs::OFlags::NONBLOCK)?;
        }
        let size = file.metadata()?.len();
        let memory = Memory::new(job.slots(), usize::try_from(job.bs.0)?)?;
        let entries = u32::try_from(job.slots())?;
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries).context("cannot set up an io_uring")?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let vector = libc::iovec { iov_base: memory.base().cast(), iov_len: memory.len() };
        // SAFETY: the memory outlives the ring.
        unsafe { ring.submitter().register_buffers(&[vector])? };
        Ok(Self { ring, size, polls: job.hipri, memory, _file: file })
    }
}

impl Engine for FileEngine {
    fn size(&self) -> u64 {
        self.size
    }

    fn prepare(&mut self, slot: usize, direction: Direction, at: u64) -> Result<()> {
        let (bytes, len) = (self.memory.slot(slot), u32::try_from(self.memory.block())?);
        let entry = match direction {
            Direction::Read => opcode::ReadFixed::new(types::Fixed(0), bytes, len, 0).offset(at).build(),
            Direction::Write => opcode::WriteFixed::new(types::Fixed(0), bytes, len, 0).offset(at).build(),
        };
        // SAFETY: the block belongs to this request until it has come back, and the memory outlives the ring.
        if unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }.is_err() {
            bail!("more requests than slots");
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<()> {
        self.ring.submit()?;
        Ok(())
    }

    fn complete(&mut self, wait: Option<Duration>, done: &mut Vec<usize>) -> Result<()> {
        if self.ring.completion().is_empty() {
            match wait.filter(|_| !self.polls) {
                None => drop(self.ring.submitter().submit_and_wait(0)?),
                Some(wait) => {
                    let limit = types::Timespec::from(wait);
                    match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&limit)) {
                        Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => return Err(error.into()),
                        _ => {}
                    }
                }
            }
        }
        for completion in self.ring.completion() {
            let (slot, result) = (usize::try_from(completion.user_data())?, completion.result());
            ensure!(usize::try_from(result).is_ok_and(|len| len == self.memory.block()), "a request has failed: {result}");
            done.push(slot);
        }
        Ok(())
    }
}

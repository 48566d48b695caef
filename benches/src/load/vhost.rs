//! Requests to a vhost-user-blk device.

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use super::Job;
use super::memory::Memory;
use super::report::Direction;
use super::target::Engine;

pub(super) struct VhostEngine {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    calls: Vec<std::sync::Arc<EventFd>>,
    /// Queues that have something new.
    dirty: Vec<bool>,
    depth: usize,
    size: u64,
    polls: bool,
    memory: Memory,
    // The queues' memory, so it goes last.
    transport: Box<VirtioBlkTransport>,
}

impl VhostEngine {
    pub(super) fn connect(socket: &Path, job: &Job) -> Result<Self> {
        let features =
            VirtioFeatureFlags::VERSION_1.bits() | VirtioFeatureFlags::RING_EVENT_IDX.bits() | VirtioBlkFeatureFlags::all().bits();
        let path = socket.to_str().context("a socket's path must be plain text")?;
        let connected = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features);
        let mut transport: Box<VirtioBlkTransport> = Box::new(connected.with_context(|| format!("cannot connect to {path}"))?);
        // A request takes three descriptors.
        let entries = u16::try_from((job.iodepth * 3).next_power_of_two().max(4))?;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, job.queues, entries)
            .with_context(|| format!("{path} does not take {} queues of {entries} descriptors", job.queues))?;
        let memory = Memory::new(job.slots(), usize::try_from(job.bs.0)?)?;
        transport.map_mem_region(memory.base() as usize, memory.len(), memory.file().as_raw_fd(), 0)?;
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(!job.hipri));
        let calls = (0..job.queues).map(|index| transport.get_completion_fd(index)).collect();
        let size = transport.get_config()?.capacity.to_native() * 512;
        Ok(Self { queues, calls, dirty: vec![false; job.queues], depth: job.iodepth, size, polls: job.hipri, memory, transport })
    }

    /// Takes what has come back.
    fn collect(&mut self, done: &mut Vec<usize>) -> Result<()> {
        for queue in &mut self.queues {
            for completion in queue.completions() {
                ensure!(completion.ret == 0, "a request has failed: error {}", -completion.ret);
                done.push(completion.context);
            }
        }
        Ok(())
    }
}

impl Engine for VhostEngine {
    fn size(&self) -> u64 {
        self.size
    }

    fn prepare(&mut self, slot: usize, direction: Direction, at: u64) -> Result<()> {
        let (index, bytes, len) = (slot / self.depth, self.memory.slot(slot), self.memory.block());
        let queue = &mut self.queues[index];
        match direction {
            // SAFETY: the block belongs to this request until it has come back, and the memory lives as long as the transport.
            Direction::Read => unsafe { queue.read_raw(at, bytes, len, slot) },
            // SAFETY: the same.
            Direction::Write => unsafe { queue.write_raw(at, bytes, len, slot) },
        }?;
        self.dirty[index] = true;
        Ok(())
    }

    fn submit(&mut self) -> Result<()> {
        for (index, dirty) in self.dirty.iter_mut().enumerate() {
            if std::mem::take(dirty) && self.queues[index].avail_notif_needed() {
                self.transport.get_submission_notifier(index).notify()?;
            }
        }
        Ok(())
    }

    fn complete(&mut self, wait: Option<Duration>, done: &mut Vec<usize>) -> Result<()> {
        self.collect(done)?;
        let Some(wait) = wait.filter(|_| done.is_empty() && !self.polls) else { return Ok(()) };
        let mut fds: Vec<PollFd<'_>> = self.calls.iter().map(|call| PollFd::new(&**call, PollFlags::IN)).collect();
        let limit = Timespec { tv_sec: i64::try_from(wait.as_secs())?, tv_nsec: i64::from(wait.subsec_nanos()) };
        poll(&mut fds, Some(&limit))?;
        let ready: Vec<usize> = (0..fds.len()).filter(|&index| !fds[index].revents().is_empty()).collect();
        for index in ready {
            self.calls[index].read()?;
        }
        self.collect(done)
    }
}

//! What the kernel's io_uring offers, and the best ring that it gives.

use std::time::Duration;
use std::{fmt, io};

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::environment::monotonic;

/// How long the kernel has for making a thread.
const WORKER_PATIENCE: Duration = Duration::from_secs(1);

/// How completions reach the thread that owns the ring: the better ones interrupt it less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Only when the thread asks for them (`SINGLE_ISSUER` and `DEFER_TASKRUN`, Linux 6.1).
    Deferred,
    /// At the thread's next system call (`COOP_TASKRUN`, Linux 5.19).
    Cooperative,
    /// By interrupting the thread (Linux 5.15).
    Plain,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deferred => "deferred",
            Self::Cooperative => "cooperative",
            Self::Plain => "plain",
        })
    }
}

/// A ring and what it can do.
pub(super) struct Capable {
    pub(super) uring: IoUring,
    pub(super) tier: Tier,
    /// Whether a length can be set through the ring (Linux 6.9).
    pub(super) truncates: bool,
}

/// Makes the best ring that this kernel allows, for up to `entries` submissions at a time. It belongs to the calling thread.
///
/// # Errors
/// With an explanation, if the system forbids io_uring, its kernel is too old, or it has no thread left for the ring.
pub(super) fn build(entries: u32) -> io::Result<Capable> {
    let mut refused = io::Error::from(io::ErrorKind::InvalidInput);
    for tier in [Tier::Deferred, Tier::Cooperative, Tier::Plain] {
        match build_exactly(tier, entries) {
            Ok(capable) => return Ok(capable),
            // An unknown flag: the next tier asks for less.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(explain(error)),
        }
    }
    Err(explain(refused))
}

/// A ring of exactly this tier: `EINVAL` if the kernel does not know it.
fn build_exactly(tier: Tier, entries: u32) -> io::Result<Capable> {
    let mut capable = examine(build_tier(tier, entries)?, tier)?;
    start_worker(&mut capable.uring)?;
    Ok(capable)
}

fn build_tier(tier: Tier, entries: u32) -> io::Result<IoUring> {
    let entries = entries.clamp(1, 1 << 15).next_power_of_two();
    let mut builder = IoUring::builder();
    // Watches and timers stay in flight for long, so more completions than submissions can be outstanding.
    builder.setup_clamp().setup_cqsize(entries.saturating_mul(4)).dontfork();
    match tier {
        Tier::Deferred => builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
        Tier::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
        Tier::Plain => &mut builder,
    };
    builder.build(entries)
}

fn examine(uring: IoUring, tier: Tier) -> io::Result<Capable> {
    let params = uring.params();
    if !(params.is_feature_nodrop() && params.is_feature_submit_stable() && params.is_feature_ext_arg()) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is too old: Linux 5.15 or newer is needed"));
    }
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::OpenAt2::CODE, opcode::RenameAt::CODE, opcode::UnlinkAt::CODE, opcode::Fallocate::CODE, opcode::Statx::CODE];
    if !needed.iter().all(|code| probe.is_supported(*code)) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring lacks operations: Linux 5.15 or newer is needed"));
    }
    let truncates = probe.is_supported(opcode::Ftruncate::CODE);
    Ok(Capable { uring, tier, truncates })
}

/// Has the kernel make the thread to which it hands what it cannot do at once, flushes above all. The last such thread of a ring stays if nobody
/// changes which processors it may use, so with it more work only takes longer; without it, and with no thread to be had, the kernel ends such
/// operations undone, or (older ones) tries for ever.
fn start_worker(uring: &mut IoUring) -> io::Result<()> {
    let entry = opcode::Nop::new().build().flags(squeue::Flags::ASYNC);
    // SAFETY: it points to nothing.
    unsafe { uring.submission().push(&entry) }.expect("a new ring has room");
    let deadline = monotonic() + WORKER_PATIENCE;
    loop {
        let left = types::Timespec::from(deadline.saturating_sub(monotonic()));
        let waited = uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&left));
        let result = match (uring.completion().next(), waited) {
            (Some(completion), _) => completion.result(),
            (None, Err(error)) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME)) => return Err(error),
            (None, _) if monotonic() >= deadline => -libc::EAGAIN,
            (None, _) => continue,
        };
        return match -result {
            // Nobody else cancels it.
            libc::ECANCELED => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            error if error > 0 => Err(io::Error::from_raw_os_error(error)),
            _ => Ok(()),
        };
    }
}

fn explain(error: io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here: look at the sysctl kernel.io_uring_disabled and, in a container, at its seccomp profile"
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring, or a seccomp profile hides it: Linux 5.15 or newer is needed",
        Some(libc::ENOMEM) => "no memory for an io_uring: look at the limit for locked memory (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "no file descriptor left for an io_uring: look at the limit for open files (ulimit -n)",
        Some(libc::EAGAIN) => {
            "no thread left for an io_uring: look at the limit for processes (ulimit -u) and, in a container, at the one for its tasks (pids.max)"
        }
        _ => "cannot set up an io_uring",
    };
    io::Error::new(error.kind(), format!("{hint}: {error}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::skip::skipped;
    use super::*;

    /// A ring of each tier that this kernel knows, as older kernels would give it: the plain one cannot set lengths.
    pub(in super::super) fn every_tier(entries: u32) -> Vec<Capable> {
        let tiers = [Tier::Deferred, Tier::Cooperative, Tier::Plain].into_iter();
        let known = tiers.filter_map(|tier| match build_exactly(tier, entries) {
            Ok(capable) => Some(Capable { truncates: capable.truncates && tier != Tier::Plain, ..capable }),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{tier}: {error}");
                skipped(format_args!("this kernel does not know the tier {tier}"));
                None
            }
        });
        known.collect()
    }

    #[test]
    fn the_best_tier_is_taken() {
        let best = build(8).expect("this machine has io_uring");
        println!("best tier: {}, truncates: {}", best.tier, best.truncates);
        assert_eq!(best.tier, every_tier(8).first().expect("the plain one at least").tier);
    }

    #[test]
    fn a_forbidden_ring_is_explained() {
        let error = explain(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("kernel.io_uring_disabled"), "{error}");
    }
}

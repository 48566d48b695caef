//! The program inside the test guest.
//!
//! As process 1 it first makes the bare initramfs a system: it mounts the kernel's file systems and loads the virtio drivers. Told so by the
//! kernel command line (`snapfence.root=/dev/vda`), it then moves over to the system on that disk, whose init starts it again as a service.
//! In the end it serves the host over a virtio-serial port until told to reboot or power off.

mod counters;
mod init;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = if std::process::id() == 1 { init::prepare() } else { Ok(()) };
    match outcome.and_then(|()| serve::serve()) {
        Ok(never) => match never {},
        Err(error) => {
            // The console is all that is left to say it on. The kernel turns the end of process 1 into a panic, which the host watches for.
            eprintln!("snapfence-guest-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! Standard error as a place for log lines at which nobody waits for a reader.
//!
//! Whoever reads the log may stop reading, and then a write to its pipe or socket blocks without end, with the queue or control thread that logs. So
//! a line is written only where there is room for it; others are left out and counted, and the count is logged once there is room again. Lines are
//! there when whoever logs goes on, as people expect of a log.

use std::io::{self, Stderr, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that a pipe takes without blocking if it says that it takes any (`PIPE_BUF` of Linux, pipe(7)); sockets take more.
const ROOM: usize = 4096;

/// Where log lines go. Clones lead to the same.
#[derive(Debug)]
pub(crate) struct Log<W = Stderr>(Arc<Mutex<State<W>>>);

#[derive(Debug)]
struct State<W> {
    target: W,
    /// Lines left out since the last that was written.
    left_out: u64,
    /// The last one that was written lacks its end.
    is_torn: bool,
}

impl<W> Clone for Log<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<W: Write + AsFd> Log<W> {
    /// Lines go to `target`.
    pub(crate) fn new(target: W) -> Self {
        Self(Arc::new(Mutex::new(State { target, left_out: 0, is_torn: false })))
    }
}

impl<W: Write + AsFd> State<W> {
    fn has_room(&self) -> bool {
        let mut waited = [PollFd::new(&self.target, PollFlags::OUT)];
        // What cannot be asked is written to: it is no pipe.
        poll(&mut waited, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() || !waited[0].revents().is_empty()
    }

    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        if self.left_out > 0 && self.has_room() {
            let count = std::mem::take(&mut self.left_out);
            let start = if std::mem::take(&mut self.is_torn) { "\n" } else { "" };
            writeln!(self.target, "{start}WARN event=\"log_lines_left_out\" count={count} the log was not read fast enough")?;
        }
        for (at, part) in line.chunks(ROOM).enumerate() {
            if !self.has_room() {
                self.left_out += 1;
                self.is_torn |= at > 0;
                return Ok(());
            }
            self.target.write_all(part)?;
        }
        Ok(())
    }
}

impl<W: Write + AsFd> Write for Log<W> {
    /// One line or several, their ends included.
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(lines)?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a, W: Write + AsFd + 'a> MakeWriter<'a> for Log<W> {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Fills `writer`, which its reader leaves alone, and then lets the reader go on.
    fn fill(writer: impl Write + AsFd, mut reader: impl Read) {
        let mut log = Log::new(writer);
        for number in 0..20_000 {
            log.write_all(format!("{number:063}\n").as_bytes()).expect("it takes it or leaves it");
        }
        let left_out = log.0.lock().expect("no panics").left_out;
        assert!(left_out > 0 && left_out < 20_000, "{left_out}");
        let mut read = vec![0; 64 * usize::try_from(20_000 - left_out).expect("a small number")];
        reader.read_exact(&mut read).expect("lines");
        for (number, line) in read.chunks(64).enumerate() {
            assert_eq!(line, format!("{number:063}\n").as_bytes(), "lines are whole and in order");
        }
        log.write_all(b"again\n").expect("room");
        drop(log);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("lines");
        assert!(rest.contains(&format!("count={left_out} ")) && rest.ends_with("\nagain\n"), "{rest}");
    }

    #[test]
    fn a_log_that_nobody_reads_blocks_nobody_and_says_what_is_missing() {
        let (reader, writer) = io::pipe().expect("a pipe");
        fill(writer, reader);
        let (reader, writer) = UnixStream::pair().expect("sockets");
        fill(writer, reader);
    }

    #[test]
    fn files_have_room_and_errors_are_the_loggers() {
        let mut log = Log::new(tempfile::tempfile().expect("a file"));
        log.write_all(&[b'x'; 100_000]).expect("room");
        let length = log.0.lock().expect("no panics").target.metadata().expect("a file").len();
        assert_eq!(length, 100_000);
        let full = std::fs::File::options().write(true).open("/dev/full").expect("a device");
        Log::new(full).write_all(b"x").expect_err("it is full");
    }
}

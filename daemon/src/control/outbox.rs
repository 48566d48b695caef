//! What waits to be sent to one client.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, read, write};

use super::encode::Line;

/// How many events may wait for a client. When there are more, new ones are counted instead of kept.
const EVENTS_LIMIT: usize = 1024;

/// The lines for one client, in order. Filled by any thread, emptied by the connection's own.
#[derive(Debug)]
pub(super) struct Outbox {
    state: Mutex<State>,
    /// Readable when the connection's thread should look again.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Queued>,
    /// Bytes of the first line that have been sent.
    sent: usize,
    events: usize,
    lost: u64,
    /// A request is being carried out.
    busy: bool,
    /// The server is stopping.
    stopping: bool,
    /// Nobody will empty this any more.
    closed: bool,
}

#[derive(Debug)]
struct Queued {
    line: Line,
    is_event: bool,
}

/// What the connection's thread needs to know for its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) busy: bool,
    pub(super) stopping: bool,
    pub(super) empty: bool,
}

impl Outbox {
    pub(super) fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { state: Mutex::default(), wake })
    }

    /// The state stays whole whatever panics: each change of it is one step.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Becomes readable when [`Outbox::status`] or the lines may have changed.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn wake(&self) {
        // The only way to fail is a counter that is full, and a full one wakes as well.
        let _ = write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Makes the wake-up's file unreadable again.
    pub(super) fn clear_wake(&self) {
        // Fails when there was no wake-up, which is fine.
        let _ = read(&self.wake, &mut [0_u8; 8]);
    }

    pub(super) fn status(&self) -> Status {
        let state = self.state();
        Status { busy: state.busy, stopping: state.stopping, empty: state.lines.is_empty() }
    }

    /// Notes that a request has begun.
    pub(super) fn begin(&self) {
        self.state().busy = true;
    }

    /// Adds the answer to the request that has begun.
    pub(super) fn answer(&self, line: Line) {
        let mut state = self.state();
        state.busy = false;
        if !state.closed {
            state.lines.push_back(Queued { line, is_event: false });
        }
        drop(state);
        self.wake();
    }

    /// Adds a line from the connection's own thread.
    pub(super) fn say(&self, line: Line) {
        self.state().lines.push_back(Queued { line, is_event: false });
    }

    /// Adds an event, or counts it as lost.
    pub(super) fn event(&self, line: &Line) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        if state.events >= EVENTS_LIMIT {
            state.lost += 1;
            return;
        }
        state.events += 1;
        state.lines.push_back(Queued { line: line.clone(), is_event: true });
        drop(state);
        self.wake();
    }

    /// The first line and how much of it has been sent.
    pub(super) fn first(&self) -> Option<(Line, usize)> {
        let state = self.state();
        state.lines.front().map(|first| (first.line.clone(), state.sent))
    }

    /// Notes that so many more bytes of the first line have been sent. Returns how many events were lost since it was last asked,
    /// once there is room to say so.
    pub(super) fn sent(&self, bytes: usize) -> Option<u64> {
        let mut state = self.state();
        state.sent += bytes;
        let first = state.lines.front()?;
        if state.sent < first.line.len() {
            return None;
        }
        state.events -= usize::from(first.is_event);
        state.lines.pop_front();
        state.sent = 0;
        (state.lost > 0 && state.events == 0).then(|| std::mem::take(&mut state.lost))
    }

    /// Asks the connection to end in good order.
    pub(super) fn stop(&self) {
        self.state().stopping = true;
        self.wake();
    }

    /// Drops all lines, now and later.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.lines.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_events_are_counted_and_told_when_the_client_has_caught_up() {
        let outbox = Outbox::new().unwrap();
        let line: Line = b"x\r\n".as_slice().into();
        for _ in 0..EVENTS_LIMIT + 7 {
            outbox.event(&line);
        }
        outbox.begin();
        outbox.answer(line.clone());
        let mut told = Vec::new();
        let mut lines = 0;
        while let Some((line, sent)) = outbox.first() {
            assert_eq!(sent, 0);
            told.extend(outbox.sent(1));
            told.extend(outbox.sent(line.len() - 1));
            lines += 1;
        }
        assert_eq!((lines, told), (EVENTS_LIMIT + 1, vec![7]));
        outbox.close();
        outbox.event(&line);
        outbox.answer(line);
        assert_eq!(outbox.status(), Status { busy: false, stopping: false, empty: true });
    }
}

//! Queue of log lines, and the thread that writes them.
//!
//! A write to a pipe that no process reads blocks forever. The agent therefore passes its lines to a thread, and drops lines
//! for which the queue has no room.

use std::{
    collections::VecDeque,
    io::{self, Stderr, Write as _},
    os::fd::AsFd as _,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MAX_BYTES: usize = 256 << 10;
/// Size of one write in bytes. A writable pipe accepts this many without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// Time without progress after which a flush gives up.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(crate) struct LineQueue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Entry>,
    bytes: usize,
    dropped: u64,
    /// Number of dropped lines that no entry reports yet.
    unreported: u64,
    is_writing: bool,
    /// Number of written entries, which tells a flush of progress.
    written: u64,
}

/// Entry that the thread writes next.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Entry {
    /// A line, with its newline.
    Line(Vec<u8>),
    /// A report of this number of dropped lines.
    Dropped(u64),
}

impl LineQueue {
    /// Adds a line, or drops it if there is no room.
    pub(crate) fn push(&self, line: Vec<u8>) {
        let mut state = self.lock();
        if state.bytes + line.len() > MAX_BYTES {
            state.dropped += 1;
            state.unreported += 1;
        } else {
            self.add(state, line);
        }
    }

    /// Adds a line, even if there is no room. Used for the last line of the process.
    pub(crate) fn push_last(&self, line: Vec<u8>) {
        self.add(self.lock(), line);
    }

    fn add(&self, mut state: MutexGuard<'_, State>, line: Vec<u8>) {
        if state.unreported > 0 {
            let dropped = std::mem::take(&mut state.unreported);
            state.entries.push_back(Entry::Dropped(dropped));
        }
        state.bytes += line.len();
        state.entries.push_back(Entry::Line(line));
        self.changed.notify_all();
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Waits until all lines are written, or until standard error accepts none.
    pub(crate) fn flush(&self) {
        let mut state = self.lock();
        while state.is_writing || !state.entries.is_empty() {
            let before = state.written;
            let waited = self.changed.wait_timeout(state, FLUSH_TIMEOUT);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = next;
            if timeout.timed_out() && state.written == before {
                return;
            }
        }
    }

    fn try_pop(&self) -> Option<Entry> {
        let mut state = self.lock();
        let entry = state.entries.pop_front();
        if let Some(Entry::Line(line)) = &entry {
            state.bytes -= line.len();
        }
        let unreported = match entry {
            None => std::mem::take(&mut state.unreported),
            Some(_) => 0,
        };
        let entry = entry.or_else(|| (unreported > 0).then_some(Entry::Dropped(unreported)));
        state.is_writing = entry.is_some();
        entry
    }

    fn pop(&self) -> Entry {
        loop {
            if let Some(entry) = self.try_pop() {
                return entry;
            }
            let idle = |state: &mut State| state.entries.is_empty() && state.unreported == 0;
            drop(self.changed.wait_while(self.lock(), idle));
        }
    }

    fn on_written(&self, is_written: bool) {
        let mut state = self.lock();
        state.is_writing = false;
        state.written += 1;
        state.dropped += u64::from(!is_written);
        self.changed.notify_all();
    }

    /// Writes lines as they arrive. `report` formats the line that reports dropped ones.
    pub(crate) fn write_all(&self, report: impl Fn(u64) -> Vec<u8>) -> ! {
        let mut stderr = io::stderr();
        loop {
            let is_written = match self.pop() {
                Entry::Line(line) => write(&mut stderr, &line).is_ok(),
                Entry::Dropped(count) => {
                    // A lost report does not count as a dropped line.
                    let _lost = write(&mut stderr, &report(count));
                    true
                }
            };
            self.on_written(is_written);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(stderr: &mut Stderr, line: &[u8]) -> io::Result<()> {
    for mut rest in line.chunks(CHUNK) {
        while !rest.is_empty() {
            // Standard error may be non-blocking, because processes that share it share its mode.
            poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE).or_else(
                |errno| if errno == nix::errno::Errno::EINTR { Ok(0) } else { Err(io::Error::from(errno)) },
            )?;
            match stderr.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_lines_are_reported_in_place() {
        let queue = LineQueue::default();
        let line = |number: usize| vec![b'0' + u8::try_from(number).unwrap(); MAX_BYTES / 4];
        (0..6).for_each(|number| queue.push(line(number)));
        assert_eq!(queue.dropped(), 2);
        for number in 0..3 {
            assert_eq!(queue.try_pop(), Some(Entry::Line(line(number))));
        }
        queue.push(line(6));
        assert_eq!(queue.try_pop(), Some(Entry::Line(line(3))));
        assert_eq!(queue.try_pop(), Some(Entry::Dropped(2)));
        assert_eq!(queue.try_pop(), Some(Entry::Line(line(6))));
        assert_eq!(queue.try_pop(), None);
    }

    #[test]
    fn dropped_lines_need_no_later_line() {
        let queue = LineQueue::default();
        queue.push(vec![b'a'; MAX_BYTES]);
        queue.push(b"b\n".to_vec());
        assert!(matches!(queue.try_pop(), Some(Entry::Line(_))));
        assert_eq!(queue.try_pop(), Some(Entry::Dropped(1)));
        assert_eq!((queue.try_pop(), queue.dropped()), (None, 1));
    }

    #[test]
    fn flush_does_not_wait_for_the_reader() {
        let queue = LineQueue::default();
        queue.push(b"a\n".to_vec());
        queue.flush();
        queue.try_pop();
        queue.on_written(true);
        queue.flush();
    }
}

//! Sink that writes JSON lines to standard output.

use std::{io, os::fd::AsFd as _, sync::Arc};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    unistd::write,
};

use super::{
    sink_error::{Sent, SinkError, io_failed},
    sink_record::SinkRecord,
};

/// Size of one write in bytes. A writable pipe accepts this many without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// Time in milliseconds after which an attempt fails if standard output accepts nothing.
const TIMEOUT: u16 = 1000;

#[derive(Debug, Default)]
pub(super) struct StdoutSink {
    /// Rest of the line of the first record of the batch, if its start is written.
    rest: Vec<u8>,
}

impl StdoutSink {
    pub(super) fn send(&mut self, batch: &[Arc<SinkRecord>]) -> Sent {
        for (index, record) in batch.iter().enumerate() {
            if self.rest.is_empty() {
                self.rest = record.line();
            }
            if let Err(error) = self.write_rest() {
                return Sent::until(index, error);
            }
        }
        Sent::all(batch.len())
    }

    fn write_rest(&mut self) -> Result<(), SinkError> {
        let stdout = io::stdout();
        while !self.rest.is_empty() {
            let chunk = self.rest.get(..CHUNK).unwrap_or(&self.rest);
            let mut polled = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
            let written = match poll(&mut polled, TIMEOUT) {
                Ok(0) => return Err(SinkError::NotRead),
                Ok(_) => write(&stdout, chunk),
                Err(errno) => Err(errno),
            };
            match written {
                Ok(count) => drop(self.rest.drain(..count)),
                // Standard output may be non-blocking, because processes that share it share its mode.
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(io_failed("write to", &"standard output")(errno.into())),
            }
        }
        Ok(())
    }
}

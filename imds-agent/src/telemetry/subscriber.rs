//! Reads events for a command, also while another process collects them from the programs.

use std::os::fd::{AsFd as _, BorrowedFd};

use imds_ebpf_common::Event;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    datapath::{maps::recent_events::Recent, pin::dir::PinDir},
    telemetry::{Collector, CollectorError, http_request::RequestEvent, request_reader::RequestReader},
};

/// Poll interval in milliseconds while another process collects the events, and of the log of requests.
const PERIOD: u16 = 100;
/// Poll interval in milliseconds until the log of requests exists.
const NO_LOG_PERIOD: u16 = 1000;

/// Reader of recorded events. Returns unread events first.
pub(crate) struct EventSubscriber {
    pins: PinDir,
    recent: Recent,
    /// Reader of requests; `None` until one is recorded.
    requests: Option<RequestReader>,
    /// Collector of this process; `None` while another process collects the events.
    collector: Option<Collector>,
    position: u64,
    /// Number of events that were overwritten between the last two reads; `None` before the first.
    missed: Option<u64>,
    /// True if events count as read for later readers once this reader has returned them.
    marks: bool,
}

impl EventSubscriber {
    /// Opens a reader that starts with the first unread event of the pin directory.
    pub(crate) fn open(pins: PinDir) -> Result<Self, CollectorError> {
        let recent = Recent::open(&pins)?;
        let position = recent.last_printed()?;
        let collector = Collector::open(&pins)?;
        let requests = RequestReader::open(&pins, None)?;
        Ok(Self { pins, recent, requests, collector, position, missed: None, marks: true })
    }

    /// Opens a reader that starts `earlier` events before the last one. The returned events stay unread for other readers.
    pub(crate) fn open_last(pins: PinDir, earlier: u64) -> Result<Self, CollectorError> {
        let subscriber = Self::open(pins)?;
        let position = subscriber.recent.last()?.saturating_sub(earlier);
        let requests = RequestReader::open(&subscriber.pins, Some(earlier))?;
        Ok(Self { position, requests, marks: false, ..subscriber })
    }

    pub(crate) fn read(&mut self) -> Result<Vec<Event>, CollectorError> {
        if self.collector.is_none() {
            // The process that collected the events may have ended.
            self.collector = Collector::open(&self.pins)?;
        }
        if let Some(collector) = &mut self.collector {
            collector.collect()?;
        }
        let (events, last) = self.recent.since(self.position)?;
        let missed = last.saturating_sub(self.position).saturating_sub(events.len() as u64);
        // Events that were overwritten before this reader started do not count as missed.
        self.missed = Some(self.missed.map_or(0, |_| missed));
        self.position = last;
        if self.marks {
            self.recent.set_last_printed(last)?;
        }
        Ok(events)
    }

    /// Returns the requests since the last call.
    pub(crate) fn read_requests(&mut self) -> Result<Vec<RequestEvent>, CollectorError> {
        if self.requests.is_none() {
            self.requests = RequestReader::open(&self.pins, None)?;
        }
        let Some(requests) = &mut self.requests else { return Ok(Vec::new()) };
        Ok(requests.read(self.marks)?)
    }

    /// Returns the number of events and requests that were overwritten before the last read could return them.
    pub(crate) fn missed(&self) -> u64 {
        let requests = self.requests.as_ref().map_or(0, RequestReader::missed);
        self.missed.unwrap_or_default().saturating_add(requests)
    }

    /// Reports whether the last [`EventSubscriber::read`] left events in the ring buffer.
    pub(crate) fn has_more(&self) -> bool {
        self.collector.as_ref().is_some_and(Collector::has_more)
    }

    /// Waits until there may be more events. Returns false once the process that reads `output` has closed its end.
    pub(crate) fn wait(&self, output: BorrowedFd<'_>) -> Result<bool, Errno> {
        // An error or hang-up is reported in any case.
        let output = PollFd::new(output, PollFlags::empty());
        let events =
            self.collector.as_ref().map(|collector| PollFd::new(collector.as_fd(), PollFlags::POLLIN));
        let is_idle = events.is_some() && self.requests.is_none();
        let timeout: PollTimeout = if is_idle { NO_LOG_PERIOD } else { PERIOD }.into();
        let mut descriptors: Vec<_> = [Some(output), events].into_iter().flatten().collect();
        match poll(&mut descriptors, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(true),
            Err(errno) => return Err(errno),
        }
        let closed = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        let output = descriptors.first().and_then(PollFd::revents);
        Ok(!output.is_some_and(|output| output.intersects(closed)))
    }
}

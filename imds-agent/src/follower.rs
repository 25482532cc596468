//! Follows events, whichever process takes them from the programs.

use std::os::fd::{AsFd as _, BorrowedFd};

use imds_ebpf_common::Event;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    datapath::{pins::PinDir, recent::Recent},
    telemetry::{Collector, CollectorError},
};

/// Milliseconds between two looks for events that another process takes from the programs.
const PERIOD: u8 = 100;

/// A reader of events. What came last while nobody followed comes first.
pub struct Follower {
    pins: PinDir,
    recent: Recent,
    /// Where no other process takes events from the programs, this one does.
    collector: Option<Collector>,
    /// Number of the last event that was read.
    position: u64,
    /// How many came between the last two readings that were gone by then; `None` before the first.
    missed: Option<u64>,
    /// Whether what is read is shown to somebody for good.
    marks: bool,
}

impl Follower {
    /// Of the programs that are pinned in `pins`.
    pub fn open(pins: PinDir) -> Result<Self, CollectorError> {
        let recent = Recent::open(&pins)?;
        let position = recent.shown()?;
        let collector = Collector::open(&pins)?;
        Ok(Self { pins, recent, collector, position, missed: None, marks: true })
    }

    /// The same, from `earlier` events ago on. What is read so comes first for others all the same.
    pub fn open_last(pins: PinDir, earlier: u64) -> Result<Self, CollectorError> {
        let follower = Self::open(pins)?;
        let position = follower.recent.last()?.saturating_sub(earlier);
        Ok(Self { position, marks: false, ..follower })
    }

    /// What there is that was not read yet.
    pub fn read(&mut self) -> Result<Vec<Event>, CollectorError> {
        if self.collector.is_none() {
            // The agent may have ended.
            self.collector = Collector::open(&self.pins)?;
        }
        if let Some(collector) = &mut self.collector {
            collector.collect()?;
        }
        let (events, last) = self.recent.since(self.position)?;
        let missed = last.saturating_sub(self.position).saturating_sub(events.len() as u64);
        // Before the first reading nobody followed.
        self.missed = Some(self.missed.map_or(0, |_| missed));
        self.position = last;
        if self.marks {
            self.recent.set_shown(last)?;
        }
        Ok(events)
    }

    /// How many events came faster than they were read, so that what was read last lacks them.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.unwrap_or_default()
    }

    /// Reports whether there is more than [`Follower::read`] took.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.collector.as_ref().is_some_and(Collector::has_more)
    }

    /// Waits until there may be more events. Returns false once the process that reads `output` has closed its end.
    pub fn wait(&self, output: BorrowedFd<'_>) -> Result<bool, Errno> {
        // An error or hang-up is reported in any case.
        let output = PollFd::new(output, PollFlags::empty());
        let events =
            self.collector.as_ref().map(|collector| PollFd::new(collector.as_fd(), PollFlags::POLLIN));
        let timeout = if events.is_some() { PollTimeout::NONE } else { PERIOD.into() };
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

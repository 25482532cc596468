//! Follows events, whichever process takes them from the programs.

use std::{os::fd::AsFd as _, thread, time::Duration};

use imds_ebpf_common::Event;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    collector::{Collector, CollectorError},
    datapath::{pins::PinDir, recent::Recent},
};

/// How often it is looked for events that another process takes from the programs.
const PERIOD: Duration = Duration::from_millis(100);

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

    /// Waits until there may be more, but not for long.
    pub fn wait(&self) -> Result<(), Errno> {
        let Some(collector) = &self.collector else {
            thread::sleep(PERIOD);
            return Ok(());
        };
        match poll(&mut [PollFd::new(collector.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

//! Recent events, in pinned maps. The ring buffer of the programs has only one reader position, so one process reads it and
//! writes the events here, where any number of processes can read them.

use aya::maps::{Array, Map, MapData, MapError};
use imds_ebpf_common::{
    Event,
    event_log::{READ_POS, RECENT, RecentEvent, WRITE_POS},
    names::{MAP_RECENT, MAP_RECENT_IDX},
};

use crate::datapath::{
    object::{self, ObjectError},
    pin::dir::PinDir,
};

/// Maps of the recent events and of their positions.
pub struct Recent {
    events: Array<MapData, RecentEvent>,
    head: Array<MapData, u64>,
}

impl Recent {
    /// Opens the pinned maps of recent events.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        Ok(Self {
            events: object::open_map(pins, MAP_RECENT, Map::Array)?,
            head: object::open_map(pins, MAP_RECENT_IDX, Map::Array)?,
        })
    }

    /// Returns the number of the last event; 0 before the first.
    pub fn last(&self) -> Result<u64, MapError> {
        self.head.get(&WRITE_POS, 0)
    }

    /// Returns the number of the last event that a client has printed.
    pub fn last_printed(&self) -> Result<u64, MapError> {
        self.head.get(&READ_POS, 0)
    }

    /// Adds an event. Only one process at a time may call this.
    pub fn push(&mut self, event: Event) -> Result<(), MapError> {
        let number = self.last()?.saturating_add(1);
        self.events.set(slot(number), RecentEvent { number, event, number_again: number }, 0)?;
        self.head.set(WRITE_POS, number, 0)
    }

    /// Returns the events after number `after` that are not overwritten yet, and the number of the last event.
    pub fn since(&self, after: u64) -> Result<(Vec<Event>, u64), MapError> {
        let last = self.last()?;
        let first = after.max(last.saturating_sub(RECENT as u64)).saturating_add(1);
        let mut events = Vec::new();
        for number in first..=last {
            let recent = self.events.get(&slot(number), 0)?;
            // Skips entries that a newer event has overwritten in the meantime.
            if recent.number == number && recent.number_again == number {
                events.push(recent.event);
            }
        }
        Ok((events, last))
    }

    /// Records that a client has printed all events up to number `shown`.
    pub fn set_last_printed(&mut self, shown: u64) -> Result<(), MapError> {
        if shown > self.last_printed()? { self.head.set(READ_POS, shown, 0) } else { Ok(()) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the remainder is less than the number of slots")]
const fn slot(number: u64) -> u32 {
    (number % RECENT as u64) as u32
}

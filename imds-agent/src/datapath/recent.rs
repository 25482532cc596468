//! The last events, in pinned maps: so that as many as want to can follow them, while one process takes them from the ring
//! buffer, which has one reading position.

use aya::maps::{Array, Map, MapData, MapError};
use imds_ebpf_common::{
    Event,
    ledger::{LAST, RECENT, RecentEvent, SHOWN},
    names::{MAP_RECENT, MAP_RECENT_HEAD},
};

use super::{object::ObjectError, pins::PinDir};

/// The last events.
pub struct Recent {
    events: Array<MapData, RecentEvent>,
    head: Array<MapData, u64>,
}

impl Recent {
    /// Those that are pinned.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        let failed = |name| move |source| ObjectError::Map { name, source };
        let open = |name| MapData::from_pin(pins.map(name)).map(Map::Array).map_err(failed(name));
        Ok(Self {
            events: open(MAP_RECENT)?.try_into().map_err(failed(MAP_RECENT))?,
            head: open(MAP_RECENT_HEAD)?.try_into().map_err(failed(MAP_RECENT_HEAD))?,
        })
    }

    /// Number of the last one; 0 before the first.
    pub fn last(&self) -> Result<u64, MapError> {
        self.head.get(&LAST, 0)
    }

    /// Number of the last one that was shown to somebody.
    pub fn shown(&self) -> Result<u64, MapError> {
        self.head.get(&SHOWN, 0)
    }

    /// Adds one. Only one process at a time may.
    pub fn push(&mut self, event: Event) -> Result<(), MapError> {
        let number = self.last()?.saturating_add(1);
        self.events.set(slot(number), RecentEvent { number, event, number_again: number }, 0)?;
        self.head.set(LAST, number, 0)
    }

    /// Those after number `after`, and the number of the last; what is too old is no longer there.
    pub fn since(&self, after: u64) -> Result<(Vec<Event>, u64), MapError> {
        let last = self.last()?;
        let first = after.max(last.saturating_sub(RECENT as u64)).saturating_add(1);
        let mut events = Vec::new();
        for number in first..=last {
            let recent = self.events.get(&slot(number), 0)?;
            // Another one is there where it was overtaken meanwhile.
            if recent.number == number && recent.number_again == number {
                events.push(recent.event);
            }
        }
        Ok((events, last))
    }

    /// Notes that those up to number `shown` were shown to somebody.
    pub fn set_shown(&mut self, shown: u64) -> Result<(), MapError> {
        if shown > self.shown()? { self.head.set(SHOWN, shown, 0) } else { Ok(()) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "below the number of slots")]
const fn slot(number: u64) -> u32 {
    (number % RECENT as u64) as u32
}

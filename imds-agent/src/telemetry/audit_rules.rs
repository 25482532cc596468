//! Finds the exemption rule that audits a request. Events do not contain it.

use aya::maps::{HashMap, Map, MapData};
use imds_ebpf_common::{Address, Event, ExemptionKey, ExemptionRecord, Verdict, names::MAP_EXEMPT};

use super::event_record;
use crate::datapath::{
    object::{self, ObjectError},
    pin::dir::PinDir,
};

/// Map of exemptions, for lookups of single senders.
#[derive(Debug)]
pub(super) struct AuditRules(HashMap<MapData, ExemptionKey, ExemptionRecord>);

impl AuditRules {
    pub(super) fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        object::open_map(pins, MAP_EXEMPT, Map::HashMap).map(Self)
    }

    /// Returns the number of the rule that audits the request of an event. Returns `None` if the mode audits it, and if the
    /// exemption ended since the event.
    pub(super) fn find(&self, event: &Event) -> Option<u32> {
        if event.verdict != Verdict::Audited as u8 {
            return None;
        }
        let keys = event_record::senders(event).flat_map(|subject| {
            let addresses = [Address::from_ipv6(event.destination), Address::ANY];
            addresses.map(|address| ExemptionKey { address, subject })
        });
        let mut records = keys.filter_map(|key| self.0.get(&key, 0).ok());
        records.find(|record| record.verdict == Verdict::Audited as u32).map(|record| record.rule)
    }
}

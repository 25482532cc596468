//! Probes: test senders in the BPF maps. The programs count them separately and emit no events for them.

use std::cell::RefCell;

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use imds_ebpf_common::{
    Hook, ProbeRecord, Subject, Verdict,
    names::{MAP_PROBES, MAP_PROBING},
};

use super::VerifyError;
use crate::datapath::{object, pin::dir::PinDir};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum Treatment {
    /// The programs treat the probe like a pod without an exemption.
    Denied = 0,
    /// The programs treat the probe as an exempt sender.
    Exempt = ProbeRecord::EXEMPT,
    /// The programs treat the probe as an exempt sender, and `from_pod` sets the hash of passed packets.
    ExemptBehindBridge = ProbeRecord::EXEMPT | ProbeRecord::PASSES,
    /// The probe is a bridge. The programs treat it as exempt, and count only packets from it that
    /// `from_pod` has let pass.
    ExemptBridge = ProbeRecord::EXEMPT | ProbeRecord::BRIDGE,
}

/// Maps of the probes, which one run at a time uses.
pub(crate) struct Probes {
    maps: RefCell<ProbeMaps>,
}

struct ProbeMaps {
    records: HashMap<MapData, Subject, ProbeRecord>,
    count: Array<MapData, u32>,
}

impl Probes {
    /// Opens the pinned maps, and removes the entries of a run that was killed.
    pub(crate) fn open(pins: &PinDir) -> Result<Self, VerifyError> {
        let open = |name| MapData::from_pin(pins.map(name)).map_err(map_failed);
        let mut maps = ProbeMaps {
            records: Map::HashMap(open(MAP_PROBES)?).try_into().map_err(map_failed)?,
            count: Map::Array(open(MAP_PROBING)?).try_into().map_err(map_failed)?,
        };
        for subject in
            object::present(maps.records.keys()).collect::<Result<Vec<_>, _>>().map_err(map_failed)?
        {
            maps.records.remove(&subject).map_err(map_failed)?;
        }
        maps.count().map_err(map_failed)?;
        Ok(Self { maps: RefCell::new(maps) })
    }

    /// Makes `subject` a probe until the returned value is dropped.
    pub(crate) fn add(&self, subject: Subject, treatment: Treatment) -> Result<Probe<'_>, VerifyError> {
        let probe = Probe { probes: self, subject };
        probe.reset(treatment)?;
        self.maps.borrow_mut().count().map_err(map_failed)?;
        Ok(probe)
    }
}

impl ProbeMaps {
    /// Writes the number of probes to the map that the programs read. They skip the lookup if it is 0.
    fn count(&mut self) -> Result<(), MapError> {
        let count = object::present(self.records.keys()).count();
        self.count.set(0, u32::try_from(count).unwrap_or(u32::MAX), 0)
    }
}

/// A test sender, which is removed from the maps when this is dropped.
pub(crate) struct Probe<'p> {
    probes: &'p Probes,
    subject: Subject,
}

impl Probe<'_> {
    /// Changes how the programs treat the probe, and sets its counts to zero.
    pub(crate) fn reset(&self, treatment: Treatment) -> Result<(), VerifyError> {
        let record = ProbeRecord { flags: treatment as u32, ..ProbeRecord::default() };
        self.probes.maps.borrow_mut().records.insert(self.subject, record, 0).map_err(map_failed)
    }

    /// Returns how often a hook gave this verdict since the last reset.
    pub(crate) fn count(&self, hook: Hook, verdict: Verdict) -> u64 {
        let record = self.probes.maps.borrow().records.get(&self.subject, 0);
        let count =
            record.ok().and_then(|record| record.verdicts.get(hook as usize)?.get(verdict as usize).copied());
        count.unwrap_or(0)
    }

    /// Returns the first verdict that a hook gave since the last reset; `None` if it gave none.
    pub(crate) fn verdict(&self, hook: Hook) -> Option<Verdict> {
        Verdict::COUNTED.into_iter().find(|&verdict| self.count(hook, verdict) > 0)
    }

    pub(crate) fn total(&self, hook: Hook) -> u64 {
        Verdict::COUNTED.into_iter().map(|verdict| self.count(hook, verdict)).sum()
    }

    /// Returns a hook that denied the probe since the last reset.
    pub(crate) fn denied_at(&self) -> Option<Hook> {
        Hook::ALL.into_iter().find(|&hook| self.count(hook, Verdict::Denied) > 0)
    }
}

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        let mut maps = self.probes.maps.borrow_mut();
        let removed = maps.records.remove(&self.subject).and_then(|()| maps.count());
        if let Err(error) = removed {
            log::warn!("failed to remove a probe: {error}");
        }
    }
}

fn map_failed(source: MapError) -> VerifyError {
    VerifyError::Map { map: MAP_PROBES, source }
}

//! Metrics of the node and the agent, in the text formats of Prometheus.

mod exemptions_hash;
mod format;
mod process_metrics;
mod program_runs;
mod snapshot;

use std::collections::BTreeMap;

use imds_ebpf_common::{
    Address,
    event_log::{DenialKey, DenialRecord},
};

use self::format::Exposition;
pub(crate) use self::{
    exemptions_hash::exemptions_hash, format::Format, program_runs::RunTimeStats, snapshot::Snapshot,
};
use crate::{
    datapath::{maps::counters::Count, pin::dir::PinDir},
    encode::field_text,
};

/// Sums of denied and audited packets by namespace, endpoint, hook and verdict.
pub(crate) type Denied = BTreeMap<(String, DenialTo), Count>;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct DenialTo {
    address: Address,
    hook: u32,
    verdict: u32,
}

impl From<&DenialKey> for DenialTo {
    fn from(&DenialKey { address, hook, verdict, .. }: &DenialKey) -> Self {
        Self { address, hook, verdict }
    }
}

pub(crate) fn sum<E>(
    denials: impl Iterator<Item = Result<(DenialKey, DenialRecord), E>>,
) -> Result<Denied, E> {
    let mut denied = Denied::new();
    for denial in denials {
        let (key, record) = denial?;
        let key = (field_text(&record.namespace), DenialTo::from(&key));
        *denied.entry(key).or_default() += Count { packets: record.count, bytes: record.bytes };
    }
    Ok(denied)
}

pub(crate) fn encode(snapshot: &Snapshot, pins: &PinDir, format: Format) -> String {
    let mut exposition = Exposition::new(format);
    snapshot.add(&mut exposition);
    program_runs::add(pins, &mut exposition);
    process_metrics::add(&mut exposition);
    exposition.finish()
}

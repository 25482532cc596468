//! Check of `on_deny = "explain"`: names the reason if denied requests cannot be explained on this node.

use super::doctor_report::DoctorCheck;
use crate::{
    datapath::{
        maps::endpoint_maps,
        object::{self, Maps},
        pin::dir::PinDir,
    },
    telemetry::status,
};

/// Returns the check if the effective policy explains denials. It is never degraded, because the pods are denied anyway.
pub(crate) fn check(pins: &PinDir) -> Option<DoctorCheck> {
    let maps = object::is_loaded(pins).then(|| Maps::open(pins).ok()).flatten()?;
    let policy = maps.policy.get(&0, 0).ok()?;
    let (_, provider) = endpoint_maps::provider(&maps).ok()?;
    status::describe_explained(&policy, &provider).map(|text| DoctorCheck::ok("on_deny", text))
}

//! Qdiscs that accept no filter of the agent, on interfaces that need one.

use std::collections::BTreeMap;

use imds_ebpf_common::{AttachMode, InterfaceRecord, TcHook};

use super::{
    doctor_report::{DoctorCheck, or_ok},
    hooked_interfaces::HookedInterfaces,
};
use crate::{
    datapath::{
        DatapathError,
        attach::qdisc::{self, Qdisc},
        pin::dir::PinDir,
        sys::bpf,
    },
    node::{link::Link, netlink::Netlink},
};

const NAME: &str = "tc_qdiscs";

/// Lists the hooks to which no filter can be attached because of a qdisc that another program has added.
pub(crate) async fn checks(pins: &PinDir, netlink: &Netlink) -> Result<Vec<DoctorCheck>, DatapathError> {
    let interfaces = HookedInterfaces::read(pins, netlink).await?;
    let (qdiscs, has_tcx) = (qdisc::list(netlink).await?, bpf::has_tcx());
    let mut checks = Vec::new();
    for link in &interfaces.links {
        let record = interfaces.record(link);
        let needed = interfaces.hooks(link).filter(|&hook| {
            needs_filter(record.as_ref(), hook, has_tcx) && !interfaces.uplinks.is_optional(link, hook)
        });
        checks.extend(needed.filter_map(|hook| blocked(link, hook, &qdiscs, has_tcx)));
    }
    Ok(or_ok(checks, NAME, "none keeps the agent from an interface"))
}

/// Reports whether the hook needs a filter: without TCX, or if the agent has attached a filter or failed to attach its program.
fn needs_filter(record: Option<&InterfaceRecord>, hook: TcHook, has_tcx: bool) -> bool {
    match record {
        Some(record) => {
            let mode = record.attach_mode(hook);
            mode != AttachMode::Tcx as u8 && mode != AttachMode::Netkit as u8
        }
        None => !has_tcx,
    }
}

fn blocked(
    link: &Link,
    tc_hook: TcHook,
    qdiscs: &BTreeMap<u32, Qdisc>,
    has_tcx: bool,
) -> Option<DoctorCheck> {
    let (name, hook) = (&link.name, tc_hook.hook().name());
    let obstacle = qdiscs.get(&link.index)?.obstacle(tc_hook, has_tcx)?;
    let observed = format!("{hook} can't be attached to {name}: {obstacle}");
    let remedy = format!("pods that only {hook} covers are not denied; {}", obstacle.remedy(name));
    Some(DoctorCheck::degraded(NAME, observed, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_needed_without_links() {
        let needs = |record: Option<InterfaceRecord>, has_tcx| {
            needs_filter(record.as_ref(), TcHook::NodeEgress, has_tcx)
        };
        assert!(needs(None, false) && !needs(None, true));
        for (mode, expected) in [
            (AttachMode::None, true),
            (AttachMode::Clsact, true),
            (AttachMode::Tcx, false),
            (AttachMode::Netkit, false),
        ] {
            let record = InterfaceRecord { attach_modes: [0, mode as u8], ..InterfaceRecord::default() };
            assert_eq!(needs(Some(record), true), expected, "{mode:?}");
        }
    }
}

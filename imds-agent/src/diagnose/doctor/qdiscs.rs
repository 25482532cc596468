//! Qdiscs that accept no filter of the agent, on interfaces that need one.

use std::collections::BTreeMap;

use imds_ebpf_common::{AttachMode, InterfaceRecord, TcHook};

use super::{doctor_report::DoctorCheck, tc_programs::desired_hooks};
use crate::{
    config::Hooks,
    datapath::{
        DatapathError,
        attach::qdisc::{self, Qdisc},
        maps::interface_records,
        object::Maps,
        pin::dir::PinDir,
        sys::bpf,
    },
    node::{interface_role::Uplinks, link::Link, netlink::Netlink},
};

const NAME: &str = "tc_qdiscs";

/// Lists the hooks to which no filter can be attached because of a qdisc that another program has added.
pub(crate) async fn checks(pins: &PinDir, netlink: &Netlink) -> Result<Vec<DoctorCheck>, DatapathError> {
    let maps = Maps::open(pins).ok();
    let policy = maps.as_ref().and_then(|maps| maps.policy.get(&0, 0).ok());
    let hooks = policy.map_or_else(Hooks::default, |policy| Hooks::from_bits(policy.hooks));
    let links = netlink.links().await?;
    let uplinks = Uplinks::new(&netlink.endpoint_routes().await?, links.iter());
    let (qdiscs, has_tcx) = (qdisc::list(netlink).await?, bpf::has_tcx());
    let mut checks = Vec::new();
    for link in &links {
        let record = maps.as_ref().and_then(|maps| interface_records::get(maps, link.index));
        let desired = desired_hooks(link, record, &uplinks);
        let needed = desired.iter().filter(|&hook| {
            hooks.contains(hook.hook())
                && needs_filter(record.as_ref(), hook, has_tcx)
                && !uplinks.is_optional(link, hook)
        });
        checks.extend(needed.filter_map(|hook| blocked(link, hook, &qdiscs, has_tcx)));
    }
    if checks.is_empty() {
        checks.push(DoctorCheck::ok(NAME, "none keeps the agent from an interface"));
    }
    Ok(checks)
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

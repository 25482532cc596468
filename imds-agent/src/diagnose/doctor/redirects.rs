//! TC actions that send packets, or copies of them, to another interface of the node, where `node_egress` checks them again.

use std::collections::BTreeSet;

use imds_ebpf_common::Role;
use serde_json::Value;

use super::{
    doctor_report::{DoctorCheck, or_ok},
    rulesets::Rulesets,
};
use crate::{
    datapath::{maps::interface_records, object::Maps, pin::dir::PinDir},
    node::{
        link::LinkKind,
        netlink::{Netlink, NetlinkError},
    },
};

const NAME: &str = "tc_redirects";

/// Lists the `mirred` actions whose target has the hook `node_egress`. The packet's ingress interface is then the
/// interface of the action, like that of a packet from a pod.
pub(crate) async fn checks(
    rulesets: &Rulesets,
    pins: &PinDir,
    netlink: &Netlink,
) -> Result<Vec<DoctorCheck>, NetlinkError> {
    // An ifb only delays packets of another interface.
    let links = netlink.links().await?;
    let ifbs = links.iter().filter(|link| link.kind == LinkKind::Ifb).map(|link| link.name.clone());
    let excluded =
        Maps::open(pins).ok().and_then(|maps| interface_records::names(&maps, Role::Excluded).ok());
    let unhooked: BTreeSet<_> = ifbs.chain(excluded.unwrap_or_default()).collect();
    let checks = rulesets.actions.iter().filter_map(|action| check(action, &unhooked));
    Ok(or_ok(checks, NAME, "no mirred action sends packets to an interface with node_egress"))
}

/// Returns the check of an action, or `None` if it sends no packet to the egress of an interface with a hook.
fn check(action: &Value, unhooked: &BTreeSet<String>) -> Option<DoctorCheck> {
    let target = action["to_dev"].as_str().filter(|&name| !unhooked.contains(name))?;
    if action["kind"] != "mirred" || action["direction"] != "egress" {
        return None;
    }
    let (index, verb) = (&action["index"], action["mirred_action"].as_str()?);
    let observed = format!("tc action mirred index {index}: egress {verb} to {target}");
    let effect = if verb == "mirror" {
        "copies of allowed requests are dropped there, and counted as denials"
    } else {
        "node_egress denies requests of the node and of exempt pods there"
    };
    let remedy = format!(
        "{effect}: exclude {target} ([interfaces] exclude) if packets leave through it only by this action, because the \
         interface of the action has checked them"
    );
    Some(DoctorCheck::degraded(NAME, observed, remedy))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn egress_actions_to_hooked_interfaces_are_named() {
        let unhooked = BTreeSet::from(["ifb0".to_owned()]);
        let observed = |verb: &str, direction: &str, target: &str| {
            let action = json!({
                "kind": "mirred", "mirred_action": verb, "direction": direction, "to_dev": target, "index": 3,
            });
            check(&action, &unhooked).map(|check| check.observed)
        };
        let expected = "tc action mirred index 3: egress redirect to nic1";
        assert_eq!(observed("redirect", "egress", "nic1").as_deref(), Some(expected));
        assert!(observed("mirror", "egress", "mon0").is_some());
        assert_eq!(observed("redirect", "egress", "ifb0"), None);
        assert_eq!(observed("redirect", "ingress", "nic1"), None);
        assert!(check(&json!({ "kind": "skbedit", "index": 3 }), &unhooked).is_none());
    }
}

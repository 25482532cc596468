//! Checks of whole paths through the node, for a denied pod, exempt pods and the node itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use imds_ebpf_common::{ExemptionRecord, Hook, Role, Subject, SubjectKind, TcHook, names::MAP_EXEMPT};
use rtnetlink::packet_route::route::RouteType;

use super::{
    Enforced, PATH, VerifyError,
    attached::wait_attached,
    exits::lowest,
    fixture::{LinkName, TestDevice as _, TestPod},
    forwarding::{CONTROLS, Path},
    frames::{Frames, Mac},
    last_hook::LastHook,
    node_allow_calls, node_calls,
    probes::{Probe, Treatment},
    routes,
    verify_report::{Outcome, Skip, VerifyCheck},
};
use crate::{
    config::endpoint_set::Endpoint,
    datapath::object,
    diagnose::devices::{self, Device},
    node::{
        link::Link,
        netlink::{Netlink, outgoing},
    },
};

/// Reason for a failure without the `from_pod` hook, which sets the hash of passed packets.
const NO_HASH: &str = "denied at node_egress: exempt pods behind a bridge need `hooks.from_pod`";

/// State of the path checks, with the last hook attached.
pub(crate) struct Paths {
    last_hook: Result<LastHook, Skip>,
    devices: BTreeMap<u32, Device>,
    local: BTreeSet<IpAddr>,
    /// Names of excluded interfaces with a route to an endpoint.
    pub(crate) excluded: Vec<String>,
}

impl Paths {
    /// Attaches the last hook to the exits of the node.
    pub(crate) async fn new(enforced: &Enforced, netlink: &Netlink) -> Result<Self, VerifyError> {
        routes::remove(netlink).await?;
        let of_role = |role: Role| {
            let interfaces = enforced.status.interfaces.iter();
            interfaces
                .filter(move |interface| interface.role == role.name())
                .map(|interface| interface.ifindex)
        };
        let pods: BTreeSet<_> = of_role(Role::Pod).collect();
        let mut uplinks: BTreeSet<_> = of_role(Role::Uplink).collect();
        let (mut local, mut routed) = (BTreeSet::new(), BTreeSet::new());
        for destination in enforced.endpoints.iter().map(|endpoint| endpoint.address).chain(CONTROLS) {
            let Some(route) = netlink.route_to(destination).await? else { continue };
            if route.header.kind == RouteType::Local {
                local.insert(destination);
                continue;
            }
            let interfaces = outgoing(&route);
            uplinks.extend(&interfaces);
            if !CONTROLS.contains(&destination) {
                routed.extend(interfaces);
            }
        }
        let devices = devices::list(netlink).await?;
        let devices: BTreeMap<_, _> = devices.into_iter().map(|device| (device.link.index, device)).collect();
        let exits = lowest(&devices, uplinks.iter().copied(), &pods);
        let mut interfaces = enforced.status.interfaces.iter();
        let bypassed = interfaces.find(|interface| {
            let is_on_path = uplinks.contains(&interface.ifindex) || exits.contains(&interface.ifindex);
            let attachment = interface.attachment(Hook::NodeEgress.name());
            is_on_path
                && attachment.is_some_and(|attachment| attachment.is_attached() && !attachment.is_enforced())
        });
        let last_hook = if let Some(interface) = bypassed {
            Err(VerifyError::Bypassed(interface.name.clone()))
        } else {
            let exits = exits.iter().filter_map(|index| devices.get(index)).collect();
            LastHook::attach(&enforced.pins, netlink, exits).await
        };
        let last_hook = last_hook.map_err(|error| Skip::new(error.in_full()));
        let excluded = enforced.status.interfaces.iter().filter(|interface| {
            interface.role == Role::Excluded.name() && routed.contains(&interface.ifindex)
        });
        let excluded = excluded.map(|interface| interface.name.clone()).collect();
        Ok(Self { last_hook, devices, local, excluded })
    }

    pub(crate) async fn remove(&mut self, netlink: &Netlink) -> Result<(), VerifyError> {
        if let Ok(last_hook) = &mut self.last_hook {
            last_hook.detach(netlink).await;
        }
        Ok(routes::remove(netlink).await?)
    }

    pub(crate) async fn check(
        &mut self,
        enforced: &Enforced,
        netlink: &Netlink,
        pod: &Result<TestPod, Skip>,
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        let restriction = node_allow_calls::restriction(enforced)?;
        let node = match &restriction {
            Some(skip) => node_calls::skip(&enforced.endpoints, skip),
            None => node_calls::check(&mut self.last_hook, &enforced.endpoints, &self.local).await,
        };
        let mut open = Vec::new();
        for (endpoint, check) in enforced.endpoints.iter().zip(&node) {
            let is_local = self.local.contains(&endpoint.address);
            open.push((endpoint, skip_of_pods(check.outcome, is_local, restriction.is_some())));
        }
        let mut checks = self.check_pod(enforced, netlink, pod, &open).await?;
        checks.extend(node);
        Ok(checks)
    }

    async fn check_pod(
        &mut self,
        enforced: &Enforced,
        netlink: &Netlink,
        pod: &Result<TestPod, Skip>,
        endpoints: &[(&Endpoint, Option<Skip>)],
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        let ready = match (pod, &mut self.last_hook) {
            (Err(skip), _) => Err(skip.clone()),
            (_, Err(skip)) => Err(skip.clone()),
            (Ok(pod), Ok(last_hook)) => wait_ready(enforced, pod).await.map(|()| (pod, last_hook)),
        };
        let (pod, last_hook) = match ready {
            Ok(ready) => ready,
            Err(skip) => {
                let skip = Skip::new(skip.reason);
                let skipped = |(endpoint, _): &(&Endpoint, _)| {
                    VerifyCheck::skipped(PATH, "reaches the last hook", &skip)
                        .with_sender("exempt pod")
                        .with_endpoint(endpoint)
                };
                return Ok(endpoints.iter().map(skipped).collect());
            }
        };
        let exempt = object::present(enforced.maps.exempt.iter()).collect::<Result<Vec<_>, _>>();
        let exempt = exempt.map_err(|source| VerifyError::Map { map: MAP_EXEMPT, source })?;
        let ifindex = pod.interface().ifindex;
        let probe =
            enforced.probes.add(Subject::new(SubjectKind::Interface, ifindex.into()), Treatment::Denied)?;
        let frames = Frames { to: TestPod::HOST_MAC, from: TestPod::POD_MAC, marker: last_hook.marker() };
        let families = [true, false].map(|is_ipv4| {
            endpoints.iter().any(|(endpoint, skip)| endpoint.address.is_ipv4() == is_ipv4 && skip.is_none())
        });

        let routed = Path { pod, probe: &probe, bridge: None, frames, device_suffix: String::new() };
        let skips = routed.controls(netlink, last_hook, families, pod.interface()).await?;
        let open = with_skips(endpoints, &skips);
        let mut checks = Vec::new();
        if enforced.hooks.contains(Hook::FromPod) || enforced.hooks.contains(Hook::NodeEgress) {
            checks.extend(routed.check_denied(last_hook, &open).await?);
        }
        // Without exemptions, a firewall rule of the node that drops packets of pods is not a failure.
        checks.extend(routed.check_exempt(last_hook, &open, Treatment::Exempt, !exempt.is_empty()).await?);

        let bridges: BTreeSet<u64> = exempt
            .iter()
            .filter(|(_, record)| record.flags == ExemptionRecord::BRIDGE)
            .map(|(exemption, _)| exemption.subject.id)
            .collect();
        for (bridge, device) in bridges.iter().filter_map(|bridge| {
            let device = self.devices.get(&u32::try_from(*bridge).ok()?)?;
            Some((*bridge, device))
        }) {
            let at_bridge =
                enforced.probes.add(Subject::new(SubjectKind::Interface, bridge), Treatment::ExemptBridge)?;
            let needs_hash = enforced.hooks.contains(Hook::NodeEgress);
            let obstacle =
                (needs_hash && !enforced.hooks.contains(Hook::FromPod)).then(|| Skip::failed(NO_HASH));
            let on_bridge = Bridged { device, probe: &probe, at_bridge: &at_bridge, frames, obstacle };
            pod.join_bridge(netlink, device.link.index, device.mtu).await?;
            let result = on_bridge.check(netlink, last_hook, pod, endpoints, families).await;
            pod.leave_bridge(netlink).await?;
            routes::remove(netlink).await?;
            checks.extend(result?);
        }
        Ok(checks)
    }
}

/// Returns the reason why test packets of a pod can't reach the last hook of an endpoint. `node` is the result of the
/// node's own packets. `is_restricted`: `verify` sent none, because the allow list does not contain this process.
fn skip_of_pods(node: Outcome, is_local: bool, is_restricted: bool) -> Option<Skip> {
    let reason = match node {
        _ if is_local => "an address of this node",
        Outcome::Passed => return None,
        _ if is_restricted => "not tested: needs the test of the path of the node, see the sender node",
        Outcome::Failed | Outcome::Skipped => "the node itself does not reach it",
    };
    Some(Skip::new(reason))
}

/// Waits until the programs are attached to the test pod's link.
async fn wait_ready(enforced: &Enforced, pod: &TestPod) -> Result<(), Skip> {
    if let Some(skip) = pod.obstacle() {
        return Err(skip);
    }
    if enforced.hooks.contains(Hook::FromPod) {
        let is_followed = enforced.status.agent.running;
        wait_attached(TcHook::FromPod, pod.interface(), &enforced.maps, is_followed).await?;
    }
    Ok(())
}

/// Test pod whose link is a port of a bridge.
struct Bridged<'p> {
    device: &'p Device,
    probe: &'p Probe<'p>,
    at_bridge: &'p Probe<'p>,
    frames: Frames,
    /// Reason why no exempt pod behind a bridge is allowed.
    obstacle: Option<Skip>,
}

impl Bridged<'_> {
    async fn check(
        &self,
        netlink: &Netlink,
        last_hook: &mut LastHook,
        pod: &TestPod,
        endpoints: &[(&Endpoint, Option<Skip>)],
        families: [bool; 2],
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        let Link { index, name, .. } = &self.device.link;
        let bridge = LinkName { name: name.clone(), ifindex: *index };
        let to: Mac = self.device.address.as_slice().try_into().unwrap_or_default();
        let path = Path {
            pod,
            probe: self.probe,
            bridge: Some(self.at_bridge),
            frames: Frames { to, ..self.frames },
            device_suffix: format!(" on {name}"),
        };
        let skips = match &self.obstacle {
            Some(obstacle) => [(); 2].map(|()| Some(obstacle.clone())),
            None => path.controls(netlink, last_hook, families, &bridge).await?,
        };
        path.check_exempt(last_hook, &with_skips(endpoints, &skips), Treatment::ExemptBehindBridge, true)
            .await
    }
}

/// Combines the skip reasons of endpoints with those of their address families.
fn with_skips<'e>(
    endpoints: &[(&'e Endpoint, Option<Skip>)],
    families: &[Option<Skip>; 2],
) -> Vec<(&'e Endpoint, Option<Skip>)> {
    let with_skip = |(endpoint, skip): &(&'e Endpoint, Option<Skip>)| {
        let of_family = families.get(usize::from(endpoint.address.is_ipv6()));
        (*endpoint, skip.clone().or_else(|| of_family.cloned().flatten()))
    };
    endpoints.iter().map(with_skip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_of_pods_name_the_cause() {
        let reason = |node, is_local, is_restricted| {
            skip_of_pods(node, is_local, is_restricted).map(|skip| skip.reason)
        };
        let has = |reason: Option<String>, text: &str| reason.is_some_and(|reason| reason.contains(text));
        assert_eq!(reason(Outcome::Passed, false, false), None);
        assert!(has(reason(Outcome::Passed, true, false), "an address of this node"));
        assert!(has(reason(Outcome::Skipped, false, false), "does not reach it"));
        assert!(has(reason(Outcome::Failed, false, false), "does not reach it"));
        // A process that is not in the allow list tells nothing about the node's routes.
        assert!(has(reason(Outcome::Skipped, false, true), "see the sender node"));
        assert!(has(reason(Outcome::Skipped, true, true), "an address of this node"));
    }
}

//! Firewall rules, TC actions and devices of other owners that change the bit of the packet mark with which `node_egress`
//! identifies exempt pods behind a bridge.

use imds_ebpf_common::{Subject, SubjectKind, maps::MARK};
use serde_json::Value;

use super::{
    doctor_report::{DoctorCheck, MarkWriter, or_ok},
    mark_rules::{self, Effect},
    rulesets::Rulesets,
};
use crate::{
    datapath::{maps::exemption_maps, object::Maps, pin::dir::PinDir},
    diagnose::devices::{Device, MarkSource},
    node::link::{Link, LinkKind},
};

const RULES: &str = "mark_rules";
const TUNNELS: &str = "mark_tunnels";
/// Bits of the mark that a VXLAN-GBP header sets: policy, "applied" and "don't learn" (`VXLAN_GBP_MASK`,
/// include/net/vxlan.h).
const GBP_BITS: u32 = 0x0048_ffff;

/// The mark bit, and the bridges for whose packets it counts.
#[derive(Debug)]
pub(crate) struct MarkUse {
    bit: u32,
    /// Bridges that have an exempt pod's link as a port.
    bridges: Vec<(u32, String)>,
}

impl Default for MarkUse {
    fn default() -> Self {
        Self { bit: MARK, bridges: Vec::new() }
    }
}

impl MarkUse {
    /// Reads the bit and the exemptions from the pinned maps. If nothing is loaded, returns the default bit and no exemption.
    pub(crate) fn read(pins: &PinDir, devices: &[Device]) -> Self {
        let maps = Maps::open(pins).ok();
        let policy = maps.as_ref().and_then(|maps| maps.policy.get(&0, 0).ok());
        let bit = policy.map(|policy| policy.mark).filter(|&mark| mark != 0).unwrap_or(MARK);
        let exemptions = maps.as_ref().and_then(|maps| exemption_maps::read(maps).ok()).unwrap_or_default();
        let is_exempt = |link: &Link| {
            let subject = Subject::new(SubjectKind::Interface, link.index.into());
            exemptions.entries.keys().any(|exemption| exemption.subject == subject)
        };
        let links = || devices.iter().map(|device| &device.link);
        let has_exempt_port = |bridge: &&Link| {
            let mut ports = links().filter(|link| link.master == Some(bridge.index));
            bridge.kind == LinkKind::Bridge && ports.any(is_exempt)
        };
        let bridges = links().filter(has_exempt_port);
        Self { bit, bridges: bridges.map(|bridge| (bridge.index, bridge.name.clone())).collect() }
    }

    /// Number of the bit, as in `hooks.mark_bit`.
    pub(crate) fn number(&self) -> u32 {
        self.bit.trailing_zeros()
    }

    /// Reports whether the mark counts for packets from this bridge.
    pub(crate) fn exempts_on_bridge(&self, bridge: Option<u32>) -> bool {
        self.bridges.iter().any(|(index, _)| Some(*index) == bridge)
    }

    fn bridge_names(&self) -> String {
        self.bridges.iter().map(|(_, name)| &**name).collect::<Vec<_>>().join(", ")
    }
}

pub(crate) fn rules(rulesets: &Rulesets, mark: &MarkUse) -> Vec<DoctorCheck> {
    let chains = rulesets.chains();
    let rules = rulesets.rules.iter().filter_map(|rule| {
        let effect = mark_rules::rule_effect(&rule.body, mark.bit);
        let table_and_chain = Some((rule.chain.table.clone(), rule.chain.name.clone()));
        let hooks = chains.hooks(&rule.chain);
        let is_local = !hooks.is_empty() && hooks.iter().all(|hook| hook.is_local());
        (effect != Effect::Unchanged).then(|| check(&rule.text, table_and_chain, effect, is_local, mark))
    });
    let actions = rulesets.actions.iter().filter_map(|action| {
        let effect = mark_rules::action_effect(action, mark.bit);
        (effect != Effect::Unchanged).then(|| check(&action_text(action), None, effect, false, mark))
    });
    let none = rulesets.none(&format!("none writes bit {} of the packet mark", mark.number()));
    or_ok(rules.chain(actions), RULES, none)
}

fn action_text(action: &Value) -> String {
    let (kind, index) = (action["kind"].as_str().unwrap_or_default(), &action["index"]);
    format!("tc action {kind} index {index}")
}

fn check(
    text: &str,
    table_and_chain: Option<(String, String)>,
    effect: Effect,
    is_local: bool,
    mark: &MarkUse,
) -> DoctorCheck {
    let number = mark.number();
    let (table, chain) = table_and_chain.unzip();
    let position = chain.as_ref().map(|chain| format!(" (chain {chain})")).unwrap_or_default();
    let observed = format!("{text}{position}: {} bit {number} of the packet mark", effect.verb());
    let writer = MarkWriter { table, chain, text: text.to_owned(), effect: effect.into(), bit: number };
    let check = if is_local {
        DoctorCheck::ok(RULES, format!("{observed}; no effect: this chain sees only the node's own packets"))
    } else if mark.bridges.is_empty() {
        let note = "no effect: the mark counts only for exempt pods behind a bridge, and there is none";
        DoctorCheck::ok(RULES, format!("{observed}; {note}"))
    } else {
        let consequence = consequence(effect, &mark.bridge_names());
        let remedy = format!(
            "{consequence}; set hooks.mark_bit to a bit that no rule writes, or exclude {:#x} in the mask of the rule",
            mark.bit
        );
        DoctorCheck::degraded(RULES, observed, remedy)
    };
    DoctorCheck { mark: Some(writer), ..check }
}

fn consequence(effect: Effect, bridges: &str) -> String {
    let opens = format!(
        "a pod behind {bridges} that is not exempt can pass node_egress with requests that a Service or another DNAT rule sends to \
         an endpoint, if the node masquerades them"
    );
    let closes = format!("exempt pods behind {bridges} can be denied at node_egress");
    match effect {
        Effect::Set => opens,
        Effect::Cleared => closes,
        Effect::Changed | Effect::Unchanged => format!("{opens}, and {closes}"),
    }
}

/// Lists the devices that let a sender choose the mark of its packets.
pub(crate) fn tunnels(devices: &[Device], mark: &MarkUse) -> Vec<DoctorCheck> {
    let sources = devices.iter().filter_map(|device| Some((device, device.mark_source?)));
    let checks = sources.map(|(device, source)| tunnel(device, source, mark));
    or_ok(checks, TUNNELS, "no VXLAN device with gbp, no netkit device with scrub none")
}

fn tunnel(device: &Device, source: MarkSource, mark: &MarkUse) -> DoctorCheck {
    let (name, number) = (&device.link.name, mark.number());
    let observed = match source {
        MarkSource::Gbp => format!("{name} is a VXLAN device with gbp: a packet's sender chooses its mark"),
        MarkSource::NetkitScrubNone => {
            format!("{name} is a netkit device with scrub none: its pod chooses the mark of its packets")
        }
    };
    if source == MarkSource::Gbp && mark.bit & GBP_BITS == 0 {
        return DoctorCheck::ok(TUNNELS, format!("{observed}; no effect: gbp can't set bit {number}"));
    }
    if !mark.exempts_on_bridge(device.link.master) {
        let note = "no effect: the device is no port of a bridge with an exempt pod";
        return DoctorCheck::ok(TUNNELS, format!("{observed}; {note}"));
    }
    let remedy = match source {
        MarkSource::Gbp => {
            "a sender that reaches the tunnel can set the mark bit and pass node_egress as an exempt pod of the same bridge: \
             remove gbp from the device, move the exempt pod off the bridge, or set hooks.mark_bit to 24 or above"
        }
        MarkSource::NetkitScrubNone => {
            "from_pod clears the mark bit of requests to protected endpoints, but not of requests to a Service that leads to \
             one: such a request can pass node_egress as an exempt pod of the same bridge; use scrub default, or move the \
             exempt pod off the bridge"
        }
    };
    DoctorCheck::degraded(TUNNELS, observed, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::doctor::doctor_report::State;

    fn on(bridges: &[(u32, &str)]) -> MarkUse {
        let bridges = bridges.iter().map(|&(index, name)| (index, name.to_owned()));
        MarkUse { bit: MARK, bridges: bridges.collect() }
    }

    fn states(chain: &str, mark: &MarkUse) -> (State, String) {
        let listing = format!(
            "*mangle\n:{chain} ACCEPT [0:0]\n:USER - [0:0]\n-A {chain} -j USER\n-A USER -j MARK --set-xmark 0x1000/0x1000\n"
        );
        let [check] = &rules(&Rulesets::from_listing(&listing), mark)[..] else { panic!("one check") };
        (check.state, check.remedy.clone().unwrap_or_else(|| check.observed.clone()))
    }

    #[test]
    fn rules_matter_for_bridged_exempt_pods() {
        let (state, note) = states("PREROUTING", &on(&[]));
        assert!(state == State::Ok && note.contains("there is none"), "{note}");
        let (state, note) = states("PREROUTING", &on(&[(3, "cni0")]));
        assert!(state == State::Degraded && note.contains("behind cni0"), "{note}");
        let (state, note) = states("OUTPUT", &on(&[(3, "cni0")]));
        assert!(state == State::Ok && note.contains("only the node's own"), "{note}");
    }

    #[test]
    fn tunnels_matter_as_bridge_ports() {
        let device = |master, mark_source| {
            let link = Link { name: "vx0".to_owned(), master, ..Link::with_index(7) };
            Device { mark_source: Some(mark_source), ..Device::new(link) }
        };
        let state = |device: Device, mark: &MarkUse| {
            let [check] = &tunnels(&[device], mark)[..] else { panic!("one check") };
            assert!(check.observed.starts_with("vx0 is a "), "{check:?}");
            check.state
        };
        let used = on(&[(3, "cni0")]);
        for source in [MarkSource::Gbp, MarkSource::NetkitScrubNone] {
            assert_eq!(state(device(Some(3), source), &used), State::Degraded);
            assert_eq!(state(device(Some(4), source), &used), State::Ok);
            assert_eq!(state(device(None, source), &used), State::Ok);
            assert_eq!(state(device(Some(3), source), &on(&[])), State::Ok);
        }
        let high = MarkUse { bit: 1 << 24, ..on(&[(3, "cni0")]) };
        assert_eq!(state(device(Some(3), MarkSource::Gbp), &high), State::Ok);
        assert_eq!(tunnels(&[], &used)[0].state, State::Ok);
    }
}

//! Programs of other owners at the TC and netkit hooks that the agent uses, and at XDP, which runs before them.

use std::collections::{BTreeMap, BTreeSet};

use aya::programs::loaded_programs;
use imds_ebpf_common::{TcHook, names::TC_PROGRAMS};

use super::{
    doctor_report::{DoctorCheck, Program, or_ok},
    hooked_interfaces::HookedInterfaces,
};
use crate::{
    datapath::{
        DatapathError,
        attach::clsact,
        object,
        pin::dir::{self, AttachPoint, PinDir},
        sys::bpf,
    },
    diagnose::devices::Device,
    node::{
        link::{Link, LinkKind},
        netlink::Netlink,
    },
};

const OF_INTERFACES: &str = "tc_programs";
const XDP: &str = "xdp_programs";

/// One program at a hook, of the agent or of another owner.
pub(crate) struct HookProgram {
    pub(crate) name: Option<String>,
    pub(crate) id: Option<u32>,
    pub(crate) kind: String,
    pub(crate) is_ours: bool,
    /// True if the agent can't place its filter before this one.
    pub(crate) is_stuck: bool,
}

/// Checks the hooks of all interfaces that have or need programs of the agent.
pub(crate) async fn check_interfaces(
    pins: &PinDir,
    netlink: &Netlink,
    devices: &[Device],
) -> Result<Vec<DoctorCheck>, DatapathError> {
    let interfaces = HookedInterfaces::read(pins, netlink).await?;
    let (ours, names) = (pinned_programs(pins), names());
    let (mut checks, mut of_xdp) = (Vec::new(), Vec::new());
    let (mut count, mut pods) = (0_usize, 0_usize);
    for link in &interfaces.links {
        for hook in interfaces.hooks(link) {
            count += 1;
            let point = AttachPoint { ifindex: link.index, hook };
            if hook == TcHook::FromPod {
                pods += 1;
                let device = devices.iter().find(|device| device.link.index == link.index);
                of_xdp.extend(device.iter().flat_map(|device| xdp(device, &names, interfaces.is_loaded())));
            }
            if hook == TcHook::FromPod && link.kind == LinkKind::Netkit {
                // The kernel rejects the query for a device that is not the primary one of its pair: it has no peer hook.
                let programs = bpf::entries(link.index, bpf::MprogHook::NetkitPeer).unwrap_or_default();
                let entries = entries("netkit", programs, pins, point, &ours, &names);
                checks.extend(check_programs(link, "peer", &entries));
            }
            // A kernel without TCX returns an error, and has no TCX programs.
            let programs = bpf::entries(link.index, point.tcx_hook()).unwrap_or_default();
            let mut entries = entries("tcx", programs, pins, point, &ours, &names);
            let mut filters = clsact::filters(netlink, point).await?;
            // A filter of another kind lists its inner parts too (the hash tables of u32). All filters of one priority are of
            // one kind.
            filters.dedup_by(|one, other| one.kind != "bpf" && one.priority == other.priority);
            for filter in filters {
                let is_stuck = !bpf::has_tcx() && filter.priority == 1 && !filter.can_share_priority();
                entries.push(HookProgram {
                    is_ours: filter.is_agent_filter(),
                    is_stuck,
                    name: filter.name,
                    id: filter.program,
                    kind: filter.kind,
                });
            }
            let hook = match point.hook {
                TcHook::FromPod => "ingress",
                TcHook::NodeEgress => "egress",
            };
            checks.extend(check_programs(link, hook, &entries));
        }
    }
    let mut checks =
        or_ok(checks, OF_INTERFACES, format!("no other programs at {count} hooks of interfaces"));
    checks.extend(or_ok(of_xdp, XDP, format!("none at {pods} pod interfaces")));
    Ok(checks)
}

/// Checks of the XDP programs of a pod's host-side interface, which see the pod's frames before every TC program.
fn xdp<'a>(
    device: &'a Device,
    names: &'a BTreeMap<u32, String>,
    is_loaded: bool,
) -> impl Iterator<Item = DoctorCheck> + 'a {
    device.xdp.iter().map(move |&id| {
        let program = Program {
            name: names.get(&id).cloned(),
            id: Some(id),
            kind: "xdp".to_owned(),
            at: device.link.name.clone(),
            hook: "xdp",
            position: 1,
            count: 1,
            first: is_loaded.then_some(true),
        };
        let remedy = format!(
            "the program sees the pod's frames before from_pod: frames that it sends on with XDP_TX or XDP_REDIRECT pass neither \
             from_pod nor node_egress; the socket hook still denies ordinary calls; to remove the program: `ip link set dev {} xdp \
             off`",
            device.link.name
        );
        DoctorCheck { program: Some(program.clone()), ..DoctorCheck::degraded(XDP, program.to_string(), remedy) }
    })
}

/// Describes programs of a hook on which links are ordered, in the order in which they run.
fn entries(
    kind: &str,
    programs: Vec<bpf::HookEntry>,
    pins: &PinDir,
    point: AttachPoint,
    ours: &BTreeSet<u32>,
    names: &BTreeMap<u32, String>,
) -> Vec<HookProgram> {
    let pinned = dir::link_at(&pins.link(point));
    let entry = |entry: bpf::HookEntry| HookProgram {
        name: names.get(&entry.program).cloned(),
        id: Some(entry.program),
        kind: kind.to_owned(),
        is_ours: ours.contains(&entry.program) || pinned.is_some_and(|pinned| pinned.id == entry.link),
        is_stuck: false,
    };
    programs.into_iter().map(entry).collect()
}

fn check_programs(link: &Link, hook: &'static str, entries: &[HookProgram]) -> Vec<DoctorCheck> {
    let check = |program: Program, is_stuck| {
        let observed = program.to_string();
        let check = match program.first {
            Some(true) => {
                let command = match &*program.kind {
                    "tcx" | "netkit" => "`bpftool link detach`".to_owned(),
                    _ => format!("`tc filter delete dev {} {hook}`", link.name),
                };
                let remedy = format!(
                    "the program can let packets pass {} that the agent would deny: a running agent moves its program to the head \
                     of the hook if the kernel allows that, otherwise remove the other program ({command})",
                    link.name
                );
                DoctorCheck::degraded(OF_INTERFACES, observed, remedy)
            }
            None if is_stuck => {
                let remedy = "without TCX (Linux 6.6) the agent cannot place its program before this one: give it another priority \
                              than 1";
                DoctorCheck::degraded(OF_INTERFACES, observed, remedy)
            }
            Some(false) | None => DoctorCheck::ok(OF_INTERFACES, observed),
        };
        DoctorCheck { program: Some(program), ..check }
    };
    let programs = foreign(entries, &link.name, hook);
    programs.map(|(program, entry)| check(program, entry.is_stuck)).collect()
}

pub(crate) fn foreign<'a>(
    entries: &'a [HookProgram],
    at: &str,
    hook: &'static str,
) -> impl Iterator<Item = (Program, &'a HookProgram)> {
    let ours = entries.iter().position(|entry| entry.is_ours);
    let (at, of) = (at.to_owned(), entries.len());
    (0..).zip(entries).filter(|(_, entry)| !entry.is_ours).map(move |(index, entry)| {
        let (name, kind) = (entry.name.clone(), entry.kind.clone());
        let first = ours.map(|ours| index < ours);
        (
            Program { name, id: entry.id, kind, at: at.clone(), hook, position: index + 1, count: of, first },
            entry,
        )
    })
}

fn pinned_programs(pins: &PinDir) -> BTreeSet<u32> {
    TC_PROGRAMS.into_iter().filter_map(|name| object::pinned_program(pins, name).ok()).collect()
}

/// Returns the names of all loaded programs by id; empty without `CAP_SYS_ADMIN`.
pub(crate) fn names() -> BTreeMap<u32, String> {
    let programs = loaded_programs().flatten();
    programs.filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, is_ours: bool) -> HookProgram {
        HookProgram {
            name: Some(name.to_owned()),
            id: Some(7),
            kind: "tcx".to_owned(),
            is_ours,
            is_stuck: false,
        }
    }

    #[test]
    fn positions_of_foreign_programs() {
        let entries = [entry("a", false), entry("imds_from_pod", true), entry("b", false)];
        let observed: Vec<_> =
            foreign(&entries, "veth0", "ingress").map(|(program, _)| program.to_string()).collect();
        let expected = [
            "tcx a (id 7) at ingress of veth0, position 1 of 3, before the agent's program",
            "tcx b (id 7) at ingress of veth0, position 3 of 3, after the agent's program",
        ];
        assert_eq!(observed, expected);
        let alone = [entry("a", false)];
        let (program, _) = foreign(&alone, "veth0", "ingress").next().unwrap();
        assert_eq!((program.position, program.count, program.first), (1, 1, None));
    }
}

//! Programs of others at the hooks that are the agent's, or would be.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

use aya::programs::loaded_programs;
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
};
use imds_ebpf_common::{
    TcHookSet,
    names::{SOCKET_LINKS, TC_PROGRAMS},
};

use super::report::{Check, Program};
use crate::{
    config::{Hooks, Interfaces},
    datapath::{
        DatapathError,
        bpf::{self, Direction},
        cgroup_order, clsact,
        object::{self, Maps},
        pins::{self, AttachPoint, PinDir},
        records,
    },
    node::{cgroup, links::Link, netlink::Netlink},
    state::{self, Uplinks},
};

const OF_INTERFACES: &str = "tc_programs";
const OF_CGROUP: &str = "cgroup_programs";
/// The hooks of sockets, in the order of their links.
const SOCKET_HOOKS: [bpf_attach_type; 4] =
    [BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG];

/// One program at a hook.
struct Entry {
    name: Option<String>,
    id: Option<u32>,
    kind: String,
    is_ours: bool,
    /// Whether filters can't be put before it.
    is_stuck: bool,
}

/// Those at the TC hooks of interfaces that are guarded or would be.
pub(super) async fn of_interfaces(pins: &PinDir, netlink: &Netlink) -> Result<Vec<Check>, DatapathError> {
    let maps = Maps::open(pins).ok();
    let policy = maps.as_ref().and_then(|maps| maps.policy.get(&0, 0).ok());
    let hooks = policy.map_or_else(Hooks::default, |policy| Hooks::from_bits(policy.hooks));
    let ours = pinned_programs(pins);
    let links = netlink.links().await?;
    let (names, uplinks) = (names(), Uplinks::new(netlink.uplinks().await?, links.iter()));
    let mut checks = Vec::new();
    let mut count = 0_usize;
    for link in links {
        let record = maps.as_ref().and_then(|maps| records::get(maps, link.index));
        let desired = record.map_or_else(
            || state::assign(&link, &uplinks, &Interfaces::default(), false).hooks,
            |record| TcHookSet::from_bits(record.hooks),
        );
        for edge in desired.iter().filter(|edge| hooks.has(edge.hook())) {
            count += 1;
            let spot = AttachPoint { ifindex: link.index, edge };
            let mut entries = tcx(pins, spot, &ours, &names);
            let mut filters = clsact::filters(netlink, spot).await?;
            // Others than BPF's have inner parts of their own (u32's tables), and all of a priority are of one kind.
            filters.dedup_by(|one, other| one.kind != "bpf" && one.priority == other.priority);
            for filter in filters {
                let is_stuck = !bpf::has_tcx() && filter.priority == 1 && !filter.takes_company();
                entries.push(Entry {
                    is_ours: filter.is_ours(),
                    is_stuck,
                    name: filter.name,
                    id: filter.program,
                    kind: filter.kind,
                });
            }
            checks.extend(judge(&link, spot.direction(), &entries));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(OF_INTERFACES, format!("no others at {count} interfaces")));
    }
    Ok(checks)
}

/// Programs of TCX, which run before all filters.
fn tcx(pins: &PinDir, spot: AttachPoint, ours: &BTreeSet<u32>, names: &BTreeMap<u32, String>) -> Vec<Entry> {
    let pinned = pins::link_at(&pins.link(spot));
    // A kernel without TCX answers with an error: then there is nothing.
    let entries = bpf::tcx_entries(spot.ifindex, spot.direction()).unwrap_or_default();
    let entry = |entry: bpf::Entry| Entry {
        name: names.get(&entry.program).cloned(),
        id: Some(entry.program),
        kind: "tcx".to_owned(),
        is_ours: ours.contains(&entry.program) || pinned.is_some_and(|pinned| pinned.id == entry.link),
        is_stuck: false,
    };
    entries.into_iter().map(entry).collect()
}

fn judge(link: &Link, direction: Direction, entries: &[Entry]) -> Vec<Check> {
    let hook = match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    let check = |program: Program, is_stuck| {
        let found = program.to_string();
        let check = match program.is_first {
            Some(true) => {
                let remedy = format!(
                    "it can let packets pass that the agent would deny: an agent that runs gets in front where that can \
                     be done, else remove it (`bpftool net detach`, `tc filter delete dev {} {hook}`)",
                    link.name
                );
                Check::degraded(OF_INTERFACES, found, remedy)
            }
            None if is_stuck => {
                let remedy = "the agent can't get in front of it without TCX (Linux 6.6): give it another priority than 1";
                Check::degraded(OF_INTERFACES, found, remedy)
            }
            Some(false) | None => Check::ok(OF_INTERFACES, found),
        };
        Check { program: Some(program), ..check }
    };
    let programs = foreign(entries, &link.name, hook);
    programs.map(|(program, entry)| check(program, entry.is_stuck)).collect()
}

/// The others' programs among those of a hook.
fn foreign<'a>(
    entries: &'a [Entry],
    at: &str,
    hook: &'static str,
) -> impl Iterator<Item = (Program, &'a Entry)> {
    let ours = entries.iter().position(|entry| entry.is_ours);
    let (at, of) = (at.to_owned(), entries.len());
    (0..).zip(entries).filter(|(_, entry)| !entry.is_ours).map(move |(index, entry)| {
        let (name, kind) = (entry.name.clone(), entry.kind.clone());
        let is_first = ours.map(|ours| index < ours);
        (Program { name, id: entry.id, kind, at: at.clone(), hook, place: index + 1, of, is_first }, entry)
    })
}

/// Those on the cgroup whose sockets are guarded, or would be.
pub(super) fn of_cgroup(pins: &PinDir) -> Result<Vec<Check>, DatapathError> {
    let links = SOCKET_LINKS.map(|name| pins::link_at(&pins.named_link(name)));
    let guarded = links.iter().flatten().find_map(bpf::Link::cgroup);
    let Some(path) = path(guarded) else {
        return Ok(vec![Check::ok(OF_CGROUP, "no cgroup is guarded, or would be")]);
    };
    let shown = path.display().to_string();
    let cgroup = File::open(&path).map_err(pins::io_error("open the cgroup", &path))?;
    let names = names();
    let mut checks = Vec::new();
    for ((hook, attach_type), link) in SOCKET_LINKS.into_iter().zip(SOCKET_HOOKS).zip(links) {
        let programs = match bpf::cgroup_programs(&cgroup, attach_type) {
            Ok(programs) => programs,
            Err(error) => {
                let found = format!("{hook} of {shown} can't be asked: {error}");
                return Ok(vec![Check::degraded(
                    OF_CGROUP,
                    found,
                    "run this as root, or with the agent's capabilities",
                )]);
            }
        };
        let entry = |id| Entry {
            name: names.get(&id).cloned(),
            id: Some(id),
            kind: "cgroup".to_owned(),
            is_ours: link.is_some_and(|link| link.program == id),
            is_stuck: false,
        };
        let entries: Vec<_> = programs.ids.iter().copied().map(entry).collect();
        let behind = link
            .and_then(|link| cgroup_order::program_behind(&cgroup, attach_type, link.program).ok().flatten());
        checks.extend(foreign(&entries, &shown, hook).map(|(program, _)| {
            let found = program.to_string();
            let check = if programs.exclusive().is_some() {
                let found = format!("{found}, attached without BPF_F_ALLOW_MULTI");
                let remedy = format!("the agent cannot attach its {hook} program beside it, the other hooks run: remove \
                                      it (`bpftool cgroup detach`), or attach it with BPF_F_ALLOW_MULTI");
                Check::degraded(OF_CGROUP, found, remedy)
            } else if behind.is_some() && program.is_first == Some(false) {
                let remedy = "it can change the destination after the agent's program judged it: an agent that runs moves \
                              its program to the end";
                Check::degraded(OF_CGROUP, found, remedy)
            } else {
                Check::ok(OF_CGROUP, found)
            };
            Check { program: Some(program), ..check }
        }));
    }
    if checks.is_empty() {
        checks.push(Check::ok(OF_CGROUP, format!("no others at {shown}")));
    }
    Ok(checks)
}

/// The cgroup with this id; without one, the root of the hierarchy.
fn path(guarded: Option<u64>) -> Option<PathBuf> {
    let root = cgroup::root().ok()??;
    match guarded {
        Some(id) if root.metadata().is_ok_and(|metadata| metadata.ino() != id) => cgroup::path_of(id).ok()?,
        Some(_) | None => Some(root),
    }
}

/// Ids of the agent's programs on interfaces.
fn pinned_programs(pins: &PinDir) -> BTreeSet<u32> {
    TC_PROGRAMS.into_iter().filter_map(|name| object::pinned_program(pins, name).ok()).collect()
}

/// Names of all programs, as far as the kernel tells: that takes `CAP_SYS_ADMIN`.
fn names() -> BTreeMap<u32, String> {
    let programs = loaded_programs().flatten();
    programs.filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, is_ours: bool) -> Entry {
        Entry { name: Some(name.to_owned()), id: Some(7), kind: "tcx".to_owned(), is_ours, is_stuck: false }
    }

    #[test]
    fn places_of_others() {
        let entries = [entry("a", false), entry("imds_from_pod", true), entry("b", false)];
        let found: Vec<_> =
            foreign(&entries, "veth0", "ingress").map(|(program, _)| program.to_string()).collect();
        let expected = [
            "tcx a (id 7) at ingress of veth0, place 1 of 3, before the agent's",
            "tcx b (id 7) at ingress of veth0, place 3 of 3, after the agent's",
        ];
        assert_eq!(found, expected);
        let alone = [entry("a", false)];
        let (program, _) = foreign(&alone, "veth0", "ingress").next().unwrap();
        assert_eq!((program.place, program.of, program.is_first), (1, 1, None));
    }
}

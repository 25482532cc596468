//! Programs of other owners on the cgroup of the socket hook.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya_obj::generated::{
    BPF_F_ALLOW_MULTI,
    bpf_attach_type::{
        self, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET4_CONNECT,
        BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
    },
};
use imds_ebpf_common::names::SOCKET_LINKS;

use super::{
    doctor_report::{DoctorCheck, Program, or_ok},
    tc_programs::{HookProgram, foreign, names},
};
use crate::{
    datapath::{
        DatapathError,
        pin::dir::{self, PinDir},
        sys::bpf::{self, CgroupPrograms},
    },
    escape::escape_path,
    node::cgroup,
};

const NAME: &str = "cgroup_programs";
/// Hooks that can refuse a call or change its destination.
const CALLS: [(&str, bpf_attach_type); 4] = [
    ("connect4", BPF_CGROUP_INET4_CONNECT),
    ("connect6", BPF_CGROUP_INET6_CONNECT),
    ("sendmsg4", BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", BPF_CGROUP_UDP6_SENDMSG),
];
/// Hooks that can only drop a packet: it passes if every program agrees (`bpf_prog_run_array_cg`, kernel/bpf/cgroup.c).
const PACKETS: [(&str, bpf_attach_type); 2] =
    [("ingress", BPF_CGROUP_INET_INGRESS), ("egress", BPF_CGROUP_INET_EGRESS)];

/// Lists the programs of other owners, and names those that keep the agent's programs off a hook.
pub(crate) fn programs(pins: &PinDir) -> Result<Vec<DoctorCheck>, DatapathError> {
    let links = SOCKET_LINKS.map(|name| dir::link_at(&pins.named_link(name)));
    let Some((root, path)) = path(links.iter().flatten().find_map(bpf::Link::cgroup)) else {
        return Ok(vec![DoctorCheck::ok(NAME, "no cgroup for the agent's programs was found")]);
    };
    let directory = File::open(&path).map_err(dir::io_error("open the cgroup", &path))?;
    let cgroup = Cgroup { root, path, directory, ours: agent_programs(pins)? };
    let mut checks = Vec::new();
    for (hook, attach_type) in CALLS.into_iter().chain(PACKETS) {
        match cgroup.checks(hook, attach_type) {
            Ok(observed) => checks.extend(observed),
            Err(error) => {
                let observed = format!("failed to query {hook} of {}: {error}", escape_path(&cgroup.path));
                let remedy = "run `imds-agent doctor` as root, or with the agent's capabilities";
                return Ok(vec![DoctorCheck::degraded(NAME, observed, remedy)]);
            }
        }
    }
    Ok(or_ok(checks, NAME, format!("no other programs at {}", escape_path(&cgroup.path))))
}

struct Cgroup {
    root: PathBuf,
    path: PathBuf,
    directory: File,
    ours: BTreeSet<u32>,
}

impl Cgroup {
    fn checks(&self, hook: &'static str, attach_type: bpf_attach_type) -> io::Result<Vec<DoctorCheck>> {
        let own = bpf::cgroup_programs(&self.directory, attach_type)?;
        let effective = bpf::effective_programs(&self.directory, attach_type)?;
        let names = names();
        let entry = |id| HookProgram {
            name: names.get(&id).cloned(),
            id: Some(id),
            kind: "cgroup".to_owned(),
            is_ours: self.ours.contains(&id),
            is_stuck: false,
        };
        let entries: Vec<_> = effective.into_iter().map(entry).collect();
        let exclusive = self.exclusive(&own, attach_type);
        let is_call = CALLS.iter().any(|(_, of_call)| *of_call == attach_type);
        let at = escape_path(&self.path);
        let checks = foreign(&entries, &at, hook).map(|(program, entry)| {
            if entry.id.is_some() && entry.id == exclusive {
                return alone(program, hook);
            }
            let check = match remedy(&program, entry, &own, is_call) {
                Some(remedy) => DoctorCheck::degraded(NAME, program.to_string(), remedy),
                None => DoctorCheck::ok(NAME, program.to_string()),
            };
            DoctorCheck { program: Some(program), ..check }
        });
        Ok(checks.collect())
    }

    /// Returns the program, attached without `BPF_F_ALLOW_MULTI`, that keeps the agent's program off the hook. Searches this
    /// cgroup, and if it has no programs the nearest ancestor that has some (`hierarchy_allows_attach`, kernel/bpf/cgroup.c).
    fn exclusive(&self, own: &CgroupPrograms, attach_type: bpf_attach_type) -> Option<u32> {
        if !own.ids.is_empty() {
            return own.exclusive();
        }
        let above = self.path.ancestors().skip(1).take_while(|path| path.starts_with(&self.root));
        let programs = |path: &Path| bpf::cgroup_programs(File::open(path).ok()?, attach_type).ok();
        let nearest = above.filter_map(programs).find(|programs| !programs.ids.is_empty())?;
        nearest.exclusive().filter(|_| !nearest.allows_override())
    }
}

/// Returns the consequence of a program that runs after the agent's and can change the destination of a call, with its remedy.
fn remedy(program: &Program, entry: &HookProgram, own: &CgroupPrograms, is_call: bool) -> Option<String> {
    if !is_call || program.first != Some(false) {
        return None;
    }
    let hook = program.hook;
    Some(if entry.id.is_some_and(|id| own.ids.contains(&id)) {
        format!(
            "runs after imds_{hook}: it may rewrite the destination, and the socket hook does not see the result; a running \
             agent moves its program to the end"
        )
    } else {
        format!(
            "runs after imds_{hook}, because its cgroup is above the agent's: it may rewrite the destination, and the socket \
             hook does not see the result; set `run --cgroup` to the cgroup of that program"
        )
    })
}

fn alone(program: Program, hook: &str) -> DoctorCheck {
    let observed = format!("{program}, attached without BPF_F_ALLOW_MULTI");
    let remedy = format!(
        "the kernel rejects the agent's program on {hook}, which is not enforced; the other hooks are not affected: the owner must \
         attach its program with a BPF link or with BPF_F_ALLOW_MULTI ({BPF_F_ALLOW_MULTI:#x})"
    );
    DoctorCheck { program: Some(program), ..DoctorCheck::degraded(NAME, observed, remedy) }
}

fn agent_programs(pins: &PinDir) -> Result<BTreeSet<u32>, DatapathError> {
    let links = pins.all_links()?.into_iter().filter_map(|path| dir::link_at(&path));
    Ok(links.filter(|link| link.cgroup().is_some()).map(|link| link.program).collect())
}

/// Returns the root of the hierarchy, and the cgroup with this id; without an id, the root for both.
fn path(protected: Option<u64>) -> Option<(PathBuf, PathBuf)> {
    let root = cgroup::root().ok()??;
    match protected {
        Some(id) if root.metadata().is_ok_and(|metadata| metadata.ino() != id) => {
            Some((root, cgroup::path_of(id).ok()??))
        }
        Some(_) | None => Some((root.clone(), root)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_after_ours_may_rewrite() {
        let entry = |id, is_ours| HookProgram {
            name: None,
            id: Some(id),
            kind: "cgroup".to_owned(),
            is_ours,
            is_stuck: false,
        };
        let entries = [entry(1, false), entry(2, true), entry(3, false), entry(4, false)];
        let own = CgroupPrograms { ids: vec![1, 2, 3], flags: BPF_F_ALLOW_MULTI };
        let remedies = |is_call| -> Vec<_> {
            let programs = foreign(&entries, "/sys/fs/cgroup", "connect4");
            programs.map(|(program, entry)| remedy(&program, entry, &own, is_call)).collect()
        };
        let [None, Some(after), Some(in_ancestor)] = &remedies(true)[..] else {
            panic!("two run after ours")
        };
        assert!(after.contains("moves its program to the end"), "{after}");
        assert!(in_ancestor.contains("its cgroup is above the agent's"), "{in_ancestor}");
        assert_eq!(remedies(false), [None, None, None]);
        let alone = [entry(1, false)];
        let (program, of) = foreign(&alone, "/sys/fs/cgroup", "connect4").next().unwrap();
        assert_eq!(remedy(&program, of, &own, true), None);
    }
}

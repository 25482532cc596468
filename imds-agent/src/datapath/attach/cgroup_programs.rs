//! Programs of one hook on a cgroup: a set of links that are attached, pinned and repaired together.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET4_CONNECT,
    BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME,
    BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
};
use imds_ebpf_common::{
    Hook,
    names::{
        HOST_LINKS, HOST_PROGRAMS, LOCAL_SERVICE_LINK, NODE_LINKS, NODE_PROGRAMS, PROG_LOCAL_SERVICE,
        SOCKET_LINKS, SOCKET_PROGRAMS,
    },
};
use serde::Serialize;

use super::{
    cgroup_link::{self, CgroupChange, CgroupLink, OpenCgroup},
    cgroup_order::{self, ExclusiveProgram, OtherProgram},
    mprog,
};
use crate::{
    datapath::{
        DatapathError,
        object::Programs,
        pin::dir::{self, PinDir},
    },
    node::cgroup,
};

/// Description of a cgroup hook: link names, programs and attach types, in the same order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CgroupProgramKind {
    pub(super) hook: Hook,
    links: &'static [&'static str],
    programs: &'static [&'static str],
    attach_types: &'static [bpf_attach_type],
    /// True if several cgroups can have these programs. The names of the pins then end with the cgroup id.
    is_one_of_many: bool,
}

impl CgroupProgramKind {
    /// Returns program, attach type and pin of each link on the cgroup with this id.
    fn links(self, pins: &PinDir, id: u64) -> impl Iterator<Item = (&'static str, bpf_attach_type, PathBuf)> {
        let kinds = self.links.iter().zip(self.programs).zip(self.attach_types);
        kinds.map(move |((&name, &program), &attach_type)| {
            let pin = if self.is_one_of_many { format!("{name}_{id}") } else { name.to_owned() };
            (program, attach_type, pins.named_link(&pin))
        })
    }

    /// Reports whether a link of this hook is pinned, if one cgroup has its programs.
    pub(super) fn is_pinned(self, pins: &PinDir) -> bool {
        self.links.iter().any(|name| pins.named_link(name).exists())
    }
}

/// Attach types of [`HOST_PROGRAMS`] and [`NODE_PROGRAMS`].
pub(crate) const ATTACH_TYPES: [bpf_attach_type; 5] = [
    BPF_CGROUP_INET4_CONNECT,
    BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_INET_EGRESS,
];

/// Attach types of [`SOCKET_PROGRAMS`].
const SOCKET_ATTACH_TYPES: [bpf_attach_type; 6] = [
    BPF_CGROUP_INET4_CONNECT,
    BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_GETPEERNAME,
];

/// Description of the `socket` hook.
pub(crate) const SOCKETS: CgroupProgramKind = CgroupProgramKind {
    hook: Hook::Socket,
    links: &SOCKET_LINKS,
    programs: &SOCKET_PROGRAMS,
    attach_types: &SOCKET_ATTACH_TYPES,
    is_one_of_many: false,
};

/// Description of the `host_network` hook, on one of the cgroups of Kubernetes pods.
pub(crate) const HOSTS: CgroupProgramKind = CgroupProgramKind {
    hook: Hook::HostNetwork,
    links: &HOST_LINKS,
    programs: &HOST_PROGRAMS,
    attach_types: &ATTACH_TYPES,
    is_one_of_many: true,
};

/// Description of the `local_service` hook.
pub(crate) const LOCAL_SERVICE: CgroupProgramKind = CgroupProgramKind {
    hook: Hook::LocalService,
    links: &[LOCAL_SERVICE_LINK],
    programs: &[PROG_LOCAL_SERVICE],
    attach_types: &[BPF_CGROUP_INET_INGRESS],
    is_one_of_many: false,
};

/// Description of the `node_allow` hook.
pub(crate) const NODE_ALLOW: CgroupProgramKind = CgroupProgramKind {
    hook: Hook::NodeAllow,
    links: &NODE_LINKS,
    programs: &NODE_PROGRAMS,
    attach_types: &ATTACH_TYPES,
    is_one_of_many: false,
};

/// Hooks whose programs are on a single cgroup, in the order in which they are attached.
pub(crate) const ON_ONE_CGROUP: [CgroupProgramKind; 3] = [SOCKETS, LOCAL_SERVICE, NODE_ALLOW];

/// Cgroup with the links of one hook.
#[derive(Debug)]
pub(crate) struct CgroupHookLinks {
    cgroup: OpenCgroup,
    links: Vec<CgroupLink>,
}

impl CgroupHookLinks {
    /// Opens the cgroup at `path` and the links that earlier agents pinned for it.
    pub(crate) fn adopt(pins: &PinDir, path: &Path, kind: CgroupProgramKind) -> Result<Self, DatapathError> {
        let file = File::open(path).map_err(dir::io_error("open the cgroup", path))?;
        let id = file.metadata().map_err(dir::io_error("inspect the cgroup", path))?.ino();
        let links = kind
            .links(pins, id)
            .map(|(program, attach_type, pin)| CgroupLink::adopt(program, attach_type, pin, id))
            .collect::<Result<_, _>>()?;
        Ok(Self { cgroup: OpenCgroup { path: path.to_owned(), file, id }, links })
    }

    /// Returns the id of the cgroup.
    pub(crate) fn id(&self) -> u64 {
        self.cgroup.id
    }

    /// Reports whether the cgroup still exists at its path.
    pub(crate) fn exists(&self) -> bool {
        fs::metadata(&self.cgroup.path).is_ok_and(|metadata| metadata.ino() == self.cgroup.id)
    }

    /// Describes the programs that are not attached, or not last.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &str> {
        self.links.iter().filter_map(|link| link.failure.as_deref())
    }

    /// Reconciles the links of the desired attach types and detaches the others. Continues after a failure.
    pub(crate) fn restore(
        &mut self,
        programs: &Programs,
        is_desired: impl Fn(bpf_attach_type) -> bool,
    ) -> Result<Vec<CgroupChange>, DatapathError> {
        let Self { cgroup, links } = self;
        let mut changes = Vec::new();
        let mut failed = None;
        for link in links {
            let restored = if is_desired(link.attach_type) {
                link.restore(programs, cgroup, &mut changes)
            } else {
                link.detach(cgroup, &mut changes)
            };
            failed = failed.or(restored.err());
        }
        for change in changes.iter().filter(|_| failed.is_some()) {
            log::warn!("{}", change.text);
        }
        failed.map_or(Ok(changes), Err)
    }
}

/// Reports whether this is an attach type of the sendmsg programs.
pub(crate) fn is_sendmsg(attach_type: bpf_attach_type) -> bool {
    matches!(attach_type, BPF_CGROUP_UDP4_SENDMSG | BPF_CGROUP_UDP6_SENDMSG)
}

/// Reports whether this is an attach type of the getpeername programs.
pub(crate) fn is_peer(attach_type: bpf_attach_type) -> bool {
    matches!(attach_type, BPF_CGROUP_INET4_GETPEERNAME | BPF_CGROUP_INET6_GETPEERNAME)
}

/// Reports whether `attach_type` is one of programs on packets, not on calls.
pub(crate) fn is_packet(attach_type: bpf_attach_type) -> bool {
    matches!(attach_type, BPF_CGROUP_INET_EGRESS | BPF_CGROUP_INET_INGRESS)
}

/// Detaches and unpins the links of a hook that one cgroup has, on any cgroup. Returns `true` if one was attached.
pub(crate) fn detach(pins: &PinDir, kind: CgroupProgramKind) -> Result<bool, DatapathError> {
    let mut was_attached = false;
    for name in kind.links {
        was_attached |= mprog::detach_pinned(&pins.named_link(name))?;
    }
    Ok(was_attached)
}

/// State of one program of a cgroup, read from the kernel. The JSON form is a part of the status report.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the form of the report")]
pub struct ProgramState {
    /// Name of the BPF program.
    pub program: &'static str,
    /// Id of the cgroup: its inode number.
    pub cgroup: u64,
    /// True for the sendmsg programs, which are not always needed.
    #[serde(skip)]
    pub is_sendmsg: bool,
    /// True for the getpeername programs, which only scoped exemptions need, and which deny nothing.
    #[serde(skip)]
    pub is_peer: bool,
    /// True if the program is attached to the cgroup.
    #[serde(rename = "attached")]
    pub is_attached: bool,
    /// True if the program gives verdicts on packets, not on calls.
    #[serde(skip)]
    pub is_packet_program: bool,
    /// Description of the problem if the program is not attached, or not last.
    #[serde(skip)]
    pub problem: Option<String>,
}

/// Inspects the programs of a hook on the cgroup with this id.
pub(crate) fn inspect(pins: &PinDir, kind: CgroupProgramKind, id: u64) -> Vec<ProgramState> {
    let path = cgroup::path_of(id).ok().flatten();
    let states = kind.links(pins, id).map(|(program, attach_type, pin)| {
        let link = dir::link_at(&pin).filter(|link| link.cgroup() == Some(id));
        let problem = match (link, &path) {
            (Some(_), None) => None,
            (Some(link), Some(path)) => find_later(path, attach_type, link.program)
                .map(|later| cgroup_link::not_last(program, path, &later)),
            (None, path) => Some(cgroup_link::not_attached(
                program,
                path.as_deref(),
                path.as_ref().and_then(|path| ExclusiveProgram::find(path, attach_type)).as_ref(),
            )),
        };
        ProgramState {
            program,
            cgroup: id,
            is_sendmsg: is_sendmsg(attach_type),
            is_peer: is_peer(attach_type),
            is_attached: link.is_some(),
            is_packet_program: is_packet(attach_type),
            problem,
        }
    });
    states.collect()
}

fn find_later(path: &Path, attach_type: bpf_attach_type, program: u32) -> Option<OtherProgram> {
    let later = cgroup_order::find_later_program(File::open(path).ok()?, attach_type, program).ok()?;
    later.map(|later| later.program().clone())
}

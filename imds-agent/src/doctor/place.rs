//! What the agent finds where it runs.

use caps::{CapSet, Capability};

use super::report::Check;
use crate::{
    datapath::{
        home,
        object::{self, Maps},
        pins::{BPFFS, PinDir},
        pods,
    },
    node::{cgroup, netns},
    pods::Lookup,
    preflight::{self, PreflightError},
};

/// What is of use besides what is needed, and for what.
const CAPABILITIES: [(Capability, &str); 6] = [
    (Capability::CAP_BPF, "CAP_BPF"),
    (Capability::CAP_PERFMON, "CAP_PERFMON"),
    (Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"),
    (Capability::CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
    (Capability::CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
    (Capability::CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE"),
];

fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

pub(super) fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    let names = CAPABILITIES.into_iter().filter(|&(capability, _)| has(capability)).map(|(_, name)| name);
    let names = names.collect::<Vec<_>>().join(" ");
    let found = if names.is_empty() { "none of use".to_owned() } else { names };
    match preflight::check_capabilities() {
        Ok(()) => Check::ok(NAME, found),
        Err(error) => Check::missing(NAME, found, error.to_string()),
    }
}

pub(super) fn locked_memory() -> Check {
    const NAME: &str = "locked_memory";
    match preflight::lift_limits() {
        Ok(()) if preflight::counts_locked_memory() => {
            Check::ok(NAME, "not limited, which Linux before 5.11 takes for BPF maps")
        }
        Ok(()) => Check::ok(NAME, "not needed: BPF maps are counted as the cgroup's"),
        Err(error @ PreflightError::LockedMemory(limit)) => {
            Check::missing(NAME, format!("{limit} bytes"), error.to_string())
        }
        Err(error) => Check::missing(NAME, "unknown", error.to_string()),
    }
}

pub(super) fn bpffs(pins: &PinDir) -> Check {
    const NAME: &str = "bpffs";
    let root = pins.root();
    let found = format!("{} is not on one", root.display());
    let is_usual = root.starts_with(BPFFS);
    match pins.is_on_bpffs() {
        Ok(true) => Check::ok(NAME, format!("{} is on one", root.display())),
        Ok(false) if is_usual && has(Capability::CAP_SYS_ADMIN) => {
            Check::degraded(NAME, found, format!("the agent mounts one at {BPFFS} when it starts"))
        }
        Ok(false) => {
            let at = if is_usual { BPFFS.as_ref() } else { root.parent().unwrap_or(root) };
            let remedy = format!("`mount -t bpf bpf {}`, or name another --pin-dir", at.display());
            Check::missing(NAME, found, remedy)
        }
        Err(error) => Check::missing(NAME, error.to_string(), "name another --pin-dir"),
    }
}

pub(super) fn cgroup2() -> Check {
    const NAME: &str = "cgroup2";
    match cgroup::root() {
        Ok(Some(path)) => Check::ok(NAME, path.display().to_string()),
        Ok(None) => {
            let remedy = "mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`, or in a container the node's \
                          /sys/fs/cgroup; name a cgroup by `run --cgroup`, or set hooks.socket = false";
            Check::missing(NAME, "not mounted as a whole", remedy)
        }
        Err(error) => Check::missing(NAME, error.to_string(), "mount /proc"),
    }
}

/// Whether pods can be found by their processes, and how the API server is heard where it is asked.
pub(super) fn pods(pins: &PinDir) -> Check {
    const NAME: &str = "pods";
    if !netns::is_node_pid_namespace() {
        let remedy = "rules by cgroup, and for Kubernetes pods, exempt nobody and name nobody: run it in the node's (hostPID)";
        return Check::degraded(NAME, "this is not the node's pid namespace", remedy);
    }
    if !has(Capability::CAP_SYS_PTRACE) {
        let remedy = "rules by cgroup, and for Kubernetes pods, exempt nobody and name nobody: run it with that capability";
        return Check::degraded(NAME, "no CAP_SYS_PTRACE to open the namespaces of their processes", remedy);
    }
    let lookup = Maps::open(pins).ok().and_then(|maps| pods::lookup(&maps).ok().flatten());
    match lookup {
        None => Check::ok(NAME, "their processes can be seen; the API server is not asked"),
        Some(Lookup { node, is_connected: true, pods, .. }) => {
            Check::ok(NAME, format!("the API server tells of {pods} on node {node}"))
        }
        Some(Lookup { node, error, .. }) => {
            let error = error.unwrap_or_else(|| "not connected yet".to_owned());
            let remedy = "what is granted stays, and no pod that is new is exempt; see [kubernetes] of the configuration, and \
                          whether its user may get, list and watch pods";
            Check::degraded(NAME, format!("node {node}: {error}"), remedy)
        }
    }
}

/// Whether one runs, and whether something is loaded.
pub(super) fn agent(pins: &PinDir) -> Check {
    const NAME: &str = "agent";
    let root = pins.root().display();
    if let Err(error) = home::ensure_ours(pins) {
        return Check::degraded(NAME, format!("something is loaded at {root}"), error.to_string());
    }
    let pid = |pid: Option<i32>| pid.map(|pid| format!(", pid {pid}")).unwrap_or_default();
    match pins.holder() {
        Ok(Some(holder)) if holder.is_ready => Check::ok(NAME, format!("running{}", pid(holder.pid))),
        Ok(Some(holder)) => {
            let remedy = "not every interface is guarded yet: wait, or see its log";
            Check::degraded(NAME, format!("starting{}", pid(holder.pid)), remedy)
        }
        Ok(None) if object::is_loaded(pins) => {
            let remedy =
                "what is loaded stays in force, new links of pods are not guarded: start `imds-agent run`";
            Check::degraded(NAME, format!("not running; something is loaded at {root}"), remedy)
        }
        Ok(None) => {
            let remedy = "nothing is guarded: start `imds-agent run`";
            Check::degraded(NAME, format!("not running; nothing is loaded at {root}"), remedy)
        }
        Err(error) => Check::degraded(NAME, error.to_string(), "run this as root"),
    }
}

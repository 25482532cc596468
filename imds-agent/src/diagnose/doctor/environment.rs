//! Checks of the environment: capabilities, limits, mounts, pod watch and the running agent.

use std::{fs, io, process};

use caps::{CapSet, Capability};

use super::doctor_report::DoctorCheck;
use crate::{
    datapath::{
        maps::pod_names,
        object::{self, Maps},
        pin::{
            dir::{BPFFS, PinDir},
            lock::{self, UNPINNED, UNPINNED_REMEDY},
            mount_namespace::{PRIVATE_BPFFS, PRIVATE_BPFFS_REMEDY},
            netns_owner,
        },
    },
    diagnose::preflight::{self, PreflightError},
    kube::pod_ref::{NamespaceWatchStatus, PodWatchStatus},
    node::{
        cgroup,
        confinement::{self, Confinement},
        netns, pod_cgroups,
    },
};

/// Capabilities that the agent uses. Some are optional, or needed only on some kernels.
const CAPABILITIES: [(Capability, &str); 6] = [
    (Capability::CAP_BPF, "CAP_BPF"),
    (Capability::CAP_PERFMON, "CAP_PERFMON"),
    (Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"),
    (Capability::CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
    (Capability::CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
    (Capability::CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE"),
];

/// Returns the remedy for a denied operation: the one for the security module that confines this process, or `otherwise`.
fn remedy_for(error: &io::Error, otherwise: &str) -> String {
    confinement::explain(error).unwrap_or_else(|| otherwise.to_owned())
}

/// Names the security module that confines this process, and the lockdown mode of the kernel.
pub(crate) fn security_modules() -> DoctorCheck {
    let confinement = Confinement::of_this_process().map(|confinement| confinement.describe());
    let lockdown = confinement::lockdown().map(|mode| format!("lockdown: {mode}"));
    let observed: Vec<_> = confinement.into_iter().chain(lockdown).collect();
    let observed =
        if observed.is_empty() { "none confines this process".to_owned() } else { observed.join("; ") };
    DoctorCheck::ok("security_modules", observed)
}

fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

pub(crate) fn capabilities() -> DoctorCheck {
    const NAME: &str = "capabilities";
    let names = CAPABILITIES.into_iter().filter(|&(capability, _)| has(capability)).map(|(_, name)| name);
    let names = names.collect::<Vec<_>>().join(" ");
    let observed = if names.is_empty() { "none that the agent uses".to_owned() } else { names };
    match preflight::check_capabilities() {
        Ok(()) => DoctorCheck::ok(NAME, observed),
        Err(error) => DoctorCheck::missing(NAME, observed, error.to_string()),
    }
}

pub(crate) fn locked_memory() -> DoctorCheck {
    const NAME: &str = "locked_memory";
    match preflight::lift_limits() {
        Ok(()) if preflight::counts_locked_memory() => {
            DoctorCheck::ok(NAME, "unlimited, as BPF maps need before Linux 5.11")
        }
        Ok(()) => DoctorCheck::ok(NAME, "not needed: the kernel charges BPF maps to the memory cgroup"),
        Err(error @ PreflightError::LockedMemory(limit)) => {
            DoctorCheck::missing(NAME, format!("{limit} bytes"), error.to_string())
        }
        Err(error) => DoctorCheck::missing(NAME, "unknown", error.to_string()),
    }
}

pub(crate) fn bpffs(pins: &PinDir) -> DoctorCheck {
    const NAME: &str = "bpffs";
    let root = pins.root();
    let observed = format!("{} is not on a bpffs", root.display());
    let is_usual = root.starts_with(BPFFS);
    match pins.is_on_bpffs() {
        Ok(true) if pins.is_private() => DoctorCheck::degraded(NAME, PRIVATE_BPFFS, PRIVATE_BPFFS_REMEDY),
        Ok(true) => match pins.probe_creation() {
            Ok(()) => DoctorCheck::ok(NAME, format!("{} is on a bpffs", root.display())),
            Err(error) => DoctorCheck::missing(
                NAME,
                format!("{} is on a bpffs, but nothing can be created there: {error}", root.display()),
                remedy_for(&error, "run `imds-agent doctor` as root, with a writable bpffs"),
            ),
        },
        Ok(false) if is_usual && has(Capability::CAP_SYS_ADMIN) => DoctorCheck::degraded(
            NAME,
            observed,
            format!("the agent mounts a bpffs at {BPFFS} when it starts"),
        ),
        Ok(false) => {
            let at = if is_usual { BPFFS.as_ref() } else { root.parent().unwrap_or(root) };
            let remedy = format!("run `mount -t bpf bpf {}`, or set another --pin-dir", at.display());
            DoctorCheck::missing(NAME, observed, remedy)
        }
        Err(error) => DoctorCheck::missing(NAME, error.to_string(), "set another --pin-dir"),
    }
}

pub(crate) fn cgroup2() -> DoctorCheck {
    const NAME: &str = "cgroup2";
    match cgroup::root() {
        Ok(Some(path)) => DoctorCheck::ok(NAME, path.display().to_string()),
        Ok(None) => {
            let remedy = "run `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`, in a container mount the node's /sys/fs/cgroup; or \
                          set `run --cgroup`, or hooks.socket = false";
            DoctorCheck::missing(NAME, "the root of the cgroup v2 hierarchy is not mounted", remedy)
        }
        Err(error) => DoctorCheck::missing(NAME, error.to_string(), "mount /proc"),
    }
}

/// Checks that the agent can find pods through their processes, and the state of the pod watch if there is one.
pub(crate) fn pods(pins: &PinDir) -> DoctorCheck {
    const NAME: &str = "pods";
    // A node that is itself a container, as in kind, has a pid namespace of its own with the processes of its pods.
    if !netns::is_node_pid_namespace() && !pod_cgroups::are_processes_visible() {
        let remedy = "exemptions for Kubernetes pods have no effect, and reports name no pods: run the agent in the node's pid \
                      namespace (hostPID)";
        return DoctorCheck::degraded(
            NAME,
            "no process of a Kubernetes pod is visible in this pid namespace",
            remedy,
        );
    }
    if !has(Capability::CAP_SYS_PTRACE) {
        let remedy = "exemptions by cgroup and for Kubernetes pods have no effect, and reports name no pods: run the agent with \
                      CAP_SYS_PTRACE";
        return DoctorCheck::degraded(
            NAME,
            "no CAP_SYS_PTRACE to open the namespaces of the pods' processes",
            remedy,
        );
    }
    if let Err(error) = open_any_namespace() {
        let remedy = "exemptions by cgroup and for Kubernetes pods have no effect, and reports name no pods";
        let remedy = format!("{remedy}: {}", remedy_for(&error, "grant access to the namespaces in /proc"));
        return DoctorCheck::degraded(
            NAME,
            format!("failed to open the namespaces of processes: {error}"),
            remedy,
        );
    }
    let watch_status =
        Maps::open(pins).ok().and_then(|maps| pod_names::read_watch_status(&maps).ok().flatten());
    match watch_status {
        None => DoctorCheck::ok(NAME, "processes of pods are visible; no pod watch"),
        Some(PodWatchStatus {
            connected: true,
            namespaces: Some(NamespaceWatchStatus { connected: false, error: Some(error), .. }),
            ..
        }) => {
            let remedy = "rules with namespace_selector go by the last known labels: see that the agent's user may list and watch \
                          namespaces";
            DoctorCheck::degraded(NAME, format!("namespace watch: {error}"), remedy)
        }
        Some(PodWatchStatus { node, connected: true, pods, .. }) => {
            DoctorCheck::ok(NAME, format!("pod watch of node {node} connected, {pods} pods"))
        }
        Some(PodWatchStatus { node, error, .. }) => {
            let error = error.unwrap_or_else(|| "not connected yet".to_owned());
            let remedy = "exempt pods stay exempt, new pods are not: check [kubernetes] in the configuration, and that its user may \
                          list and watch pods";
            DoctorCheck::degraded(NAME, format!("pod watch of node {node}: {error}"), remedy)
        }
    }
}

/// Opens the network namespace of another process. Fails with the last error if no namespace can be opened: single processes
/// may be protected from every other one.
fn open_any_namespace() -> io::Result<()> {
    let mut last = Ok(());
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if pid.is_none_or(|pid| pid == process::id()) {
            continue;
        }
        match fs::File::open(entry.path().join("ns/net")) {
            Ok(_) => return Ok(()),
            // The process has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => last = Err(error),
        }
    }
    last
}

/// Checks that an agent runs and is ready, and reports if programs are loaded.
pub(crate) fn agent(pins: &PinDir) -> DoctorCheck {
    const NAME: &str = "agent";
    let root = pins.root().display();
    if let Err(error) = netns_owner::ensure_own_netns(pins) {
        return DoctorCheck::degraded(NAME, format!("programs are loaded at {root}"), error.to_string());
    }
    let pid = |pid: Option<i32>| pid.map(|pid| format!(", pid {pid}")).unwrap_or_default();
    match pins.lock_owner() {
        Ok(Some(holder)) if holder.is_ready => DoctorCheck::ok(NAME, format!("running{}", pid(holder.pid))),
        Ok(Some(holder)) => {
            let remedy = "not all interfaces are enforced yet: wait, or see the agent's log";
            DoctorCheck::degraded(NAME, format!("starting{}", pid(holder.pid)), remedy)
        }
        Ok(None) if object::is_loaded(pins) => {
            let remedy =
                "attached programs stay enforced, but none is attached to new pods: start `imds-agent run`";
            DoctorCheck::degraded(NAME, format!("not running; programs are loaded at {root}"), remedy)
        }
        Ok(None) if let Ok(Some(agent)) = lock::unpinned_agent() => {
            DoctorCheck::missing(NAME, format!("{UNPINNED}{}", pid(agent.pid)), UNPINNED_REMEDY)
        }
        Ok(None) => {
            let remedy = "no pod is denied: start `imds-agent run`";
            DoctorCheck::degraded(NAME, format!("not running; nothing is loaded at {root}"), remedy)
        }
        Err(error) => DoctorCheck::degraded(NAME, error.to_string(), "run `imds-agent doctor` as root"),
    }
}

//! Sources of events at the cgroup hooks: the senders among which the rate limiters divide the ring buffer.
//!
//! A process in a pod can create any number of network namespaces, and of cgroups below its own. If each of them were a source,
//! one pod could fill the ring buffer and evict the other sources from the map. A source is therefore the ancestor of the
//! sender's cgroup on a fixed level: the kubelet and systemd create the cgroups there, and each contains a whole pod or unit.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id},
};

use crate::maps;

/// Level of the source below the agent's cgroup: that of
/// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice`. Guaranteed pods and containers of Docker
/// (`system.slice/docker-ID.scope`) are one level above. They are one source unless they may create cgroups.
const LEVEL: i32 = 3;
/// Maximum level of the agent's cgroup in the whole hierarchy. In a container that systemd started (kind), the level is 2.
const MAX_AGENT_LEVEL: i32 = 4;

/// Returns the source of a call of the current task; `sender` if the task is in the agent's cgroup itself, as on nodes whose
/// pods are in cgroup v1.
///
/// A separate function, so that the verifier checks it apart from its callers. Programs on connect(2) and sendmsg(2) may call
/// the helper since Linux 5.7 (commit 0f09abd105da).
#[inline(never)]
pub(crate) fn of_caller(sender: u64) -> u64 {
    // SAFETY: the helper takes a number. It returns 0 below the cgroup of the task.
    find(sender, |level| unsafe { bpf_get_current_ancestor_cgroup_id(level) })
}

/// Returns the source of a packet at `cgroup_skb`; `sender` if its socket belongs to the agent's cgroup itself.
#[inline(never)]
pub(crate) fn of_packet(skb: *mut __sk_buff, sender: u64) -> u64 {
    // SAFETY: the helper takes the context of a `cgroup_skb` program, and a number. It returns 0 below the cgroup of the socket.
    find(sender, |level| unsafe { bpf_skb_ancestor_cgroup_id(skb, level) })
}

/// Returns the id of the ancestor on [`LEVEL`], or of the sender's cgroup if that is above the level.
#[inline(always)]
fn find(sender: u64, ancestor: impl Fn(i32) -> u64) -> u64 {
    let agents = maps::agent_cgroup();
    let is_agents = |id: u64| id == agents && id != 0;
    let top = (1..=MAX_AGENT_LEVEL).find(|&level| is_agents(ancestor(level))).unwrap_or(0);
    (1..=LEVEL).rev().map(|level| ancestor(top + level)).find(|&id| id != 0).unwrap_or(sender)
}

//! The packet sink as a filter on a clsact qdisc, for interfaces on which the agent's program is such a filter.
//!
//! If the process is killed, the filter stays. It drops only test packets of that run, and the next run removes it.

use std::os::fd::BorrowedFd;

use imds_ebpf_common::TcHook;
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::tc::TcHandle,
};

use crate::{
    datapath::{
        attach::clsact::{self, TcFilter},
        pin::dir::AttachPoint,
    },
    node::netlink::{Netlink, NetlinkError},
};

/// Handle of the sink's filters, "veri" in ASCII, which no other program uses.
const HANDLE: TcHandle = TcHandle { major: 0x7665, minor: 0x7269 };
const NAME: &str = "verify_sink";

/// Adds the program as a filter directly behind the agent's, the first of `filters`. Returns `false` if another filter stays
/// between them.
pub(crate) async fn add_after_agent(
    netlink: &Netlink,
    ifindex: u32,
    filters: &[TcFilter],
    program: BorrowedFd<'_>,
) -> Result<bool, NetlinkError> {
    let Some((agent, behind)) = filters.split_first() else { return Ok(false) };
    let Some(priority) = agent.priority.checked_add(1) else { return Ok(false) };
    // All filters of a priority have the same kind and protocol, and a new BPF filter comes first.
    let is_between = |filter: &TcFilter| {
        filter.priority < priority || (filter.priority == priority && !filter.can_share_priority())
    };
    if behind.iter().any(is_between) {
        return Ok(false);
    }
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    clsact::write(netlink, egress(ifindex), priority, HANDLE, program, NAME, flags).await?;
    Ok(true)
}

/// Removes the sink's filter from an interface, also that of a run that was killed. Returns the other filters in the order in
/// which they run.
pub(crate) async fn remove(netlink: &Netlink, ifindex: u32) -> Result<Vec<TcFilter>, NetlinkError> {
    let filters = clsact::filters(netlink, egress(ifindex)).await?;
    let is_sink = |filter: &TcFilter| filter.name.as_deref() == Some(NAME);
    let (sinks, others): (Vec<_>, Vec<_>) = filters.into_iter().partition(is_sink);
    clsact::detach(netlink, egress(ifindex), &sinks).await?;
    Ok(others)
}

const fn egress(ifindex: u32) -> AttachPoint {
    AttachPoint { ifindex, hook: TcHook::NodeEgress }
}

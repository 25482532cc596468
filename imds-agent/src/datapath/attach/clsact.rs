//! Direct-action filters on the clsact qdisc (Linux 4.5), or on an existing ingress qdisc.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use imds_ebpf_common::{AttachMode, TcHook, names::PREFIX};
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
};

use crate::{
    datapath::{
        attach::attachment::{Attachment, Order},
        pin::dir::AttachPoint,
        sys::bpf,
    },
    node::netlink::{Netlink, NetlinkError},
};

/// Handles of the agent's filters ("imds" and "imdt" in ASCII). A filter uses one of them; the new filter uses the other one
/// while a filter moves. Other programs use small numbers.
const HANDLES: [TcHandle; 2] =
    [TcHandle { major: 0x696d, minor: 0x6473 }, TcHandle { major: 0x696d, minor: 0x6474 }];
const INGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
const EGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };
/// Handle of the clsact or ingress qdisc, ffff:0.
const CLSACT_HANDLE: TcHandle = TcHandle { major: u16::MAX, minor: 0 };
/// Protocol of the filters: all packets, including VLAN-tagged ones.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
const FIRST_PRIORITY: u16 = 1;

/// Filter of chain 0, where all classification starts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TcFilter {
    pub(crate) priority: u16,
    handle: TcHandle,
    protocol: u16,
    pub(crate) kind: String,
    pub(crate) program: Option<u32>,
    pub(crate) name: Option<String>,
}

impl TcFilter {
    /// Reports whether the filter belongs to imds-agent.
    pub(crate) fn is_agent_filter(&self) -> bool {
        HANDLES.contains(&self.handle) && self.name.as_ref().is_some_and(|name| name.starts_with(PREFIX))
    }

    /// Reports whether a BPF filter can have the priority of this filter. All filters of one priority have the same kind and
    /// protocol.
    pub(crate) fn can_share_priority(&self) -> bool {
        self.kind == TcFilterBpf::KIND && self.protocol == ETH_P_ALL
    }

    /// Parses an `RTM_NEWTFILTER` message. Returns `None` if it does not describe a filter of chain 0.
    pub fn from_message(message: TcMessage) -> Option<Self> {
        // The dump contains an entry with handle 0 for each priority.
        if message.header.handle == TcHandle::UNSPEC {
            return None;
        }
        let info = TcHandle::from(message.header.info);
        let mut filter = Self {
            priority: info.major,
            handle: message.header.handle,
            protocol: info.minor,
            kind: String::new(),
            program: None,
            name: None,
        };
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => filter.kind = kind,
                TcAttribute::Chain(chain) if chain != 0 => return None,
                TcAttribute::Options(options) => filter.read(options),
                _ => {}
            }
        }
        Some(filter)
    }

    fn read(&mut self, options: Vec<TcOption>) {
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => self.program = Some(id),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => self.name = Some(name),
                _ => {}
            }
        }
    }
}

/// Finds the agent's filter at a hook. `program` is the id of the program that it should run.
pub async fn attachment(
    netlink: &Netlink,
    point: AttachPoint,
    program: u32,
) -> Result<Option<Attachment>, NetlinkError> {
    let filters = filters(netlink, point).await?;
    let ours = filters.iter().find(|filter| filter.is_agent_filter());
    Ok(ours.map(|ours| Attachment {
        backend: AttachMode::Clsact,
        current: ours.program == Some(program),
        pinned: true,
        // TCX programs run before all filters (tcx_run in net/core/dev.c). Kernels without TCX return an error.
        order: match bpf::entries(point.ifindex, point.tcx_hook()) {
            Ok(entries) if !entries.is_empty() => Order::Blocked,
            Ok(_) | Err(_) => order(&filters, ours),
        },
    }))
}

/// Returns the order of `ours` among `filters`, which are sorted by the order in which they run.
fn order(filters: &[TcFilter], ours: &TcFilter) -> Order {
    if filters.first().is_some_and(TcFilter::is_agent_filter) {
        return Order::First;
    }
    let best = best_priority(filters);
    let can_be_first = foreign(filters).all(|filter| filter.priority >= best);
    if can_be_first || best < ours.priority { Order::NotFirst } else { Order::Blocked }
}

/// Returns the lowest priority that a BPF filter can have.
fn best_priority(filters: &[TcFilter]) -> u16 {
    let is_free = |priority: &u16| {
        foreign(filters).filter(|filter| filter.priority == *priority).all(TcFilter::can_share_priority)
    };
    (FIRST_PRIORITY..u16::MAX).find(is_free).unwrap_or(u16::MAX)
}

fn foreign(filters: &[TcFilter]) -> impl Iterator<Item = &TcFilter> {
    filters.iter().filter(|filter| !filter.is_agent_filter())
}

/// Lists the filters of a hook in the order in which they run. Returns an empty list if the interface has no clsact or ingress
/// qdisc.
pub(crate) async fn filters(netlink: &Netlink, point: AttachPoint) -> Result<Vec<TcFilter>, NetlinkError> {
    let filters = filters_below(netlink, point.ifindex, parent(point.hook)).await?;
    // An `ingress` qdisc lists its ingress filters for every class (`ingress_tcf_block`), clsact lists none for class 0
    // (`clsact_tcf_block`).
    if point.hook == TcHook::NodeEgress
        && !filters.is_empty()
        && !filters_below(netlink, point.ifindex, CLSACT_HANDLE).await?.is_empty()
    {
        return Ok(Vec::new());
    }
    Ok(filters)
}

async fn filters_below(
    netlink: &Netlink,
    ifindex: u32,
    parent: TcHandle,
) -> Result<Vec<TcFilter>, NetlinkError> {
    let messages = dump_filters(netlink, ifindex, parent).await?;
    Ok(messages.into_iter().filter_map(TcFilter::from_message).collect())
}

/// Lists the filters of all chains. Returns an empty list if the interface has no clsact or ingress qdisc.
async fn dump_filters(
    netlink: &Netlink,
    ifindex: u32,
    parent: TcHandle,
) -> Result<Vec<TcMessage>, NetlinkError> {
    let request = RouteNetlinkMessage::GetTrafficFilter(message(ifindex, parent));
    let answers = match netlink.dump(format!("failed to list filters of interface {ifindex}"), request).await
    {
        // The interface has no such qdisc (EINVAL), or was deleted.
        Err(error) if matches!(error.errno(), Some(libc::EINVAL | libc::ENODEV | libc::ENOENT)) => {
            return Ok(Vec::new());
        }
        answers => answers?,
    };
    let filters = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(message) => Some(message),
        _ => None,
    });
    Ok(filters.collect())
}

/// Reports whether the interface has a filter of the agent at any hook.
pub(crate) async fn has_agent_filter(netlink: &Netlink, ifindex: u32) -> Result<bool, NetlinkError> {
    for hook in TcHook::ALL {
        if filters(netlink, AttachPoint { ifindex, hook }).await?.iter().any(TcFilter::is_agent_filter) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Adds the clsact qdisc if the interface has neither a clsact nor an ingress qdisc, which share one slot. Returns `true` if it
/// was added.
pub async fn ensure_qdisc(netlink: &Netlink, ifindex: u32) -> Result<bool, NetlinkError> {
    let call = format!("failed to add a clsact qdisc to interface {ifindex}");
    let request = RouteNetlinkMessage::NewQueueDiscipline(qdisc(ifindex));
    match netlink.acknowledged(call, request, NLM_F_CREATE | NLM_F_EXCL).await {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the clsact qdisc unless it has a filter in any chain. The kernel rejects the request for a qdisc of another kind.
pub async fn remove_unused_qdisc(netlink: &Netlink, ifindex: u32) -> Result<(), NetlinkError> {
    for hook in TcHook::ALL {
        if !dump_filters(netlink, ifindex, parent(hook)).await?.is_empty() {
            return Ok(());
        }
    }
    let call = format!("failed to remove the clsact qdisc of interface {ifindex}");
    ignore_missing(
        netlink.acknowledged(call, RouteNetlinkMessage::DelQueueDiscipline(qdisc(ifindex)), 0).await,
    )
}

/// Adds a filter at the best free priority, before all other filters if possible. An older filter of the agent is removed after
/// the new one is active.
pub async fn attach_first(
    netlink: &Netlink,
    point: AttachPoint,
    program: BorrowedFd<'_>,
    name: &str,
) -> Result<(), NetlinkError> {
    let filters = filters(netlink, point).await?;
    let priority = best_priority(&filters);
    let used: Vec<_> = filters.iter().filter(|filter| filter.is_agent_filter()).collect();
    let is_free = |handle: &TcHandle| used.iter().all(|filter| filter.handle != *handle);
    let Some(handle) = HANDLES.into_iter().find(is_free) else {
        // An agent was killed between the two steps below and left both. The next reconciliation finds a free handle.
        return detach(netlink, point, used.last().copied()).await;
    };
    // The kernel inserts a new BPF filter before the others of its priority (cls_bpf_change: list_add_rcu).
    write(netlink, point, priority, handle, program, name, NLM_F_CREATE | NLM_F_EXCL).await?;
    detach(netlink, point, used).await
}

/// Replaces the program of the agent's filter atomically (`cls_bpf_change`: `list_replace_rcu`).
pub async fn replace(
    netlink: &Netlink,
    point: AttachPoint,
    program: BorrowedFd<'_>,
    name: &str,
) -> Result<(), NetlinkError> {
    let filters = filters(netlink, point).await?;
    let mut ours = filters.iter().filter(|filter| filter.is_agent_filter());
    let Some(TcFilter { priority, handle, .. }) = ours.next() else {
        return attach_first(netlink, point, program, name).await;
    };
    write(netlink, point, *priority, *handle, program, name, NLM_F_CREATE).await?;
    detach(netlink, point, ours).await
}

/// Removes all filters of the agent from a hook. Returns `true` if the hook had any.
pub async fn detach_all(netlink: &Netlink, point: AttachPoint) -> Result<bool, NetlinkError> {
    let filters = filters(netlink, point).await?;
    let ours: Vec<_> = filters.iter().filter(|filter| filter.is_agent_filter()).collect();
    let any = !ours.is_empty();
    detach(netlink, point, ours).await?;
    Ok(any)
}

pub(crate) async fn detach(
    netlink: &Netlink,
    point: AttachPoint,
    filters: impl IntoIterator<Item = &TcFilter>,
) -> Result<(), NetlinkError> {
    for filter in filters {
        let mut message = filter_message(point, filter.priority, filter.handle);
        message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
        let call = format!("failed to remove a filter of interface {}", point.ifindex);
        ignore_missing(netlink.acknowledged(call, RouteNetlinkMessage::DelTrafficFilter(message), 0).await)?;
    }
    Ok(())
}

pub(crate) async fn write(
    netlink: &Netlink,
    point: AttachPoint,
    priority: u16,
    handle: TcHandle,
    program: BorrowedFd<'_>,
    name: &str,
    flags: u16,
) -> Result<(), NetlinkError> {
    let fd = u32::try_from(program.as_raw_fd()).map_err(|error| {
        NetlinkError::new("failed to pass the BPF program to rtnetlink", io::Error::other(error))
    })?;
    let mut message = filter_message(point, priority, handle);
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message.attributes.push(TcAttribute::Options(
        [
            TcFilterBpfOption::ProgFd(fd),
            TcFilterBpfOption::ProgName(name.to_owned()),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        ]
        .map(TcOption::Bpf)
        .into(),
    ));
    let call = format!("failed to attach a filter to interface {} at priority {priority}", point.ifindex);
    netlink.acknowledged(call, RouteNetlinkMessage::NewTrafficFilter(message), flags).await
}

const fn parent(hook: TcHook) -> TcHandle {
    match hook {
        TcHook::FromPod => INGRESS,
        TcHook::NodeEgress => EGRESS,
    }
}

fn message(ifindex: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = parent;
    message
}

fn qdisc(ifindex: u32) -> TcMessage {
    let mut message = message(ifindex, TcHandle::CLSACT);
    message.header.handle = CLSACT_HANDLE;
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

fn filter_message(point: AttachPoint, priority: u16, handle: TcHandle) -> TcMessage {
    let mut message = message(point.ifindex, parent(point.hook));
    message.header.handle = handle;
    message.header.info = TcHandle { major: priority, minor: ETH_P_ALL }.into();
    message
}

/// Ignores errors of a removal if the object or its interface was deleted concurrently.
fn ignore_missing(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(priority: u16, handle: TcHandle, kind: &str, name: &str) -> TcFilter {
        TcFilter {
            priority,
            handle,
            protocol: ETH_P_ALL,
            kind: kind.to_owned(),
            program: None,
            name: Some(name.to_owned()),
        }
    }

    fn ours(priority: u16) -> TcFilter {
        filter(priority, HANDLES[0], "bpf", "imds_from_pod")
    }

    fn other(priority: u16, kind: &str) -> TcFilter {
        filter(priority, TcHandle { major: 0, minor: 1 }, kind, "other")
    }

    #[test]
    fn own_filter_first() {
        assert_eq!(order(&[ours(1)], &ours(1)), Order::First);
        assert_eq!(order(&[ours(1), other(1, "bpf"), other(2, "u32")], &ours(1)), Order::First);
        assert_eq!(order(&[ours(2), other(3, "u32")], &ours(2)), Order::First);
    }

    #[test]
    fn bpf_filter_of_same_priority_is_passed() {
        assert_eq!(order(&[other(1, "bpf"), ours(1)], &ours(1)), Order::NotFirst);
        assert_eq!(best_priority(&[other(1, "bpf")]), 1);
    }

    #[test]
    fn other_filter_kind_at_priority_1_blocks() {
        assert_eq!(best_priority(&[other(1, "matchall")]), 2);
        assert_eq!(order(&[other(1, "matchall"), ours(2)], &ours(2)), Order::Blocked);
        assert_eq!(order(&[other(1, "matchall"), ours(3)], &ours(3)), Order::NotFirst);
    }

    #[test]
    fn freed_priority_is_taken() {
        assert_eq!(order(&[other(2, "u32"), ours(3)], &ours(3)), Order::NotFirst);
    }
}

//! The packet sink as a filter on a clsact qdisc, for interfaces on which the agent's program is such a filter.
//!
//! If the process is killed, the filter stays. It drops only test packets of that run, and the next run removes it.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
};

use crate::{
    datapath::attach::clsact::TcFilter,
    node::netlink::{Netlink, NetlinkError},
};

/// Egress of a clsact qdisc, `ffff:fff3`.
const EGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };
/// Handle of the sink's filters, "veri" in ASCII, which no other program uses.
const HANDLE: TcHandle = TcHandle { major: 0x7665, minor: 0x7269 };
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
const NAME: &str = "verify_sink";

/// An attached filter. [`SinkFilter::remove`] detaches it.
#[derive(Debug)]
pub(crate) struct SinkFilter {
    ifindex: u32,
    priority: u16,
}

/// Lists the filters at egress of an interface in the order in which they run. Returns none without a clsact qdisc.
pub(crate) async fn filters(netlink: &Netlink, ifindex: u32) -> Result<Vec<TcFilter>, NetlinkError> {
    let request = RouteNetlinkMessage::GetTrafficFilter(message(ifindex));
    let call = format!("failed to list filters of interface {ifindex}");
    let answers = match netlink.dump(call, request).await {
        Err(error) if matches!(error.errno(), Some(libc::EINVAL | libc::ENODEV | libc::ENOENT)) => Vec::new(),
        answers => answers?,
    };
    let filters = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(message) => TcFilter::from_message(message),
        _ => None,
    });
    Ok(filters.collect())
}

impl SinkFilter {
    /// Adds the program as a filter directly behind the agent's, the first of `filters`. Returns `None` if another filter stays
    /// between them.
    pub(crate) async fn add_after_agent(
        netlink: &Netlink,
        ifindex: u32,
        filters: &[TcFilter],
        program: BorrowedFd<'_>,
    ) -> Result<Option<Self>, NetlinkError> {
        let Some((agent, behind)) = filters.split_first() else { return Ok(None) };
        let Some(priority) = agent.priority.checked_add(1) else { return Ok(None) };
        // All filters of a priority have the same kind and protocol, and a new BPF filter comes first.
        let is_between = |filter: &TcFilter| {
            filter.priority < priority || (filter.priority == priority && !filter.can_share_priority())
        };
        if behind.iter().any(is_between) {
            return Ok(None);
        }
        let filter = Self { ifindex, priority };
        let fd = program.as_raw_fd().cast_unsigned();
        let mut message = filter.message();
        message.attributes.push(TcAttribute::Options(
            [
                TcFilterBpfOption::ProgFd(fd),
                TcFilterBpfOption::ProgName(NAME.to_owned()),
                TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
            ]
            .map(TcOption::Bpf)
            .into(),
        ));
        let call = format!("failed to add a filter to interface {ifindex}");
        let request = RouteNetlinkMessage::NewTrafficFilter(message);
        netlink.acknowledged(call, request, NLM_F_CREATE | NLM_F_EXCL).await?;
        Ok(Some(filter))
    }

    /// Removes the filter if it still exists.
    pub(crate) async fn remove(&self, netlink: &Netlink) -> Result<(), NetlinkError> {
        let call = format!("failed to remove a filter of interface {}", self.ifindex);
        match netlink.acknowledged(call, RouteNetlinkMessage::DelTrafficFilter(self.message()), 0).await {
            Err(error) if !matches!(error.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
                Err(error)
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn message(&self) -> TcMessage {
        let mut message = message(self.ifindex);
        message.header.handle = HANDLE;
        message.header.info = TcHandle { major: self.priority, minor: ETH_P_ALL }.into();
        message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
        message
    }
}

/// Removes the filter of a run that was killed.
pub(crate) async fn remove_leftover(
    netlink: &Netlink,
    ifindex: u32,
    filters: &[TcFilter],
) -> Result<(), NetlinkError> {
    for filter in filters.iter().filter(|filter| filter.name.as_deref() == Some(NAME)) {
        SinkFilter { ifindex, priority: filter.priority }.remove(netlink).await?;
    }
    Ok(())
}

fn message(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = EGRESS;
    message
}

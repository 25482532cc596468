//! Events of links, routes and qdiscs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::{
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

use super::link::Link;

/// Event that the kernel reports through rtnetlink.
#[derive(Debug)]
pub enum Event {
    /// An interface was created or changed.
    Link(Link),
    /// The interface with this index was deleted, or moved to another namespace.
    LinkGone(u32),
    /// A route to this destination was added, changed or removed.
    Route(Destination),
    /// A routing policy rule was added or removed.
    Rule,
    /// An address of the node was added or removed.
    Address,
    /// A qdisc or filter on the interface with this index was added, changed or removed.
    Filter(u32),
    /// The receive buffer overran, and events were lost.
    Overrun,
}

/// Destination prefix of a route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Destination {
    pub(super) address: IpAddr,
    pub(super) prefix_length: u8,
}

impl Event {
    /// Converts a message to an event. Returns `None` if the message is irrelevant.
    pub fn from_payload(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Self> {
        let message = match payload {
            NetlinkPayload::Overrun(_) => return Some(Self::Overrun),
            NetlinkPayload::InnerMessage(message) => message,
            _ => return None,
        };
        match message {
            RouteNetlinkMessage::NewLink(link) => Link::from_message(link).map(Self::Link),
            RouteNetlinkMessage::DelLink(link) => {
                Link::from_message(link).map(|link| Self::LinkGone(link.index))
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                Some(Self::Route(Destination::of(&route)))
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Some(Self::Rule),
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Some(Self::Address),
            RouteNetlinkMessage::NewTrafficFilter(tc)
            | RouteNetlinkMessage::DelTrafficFilter(tc)
            | RouteNetlinkMessage::NewQueueDiscipline(tc)
            | RouteNetlinkMessage::DelQueueDiscipline(tc) => {
                u32::try_from(tc.header.index).ok().map(Self::Filter)
            }
            _ => None,
        }
    }
}

impl Destination {
    pub(super) fn of(route: &RouteMessage) -> Self {
        let address = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        });
        let any = match route.header.address_family {
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        Self { address: address.unwrap_or(any), prefix_length: route.header.destination_prefix_length }
    }

    /// Reports whether the kernel adds such a route to each interface with IPv6 (`fe80::/64`), so that the route does not
    /// show that the interface leads to an endpoint in it. A longer prefix shows that.
    pub(super) fn is_link_local(self) -> bool {
        const LINK_LOCAL: Destination = Destination {
            address: IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)),
            prefix_length: 10,
        };
        LINK_LOCAL.contains(self.address) && (LINK_LOCAL.prefix_length..=64).contains(&self.prefix_length)
    }

    pub(super) fn contains(self, address: IpAddr) -> bool {
        let common = match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => (u32::from(own) ^ u32::from(other)).leading_zeros(),
            (IpAddr::V6(own), IpAddr::V6(other)) => (u128::from(own) ^ u128::from(other)).leading_zeros(),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
        };
        common >= u32::from(self.prefix_length)
    }
}

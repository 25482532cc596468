//! rtnetlink: interfaces, routes, filters, and events about their changes.

use std::{
    fs::File,
    future::ready,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
};

use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        nsid::{NsidAttribute, NsidMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};
use thiserror::Error;

use super::{event_stream, interface_role::EndpointRoutes, link::Link, link_dump, route_dump};
use crate::node::link_event::{Destination, Event};

/// Error of a request to rtnetlink.
#[derive(Debug, Error)]
#[error("{call}")]
pub struct NetlinkError {
    /// Message: `failed to`, a verb and the object.
    call: String,
    /// Error that the kernel returned.
    source: io::Error,
}

impl NetlinkError {
    /// Returns the kernel's error number, if the kernel returned the error.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    pub(crate) fn new(call: impl Into<String>, source: io::Error) -> Self {
        Self { call: call.into(), source }
    }

    pub(crate) fn from_rtnetlink(call: impl Into<String>, error: rtnetlink::Error) -> Self {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        };
        Self::new(call, source)
    }
}

/// Connection to rtnetlink in the network namespace of the calling thread.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    endpoints: Vec<IpAddr>,
}

impl Netlink {
    /// Opens a connection. Must be called within a tokio runtime.
    pub fn connect() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| NetlinkError::new("failed to connect to rtnetlink", source))?;
        tokio::spawn(connection);
        Ok(Self { handle, endpoints: Vec::new() })
    }

    /// Sets the protected addresses. The interfaces of routes to them are uplinks.
    #[must_use]
    pub fn with_endpoints(self, endpoints: Vec<IpAddr>) -> Self {
        Self { endpoints, ..self }
    }

    /// Reports whether a route to `destination` may lead to a protected endpoint: true for a default route, false for
    /// the host route of a pod.
    pub fn may_lead_to_endpoint(&self, destination: Destination) -> bool {
        destination.prefix_length == 0
            || self.endpoints.iter().any(|&endpoint| destination.contains(endpoint))
    }

    /// Subscribes to events; to those of filters only if `filters` is true. Events wait in the receive buffer of the socket, and an
    /// overrun of the buffer is an event. The stream ends only if the connection is lost.
    pub fn events(filters: bool) -> Result<impl Stream<Item = Event> + Unpin, NetlinkError> {
        let mut groups = vec![
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        if filters {
            groups.push(MulticastGroup::Tc);
        }
        event_stream::subscribe(&groups)
            .map_err(|source| NetlinkError::new("failed to subscribe to rtnetlink events", source))
    }

    /// Lists all interfaces of the namespace.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        link_dump::links().await.map_err(|source| NetlinkError::new("failed to list interfaces", source))
    }

    /// Returns the indices of the interfaces through which packets can leave the node for a protected endpoint: those
    /// of all matching routes in any table, and those that the kernel chooses for the node's own packets.
    ///
    /// A router advertisement of a pod can make the pod's link an uplink. This is harmless, because an uplink gets an
    /// additional hook and loses none.
    pub async fn endpoint_routes(&self) -> Result<EndpointRoutes, NetlinkError> {
        let mut routes = EndpointRoutes::default();
        for route in self.routes(None, |route| self.leads_to_endpoint(route)).await? {
            routes.add(Destination::of(&route).is_link_local(), outgoing(&route));
        }
        for &endpoint in &self.endpoints {
            // The kernel's choice among the interfaces with a link-local route is arbitrary.
            let is_link_local = matches!(endpoint, IpAddr::V6(address) if address.is_unicast_link_local());
            let route = self.route_to(endpoint).await?;
            let route = route.filter(|route| route.header.kind == RouteType::Unicast);
            routes.add(is_link_local, route.as_ref().map(outgoing).unwrap_or_default());
        }
        Ok(routes)
    }

    fn leads_to_endpoint(&self, route: &RouteMessage) -> bool {
        route.header.kind == RouteType::Unicast && self.may_lead_to_endpoint(Destination::of(route))
    }

    /// Reports whether a protected address is local to the node, so that the node's own sockets receive packets for it.
    /// Checks the routes of every table, because rules can choose the table by mark or interface, as for transparent
    /// proxies.
    pub async fn has_local_endpoint(&self) -> Result<bool, NetlinkError> {
        let is_local = |route: &RouteMessage| {
            let destination = Destination::of(route);
            route.header.kind == RouteType::Local
                && self.endpoints.iter().any(|&endpoint| destination.contains(endpoint))
        };
        Ok(!self.routes(Some(RouteType::Local), is_local).await?.is_empty())
    }

    /// Lists the routes of all tables that match `is_selected`. With `kind`, the kernel sends only routes of that type, if it can
    /// filter dumps.
    async fn routes(
        &self,
        kind: Option<RouteType>,
        is_selected: impl Fn(&RouteMessage) -> bool,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            match route_dump::routes(family, kind, &is_selected).await {
                Ok(found) => routes.extend(found),
                // The kernel has no IPv6.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
                }
                Err(source) => return Err(NetlinkError::new("failed to list routes", source)),
            }
        }
        Ok(routes)
    }

    /// Returns the route that the kernel chooses for the node's packets to `endpoint`, if there is one.
    pub(crate) async fn route_to(&self, endpoint: IpAddr) -> Result<Option<RouteMessage>, NetlinkError> {
        let request = match endpoint {
            IpAddr::V4(address) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build()
            }
            IpAddr::V6(address) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).build()
            }
        };
        let mut route = std::pin::pin!(self.handle.route().get(request).execute());
        match route.try_next().await {
            Ok(route) => Ok(route),
            Err(error) => {
                let error =
                    NetlinkError::from_rtnetlink(format!("failed to look up the route to {endpoint}"), error);
                match error.errno() {
                    Some(
                        libc::ENETUNREACH
                        | libc::EHOSTUNREACH
                        | libc::EACCES
                        | libc::EINVAL
                        | libc::EAFNOSUPPORT
                        | libc::EOPNOTSUPP,
                    ) => Ok(None),
                    _ => Err(error),
                }
            }
        }
    }

    /// Returns the ID that this namespace assigns to the network namespace of the file `namespace`, as in
    /// [`Link::peer_netns`]. Returns `None` if it has no ID, in which case no link leads into it.
    pub async fn netns_id(&self, namespace: &File) -> Result<Option<i32>, NetlinkError> {
        let error = |source| NetlinkError::new("failed to look up the ID of a network namespace", source);
        let fd = u32::try_from(namespace.as_raw_fd()).map_err(|source| error(io::Error::other(source)))?;
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(fd));
        let mut answers = self.request(RouteNetlinkMessage::GetNsId(message), 0);
        let Some(answer) = answers.try_next().await.map_err(error)? else { return Ok(None) };
        let RouteNetlinkMessage::NewNsId(answer) = answer else { return Ok(None) };
        let id = answer.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) => Some(*id),
            _ => None,
        });
        // NETNSA_NSID_NOT_ASSIGNED is -1.
        Ok(id.filter(|&id| id >= 0))
    }

    /// Sends a request that the kernel acknowledges.
    pub(crate) async fn acknowledged(
        &self,
        call: impl Into<String>,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        let mut answers = self.request(message, NLM_F_ACK | flags);
        while let Some(answer) = answers.next().await {
            if let Err(source) = answer {
                return Err(NetlinkError::new(call, source));
            }
        }
        Ok(())
    }

    /// Sends a dump request and returns all messages of the reply.
    pub(crate) async fn dump(
        &self,
        call: impl Into<String>,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.request(message, NLM_F_DUMP)
            .try_collect()
            .await
            .map_err(|source| NetlinkError::new(call, source))
    }

    fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> impl Stream<Item = io::Result<RouteNetlinkMessage>> + Unpin {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let answers = match self.handle.clone().request(request) {
            Ok(answers) => answers.map(Ok).left_stream(),
            Err(error) => stream::iter([Err(io::Error::other(error))]).right_stream(),
        };
        answers.try_filter_map(|answer| {
            ready(match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
                _ => Ok(None),
            })
        })
    }
}

/// Returns the indices of the interfaces through which a route leaves.
pub(crate) fn outgoing(route: &RouteMessage) -> Vec<u32> {
    let mut interfaces = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    interfaces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: Ipv4Addr, length: u8) -> RouteMessage {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, length)
            .output_interface(3)
            .build()
    }

    #[tokio::test]
    async fn kernel_filters_routes_by_type() {
        let netlink = Netlink::connect().unwrap();
        let all = netlink.routes(None, |_| true).await.unwrap();
        let local = netlink.routes(Some(RouteType::Local), |_| true).await.unwrap();
        assert!(local.iter().all(|route| route.header.kind == RouteType::Local), "{local:#?}");
        let expected = all.iter().filter(|route| route.header.kind == RouteType::Local).count();
        assert_eq!(local.len(), expected);
    }

    #[tokio::test]
    async fn routes_to_endpoints_lead_to_uplinks() {
        let any = Ipv4Addr::UNSPECIFIED;
        let endpoints = [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(168, 63, 129, 16)];
        let endpoint_v6 = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
        let netlink = Netlink::connect().unwrap();
        let all = endpoints.into_iter().map(IpAddr::from).chain([endpoint_v6.into()]).collect();
        let with_endpoints = netlink.clone().with_endpoints(all);
        let leads = |destination, length| with_endpoints.leads_to_endpoint(&route(destination, length));
        assert!(leads(any, 0) && leads(Ipv4Addr::new(169, 254, 0, 0), 16));
        assert!(leads(endpoints[0], 32) && leads(endpoints[1], 32));
        assert!(!leads(Ipv4Addr::new(10, 0, 0, 7), 32) && !leads(Ipv4Addr::new(169, 254, 169, 253), 32));
        assert!(!netlink.leads_to_endpoint(&route(endpoints[0], 32)));
        let leads_v6 = |destination, length| {
            let route =
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(destination, length).build();
            with_endpoints.leads_to_endpoint(&route)
        };
        assert!(leads_v6(Ipv6Addr::UNSPECIFIED, 0) && leads_v6(endpoint_v6, 128));
        assert!(!leads_v6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 64));
        let is_link_local = |address: &str, prefix_length| {
            Destination { address: address.parse().unwrap(), prefix_length }.is_link_local()
        };
        assert!(is_link_local("fe80::", 64) && is_link_local("fe80::", 10));
        assert!(!is_link_local("fe80::a9fe:a9fe", 128) && !is_link_local("::", 0));
        assert!(!is_link_local("169.254.0.0", 16) && !is_link_local("fd00:ec2::", 64));
        assert_eq!(outgoing(&route(any, 0)), [3]);
    }
}

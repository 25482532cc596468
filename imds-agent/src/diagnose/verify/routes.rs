//! Route back to the test pod. Strict reverse path filtering drops its packets without such a route.

use std::net::IpAddr;

use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteMessage, RouteScope},
    },
};

use super::frames::{SOURCE_V4, SOURCE_V6};
use crate::node::netlink::{Netlink, NetlinkError};

/// Adds or replaces the route to the test pod's address of this family, through an interface.
pub(crate) async fn replace(netlink: &Netlink, is_ipv4: bool, ifindex: u32) -> Result<(), NetlinkError> {
    let call = format!("failed to add the route to {} through interface {ifindex}", source(is_ipv4));
    let request = RouteNetlinkMessage::NewRoute(route(is_ipv4, Some(ifindex))?);
    netlink.acknowledged(call, request, NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Removes the routes if they exist. A run that is killed leaves those through a bridge.
pub(crate) async fn remove(netlink: &Netlink) -> Result<(), NetlinkError> {
    for is_ipv4 in [true, false] {
        let call = format!("failed to remove the route to {}", source(is_ipv4));
        let removed =
            netlink.acknowledged(call, RouteNetlinkMessage::DelRoute(route(is_ipv4, None)?), 0).await;
        match removed {
            // An errno means that the route does not exist, or that the address family is disabled.
            Err(error) if error.errno().is_none() => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn source(is_ipv4: bool) -> IpAddr {
    if is_ipv4 { SOURCE_V4.into() } else { SOURCE_V6.into() }
}

fn route(is_ipv4: bool, ifindex: Option<u32>) -> Result<RouteMessage, NetlinkError> {
    let length = if is_ipv4 { 32 } else { 128 };
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(source(is_ipv4), length);
    let route =
        route.map_err(|error| NetlinkError::new("failed to build a route", std::io::Error::other(error)))?;
    Ok(match ifindex {
        Some(ifindex) => route.output_interface(ifindex).scope(RouteScope::Link).build(),
        None => route.scope(RouteScope::NoWhere).build(),
    })
}

//! Veth pairs inside the node through which it routes packets to protected endpoints.

use super::doctor_report::{DoctorCheck, or_ok};
use crate::{
    datapath::{maps::endpoint_maps, object::Maps, pin::dir::PinDir},
    node::netlink::{Netlink, NetlinkError},
};

const NAME: &str = "node_pairs";

/// Lists the pairs that packets to an endpoint are routed through. A packet loses its socket there, so that `node_egress` at
/// the next interface can't tell the node's packets from those of pods. For ports of bridges the hash of passed packets
/// replaces the socket.
pub(crate) async fn checks(pins: &PinDir, netlink: &Netlink) -> Result<Vec<DoctorCheck>, NetlinkError> {
    let protected =
        Maps::open(pins).ok().and_then(|maps| endpoint_maps::read(&maps).ok()).unwrap_or_default();
    let addresses = protected.iter().map(|endpoint| endpoint.address).collect();
    let routed = netlink.clone().with_endpoints(addresses).endpoint_routes().await?.sure;
    let links = netlink.links().await?;
    let through = links.iter().filter(|link| link.is_internal_pair() && routed.contains(&link.index));
    let pairs = through.filter_map(|link| {
        let peer = links.iter().find(|peer| Some(peer.index) == link.lower && peer.master.is_none())?;
        Some((&link.name, &peer.name))
    });
    let checks = pairs.map(|(name, peer)| {
        let observed = format!("packets to an endpoint are routed through {name} to {peer}, both of the node");
        let remedy = format!(
            "packets of the node and of exempt pods that enter through {peer} are denied at the uplink behind it: route them \
             through another interface, or exclude that uplink ([interfaces] exclude)"
        );
        DoctorCheck::degraded(NAME, observed, remedy)
    });
    Ok(or_ok(checks, NAME, "no route to an endpoint leads through a veth pair of the node"))
}

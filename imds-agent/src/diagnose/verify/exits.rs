//! Finds the devices through which packets leave the machine: the lowest device of the stack below each uplink.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};

use crate::node::{
    link::VERIFY_PREFIX,
    netlink::{Netlink, NetlinkError},
};

/// A network device of the node, with its position in a stack of devices.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct NetDevice {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// MAC address; empty if the kernel does not report one.
    pub(crate) address: Vec<u8>,
    pub(crate) mtu: u32,
    kind: DeviceKind,
    /// Bridge, bond, team or VRF of which this device is a port.
    master: Option<u32>,
    /// Device below, or other end of a pair, if it is in the same namespace.
    link: Option<u32>,
    is_running: bool,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum DeviceKind {
    /// A device without a kind in rtnetlink, such as a NIC.
    #[default]
    Plain,
    /// A virtual device that sends through the device that it is linked to.
    Stacked,
    /// One end of a pair.
    Pair,
    /// Any other virtual device, such as a bridge or a bond.
    Virtual,
}

/// Lists the devices of the node's namespace by index.
pub(crate) async fn devices(netlink: &Netlink) -> Result<BTreeMap<u32, NetDevice>, NetlinkError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = netlink.dump("failed to list interfaces", request).await?;
    let devices = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(NetDevice::from_message(link)),
        _ => None,
    });
    Ok(devices.map(|device| (device.index, device)).collect())
}

/// Returns the lowest devices below `uplinks`, without `pods`: each packet that leaves by an uplink leaves by one of them.
pub(crate) fn lowest(
    devices: &BTreeMap<u32, NetDevice>,
    uplinks: impl IntoIterator<Item = u32>,
    pods: &BTreeSet<u32>,
) -> BTreeSet<u32> {
    let (mut seen, mut lowest) = (BTreeSet::new(), BTreeSet::new());
    let mut queue: Vec<_> = uplinks.into_iter().collect();
    while let Some(index) = queue.pop() {
        let Some(device) = devices.get(&index).filter(|_| seen.insert(index)) else { continue };
        let below: Vec<_> = below(devices, device).filter(|index| !pods.contains(index)).collect();
        if below.is_empty() {
            lowest.insert(device.index);
        }
        queue.extend(below);
    }
    lowest
}

/// Returns the devices to which `device` passes its packets.
fn below<'d>(devices: &'d BTreeMap<u32, NetDevice>, device: &'d NetDevice) -> impl Iterator<Item = u32> + 'd {
    let ports = move |master: u32| {
        let ports = devices.values().filter(move |port| port.master == Some(master) && !port.is_own());
        // A synthetic NIC (netvsc) sends by itself while the virtual function below is down.
        ports.filter(move |port| device.kind != DeviceKind::Plain || port.is_running).map(|port| port.index)
    };
    let linked = device.link.filter(|_| device.kind == DeviceKind::Stacked);
    let peer = device.link.filter(|_| device.kind == DeviceKind::Pair).and_then(|peer| devices.get(&peer));
    let behind_peer = peer.and_then(|peer| peer.master).into_iter().flat_map(ports);
    let behind_peer = behind_peer.filter(move |index| Some(*index) != device.link);
    ports(device.index).chain(linked).chain(behind_peer)
}

impl NetDevice {
    fn from_message(message: LinkMessage) -> Self {
        let mut device = Self {
            index: message.header.index,
            is_running: message.header.flags.contains(LinkFlags::Running),
            ..Self::default()
        };
        let mut is_elsewhere = false;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name = name,
                LinkAttribute::Address(address) => device.address = address,
                LinkAttribute::Mtu(mtu) => device.mtu = mtu,
                LinkAttribute::Controller(master) => {
                    device.master = Some(master).filter(|&master| master != 0);
                }
                LinkAttribute::Link(link) => device.link = Some(link).filter(|&link| link != 0),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(info) => device.kind = kind(&info),
                _ => {}
            }
        }
        if is_elsewhere {
            device.link = None;
        }
        device
    }

    /// Reports whether `imds-agent verify` created the device.
    fn is_own(&self) -> bool {
        self.name.starts_with(VERIFY_PREFIX)
    }
}

fn kind(info: &[LinkInfo]) -> DeviceKind {
    let kind = info.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        None => DeviceKind::Plain,
        Some(
            InfoKind::Vlan
            | InfoKind::MacVlan
            | InfoKind::MacVtap
            | InfoKind::IpVlan
            | InfoKind::IpVtap
            | InfoKind::MacSec,
        ) => DeviceKind::Stacked,
        Some(InfoKind::Veth | InfoKind::Netkit) => DeviceKind::Pair,
        Some(_) => DeviceKind::Virtual,
    }
}

/// Route of the node to a destination.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Route {
    /// Indices of the interfaces by which packets leave; none without a route.
    pub(crate) interfaces: Vec<u32>,
    /// True if the destination is an address of the node.
    pub(crate) is_local: bool,
}

/// Looks up the route of the node to `destination`.
pub(crate) async fn route_to(netlink: &Netlink, destination: IpAddr) -> Result<Route, NetlinkError> {
    let length = if destination.is_ipv4() { 32 } else { 128 };
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(destination, length);
    let route =
        route.map_err(|error| NetlinkError::new("failed to build a request", io::Error::other(error)))?;
    let request = RouteNetlinkMessage::GetRoute(route.build());
    match netlink.answer(format!("failed to look up the route to {destination}"), request).await {
        Ok(Some(RouteNetlinkMessage::NewRoute(route))) => Ok(Route::from_message(&route)),
        Ok(_) => Ok(Route::default()),
        // The destination is unreachable or prohibited, or its address family is disabled.
        Err(error) if error.errno().is_some() => Ok(Route::default()),
        Err(error) => Err(error),
    }
}

impl Route {
    fn from_message(message: &RouteMessage) -> Self {
        if message.header.kind == RouteType::Local {
            return Self { interfaces: Vec::new(), is_local: true };
        }
        let mut interfaces = Vec::new();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interfaces.push(*index),
                RouteAttribute::MultiPath(hops) => {
                    interfaces.extend(hops.iter().map(|hop| hop.interface_index));
                }
                _ => {}
            }
        }
        Self { interfaces, is_local: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, kind: DeviceKind, master: Option<u32>, link: Option<u32>) -> NetDevice {
        NetDevice {
            index,
            name: format!("d{index}"),
            kind,
            master,
            link,
            is_running: true,
            ..NetDevice::default()
        }
    }

    fn lowest_below(devices: &[NetDevice], uplink: u32) -> Vec<u32> {
        let devices = devices.iter().map(|device| (device.index, device.clone())).collect();
        lowest(&devices, [uplink], &[9].into()).into_iter().collect()
    }

    #[test]
    fn stacks_end_at_the_nic() {
        use DeviceKind::{Pair, Plain, Stacked, Virtual};
        assert_eq!(lowest_below(&[device(2, Plain, None, None)], 2), [2]);
        // A VLAN on a bond with two NICs.
        let bond = [
            device(2, Plain, Some(4), None),
            device(3, Plain, Some(4), None),
            device(4, Virtual, None, None),
            device(5, Stacked, None, Some(4)),
        ];
        assert_eq!(lowest_below(&bond, 5), [2, 3]);
        // A bridge with the NIC and a pod, reached through a pair.
        let bridge = [
            device(2, Plain, Some(4), None),
            device(4, Virtual, None, None),
            device(5, Pair, None, Some(6)),
            device(6, Pair, Some(4), Some(5)),
            device(9, Pair, Some(4), None),
        ];
        assert_eq!(lowest_below(&bridge, 4), [2, 6]);
        assert_eq!(lowest_below(&bridge, 5), [2]);
    }

    #[test]
    fn netvsc_without_its_function() {
        let mut function = device(3, DeviceKind::Plain, Some(2), None);
        let synthetic = device(2, DeviceKind::Plain, None, None);
        assert_eq!(lowest_below(&[synthetic.clone(), function.clone()], 2), [3]);
        function.is_running = false;
        assert_eq!(lowest_below(&[synthetic, function], 2), [2]);
    }
}

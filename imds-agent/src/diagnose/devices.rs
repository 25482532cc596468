//! Interfaces of the node, with the details that only `doctor` and `verify` read.

use std::collections::BTreeSet;

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp},
};

use crate::node::{
    link::{Link, LinkKind},
    netlink::{Netlink, NetlinkError},
};

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Device {
    pub(crate) link: Link,
    /// MAC address; empty if the kernel does not report one.
    pub(crate) address: Vec<u8>,
    pub(crate) mtu: u32,
    pub(crate) is_running: bool,
    /// True for a device without a kind in rtnetlink, such as a NIC.
    pub(crate) is_plain: bool,
    /// True for a virtual device that sends through the device that it is linked to.
    pub(crate) is_stacked: bool,
    /// Ids of the XDP programs, one for each mode.
    pub(crate) xdp: BTreeSet<u32>,
}

/// Lists the interfaces of the namespace, except for those that the library can't decode.
pub(crate) async fn list(netlink: &Netlink) -> Result<Vec<Device>, NetlinkError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = netlink.dump("failed to list interfaces", request).await?;
    let devices = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Device::from_message(message),
        _ => None,
    });
    Ok(devices.collect())
}

impl Device {
    pub(crate) const fn new(link: Link) -> Self {
        Self {
            link,
            address: Vec::new(),
            mtu: 0,
            is_running: false,
            is_plain: true,
            is_stacked: false,
            xdp: BTreeSet::new(),
        }
    }

    fn from_message(message: LinkMessage) -> Option<Self> {
        let mut device = Self::new(Link::from_message(message.clone())?);
        device.is_running = message.header.flags.contains(LinkFlags::Running);
        device.is_stacked = matches!(device.link.kind, LinkKind::Vlan | LinkKind::Macvlan | LinkKind::Ipvlan);
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::Address(address) => device.address = address,
                LinkAttribute::Mtu(mtu) => device.mtu = mtu,
                LinkAttribute::Xdp(xdp) => device.xdp = xdp.iter().filter_map(xdp_program).collect(),
                LinkAttribute::LinkInfo(info) => {
                    device.is_plain = !info.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
                    device.is_stacked |= info.contains(&LinkInfo::Kind(InfoKind::MacSec));
                }
                _ => {}
            }
        }
        Some(device)
    }
}

fn xdp_program(attribute: &LinkXdp) -> Option<u32> {
    match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => {
            Some(*id)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::LinkLayerType;

    use super::*;

    fn device(attributes: Vec<LinkAttribute>) -> Device {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = attributes;
        Device::from_message(message).unwrap()
    }

    fn virtual_device(kind: InfoKind) -> Device {
        device(vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])])
    }

    #[test]
    fn ports_and_xdp_programs() {
        let observed = device(vec![
            LinkAttribute::IfName("veth0".to_owned()),
            LinkAttribute::Controller(3),
            LinkAttribute::Xdp(vec![LinkXdp::ProgId(9), LinkXdp::SkbProgId(9)]),
        ]);
        let link = Link { name: "veth0".to_owned(), master: Some(3), ..Link::with_index(7) };
        assert_eq!(observed, Device { xdp: BTreeSet::from([9]), ..Device::new(link) });
    }

    #[test]
    fn only_stacked_devices_send_through_others() {
        for (kind, is_stacked) in [
            (InfoKind::Vlan, true),
            (InfoKind::MacVtap, true),
            (InfoKind::IpVlan, true),
            (InfoKind::MacSec, true),
            (InfoKind::Veth, false),
            (InfoKind::Bond, false),
        ] {
            let device = virtual_device(kind);
            assert_eq!((device.is_plain, device.is_stacked), (false, is_stacked), "{device:?}");
        }
    }
}

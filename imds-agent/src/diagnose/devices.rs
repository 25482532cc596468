//! Interfaces of the node, with the details that only `doctor` and `verify` read.

use std::collections::BTreeSet;

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{
        InfoData, InfoKind, InfoNetkit, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
        NetkitScrub,
    },
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
    pub(crate) mark_source: Option<MarkSource>,
}

/// Kind of device that lets the sender of a packet choose its mark.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MarkSource {
    /// VXLAN whose header carries a group policy, which becomes the mark (`vxlan_parse_gbp_hdr`, drivers/net/vxlan).
    Gbp,
    /// netkit pair that does not clear the mark of the pod's packets (`IFLA_NETKIT_PEER_SCRUB`, Linux 6.13).
    NetkitScrubNone,
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
            mark_source: None,
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
                    device.mark_source = info.iter().find_map(mark_source);
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

fn mark_source(info: &LinkInfo) -> Option<MarkSource> {
    let LinkInfo::Data(data) = info else { return None };
    match data {
        // With `external` the policy goes to the packet's metadata, and the mark stays as it is.
        InfoData::Vxlan(options) => (options.contains(&InfoVxlan::Gbp)
            && !options.contains(&InfoVxlan::CollectMetadata(true)))
        .then_some(MarkSource::Gbp),
        InfoData::Netkit(options) => {
            let keeps_mark = options.contains(&InfoNetkit::PeerScrub(NetkitScrub::None));
            keeps_mark.then_some(MarkSource::NetkitScrubNone)
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

    fn virtual_device(kind: InfoKind, data: Option<InfoData>) -> Device {
        let info = [LinkInfo::Kind(kind)].into_iter().chain(data.map(LinkInfo::Data));
        device(vec![LinkAttribute::LinkInfo(info.collect())])
    }

    #[test]
    fn devices_that_keep_a_mark() {
        let vxlan = |options: &[InfoVxlan]| {
            virtual_device(InfoKind::Vxlan, Some(InfoData::Vxlan(options.to_vec()))).mark_source
        };
        assert_eq!(vxlan(&[InfoVxlan::Id(5), InfoVxlan::Gbp]), Some(MarkSource::Gbp));
        assert_eq!(vxlan(&[InfoVxlan::Id(5)]), None);
        assert_eq!(vxlan(&[InfoVxlan::Gbp, InfoVxlan::CollectMetadata(true)]), None);
        let netkit = |scrub| {
            let options = vec![InfoNetkit::Scrub(NetkitScrub::None), InfoNetkit::PeerScrub(scrub)];
            virtual_device(InfoKind::Netkit, Some(InfoData::Netkit(options))).mark_source
        };
        assert_eq!(netkit(NetkitScrub::None), Some(MarkSource::NetkitScrubNone));
        assert_eq!(netkit(NetkitScrub::Default), None);
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
            let device = virtual_device(kind, None);
            assert_eq!((device.is_plain, device.is_stacked), (false, is_stacked), "{device:?}");
        }
    }
}

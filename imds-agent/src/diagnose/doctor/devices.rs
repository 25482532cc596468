//! Interfaces of the node, with the details that only `doctor` reads.

use std::collections::BTreeSet;

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        InfoData, InfoKind, InfoNetkit, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, LinkXdp, NetkitScrub,
    },
};

use crate::node::netlink::{Netlink, NetlinkError};

/// One interface of the node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Index of the bridge, bond or VRF that has this interface as a port.
    pub(crate) master: Option<u32>,
    pub(crate) is_bridge: bool,
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
    fn from_message(message: LinkMessage) -> Option<Self> {
        if message.header.interface_family != AddressFamily::Unspec {
            return None;
        }
        let mut device = Self { index: message.header.index, ..Self::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name = name,
                LinkAttribute::Controller(index) => device.master = Some(index),
                LinkAttribute::Xdp(xdp) => device.xdp = xdp.iter().filter_map(xdp_program).collect(),
                LinkAttribute::LinkInfo(info) => {
                    device.is_bridge = info.contains(&LinkInfo::Kind(InfoKind::Bridge));
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
    use super::*;

    fn device(attributes: Vec<LinkAttribute>) -> Device {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.attributes = attributes;
        Device::from_message(message).unwrap()
    }

    fn source(kind: InfoKind, data: InfoData) -> Option<MarkSource> {
        let info = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
        device(vec![LinkAttribute::LinkInfo(info)]).mark_source
    }

    #[test]
    fn devices_that_keep_a_mark() {
        let vxlan = |options: &[InfoVxlan]| source(InfoKind::Vxlan, InfoData::Vxlan(options.to_vec()));
        assert_eq!(vxlan(&[InfoVxlan::Id(5), InfoVxlan::Gbp]), Some(MarkSource::Gbp));
        assert_eq!(vxlan(&[InfoVxlan::Id(5)]), None);
        assert_eq!(vxlan(&[InfoVxlan::Gbp, InfoVxlan::CollectMetadata(true)]), None);
        let netkit = |scrub| {
            let options = vec![InfoNetkit::Scrub(NetkitScrub::None), InfoNetkit::PeerScrub(scrub)];
            source(InfoKind::Netkit, InfoData::Netkit(options))
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
        let expected = Device {
            index: 7,
            name: "veth0".to_owned(),
            master: Some(3),
            xdp: BTreeSet::from([9]),
            ..Device::default()
        };
        assert_eq!(observed, expected);
    }
}

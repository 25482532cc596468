//! The node's interfaces, as rtnetlink describes them.

use imds_ebpf_common::Frame;
use nix::net::if_::if_indextoname;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
};

/// An interface in the node's network namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name; it may change at any time.
    pub name: String,
    /// Kind of device.
    pub kind: Kind,
    /// What its packets start with.
    pub frame: Frame,
    /// Id of the network namespace of its peer, where that is another one (`IFLA_LINK_NETNSID`).
    pub peer_netns: Option<i32>,
}

/// Kinds of device that are told apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Virtual Ethernet pair.
    Veth,
    /// netkit pair (kernel 6.7).
    Netkit,
    /// Bridge.
    Bridge,
    /// Loopback.
    Loopback,
    /// Any other.
    Other,
    /// The kernel lists it, but its description could not be read. It is guarded as a pod's: at an interface that is
    /// none the guard finds nothing to deny, and the other mistake would leave a pod unguarded.
    Unreadable,
}

/// Name of the interface with this index in the calling thread's network namespace, where there is one.
#[must_use]
pub fn name_of(index: u32) -> Option<String> {
    if_indextoname(index).ok().and_then(|name| name.into_string().ok())
}

impl Link {
    /// An interface of which nothing but this is known.
    #[must_use]
    pub fn unreadable(index: u32, name: String) -> Self {
        Self { index, name, kind: Kind::Unreadable, frame: Frame::Ethernet, peer_netns: None }
    }

    /// Reads a `RTM_NEWLINK` message; `None` where it does not describe an interface as such: a bridge speaks of its
    /// ports in messages of the same type and another family.
    #[must_use]
    pub fn from_message(message: LinkMessage) -> Option<Self> {
        if message.header.interface_family != AddressFamily::Unspec {
            return None;
        }
        let layer = message.header.link_layer_type;
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: if layer == LinkLayerType::Loopback { Kind::Loopback } else { Kind::Other },
            frame: if has_link_header(layer) { Frame::Ethernet } else { Frame::Ip },
            peer_netns: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
                LinkAttribute::LinkInfo(info) => link.kind = kind(&info).unwrap_or(link.kind),
                _ => {}
            }
        }
        Some(link)
    }
}

fn kind(info: &[LinkInfo]) -> Option<Kind> {
    info.iter().find_map(|info| match info {
        LinkInfo::Kind(InfoKind::Veth) => Some(Kind::Veth),
        LinkInfo::Kind(InfoKind::Netkit) => Some(Kind::Netkit),
        LinkInfo::Kind(InfoKind::Bridge) => Some(Kind::Bridge),
        _ => None,
    })
}

/// What the kernel's `dev_is_mac_header_xmit` says (`include/linux/if_arp.h`): at a TC hook the packets of the other types
/// start with their IP header.
fn has_link_header(layer: LinkLayerType) -> bool {
    !matches!(
        layer,
        LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre
            | LinkLayerType::Void
            | LinkLayerType::None
            | LinkLayerType::Rawip
            | LinkLayerType::Ppp
    )
}

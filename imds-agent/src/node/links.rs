//! The node's interfaces, as rtnetlink describes them.

use imds_ebpf_common::Frame;
use nix::net::if_::if_indextoname;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{
        InfoData, InfoKind, InfoNetkit, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
        XdpAttached,
    },
};

use crate::escape::escape_bytes;

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
    /// Index of the bridge, bond, team or VRF that this interface is a port of (`IFLA_MASTER`).
    pub master: Option<u32>,
    /// Index of the interface below this one (`IFLA_LINK`), if both are in one network namespace. Devices of a pair
    /// (veth, netkit) name their peer.
    pub lower: Option<u32>,
    /// Id of the XDP program on the interface, which runs before every TC hook; 0 if the kernel does not tell the id.
    /// A program that a BPF link attaches causes no event, so that only a resync finds it.
    pub xdp: Option<u32>,
}

/// Kinds of device that are told apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Virtual Ethernet pair.
    Veth,
    /// Primary device of a netkit pair (kernel 6.7): the host side, which takes the programs of both devices.
    Netkit,
    /// Peer device of a netkit pair: the pod's side, which takes no netkit program.
    NetkitPeer,
    /// Bridge.
    Bridge,
    /// Bond.
    Bond,
    /// Team.
    Team,
    /// VLAN.
    Vlan,
    /// macvlan or macvtap.
    Macvlan,
    /// ipvlan or ipvtap.
    Ipvlan,
    /// Virtual routing and forwarding device.
    Vrf,
    /// Intermediate functional block: receives packets that filters of other interfaces redirect.
    Ifb,
    /// Open vSwitch datapath or internal port.
    Ovs,
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
    // Bytes that are not UTF-8 are escaped as in the name of [`Link::unreadable`].
    let name = if_indextoname(index).ok()?;
    Some(name.into_string().unwrap_or_else(|error| escape_bytes(error.into_cstring().as_bytes())))
}

impl Link {
    /// An interface of which nothing but this is known.
    #[must_use]
    pub fn unreadable(index: u32, name: String) -> Self {
        Self { name, kind: Kind::Unreadable, ..Self::with_index(index) }
    }

    /// An interface of no special kind, without a name.
    #[must_use]
    pub const fn with_index(index: u32) -> Self {
        Self {
            index,
            name: String::new(),
            kind: Kind::Other,
            frame: Frame::Ethernet,
            peer_netns: None,
            master: None,
            lower: None,
            xdp: None,
        }
    }

    /// Reports whether the interface is one end of a veth pair that has both ends in this network namespace.
    #[must_use]
    pub fn is_internal_pair(&self) -> bool {
        self.kind == Kind::Veth && self.peer_netns.is_none() && self.lower.is_some()
    }

    /// Reports whether the other end is in another network namespace, or may be: a pod's link, or an uplink of a node that
    /// is itself a container.
    #[must_use]
    pub fn leads_elsewhere(&self) -> bool {
        match self.kind {
            Kind::Veth | Kind::Netkit | Kind::NetkitPeer => self.peer_netns.is_some(),
            Kind::Unreadable => true,
            _ => false,
        }
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
            kind: if layer == LinkLayerType::Loopback { Kind::Loopback } else { Kind::Other },
            frame: if has_link_header(layer) { Frame::Ethernet } else { Frame::Ip },
            ..Self::with_index(message.header.index)
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
                LinkAttribute::Controller(master) => link.master = Some(master).filter(|&master| master != 0),
                LinkAttribute::Link(lower) => link.lower = Some(lower),
                LinkAttribute::Xdp(xdp) => link.xdp = xdp_program(&xdp),
                LinkAttribute::LinkInfo(info) => link.kind = kind(&info).unwrap_or(link.kind),
                _ => {}
            }
        }
        // An index of another network namespace means nothing in this one; tunnels have 0 for none.
        let is_here = link.peer_netns.is_none();
        link.lower = link.lower.filter(|&lower| is_here && lower != 0 && lower != link.index);
        Some(link)
    }
}

fn kind(info: &[LinkInfo]) -> Option<Kind> {
    let kind = info.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })?;
    Some(match kind {
        InfoKind::Veth => Kind::Veth,
        InfoKind::Netkit if is_netkit_peer(info) => Kind::NetkitPeer,
        InfoKind::Netkit => Kind::Netkit,
        InfoKind::Bridge => Kind::Bridge,
        InfoKind::Bond => Kind::Bond,
        InfoKind::Team => Kind::Team,
        InfoKind::Vlan => Kind::Vlan,
        InfoKind::MacVlan | InfoKind::MacVtap => Kind::Macvlan,
        InfoKind::IpVlan | InfoKind::IpVtap => Kind::Ipvlan,
        InfoKind::Vrf => Kind::Vrf,
        InfoKind::Ifb => Kind::Ifb,
        InfoKind::Other(kind) if kind == "openvswitch" => Kind::Ovs,
        _ => return None,
    })
}

/// Reports whether `IFLA_NETKIT_PRIMARY` says so: each kernel with netkit sends it.
fn is_netkit_peer(info: &[LinkInfo]) -> bool {
    info.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Netkit(data)) => data.contains(&InfoNetkit::Primary(false)),
        _ => false,
    })
}

/// Id of the attached XDP program. `IFLA_XDP_PROG_ID` lacks if there are several, one per mode.
fn xdp_program(attributes: &[LinkXdp]) -> Option<u32> {
    let is_attached = attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkXdp::Attached(attached) if *attached != XdpAttached::None));
    let program = attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => {
            Some(*id)
        }
        _ => None,
    });
    is_attached.then(|| program.unwrap_or_default())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(attributes: Vec<LinkAttribute>) -> Link {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.attributes = attributes;
        Link::from_message(message).unwrap()
    }

    #[test]
    fn lower_is_of_this_netns() {
        assert_eq!(parse(vec![LinkAttribute::Link(3)]).lower, Some(3));
        assert_eq!(parse(vec![LinkAttribute::Link(0)]).lower, None);
        assert_eq!(parse(vec![LinkAttribute::Link(3), LinkAttribute::LinkNetNsId(1)]).lower, None);
        assert_eq!(parse(vec![LinkAttribute::Controller(5)]).master, Some(5));
    }

    #[test]
    fn xdp_needs_the_attached_flag() {
        let xdp = |attributes| parse(vec![LinkAttribute::Xdp(attributes)]).xdp;
        assert_eq!(xdp(vec![LinkXdp::Attached(XdpAttached::None)]), None);
        let generic = vec![LinkXdp::Attached(XdpAttached::SocketBuffer), LinkXdp::ProgId(9)];
        assert_eq!(xdp(generic), Some(9));
        let several =
            vec![LinkXdp::Attached(XdpAttached::Multiple), LinkXdp::DrvProgId(4), LinkXdp::SkbProgId(5)];
        assert_eq!(xdp(several), Some(4));
    }

    #[test]
    fn netkit_sides_are_distinguished() {
        let netkit = |is_primary| {
            let data = InfoData::Netkit(vec![InfoNetkit::Primary(is_primary)]);
            let info = vec![LinkInfo::Kind(InfoKind::Netkit), LinkInfo::Data(data)];
            parse(vec![LinkAttribute::LinkInfo(info)]).kind
        };
        assert_eq!(netkit(true), Kind::Netkit);
        assert_eq!(netkit(false), Kind::NetkitPeer);
    }

    #[test]
    fn open_vswitch_by_name() {
        let info = vec![LinkInfo::Kind(InfoKind::Other("openvswitch".to_owned()))];
        assert_eq!(parse(vec![LinkAttribute::LinkInfo(info)]).kind, Kind::Ovs);
    }
}

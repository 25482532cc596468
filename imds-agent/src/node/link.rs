//! Interfaces of the node, as rtnetlink describes them.

use imds_ebpf_common::LinkLayer;
use nix::{errno::Errno, net::if_::if_indextoname};
use rtnetlink::packet_route::{
    AddressFamily,
    link::{
        InfoData, InfoKind, InfoNetkit, InfoPortKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
        LinkXdp, XdpAttached,
    },
};

use crate::escape::escape_bytes;

/// Prefix of the names of interfaces and cgroups that `imds-agent verify` creates. Their traffic is no denial to report.
pub(crate) const VERIFY_PREFIX: &str = "imdsv";

/// Interface in the node's network namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Interface index (ifindex), which the kernel may reuse after a deletion.
    pub index: u32,
    /// Interface name, which may change at any time.
    pub name: String,
    /// Kind of the device, as far as its role depends on it.
    pub kind: LinkKind,
    /// Link-layer header of the interface's packets.
    pub link_layer: LinkLayer,
    /// Hardware type (`ARPHRD_*`, `linux/if_arp.h`) if its link-layer header differs from all of [`LinkLayer`], as for IP over
    /// InfiniBand.
    pub unsupported_type: Option<u16>,
    /// ID of the peer's network namespace, if it differs from this one (`IFLA_LINK_NETNSID`).
    pub peer_netns: Option<i32>,
    /// Index of the bridge, bond, team or VRF to which this interface belongs as a port (`IFLA_MASTER`).
    pub master: Option<u32>,
    /// True for a port of a bridge, bond or team, which may send copies of one packet to several ports.
    pub is_copying_port: bool,
    /// Index of the interface below this one (`IFLA_LINK`), if both are in one network namespace. Devices of a pair
    /// (veth, netkit) name their peer.
    pub lower: Option<u32>,
    /// ID of the XDP program on the interface, which runs before every TC hook, or 0 if the kernel does not report the
    /// ID. Attaching a program with a BPF link causes no event, so only a resync finds it.
    pub xdp: Option<u32>,
}

/// Kinds of devices that the agent treats differently.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkKind {
    /// One end of a veth pair.
    Veth,
    /// Primary device of a netkit pair (kernel 6.7): the host side, which takes the programs of both devices.
    Netkit,
    /// Peer device of a netkit pair: the pod's side, which takes no netkit program.
    NetkitPeer,
    /// Linux bridge, not its ports.
    Bridge,
    /// Bond, not its slaves.
    Bond,
    /// Team device, not its ports.
    Team,
    /// VLAN device on top of another one.
    Vlan,
    /// macvlan or macvtap device.
    Macvlan,
    /// ipvlan or ipvtap device.
    Ipvlan,
    /// Virtual routing and forwarding (VRF) device.
    Vrf,
    /// Intermediate functional block (ifb): receives packets that filters of other interfaces redirect.
    Ifb,
    /// Open vSwitch datapath or internal port.
    Ovs,
    /// tun or tap device.
    Tun,
    /// Loopback device, which gets no hook.
    Loopback,
    /// Device of any other kind.
    Other,
    /// Interface that the kernel lists, but whose description could not be read. The agent treats it as a pod's: on an
    /// interface that is not a pod's the program finds nothing to deny, while the opposite error would leave a pod
    /// unenforced.
    Unreadable,
}

/// Returns the name of the interface with this index in the calling thread's network namespace, if it exists.
pub fn name_of(index: u32) -> Option<String> {
    // Invalid UTF-8 is escaped like in the name of [`Link::unreadable`].
    let name = if_indextoname(index).ok()?;
    Some(name.into_string().unwrap_or_else(|error| escape_bytes(error.into_cstring().as_bytes())))
}

/// Reports whether the calling thread's network namespace has no interface with this index.
pub fn is_deleted(index: u32) -> bool {
    matches!(if_indextoname(index), Err(Errno::ENXIO | Errno::ENODEV))
}

impl Link {
    /// Creates an interface whose other properties are unknown.
    pub fn unreadable(index: u32, name: String) -> Self {
        Self { name, kind: LinkKind::Unreadable, ..Self::with_index(index) }
    }

    /// Creates an Ethernet interface of kind [`LinkKind::Other`] without a name.
    pub const fn with_index(index: u32) -> Self {
        Self {
            index,
            name: String::new(),
            kind: LinkKind::Other,
            link_layer: LinkLayer::Ethernet,
            unsupported_type: None,
            peer_netns: None,
            master: None,
            is_copying_port: false,
            lower: None,
            xdp: None,
        }
    }

    /// Reports whether the interface is one end of a veth pair with both ends in this network namespace.
    pub fn is_internal_pair(&self) -> bool {
        self.kind == LinkKind::Veth && self.peer_netns.is_none() && self.lower.is_some()
    }

    /// Reports whether packets that the node sends may return through the interface, to leave through another one: ifb devices,
    /// and ports of bridges whose veth peer is in this network namespace.
    pub fn may_return_packets(&self) -> bool {
        self.kind == LinkKind::Ifb || (self.is_internal_pair() && self.master.is_some())
    }

    /// Reports whether the interface with this index is the master or the veth peer of this one.
    pub fn is_port_or_peer_of(&self, index: u32) -> bool {
        self.master == Some(index) || (self.is_internal_pair() && self.lower == Some(index))
    }

    /// Reports whether the interface is one end of a pair: a veth or a netkit.
    pub fn is_pair(&self) -> bool {
        matches!(self.kind, LinkKind::Veth | LinkKind::Netkit | LinkKind::NetkitPeer)
    }

    /// Reports whether the other end is, or may be, in another network namespace: the link of a pod, or an uplink of a
    /// node that is itself a container.
    pub fn leads_elsewhere(&self) -> bool {
        match self.kind {
            LinkKind::Veth | LinkKind::Netkit | LinkKind::NetkitPeer => self.peer_netns.is_some(),
            LinkKind::Unreadable => true,
            _ => false,
        }
    }

    /// Reports whether the interface can be a pod's link, now or once its peer is moved to the pod.
    pub fn may_be_pod(&self) -> bool {
        self.is_pair() || self.kind == LinkKind::Unreadable
    }

    /// Parses a `RTM_NEWLINK` message. Returns `None` for a bridge's message about a port, which has the same type but
    /// another family.
    pub fn from_message(message: LinkMessage) -> Option<Self> {
        if message.header.interface_family != AddressFamily::Unspec {
            return None;
        }
        let layer = message.header.link_layer_type;
        let mut link = Self {
            kind: if layer == LinkLayerType::Loopback { LinkKind::Loopback } else { LinkKind::Other },
            link_layer: if has_link_header(layer) { LinkLayer::Ethernet } else { LinkLayer::None },
            unsupported_type: unsupported_type(layer),
            ..Self::with_index(message.header.index)
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
                LinkAttribute::Controller(master) => link.master = Some(master).filter(|&master| master != 0),
                LinkAttribute::Link(lower) => link.lower = Some(lower),
                LinkAttribute::Xdp(xdp) => link.xdp = xdp_program(&xdp),
                LinkAttribute::LinkInfo(info) => {
                    link.is_copying_port = info.iter().any(is_copying_port);
                    link.kind = kind(&info).unwrap_or(link.kind);
                }
                _ => {}
            }
        }
        // An index of another network namespace is meaningless in this one. Tunnels report 0 for no lower device.
        let is_here = link.peer_netns.is_none();
        link.lower = link.lower.filter(|&lower| is_here && lower != 0 && lower != link.index);
        Some(link)
    }
}

/// Reports whether this attribute says that the interface is a port of a device that may copy packets to several ports.
fn is_copying_port(info: &LinkInfo) -> bool {
    matches!(info, LinkInfo::PortKind(InfoPortKind::Bond | InfoPortKind::Bridge | InfoPortKind::Team))
}

fn kind(info: &[LinkInfo]) -> Option<LinkKind> {
    let kind = info.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })?;
    Some(match kind {
        InfoKind::Veth => LinkKind::Veth,
        InfoKind::Netkit if is_netkit_peer(info) => LinkKind::NetkitPeer,
        InfoKind::Netkit => LinkKind::Netkit,
        InfoKind::Bridge => LinkKind::Bridge,
        InfoKind::Bond => LinkKind::Bond,
        InfoKind::Team => LinkKind::Team,
        InfoKind::Vlan => LinkKind::Vlan,
        InfoKind::MacVlan | InfoKind::MacVtap => LinkKind::Macvlan,
        InfoKind::IpVlan | InfoKind::IpVtap => LinkKind::Ipvlan,
        InfoKind::Vrf => LinkKind::Vrf,
        InfoKind::Ifb => LinkKind::Ifb,
        InfoKind::Tun => LinkKind::Tun,
        InfoKind::Other(kind) if kind == "openvswitch" => LinkKind::Ovs,
        _ => return None,
    })
}

/// Reports whether `IFLA_NETKIT_PRIMARY` marks the peer device. Each kernel with netkit sends the attribute.
fn is_netkit_peer(info: &[LinkInfo]) -> bool {
    info.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Netkit(data)) => data.contains(&InfoNetkit::Primary(false)),
        _ => false,
    })
}

/// Returns the ID of the attached XDP program. `IFLA_XDP_PROG_ID` is missing if there are several, one per mode.
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

/// Reports whether packets at a TC hook start with a link-layer header, like the kernel's `dev_is_mac_header_xmit`
/// (`include/linux/if_arp.h`). Packets of the other types start with their IP header.
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

/// Returns the hardware type if packets start with a link-layer header that is not Ethernet's.
fn unsupported_type(layer: LinkLayerType) -> Option<u16> {
    let is_supported =
        matches!(layer, LinkLayerType::Ether | LinkLayerType::Loopback) || !has_link_header(layer);
    (!is_supported).then(|| layer.into())
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
    fn ethernet_and_ip_are_supported() {
        for layer in [LinkLayerType::Ether, LinkLayerType::Loopback, LinkLayerType::None] {
            assert_eq!(unsupported_type(layer), None);
        }
        assert_eq!(unsupported_type(LinkLayerType::Infiniband), Some(libc::ARPHRD_INFINIBAND));
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
        assert_eq!(netkit(true), LinkKind::Netkit);
        assert_eq!(netkit(false), LinkKind::NetkitPeer);
    }

    #[test]
    fn open_vswitch_by_name() {
        let info = vec![LinkInfo::Kind(InfoKind::Other("openvswitch".to_owned()))];
        assert_eq!(parse(vec![LinkAttribute::LinkInfo(info)]).kind, LinkKind::Ovs);
    }
}

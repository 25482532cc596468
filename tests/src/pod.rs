//! Pods: network namespaces that are connected to the node.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use crate::{
    Netns, TestEnv,
    netkit::{self, NetkitMode},
    poll::poll_until,
    probe::LONG,
};

/// Subnet of all pod addresses.
pub(crate) const PODS: &str = "10.244.0.0/16";
pub(crate) const BRIDGED_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 1);
/// Length of the subnet prefix of pods behind the bridge.
pub(crate) const BRIDGED_PREFIX: u8 = 18;
pub(crate) const BRIDGED_GATEWAY_MAC: [u8; 6] = [0x02, 0x42, 10, 244, 2, 1];
const PODS_OF_SUBNET: u32 = 250;
/// Number of addresses in the bridge's subnet, which ends where the subnet of routed pods begins.
const MOST_PODS: u32 = 62 * PODS_OF_SUBNET;
/// Gateway of routed pods. The node answers ARP for it as a proxy, as with Calico and Azure CNI.
const ROUTED_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// MAC address of every host-side veth, as with Calico.
const ROUTED_GATEWAY_MAC: [u8; 6] = [0xee; 6];

/// Kind of the connection between a pod and its node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PodLink {
    /// Own veth with a host route, as with Calico, Azure CNI and the CNI plugin ptp.
    Routed,
    /// Veth that is a port of the bridge [`TestEnv::BRIDGE`](crate::TestEnv::BRIDGE), as with kubenet and flannel.
    Bridged,
    /// Netkit pair with a host route, as with Cilium: see [`skip_without_netkit`](crate::skip_without_netkit).
    Netkit(NetkitMode),
}

/// A network namespace with `eth0`, a veth whose peer is on the node.
#[derive(Debug)]
pub struct Pod {
    /// Network namespace of the pod.
    pub netns: Netns,
    /// IPv4 address of the pod.
    pub address: Ipv4Addr,
    /// MAC address of the pod's `eth0`.
    pub mac: [u8; 6],
    /// MAC address of the pod's default gateway.
    pub gateway_mac: [u8; 6],
    /// Name of the host-side interface.
    pub host_ifname: String,
    /// Index of the host-side interface in the node's namespace.
    pub host_ifindex: u32,
    /// Kind of the connection to the node.
    pub link: PodLink,
    node: Arc<Netns>,
}

impl TestEnv {
    /// Adds a routed pod that takes over the interface index and address of a deleted pod, and optionally its interface
    /// name.
    #[must_use]
    pub fn add_successor(&self, name: &str, index: u32, address: Ipv4Addr) -> Netns {
        let (successor, eth0) = (Netns::new("successor"), Pod::IFNAME);
        let pair = format!(
            "link add {name} index {index} address {} type veth peer name {eth0} netns {}",
            mac_text(ROUTED_GATEWAY_MAC),
            successor.name()
        );
        // The kernel may not have released the index of the deleted interface yet.
        poll_until(LONG, "a free interface index", || {
            let mut add = self.node.command("ip");
            add.args(pair.split_whitespace()).output().unwrap().status.success().then_some(())
        });
        self.node.ip(&format!(
            "link set {name} up
             addr add {ROUTED_GATEWAY}/32 dev {name}
             route add {address}/32 dev {name}"
        ));
        successor.ip(&format!(
            "link set lo up
             link set {eth0} up
             addr add {address}/32 dev {eth0}
             route add {ROUTED_GATEWAY} dev {eth0} scope link
             route add default via {ROUTED_GATEWAY} dev {eth0}"
        ));
        successor
    }
}

impl Pod {
    /// Name of the interface inside the pod.
    pub const IFNAME: &str = "eth0";

    pub(crate) fn new(node: &Arc<Netns>, link: PodLink, number: u32) -> Self {
        Self::connected(Netns::new(&format!("pod{number}")), node, link, number)
    }

    /// Connects the network namespace to the node.
    pub(crate) fn connected(netns: Netns, node: &Arc<Netns>, link: PodLink, number: u32) -> Self {
        let (first_subnet, gateway_mac) = match link {
            PodLink::Routed | PodLink::Netkit(_) => (64, ROUTED_GATEWAY_MAC),
            PodLink::Bridged => (2, BRIDGED_GATEWAY_MAC),
        };
        assert!(number < MOST_PODS, "more than {MOST_PODS} pods");
        let subnet = u8::try_from(first_subnet + number / PODS_OF_SUBNET).expect("less than 64 and 62");
        // The bridge has the first address of the subnet.
        let host = u8::try_from(number % PODS_OF_SUBNET + 2).expect("less than 250 and 2");
        let address = Ipv4Addr::new(10, 244, subnet, host);
        let mac = [0x02, 0x42, 10, 244, subnet, host];
        // Looks as random as real names, and is unique for every number (Knuth's multiplicative hash).
        let host_ifname = format!("veth{:08x}", (number + 1).wrapping_mul(2_654_435_761));
        let mut pod = Self {
            netns,
            address,
            mac,
            gateway_mac,
            host_ifname,
            host_ifindex: 0,
            link,
            node: Arc::clone(node),
        };
        pod.make_link(link);
        match link {
            PodLink::Routed | PodLink::Netkit(_) => pod.connect_routed(),
            PodLink::Bridged => pod.connect_bridged(),
        }
        let host_ifindex = node.run(|| nix::net::if_::if_nametoindex(pod.host_ifname.as_str()));
        pod.host_ifindex = host_ifindex.expect("the interface that was just made");
        pod
    }

    /// Returns the IPv6 address that [`TestEnv::add_pod_ipv6`] assigns.
    #[must_use]
    pub fn address_v6(&self) -> Ipv6Addr {
        let [.., subnet, host] = self.address.octets();
        let number = u16::from_be_bytes([subnet, host]);
        Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, number)
    }

    /// Deletes the link, then the namespace with all processes, as a container runtime does.
    pub fn delete(self) {
        drop(self);
    }

    fn make_link(&self, link: PodLink) {
        self.netns.sysctl("ipv4/conf/all/rp_filter", "0");
        self.netns.sysctl("ipv4/conf/default/rp_filter", "0");
        if let PodLink::Netkit(mode) = link {
            netkit::add_pair(&self.node, &self.host_ifname, mode, Self::IFNAME, &self.netns)
                .expect("make a netkit pair");
            let (mut host, mut pod) = (String::new(), String::new());
            if mode == NetkitMode::L2 {
                host = format!("address {}", mac_text(ROUTED_GATEWAY_MAC));
                pod = format!("address {}", mac_text(self.mac));
            }
            self.node.ip(&format!("link set {} {host} up", self.host_ifname));
            self.netns.ip(&format!("link set lo up\nlink set {} {pod} up", Self::IFNAME));
            return;
        }
        self.node.ip(&format!(
            "link add {veth} address {host_mac} type veth peer name {eth0} address {mac} netns {netns}
             link set {veth} up",
            veth = self.host_ifname,
            // A bridge port needs a MAC address other than the bridge's.
            host_mac = mac_text(ROUTED_GATEWAY_MAC),
            eth0 = Self::IFNAME,
            mac = mac_text(self.mac),
            netns = self.netns.name(),
        ));
        self.netns.ip(&format!("link set lo up\nlink set {} up", Self::IFNAME));
    }

    fn connect_routed(&self) {
        let veth = &self.host_ifname;
        self.node.sysctl(&format!("ipv4/conf/{veth}/proxy_arp"), "1");
        // The kernel delays proxy replies by up to 0.8 s by default.
        self.node.sysctl(&format!("ipv4/neigh/{veth}/proxy_delay"), "0");
        self.node.ip(&format!("route add {}/32 dev {veth}", self.address));
        self.add_routed_address();
    }

    /// Gives a routed pod its address and default route.
    pub fn add_routed_address(&self) {
        let (eth0, address) = (Self::IFNAME, self.address);
        self.netns.ip(&format!(
            "addr add {address}/32 dev {eth0}
             route add {ROUTED_GATEWAY} dev {eth0} scope link
             route add default via {ROUTED_GATEWAY} dev {eth0}"
        ));
    }

    /// Connects the host-side interface to the bridge, and gives the pod its address and default route.
    pub fn connect_bridged(&self) {
        let (veth, eth0, address) = (&self.host_ifname, Self::IFNAME, self.address);
        self.node.ip(&format!("link set {veth} master {}", TestEnv::BRIDGE));
        self.netns.ip(&format!(
            "addr add {address}/{BRIDGED_PREFIX} dev {eth0}
             route add default via {BRIDGED_GATEWAY} dev {eth0}"
        ));
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Fails if the node was dropped first, or the test deleted the interface itself.
        let mut command = self.node.command("ip");
        let _ =
            command.args(["link", "delete", &self.host_ifname]).stderr(std::process::Stdio::null()).status();
    }
}

/// Formats a MAC address for `ip`.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

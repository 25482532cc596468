//! The topology: a node, its uplink, and the metadata service beyond it.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tempfile::TempDir;

use crate::{
    Layout, Netns, PacketSocket, Pod, PodLink, ReceivedPackets,
    cgroup::Cgroup,
    layout::Routes,
    pins::PinDir,
    pod::{BRIDGED_GATEWAY, BRIDGED_GATEWAY_MAC, BRIDGED_PREFIX, PODS, mac_text},
    received_packets::Counter,
    services::Services,
};

/// IPv4 address of the metadata service.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// An unprotected service at the same distance (TEST-NET-2, RFC 5737).
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);

/// IPv6 address of the metadata service (AWS).
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Configuration that protects [`METADATA`] and [`METADATA_V6`], and allows DNS there.
pub const DNS_ALLOWED: &str = "provider = 'none'
    [[endpoint]]
    name = 'four'
    address = '169.254.169.254'
    allow_ports = ['udp/53', 'tcp/53']
    [[endpoint]]
    name = 'six'
    address = 'fd00:ec2::254'
    allow_ports = ['udp/53', 'tcp/53']";
/// An unprotected IPv6 service (documentation prefix, RFC 3849).
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);

const NODE_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, 4);
const FABRIC_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, 1);
const PODS_V6: &str = "fd10:244::/32";
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xaa);

const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
pub(crate) const FABRIC_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(crate) const FABRIC_IFNAME: &str = "node0";

/// A node and the network around it:
///
/// ```text
/// pod ─ eth0 ── veth1a2b3c4d ───────── node ─ uplink0 ── node0 ─ fabric: 169.254.169.254, 198.51.100.10
/// pod ─ eth0 ── veth5e6f7a8b ─ cni0 ──╯
/// ```
///
/// Processes in `node` stand for hostNetwork pods or the kubelet of a real node.
#[derive(Debug)]
pub struct TestEnv {
    /// Network namespace of the node.
    pub node: Arc<Netns>,
    /// Network namespace beyond the node's uplink.
    pub fabric: Netns,
    pub(crate) pins: PinDir,
    /// Temporary directory for configuration files.
    pub(crate) scratch: TempDir,
    /// Binary of the agent, if it is not the default one.
    pub(crate) agent: Option<PathBuf>,
    /// Cgroup to which the agent attaches its socket programs.
    cgroup: Cgroup,
    received_packets: Option<Counter>,
    layout: Layout,
    pods: AtomicU32,
    _services: Services,
    services_v6: Option<Services>,
}

impl TestEnv {
    /// Name of the node's interface to the fabric. Its peer is in another namespace, like that of a pod.
    pub const UPLINK: &str = "uplink0";
    /// Name of the bridge of bridged pods.
    pub const BRIDGE: &str = "cni0";

    /// Creates a node without pods.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "making an environment is work that its name should show")]
    pub fn new() -> Self {
        Self::with_layout(Layout::default())
    }

    /// Creates a node whose packets leave through the interfaces of `layout`.
    #[must_use]
    pub fn with_layout(layout: Layout) -> Self {
        Self::around(Netns::new("node"), layout)
    }

    /// Uses this machine itself as the node. Its interfaces and sysctls stay changed: see
    /// [`skip_unless_disposable`](crate::skip_unless_disposable).
    #[must_use]
    pub fn of_machine() -> Self {
        Self::around(Netns::of_machine(), Layout::default())
    }

    fn around(node: Netns, layout: Layout) -> Self {
        let fabric = Netns::new("fabric");
        for netns in [&node, &fabric] {
            // IPv4 inherits the machine's own defaults, which may differ.
            netns.sysctl("ipv4/conf/all/rp_filter", "0");
            netns.sysctl("ipv4/conf/default/rp_filter", "0");
        }
        node.sysctl("ipv4/ip_forward", "1");
        layout.make_links(&node, &fabric);
        node.ip(&format!(
            "link set lo up
             link add {bridge} address {bridge_mac} type bridge
             addr add {BRIDGED_GATEWAY}/{BRIDGED_PREFIX} dev {bridge}
             link set {bridge} up",
            bridge = Self::BRIDGE,
            bridge_mac = mac_text(BRIDGED_GATEWAY_MAC),
        ));
        fabric.ip(&format!(
            "link set lo up
             addr add {METADATA}/32 dev lo
             addr add {SERVICE}/32 dev lo
             addr add {FABRIC_ADDRESS}/24 dev {device}
             route add {PODS} via {NODE_ADDRESS}",
            device = layout.fabric_device,
        ));
        match layout.routes {
            Routes::Main => {
                node.ip(&format!(
                    "addr add {NODE_ADDRESS}/24 dev {device}
                     route add default via {FABRIC_ADDRESS}",
                    device = layout.device,
                ));
            }
            Routes::Own(ref batch) => {
                node.ip(&format!("addr add {NODE_ADDRESS}/24 dev {}\n{batch}", layout.device));
            }
            Routes::Ipv6Only => {}
        }
        let barrier = if layout.is_ipv6_only() { SERVICE_V6.into() } else { SERVICE.into() };
        let received_packets = Counter::start(&fabric, layout.fabric_device, barrier);
        let services = Services::start(&fabric, &[METADATA.into(), SERVICE.into()]);
        let is_ipv6_only = layout.is_ipv6_only();
        let env = Self {
            node: Arc::new(node),
            fabric,
            pins: PinDir::new(),
            scratch: TempDir::with_prefix("imds-test-").expect("a temporary directory"),
            agent: None,
            cgroup: Cgroup::new(),
            received_packets: Some(received_packets),
            layout,
            pods: AtomicU32::new(0),
            _services: services,
            services_v6: None,
        };
        if is_ipv6_only { env.with_ipv6() } else { env }
    }

    /// Adds IPv6 to the node. The services are then also at [`METADATA_V6`] and [`SERVICE_V6`].
    #[must_use]
    pub fn with_ipv6(mut self) -> Self {
        for netns in [&*self.node, &self.fabric] {
            enable_ipv6(netns);
        }
        self.node.sysctl("ipv6/conf/all/forwarding", "1");
        self.fabric.ip(&format!(
            "addr add {METADATA_V6}/128 dev lo nodad
             addr add {SERVICE_V6}/128 dev lo nodad
             addr add {FABRIC_ADDRESS_V6}/64 dev {device} nodad
             route add {PODS_V6} via {NODE_ADDRESS_V6}",
            device = self.layout.fabric_device,
        ));
        self.node.ip(&format!(
            "addr add {NODE_ADDRESS_V6}/64 dev {device} nodad
             route add default via {FABRIC_ADDRESS_V6}",
            device = self.layout.device,
        ));
        self.services_v6 = Some(Services::start(&self.fabric, &[METADATA_V6.into(), SERVICE_V6.into()]));
        self
    }

    /// Turns off the counting of arrivals, which takes time for each packet.
    #[must_use]
    pub fn without_counting(mut self) -> Self {
        self.received_packets = None;
        self
    }

    /// Gives a pod an IPv6 address and a default route.
    pub fn add_pod_ipv6(&self, pod: &Pod) -> Ipv6Addr {
        let address = pod.address_v6();
        let eth0 = Pod::IFNAME;
        let gateway = match pod.link {
            PodLink::Routed | PodLink::Netkit(_) => &pod.host_ifname,
            PodLink::Bridged => Self::BRIDGE,
        };
        enable_ipv6(&pod.netns);
        self.node.ip(&format!(
            "addr replace {GATEWAY_V6}/64 dev {gateway} nodad\nroute add {address}/128 dev {gateway}"
        ));
        pod.netns.ip(&format!(
            "addr add {address}/128 dev {eth0} nodad
             route add default via {GATEWAY_V6} dev {eth0}"
        ));
        address
    }

    /// Returns a socket for the frames in the network beyond the uplink.
    #[must_use]
    pub fn fabric_frames(&self) -> PacketSocket {
        PacketSocket::frames(&self.fabric, self.layout.fabric_device)
    }

    /// Uses this binary for every command of imds-agent on the node.
    #[must_use]
    pub fn with_agent(mut self, binary: PathBuf) -> Self {
        self.agent = Some(binary);
        self
    }

    /// Adds a pod to the running node. Dropping the pod deletes it.
    #[must_use]
    pub fn add_pod(&self, link: PodLink) -> Pod {
        Pod::new(&self.node, link, self.pods.fetch_add(1, Ordering::Relaxed))
    }

    /// Connects the network namespace to the node as a routed pod.
    #[must_use]
    pub fn connect_pod(&self, netns: Netns) -> Pod {
        Pod::connected(netns, &self.node, PodLink::Routed, self.pods.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the IPv4 address of the node on its uplink.
    #[must_use]
    pub fn node_address(&self) -> Ipv4Addr {
        NODE_ADDRESS
    }

    /// Returns the IPv6 address of the node on its uplink, which exists after [`TestEnv::with_ipv6`].
    #[must_use]
    pub fn node_address_v6(&self) -> Ipv6Addr {
        NODE_ADDRESS_V6
    }

    /// Returns the packets for the metadata service that arrived at the fabric, including all that were sent before the
    /// call.
    #[must_use]
    pub fn received_packets(&self) -> ReceivedPackets {
        let counter = self.received_packets.as_ref().expect("an environment in which arrivals are counted");
        counter.read(&self.node)
    }

    /// Returns the pin directory of this environment's agent, which creates it.
    #[must_use]
    pub fn pin_dir(&self) -> &Path {
        self.pins.path()
    }

    /// Returns the cgroup of this environment. The socket hook applies to sockets that are created in it.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Runs `work` in this environment's cgroup, as the processes of a container run in the container's.
    pub fn in_cgroup<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.cgroup.run(work)
    }

    /// Creates a cgroup at this path below the environment's, for processes of a pod in the node's network namespace.
    /// Dropping it removes the cgroup.
    #[must_use]
    pub fn add_cgroup(&self, path: &str) -> Cgroup {
        Cgroup::below(self.cgroup(), path.as_ref())
    }

    /// Returns the directory of the last good configuration.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// Returns a directory for files, which is removed with the environment.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        self.scratch.path()
    }
}

/// Enables IPv6 without duplicate address detection.
fn enable_ipv6(netns: &Netns) {
    netns.sysctl("ipv6/conf/all/accept_dad", "0");
    netns.sysctl("ipv6/conf/default/accept_dad", "0");
    netns.sysctl("ipv6/conf/all/disable_ipv6", "0");
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        // Kills a running agent, which would restore the pins that are removed next.
        self.node.kill_processes();
    }
}

//! The topology: a node, its uplink, and the metadata service behind it.

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
    Arrivals, Layout, Netns, PacketSocket, Pod, PodLink,
    arrivals::Counter,
    cgroup::Cgroup,
    layout::Routes,
    pins::PinDir,
    pod::{BRIDGED_GATEWAY, BRIDGED_GATEWAY_MAC, BRIDGED_PREFIX, PODS, mac_text},
    services::Services,
};

/// The metadata service.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Some other service, equally far away (TEST-NET-2, RFC 5737).
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);

/// The metadata service's address by IPv6 (AWS's).
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Some other service by IPv6 (documentation prefix, RFC 3849).
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
/// Whatever runs in `node` is what a hostNetwork pod or the kubelet is on a real one.
#[derive(Debug)]
pub struct World {
    /// The node's network namespace.
    pub node: Arc<Netns>,
    /// The network beyond the node's uplink.
    pub fabric: Netns,
    pub(crate) pins: PinDir,
    /// For configuration files.
    pub(crate) scratch: TempDir,
    /// The agent's binary, where it is not the one that tests use.
    pub(crate) agent: Option<PathBuf>,
    /// Where the sockets are that the agent guards, if it does.
    cgroup: Cgroup,
    arrivals: Option<Counter>,
    layout: Layout,
    pods: AtomicU32,
    _services: Services,
    services_v6: Option<Services>,
}

impl World {
    /// The node's interface towards the fabric. Its peer is in another namespace, as a pod's would be.
    pub const UPLINK: &str = "uplink0";
    /// The bridge of the pods that have one.
    pub const BRIDGE: &str = "cni0";

    /// Makes a node without pods.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "making a world is work that its name should show")]
    pub fn new() -> Self {
        Self::with_layout(Layout::default())
    }

    /// Makes a node that leaves through the interfaces of `layout`.
    #[must_use]
    pub fn with_layout(layout: Layout) -> Self {
        Self::around(Netns::new("node"), layout)
    }

    /// Makes this machine itself the node, whose interfaces and sysctls stay changed: see
    /// [`skip_unless_disposable`](crate::skip_unless_disposable).
    #[must_use]
    pub fn of_machine() -> Self {
        Self::around(Netns::of_machine(), Layout::default())
    }

    fn around(node: Netns, layout: Layout) -> Self {
        let fabric = Netns::new("fabric");
        for netns in [&node, &fabric] {
            // The machine's own defaults, which IPv4 inherits, may differ.
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
        let arrivals = Counter::start(&fabric, layout.fabric_device, barrier);
        let services = Services::start(&fabric, &[METADATA.into(), SERVICE.into()]);
        let is_ipv6_only = layout.is_ipv6_only();
        let world = Self {
            node: Arc::new(node),
            fabric,
            pins: PinDir::new(),
            scratch: TempDir::with_prefix("imds-test-").expect("a temporary directory"),
            agent: None,
            cgroup: Cgroup::new(),
            arrivals: Some(arrivals),
            layout,
            pods: AtomicU32::new(0),
            _services: services,
            services_v6: None,
        };
        if is_ipv6_only { world.with_ipv6() } else { world }
    }

    /// The same node with IPv6: the services are at [`METADATA_V6`] and [`SERVICE_V6`], too.
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

    /// The same node, where nobody counts what arrives, which takes time from each packet.
    #[must_use]
    pub fn without_counting(mut self) -> Self {
        self.arrivals = None;
        self
    }

    /// Gives a pod an IPv6 address and a way out of the node.
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

    /// The network beyond the uplink, as frames.
    #[must_use]
    pub fn fabric_frames(&self) -> PacketSocket {
        PacketSocket::frames(&self.fabric, self.layout.fabric_device)
    }

    /// The same node, on which every command of imds-agent is this binary.
    #[must_use]
    pub fn with_agent(mut self, binary: PathBuf) -> Self {
        self.agent = Some(binary);
        self
    }

    /// Adds a pod, at any time. It is gone when dropped.
    #[must_use]
    pub fn add_pod(&self, link: PodLink) -> Pod {
        Pod::new(&self.node, link, self.pods.fetch_add(1, Ordering::Relaxed))
    }

    /// The node's own address on its uplink.
    #[must_use]
    pub fn node_address(&self) -> Ipv4Addr {
        NODE_ADDRESS
    }

    /// The same by IPv6, where it has that.
    #[must_use]
    pub fn node_address_v6(&self) -> Ipv6Addr {
        NODE_ADDRESS_V6
    }

    /// What arrived at the fabric for the metadata service so far: all that was sent before the call is in it.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        let counter = self.arrivals.as_ref().expect("a world in which arrivals are counted");
        counter.read(&self.node)
    }

    /// The pin directory of this world's agent. It exists once the agent made it.
    #[must_use]
    pub fn pin_dir(&self) -> &Path {
        self.pins.path()
    }

    /// The cgroup of this world: what runs in it has its sockets guarded.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Runs `work` in this world's cgroup, as the programs of a container are in the container's.
    pub fn in_cgroup<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.cgroup.run(work)
    }

    /// A cgroup at this path below the world's, for programs of a pod that shares the node's network namespace. It is
    /// removed when dropped.
    #[must_use]
    pub fn add_cgroup(&self, path: &str) -> Cgroup {
        Cgroup::below(self.cgroup(), path.as_ref())
    }

    /// The directory of the last good configuration.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// A directory for files, removed with the world.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        self.scratch.path()
    }
}

/// Turns IPv6 on without waiting for duplicates of addresses.
fn enable_ipv6(netns: &Netns) {
    netns.sysctl("ipv6/conf/all/accept_dad", "0");
    netns.sysctl("ipv6/conf/default/accept_dad", "0");
    netns.sysctl("ipv6/conf/all/disable_ipv6", "0");
}

impl Drop for World {
    fn drop(&mut self) {
        // An agent that still runs would pin anew what is removed next.
        self.node.kill_processes();
    }
}

//! Layouts of the interfaces through which packets leave a node.

use crate::{Netns, TestEnv, env::FABRIC_IFNAME, team};

/// Kind of the node's NIC, which is always called [`TestEnv::UPLINK`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Nic {
    /// A veth whose peer is in the fabric, like a pod's in kind and k3d.
    #[default]
    Veth,
    /// A macvlan device in passthru mode on a link of the fabric: no veth, like a NIC of hardware.
    Macvlan,
}

/// Routes of the node to the fabric.
#[derive(Clone, Debug, Default)]
pub(crate) enum Routes {
    /// A default route in the main table.
    #[default]
    Main,
    /// Commands of `ip` that replace the default route.
    Own(String),
    /// An IPv6 default route, and no IPv4 address.
    Ipv6Only,
}

/// Path of packets out of a node: the NIC, interfaces above it, and the interface with the node's address.
#[derive(Clone, Debug)]
pub struct Layout {
    nic: Nic,
    has_team: bool,
    setup: String,
    pub(crate) device: &'static str,
    fabric_setup: String,
    pub(crate) fabric_device: &'static str,
    pub(crate) routes: Routes,
}

impl Default for Layout {
    fn default() -> Self {
        Self::new(Nic::default())
    }
}

impl Layout {
    /// Name of the team device of [`Self::in_team`].
    pub const TEAM: &str = "team0";

    /// Returns the layout of a NIC that has the node's address itself.
    #[must_use]
    pub fn new(nic: Nic) -> Self {
        Self {
            nic,
            has_team: false,
            setup: String::new(),
            device: TestEnv::UPLINK,
            fabric_setup: String::new(),
            fabric_device: FABRIC_IFNAME,
            routes: Routes::default(),
        }
    }

    /// Runs these commands of `ip` while the NIC is down, and assigns the node's address to `device`.
    #[must_use]
    pub fn above(self, setup: &str, device: &'static str) -> Self {
        Self { setup: setup.to_owned(), device, ..self }
    }

    /// Makes the NIC a port of the team [`Self::TEAM`], which has the node's address: see
    /// [`skip_without_team`](crate::skip_without_team).
    #[must_use]
    pub fn in_team(self) -> Self {
        let setup = format!("link set {} master {}", TestEnv::UPLINK, Self::TEAM);
        Self { has_team: true, ..self.above(&setup, Self::TEAM) }
    }

    /// Runs these commands of `ip` in the fabric, and assigns its address to `device`.
    #[must_use]
    pub fn fabric_above(self, setup: &str, device: &'static str) -> Self {
        Self { fabric_setup: setup.to_owned(), fabric_device: device, ..self }
    }

    /// Runs these commands of `ip` instead of adding a default route to the main table. They must route the node's
    /// packets for [`SERVICE`](crate::SERVICE) to the fabric.
    #[must_use]
    pub fn routes(self, batch: &str) -> Self {
        Self { routes: Routes::Own(batch.to_owned()), ..self }
    }

    /// Gives the node IPv6 addresses and routes only.
    #[must_use]
    pub fn ipv6_only(self) -> Self {
        Self { routes: Routes::Ipv6Only, ..self }
    }

    pub(crate) fn is_ipv6_only(&self) -> bool {
        matches!(self.routes, Routes::Ipv6Only)
    }

    /// Creates the interfaces without addresses and sets them up.
    pub(crate) fn make_links(&self, node: &Netns, fabric: &Netns) {
        let (nic, uplink) = (TestEnv::UPLINK, self.device);
        match self.nic {
            Nic::Veth => fabric
                .ip(&format!("link add {FABRIC_IFNAME} type veth peer name {nic} netns {}", node.name())),
            Nic::Macvlan => fabric.ip(&format!(
                "link add {FABRIC_IFNAME} type veth peer name wire0
                 link set wire0 up
                 link add link wire0 name {nic} netns {} type macvlan mode passthru",
                node.name()
            )),
        }
        fabric.ip(&format!(
            "link set {FABRIC_IFNAME} up\n{}\nlink set {} up",
            self.fabric_setup, self.fabric_device
        ));
        if self.has_team {
            // The kernel rejects a change of the mode while the team has ports.
            team::add(node, Self::TEAM).expect("add a team");
        }
        node.ip(&format!("{}\nlink set {nic} up\nlink set {uplink} up", self.setup));
    }
}

//! Interfaces with the hooks that they have or need.

use imds_ebpf_common::{InterfaceRecord, TcHook, TcHookSet};

use crate::{
    config::{Hooks, Interfaces},
    datapath::{DatapathError, maps::interface_records, object::Maps, pin::dir::PinDir},
    node::{
        interface_role::{self, Uplinks},
        link::Link,
        netlink::Netlink,
    },
};

/// Interfaces of the node, with the enabled hooks. If nothing is loaded, those of a default configuration.
pub(crate) struct HookedInterfaces {
    maps: Option<Maps>,
    enabled: Hooks,
    pub(crate) links: Vec<Link>,
    pub(crate) uplinks: Uplinks,
}

impl HookedInterfaces {
    pub(crate) async fn read(pins: &PinDir, netlink: &Netlink) -> Result<Self, DatapathError> {
        let maps = Maps::open(pins).ok();
        let policy = maps.as_ref().and_then(|maps| maps.policy.get(&0, 0).ok());
        let enabled = policy.map_or_else(Hooks::default, |policy| Hooks::from_bits(policy.hooks));
        let links = netlink.links().await?;
        let uplinks = Uplinks::new(&netlink.endpoint_routes().await?, links.iter());
        Ok(Self { maps, enabled, links, uplinks })
    }

    pub(crate) fn is_loaded(&self) -> bool {
        self.maps.is_some()
    }

    pub(crate) fn record(&self, link: &Link) -> Option<InterfaceRecord> {
        interface_records::get(self.maps.as_ref()?, link.index)
    }

    /// Returns the enabled hooks that an interface should have: as recorded, or as a default configuration assigns them.
    pub(crate) fn hooks(&self, link: &Link) -> impl Iterator<Item = TcHook> {
        let hooks = self.record(link).map_or_else(
            || interface_role::assign(link, &self.uplinks, &Interfaces::default(), false).hooks,
            |record| TcHookSet::from_bits(record.hooks),
        );
        let hooks: Vec<_> = hooks.iter().filter(|hook| self.enabled.contains(hook.hook())).collect();
        hooks.into_iter()
    }
}

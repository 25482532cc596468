//! Changes of the effective policy: mode, hooks and endpoints.

use imds_ebpf_common::{Mode, Policy, maps::MAP_SCHEMA_VERSION, names::MAP_POLICY};

use super::endpoint_maps;
use crate::{
    config::{Hooks, endpoint_set::EndpointSet},
    datapath::{
        Datapath, DatapathConfig, DatapathError, map_error,
        object::Maps,
        pin::{dir::PinDir, netns_owner},
    },
    node::netns::OwnNetns,
};

impl Datapath {
    /// Returns the hooks that should be attached.
    pub fn hooks(&self) -> Hooks {
        self.hooks
    }

    /// Loads the programs of the hooks of `datapath_config`, and adds them to the desired hooks. Hooks that
    /// `datapath_config` does not have stay until [`Datapath::release`].
    pub fn prepare(&mut self, datapath_config: &DatapathConfig) -> Result<(), DatapathError> {
        self.hooks = self.hooks.union(datapath_config.hooks);
        self.programs.add(&self.pin_lock.dir, self.hooks)?;
        self.programs.pin(&self.pin_lock.dir)?;
        self.programs.record_rejected(&mut self.maps)?;
        self.cgroups.prepare(&self.pin_lock.dir, datapath_config)
    }

    /// Applies mode, deny action and endpoints. Requests that both the old and the new policy deny stay denied throughout.
    pub fn enforce(
        &mut self,
        datapath_config: &DatapathConfig,
        endpoint_set: &EndpointSet,
    ) -> Result<(), DatapathError> {
        write(&mut self.maps, datapath_config, endpoint_set)
    }

    /// Reports whether the desired hooks and cgroup programs are exactly those of `datapath_config`.
    pub fn matches(&self, datapath_config: &DatapathConfig) -> bool {
        self.hooks == datapath_config.hooks && self.cgroups.matches(datapath_config)
    }

    /// Removes the hooks that `datapath_config` does not have from the desired hooks. The next reconciliation detaches them.
    pub fn release(&mut self, datapath_config: &DatapathConfig) -> Result<(), DatapathError> {
        self.hooks = datapath_config.hooks;
        self.cgroups.release(&self.pin_lock.dir, datapath_config)?;
        self.programs.retain_hooks(datapath_config.hooks);
        self.programs.record_rejected(&mut self.maps)?;
        Ok(self.programs.pin(&self.pin_lock.dir)?)
    }
}

/// Sets the mode of the pinned policy to off, so that all hooks let all packets pass. Returns `false` if there are no maps, or
/// maps of another version.
pub(crate) fn switch_off(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut maps = match Maps::open(pins) {
        Ok(maps) => maps,
        Err(error) => {
            log::debug!("failed to open the maps, the policy stays on: {error}");
            return Ok(false);
        }
    };
    let failed = map_error(MAP_POLICY);
    let policy = maps.policy.get(&0, 0).map_err(failed)?;
    maps.policy.set(0, Policy { mode: Mode::Off as u32, ..policy }, 0).map_err(failed)?;
    Ok(true)
}

/// Writes policy and endpoints. Requests that both the old and the new policy deny stay denied throughout, and no request is
/// denied that neither of them denies.
///
/// The order follows from the new mode. If it denies, the endpoints come first, so that it never applies to removed
/// endpoints. Otherwise the mode comes first, so that the old mode never applies to new endpoints.
pub(crate) fn write(
    maps: &mut Maps,
    datapath_config: &DatapathConfig,
    endpoint_set: &EndpointSet,
) -> Result<(), DatapathError> {
    if datapath_config.mode == Mode::Enforce {
        endpoint_maps::write(maps, endpoint_set)?;
        write_policy(maps, datapath_config)
    } else {
        write_policy(maps, datapath_config)?;
        endpoint_maps::write(maps, endpoint_set)
    }
}

fn write_policy(maps: &mut Maps, datapath_config: &DatapathConfig) -> Result<(), DatapathError> {
    let policy = Policy {
        mode: datapath_config.mode as u32,
        on_deny: datapath_config.on_deny as u32,
        on_deny_errno: datapath_config.on_deny_errno as u32,
        layout: MAP_SCHEMA_VERSION,
        netns: netns_owner::this_netns()?,
        hooks: datapath_config.hooks.bits(),
        netns_cookie: datapath_config.identity.map_or(0, OwnNetns::cookie),
    };
    maps.policy.set(0, policy, 0).map_err(map_error(MAP_POLICY))
}

//! Changes of the effective policy: mode, hooks and endpoints.

use std::path::Path;

use imds_ebpf_common::{
    Mode, Policy,
    maps::LAYOUT,
    names::{MAP_CONFIG, MAP_POLICY},
};

use super::{Datapath, DatapathError, Plan, config, endpoints, home, object::Maps, pins::PinDir};
use crate::{config::Hooks, endpoints::Guarded};

impl Datapath {
    /// Returns the hooks that should be attached.
    #[must_use]
    pub fn hooks(&self) -> Hooks {
        self.hooks
    }

    /// Loads the programs of the hooks of `plan`, and adds them to the desired hooks. Hooks that `plan` does not have stay until
    /// [`Datapath::release`].
    pub fn prepare(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        self.hooks = self.hooks.and(plan.hooks);
        self.programs.add(self.hooks)?;
        self.programs.pin(self.claim.dir())?;
        self.cgroups.prepare(self.claim.dir(), plan)
    }

    /// Applies mode, deny action and endpoints. Requests that both the old and the new policy deny stay denied throughout.
    pub fn enforce(&mut self, plan: &Plan, guarded: &Guarded) -> Result<(), DatapathError> {
        write(&mut self.maps, plan, guarded)
    }

    /// Reports whether the desired hooks and cgroup programs are exactly those of `plan`.
    #[must_use]
    pub fn matches(&self, plan: &Plan) -> bool {
        self.hooks == plan.hooks && self.cgroups.matches(plan)
    }

    /// Removes the hooks that `plan` does not have from the desired hooks. The next reconciliation detaches them.
    pub fn release(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        self.hooks = plan.hooks;
        self.cgroups.release(plan);
        self.programs.keep(plan.hooks);
        Ok(self.programs.pin(self.claim.dir())?)
    }

    /// Reports whether `text` is the last effective configuration, possibly of an earlier agent.
    pub fn was_in_force(&self, text: &str) -> Result<bool, DatapathError> {
        let record =
            config::read(&self.maps).map_err(|source| DatapathError::Map { map: MAP_CONFIG, source })?;
        Ok(record.is_some_and(|record| record.text == text))
    }

    /// Records the effective configuration for `status` and `config show`. Returns its generation.
    pub fn record_config(&mut self, path: Option<&Path>, text: &str) -> Result<u64, DatapathError> {
        config::put(&mut self.maps, path, text)
    }

    /// Records the error of a rejected configuration.
    pub fn record_refusal(&mut self, error: &str) -> Result<(), DatapathError> {
        config::put_refusal(&mut self.maps, error)
    }
}

/// Sets the mode of the pinned policy to off, so that all hooks let all packets pass. Returns `false` if there are no maps, or
/// maps of another version.
pub(super) fn switch_off(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut maps = match Maps::open(pins) {
        Ok(maps) => maps,
        Err(error) => {
            log::debug!("failed to open the maps, the policy stays on: {error}");
            return Ok(false);
        }
    };
    let failed = |source| DatapathError::Map { map: MAP_POLICY, source };
    let policy = maps.policy.get(&0, 0).map_err(failed)?;
    maps.policy.set(0, Policy { mode: Mode::Off as u32, ..policy }, 0).map_err(failed)?;
    Ok(true)
}

/// Writes policy and endpoints. Requests that both the old and the new policy deny stay denied throughout, and no request is
/// denied that neither of them denies.
///
/// The order follows from the new mode. If it denies, the endpoints come first, so that it never applies to removed
/// endpoints. Otherwise the mode comes first, so that the old mode never applies to new endpoints.
pub(super) fn write(maps: &mut Maps, plan: &Plan, guarded: &Guarded) -> Result<(), DatapathError> {
    if plan.mode == Mode::Enforce {
        endpoints::write(maps, guarded)?;
        write_policy(maps, plan)
    } else {
        write_policy(maps, plan)?;
        endpoints::write(maps, guarded)
    }
}

fn write_policy(maps: &mut Maps, plan: &Plan) -> Result<(), DatapathError> {
    let policy = Policy {
        mode: plan.mode as u32,
        on_deny: plan.on_deny as u32,
        on_deny_errno: plan.on_deny_errno as u32,
        reserved: 0,
        layout: LAYOUT,
        netns: home::this_netns()?,
        hooks: plan.hooks.bits(),
        mark: plan.mark,
        netns_cookie: plan.identity.cookie(),
    };
    maps.policy.set(0, policy, 0).map_err(|source| DatapathError::Map { map: MAP_POLICY, source })
}

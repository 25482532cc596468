//! What is in force, and how it changes while it is.

use std::path::Path;

use imds_ebpf_common::{
    Mode, Policy,
    maps::LAYOUT,
    names::{MAP_CONFIG, MAP_POLICY},
};

use super::{Datapath, DatapathError, Plan, config, endpoints, home, object::Maps, pins::PinDir};
use crate::{config::Hooks, endpoints::Guarded};

impl Datapath {
    /// The hooks that are attached.
    #[must_use]
    pub fn hooks(&self) -> Hooks {
        self.hooks
    }

    /// Loads what the hooks of `plan` need, and attaches them with everything else from now on. The other hooks stay until
    /// [`Datapath::release`].
    pub fn prepare(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        self.hooks = self.hooks.and(plan.hooks);
        self.programs.add(self.hooks)?;
        self.programs.pin(self.claim.dir())?;
        self.cgroups.prepare(self.claim.dir(), plan)
    }

    /// Puts mode, answer and endpoints in force. What was denied and will be is denied at every moment between.
    pub fn enforce(&mut self, plan: &Plan, guarded: &Guarded) -> Result<(), DatapathError> {
        write(&mut self.maps, plan, guarded)
    }

    /// Reports whether nothing is attached beyond what `plan` needs.
    #[must_use]
    pub fn matches(&self, plan: &Plan) -> bool {
        self.hooks == plan.hooks && self.cgroups.matches(plan)
    }

    /// Lets go of hooks that `plan` has not: from now on they are to be detached.
    pub fn release(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        self.hooks = plan.hooks;
        self.cgroups.release(plan);
        self.programs.keep(plan.hooks);
        Ok(self.programs.pin(self.claim.dir())?)
    }

    /// Whether the configuration that was in force last, which may have been an earlier agent's, is this text.
    pub fn was_in_force(&self, text: &str) -> Result<bool, DatapathError> {
        let record =
            config::read(&self.maps).map_err(|source| DatapathError::Map { map: MAP_CONFIG, source })?;
        Ok(record.is_some_and(|record| record.text == text))
    }

    /// Records a configuration that is in force from now on, for `status` and `config show`. Returns its number.
    pub fn record_config(&mut self, path: Option<&Path>, text: &str) -> Result<u64, DatapathError> {
        config::put(&mut self.maps, path, text)
    }

    /// Records why a configuration is not in force.
    pub fn record_refusal(&mut self, error: &str) -> Result<(), DatapathError> {
        config::put_refusal(&mut self.maps, error)
    }
}

/// Switches the pinned policy off, so that all hooks let everything pass at once. Returns false if the maps are not this
/// version's, or there are none.
pub(super) fn switch_off(pins: &PinDir) -> Result<bool, DatapathError> {
    let mut maps = match Maps::open(pins) {
        Ok(maps) => maps,
        Err(error) => {
            log::debug!("the policy is not switched off: {error}");
            return Ok(false);
        }
    };
    let failed = |source| DatapathError::Map { map: MAP_POLICY, source };
    let policy = maps.policy.get(&0, 0).map_err(failed)?;
    maps.policy.set(0, Policy { mode: Mode::Off as u32, ..policy }, 0).map_err(failed)?;
    Ok(true)
}

/// Writes what is in force. What was denied and will be is so at every moment between, and nothing is denied that neither
/// was nor will be: an endpoint that is new must not meet the old mode where only that denies, nor one that goes the new.
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

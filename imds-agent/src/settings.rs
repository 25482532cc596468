//! What a configuration comes to on this node.

use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use imds_ebpf_common::{AttachMode, DenyErrno, Hook};

use crate::{
    cluster::Wanted,
    config::{Config, ConfigErrors, Exempt, Hooks, Interfaces, Surroundings},
    datapath::{Plan, object::can_choose_errno},
    endpoints::Guarded,
    node::{
        cgroup,
        netns::{self, Identity},
    },
    provider::Dmi,
};

/// What the command line says of the node, which no configuration changes.
#[derive(Clone, Debug)]
pub struct Node {
    /// How interfaces are attached.
    pub backend: AttachMode,
    /// cgroup below which sockets are guarded; without it, the root of the hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Where the firmware's words are.
    pub dmi_dir: PathBuf,
}

/// What is to be in force.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the datapath is to be.
    pub plan: Plan,
    /// What is guarded.
    pub guarded: Guarded,
    /// Which interfaces are pods'.
    pub interfaces: Interfaces,
    /// Who is exempt.
    pub exempt: Vec<Exempt>,
    /// The cgroup below which those of Kubernetes pods are looked for, in strict mode.
    pub kubepods: Option<PathBuf>,
    /// How pods are looked up, where they are.
    pub cluster: Option<Wanted>,
}

impl Node {
    /// What `config` guards here, and whom it exempts.
    pub fn resolve(&self, config: &Config) -> Result<(Guarded, Vec<Exempt>), ConfigErrors> {
        config.resolve(&Dmi::read(&self.dmi_dir))
    }

    /// What `config` comes to, which guards and exempts this.
    pub fn settings(
        &self,
        config: &Config,
        (guarded, exempt): (Guarded, Vec<Exempt>),
    ) -> anyhow::Result<Settings> {
        let cgroup = self.cgroup(config.hooks)?;
        if config.on_deny_errno != DenyErrno::Eperm && !can_choose_errno() {
            log::warn!(
                "on_deny_errno = \"{}\" has no effect: this kernel has no bpf_set_retval for sockets (Linux 6.1), denied calls \
                 fail with EPERM",
                config.on_deny_errno.name()
            );
        }
        let plan = Plan {
            mode: config.mode,
            on_deny: config.on_deny,
            on_deny_errno: config.on_deny_errno,
            hooks: config.hooks,
            local_service: cgroup.clone().filter(|_| config.hooks.has(Hook::LocalService)),
            sendmsg: config.sendmsg,
            backend: self.backend,
            cgroup: cgroup.clone().filter(|_| config.hooks.has(Hook::Socket)),
            identity: identity(config.hooks)?,
            mark: config.mark,
        };
        let kubepods = cgroup.filter(|_| config.hooks.has(Hook::HostNetwork));
        let surroundings = Surroundings::read();
        let cluster = config
            .kubernetes
            .access(&surroundings)
            .map(|access| Wanted { access, node: config.kubernetes.node_name(&surroundings) });
        Ok(Settings { plan, guarded, interfaces: config.interfaces.clone(), exempt, kubepods, cluster })
    }

    /// The cgroup for the hooks that need one; `None` if they are off, or no cgroup v2 hierarchy is mounted.
    fn cgroup(&self, hooks: Hooks) -> anyhow::Result<Option<PathBuf>> {
        if !judges_by_cgroup(hooks) && !hooks.has(Hook::LocalService) {
            return Ok(None);
        }
        // Without a hierarchy the other hooks still run.
        let root = || cgroup::root().context("failed to read the mounts").transpose();
        self.cgroup.clone().map(Ok).or_else(root).transpose()
    }
}

/// How the programs know the node. Which sockets are the node's own must be known where sockets are judged.
fn identity(hooks: Hooks) -> anyhow::Result<Identity> {
    match netns::identity().context("can't tell this network namespace's cookie")? {
        Some(identity) => Ok(identity),
        None if !judges_by_cgroup(hooks) => Ok(Identity::Initial),
        None => Err(anyhow!(
            "this kernel (before Linux 5.14) has no cookie for a network namespace that is not the initial one: set {}",
            switch_off(hooks)
        )),
    }
}

fn judges_by_cgroup(hooks: Hooks) -> bool {
    hooks.has(Hook::Socket) || hooks.has(Hook::HostNetwork)
}

/// How to do without what judges by cgroup.
fn switch_off(hooks: Hooks) -> String {
    let on = [Hook::Socket, Hook::HostNetwork].into_iter().filter(|&hook| hooks.has(hook));
    on.map(|hook| format!("hooks.{} = false", hook.name())).collect::<Vec<_>>().join(" and ")
}

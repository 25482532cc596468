//! Settings of the agent on this node: the configuration, resolved with the command line and the node's features.

use std::path::PathBuf;

use anyhow::Context as _;
use imds_ebpf_common::{AttachMode, DenyErrno, Hook};

use crate::{
    config::{
        Config, ConfigErrors, Environment, Exempt, Hooks, Interfaces, NodeProcess, endpoint_set::EndpointSet,
        provider::Dmi,
    },
    datapath::{DatapathConfig, object::can_choose_errno},
    kube::cluster::{ApiConfig, ClusterWrites},
    node::{cgroup, netns},
};

/// Command line options that concern the node. A reload of the configuration does not change them.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Attach mode for the TC hooks.
    pub backend: AttachMode,
    /// cgroup to which the socket hook is attached. `None`: the root of the cgroup v2 hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Directory with the SMBIOS fields, see [`Dmi::read`].
    pub dmi_dir: PathBuf,
}

/// Resolved configuration of this node.
#[derive(Clone, Debug)]
pub struct ResolvedConfig {
    /// Mode, hooks and attach points of the datapath.
    pub datapath_config: DatapathConfig,
    /// Protected endpoints and their provider.
    pub endpoint_set: EndpointSet,
    /// Interfaces that the operator includes or excludes.
    pub interfaces: Interfaces,
    /// Exemption rules, with the endpoints resolved.
    pub exempt: Vec<Exempt>,
    /// Processes of the node that may reach protected endpoints. Used only with the `node_allow` hook.
    pub node_allow: Vec<NodeProcess>,
    /// cgroup below which Kubernetes pods are searched, if `host_network` is on.
    pub kubepods: Option<PathBuf>,
    /// Configuration of the pod watch, if it is enabled.
    pub cluster: Option<ApiConfig>,
    /// Objects that the agent writes to the cluster, if the pod watch is enabled.
    pub cluster_writes: ClusterWrites,
}

impl RunOptions {
    /// Resolves the protected endpoints and exemptions of `config` on this node.
    pub fn resolve(&self, config: &Config) -> Result<(EndpointSet, Vec<Exempt>), ConfigErrors> {
        config.resolve(&Dmi::read(&self.dmi_dir))
    }

    /// Resolves `config` on this node. The tuple is the result of [`RunOptions::resolve`].
    pub fn resolve_on_node(
        &self,
        config: &Config,
        (endpoint_set, exempt): (EndpointSet, Vec<Exempt>),
    ) -> anyhow::Result<ResolvedConfig> {
        let cgroup = self.cgroup(config.hooks)?;
        if config.on_deny_errno != DenyErrno::Eperm && !can_choose_errno() {
            log::warn!(
                "on_deny_errno = \"{}\" has no effect: this kernel lacks bpf_set_retval for sockets (Linux 6.1), denied calls \
                 fail with EPERM",
                config.on_deny_errno.name()
            );
        }
        let identity = netns::identity().context("failed to get the cookie of this network namespace")?;
        let datapath_config = DatapathConfig {
            mode: config.mode,
            on_deny: config.on_deny,
            on_deny_errno: config.on_deny_errno,
            hooks: config.hooks,
            sendmsg: config.sendmsg,
            backend: self.backend,
            cgroup: cgroup.clone(),
            identity,
        };
        let kubepods = cgroup.filter(|_| config.hooks.contains(Hook::HostNetwork));
        let environment = Environment::read();
        let cluster = config
            .kubernetes
            .access(&environment)
            .map(|access| ApiConfig { access, node: config.kubernetes.node_name(&environment) });
        Ok(ResolvedConfig {
            datapath_config,
            endpoint_set,
            interfaces: config.interfaces.clone(),
            exempt,
            node_allow: config.node_allow.clone().unwrap_or_default(),
            kubepods,
            cluster,
            cluster_writes: ClusterWrites {
                events: config.kubernetes.events,
                node_condition: config.kubernetes.node_condition,
            },
        })
    }

    /// Returns the cgroup for the hooks that need one, or `None` if they are off or no cgroup v2 hierarchy is mounted.
    fn cgroup(&self, hooks: Hooks) -> anyhow::Result<Option<PathBuf>> {
        let of_cgroups = [Hook::Socket, Hook::HostNetwork, Hook::LocalService, Hook::NodeAllow];
        if !of_cgroups.into_iter().any(|hook| hooks.contains(hook)) {
            return Ok(None);
        }
        // The other hooks do not need a hierarchy.
        let root = || cgroup::root().context("failed to read the mounts").transpose();
        self.cgroup.clone().map(Ok).or_else(root).transpose()
    }
}

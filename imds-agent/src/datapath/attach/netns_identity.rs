//! Hooks whose programs must identify the node's network namespace.

use imds_ebpf_common::Hook;

use super::{
    cgroup_programs::{NODE_ALLOW, SOCKETS},
    host_cgroups,
};
use crate::{
    config::Hooks,
    datapath::pin::dir::{PinDir, PinError},
    node::netns::OwnNetns,
};

/// Returns those of these hooks that can't be attached with this identity of the node's network namespace. Their programs
/// must distinguish the node's sockets from those of pods. The other hooks work without.
pub fn hooks_without_identity(hooks: Hooks, identity: Option<OwnNetns>) -> Vec<Hook> {
    let compare = [Hook::Socket, Hook::HostNetwork, Hook::NodeAllow];
    compare.into_iter().filter(|&hook| identity.is_none() && hooks.contains(hook)).collect()
}

/// Describes a hook of [`hooks_without_identity`], whose programs may still be those of an earlier agent.
pub fn no_cookie(hook: Hook, runs_earlier: bool) -> String {
    let state = if runs_earlier {
        "runs programs of an earlier agent, which are not restored if they are detached"
    } else {
        "is not attached"
    };
    format!(
        "{} {state}: before Linux 5.14 the kernel does not report the cookie of a network namespace that is not the \
         machine's initial one",
        hook.name()
    )
}

/// Returns the remedy for [`no_cookie`].
pub fn no_cookie_remedy(hook: Hook) -> String {
    let switch = match hook {
        Hook::NodeAllow => "remove node.allow".to_owned(),
        other => format!("set hooks.{} = false", other.name()),
    };
    format!(
        "run the agent in the machine's initial network namespace and pid namespace with CAP_SYS_PTRACE, use Linux 5.14 or newer, or {switch}"
    )
}

/// Reports whether links of the hook are pinned. With a hook of [`hooks_without_identity`], an earlier agent attached them.
pub(crate) fn runs_earlier_programs(pins: &PinDir, hook: Hook) -> Result<bool, PinError> {
    match hook {
        Hook::Socket => Ok(SOCKETS.is_pinned(pins)),
        Hook::NodeAllow => Ok(NODE_ALLOW.is_pinned(pins)),
        Hook::HostNetwork => host_cgroups::is_pinned(pins),
        Hook::FromPod | Hook::NodeEgress | Hook::LocalService => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hooks_that_compare_netns_need_its_identity() {
        let all = Hooks::from_bits(Hook::ALL.into_iter().map(Hook::bit).sum());
        let without = |hooks, identity| hooks_without_identity(hooks, identity);
        assert_eq!(without(all, None), [Hook::Socket, Hook::HostNetwork, Hook::NodeAllow]);
        assert_eq!(without(Hooks::default(), None), [Hook::Socket]);
        let packets = [Hook::FromPod, Hook::NodeEgress, Hook::LocalService];
        assert_eq!(without(Hooks::from_bits(packets.map(Hook::bit).iter().sum()), None), []);
        for identity in [OwnNetns::Initial, OwnNetns::Cookie(7)] {
            assert_eq!(without(all, Some(identity)), []);
        }
        assert!(
            no_cookie(Hook::NodeAllow, false).starts_with("node_allow is not attached: before Linux 5.14")
        );
        assert!(no_cookie(Hook::Socket, true).starts_with("socket runs programs of an earlier agent, which"));
        assert!(no_cookie_remedy(Hook::NodeAllow).ends_with("or remove node.allow"));
        assert!(no_cookie_remedy(Hook::HostNetwork).ends_with("or set hooks.host_network = false"));
    }
}

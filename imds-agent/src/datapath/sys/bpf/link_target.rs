//! Links, and the hooks that they attach programs to.

use aya_obj::generated::{
    bpf_attach_type::{self, BPF_NETKIT_PEER, BPF_NETKIT_PRIMARY, BPF_TCX_EGRESS, BPF_TCX_INGRESS},
    bpf_link_type::{BPF_LINK_TYPE_NETKIT, BPF_LINK_TYPE_TCX},
};

/// Object that a link attaches its program to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// A TCX or netkit hook.
    Interface {
        /// Index of the interface in its network namespace; 0 after the link was detached.
        ifindex: u32,
        /// Hook of the interface, as the kernel reports it.
        hook: MprogHook,
    },
    /// A hook of a cgroup.
    Cgroup {
        /// Id of the cgroup (its inode number); 0 after the link was detached.
        id: u64,
        /// Hook of the cgroup, as a `bpf_attach_type`.
        attach_type: u32,
    },
    /// Any object that the agent never attaches to.
    Other,
}

/// Description of a link, as the kernel returns it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Link {
    /// Id of the link (`bpf_link_info`).
    pub id: u32,
    /// Id of the attached program.
    pub program: u32,
    /// Object that the program is attached to.
    pub target: Target,
}

impl Link {
    /// Reports whether the link is attached to an interface or a cgroup.
    pub fn is_attached(&self) -> bool {
        matches!(self.target, Target::Interface { ifindex: 1.., .. } | Target::Cgroup { id: 1.., .. })
    }

    /// Returns the id of the cgroup that the link is attached to, or `None` for other and detached links.
    pub fn cgroup(&self) -> Option<u64> {
        match self.target {
            Target::Cgroup { id: id @ 1.., .. } => Some(id),
            Target::Cgroup { .. } | Target::Interface { .. } | Target::Other => None,
        }
    }
}

/// A hook of an interface that runs a list of programs in order (`bpf_mprog`, kernel 6.6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MprogHook {
    /// Packets that enter the node, before the filters of qdiscs.
    TcxIngress,
    /// Packets that leave the node, before the filters of qdiscs.
    TcxEgress,
    /// Programs on packets that the primary device of a netkit pair sends (kernel 6.7).
    NetkitPrimary,
    /// Programs on packets that the peer device of a netkit pair sends. They are attached to the primary device.
    NetkitPeer,
}

impl MprogHook {
    pub(super) const fn attach_type(self) -> bpf_attach_type {
        match self {
            Self::TcxIngress => BPF_TCX_INGRESS,
            Self::TcxEgress => BPF_TCX_EGRESS,
            Self::NetkitPrimary => BPF_NETKIT_PRIMARY,
            Self::NetkitPeer => BPF_NETKIT_PEER,
        }
    }

    /// Returns the hook of a link of this `bpf_link_type` and `bpf_attach_type`.
    pub(super) fn from_link(kind: u32, attach_type: u32) -> Option<Self> {
        let hooks = match kind {
            _ if kind == BPF_LINK_TYPE_TCX as u32 => [Self::TcxIngress, Self::TcxEgress],
            _ if kind == BPF_LINK_TYPE_NETKIT as u32 => [Self::NetkitPrimary, Self::NetkitPeer],
            _ => return None,
        };
        hooks.into_iter().find(|hook| hook.attach_type() as u32 == attach_type)
    }
}

/// One program in the list of a TCX or netkit hook.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HookEntry {
    /// Id of the attached program.
    pub program: u32,
    /// Id of its link; 0 if the program was attached without a link.
    pub link: u32,
}

#[cfg(test)]
mod tests {
    use aya_obj::generated::bpf_link_type::BPF_LINK_TYPE_CGROUP;

    use super::*;

    #[test]
    fn link_kinds_have_their_hooks() {
        let from_link = |kind, attach_type: bpf_attach_type| MprogHook::from_link(kind, attach_type as u32);
        assert_eq!(from_link(13, BPF_NETKIT_PEER), Some(MprogHook::NetkitPeer));
        assert_eq!(from_link(13, BPF_NETKIT_PRIMARY), Some(MprogHook::NetkitPrimary));
        assert_eq!(from_link(11, BPF_TCX_EGRESS), Some(MprogHook::TcxEgress));
        assert_eq!(from_link(11, BPF_NETKIT_PEER), None);
        assert_eq!(from_link(BPF_LINK_TYPE_CGROUP as u32, BPF_TCX_INGRESS), None);
    }
}

//! The hooks that are on.

use imds_ebpf_common::Hook;
use serde::{Deserialize, Serialize};

/// The hooks that are on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hooks {
    bits: u32,
}

impl Hooks {
    /// The hooks of [`Policy::hooks`](imds_ebpf_common::Policy::hooks).
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self { bits }
    }

    /// As [`Policy::hooks`](imds_ebpf_common::Policy::hooks) has them.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Whether this one is on.
    #[must_use]
    pub const fn has(self, hook: Hook) -> bool {
        self.bits & hook.bit() != 0
    }

    /// Those that are on in either.
    #[must_use]
    pub const fn and(self, others: Self) -> Self {
        Self { bits: self.bits | others.bits }
    }
}

impl Default for Hooks {
    /// All but strict mode.
    fn default() -> Self {
        HooksTable::default().into()
    }
}

#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "switches, as the file has them")]
pub(super) struct HooksTable {
    pod_edge: bool,
    node_edge: bool,
    socket: bool,
    strict_host_network: bool,
}

impl Default for HooksTable {
    fn default() -> Self {
        Self { pod_edge: true, node_edge: true, socket: true, strict_host_network: false }
    }
}

impl From<HooksTable> for Hooks {
    fn from(HooksTable { pod_edge, node_edge, socket, strict_host_network }: HooksTable) -> Self {
        let switches = [
            (Hook::PodEdge, pod_edge),
            (Hook::NodeEdge, node_edge),
            (Hook::Socket, socket),
            (Hook::Host, strict_host_network),
        ];
        Self::from_bits(switches.iter().filter(|(_, on)| *on).map(|(hook, _)| hook.bit()).sum())
    }
}

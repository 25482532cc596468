//! The hooks that are on.

use imds_ebpf_common::{Hook, maps::MARK};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::source::{Mistakes, Source};

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
        (&HooksTable::default()).into()
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "switches, as the file has them")]
pub(super) struct HooksTable {
    from_pod: bool,
    node_egress: bool,
    socket: bool,
    host_network: bool,
    mark_bit: Spanned<u8>,
}

impl Default for HooksTable {
    fn default() -> Self {
        let mark_bit = u8::try_from(MARK.trailing_zeros()).unwrap_or_default();
        Self {
            from_pod: true,
            node_egress: true,
            socket: true,
            host_network: false,
            mark_bit: Spanned::new(0..0, mark_bit),
        }
    }
}

impl HooksTable {
    /// The mark of packets that are exempt.
    pub(super) fn mark(&self, source: Source<'_>, mistakes: &mut Mistakes) -> u32 {
        let bit = *self.mark_bit.get_ref();
        1_u32.checked_shl(bit.into()).unwrap_or_else(|| {
            let message = format!("hooks.mark_bit: {bit} is not 0 to 31, the bits of a packet's mark");
            mistakes.note(source.error(self.mark_bit.span(), message));
            MARK
        })
    }
}

impl From<&HooksTable> for Hooks {
    fn from(table: &HooksTable) -> Self {
        let switches = [
            (Hook::FromPod, table.from_pod),
            (Hook::NodeEgress, table.node_egress),
            (Hook::Socket, table.socket),
            (Hook::HostNetwork, table.host_network),
        ];
        Self::from_bits(switches.iter().filter(|(_, on)| *on).map(|(hook, _)| hook.bit()).sum())
    }
}

//! `[hooks]`: switches of the hooks.

use imds_ebpf_common::Hook;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Spanned;

use super::{source::Diagnostics, switch::Switch};

/// Set of hooks, as one bit each.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hooks {
    bits: u32,
}

impl Hooks {
    /// Creates the set from the bits of [`Policy::hooks`](imds_ebpf_common::Policy::hooks).
    pub const fn from_bits(bits: u32) -> Self {
        Self { bits }
    }

    /// Returns the set as the bits of [`Policy::hooks`](imds_ebpf_common::Policy::hooks).
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Reports whether a hook is enabled.
    pub const fn contains(self, hook: Hook) -> bool {
        self.bits & hook.bit() != 0
    }

    /// Reports whether a hook is enabled that denies requests to a service beyond the node.
    pub const fn deny_remote(self) -> bool {
        self.bits & !Hook::LocalService.bit() != 0
    }

    /// Returns the union of both sets.
    #[must_use]
    pub const fn union(self, others: Self) -> Self {
        Self { bits: self.bits | others.bits }
    }
}

impl Default for Hooks {
    /// Returns all hooks except `host_network`.
    fn default() -> Self {
        (&HooksTable::default()).into()
    }
}

/// Setting of the sendmsg programs of the `socket` hook: `"auto"`, `true` or `false` in the configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Sendmsg {
    /// Attached if `from_pod` and `node_egress` do not check the packets of every pod.
    #[default]
    Auto,
    /// Attached whenever the `socket` hook is.
    On,
    /// Not attached, even if packets are not checked.
    Off,
}

impl<'de> Deserialize<'de> for Sendmsg {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = &[("auto", Self::Auto)];
        let expected = "\"auto\", true or false";
        deserializer.deserialize_any(Switch { off: Self::Off, on: Self::On, words, expected })
    }
}

impl Serialize for Sendmsg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::On => serializer.serialize_bool(true),
            Self::Off => serializer.serialize_bool(false),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub(super) struct HooksTable {
    from_pod: bool,
    node_egress: bool,
    socket: bool,
    host_network: bool,
    sendmsg: Spanned<Sendmsg>,
    local_service: bool,
}

impl Default for HooksTable {
    fn default() -> Self {
        Self {
            from_pod: true,
            node_egress: true,
            socket: true,
            host_network: false,
            sendmsg: Spanned::new(0..0, Sendmsg::default()),
            local_service: true,
        }
    }
}

impl HooksTable {
    /// Returns the setting of the sendmsg programs, which are part of the `socket` hook.
    pub(super) fn sendmsg(&self, diagnostics: &mut Diagnostics<'_>) -> Sendmsg {
        let sendmsg = *self.sendmsg.get_ref();
        if sendmsg == Sendmsg::On && !self.socket {
            diagnostics.error(self.sendmsg.span(), "hooks.sendmsg: true needs hooks.socket = true");
        }
        sendmsg
    }

    /// Adds the hooks that `others` enables.
    pub(super) fn add(&mut self, others: &Self) {
        self.from_pod |= others.from_pod;
        self.node_egress |= others.node_egress;
        self.socket |= others.socket;
        self.host_network |= others.host_network;
        self.local_service |= others.local_service;
        if others.sendmsg.get_ref() == &Sendmsg::On {
            self.sendmsg = others.sendmsg.clone();
        }
    }

    /// Returns the table with the `socket` hook off.
    pub(super) fn without_socket(self) -> Self {
        Self { socket: false, sendmsg: Spanned::new(0..0, Sendmsg::Auto), ..self }
    }
}

impl From<&HooksTable> for Hooks {
    fn from(table: &HooksTable) -> Self {
        let switches = [
            (Hook::FromPod, table.from_pod),
            (Hook::NodeEgress, table.node_egress),
            (Hook::Socket, table.socket),
            (Hook::HostNetwork, table.host_network),
            (Hook::LocalService, table.local_service),
        ];
        Self::from_bits(switches.iter().filter(|(_, on)| *on).map(|(hook, _)| hook.bit()).sum())
    }
}

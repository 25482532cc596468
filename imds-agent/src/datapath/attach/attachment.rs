//! A program of the agent at a hook, its position there, and the actions that change it.

use imds_ebpf_common::AttachMode;
use strum::IntoStaticStr;

/// A program of this agent at a hook of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// Attach mode; never [`AttachMode::None`].
    pub backend: AttachMode,
    /// True for the program that this agent loaded, false for one of an earlier agent or of another program.
    pub current: bool,
    /// True if the link is pinned in the pin directory, so that it outlives the agent. Filters need no pin: always
    /// true.
    pub pinned: bool,
    /// Position among the programs of the hook.
    pub order: Order,
}

/// Position of a program among the programs of its hook, as `status` prints it.
#[derive(Clone, Copy, Debug, Eq, IntoStaticStr, PartialEq)]
#[strum(serialize_all = "snake_case")]
pub enum Order {
    /// No other program runs before it.
    First,
    /// Other programs run before it, and it can be moved before them.
    NotFirst,
    /// Other programs run before it, and the attach mode offers no position before them.
    Blocked,
}

/// A change to one hook of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Attach the program, first in order.
    Attach(AttachMode),
    /// Replace the program that is attached with this agent's, atomically.
    Replace(AttachMode),
    /// Pin the link in the pin directory again.
    Pin(AttachMode),
    /// Move the program before all others, without detaching it.
    Reorder(AttachMode),
    /// Detach the program from the hook.
    Detach(AttachMode),
}

impl Action {
    /// Reports whether the action repairs a hook that this agent had attached to and that another program changed.
    /// Repeated repairs should back off.
    pub fn is_repair(self) -> bool {
        match self {
            Self::Attach(_) | Self::Replace(_) | Self::Reorder(_) => true,
            Self::Pin(_) | Self::Detach(_) => false,
        }
    }
}

//! Obstacles to an attachment that no retry removes, each with its remedy.

use imds_ebpf_common::TcHook;
use thiserror::Error;

use crate::datapath::sys::bpf::MAX_PROGRAMS;

/// Error of an attachment that fails until the operator or another program changes the interface.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("failed to attach {} to {interface}: {obstacle}; {}", hook.hook().name(), obstacle.remedy(interface))]
pub struct ObstacleError {
    /// Hook that is not attached.
    pub hook: TcHook,
    /// Name of the interface.
    pub interface: String,
    /// Cause of the failure.
    pub obstacle: Obstacle,
}

/// Cause of an [`ObstacleError`].
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum Obstacle {
    /// The interface has an `ingress` qdisc, which has no egress hook and occupies the slot of clsact. A filter for egress would
    /// run at ingress.
    #[error("its ingress qdisc occupies the clsact slot")]
    IngressQdisc {
        /// True if the kernel has TCX, so that `--tc-backend tcx` avoids the qdisc.
        has_tcx: bool,
    },
    /// The hook of the qdisc uses a filter block that several interfaces share. The kernel rejects filters of a single interface.
    #[error(
        "its {kind} qdisc uses the shared filter block {block}, which takes no filter of a single interface"
    )]
    SharedBlock {
        /// Kind of the qdisc: `clsact` or `ingress`.
        kind: String,
        /// Index of the block, as `tc filter show block` takes it.
        block: u32,
        /// True if the kernel has TCX, so that `--tc-backend tcx` avoids the qdisc.
        has_tcx: bool,
    },
    /// The list of programs of the hook is full.
    #[error("the kernel runs at most {MAX_PROGRAMS} programs at a hook, and that many are attached")]
    TooManyPrograms,
    /// The programs parse packets that start with an Ethernet or IP header.
    #[error("the programs cannot parse the link-layer header of its hardware type, {0}")]
    HardwareType(u16),
}

impl Obstacle {
    /// Returns the action that removes the obstacle from the interface.
    pub fn remedy(&self, interface: &str) -> String {
        let (kind, has_tcx) = match self {
            Self::IngressQdisc { has_tcx } => ("ingress", has_tcx),
            Self::SharedBlock { kind, has_tcx, .. } => (&**kind, has_tcx),
            Self::TooManyPrograms => return "detach one of them".to_owned(),
            Self::HardwareType(_) => {
                return "route protected endpoints through another interface, or exclude this one".to_owned();
            }
        };
        let delete = format!("delete the qdisc with its filters (`tc qdisc delete dev {interface} {kind}`)");
        if *has_tcx { format!("{delete}, or run imds-agent with --tc-backend tcx") } else { delete }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(obstacle: Obstacle) -> String {
        ObstacleError { hook: TcHook::NodeEgress, interface: "up0".to_owned(), obstacle }.to_string()
    }

    #[test]
    fn messages_name_the_remedy() {
        assert_eq!(
            message(Obstacle::IngressQdisc { has_tcx: false }),
            "failed to attach node_egress to up0: its ingress qdisc occupies the clsact slot; delete the qdisc with its \
             filters (`tc qdisc delete dev up0 ingress`)"
        );
        let shared = Obstacle::SharedBlock { kind: "clsact".to_owned(), block: 22, has_tcx: true };
        assert!(message(shared.clone()).contains("shared filter block 22"));
        assert!(message(shared).ends_with("dev up0 clsact`), or run imds-agent with --tc-backend tcx"));
        assert!(message(Obstacle::TooManyPrograms).contains("at most 63 programs"));
    }
}

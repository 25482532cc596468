//! Reads the qdisc in the `ffff:` slot of an interface, which contains either `clsact` or `ingress`.

use std::collections::BTreeMap;

use imds_ebpf_common::TcHook;
use rtnetlink::{
    packet_core::Nla as _,
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage},
    },
};

use super::obstacle::Obstacle;
use crate::node::netlink::{Netlink, NetlinkError};

/// Attribute of the ingress block (`include/uapi/linux/rtnetlink.h`), which the netlink library does not define.
const TCA_INGRESS_BLOCK: u16 = 13;
/// Attribute of the egress block (`include/uapi/linux/rtnetlink.h`).
const TCA_EGRESS_BLOCK: u16 = 14;
/// Kind of the qdisc that has no egress hook.
const INGRESS: &str = "ingress";

/// Qdisc in the `ffff:` slot of an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Qdisc {
    kind: String,
    ingress_block: Option<u32>,
    egress_block: Option<u32>,
}

impl Qdisc {
    /// Parses an `RTM_NEWQDISC` message. Returns `None` if the qdisc is not in the `ffff:` slot.
    pub fn from_message(message: TcMessage) -> Option<Self> {
        if message.header.parent != TcHandle::CLSACT {
            return None;
        }
        let mut qdisc = Self { kind: String::new(), ingress_block: None, egress_block: None };
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => qdisc.kind = kind,
                TcAttribute::Other(other) => {
                    let mut value = vec![0; other.value_len()];
                    other.emit_value(&mut value);
                    let block = value.try_into().ok().map(u32::from_ne_bytes).filter(|&block| block != 0);
                    match other.kind() {
                        TCA_INGRESS_BLOCK => qdisc.ingress_block = block,
                        TCA_EGRESS_BLOCK => qdisc.egress_block = block,
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        Some(qdisc)
    }

    /// Returns the obstacle to a filter at `hook`, or `None`. `has_tcx` selects the remedy: TCX needs no qdisc.
    pub fn obstacle(&self, hook: TcHook, has_tcx: bool) -> Option<Obstacle> {
        let block = match hook {
            TcHook::NodeEgress if self.kind == INGRESS => return Some(Obstacle::IngressQdisc { has_tcx }),
            TcHook::FromPod => self.ingress_block,
            TcHook::NodeEgress => self.egress_block,
        };
        block.map(|block| Obstacle::SharedBlock { kind: self.kind.clone(), block, has_tcx })
    }
}

/// Reads the qdisc of an interface. Returns `None` if the slot is free.
///
/// The kernel dumps the qdiscs of all interfaces (`tc_dump_qdisc`), so call this only for interfaces that already have one. For
/// a request for a single qdisc, the kernel also notifies all listeners of `RTNLGRP_TC` (`qdisc_notify`), as if the qdisc had
/// changed.
pub(crate) async fn read(netlink: &Netlink, ifindex: u32) -> Result<Option<Qdisc>, NetlinkError> {
    Ok(list(netlink).await?.remove(&ifindex))
}

/// Reads the qdiscs of all interfaces whose `ffff:` slot is in use, by interface index.
pub(crate) async fn list(netlink: &Netlink) -> Result<BTreeMap<u32, Qdisc>, NetlinkError> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let answers = netlink.dump("failed to list qdiscs", request).await?;
    let qdiscs = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewQueueDiscipline(message) => {
            let ifindex = message.header.index.cast_unsigned();
            Qdisc::from_message(message).map(|qdisc| (ifindex, qdisc))
        }
        _ => None,
    });
    Ok(qdiscs.collect())
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::DefaultNla;

    use super::*;

    fn qdisc(kind: &str, blocks: &[(u16, u32)]) -> Qdisc {
        let mut message = TcMessage::with_index(7);
        message.header.parent = TcHandle::CLSACT;
        message.attributes.push(TcAttribute::Kind(kind.to_owned()));
        message.attributes.extend(blocks.iter().map(|(attribute, block)| {
            TcAttribute::Other(DefaultNla::new(*attribute, block.to_ne_bytes().to_vec()))
        }));
        Qdisc::from_message(message).unwrap()
    }

    #[test]
    fn clsact_takes_both_hooks() {
        for hook in TcHook::ALL {
            assert_eq!(qdisc("clsact", &[]).obstacle(hook, false), None);
        }
    }

    #[test]
    fn ingress_qdisc_has_no_egress() {
        let ingress = qdisc("ingress", &[]);
        assert_eq!(ingress.obstacle(TcHook::FromPod, false), None);
        let expected = Obstacle::IngressQdisc { has_tcx: false };
        assert_eq!(ingress.obstacle(TcHook::NodeEgress, false), Some(expected));
    }

    #[test]
    fn shared_blocks_are_per_direction() {
        let shared = qdisc("clsact", &[(TCA_INGRESS_BLOCK, 22)]);
        let expected = Obstacle::SharedBlock { kind: "clsact".to_owned(), block: 22, has_tcx: false };
        assert_eq!(shared.obstacle(TcHook::FromPod, false), Some(expected));
        assert_eq!(shared.obstacle(TcHook::NodeEgress, false), None);
        let egress = qdisc("clsact", &[(TCA_EGRESS_BLOCK, 5)]);
        assert_eq!(egress.obstacle(TcHook::FromPod, false), None);
        assert!(egress.obstacle(TcHook::NodeEgress, false).is_some());
    }

    #[test]
    fn root_qdiscs_are_ignored() {
        let mut message = TcMessage::with_index(7);
        message.header.parent = TcHandle::ROOT;
        assert_eq!(Qdisc::from_message(message), None);
    }
}

//! Adds each interface with its attachments, as the kernel lists them, to the status report.

use std::collections::BTreeMap;

use imds_ebpf_common::{Hook, Role, Subject, SubjectKind, TcHook, TcHookSet, names::tc_program};

use super::{HookAttachment, Interface, Node, StatusReport};
use crate::{
    config::Interfaces,
    datapath::{
        DatapathError,
        attach::{
            attachment::{Attachment, Order},
            clsact, mprog,
        },
        maps::{counters::Counts, interface_records},
        object,
        pin::dir::AttachPoint,
    },
    escape::escape,
    node::{interface_role, link::Link},
};

impl StatusReport {
    pub(crate) async fn add(
        &mut self,
        link: &Link,
        node: &Node<'_>,
        counts: &mut BTreeMap<(u32, u8), Counts>,
    ) -> Result<(), DatapathError> {
        let mut sum = Counts::default();
        for hook in TcHook::ALL {
            sum += counts.remove(&(link.index, hook.hook() as u8)).unwrap_or_default();
        }
        self.total += sum;
        // The agent's record follows the configuration. Without a record, use the default interface selection.
        let record = interface_records::get(node.maps, link.index);
        let recorded = record.and_then(|record| Some((Role::from_u8(record.role)?, record)));
        let (role, desired) = if let Some((role, record)) = recorded {
            (role, TcHookSet::from_bits(record.hooks))
        } else {
            let assignment = interface_role::assign(link, &node.uplinks, &Interfaces::default(), false);
            (assignment.role, assignment.hooks)
        };
        let is_queued = record.is_some_and(|record| record.pending == 1);
        let mut attachments = Vec::new();
        for hook in desired.iter().filter(|hook| node.hooks.contains(hook.hook())) {
            let attachment = attachment(link, hook, node).await?;
            let is_optional = node.uplinks.is_optional(link, hook);
            // Hooks of uplinks are never queued, except for ports that may be pods. Without an agent no hook is attached later.
            let is_pod_port = link.leads_elsewhere() && !node.uplinks.are_routed(link.index);
            let may_wait = self.agent.running && (hook == TcHook::FromPod || is_pod_port);
            let is_prepared_later = is_optional && record.is_none();
            let pending = attachment.is_none() && (is_prepared_later || (may_wait && is_queued));
            self.check_attachment(link, hook, attachment, pending, node);
            attachments.push(HookAttachment {
                hook: hook.hook().name(),
                attach_mode: attachment.map(|attachment| attachment.backend.name()),
                order: attachment.map(|attachment| order(link, hook, attachment).into()),
                pending,
            });
        }
        self.interfaces.push(Interface {
            ifindex: link.index,
            name: escape(&link.name).into_owned(),
            pod: node.names.get(&Subject::new(SubjectKind::Interface, link.index.into())).cloned(),
            role: role.name(),
            attachments,
            counts: sum,
        });
        Ok(())
    }

    fn check_attachment(
        &mut self,
        link: &Link,
        hook: TcHook,
        attachment: Option<Attachment>,
        pending: bool,
        node: &Node<'_>,
    ) {
        let (name, hook_name) = (&*escape(&link.name), hook.hook().name());
        let Some(attachment) = attachment else {
            let remedy = if self.agent.running {
                "see the agent's log for the cause"
            } else {
                "start `imds-agent run`"
            };
            if !pending {
                return self.problem(Some(name), format!("{hook_name} is not enforced"), remedy);
            }
            // Until it is attached, the node-wide hooks deny the pod's packets, if one of them is on.
            if !node.hooks.contains(Hook::NodeEgress) && !node.hooks.contains(Hook::Socket) {
                self.problem(
                    Some(name),
                    format!("{hook_name} is not enforced yet"),
                    "wait: the agent attaches it shortly",
                );
            }
            return;
        };
        if let (TcHook::FromPod, Some(program)) = (hook, link.xdp) {
            let problem =
                format!("XDP program {program} runs before {hook_name} and can redirect packets past it");
            self.problem(Some(name), problem, format!("see `ip link show dev {name}`"));
        }
        if attachment.order != Order::First {
            let remedy =
                format!("see `bpftool net show` and `tc filter show dev {name} ingress` (or egress)");
            let problem = format!("{hook_name} is not first: other programs run before it");
            self.problem(Some(name), problem, remedy);
        }
        if !attachment.current {
            let problem = format!("{hook_name} runs another program than the pinned one");
            self.problem(Some(name), problem, "restart the agent, which replaces it, or stop a second agent");
        }
        if !attachment.pinned {
            let problem = format!("the link of {hook_name} is not pinned: enforcement ends with the agent");
            self.problem(Some(name), problem, "a running agent pins it at the next resync");
        }
    }
}

/// Returns the order of the program at its hook. An XDP program also counts as one that runs before it.
fn order(link: &Link, hook: TcHook, attachment: Attachment) -> Order {
    match (hook, link.xdp) {
        (TcHook::FromPod, Some(_)) => Order::Blocked,
        _ => attachment.order,
    }
}

/// Returns the agent's program at a hook. If both a link and a filter are attached, returns the link, which runs first.
async fn attachment(link: &Link, hook: TcHook, node: &Node<'_>) -> Result<Option<Attachment>, DatapathError> {
    let point = AttachPoint { ifindex: link.index, hook };
    // A program that the kernel rejected is not pinned.
    let program = object::pinned_program(node.pins, tc_program(hook, link.link_layer)).unwrap_or_default();
    if let Some(attachment) = mprog::find(node.pins, point, program)? {
        return Ok(Some(attachment));
    }
    Ok(clsact::attachment(node.netlink, point, program).await?)
}

//! Checks the attachments of the node's interfaces, and waits for those of a test interface.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use imds_ebpf_common::{AttachMode, InterfaceRecord, Role, TcHook, TcHookSet};
use tokio::time::sleep;

use super::{
    POLL_INTERVAL,
    fixture::LinkName,
    verify_report::{Outcome, Skip, VerifyCheck},
};
use crate::{
    datapath::{maps::interface_records, object::Maps},
    encode::field_text,
    node::link::VERIFY_PREFIX,
    telemetry::status::{HookAttachment, StatusReport},
};

const ATTACH_TIMEOUT: Duration = Duration::from_secs(30);
/// Time after which a hook counts as not desired if the agent's record of the interface does not list it.
const DESIRED_DELAY: Duration = Duration::from_secs(3);

pub(crate) async fn wait_attached(
    hook: TcHook,
    interface: &LinkName,
    maps: &Maps,
    is_followed: bool,
) -> Result<(), Skip> {
    let LinkName { name, ifindex } = interface;
    if !is_followed {
        let reason = "no agent is running to attach to a new interface: start `imds-agent run`";
        return Err(match hook {
            TcHook::FromPod => Skip::failed(reason),
            TcHook::NodeEgress => Skip::new(reason),
        });
    }
    let start = Instant::now();
    let mut undesired_since = None;
    while start.elapsed() < ATTACH_TIMEOUT {
        let record =
            interface_records::get(maps, *ifindex).filter(|record| field_text(&record.name) == *name);
        match record {
            Some(record) if is_attached(&record, hook) => return Ok(()),
            Some(record) if !is_desired(&record, hook) => {
                let since: &mut Instant = undesired_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= DESIRED_DELAY {
                    let role = Role::from_u8(record.role).unwrap_or_default().name();
                    let reason = format!("the configuration makes {name} an interface of role {role}");
                    return Err(Skip::new(reason));
                }
            }
            Some(_) | None => undesired_since = None,
        }
        sleep(POLL_INTERVAL).await;
    }
    let seconds = ATTACH_TIMEOUT.as_secs();
    Err(Skip::failed(format!("{name} is not enforced after {seconds} s: see the agent's log")))
}

/// Checks that the programs of a TC hook are attached, and first in order, at all interfaces that should have them.
///
/// `excluded` are interfaces with a route to an endpoint that the configuration excludes.
pub(crate) fn check(hook: TcHook, status: &StatusReport, excluded: &[String]) -> VerifyCheck {
    const EXPECTED: &str = "first at every interface";
    let (nowhere, excluded) = match hook {
        TcHook::FromPod => ("this node has no interface of a pod", &[][..]),
        TcHook::NodeEgress => ("no interface of this node has the hook", excluded),
    };
    let hook = hook.hook().name();
    let attachments: Vec<_> = status
        .interfaces
        .iter()
        .filter(|interface| !interface.name.starts_with(VERIFY_PREFIX))
        .filter_map(|interface| Some((&*interface.name, interface.attachment(hook)?)))
        .collect();
    let names = |is_wrong: fn(&HookAttachment) -> bool, text: &str| {
        let found = attachments.iter().filter(|(_, attachment)| is_wrong(attachment)).map(|&(name, _)| name);
        let found: BTreeSet<_> = found.collect();
        let names: Vec<_> = found.into_iter().collect();
        (!names.is_empty()).then(|| format!("{} {text}", names.join(", ")))
    };
    let wrong: Vec<_> = [
        attachments.is_empty().then(|| format!("at 0 of 0: {nowhere}")),
        names(|attachment| !attachment.is_attached(), "not enforced"),
        names(|attachment| attachment.is_attached() && !attachment.is_enforced(), "behind other programs"),
    ]
    .into_iter()
    .flatten()
    .chain(excluded.iter().map(|name| format!("uplink {name} is excluded")))
    .collect();
    if wrong.is_empty() {
        return VerifyCheck::new(hook, EXPECTED, format!("at {} of {0}", attachments.len()), Outcome::Passed);
    }
    VerifyCheck::new(hook, EXPECTED, wrong.join("; "), Outcome::Failed)
}

fn is_desired(record: &InterfaceRecord, hook: TcHook) -> bool {
    TcHookSet::from_bits(record.hooks).contains(hook)
}

fn is_attached(record: &InterfaceRecord, hook: TcHook) -> bool {
    let mode = record.attach_modes.get(hook as usize);
    is_desired(record, hook) && mode.is_some_and(|&mode| mode != AttachMode::None as u8)
}

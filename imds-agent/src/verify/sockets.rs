//! Calls on sockets: a pod's, and the node's.

use std::{collections::BTreeSet, panic::resume_unwind, thread};

use imds_ebpf_common::{
    CounterKey, Hook, Verdict,
    endpoint::{TCP, UDP},
    names::SOCKET_LINKS,
};

use super::{
    Guarding, VerifyError,
    calls::{attempt, is_refused, phrase},
    edges::{closed, counts, expectation, risen, targets},
    report::{self, Check, Outcome},
    stage::Pod,
};
use crate::{datapath::pins, endpoints::Endpoint, node::cgroup};

/// Proves that calls from the namespace are refused.
pub(super) fn prove(guarding: &Guarding, pod: &Pod) -> Result<Vec<Check>, VerifyError> {
    let is_attached = guarding.status.sockets.as_ref().is_some_and(|sockets| sockets.attached);
    let mut checks = vec![Check::attached(Hook::Socket, is_attached)];
    for endpoint in &guarding.endpoints {
        for (service, expected, kept) in targets(endpoint) {
            let (found, is_right) = match expected {
                Verdict::Deny => refused(guarding, pod, endpoint)?,
                Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => {
                    let result = pod.run(|| attempt(endpoint.address, service))?;
                    (phrase(&result), !is_refused(&result))
                }
            };
            let check =
                Check::of_hook(Hook::Socket.name(), expectation(expected), found, Outcome::of(is_right));
            checks.push(check.at(endpoint).with_service(kept));
        }
    }
    Ok(checks)
}

/// Whether both ways to name an endpoint are refused, and what was found.
fn refused(guarding: &Guarding, pod: &Pod, endpoint: &Endpoint) -> Result<(String, bool), VerifyError> {
    let count = || counts(&guarding.maps, CounterKey::DEPARTED, Hook::Socket);
    let before = count();
    let mut allowed = Vec::new();
    // Without the sendmsg programs datagrams are denied by the other hooks.
    let has_sendmsg = guarding.status.sockets.as_ref().is_some_and(|sockets| sockets.sendmsg.attached);
    let calls: &[_] = if has_sendmsg { &[(TCP, "connect"), (UDP, "sendto")] } else { &[(TCP, "connect")] };
    for &(protocol, call) in calls {
        let service = closed(&endpoint.keep, protocol);
        let result = pod.run(|| attempt(endpoint.address, service))?;
        if !is_refused(&result) {
            allowed.push(format!("{call} {}", phrase(&result)));
        }
    }
    if allowed.is_empty() {
        let names = calls.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(" and ");
        return Ok((format!("denied: {names} refused"), true));
    }
    let reason = match is_guarded_cgroup(guarding) {
        Some(false) => "this process is outside of the cgroup whose sockets are guarded".to_owned(),
        // Others' calls are counted there, too.
        Some(true) | None => report::phrase(risen(before, count())).to_owned(),
    };
    Ok((format!("{}: {reason}", allowed.join(", ")), false))
}

/// Whether this process is where sockets are guarded; `None` where that can't be said.
fn is_guarded_cgroup(guarding: &Guarding) -> Option<bool> {
    let guarded: BTreeSet<u64> = SOCKET_LINKS
        .into_iter()
        .filter_map(|name| pins::link_at(&guarding.pins.named_link(name))?.cgroup())
        .collect();
    let own = cgroup::ids_of_this_process().ok()?;
    (!guarded.is_empty()).then(|| own.iter().any(|id| guarded.contains(id)))
}

/// Proves that the node's own calls are not refused, whatever else becomes of them: all at once, as those that nobody
/// answers take long.
pub(super) fn prove_node(endpoints: &[Endpoint]) -> Vec<Check> {
    let call = |endpoint: &Endpoint| {
        let result = attempt(endpoint.address, closed(&endpoint.keep, TCP));
        let found = if result.is_ok() { "connected".to_owned() } else { phrase(&result) };
        let result = Outcome::of(!is_refused(&result));
        Check::of_hook("node", "not refused", found, result).at(endpoint)
    };
    thread::scope(|scope| {
        let calls: Vec<_> = endpoints.iter().map(|endpoint| scope.spawn(move || call(endpoint))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

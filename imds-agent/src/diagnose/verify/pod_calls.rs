//! Checks of the socket hook: connect(2) and sendto(2) in the network namespace of the test pod.

use std::collections::BTreeSet;

use imds_ebpf_common::{
    Hook, Subject, SubjectKind, Verdict,
    endpoint::{TCP, UDP},
    names::SOCKET_LINKS,
};

use super::{
    Enforced, VerifyError,
    fixture::TestPod,
    probes::{Probe, Treatment},
    syscalls::{attempt, is_refused, phrase},
    tc::{closed, expectation, targets},
    verify_report::{Outcome, Skip, VerifyCheck, phrase as verdict_phrase},
};
use crate::{config::endpoint_set::Endpoint, datapath::pin::dir, node::cgroup};

/// Pin of the sendto(2) program's link. The agent attaches this program only on nodes that need it.
const SENDMSG_LINK: &str = "sendmsg4";

/// Checks that calls from the namespace of the test pod are refused.
pub(crate) fn check(
    enforced: &Enforced,
    pod: &Result<TestPod, Skip>,
) -> Result<Vec<VerifyCheck>, VerifyError> {
    let name = Hook::Socket.name();
    let is_attached = enforced.status.sockets.as_ref().is_some_and(|sockets| sockets.attached);
    let mut checks = vec![VerifyCheck::attached(Hook::Socket, is_attached)];
    let pod = match pod {
        Ok(pod) => pod,
        Err(skip) => {
            let skipped = |endpoint| {
                VerifyCheck::skipped(name, "denied", skip).with_sender("pod").with_endpoint(endpoint)
            };
            checks.extend(enforced.endpoints.iter().map(skipped));
            return Ok(checks);
        }
    };
    // Before Linux 5.14 the namespace has no cookie, and the programs count the calls with those of all pods.
    let probe = pod
        .cookie()
        .map(|cookie| enforced.probes.add(Subject::new(SubjectKind::Netns, cookie), Treatment::Denied));
    let probe = probe.transpose()?;
    for endpoint in &enforced.endpoints {
        for (service, expected, allowed) in targets(endpoint) {
            let (observed, is_right) = if expected == Verdict::Denied {
                refused(enforced, pod, probe.as_ref(), endpoint)?
            } else {
                let result = pod.run(|| attempt(endpoint.address, service))?;
                (phrase(&result), !is_refused(&result))
            };
            let check =
                VerifyCheck::new(name, expectation(expected), observed, Outcome::from_success(is_right));
            checks.push(check.with_sender("pod").with_endpoint(endpoint).with_service(allowed));
        }
    }
    Ok(checks)
}

/// Calls each endpoint, and returns whether the hook refused all calls, with a description of the results.
fn refused(
    enforced: &Enforced,
    pod: &TestPod,
    probe: Option<&Probe<'_>>,
    endpoint: &Endpoint,
) -> Result<(String, bool), VerifyError> {
    let mut calls = vec![(TCP, "connect")];
    if dir::link_at(&enforced.pins.named_link(SENDMSG_LINK)).is_some() {
        calls.push((UDP, "sendto"));
    }
    let (mut done, mut wrong) = (Vec::new(), Vec::new());
    for (protocol, call) in calls {
        if let Some(probe) = probe {
            probe.reset(Treatment::Denied)?;
        }
        let result = pod.run(|| attempt(endpoint.address, closed(&endpoint.allow_ports, protocol)))?;
        let verdict = probe.map(|probe| probe.verdict(Hook::Socket));
        match (is_refused(&result), verdict) {
            (true, None | Some(Some(Verdict::Denied))) => done.push(call),
            (_, Some(Some(verdict))) => wrong.push(format!("{call} {}", verdict_phrase(Some(verdict)))),
            (true, Some(None)) => wrong.push(format!("{call} refused by another program")),
            (false, _) => wrong.push(format!("{call} {}", phrase(&result))),
        }
    }
    if wrong.is_empty() {
        return Ok((format!("denied: {} refused", done.join(" and ")), true));
    }
    let mut observed = wrong.join(", ");
    if is_in_enforced_cgroup(enforced) == Some(false) {
        observed.push_str(": this process is outside of the cgroup to which the programs are attached");
    }
    Ok((observed, false))
}

/// Reports whether this process is in the cgroup of the socket hook; `None` if that is unknown.
fn is_in_enforced_cgroup(enforced: &Enforced) -> Option<bool> {
    let attached: BTreeSet<u64> = SOCKET_LINKS
        .into_iter()
        .filter_map(|name| dir::link_at(&enforced.pins.named_link(name))?.cgroup())
        .collect();
    let own = cgroup::ids_of_this_process().ok()?;
    (!attached.is_empty()).then(|| own.iter().any(|id| attached.contains(id)))
}

//! Checks of each TC hook: its verdicts on frames at a test interface.

use std::time::{Duration, Instant};

use imds_ebpf_common::{Hook, Service, Subject, SubjectKind, TcHook, Verdict, endpoint::TCP};
use tokio::time::sleep;

use super::{
    ARRIVAL_TIMEOUT, POLL_INTERVAL, VerifyError,
    attached::wait_attached,
    fixture::{TestDevice, TestPod},
    frames::{Frames, Mac},
    probes::{Probe, Probes, Treatment},
    verify_report::{Outcome, Skip, VerifyCheck, phrase},
};
use crate::{
    config::endpoint_set::{AllowedPort, Endpoint},
    datapath::object::Maps,
};

/// Interval at which a frame is sent again. A frame that is sent while an interface comes up can be lost.
pub(crate) const RESEND_INTERVAL: Duration = Duration::from_millis(300);
/// Time to wait for the expected verdict after another one.
const OTHER_VERDICT_DELAY: Duration = Duration::from_millis(500);
/// MAC address that no interface has, so that the node neither accepts nor forwards these frames.
const NO_HOST: Mac = [0x02, 0, 0, 0, 0, 0xfe];

/// Checks the verdicts of a hook at a test interface for each endpoint.
pub(crate) async fn check(
    tc_hook: TcHook,
    device: Result<&dyn TestDevice, Skip>,
    endpoints: &[Endpoint],
    maps: &Maps,
    probes: &Probes,
    is_followed: bool,
) -> Result<Vec<VerifyCheck>, VerifyError> {
    let hook = tc_hook.hook();
    let device = match device {
        Ok(device) => wait_attached(tc_hook, device.interface(), maps, is_followed).await.map(|()| device),
        Err(skip) => Err(skip),
    };
    let mut checks = Vec::new();
    for endpoint in endpoints {
        for (service, expected, allowed) in targets(endpoint) {
            let expected_text = expectation(expected);
            let check = match &device {
                Err(skip) => VerifyCheck::skipped(hook.name(), expected_text, skip),
                Ok(device) => {
                    let subject = Subject::new(SubjectKind::Interface, device.interface().ifindex.into());
                    let probe = probes.add(subject, Treatment::Denied)?;
                    let frames = Frames { to: NO_HOST, from: TestPod::POD_MAC, marker: [0; 4] };
                    let frame = frames.frame(endpoint.address, service, 0);
                    let found = verdict_on(*device, &probe, hook, expected, &frame).await;
                    VerifyCheck::new(
                        hook.name(),
                        expected_text,
                        phrase(found),
                        Outcome::from_success(found == Some(expected)),
                    )
                }
            };
            checks.push(check.with_sender("pod").with_endpoint(endpoint).with_service(allowed));
        }
    }
    Ok(checks)
}

/// Returns the services of an endpoint to test: all allowed ones, and one that is not allowed.
pub(crate) fn targets(endpoint: &Endpoint) -> impl Iterator<Item = (Service, Verdict, Option<AllowedPort>)> {
    let allow_ports = &endpoint.allow_ports;
    let allowed = allow_ports.iter().map(|&allowed| (allowed.0, Verdict::Allowed, Some(allowed)));
    [(closed(allow_ports, TCP), Verdict::Denied, None)].into_iter().chain(allowed)
}

/// Returns a service of this protocol that is not allowed.
pub(crate) fn closed(allow_ports: &[AllowedPort], protocol: u8) -> Service {
    let services = (80..=u16::MAX).map(|port| Service::new(protocol, port));
    services
        .into_iter()
        .find(|service| allow_ports.iter().all(|allowed| allowed.0 != *service))
        .unwrap_or(Service::new(protocol, 80))
}

pub(crate) const fn expectation(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Denied => "denied",
        Verdict::Unrelated
        | Verdict::Audited
        | Verdict::Off
        | Verdict::Allowed
        | Verdict::Exempt
        | Verdict::Redirected => "not denied",
    }
}

/// Sends a frame until a hook has counted it, and returns the verdict: `expected` if the hook gave it, otherwise another.
async fn verdict_on(
    device: &dyn TestDevice,
    probe: &Probe<'_>,
    hook: Hook,
    expected: Verdict,
    frame: &[u8],
) -> Option<Verdict> {
    let start = Instant::now();
    let (mut sent, mut sent_at, mut other_at) = (0, None, None);
    while start.elapsed() < ARRIVAL_TIMEOUT {
        if sent_at.is_none_or(|at: Instant| at.elapsed() >= RESEND_INTERVAL) {
            sent_at = Some(Instant::now());
            match device.send(frame) {
                Ok(()) => sent += 1,
                Err(error) => log::debug!("failed to send a frame: {error}"),
            }
        }
        if probe.count(hook, expected) > 0 {
            wait_for_count(probe, hook, sent).await;
            return Some(expected);
        }
        if probe.verdict(hook).is_some() {
            let since: &mut Instant = other_at.get_or_insert_with(Instant::now);
            if since.elapsed() >= OTHER_VERDICT_DELAY {
                break;
            }
        }
        sleep(POLL_INTERVAL).await;
    }
    probe.verdict(hook)
}

/// Waits until a hook has counted all sent frames, so that the next check does not count a late one.
async fn wait_for_count(probe: &Probe<'_>, hook: Hook, sent: u64) {
    let start = Instant::now();
    while probe.total(hook) < sent && start.elapsed() < OTHER_VERDICT_DELAY {
        sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::endpoint::UDP;

    use super::*;

    #[test]
    fn closed_services() {
        let allow_ports = [AllowedPort(Service::new(TCP, 80)), AllowedPort(Service::new(UDP, 81))];
        assert_eq!(closed(&[], TCP), Service::new(TCP, 80));
        assert_eq!(closed(&allow_ports, TCP), Service::new(TCP, 81));
        assert_eq!(closed(&allow_ports, UDP), Service::new(UDP, 80));
    }
}

//! Sends packets of a pod along their path through the node: its routes and rules, up to the last hook.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use imds_ebpf_common::{Hook, Service, Verdict, endpoint::TCP};
use tokio::time::sleep;

use super::{
    ARRIVAL_TIMEOUT, PATH, POLL_INTERVAL, VerifyError,
    fixture::{LinkName, TestDevice as _, TestPod},
    frames::Frames,
    last_hook::LastHook,
    probes::{Probe, Treatment},
    routes,
    tc::{RESEND_INTERVAL, closed},
    verify_report::{Outcome, Skip, VerifyCheck},
};
use crate::{config::endpoint_set::Endpoint, node::netlink::Netlink};

/// Destinations that are not protected (TEST-NET-2, RFC 5737, and the documentation prefix, RFC 3849).
pub(crate) const CONTROLS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
/// Limit for a frame to reach the last hook after another frame of the same check was denied.
const DENIED_DELAY: Duration = Duration::from_millis(500);

/// A test pod on one path into the node: its own link, or a bridge.
pub(crate) struct Path<'p> {
    pub(crate) pod: &'p TestPod,
    /// Test sender at `from_pod`, and at `node_egress` for a routed link.
    pub(crate) probe: &'p Probe<'p>,
    /// Test sender at `node_egress` for a bridge.
    pub(crate) bridge: Option<&'p Probe<'p>>,
    pub(crate) frames: Frames,
    /// Text after the sender in the report, such as ` on cni0`.
    pub(crate) device_suffix: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Arrival {
    Arrived,
    Denied(Hook),
    Lost,
}

impl Path<'_> {
    /// Sends packets to unprotected destinations through `interface`. Returns, for IPv4 and IPv6, the reason why the node does
    /// not forward them; `None` if it does.
    pub(crate) async fn controls(
        &self,
        netlink: &Netlink,
        last_hook: &mut LastHook,
        families: [bool; 2],
        interface: &LinkName,
    ) -> Result<[Option<Skip>; 2], VerifyError> {
        let mut skips = [None, None];
        let mut sent = Vec::new();
        for ((control, is_needed), skip) in CONTROLS.into_iter().zip(families).zip(&mut skips) {
            if !is_needed {
                continue;
            }
            if let Some(reason) = not_forwarding(control.is_ipv4(), &interface.name) {
                *skip = Some(Skip::new(format!("this node does not forward test packets: {reason}")));
                continue;
            }
            match routes::replace(netlink, control.is_ipv4(), interface.ifindex).await {
                Ok(()) => sent.push((control, Service::new(TCP, 80))),
                Err(error) => *skip = Some(Skip::new(VerifyError::from(error).in_full())),
            }
        }
        self.probe.reset(Treatment::Denied)?;
        for ((control, _), arrival) in sent.iter().zip(self.send(last_hook, &sent).await) {
            if arrival != Arrival::Arrived
                && let Some(skip) = skips.get_mut(usize::from(control.is_ipv6()))
            {
                let reason = format!(
                    "this node does not forward test packets: packets to {control} do not reach the last hook, because of a \
                     firewall rule or a missing route"
                );
                *skip = Some(Skip::new(reason));
            }
        }
        Ok(skips)
    }

    /// Checks that a pod without an exemption is denied before the last hook.
    pub(crate) async fn check_denied(
        &self,
        last_hook: &mut LastHook,
        endpoints: &[(&Endpoint, Option<Skip>)],
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        const EXPECTED: &str = "denied before the last hook";
        let mut checks = Vec::new();
        for (endpoint, skip) in endpoints {
            self.reset(Treatment::Denied)?;
            let (observed, outcome) = match self.send(last_hook, &[target(endpoint)]).await[..] {
                [Arrival::Denied(hook)] => (format!("denied at {}", hook.name()), Outcome::Passed),
                [Arrival::Arrived] => ("reached it".to_owned(), Outcome::Failed),
                _ => match skip {
                    Some(skip) => (skip.reason.clone(), skip.outcome),
                    None => (LOST.to_owned(), Outcome::Skipped),
                },
            };
            let check = VerifyCheck::new(PATH, EXPECTED, observed, outcome);
            checks.push(check.with_sender(format!("pod{}", self.device_suffix)).with_endpoint(endpoint));
        }
        Ok(checks)
    }

    /// Checks that an exempt pod reaches the last hook. If a packet is lost but not denied, the check fails with
    /// `fails_if_lost`, and is skipped otherwise.
    pub(crate) async fn check_exempt(
        &self,
        last_hook: &mut LastHook,
        endpoints: &[(&Endpoint, Option<Skip>)],
        treatment: Treatment,
        fails_if_lost: bool,
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        self.reset(treatment)?;
        let open = endpoints.iter().filter(|(_, skip)| skip.is_none());
        let targets: Vec<_> = open.map(|(endpoint, _)| target(endpoint)).collect();
        let mut arrivals = self.send(last_hook, &targets).await.into_iter();
        let mut checks = Vec::new();
        for (endpoint, skip) in endpoints {
            if let Some(skip) = skip {
                checks.push(self.exempt_check(endpoint, &*skip.reason, skip.outcome));
                continue;
            }
            let mut arrival = arrivals.next().unwrap_or(Arrival::Lost);
            let is_unclear = match arrival {
                Arrival::Arrived => false,
                Arrival::Denied(_) => true,
                Arrival::Lost => self.bridge.is_some(),
            };
            if is_unclear && targets.len() > 1 {
                // The counters of a probe are not kept by address. Sending to one endpoint alone shows its verdict.
                self.reset(treatment)?;
                arrival = self.send(last_hook, &[target(endpoint)]).await.pop().unwrap_or(Arrival::Lost);
            }
            let (observed, outcome) = match arrival {
                Arrival::Arrived => ("reached it".to_owned(), Outcome::Passed),
                Arrival::Denied(hook) => (format!("denied at {}", hook.name()), Outcome::Failed),
                Arrival::Lost if self.has_lost_hash() => (HASH_LOST.to_owned(), Outcome::Failed),
                Arrival::Lost if fails_if_lost => (LOST.to_owned(), Outcome::Failed),
                Arrival::Lost => (LOST.to_owned(), Outcome::Skipped),
            };
            checks.push(self.exempt_check(endpoint, observed, outcome));
        }
        Ok(checks)
    }

    /// Reports whether `from_pod` set the hash and no `node_egress` hook saw it.
    fn has_lost_hash(&self) -> bool {
        let has_passed = self.probe.count(Hook::FromPod, Verdict::Exempt) > 0;
        let seen = self.bridge.map(|bridge| bridge.total(Hook::NodeEgress));
        has_passed && seen == Some(0)
    }

    fn reset(&self, treatment: Treatment) -> Result<(), VerifyError> {
        if let Some(bridge) = self.bridge {
            bridge.reset(Treatment::ExemptBridge)?;
        }
        self.probe.reset(treatment)
    }

    fn denied_at(&self) -> Option<Hook> {
        self.probe.denied_at().or_else(|| self.bridge?.denied_at())
    }

    /// Sends a segment to each of these services until all have arrived, one is denied, or the timeout expires.
    async fn send(&self, last_hook: &mut LastHook, targets: &[(IpAddr, Service)]) -> Vec<Arrival> {
        let frames: Vec<_> = targets
            .iter()
            .map(|&(address, service)| {
                let id = last_hook.new_id();
                (id, self.frames.frame(address, service, id))
            })
            .collect();
        let start = Instant::now();
        let (mut sent_at, mut denied_at) = (None, None);
        while start.elapsed() < ARRIVAL_TIMEOUT {
            let missing: Vec<_> = frames.iter().filter(|(id, _)| !last_hook.has_received(*id)).collect();
            if missing.is_empty() {
                break;
            }
            if self.denied_at().is_some() {
                let since: &mut Instant = denied_at.get_or_insert_with(Instant::now);
                if since.elapsed() >= DENIED_DELAY {
                    break;
                }
            }
            if sent_at.is_none_or(|at: Instant| at.elapsed() >= RESEND_INTERVAL) {
                sent_at = Some(Instant::now());
                for (_, frame) in missing {
                    if let Err(error) = self.pod.send(frame) {
                        log::debug!("failed to send a frame: {error}");
                    }
                }
            }
            sleep(POLL_INTERVAL).await;
        }
        let denied_at = self.denied_at();
        let arrival = |id| match denied_at {
            _ if last_hook.has_received(id) => Arrival::Arrived,
            Some(hook) => Arrival::Denied(hook),
            None => Arrival::Lost,
        };
        frames.iter().map(|&(id, _)| arrival(id)).collect()
    }

    fn exempt_check(
        &self,
        endpoint: &Endpoint,
        observed: impl Into<String>,
        outcome: Outcome,
    ) -> VerifyCheck {
        let check = VerifyCheck::new(PATH, "reaches the last hook", observed, outcome);
        check.with_sender(format!("exempt pod{}", self.device_suffix)).with_endpoint(endpoint)
    }
}

const LOST: &str = "lost, but not denied: another program or firewall rule of this node drops it";
const HASH_LOST: &str = "another program of this node changes the hash by which node_egress recognizes exempt pods, or drops the packet";

fn target(endpoint: &Endpoint) -> (IpAddr, Service) {
    (endpoint.address, closed(&endpoint.allow_ports, TCP))
}

/// Describes the sysctl that keeps the node from forwarding packets from this interface; `None` if it forwards them.
fn not_forwarding(is_ipv4: bool, interface: &str) -> Option<String> {
    let key = if is_ipv4 {
        format!("net/ipv4/conf/{interface}/forwarding")
    } else {
        "net/ipv6/conf/all/forwarding".to_owned()
    };
    let value = std::fs::read_to_string(format!("/proc/sys/{key}")).ok()?;
    (value.trim() == "0").then(|| format!("{} is 0", key.replace('/', ".")))
}

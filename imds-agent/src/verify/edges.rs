//! The edges: what their counters say of a packet that was sent.

use std::{
    io,
    time::{Duration, Instant},
};

use imds_ebpf_common::{
    AttachMode, CounterKey, Hook, InterfaceRecord, Role, Service, TcHook, TcHookSet, Verdict, endpoint::TCP,
};
use tokio::time::sleep;

use super::{
    report::{Check, Outcome, phrase},
    stage::{Device, Interface},
    wire::frame,
};
use crate::{
    datapath::{object::Maps, records},
    endpoints::{Endpoint, Keep, unpadded},
};

/// How long an agent may take to guard an interface that is new.
const FOLLOWING: Duration = Duration::from_secs(10);
/// How long a packet may take to be counted.
const COUNTING: Duration = Duration::from_secs(1);
/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(10);
/// After how many looks a packet is sent again: what is sent as an interface comes up can be lost.
const PATIENCE: u32 = 5;

/// Why nothing can be said of an edge, and what that comes to.
pub(super) type Obstacle = (String, Outcome);

/// Proves an edge at a new interface, endpoint by endpoint.
pub(super) async fn prove(
    edge: TcHook,
    device: Result<&dyn Device, Obstacle>,
    endpoints: &[Endpoint],
    maps: &Maps,
    is_followed: bool,
) -> Vec<Check> {
    let hook = edge.hook();
    let device = match device {
        Ok(device) => covered(edge, device, maps, is_followed).await.map(|()| device),
        Err(obstacle) => Err(obstacle),
    };
    let mut checks = Vec::new();
    for endpoint in endpoints {
        for (service, expected, kept) in targets(endpoint) {
            let (found, result) = match &device {
                Ok(device) => match judged(*device, hook, maps, &frame(endpoint.address, service)).await {
                    Ok(verdict) => (phrase(verdict).to_owned(), Outcome::of(verdict == Some(expected))),
                    Err(error) => (format!("can't send: {error}"), Outcome::Unproven),
                },
                Err((reason, outcome)) => (reason.clone(), *outcome),
            };
            let check = Check::of_hook(hook.name(), expectation(expected), found, result);
            checks.push(check.at(endpoint).with_service(kept));
        }
    }
    checks
}

/// What is tried at an endpoint: one service that is not kept, and all that are.
pub(super) fn targets(endpoint: &Endpoint) -> impl Iterator<Item = (Service, Verdict, Option<Keep>)> {
    let keep = &endpoint.keep;
    let kept = keep.iter().map(|&kept| (kept.0, Verdict::Kept, Some(kept)));
    [(closed(keep, TCP), Verdict::Deny, None)].into_iter().chain(kept)
}

/// A service of this protocol that is not kept.
pub(super) fn closed(keep: &[Keep], protocol: u8) -> Service {
    let services = (80..=u16::MAX).map(|port| Service::new(protocol, port));
    services
        .into_iter()
        .find(|service| keep.iter().all(|kept| kept.0 != *service))
        .unwrap_or(Service::new(protocol, 80))
}

pub(super) const fn expectation(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Deny => "denied",
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => "let through",
    }
}

/// Waits until the guard has taken the interface in.
async fn covered(edge: TcHook, device: &dyn Device, maps: &Maps, is_followed: bool) -> Result<(), Obstacle> {
    let Interface { name, ifindex } = device.interface();
    if !is_followed {
        let result = match edge {
            TcHook::FromPod => Outcome::Failed,
            TcHook::NodeEgress => Outcome::Unproven,
        };
        return Err(("no agent runs that would guard a new link: start `imds-agent run`".to_owned(), result));
    }
    let start = Instant::now();
    while start.elapsed() < FOLLOWING {
        let record = records::get(maps, *ifindex).filter(|record| unpadded(&record.name) == *name);
        let attached = |record: InterfaceRecord| {
            let mode = record.attach_modes.get(edge as usize).copied().unwrap_or_default();
            Some((Role::from_u8(record.role)?, TcHookSet::from_bits(record.hooks), mode))
        };
        match record.and_then(attached) {
            Some((role, hooks, _)) if !hooks.has(edge) => {
                // An include or exclude of the configuration.
                let reason = format!("the configuration makes {name} an interface of role {}", role.name());
                return Err((reason, Outcome::Unproven));
            }
            Some((_, _, backend)) if backend != AttachMode::None as u8 => return Ok(()),
            Some(_) | None => sleep(INTERVAL).await,
        }
    }
    let seconds = FOLLOWING.as_secs();
    Err((format!("{name} is not guarded after {seconds} s: the agent's log says why"), Outcome::Failed))
}

/// The verdict on a frame, by the counter that goes up; `None` where none does.
async fn judged(device: &dyn Device, hook: Hook, maps: &Maps, frame: &[u8]) -> io::Result<Option<Verdict>> {
    let count = || counts(maps, device.interface().ifindex, hook);
    let before = count();
    let (start, mut looks) = (Instant::now(), 0_u32);
    let mut sent = Ok(());
    while start.elapsed() < COUNTING {
        if looks.is_multiple_of(PATIENCE) {
            sent = device.send(frame);
        }
        if let Some(verdict) = risen(before, count()) {
            return Ok(Some(verdict));
        }
        looks += 1;
        sleep(INTERVAL).await;
    }
    sent.map(|()| None)
}

/// A sum for each verdict that is counted.
pub(super) type Sums = [u64; Verdict::COUNTED.len()];

/// What was counted so far, by verdict.
pub(super) fn counts(maps: &Maps, ifindex: u32, hook: Hook) -> Sums {
    Verdict::COUNTED.map(|verdict| {
        let values = maps.counters.get(&CounterKey::new(ifindex, hook, verdict), 0);
        // Before the first there is none.
        values.map_or(0, |values| values.iter().map(|counter| counter.packets).sum())
    })
}

/// The first verdict of which there are more.
pub(super) fn risen(before: Sums, after: Sums) -> Option<Verdict> {
    let pairs = before.into_iter().zip(after).zip(Verdict::COUNTED);
    pairs.filter(|((before, after), _)| after > before).map(|(_, verdict)| verdict).next()
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::endpoint::UDP;

    use super::*;

    #[test]
    fn what_is_not_kept() {
        let keep = [Keep(Service::new(TCP, 80)), Keep(Service::new(UDP, 81))];
        assert_eq!(closed(&[], TCP), Service::new(TCP, 80));
        assert_eq!(closed(&keep, TCP), Service::new(TCP, 81));
        assert_eq!(closed(&keep, UDP), Service::new(UDP, 80));
    }

    #[test]
    fn the_verdict_that_was_counted() {
        assert_eq!(risen([1, 0, 5, 0, 0], [1, 0, 5, 0, 0]), None);
        assert_eq!(risen([1, 0, 5, 0, 0], [2, 0, 5, 0, 0]), Some(Verdict::Deny));
        assert_eq!(risen([1, 0, 5, 0, 0], [1, 0, 5, 1, 0]), Some(Verdict::Kept));
    }
}

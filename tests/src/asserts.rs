//! Assertions about a node with an agent.

use std::{net::Ipv4Addr, thread};

use crate::{
    AttachMode, METADATA, Netns, Pod, SERVICE, Status, TestEnv,
    poll::{poll_until, try_poll},
    probe::{LONG, Outcome, SHORT, http_get, icmp_echo, reachable, udp_echo},
    scale::{scaled, scaled_timeout},
    skip::lacks_tcx,
};

/// Runs a test once for each attach mode of the kernel. With a reduced [`SCALE`](crate::SCALE), runs only the agent's
/// preferred mode.
pub fn with_each_backend(test: impl Fn(AttachMode)) {
    let backends: &[_] = if lacks_tcx("the part with TCX") {
        &[AttachMode::Clsact]
    } else {
        &[AttachMode::Tcx, AttachMode::Clsact]
    };
    let count = scaled(2) as usize;
    for &backend in backends.iter().take(count) {
        // Printed if the test fails.
        eprintln!("backend: {}", backend.name());
        test(backend);
    }
}

impl TestEnv {
    /// Asserts that TCP, UDP and ICMP requests from `pod` to the metadata service get no response, and that no packet
    /// arrives there.
    #[track_caller]
    pub fn assert_blocked(&self, pod: &Pod) {
        self.assert_nothing_arrives(|| {
            for (protocol, outcome) in probe_all(&pod.netns, METADATA) {
                assert!(!outcome.is_answer(), "{protocol} from {} got an answer", pod.host_ifname);
            }
        });
    }

    /// Reports whether a process in the environment's cgroup and in this namespace reaches the metadata service.
    #[must_use]
    pub fn reaches(&self, netns: &Netns) -> bool {
        self.in_cgroup(|| http_get(netns, METADATA, SHORT).is_answer())
    }

    /// Waits until the pod reaches the metadata service.
    #[track_caller]
    pub fn wait_exempt(&self, pod: &Pod) {
        poll_until(LONG, "the pod to be exempt", || self.reaches(&pod.netns).then_some(()));
    }

    /// Waits until requests of the pod are denied, and asserts that no packet arrives.
    #[track_caller]
    pub fn wait_denied(&self, pod: &Pod) {
        // A request without a response in time is denied only if it does not arrive.
        poll_until(LONG, "the pod to be denied", || {
            let mut is_answered = true;
            let arrives = self.arrives(|| is_answered = self.reaches(&pod.netns));
            (!is_answered && !arrives).then_some(())
        });
        self.assert_denied(&pod.netns);
    }

    /// Asserts that a request from this namespace gets no response, and that no packet arrives.
    #[track_caller]
    pub fn assert_denied(&self, netns: &Netns) {
        self.assert_nothing_arrives(|| assert!(!self.reaches(netns), "{} is not denied", netns.name()));
    }

    /// Asserts that the metadata service responds to `pod`.
    #[track_caller]
    pub fn assert_open(&self, pod: &Pod) {
        assert_reaches(&pod.netns, METADATA, &pod.host_ifname);
    }

    /// Asserts that unprotected traffic works: all traffic of the node, and traffic of `pod` to other addresses.
    #[track_caller]
    pub fn assert_harmless(&self, pod: &Pod) {
        assert_reaches(&self.node, METADATA, "the node");
        assert_reaches(&self.node, SERVICE, "the node");
        assert_reaches(&pod.netns, SERVICE, &pod.host_ifname);
        assert!(
            icmp_echo(&pod.netns, self.node_address(), LONG).is_answer(),
            "{} to the node",
            pod.host_ifname
        );
        assert!(icmp_echo(&self.node, pod.address, LONG).is_answer(), "the node to {}", pod.host_ifname);
    }

    /// Asserts that no packet arrives at the metadata service during `work`.
    #[track_caller]
    pub fn assert_nothing_arrives<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = self.received_packets();
        let result = work();
        assert_eq!(before, self.received_packets(), "packets arrived at the metadata service");
        result
    }

    /// Polls the status until `is_expected` accepts it.
    #[track_caller]
    pub fn status_when(&self, what: &str, is_expected: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        let found = try_poll(scaled_timeout(LONG), || {
            let status = self.status();
            let is_accepted = is_expected(&status);
            last = Some(status.clone());
            is_accepted.then_some(status)
        });
        found.unwrap_or_else(|| panic!("timed out waiting until {what}: {last:#?}"))
    }

    /// Waits until a running agent enforces `pod`.
    #[track_caller]
    pub fn wait_enforced(&self, pod: &Pod) -> Status {
        self.status_when("the pod is enforced", |status| {
            status.find(&pod.host_ifname).is_some_and(crate::status::Interface::is_attached)
        })
    }

    /// Waits until a running agent enforces `pod` and one that starts then, and asserts that neither reaches the endpoint.
    /// Returns the later pod.
    #[track_caller]
    #[must_use]
    pub fn assert_enforced_with_later_pod(&self, pod: &Pod) -> Pod {
        self.wait_enforced(pod);
        self.assert_blocked(pod);
        let later = self.add_pod(crate::PodLink::Routed);
        self.wait_enforced(&later);
        self.assert_blocked(&later);
        later
    }
}

#[track_caller]
fn assert_reaches(netns: &Netns, address: Ipv4Addr, who: &str) {
    assert!(reachable(netns, address), "{who} does not reach {address} by HTTP");
    poll_until(LONG, &format!("a UDP echo to {who} from {address}"), || {
        udp_echo(netns, address, SHORT).is_answer().then_some(())
    });
    assert!(icmp_echo(netns, address, LONG).is_answer(), "{who} does not reach {address} by ICMP");
}

/// Tries all protocols concurrently, because failing probes run into their timeout.
fn probe_all(netns: &Netns, address: Ipv4Addr) -> [(&'static str, Outcome); 3] {
    thread::scope(|scope| {
        let probes = [
            ("TCP", scope.spawn(|| http_get(netns, address, SHORT))),
            ("UDP", scope.spawn(|| udp_echo(netns, address, SHORT))),
            ("ICMP", scope.spawn(|| icmp_echo(netns, address, SHORT))),
        ];
        probes.map(|(protocol, thread)| (protocol, thread.join().expect("probes do not panic")))
    })
}

//! Pods and processes of a node, and their access to the metadata service with and without the agent.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
};

use imds_tests::{
    AttachMode, Layout, METADATA, Netns, Pod, PodLink, Source, TestEnv, hook, known_here,
    poll::{poll_until, try_poll},
    probe::{LONG, Outcome, SHORT, http_get, reachable, udp_echo},
    scaled, with_each_backend,
};

/// Hooks that see calls and packets of a pod.
pub(crate) const ALL: &[&str] = &["from_pod", "node_egress", "socket"];
/// TC hooks, which see packets.
pub(crate) const TC: &[&str] = &["from_pod", "node_egress"];
/// Hook of the node's own interfaces.
pub(crate) const NODE_EGRESS: &[&str] = &["node_egress"];

/// Key of `[[exempt]]` that selects a pod.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Key {
    Interface,
    Netns,
}

impl Key {
    /// Returns the rule that exempts `pod`.
    pub(crate) fn rule(self, pod: &Pod) -> String {
        let subject = match self {
            Self::Interface => format!("interface = '{}'", pod.host_ifname),
            Self::Netns => format!("netns = '{}'", pod.netns.path().display()),
        };
        format!("[[exempt]]\nname = '{}'\n{subject}\n", pod.host_ifname)
    }
}

/// Hooks, attach mode and exemption key of each run of an agent. Emulated machines omit the last two.
const RUNS: [(&[&str], Option<AttachMode>, Key); 5] = [
    (ALL, None, Key::Interface),
    (TC, None, Key::Netns),
    (NODE_EGRESS, None, Key::Interface),
    (TC, Some(AttachMode::Clsact), Key::Interface),
    (NODE_EGRESS, None, Key::Netns),
];

/// A layout with two pods on each kind of link, of which the first is exempt.
pub(crate) struct Case {
    pub(crate) env: TestEnv,
    pub(crate) source: Source,
    pub(crate) config: &'static str,
    target: IpAddr,
    pods: Vec<[Pod; 2]>,
    /// Selects pods that `node_egress` alone can distinguish from others on the same bridge.
    is_known_at_egress: fn(&Pod) -> bool,
}

impl Case {
    /// Creates a routed and a bridged pair of pods on a node with this layout.
    pub(crate) fn new(layout: Layout) -> Self {
        let env = TestEnv::with_layout(layout);
        let pods = [PodLink::Routed, PodLink::Bridged].map(|link| [env.add_pod(link), env.add_pod(link)]);
        Self {
            env,
            source: Source::default(),
            config: "",
            target: METADATA.into(),
            pods: pods.into(),
            is_known_at_egress: |pod| pod.link == PodLink::Routed,
        }
    }

    /// Adds IPv6 addresses to all pods, and uses `target` as the endpoint.
    pub(crate) fn with_ipv6_target(self, target: impl Into<IpAddr>) -> Self {
        for pod in self.pods.iter().flatten() {
            self.env.add_pod_ipv6(pod);
        }
        Self { target: target.into(), config: "provider = 'aws'\n", ..self }
    }

    /// Modifies each pod after it was connected.
    pub(crate) fn place(mut self, mut place: impl FnMut(&TestEnv, &mut Pod)) -> Self {
        for pod in self.pods.iter_mut().flatten() {
            place(&self.env, pod);
        }
        self
    }

    /// Marks pods on one bridge with the NIC, whose own interfaces `node_egress` sees.
    pub(crate) fn known_at_egress(self) -> Self {
        Self { is_known_at_egress: |_| true, ..self }
    }

    /// Marks pods in a VRF, which `node_egress` sees as the ingress interface of all of them, as with a bridge.
    pub(crate) fn unknown_at_egress(self) -> Self {
        Self { is_known_at_egress: |_| false, ..self }
    }

    /// Asserts that every sender reaches the endpoint before the agent starts and after each unload. In between, only
    /// the node and exempt pods reach it, and no packet of another pod arrives.
    #[track_caller]
    pub(crate) fn assert_enforced(self) {
        let mut broken = self.unreachable("without the agent", &self.all_pods());
        assert!(broken.is_empty(), "{broken:#?}");
        let count = if scaled(2) < 2 { 3 } else { RUNS.len() };
        for (hooks, mode, key) in RUNS.into_iter().take(count) {
            if mode.is_none() || hook::has_tcx() {
                broken.extend(self.broken_with(hooks, mode, key));
            }
        }
        assert!(broken.is_empty(), "{broken:#?}");
    }

    fn broken_with(&self, hooks: &[&'static str], mode: Option<AttachMode>, key: Key) -> Vec<String> {
        let is_exempt = |pod: &Pod| hooks != NODE_EGRESS || (self.is_known_at_egress)(pod);
        let exempt: Vec<_> = self.pods.iter().map(|[first, _]| first).filter(|pod| is_exempt(pod)).collect();
        let denied: Vec<_> = self
            .all_pods()
            .into_iter()
            .filter(|pod| !exempt.iter().any(|other| other.address == pod.address))
            .collect();
        let rules: String = exempt.iter().map(|pod| key.rule(pod)).collect();
        let mut command =
            self.env.agent().hooks(&known_here(hooks)).config(&format!("{}{rules}", self.config)).resync(60);
        if let Some(mode) = mode {
            command = command.backend(mode);
        }
        let agent = command.spawn_ready();
        let case = format!("{hooks:?} {}by {key:?}", mode.map_or("", |_| "clsact "));
        let mut broken = self.unreachable(&case, &exempt);
        broken.extend(self.reachable(&case, &denied));
        drop(agent);
        self.env.unload();
        broken.extend(self.unreachable(&format!("after {case}"), &self.all_pods()));
        broken
    }

    fn all_pods(&self) -> Vec<&Pod> {
        self.pods.iter().flatten().collect()
    }

    /// Returns probes of the node and of `pods` that get no response.
    fn unreachable(&self, case: &str, pods: &[&Pod]) -> Vec<String> {
        let node = Sender { name: "node".to_owned(), netns: &self.env.node, source: Some(self.source) };
        let senders = pods.iter().map(|pod| Sender::from_pod(pod)).chain([node]);
        let fails = |probe: &Probe<'_>| {
            let mut last = None;
            let found = try_poll(LONG, || {
                let outcome = self.env.in_cgroup(|| probe.send(self.target));
                let is_answer = outcome.is_answer();
                last = Some(outcome);
                is_answer.then_some(())
            });
            found.is_none().then(|| format!("{case}: no response to {}: {last:?}", probe.name()))
        };
        at_once(senders, &fails)
    }

    /// Returns probes of `pods` that get a response, and pods whose packets arrive.
    fn reachable(&self, case: &str, pods: &[&Pod]) -> Vec<String> {
        let before = self.env.received_packets();
        let succeeds = |probe: &Probe<'_>| {
            let outcome = self.env.in_cgroup(|| probe.send(self.target));
            outcome.is_answer().then(|| format!("{case}: response to {}", probe.name()))
        };
        let mut broken = at_once(pods.iter().map(|pod| Sender::from_pod(pod)), &succeeds);
        let after = self.env.received_packets();
        for pod in pods {
            let address = match self.target {
                IpAddr::V4(_) => pod.address.into(),
                IpAddr::V6(_) => IpAddr::from(pod.address_v6()),
            };
            let count = after.from(address) - before.from(address);
            if count > 0 {
                broken.push(format!("{case}: {count} packets of {} arrived", name(pod)));
            }
        }
        broken
    }
}

struct Sender<'a> {
    name: String,
    netns: &'a Netns,
    source: Option<Source>,
}

impl<'a> Sender<'a> {
    fn from_pod(pod: &'a Pod) -> Self {
        Self { name: name(pod), netns: &pod.netns, source: None }
    }
}

fn name(pod: &Pod) -> String {
    format!("{:?} pod {}", pod.link, pod.address)
}

struct Probe<'a> {
    sender: &'a Sender<'a>,
    is_tcp: bool,
}

impl Probe<'_> {
    fn name(&self) -> String {
        format!("{} of {}", if self.is_tcp { "TCP" } else { "UDP" }, self.sender.name)
    }

    fn send(&self, target: IpAddr) -> Outcome {
        let netns = self.sender.netns;
        match (self.sender.source, target, self.is_tcp) {
            (Some(source), IpAddr::V4(target), true) => source.http_get(netns, target, SHORT),
            (Some(source), IpAddr::V4(target), false) => source.udp_echo(netns, target, SHORT),
            (_, target, true) => http_get(netns, target, SHORT),
            (_, target, false) => udp_echo(netns, target, SHORT),
        }
    }
}

/// Sends a TCP and a UDP probe of each sender concurrently, and returns the errors that `check` finds.
fn at_once<'a>(
    senders: impl Iterator<Item = Sender<'a>>,
    check: &(impl Fn(&Probe<'_>) -> Option<String> + Sync),
) -> Vec<String> {
    let senders: Vec<_> = senders.collect();
    thread::scope(|scope| {
        let probes = probes_of(&senders).map(|probe| scope.spawn(move || check(&probe)));
        let threads: Vec<_> = probes.collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("probes do not panic")).collect()
    })
}

fn probes_of<'a>(senders: &'a [Sender<'a>]) -> impl Iterator<Item = Probe<'a>> {
    senders.iter().flat_map(|sender| [true, false].map(|is_tcp| Probe { sender, is_tcp }))
}

/// Asserts that `node_egress` denies the packets of `source` in each attach mode, alone and with the other hooks:
/// `reaches` returns false and no packet arrives, while the node reaches `service`.
///
/// Without the agent and after each unload, `reaches` must return true.
#[track_caller]
pub(crate) fn assert_denied_at_egress(
    env: &TestEnv,
    source: Ipv4Addr,
    service: Ipv4Addr,
    reaches: impl Fn() -> bool + Sync,
) {
    let wait_open = |when: &str| {
        poll_until(LONG, &format!("{source} to reach {service} {when}"), || {
            env.in_cgroup(&reaches).then_some(())
        });
    };
    wait_open("without the agent");
    for hooks in [ALL, NODE_EGRESS] {
        with_each_backend(|mode| {
            let agent = env.agent().hooks(&known_here(hooks)).backend(mode).spawn_ready();
            assert!(reachable(&env.node, service), "node with {hooks:?}: {}", agent.log());
            let before = env.received_packets().from(source);
            assert!(!env.in_cgroup(&reaches), "{source} reached {service} with {hooks:?}");
            assert_eq!(env.received_packets().from(source), before, "{hooks:?}: {}", agent.log());
            drop(agent);
            env.unload();
            wait_open(&format!("after {hooks:?}"));
        });
    }
}

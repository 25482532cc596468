//! Nodes that differ in the answer that a pod gets from the metadata service.

use std::{path::Path, process::Command};

use imds_tests::{Pod, PodLink, TestEnv};

const ALL_HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
const PACKET_HOOKS: &[&str] = &["from_pod", "node_egress"];

/// Answer to a request of a pod, one column of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    title: &'static str,
    by: By,
}

/// Origin of an answer: the agent, a firewall or the service.
#[derive(Clone, Copy, Debug)]
enum By {
    /// The agent with these hooks and this configuration.
    Agent(&'static [&'static str], &'static str),
    /// The firewall rule of AKS, without an agent.
    Aks,
    /// The service itself.
    Service,
}

/// All columns of the table. The service itself is last.
pub(crate) const ANSWERS: [Answer; 8] = [
    Answer { title: "`EPERM`", by: By::Agent(ALL_HOOKS, "on_deny_errno = 'EPERM'") },
    Answer { title: "`ECONNREFUSED`", by: By::Agent(ALL_HOOKS, "on_deny_errno = 'ECONNREFUSED'") },
    Answer { title: "`EHOSTUNREACH`", by: By::Agent(ALL_HOOKS, "on_deny_errno = 'EHOSTUNREACH'") },
    Answer { title: "`ENETUNREACH`", by: By::Agent(ALL_HOOKS, "on_deny_errno = 'ENETUNREACH'") },
    Answer { title: "`reject`", by: By::Agent(PACKET_HOOKS, "on_deny = 'reject'") },
    Answer { title: "`drop`", by: By::Agent(PACKET_HOOKS, "on_deny = 'drop'") },
    Answer { title: "rule of AKS", by: By::Aks },
    Answer { title: "no agent", by: By::Service },
];

/// A node with one pod, which gets one kind of answer.
#[derive(Debug)]
pub(crate) struct Node {
    answer: Answer,
    pod: Pod,
    env: TestEnv,
}

impl Node {
    pub(crate) fn new(answer: Answer) -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        // Google's clients wait longer on a machine with a MAC address of this kind, which is Compute Engine's.
        pod.netns.ip("link set eth0 address 42:01:0a:f4:40:02");
        match answer.by {
            By::Agent(hooks, config) => {
                let config = format!("provider = 'generic'\n{config}");
                let started = env.agent().hooks(hooks).config(&config).once();
                assert!(started.status.success(), "{}: {started:?}", answer.title);
            }
            By::Aks => {
                let rule = format!(
                    "-t filter -I FORWARD 1 ! -s {} -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP",
                    env.node_address()
                );
                let output =
                    env.node.command("iptables").args(rule.split(' ')).output().expect("run iptables");
                assert!(output.status.success(), "iptables {rule}: {output:?}");
            }
            By::Service => {}
        }
        Self { answer, pod, env }
    }

    pub(crate) fn title(&self) -> &'static str {
        self.answer.title
    }

    /// Reports whether the service can be reached.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.answer.by, By::Service)
    }

    pub(crate) fn scratch_dir(&self) -> &Path {
        self.env.scratch_dir()
    }

    /// Returns a command that runs in the pod.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.pod.netns.command(program)
    }

    /// Runs `work` in the cgroup that has the socket hook, as a container would be.
    pub(crate) fn in_cgroup<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.env.in_cgroup(work)
    }

    /// Panics if the service received a packet of a denied pod, or none of another pod.
    pub(crate) fn assert_nothing_arrived(&self) {
        let packets = self.env.received_packets().from(self.pod.address);
        assert_eq!(packets > 0, self.is_open(), "{packets} packets arrived with {}", self.title());
    }
}

/// Returns name, version and variant of iptables.
pub(crate) fn iptables_version() -> String {
    let output = Command::new("iptables").arg("--version").output().expect("run iptables");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

//! A node with 250 pods of an API server, and the rules for them.

use std::{thread, time::Duration};

use imds_tests::{
    Agent, METADATA, Pod, PodLink, Status, TestCluster,
    api_server::pod,
    executable::broker_executable,
    kubelet::{Driver, PodCgroup, new_uid},
    poll::poll_until,
    probe::{SHORT, http_get},
    scaled,
};

use crate::{Bar, datapath, memory};

const PODS: u32 = 250;
/// Time limit for an agent to settle.
const TIMEOUT: Duration = Duration::from_mins(2);

/// Rules for the pods of the node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Rules {
    None,
    /// A scoped exemption of one pod.
    One,
    /// A scoped exemption of all pods.
    All,
    /// `on_deny = "explain"` for all pods.
    Explain,
}

/// The node and its pods.
pub(crate) struct Node {
    pub(crate) pods: Vec<(Pod, PodCgroup)>,
    pub(crate) cluster: TestCluster,
}

/// Prints the costs that depend on the number of pods, and returns their bars.
pub(crate) fn measure() -> Vec<Bar> {
    let cluster = TestCluster::new();
    let count = scaled(PODS);
    eprintln!("creating {count} pods");
    let add_pod = |number| {
        let link = cluster.env.add_pod(PodLink::Routed);
        let uid = new_uid();
        let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
        cgroup.start_in(&link.netns);
        let labels = [("number", if number == 0 { "first" } else { "other" })];
        cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "agent", &labels));
        (link, cgroup)
    };
    let pods = (0..count).map(add_pod).collect();
    let node = Node { pods, cluster };
    let bars = [datapath::measure(&node), memory::measure(&node)].concat();
    node.cluster.env.unload();
    bars
}

impl Rules {
    /// Returns the configuration with these rules, without hooks.
    pub(crate) fn config(self, node: &Node) -> String {
        let rule = "[[exempt]]\nname = 'region'\nnamespace = 'kube-system'\nallow = ['instance']\n";
        let rules = match self {
            Self::None => "provider = 'azure'\n".to_owned(),
            Self::One => {
                format!(
                    "provider = 'azure'\n{rule}pod_selector = {{ match_labels = {{ number = 'first' }} }}\n"
                )
            }
            Self::All => format!("provider = 'azure'\n{rule}"),
            Self::Explain => "provider = 'azure'\non_deny = 'explain'\n".to_owned(),
        };
        node.cluster.config(&rules)
    }

    /// Reports whether all listeners are open, and no others.
    pub(crate) fn are_applied(self, node: &Node, status: &Status) -> bool {
        let pods = node.pods.len();
        // The rules also cover the WireServer.
        let (redirected, explained) = match self {
            Self::None => (0, 0),
            Self::One => (2, 0),
            Self::All => (2 * pods, 0),
            Self::Explain => (0, pods),
        };
        let of_rules = status.exemptions.iter().filter(|sender| sender.verdict == "redirected");
        let of_denials = status.explained.as_ref().map_or(0, |explained| explained.pods);
        of_rules.count() == redirected && of_denials == explained && status.is_ready()
    }
}

impl Node {
    /// Starts an agent and waits until the rules apply to all pods.
    pub(crate) fn start(&self, rules: Rules) -> Agent<'_> {
        let broker = broker_executable();
        let command = self.cluster.env.agent().config(&rules.config(self));
        let command = command.hooks(&["from_pod", "node_egress", "socket"]);
        let agent = command.args(&["--broker", broker.to_str().expect("a UTF-8 path")]).spawn();
        poll_until(TIMEOUT, "the rules to apply to all pods", || {
            let status = self.cluster.env.status();
            (status.has_resolved(self.pods.len()) && rules.are_applied(self, &status)).then_some(())
        });
        agent
    }

    /// Sends one request from each pod.
    pub(crate) fn send_requests(&self) {
        let send = |(pod, _): &(Pod, PodCgroup)| {
            self.cluster.env.in_cgroup(|| http_get(&pod.netns, METADATA, SHORT));
        };
        thread::scope(|scope| scope.spawn(|| self.pods.iter().for_each(send)).join().expect("no panic"));
    }
}

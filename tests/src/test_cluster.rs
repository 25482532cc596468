//! A node of a cluster, with its API server and kubelet.

use crate::{
    METADATA, Netns, Pod, TestEnv,
    api_server::ApiServer,
    http::{DEFAULT, try_get},
    kubelet::Kubelet,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
};

/// An environment with an API server on the node's loopback, and the cgroups of a kubelet.
#[derive(Debug)]
pub struct TestCluster {
    /// Dropped first, because its thread is woken through the node's namespace.
    pub server: ApiServer,
    /// Cgroups of the node's pods.
    pub kubelet: Kubelet,
    /// The node and its network.
    pub env: TestEnv,
}

impl TestCluster {
    /// Name of the node.
    pub const NODE: &str = "node-0";

    /// Creates a cluster without pods.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "creating an environment is work that its name should show"
    )]
    pub fn new() -> Self {
        let env = TestEnv::new();
        Self { server: ApiServer::start_in(&env.node), kubelet: Kubelet::new(), env }
    }

    /// Returns a configuration with these exemption rules that watches the pods of the node.
    #[must_use]
    pub fn config(&self, rules: &str) -> String {
        let kubeconfig = self.env.scratch_dir().join("kubeconfig");
        self.server.write_kubeconfig(&kubeconfig);
        format!(
            "{rules}\n[kubernetes]\nkubeconfig = '{}'\nnode_name = '{}'\n",
            kubeconfig.display(),
            Self::NODE
        )
    }

    /// Reports whether a process in the environment's cgroup and in this namespace reaches the metadata service.
    #[must_use]
    pub fn reaches(&self, netns: &Netns) -> bool {
        self.env.in_cgroup(|| http_get(netns, METADATA, SHORT).is_answer())
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
            let arrives = self.env.arrives(|| is_answered = self.reaches(&pod.netns));
            (!is_answered && !arrives).then_some(())
        });
        self.assert_denied(&pod.netns);
    }

    /// Asserts that a request from this namespace gets no response, and that no packet arrives.
    #[track_caller]
    pub fn assert_denied(&self, netns: &Netns) {
        self.env.assert_nothing_arrives(|| assert!(!self.reaches(netns), "{} is not denied", netns.name()));
    }

    /// Returns the value of a series in the agent's metrics.
    #[must_use]
    pub fn metric(&self, series: &str) -> u64 {
        let (_, metrics) = poll_until(LONG, "metrics", || try_get(&self.env, DEFAULT, "/metrics").ok());
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {series} in:\n{metrics}"))
    }
}

//! A node of a cluster, with its API server and kubelet.

use crate::{Netns, Pod, TestEnv, api_server::ApiServer, kubelet::Kubelet};

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
        self.env.reaches(netns)
    }

    /// Waits until the pod reaches the metadata service.
    #[track_caller]
    pub fn wait_exempt(&self, pod: &Pod) {
        self.env.wait_exempt(pod);
    }

    /// Waits until requests of the pod are denied, and asserts that no packet arrives.
    #[track_caller]
    pub fn wait_denied(&self, pod: &Pod) {
        self.env.wait_denied(pod);
    }

    /// Asserts that a request from this namespace gets no response, and that no packet arrives.
    #[track_caller]
    pub fn assert_denied(&self, netns: &Netns) {
        self.env.assert_denied(netns);
    }

    /// Returns the value of a series in the agent's metrics.
    #[must_use]
    pub fn metric(&self, series: &str) -> u64 {
        self.env.metric(series)
    }
}

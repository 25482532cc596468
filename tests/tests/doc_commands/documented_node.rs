//! The node of the examples in the documents: pods of a Kubernetes cluster, of which one is exempt.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use imds_tests::{
    AgentCommand, AttachMode, METADATA, Pod, PodLink, TestEnv,
    api_server::{self, ApiServer},
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    output, packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, send_ipv4},
};

/// Pin directory in the documents.
pub(crate) const PIN_DIR: &str = "/sys/fs/bpf/imds";
/// Configuration file in the documents.
pub(crate) const CONFIG_FILE: &str = "/etc/imds-agent/imds.toml";
const NODE: &str = "node-0";
const CONFIG: &str = "provider = 'azure'
[[exempt]]
name = 'agents'
namespace = 'kube-system'
service_account = 'agent'
";

/// A node with the pods `shop/web-0`, which is denied, and `kube-system/agent-0`, which is exempt.
pub(crate) struct DocumentedNode {
    pub(crate) denied: KubePod,
    pub(crate) exempt: KubePod,
    kubelet: Kubelet,
    server: ApiServer,
    pub(crate) config: PathBuf,
    pub(crate) env: TestEnv,
}

/// A pod with a running process.
pub(crate) struct KubePod {
    pub(crate) pod: Pod,
    pub(crate) process: u32,
    _cgroup: PodCgroup,
}

impl DocumentedNode {
    pub(crate) fn new() -> Self {
        let env = TestEnv::new();
        let (server, kubelet) = (ApiServer::start_in(&env.node), Kubelet::new());
        let [denied, exempt] = [("shop", "web-0", "default"), ("kube-system", "agent-0", "agent")].map(
            |(namespace, name, account)| {
                add_pod(&env, &server, &kubelet, PodLink::Routed, namespace, name, account)
            },
        );
        let config = env.scratch_dir().join("imds.toml");
        let node = Self { denied, exempt, kubelet, server, config, env };
        node.configure("enforce");
        node
    }

    /// Writes the configuration with this mode.
    pub(crate) fn configure(&self, mode: &str) {
        let kubeconfig = self.env.scratch_dir().join("kubeconfig");
        self.server.write_kubeconfig(&kubeconfig);
        let kubernetes =
            format!("[kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'\n", kubeconfig.display());
        let new = self.config.with_extension("new");
        fs::write(&new, format!("mode = '{mode}'\n{CONFIG}{kubernetes}")).unwrap();
        fs::rename(new, &self.config).unwrap();
    }

    /// Adds a pod behind the bridge with the label `app`.
    pub(crate) fn add_pod(&self, namespace: &str, name: &str, account: &str) -> KubePod {
        add_pod(&self.env, &self.server, &self.kubelet, PodLink::Bridged, namespace, name, account)
    }

    /// Returns `imds-agent run` with TCX and the configuration of the node.
    pub(crate) fn agent(&self) -> AgentCommand<'_> {
        let (config, cgroup) = (self.config.to_str().unwrap(), self.env.cgroup().to_str().unwrap());
        self.env.agent().backend(AttachMode::Tcx).config_file(config).args(&["--cgroup", cgroup])
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.env.pin_dir().join("maps")
    }

    /// Sends packets from both pods, and lets the denied pod connect.
    pub(crate) fn send_requests(&self) {
        let maps = self.maps();
        poll_until(LONG, "the exemption", || {
            has("imds_exempt", &["interface", "netns"], &maps).then_some(())
        });
        for KubePod { pod, .. } in [&self.exempt, &self.denied] {
            let packet = packets::udp(pod.address, METADATA, b"x");
            send_ipv4(&pod.netns, METADATA, &[packet]).unwrap();
        }
        let connect = || http_get(&self.denied.pod.netns, METADATA, SHORT);
        assert!(!self.env.in_cgroup(connect).is_answer());
        poll_until(LONG, "the events to be recorded", || {
            let words = ["from_pod", "node_egress", "socket", "denied", "exempt"];
            let recorded = has("imds_recent", &words, &maps)
                && has("imds_denials", &["from_pod", "socket"], &maps)
                && has("imds_pods", &["web-0", "agent-0"], &maps);
            recorded.then_some(())
        });
    }
}

fn add_pod(
    env: &TestEnv,
    server: &ApiServer,
    kubelet: &Kubelet,
    link: PodLink,
    namespace: &str,
    name: &str,
    account: &str,
) -> KubePod {
    let uid = new_uid();
    let pod = env.add_pod(link);
    let mut cgroup = kubelet.add_pod(&uid, Driver::Cgroupfs);
    let process = cgroup.start_in(&pod.netns);
    let labels: &[_] = if account == "web" { &[("app", "web")] } else { &[] };
    let mut object = api_server::pod(&uid, NODE, namespace, account, labels);
    object["metadata"]["name"] = name.into();
    server.apply(object);
    KubePod { pod, process, _cgroup: cgroup }
}

/// Runs a command line with bash in `directory`.
pub(crate) fn bash(mut bash: Command, command: &str, directory: &Path) -> Output {
    bash.args(["-o", "pipefail", "-c", command]).current_dir(directory);
    output(bash)
}

/// Reports whether the values of a map contain all of these words.
fn has(map: &str, words: &[&str], maps: &Path) -> bool {
    let command = format!("bpftool -j map dump pinned {map} | jq -c '.[].formatted'");
    let printed = bash(Command::new("bash"), &command, maps);
    assert!(printed.status.success(), "{command}: {printed:?}");
    let printed = String::from_utf8_lossy(&printed.stdout);
    words.iter().all(|word| printed.contains(&format!("\"{word}\"")))
}

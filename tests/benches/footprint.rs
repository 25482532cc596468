//! Resources of the agent on a node with 1,000 pods from an API server: memory and CPU time at rest, and memory after denials of 100 of
//! them. The agent writes Kubernetes Events and the node's condition.

use std::time::Duration;

use imds_tests::{
    METADATA, PodLink, TestEnv,
    api_server::{ApiServer, pod},
    kubelet::{Driver, Kubelet, new_uid},
    measure::{Process, machine, table},
    poll::poll_until,
    probe::{SHORT, http_get},
};

const PODS: usize = 1000;
const NODE: &str = "node-0";
/// Time limit until all pods are enforced.
const TIMEOUT: Duration = Duration::from_mins(2);
/// Duration of the idle period.
const IDLE: Duration = Duration::from_mins(1);

fn main() {
    let env = TestEnv::new();
    let server = ApiServer::start_in(&env.node);
    let kubelet = Kubelet::new();
    let kubeconfig = env.scratch_dir().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig);
    eprintln!("creating {PODS} pods");
    let pods: Vec<_> = (0..PODS)
        .map(|number| {
            let link = env.add_pod(PodLink::Routed);
            let uid = new_uid();
            let mut cgroup = kubelet.add_pod(&uid, Driver::Systemd);
            cgroup.start_in(&link.netns);
            let labels = [("app", "agent"), ("tier", "x"), ("pod-template-hash", "7d4b9c66d8")];
            server.apply(pod(&uid, NODE, "kube-system", "agent", &labels[usize::from(number % 5 != 0)..]));
            (link, cgroup)
        })
        .collect();
    let config = format!(
        "[[exempt]]\nname = 'agents'\nnamespace = 'kube-system'\npod_selector = {{ match_labels = {{ app = 'agent' }} }}\n\
         [kubernetes]\nevents = true\nnode_condition = true\nkubeconfig = '{}'\nnode_name = '{NODE}'",
        kubeconfig.display()
    );
    let agent = env.agent().config(&config).hooks(&["from_pod", "node_egress", "socket"]).spawn();
    // The agent attaches to one link after another.
    poll_until(TIMEOUT, "the sandbox of every pod to be found and its link to be enforced", || {
        let status = env.status();
        (status.is_ready() && status.has_resolved(PODS) && status.all_pods_have_tcx()).then_some(())
    });
    let process = Process::new(agent.pid());
    eprintln!("measuring the idle agent for {IDLE:?}");
    let used = process.cpu_at_rest(IDLE);
    println!("{PODS} pods, {} exempt senders, {}\n", env.status().exemptions.len(), machine());
    let [resident, most, own] = ["VmRSS", "VmHWM", "RssAnon"].map(|kind| process.memory(kind));
    eprintln!("sending a request from every tenth pod");
    for (link, _) in pods.iter().step_by(10) {
        http_get(&link.netns, METADATA, SHORT);
    }
    let denied = process.memory("VmRSS");
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let rows = [
        row("resident memory", format!("{resident:.1} MiB")),
        row("peak memory", format!("{most:.1} MiB")),
        row("anonymous memory", format!("{own:.1} MiB")),
        row("CPU", format!("{used:.3} % of one")),
        row("resident memory after denials of 100 pods", format!("{denied:.1} MiB")),
    ];
    print!("{}", table(&["at rest", "takes"], &rows));
    drop(agent);
    env.unload();
    drop(pods);
}

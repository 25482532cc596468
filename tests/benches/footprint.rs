//! What the agent itself takes: memory, and CPU while nothing happens, on a node with 250 pods of which the API server tells.

use std::{env, time::Duration};

use imds_tests::{
    PodLink, World,
    api_server::{ApiServer, pod},
    kubelet::{Driver, Kubelet, new_uid},
    measure::{Process, machine},
};

const PODS: usize = 250;
const NODE: &str = "node-0";
/// How long nothing happens.
const IDLE: Duration = Duration::from_mins(1);

fn main() {
    let world = World::new();
    let server = ApiServer::start_in(&world.node);
    let kubelet = Kubelet::new();
    let kubeconfig = world.scratch_dir().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig);
    eprintln!("making {PODS} pods");
    let pods: Vec<_> = (0..PODS)
        .map(|number| {
            let link = world.add_pod(PodLink::Routed);
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
         [kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'",
        kubeconfig.display()
    );
    let agent = world.agent().config(&config).hooks(&["pod_edge", "node_edge", "socket"]).spawn_ready();
    world.status_when("every pod is located", |status| {
        status
            .kubernetes
            .as_ref()
            .is_some_and(|kubernetes| kubernetes.pods as usize == PODS && kubernetes.awaited == 0)
    });
    let process = Process::new(agent.pid());
    eprintln!("watching it for {IDLE:?}");
    let used = process.cpu_at_rest(IDLE);
    println!("{PODS} pods, {} exempt senders, {}", world.status().exemptions.len(), machine());
    let [resident, most, own] = ["VmRSS", "VmHWM", "RssAnon"].map(|kind| process.memory(kind));
    println!("resident memory    {resident:6.1} MiB (most so far {most:.1})");
    println!("of it, not a file's {own:5.1} MiB");
    println!("CPU while idle     {used:6.3} % of one over {} s", IDLE.as_secs());
    drop(agent);
    world.unload();
    drop(pods);
    if env::var_os("IMDS_AGENT").is_none() && cfg!(debug_assertions) {
        println!("of an agent that was not built for release");
    }
}

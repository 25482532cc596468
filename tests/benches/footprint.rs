//! What the agent itself takes: memory, and CPU while nothing happens, on a node with 250 pods of which the API server tells.

use std::{env, fs, process::Command, thread, time::Duration};

use imds_tests::{
    PodLink, World,
    api_server::{ApiServer, pod},
    kubelet::{Driver, Kubelet, new_uid},
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
    let pid = agent.pid();
    let before = cpu(pid);
    eprintln!("watching it for {IDLE:?}");
    thread::sleep(IDLE);
    let used = cpu(pid) - before;
    println!("{PODS} pods, {} exempt senders, kernel {}", world.status().exemptions.len(), kernel());
    println!("resident memory    {:6.1} MiB (most so far {:.1})", memory(pid, "VmRSS"), memory(pid, "VmHWM"));
    println!("of it, not a file's {:5.1} MiB", memory(pid, "RssAnon"));
    println!(
        "CPU while idle     {:6.3} % of one over {} s",
        100.0 * used / IDLE.as_secs_f64(),
        IDLE.as_secs()
    );
    drop(agent);
    world.unload();
    drop(pods);
    if env::var_os("IMDS_AGENT").is_none() && cfg!(debug_assertions) {
        println!("of an agent that was not built for release");
    }
}

/// Seconds of CPU time so far (proc(5): fields 14 and 15 of stat, in clock ticks).
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("read the agent's stat");
    let (_, behind_name) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks: f64 =
        behind_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn memory(pid: u32, key: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read the agent's status");
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib: f64 = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a number");
    kib / 1024.0
}

fn kernel() -> String {
    let output = Command::new("uname").arg("-r").output().expect("run uname");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

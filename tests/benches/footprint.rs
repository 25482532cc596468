//! Resources of the agent on a node with 1,000 pods from an API server: memory and CPU time at rest, and memory after denials of 100 of
//! them, for each of the kinds of objects that the agent writes to the cluster. Fails if the agent takes more memory than it may.

use std::{process::ExitCode, time::Duration};

use imds_tests::{
    METADATA, Pod, PodLink, TestEnv,
    api_server::{ApiServer, pod},
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
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
/// Upper bound of the resident memory in MiB.
const MAX_RESIDENT: f64 = 14.0;
/// Number of Events that the agent writes at once, because it may write so many in a minute.
const EVENTS: usize = 8;
/// Number of pods whose requests are denied.
const DENIED: usize = 100;

/// Objects that an agent writes to the cluster.
struct Writes {
    /// Name of the column.
    name: &'static str,
    /// Lines of `[kubernetes]`.
    keys: &'static str,
    /// Number of Events after the denials.
    events: usize,
}

const WRITES: [Writes; 3] = [
    Writes { name: "writes nothing", keys: "", events: 0 },
    Writes { name: "Events", keys: "events = true\n", events: EVENTS },
    Writes { name: "Events, condition", keys: "events = true\nnode_condition = true\n", events: EVENTS },
];

/// Resources of one agent: memory in MiB, and CPU time in percent of one CPU.
struct Usage {
    exempt: usize,
    cpu: f64,
    resident: f64,
    peak: f64,
    anonymous: f64,
    /// Resident memory after denials.
    denied: f64,
}

/// Node with pods, and its API server.
struct Node {
    // Removed in this order.
    pods: Vec<(Pod, PodCgroup)>,
    _kubelet: Kubelet,
    server: ApiServer,
    env: TestEnv,
}

fn main() -> ExitCode {
    let node = Node::new();
    let usages = WRITES.map(|writes| node.measure(&writes));
    println!("{PODS} pods, {} exempt senders, {}\n", usages[0].exempt, machine());
    let row = |what: &str, value: fn(&Usage) -> String| {
        [what.to_owned()].into_iter().chain(usages.iter().map(value)).collect::<Vec<_>>()
    };
    let rows = [
        row("resident memory", |usage| mib(usage.resident)),
        row(&format!("resident memory after denials of {DENIED} pods"), |usage| mib(usage.denied)),
        row("anonymous memory", |usage| mib(usage.anonymous)),
        row("peak memory", |usage| mib(usage.peak)),
        row("CPU", |usage| format!("{:.3} % of one", usage.cpu)),
    ];
    let head: Vec<_> = ["at rest"].into_iter().chain(WRITES.map(|writes| writes.name)).collect();
    print!("{}", table(&head, &rows));
    if usages.iter().all(|usage| usage.resident.max(usage.denied) <= MAX_RESIDENT) {
        return ExitCode::SUCCESS;
    }
    eprintln!("resident memory exceeds the limit of {}", mib(MAX_RESIDENT));
    ExitCode::FAILURE
}

impl Node {
    fn new() -> Self {
        let env = TestEnv::new();
        let server = ApiServer::start_in(&env.node);
        let kubelet = Kubelet::new();
        eprintln!("creating {PODS} pods");
        let pods = (0..PODS).map(|number| {
            let link = env.add_pod(PodLink::Routed);
            let uid = new_uid();
            let mut cgroup = kubelet.add_pod(&uid, Driver::Systemd);
            cgroup.start_in(&link.netns);
            let labels = [("app", "agent"), ("tier", "x"), ("pod-template-hash", "7d4b9c66d8")];
            server.apply(pod(&uid, NODE, "kube-system", "agent", &labels[usize::from(!is_exempt(number))..]));
            (link, cgroup)
        });
        let pods = pods.collect();
        Self { pods, _kubelet: kubelet, server, env }
    }

    fn measure(&self, Writes { name, keys, events }: &Writes) -> Usage {
        let Self { env, server, pods, .. } = self;
        let kubeconfig = env.scratch_dir().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig);
        let config = format!(
            "[[exempt]]\nname = 'agents'\nnamespace = 'kube-system'\npod_selector = {{ match_labels = {{ app = 'agent' }} }}\n\
             [kubernetes]\n{keys}kubeconfig = '{}'\nnode_name = '{NODE}'",
            kubeconfig.display()
        );
        let agent = env.agent().config(&config).hooks(&["from_pod", "node_egress", "socket"]).spawn();
        // The agent attaches to one link after another.
        poll_until(TIMEOUT, "the sandbox of every pod to be found and its link to be enforced", || {
            let status = env.status();
            (status.is_ready() && status.has_resolved(PODS) && status.all_pods_have_tcx()).then_some(())
        });
        let process = Process::new(agent.pid());
        eprintln!("measuring the idle agent for {IDLE:?}: {name}");
        let cpu = process.cpu_at_rest(IDLE);
        let [resident, peak, anonymous] = ["VmRSS", "VmHWM", "RssAnon"].map(|kind| process.memory(kind));
        let exempt = env.status().exemptions.len();
        eprintln!("sending a request from {DENIED} pods");
        let before = server.events().len();
        let denied_pods = pods.iter().enumerate().filter(|(number, _)| !is_exempt(*number));
        for (_, (link, _)) in denied_pods.step_by(PODS * 4 / 5 / DENIED) {
            http_get(&link.netns, METADATA, SHORT);
        }
        poll_until(TIMEOUT, "the Events", || (server.events().len() >= before + events).then_some(()));
        let denied = process.memory("VmRSS");
        drop(agent);
        env.unload();
        Usage { exempt, cpu, resident, peak, anonymous, denied }
    }
}

/// Reports whether the exemption applies to a pod: to every fifth.
fn is_exempt(number: usize) -> bool {
    number.is_multiple_of(5)
}

fn mib(size: f64) -> String {
    format!("{size:.1} MiB")
}

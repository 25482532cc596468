//! Scalability of the agent with the number of pods on a node: time to enforce them, to handle new ones and to restart,
//! and resources.
//!
//! Each pod has a namespace, a routed link, a cgroup with a process, and an object in the API server. A rule exempts
//! every fifth pod. Short-lived pods during a measurement are links into other namespaces.

#[path = "../churn/link_churn.rs"]
mod link_churn;
#[path = "../plot.rs"]
mod plot;

use std::{
    io,
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use imds_tests::{
    Agent, METADATA, Netns, Pod, PodLink, TestEnv,
    api_server::{ApiServer, pod},
    flood::Flood,
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    measure::{Process, Samples, machine, table},
    poll::poll_until,
};

use link_churn::{Churn, MadeLink};

const SIZES: [usize; 5] = [10, 30, 100, 300, 1000];
const NODE: &str = "node-0";
const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
/// Number of links that come and go while CPU time is measured, 50 a second.
const LINKS: u32 = 750;
const INTERVAL: Duration = Duration::from_millis(20);
/// Number of measurements of each start.
const STARTS: usize = 5;
/// Duration of the idle period in which CPU time is measured.
const REST: Duration = Duration::from_secs(20);
/// Time limit for an agent to report that everything is enforced.
const TIMEOUT: Duration = Duration::from_mins(1);

fn main() {
    let node = Node::new();
    let mut pods: Vec<(Pod, PodCgroup)> = Vec::new();
    let rows = SIZES.map(|size| {
        eprintln!("{size} pods");
        pods.extend((pods.len()..size).map(|number| node.add_pod(number)));
        let row = node.measure(&pods);
        eprintln!("{}", row.cells().join(", "));
        row
    });
    println!("{}; medians of {STARTS} starts, {LINKS} links come and go.\n", machine());
    let line =
        |of: fn(&Row) -> f64| rows.iter().map(|row| (f64::from(row.pods), of(row))).collect::<Vec<_>>();
    plot::lines(
        "benchmarks-scale",
        "Time from the start of the agent until the node-wide hooks enforce",
        ["pods on the node", "milliseconds (lower is better)"],
        &[("first start", line(|row| row.start)), ("restart", line(|row| row.restart))],
    );
    print!("{}", table(&HEAD, &rows.each_ref().map(Row::cells)));
}

const HEAD: [&str; 7] = [
    "pods",
    "node-wide hooks from start",
    "restarted",
    "restarted in a flood",
    "memory",
    "CPU at rest",
    "CPU at 50 pods/s",
];

/// Results for one number of pods: times in milliseconds, memory in MiB, CPU time in percent of one CPU.
#[derive(Debug)]
struct Row {
    pods: u32,
    start: f64,
    restart: f64,
    restart_in_flood: f64,
    memory: f64,
    cpu_at_rest: f64,
    cpu_of_churn: f64,
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let ms = |value: f64| format!("{value:.1} ms");
        vec![
            self.pods.to_string(),
            ms(self.start),
            ms(self.restart),
            ms(self.restart_in_flood),
            format!("{:.1} MiB", self.memory),
            format!("{:.2} %", self.cpu_at_rest),
            format!("{:.1} %", self.cpu_of_churn),
        ]
    }
}

/// A node with pods that an API server lists.
struct Node {
    env: TestEnv,
    server: ApiServer,
    kubelet: Kubelet,
    config: String,
    visitors: Vec<Netns>,
}

impl Node {
    fn new() -> Self {
        let env = TestEnv::new();
        let server = ApiServer::start_in(&env.node);
        let kubeconfig = env.scratch_dir().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig);
        let config = format!(
            "[[exempt]]\nname = 'agents'\nnamespace = 'kube-system'\npod_selector = {{ match_labels = {{ app = 'agent' }} }}\n\
             [kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'",
            kubeconfig.display()
        );
        let visitors = (0..link_churn::NAMESPACES).map(|_| Netns::new("visitor")).collect();
        Self { env, server, kubelet: Kubelet::new(), config, visitors }
    }

    fn add_pod(&self, number: usize) -> (Pod, PodCgroup) {
        let link = self.env.add_pod(PodLink::Routed);
        let uid = new_uid();
        let mut cgroup = self.kubelet.add_pod(&uid, Driver::Systemd);
        cgroup.start_in(&link.netns);
        let labels = [("app", "agent"), ("tier", "x"), ("pod-template-hash", "7d4b9c66d8")];
        self.server.apply(pod(
            &uid,
            NODE,
            "kube-system",
            "agent",
            &labels[usize::from(!number.is_multiple_of(5))..],
        ));
        (link, cgroup)
    }

    fn measure(&self, pods: &[(Pod, PodCgroup)]) -> Row {
        let start = Samples::new((0..STARTS).map(|_| {
            let (agent, took) = self.start();
            self.wait_all_enforced(&agent);
            drop(agent);
            self.env.unload();
            took
        }));
        let (agent, _) = self.start();
        self.wait_settled(pods.len());
        let process = Process::new(agent.pid());
        let cpu_at_rest = process.cpu_at_rest(REST);
        let memory = process.memory("VmRSS");
        drop(agent);
        let restart = Samples::new((0..STARTS).map(|_| self.start().1));
        let restart_in_flood = self.env.assert_nothing_arrives(|| {
            let _floods = [Flood::udp(&pods[1].0, METADATA), Flood::syn(&pods[2].0, METADATA)];
            Samples::new((0..STARTS).map(|_| self.start().1))
        });
        let (agent, _) = self.start();
        self.wait_all_enforced(&agent);
        let churn = Churn::new(&self.env.node, &self.visitors);
        let mut made = Vec::new();
        let cpu_of_churn = Process::new(agent.pid()).cpu_while(|| made = churn.run(LINKS, INTERVAL));
        if let Some(slowest) = made.iter().max_by(|one, other| one.took.total_cmp(&other.took)) {
            let MadeLink { name, announced, took } = slowest;
            eprintln!(
                "slowest link: {name}, {took:.1} ms, announced {:.0} s ago",
                announced.elapsed().as_secs_f64()
            );
        }
        drop(agent);
        self.env.unload();
        Row {
            pods: pods.len().try_into().expect("a few pods"),
            start: start.median(),
            restart: restart.median(),
            restart_in_flood: restart_in_flood.median(),
            memory,
            cpu_at_rest,
            cpu_of_churn,
        }
    }

    /// Starts an agent. Returns the milliseconds until it notifies the service manager that it is ready: the node-wide
    /// hooks then cover all pods.
    fn start(&self) -> (Agent<'_>, f64) {
        let path = self.env.scratch_dir().join("notify");
        let notified = listen(&path);
        let command = self.env.agent().config(&self.config).hooks(HOOKS);
        let start = Instant::now();
        let agent = command.env("NOTIFY_SOCKET", path.to_str().expect("a UTF-8 path")).spawn();
        wait_for_ready(&notified).unwrap_or_else(|error| panic!("{error}: {}", agent.log()));
        (agent, start.elapsed().as_secs_f64() * 1e3)
    }

    /// Waits until each pod also has its own program. Attachments run one after another.
    fn wait_all_enforced(&self, agent: &Agent<'_>) {
        poll_until(TIMEOUT * 4, "every pod to have its program", || {
            let status = self.env.status();
            (status.is_ready() && status.agent.pid == Some(agent.pid())).then_some(())
        });
    }

    /// Waits until the sandbox of every pod is found and every pod has its TCX link. Links are upgraded one after
    /// another, which takes long.
    fn wait_settled(&self, pods: usize) {
        poll_until(TIMEOUT * 4, "the sandbox and TCX link of every pod", || {
            let status = self.env.status();
            let of_pods = status.interfaces.iter().filter(|interface| interface.role == "pod");
            let is_settled = status.has_resolved(pods) && status.all_pods_have_tcx();
            (is_settled && of_pods.count() == pods).then_some(())
        });
    }
}

fn listen(path: &Path) -> UnixDatagram {
    // Removes the socket of the previous start.
    let _ = std::fs::remove_file(path);
    let socket = UnixDatagram::bind(path).expect("bind a socket");
    socket.set_read_timeout(Some(TIMEOUT)).expect("set a timeout");
    socket
}

fn wait_for_ready(socket: &UnixDatagram) -> io::Result<()> {
    let mut buffer = [0; 512];
    loop {
        let length = socket.recv(&mut buffer)?;
        if buffer[..length].split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
            return Ok(());
        }
    }
}

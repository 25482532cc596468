//! Load on the node during the soak test.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, Scope, sleep},
    time::Duration,
};

use imds_tests::{
    METADATA, Pod, PodLink, ReceivedPackets, TestEnv,
    api_server::{ApiServer, pod},
    flood::Flood,
    http::{DEFAULT, try_get},
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    probe::{SHORT, http_get, udp_echo},
};

const NODE: &str = "node-0";
/// Number of short-lived pods at a time, besides the flooding ones.
const RUNNING_PODS: usize = 20;
const BETWEEN_PODS: Duration = Duration::from_millis(400);
const BETWEEN_CONFIGURATIONS: Duration = Duration::from_secs(4);
const BETWEEN_SCRAPES: Duration = Duration::from_secs(1);
/// Part of each second in which both flooding pods send.
const BURST: Duration = Duration::from_millis(100);
/// Number of pods after which the API server discards its history and closes all connections.
const BETWEEN_COMPACTIONS: u32 = 100;

/// The cluster of the node.
pub(crate) struct Cluster<'w> {
    env: &'w TestEnv,
    // Dropped first, because its thread is woken through the node's namespace.
    server: ApiServer,
    kubelet: Kubelet,
    /// Path of the agent's configuration.
    pub(crate) config: PathBuf,
    /// Addresses of pods that have been exempt at any time.
    exempt: Mutex<BTreeSet<Ipv4Addr>>,
    made: AtomicU64,
    sent: AtomicU64,
}

impl<'w> Cluster<'w> {
    pub(crate) fn new(env: &'w TestEnv) -> Self {
        let server = ApiServer::start_in(&env.node);
        server.write_kubeconfig(&env.scratch_dir().join("kubeconfig"));
        let config = env.scratch_dir().join("imds.toml");
        let (exempt, made, sent) = (Mutex::default(), AtomicU64::new(0), AtomicU64::new(0));
        let cluster = Self { env, server, kubelet: Kubelet::new(), config, exempt, made, sent };
        cluster.configure(&cluster.configuration(0));
        cluster
    }

    /// Returns one of many configurations that deny the same traffic.
    fn configuration(&self, number: u32) -> String {
        let answer = ["drop", "reject"][number as usize % 2];
        let socket = number % 5 != 4;
        let endpoints = (0..number * 37 % 200)
            .map(|number| format!("[[endpoint]]\nname = 'e{number}'\naddress = '203.0.113.{number}'\n"));
        let kubeconfig = self.env.scratch_dir().join("kubeconfig");
        format!(
            "on_deny = '{answer}'\n[hooks]\nsocket = {socket}\n\
             [kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'\n\
             [[exempt]]\nname = 'trusted-{}'\nnamespace = 'kube-system'\n\
             pod_selector = {{ match_labels = {{ app = 'agent' }} }}\n{}",
            kubeconfig.display(),
            number / 3 % 2,
            endpoints.collect::<String>()
        )
    }

    fn configure(&self, text: &str) {
        let new = self.config.with_extension("new");
        fs::write(&new, text).expect("write a configuration");
        fs::rename(new, &self.config).expect("replace the configuration");
    }

    fn add_pod(&self, number: u32) -> Tenant {
        let (link, driver) =
            [(PodLink::Routed, Driver::Systemd), (PodLink::Bridged, Driver::Cgroupfs)][number as usize % 2];
        let uid = new_uid();
        let mut cgroup = self.kubelet.add_pod(&uid, driver);
        let pod = self.env.add_pod(link);
        if number.is_multiple_of(4) {
            self.exempt.lock().expect("no thread panicked").insert(pod.address);
        }
        cgroup.start_in(&pod.netns);
        self.made.fetch_add(1, Ordering::Relaxed);
        let tenant = Tenant { uid, cgroup, pod };
        self.tell(&tenant, number.is_multiple_of(4));
        tenant
    }

    fn tell(&self, tenant: &Tenant, is_exempt: bool) {
        let labels = [("app", if is_exempt { "agent" } else { "web" })];
        self.server.apply(pod(&tenant.uid, NODE, "kube-system", "agent", &labels));
    }

    /// Deletes a pod, alternately first from the API server or first from the kernel.
    fn remove(&self, tenant: Tenant, number: u32) {
        let Tenant { uid, cgroup, pod } = tenant;
        if number.is_multiple_of(2) {
            self.server.delete(&uid);
            drop((cgroup, pod));
        } else {
            drop((cgroup, pod));
            self.server.delete(&uid);
        }
    }
}

/// A short-lived pod with its cgroup and id.
struct Tenant {
    uid: String,
    cgroup: PodCgroup,
    pod: Pod,
}

/// Load while one agent runs.
pub(crate) struct Load<'c> {
    cluster: &'c Cluster<'c>,
    flooders: &'c [Pod; 2],
    is_stopped: AtomicBool,
    failed_scrapes: AtomicU64,
}

impl<'c> Load<'c> {
    pub(crate) fn new(cluster: &'c Cluster<'c>, flooders: &'c [Pod; 2]) -> Self {
        Self { cluster, flooders, is_stopped: AtomicBool::new(false), failed_scrapes: AtomicU64::new(0) }
    }

    /// Starts the load in the background. [`Self::stop`] ends it.
    pub(crate) fn start<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        scope.spawn(|| self.come_and_go());
        scope.spawn(|| self.reconfigure());
        scope.spawn(|| self.flood());
        scope.spawn(|| self.scrape());
    }

    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Returns the number of pods created so far, for all agents.
    pub(crate) fn pods(&self) -> u64 {
        self.cluster.made.load(Ordering::Relaxed)
    }

    /// Returns the number of packets that the floods sent so far, for all agents.
    pub(crate) fn sent(&self) -> u64 {
        self.cluster.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn failed_scrapes(&self) -> u64 {
        self.failed_scrapes.load(Ordering::Relaxed)
    }

    /// Returns the number of arrivals from pods that have been exempt at any time.
    pub(crate) fn arrivals_of_exempt(&self, received_packets: &ReceivedPackets) -> u64 {
        let exempt = self.cluster.exempt.lock().expect("no thread panicked");
        exempt.iter().map(|&address| received_packets.from(address)).sum()
    }

    fn goes_on(&self) -> bool {
        !self.is_stopped.load(Ordering::Relaxed)
    }

    fn come_and_go(&self) {
        let (cluster, mut running_pods) = (self.cluster, VecDeque::new());
        for number in (0..).take_while(|_| self.goes_on()) {
            let tenant = cluster.add_pod(number);
            // One request with a socket in the cgroup of the socket hook, one with a socket outside.
            cluster.env.in_cgroup(|| http_get(&tenant.pod.netns, METADATA, SHORT));
            udp_echo(&tenant.pod.netns, METADATA, Duration::from_millis(20));
            if number % 8 == 4 {
                cluster.tell(&tenant, false);
            }
            running_pods.push_back((tenant, number));
            if running_pods.len() > RUNNING_PODS
                && let Some((oldest, number)) = running_pods.pop_front()
            {
                udp_echo(&oldest.pod.netns, METADATA, Duration::from_millis(20));
                cluster.remove(oldest, number);
            }
            if number % BETWEEN_COMPACTIONS == BETWEEN_COMPACTIONS - 1 {
                cluster.server.compact();
                cluster.server.disconnect();
            }
            sleep(BETWEEN_PODS);
        }
        for (tenant, number) in running_pods {
            cluster.remove(tenant, number);
        }
    }

    /// Replaces the configuration repeatedly. The agent must reject every fourth one.
    fn reconfigure(&self) {
        let rejected =
            ["nonsense = 1\n", "mode = 'enforce\n", "provider = 'unknown'\n", "[[exempt]]\nname = 'x'\n"];
        let cluster = self.cluster;
        for number in (1..).take_while(|_| self.goes_on()) {
            match number % 4 {
                3 => cluster.configure(rejected[number as usize / 4 % rejected.len()]),
                _ => cluster.configure(&cluster.configuration(number)),
            }
            sleep(BETWEEN_CONFIGURATIONS);
        }
        cluster.configure(&cluster.configuration(0));
    }

    /// Floods during a part of each second only, which leaves CPU time for the other load.
    fn flood(&self) {
        let [routed, bridged] = self.flooders;
        while self.goes_on() {
            let floods = [Flood::udp(routed, METADATA), Flood::syn(bridged, METADATA)];
            sleep(BURST);
            let sent: u64 = floods.into_iter().map(Flood::stop).sum();
            self.cluster.sent.fetch_add(sent, Ordering::Relaxed);
            sleep(Duration::from_secs(1).saturating_sub(BURST));
        }
    }

    fn scrape(&self) {
        while self.goes_on() {
            let is_served =
                |path| try_get(self.cluster.env, DEFAULT, path).is_ok_and(|(status, _)| status == 200);
            if !is_served("/metrics") || !is_served("/healthz") {
                self.failed_scrapes.fetch_add(1, Ordering::Relaxed);
            }
            sleep(BETWEEN_SCRAPES);
        }
    }
}

/// The process `imds-agent events` and the number of events that it printed.
pub(crate) struct Follower {
    process: Child,
    emitted: Arc<AtomicU64>,
    suppressed: Arc<AtomicU64>,
}

impl Follower {
    pub(crate) fn start(env: &TestEnv) -> Self {
        let mut command = env.imds_agent(&["events", "-o", "json"]).command();
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("follow events");
        let (emitted, suppressed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let (count, sum) = (Arc::clone(&emitted), Arc::clone(&suppressed));
        // The thread ends with the process.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event: serde_json::Value = serde_json::from_str(&line).expect("JSON");
                sum.fetch_add(event["suppressed"].as_u64().expect("a number"), Ordering::Relaxed);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { process, emitted, suppressed }
    }

    /// Returns the number of events, and of suppressed events that they report.
    pub(crate) fn received(&self) -> (u64, u64) {
        (self.emitted.load(Ordering::Relaxed), self.suppressed.load(Ordering::Relaxed))
    }

    pub(crate) fn stop(mut self) -> (u64, u64) {
        self.process.kill().expect("stop the follower");
        self.process.wait().expect("wait for the follower");
        self.received()
    }
}

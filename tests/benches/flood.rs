//! A flood of denied packets and calls: its effect on new pods, on the agent's CPU time and on `/healthz`.
//!
//! Sixteen threads send as fast as they can, from 100 network namespaces and 3,000 cgroups, and continuously change
//! their names. The node has 1,000 mounts. A second run sends to an unprotected address, to measure the effect of
//! traffic in general.

#[path = "churn/latency.rs"]
mod latency;
#[path = "churn/link_churn.rs"]
#[expect(dead_code, reason = "the churn benchmark reads all fields")]
mod link_churn;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use imds_tests::{
    Cgroup, METADATA, Netns, Pod, PodLink, SERVICE, Status, TestEnv,
    http::{DEFAULT, try_get},
    measure::{Process, Samples, machine, table},
    scaled,
};
use latency::latencies;
use link_churn::{Churn, NAMESPACES};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
    sys::prctl,
};

const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
const SENDERS: usize = 16;
const PODS: u32 = 100;
const CGROUPS: u32 = 3000;
const MOUNTS: u32 = 1000;
/// Number of new pods in each run, and the time between two of them.
const LINKS: u32 = 300;
const INTERVAL: Duration = Duration::from_millis(100);
/// Number of connect(2) and of sendto(2) calls under one name.
const BURST: u32 = 500;

/// Largest 99th percentile of attachments beside denied senders, as a multiple of the one with no other load.
const MAX_DELAY: f64 = 2.0;
/// Largest CPU time of the agent beside denied senders, in percent of one CPU.
const MAX_CPU: f64 = 5.0;
/// Slowest accepted response of `/healthz` beside denied senders, in milliseconds.
const MAX_HEALTH: f64 = 100.0;

/// Load that runs beside the new pods.
#[derive(Clone, Copy)]
enum Load {
    None,
    Elsewhere,
    Denied,
}

/// A node with its mounts, pods and cgroups.
struct Node<'w> {
    env: &'w TestEnv,
    pods: Vec<Pod>,
    cgroups: Vec<Cgroup>,
    churn: Vec<Netns>,
}

/// Results of one run. Times are in milliseconds.
struct Run {
    name: &'static str,
    /// Packets per second.
    rate: f64,
    attached: Samples,
    /// CPU time of the agent in percent of one CPU.
    cpu: f64,
    health: Samples,
}

fn main() -> ExitCode {
    // Runs before any thread starts, so that the agent inherits the mounts.
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .expect("make mounts private");
    let env = TestEnv::new();
    let mounts = env.scratch_dir().join("mounts");
    fs::create_dir(&mounts).expect("make a directory");
    for _ in 0..scaled(MOUNTS) {
        mount(Some("none"), &mounts, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("mount a tmpfs");
    }
    let node = Node {
        env: &env,
        pods: (0..scaled(PODS)).map(|_| env.add_pod(PodLink::Routed)).collect(),
        cgroups: (0..scaled(CGROUPS)).map(|number| env.add_cgroup(&format!("flood-{number}"))).collect(),
        churn: (0..NAMESPACES).map(|_| Netns::new("churn")).collect(),
    };
    let runs = [
        ("no other load", Load::None),
        ("16 senders to an unprotected address", Load::Elsewhere),
        ("16 denied senders", Load::Denied),
    ]
    .map(|(name, load)| node.measure(name, load));
    println!(
        "{}; {LINKS} new pods, one per {} ms, beside {} pods, {} cgroups and {} mounts.\n",
        machine(),
        INTERVAL.as_millis(),
        node.pods.len(),
        node.cgroups.len(),
        scaled(MOUNTS)
    );
    print!("{}", table(&HEAD, &runs.each_ref().map(Run::row)));
    let [quiet, _, denied] = &runs;
    let bars = [
        ("p99 of attachments, ms", denied.attached.quantile(99), MAX_DELAY * quiet.attached.quantile(99)),
        ("agent's CPU, % of one", denied.cpu, MAX_CPU),
        ("slowest /healthz, ms", denied.health.quantile(100), MAX_HEALTH),
    ];
    let is_met = |&(_, measured, limit): &(&str, f64, f64)| measured <= limit;
    let rows = bars.map(|bar| {
        let (name, measured, limit) = bar;
        let result = if is_met(&bar) { "pass" } else { "fail" };
        vec![name.to_owned(), format!("{measured:.1}"), format!("{limit:.1}"), result.to_owned()]
    });
    println!("\n{}", table(&["16 denied senders", "measured", "limit", "result"], &rows).trim_end());
    drop(node);
    for _ in 0..scaled(MOUNTS) {
        umount(&mounts).expect("unmount a tmpfs");
    }
    if bars.iter().all(is_met) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

const HEAD: [&str; 7] = [
    "load",
    "packets/s",
    "link event to from_pod attached, p50",
    "p99",
    "agent's CPU, % of one",
    "/healthz, p50",
    "slowest",
];

impl Run {
    fn row(&self) -> Vec<String> {
        let Self { name, rate, attached, cpu, health } = self;
        vec![
            (*name).to_owned(),
            format!("{rate:.0}"),
            format!("{:.1} ms", attached.median()),
            format!("{:.1} ms", attached.quantile(99)),
            format!("{cpu:.2}"),
            format!("{:.1} ms", health.median()),
            format!("{:.1} ms", health.quantile(100)),
        ]
    }
}

impl Node<'_> {
    fn measure(&self, name: &'static str, load: Load) -> Run {
        eprintln!("{name}");
        // At this level the log lists every attachment, even many within a second.
        let agent = self.env.agent().hooks(HOOKS).args(&["--log-level", "debug"]).spawn_ready();
        self.env.status_when("every pod has its TCX link", Status::all_pods_have_tcx);
        let (is_done, sent) = (AtomicBool::new(false), AtomicU32::new(0));
        let (mut made, mut health) = (Vec::new(), Vec::new());
        let (start, mut cpu) = (Instant::now(), 0.0);
        thread::scope(|scope| {
            for number in 0..SENDERS {
                let (is_done, sent) = (&is_done, &sent);
                match load {
                    Load::None => {}
                    Load::Elsewhere => drop(scope.spawn(move || self.send(number, SERVICE, is_done, sent))),
                    Load::Denied => drop(scope.spawn(move || self.send(number, METADATA, is_done, sent))),
                }
            }
            let probe = scope.spawn(|| self.probe_health(&is_done));
            let process = Process::new(agent.pid());
            cpu = process.cpu_while(|| made = Churn::new(&self.env.node, &self.churn).run(LINKS, INTERVAL));
            is_done.store(true, Ordering::Relaxed);
            health = probe.join().expect("the probe of /healthz");
        });
        let rate = f64::from(sent.into_inner()) * f64::from(2 * BURST) / start.elapsed().as_secs_f64();
        let attached = latencies(&agent, &made);
        drop(agent);
        self.env.unload();
        Run { name, rate, attached, cpu, health: Samples::new(health) }
    }

    /// Sends under changing names, from one network namespace and cgroup after another.
    fn send(&self, number: usize, to: Ipv4Addr, is_done: &AtomicBool, sent: &AtomicU32) {
        let to = SocketAddr::new(IpAddr::V4(to), 80);
        let pods = self.pods.iter().cycle().skip(number * self.pods.len() / SENDERS);
        let cgroups = self.cgroups.iter().cycle().skip(number * self.cgroups.len() / SENDERS);
        for (turn, (pod, cgroup)) in pods.zip(cgroups).enumerate() {
            if is_done.load(Ordering::Relaxed) {
                return;
            }
            cgroup.run(|| {
                pod.netns.run(|| {
                    let name = std::ffi::CString::new(format!("{number}-{turn}")).expect("a name");
                    prctl::set_name(&name).expect("name a thread");
                    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a UDP socket");
                    for _ in 0..BURST {
                        // Either the socket hook denies the call, or a packet is sent if the hook is off.
                        let _denied = socket.connect(to);
                        let _denied = socket.send_to(b"GET", to);
                    }
                });
            });
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the milliseconds of consecutive requests.
    fn probe_health(&self, is_done: &AtomicBool) -> Vec<f64> {
        let mut took = Vec::new();
        while !is_done.load(Ordering::Relaxed) {
            let start = Instant::now();
            let (status, text) = try_get(self.env, DEFAULT, "/healthz").expect("an answer of /healthz");
            assert_eq!(status, 200, "{text}");
            took.push(start.elapsed().as_secs_f64() * 1e3);
            thread::sleep(Duration::from_millis(50));
        }
        took
    }
}

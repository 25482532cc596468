//! Interfaces that change, and programs that are detached from them.

use std::{fs, path::PathBuf, process::Command, thread::sleep, time::Duration};

use imds_tests::{
    AttachMode, PodLink, TestEnv,
    foreign_bpf::detach_link,
    hook::run_tc,
    output,
    poll::{poll_until, try_poll},
    probe::LONG,
    scaled, skip_without_tcx,
};
use nix::sys::signal::Signal;

use super::{Case, LINKS, Random, signal};

/// Time limit of a repair. The agent delays repeated repairs of a missing program by up to 10 seconds.
const REPAIRED: Duration = Duration::from_secs(20);

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn link_event_burst_overruns_the_queue() {
    let case = Case::new(AttachMode::Clsact);
    let agent = case.agent().resync(3600).spawn_ready();
    let overruns = || case.metric("imds_agent_netlink_overruns_total ");
    assert_eq!(overruns(), 0);
    let late = case.under_flood(|| {
        // The stopped agent does not read events, so that the kernel must drop some, including that of a new pod.
        signal(agent.pid(), Signal::SIGSTOP);
        case.env.node.ip("link add burst0 type veth peer name burst1");
        let flips = "link set burst0 up\nlink set burst0 down\n".repeat(2000);
        case.env.node.ip(&flips);
        let late = case.env.add_pod(PodLink::Routed);
        signal(agent.pid(), Signal::SIGCONT);
        case.env.wait_enforced(&late);
        late
    });
    println!("4000 events, {} overruns", overruns());
    assert!(overruns() > 0, "{}", agent.log());
    case.env.assert_blocked(&late);
    drop(agent);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn interfaces_change_during_attachment() {
    let case = Case::new(AttachMode::Clsact);
    let env = &case.env;
    let agent = case.agent().resync(1).spawn_ready();
    let mut random = Random::new();
    let changes = scaled(120);
    case.under_flood(|| {
        for round in 0..changes {
            let pod = env.add_pod(LINKS[usize::from(round % 2 == 0)]);
            sleep(Duration::from_millis(random.below(10)));
            let name = &pod.host_ifname;
            match random.below(3) {
                0 => env.node.ip(&format!(
                    "link set {name} down\nlink set {name} name r{round}\nlink set r{round} up"
                )),
                1 => env.node.ip(&format!("link set {name} master {}", TestEnv::BRIDGE)),
                _ => env.node.ip(&format!("link del {name}")),
            }
        }
    });
    println!("{changes} interfaces");
    let last = env.add_pod(PodLink::Routed);
    env.wait_enforced(&last);
    env.assert_blocked(&last);
    drop(agent);
    case.assert_well();
}

/// A place where packets or calls are filtered.
#[derive(Clone, Copy)]
enum Point {
    FromPod,
    NodeEgress,
    Socket,
}

impl Point {
    const TC_HOOKS: [Self; 2] = [Self::FromPod, Self::NodeEgress];

    /// Returns the pins of the links at this place.
    fn links(self, case: &Case) -> Vec<PathBuf> {
        let begins = match self {
            Self::FromPod => &["from_pod_"][..],
            Self::NodeEgress => &["node_egress_"],
            Self::Socket => &["connect", "sendmsg"],
        };
        let pins = fs::read_dir(case.env.pin_dir().join("links")).unwrap().map(|pin| pin.unwrap().path());
        let is_of_it = |pin: &PathBuf| {
            begins.iter().any(|begin| pin.file_name().unwrap().to_str().unwrap().starts_with(begin))
        };
        pins.filter(is_of_it).collect()
    }

    /// Returns the interfaces with a program, and the direction of the hook.
    fn interfaces(self, case: &Case) -> (Vec<&str>, &'static str) {
        match self {
            Self::FromPod => (case.pods.iter().map(|pod| &*pod.host_ifname).collect(), "ingress"),
            Self::NodeEgress => (vec![TestEnv::UPLINK, TestEnv::BRIDGE], "egress"),
            Self::Socket => (Vec::new(), ""),
        }
    }

    /// Detaches some or all of the programs, and returns their number.
    fn strip(self, case: &Case, random: &mut Random) -> u64 {
        let links = self.links(case);
        let mut stripped = 0;
        // Index of a program that is always detached.
        let first = random.below(links.len().max(2) as u64);
        for (number, link) in (0..).zip(&links) {
            if number == first || random.is_true() {
                detach(link, random);
                stripped += 1;
            }
        }
        if links.is_empty() {
            let (interfaces, direction) = self.interfaces(case);
            for (number, interface) in (0..).zip(interfaces) {
                if number == first || random.is_true() {
                    remove_filter(case, interface, direction, random);
                    stripped += 1;
                }
            }
        }
        stripped
    }
}

fn detach(link: &PathBuf, random: &mut Random) {
    if random.is_true() {
        return detach_link(link);
    }
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["link", "detach", "pinned"]).arg(link);
    let done = output(bpftool);
    assert!(done.status.success(), "{done:?}");
}

fn remove_filter(case: &Case, interface: &str, direction: &str, random: &mut Random) {
    let node = &case.env.node;
    if random.is_true() {
        run_tc(node, &["qdisc", "delete", "dev", interface, "clsact"]);
    } else {
        run_tc(node, &["filter", "delete", "dev", interface, direction]);
    }
}

/// Repeatedly detaches programs of one TC hook, often together with those of the socket hook. The other TC hook must
/// deny traffic until they are back.
fn stripped_at_random(backend: AttachMode) {
    let case = Case::with_sockets(backend);
    let agent = case.agent().resync(1).spawn_ready();
    let mut random = Random::new();
    let (mut stripped, goal) = (0, u64::from(scaled(40)));
    case.under_flood(|| {
        while stripped < goal {
            stripped += random.of(&Point::TC_HOOKS).strip(&case, &mut random);
            if case.has_sockets() && random.is_true() {
                stripped += Point::Socket.strip(&case, &mut random);
            }
            poll_until(REPAIRED, "everything to be enforced again", || {
                let status = case.env.status();
                (status.is_ready() && status.state == "enforcing").then_some(())
            });
        }
    });
    let repaired = || case.metric("imds_agent_drift_corrections_total{action=\"attached\"}");
    // The agent reports the number after the repair.
    let all = try_poll(LONG, || (repaired() >= stripped).then_some(()));
    println!("{stripped} links and filters removed, {} attached again", repaired());
    assert!(all.is_some(), "{}", agent.log());
    drop(agent);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn links_detached_at_random() {
    if !skip_without_tcx() {
        stripped_at_random(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn filters_removed_at_random() {
    stripped_at_random(AttachMode::Clsact);
}

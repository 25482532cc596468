//! Exempt senders reach the metadata service on every hook, and no other sender does.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    process::{self, Child},
};

use imds_tests::{
    Agent, Cgroup, METADATA, METADATA_V6, PacketSocket, Pod, PodLink, SERVICE, TestEnv, known_here,
    lacks_netns_cookie, output,
    poll::{poll_until, try_poll},
    probe::{LONG, SHORT, http_get, reachable},
    skip, skip_without_netns_cookie, with_each_backend,
};

const ALL: &[&str] = &["from_pod", "node_egress", "socket"];
const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

/// A process in a pod's network namespace and in a separate cgroup.
struct Process {
    cgroup: PathBuf,
    child: Child,
}

impl Process {
    fn new(pod: &Pod) -> Self {
        let root = imds_agent::node::cgroup::root().unwrap().expect("a cgroup v2 hierarchy");
        let cgroup = root.join(format!("imds-exempt-{}-{}", process::id(), pod.host_ifindex));
        fs::create_dir_all(cgroup.join("container")).unwrap();
        let mut command = pod.netns.command("sleep");
        let child = command.arg("1000").spawn().unwrap();
        fs::write(cgroup.join("container/cgroup.procs"), child.id().to_string()).unwrap();
        Self { cgroup, child }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.child.kill().and_then(|()| self.child.wait());
        let removed = try_poll(LONG, || {
            // Busy until the process has left the cgroup.
            let below = fs::remove_dir(self.cgroup.join("container"));
            let _busy = below.and_then(|()| fs::remove_dir(&self.cgroup));
            (!self.cgroup.exists()).then_some(())
        });
        if ended.is_err() || removed.is_none() {
            eprintln!("failed to remove {}", self.cgroup.display());
        }
    }
}

fn rule(sender: &str, rest: &str) -> String {
    format!("[[exempt]]\nname = 'of-test'\n{sender}\n{rest}\n")
}

fn start<'w>(env: &'w TestEnv, hooks: &[&'static str], config: &str) -> Agent<'w> {
    env.agent().config(config).hooks(hooks).spawn_ready()
}

/// A route through the pod, as to an egress gateway, makes its interface an uplink as well as a pod interface.
#[test]
fn route_through_exempt_pod() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [gateway, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
        let config = rule(&format!("interface = '{}'", gateway.host_ifname), "");
        let agent =
            env.agent().backend(backend).config(&config).hooks(&["from_pod", "node_egress"]).spawn_ready();
        env.wait_exempt(&gateway);
        let route = format!("default via {} dev {} onlink table 100", gateway.address, gateway.host_ifname);
        env.node.ip(&format!("route add {route}"));
        env.status_when("the pod's interface is an uplink", |status| {
            status.interface(&gateway.host_ifname).role == "uplink"
        });
        assert!(env.reaches(&gateway.netns) && !env.reaches(&other.netns));
        env.node.ip(&format!("route del {route}"));
        env.status_when("the interface is a pod's again", |status| {
            status.interface(&gateway.host_ifname).role == "pod"
        });
        assert!(env.reaches(&gateway.netns));
        drop(agent);
        env.unload();
    });
}

/// A route of the node leads another pod's packets through the exempt pod, which forwards them.
#[test]
fn pod_behind_exempt_gateway_is_denied() {
    const ENDPOINTS: [IpAddr; 2] = [IpAddr::V4(METADATA), IpAddr::V6(METADATA_V6)];
    let env = TestEnv::new().with_ipv6();
    let [gateway, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let [gateway_v6, other_v6] = [&gateway, &other].map(|pod| env.add_pod_ipv6(pod));
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        gateway.netns.sysctl(key, "1");
    }
    for (family, address) in [("-4", IpAddr::V4(gateway.address)), ("-6", IpAddr::V6(gateway_v6))] {
        for line in [
            format!("rule add iif {} lookup 100", other.host_ifname),
            format!("route add default via {address} dev {} onlink table 100", gateway.host_ifname),
        ] {
            let mut command = env.node.command("ip");
            command.arg(family).args(line.split(' '));
            let output = output(command);
            assert!(output.status.success(), "{line}: {output:?}");
        }
    }
    let gets = |pod: &Pod, endpoint| {
        env.in_cgroup(|| try_poll(LONG, || http_get(&pod.netns, endpoint, SHORT).is_answer().then_some(())))
    };
    let forwarded = PacketSocket::frames(&gateway.netns, Pod::IFNAME);
    for endpoint in ENDPOINTS {
        assert!(gets(&gateway, endpoint).is_some() && gets(&other, endpoint).is_some(), "{endpoint}");
    }
    // The source and destination addresses of the other pod's requests.
    for addresses in [
        [other.address.octets(), METADATA.octets()].concat(),
        [other_v6.octets(), METADATA_V6.octets()].concat(),
    ] {
        assert!(forwarded.sees(&addresses, SHORT), "the other pod's requests do not pass the exempt pod");
    }

    let config = format!("provider = 'aws'\n{}", rule(&format!("interface = '{}'", gateway.host_ifname), ""));
    for hooks in [&["from_pod"][..], &["node_egress"], &["from_pod", "node_egress"]] {
        let agent = start(&env, hooks, &config);
        for endpoint in ENDPOINTS {
            assert!(gets(&gateway, endpoint).is_some(), "{endpoint}, {hooks:?}: {}", agent.log());
            env.assert_nothing_arrives(|| {
                let answer = http_get(&other.netns, endpoint, SHORT);
                assert!(!answer.is_answer(), "{endpoint}, {hooks:?}: {}", agent.log());
            });
        }
        drop(agent);
        env.unload();
    }
    for endpoint in ENDPOINTS {
        assert!(gets(&other, endpoint).is_some(), "{endpoint}");
    }
}

#[test]
fn every_selector_works_on_every_hook() {
    let mut all = vec![ALL, &["from_pod"], &["socket"], &["node_egress"]];
    if lacks_netns_cookie() {
        skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
        all.retain(|hooks| !hooks.contains(&"socket"));
        all.push(&["from_pod", "node_egress"]);
    }
    for link in LINKS {
        for &hooks in &all {
            if hooks == ["node_egress"] && link == PodLink::Bridged {
                // Behind a bridge, only `from_pod` can distinguish pods.
                continue;
            }
            let env = TestEnv::new();
            let [pod, neighbour] = [env.add_pod(link), env.add_pod(link)];
            assert!(env.reaches(&pod.netns) && env.reaches(&neighbour.netns));
            let process = Process::new(&pod);
            for sender in [
                format!("interface = '{}'", pod.host_ifname),
                format!("netns = '{}'", pod.netns.path().display()),
                format!("cgroup = '{}'", process.cgroup.file_name().unwrap().to_str().unwrap()),
            ] {
                let agent = start(&env, hooks, &rule(&sender, ""));
                let case = format!("{sender} with {hooks:?}, {link:?}");
                assert!(env.reaches(&pod.netns), "{case}: {}", agent.log());
                env.assert_nothing_arrives(|| assert!(!env.reaches(&neighbour.netns), "{case}"));
                let total = env.status().total;
                assert!(total.exempt.packets > 0 && total.denied.packets > 0, "{case}: {total:?}");
                drop(agent);
                env.unload();
            }
            assert!(env.reaches(&neighbour.netns));
        }
    }
}

#[test]
fn exemption_for_some_endpoints_and_audit() {
    let own = format!("[[endpoint]]\nname = 'other'\naddress = '{SERVICE}'\n");
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert!(reachable(&pod.netns, METADATA) && reachable(&pod.netns, SERVICE));
    let sender = format!("interface = '{}'", pod.host_ifname);
    for (rest, exempt, audited) in
        [("endpoints = ['other']", true, false), ("endpoints = ['other']\naudit = true", false, true)]
    {
        let config = format!("{own}{}", rule(&sender, rest));
        let agent = env.agent().config(&config).hooks(&["from_pod", "node_egress"]).spawn_ready();
        assert!(reachable(&pod.netns, SERVICE), "{rest}");
        env.assert_blocked(&pod);
        let counts = env.status().interface(&pod.host_ifname).counts;
        assert_eq!((counts.exempt.packets > 0, counts.audited.packets > 0), (exempt, audited), "{counts:?}");
        drop(agent);
        env.unload();
    }
    assert!(reachable(&pod.netns, METADATA));
}

#[test]
fn host_network_pod_is_exempt_by_cgroup() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [container, neighbour] =
        ["kubepods.slice/pod7.slice/a", "kubepods.slice/pod8.slice/a"].map(|path| env.add_cgroup(path));
    let reaches = |cgroup: &Cgroup| cgroup.run(|| http_get(&env.node, METADATA, SHORT).is_answer());
    assert!(reaches(&container) && reaches(&neighbour));
    let sender = format!("cgroup = '{}'", container.path().parent().unwrap().display());
    let agent = start(&env, &["host_network"], &rule(&sender, ""));
    assert!(reaches(&container), "{}", agent.log());
    env.assert_nothing_arrives(|| assert!(!reaches(&neighbour)));
    // A container that starts later.
    let later = env.add_cgroup("kubepods.slice/pod7.slice/b");
    poll_until(LONG, "the new container to be exempt", || reaches(&later).then_some(()));
    let exempt = env.status().host_network.unwrap().counts.exempt.packets;
    assert!(exempt > 0);
    drop(agent);
    env.unload();
    assert!(reaches(&neighbour));
}

#[test]
fn rules_follow_the_configuration() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    assert!(env.reaches(&pod.netns));
    let path = env.scratch_dir().join("imds.toml");
    let hooks = if lacks_netns_cookie() { "[hooks]\nsocket = false\n" } else { "" };
    fs::write(&path, hooks).unwrap();
    let cgroup = env.cgroup().to_str().unwrap();
    let agent = env.agent().config_file(path.to_str().unwrap()).args(&["--cgroup", cgroup]).spawn_ready();
    env.wait_denied(&pod);
    fs::write(&path, rule(&format!("netns = '{}'", pod.netns.path().display()), hooks)).unwrap();
    env.wait_exempt(&pod);

    // The exemption stays while no agent runs, and during the start of the next one.
    agent.kill9();
    assert!(env.reaches(&pod.netns));
    let agent = env.agent().config_file(path.to_str().unwrap()).args(&["--cgroup", cgroup]).spawn_ready();
    assert!(env.reaches(&pod.netns));

    fs::write(&path, format!("mode = 'enforce'\n{hooks}")).unwrap();
    env.wait_denied(&pod);
    // One hook can deny the pod before its exemptions from the others are removed.
    env.status_when("no sender is exempt", |status| status.exemptions.is_empty());
    drop(agent);
    env.unload();
    assert!(env.reaches(&pod.netns));
}

#[test]
fn later_pod_is_exempt_successor_is_not() {
    let env = TestEnv::new();
    let agent = start(&env, &known_here(ALL), &rule("interface = 'guest0'", ""));
    let first = env.add_pod(PodLink::Routed);
    env.wait_denied(&first);
    // The interface name alone makes the rule match.
    env.node.ip(&format!(
        "link set {0} down
         link set {0} name guest0
         link set guest0 up
         route add {1}/32 dev guest0",
        first.host_ifname, first.address
    ));
    env.wait_exempt(&first);
    let status = env.status();
    assert!(status.exemptions.iter().any(|exemption| exemption.interface.as_deref() == Some("guest0")));
    assert!(status.exemptions.iter().all(|exemption| exemption.rule == "of-test"), "{status:#?}");

    let (index, address) = (first.host_ifindex, first.address);
    first.delete();
    let successor = env.add_successor("guest1", index, address);
    env.assert_nothing_arrives(|| assert!(!env.reaches(&successor)));
    env.status_when("the successor is enforced and no sender exempt", |status| {
        status.find("guest1").is_some_and(imds_tests::status::Interface::is_attached)
            && status.exemptions.is_empty()
    });
    env.assert_nothing_arrives(|| assert!(!env.reaches(&successor)));
    drop(agent);
    env.unload();
    assert!(env.reaches(&successor));
}

/// Without an agent, the exemption of a deleted pod stays in the maps, and `node_egress` alone checks its successor, which has
/// another address.
#[test]
fn exemption_ends_without_an_agent() {
    let env = TestEnv::new();
    let [first, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let config = rule(&format!("interface = '{}'", first.host_ifname), "");
    let agent = start(&env, &["from_pod", "node_egress"], &config);
    env.wait_exempt(&first);
    agent.kill9();
    env.wait_exempt(&first);
    let (name, index, address) = (first.host_ifname.clone(), first.host_ifindex, other.address);
    first.delete();
    other.delete();
    let successor = env.add_successor(&name, index, address);
    poll_until(LONG, "the successor to be denied", || (!reachable(&successor, METADATA)).then_some(()));
    env.assert_nothing_arrives(|| assert!(!reachable(&successor, METADATA)));
    env.unload();
    assert!(reachable(&successor, METADATA));
}

#[test]
fn unresolved_rules_are_reported() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert!(reachable(&pod.netns, METADATA));
    // A regular file, the node's own namespace, and a missing file.
    let file = env.scratch_dir().join("file");
    fs::write(&file, "").unwrap();
    for (path, part) in
        [(file, "failed to enter"), (env.node.path(), "the node's own"), ("/nowhere/at/all".into(), "")]
    {
        let sender = format!("netns = '{}'", path.display());
        let config = rule(&sender, "");
        let command = env.agent().config(&config).hooks(&["from_pod"]);
        let agent = if part.is_empty() {
            command.spawn_ready()
        } else {
            let agent = command.spawn_degraded(part);
            agent.wait_for_log(part, LONG);
            agent
        };
        env.assert_blocked(&pod);
        drop(agent);
        env.unload();
    }
    assert!(reachable(&pod.netns, METADATA));
}

//! Settings that a reload changes.

use std::{fs, net::Ipv4Addr};

use aya::programs::TcAttachType::{Egress, Ingress};
use imds_tests::{
    AttachMode, ConfigFile, METADATA, Pod, PodLink, SERVICE, TestEnv,
    flood::Flood,
    hook,
    poll::poll_until,
    probe::{LONG, Outcome, SHORT, http_get, reachable},
    skip_without_netns_cookie, with_each_backend,
};

use crate::{FROM_POD, LINKS, NODE_EGRESS, TC_HOOKS, has_program};

fn flood(pods: &[Pod; 2]) -> [Flood; 2] {
    [Flood::udp(&pods[0], METADATA), Flood::syn(&pods[1], METADATA)]
}

#[track_caller]
fn assert_flood_arrives(env: &TestEnv, pods: &[Pod; 2]) {
    let before = env.received_packets();
    let _floods = flood(pods);
    poll_until(LONG, "packets of each pod to arrive", || {
        let now = env.received_packets();
        pods.iter().all(|pod| now.from(pod.address) > before.from(pod.address) + 100).then_some(())
    });
}

/// Returns configurations that all protect [`METADATA`], each with another change.
fn protecting_configs() -> Vec<String> {
    let others = |count: u8| {
        let other = |n| format!("[[endpoint]]\nname = 'e{n}'\naddress = '10.9.0.{n}'\n");
        (1..=count).map(other).collect::<Vec<_>>().concat()
    };
    let own = |ports: &str| {
        format!("[[endpoint]]\nname = 'own'\naddress = '169.254.169.254'\nallow_ports = [{ports}]\n")
    };
    vec![
        FROM_POD.to_owned(),
        format!("provider = 'aws'\n{FROM_POD}{}", others(3)),
        format!("on_deny = 'reject'\n{TC_HOOKS}"),
        format!("provider = 'none'\n{NODE_EGRESS}{}", own("'udp/5300', 'tcp/5300'")),
        format!("provider = 'none'\n{TC_HOOKS}{}{}", others(200), own("")),
        format!("{FROM_POD}[interfaces]\ninclude = ['nothing*']\n{}", others(1)),
        format!("provider = 'gcp'\non_deny = 'reject'\n{NODE_EGRESS}"),
        format!("extra_endpoints = ['ecs']\n{TC_HOOKS}{}", others(9)),
    ]
}

#[test]
fn flood_is_denied_during_reloads() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        assert_flood_arrives(&env, &pods);

        let configs = protecting_configs();
        let file = ConfigFile::new(&env, &configs[0]);
        let agent = file.agent().backend(backend).spawn_ready();
        let first = env.status();
        let before = env.received_packets();
        let floods = flood(&pods);
        let mut denied = 0;
        for config in configs.iter().cycle().skip(1).take(56) {
            let status = file.reload(config);
            assert!(status.denied() > denied, "the count went from {denied} to {}", status.denied());
            denied = status.denied();
        }
        let sent: u64 = floods.into_iter().map(Flood::stop).sum();
        assert_eq!(env.received_packets(), before, "of {sent} packets");
        assert!(sent > 100_000, "{sent} packets are no flood");
        let status = env.status();
        assert!(status.generation() >= first.generation() + 56);
        // A packet is counted once: packets that `from_pod` denies never reach `node_egress`.
        assert!(status.denied() <= sent && status.denied() > sent / 2, "{} of {sent}", status.denied());

        drop(agent);
        env.unload();
        assert_flood_arrives(&env, &pods);
    });
}

#[test]
fn off_and_on_without_restart() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let file = ConfigFile::new(&env, TC_HOOKS);
        let agent = file.agent().backend(backend).spawn_ready();
        env.assert_blocked(&pod);
        let pid = env.status().agent.pid;

        for (mode, state) in [("off", "off"), ("audit", "auditing")] {
            let status = file.reload(&format!("mode = '{mode}'\n{TC_HOOKS}"));
            assert_eq!((status.mode.as_deref(), status.state.as_str()), (Some(mode), state));
            env.assert_open(&pod);
            let denied = env.status().denied();
            let status = file.reload(TC_HOOKS);
            assert_eq!((status.state.as_str(), status.agent.pid), ("enforcing", pid));
            env.assert_blocked(&pod);
            let total = env.status().total;
            assert!(total.denied.packets > denied && total.allowed.packets > 0, "{total:?}");
        }
        assert!(env.status().total.audited.packets > 0);
        // No endpoint at all, and then one again.
        file.reload(&format!("mode = 'off'\nprovider = 'none'\n{TC_HOOKS}"));
        env.assert_open(&pod);
        file.reload(TC_HOOKS);
        env.assert_blocked(&pod);
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn reload_changes_hooks() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let file = ConfigFile::new(&env, FROM_POD);
        let agent = file.agent().backend(backend).spawn_ready();
        let (veth, uplink) = (pod.host_ifname.as_str(), TestEnv::UPLINK);
        let attached = || [has_program(&env, veth, Ingress), has_program(&env, uplink, Egress)];
        // Distinguishes a denied call from one that times out.
        let is_call_denied =
            || env.in_cgroup(|| matches!(http_get(&pod.netns, METADATA, SHORT), Outcome::Error(_)));
        assert_eq!(attached(), [true, false]);
        assert!(!is_call_denied());

        for _ in 0..2 {
            let status = file.reload("[hooks]\nfrom_pod = false\n");
            assert_eq!(status.hooks, ["node_egress", "socket", "local_service"]);
            assert_eq!(attached(), [false, true]);
            assert!(is_call_denied() && status.sockets.unwrap().attached);
            env.assert_blocked(&pod);

            let status = file.reload("[hooks]\nnode_egress = false\nsocket = false\n");
            assert_eq!(status.hooks, ["from_pod", "local_service"]);
            assert!(status.sockets.is_none() && !is_call_denied());
            assert_eq!(attached(), [true, false]);
            env.assert_blocked(&pod);
        }
        assert_eq!(fs::read_dir(env.pin_dir().join("progs")).unwrap().count(), 3);
        // The effective hooks also apply to later pods.
        file.reload(TC_HOOKS);
        let late = env.add_pod(PodLink::Bridged);
        env.wait_enforced(&late);
        env.assert_blocked(&late);
        drop(agent);
        env.unload();
        assert_eq!(attached(), [false, false]);
        env.assert_open(&pod);
    });
}

#[test]
fn reload_changes_host_network() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup("kubepods.slice/pod7.slice");
    // A denied call fails at once.
    let is_open = || container.run(|| http_get(&env.node, METADATA, LONG).is_answer());
    assert!(reachable(&env.node, METADATA) && is_open());
    let file = ConfigFile::new(&env, FROM_POD);
    let agent = file.agent().backend(AttachMode::Clsact).spawn_ready();
    assert!(is_open());
    for _ in 0..2 {
        let status = file.reload(&format!("{FROM_POD}host_network = true\n"));
        assert!(status.problems.is_empty() && status.hooks.contains(&"host_network".to_owned()));
        assert!(!is_open() && reachable(&env.node, METADATA));
        let status = file.reload(FROM_POD);
        assert_eq!(status.hooks, ["from_pod", "local_service"]);
        assert!(is_open());
    }
    file.reload(&format!("{FROM_POD}host_network = true\n"));
    assert!(!is_open());
    drop(agent);
    env.unload();
    assert!(is_open());
}

#[test]
fn reload_changes_endpoints_and_interfaces() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [pod, other] = LINKS.map(|link| env.add_pod(link));
        let dmi = env.scratch_dir().join("dmi");
        fs::create_dir(&dmi).unwrap();
        let file = ConfigFile::new(&env, FROM_POD);
        let agent = file.agent().backend(backend).args(&["--dmi-dir", dmi.to_str().unwrap()]).spawn_ready();
        env.assert_blocked(&pod);
        assert!(reachable(&pod.netns, SERVICE));

        let service = format!("[[endpoint]]\nname = 'service'\naddress = '{SERVICE}'\n");
        file.reload(&format!("provider = 'none'\n{FROM_POD}{service}"));
        assert!(!http_get(&pod.netns, SERVICE, SHORT).is_answer());
        env.assert_open(&pod);

        let exclude = format!("{FROM_POD}[interfaces]\nexclude = ['{}']\n", pod.host_ifname);
        let status = file.reload(&exclude);
        assert_eq!(status.interface(&pod.host_ifname).role, "excluded");
        assert_eq!(hook::programs(&env.node, &pod.host_ifname), []);
        env.assert_open(&pod);
        env.assert_blocked(&other);
        let status = file.reload(FROM_POD);
        assert_eq!(status.interface(&pod.host_ifname).role, "pod");
        env.assert_blocked(&pod);

        // The firmware data changes, the file does not.
        assert_eq!(status.provider.unwrap().effective, "generic");
        fs::write(dmi.join("sys_vendor"), "Amazon EC2\n").unwrap();
        agent.hang_up();
        let status = env.status_when("the provider has changed", |status| {
            status.provider.as_ref().is_some_and(|provider| provider.effective == "aws")
        });
        assert_eq!(status.endpoints.len(), 2);
        env.assert_blocked(&pod);
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn new_endpoint_route_makes_an_uplink() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, TC_HOOKS);
    let agent = file.agent().backend(AttachMode::Clsact).args(&["--resync", "3600"]).spawn_ready();
    let vault = Ipv4Addr::new(10, 9, 0, 1);
    // The uplink of a nested node: a veth without a default route.
    let pod = env.add_pod(PodLink::Routed);
    let role = |role: &'static str| {
        env.status_when(role, |status| status.find(&pod.host_ifname).is_some_and(|found| found.role == role))
    };
    role("pod");
    file.reload(&format!("{TC_HOOKS}[[endpoint]]\nname = 'vault'\naddress = '{vault}'\n"));
    role("pod");
    env.node.ip(&format!("route add {vault}/32 dev {}", pod.host_ifname));
    role("uplink");
    file.reload(TC_HOOKS);
    role("pod");
    file.reload(&format!("{TC_HOOKS}[[endpoint]]\nname = 'vault'\naddress = '{vault}'\n"));
    role("uplink");
    env.node.ip(&format!("route delete {vault}/32 dev {}", pod.host_ifname));
    role("pod");
    drop(agent);
    env.unload();
}

#[test]
fn status_names_rule_that_exempts_nothing() {
    let env = TestEnv::new();
    let rule = |netns: &str| format!("{FROM_POD}[[exempt]]\nname = 'add-on'\nnetns = '{netns}'\n");
    let file = ConfigFile::new(&env, &rule("/proc/self/ns/net"));
    let expected =
        "exemption not applied completely: add-on: /proc/self/ns/net is the node's own network namespace";
    let agent = file.agent().spawn_degraded(expected);
    file.reload(&rule("/run/netns/not-created-yet"));
    env.status_when("no rule is a problem", |status| status.state == "enforcing");

    file.reload(&rule("/proc/self/ns/net"));
    env.status_when("the rule is a problem again", |status| !status.problems.is_empty());
    file.reload(&format!("mode = 'off'\n{}", rule("/proc/self/ns/net")));
    env.status_when("nothing is denied", |status| status.state == "off");
    agent.kill9();
    file.replace(FROM_POD);
    let _agent = file.agent().spawn_ready();
    env.status_when("the next agent has no such rule", |status| status.state == "enforcing");
}

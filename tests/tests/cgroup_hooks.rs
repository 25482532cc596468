//! Programs on cgroups: order among programs of other software, occupied cgroups, and when the `sendmsg` and
//! `local_service` programs are attached.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, UdpSocket},
    path::Path,
};

use imds_agent::datapath::pin::dir::link_at;
use imds_tests::{
    METADATA, Netns, PodLink, SERVICE, Services, Status, TestEnv,
    foreign_bpf::{self, ForeignProgram},
    poll::poll_until,
    probe::{LONG, Outcome, SHORT, http_get, udp_echo},
    skip_without_netns_cookie,
};

// Constants of include/uapi/linux/bpf.h.
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;

/// Hooks that are on without a configuration, except `local_service`.
const ALL: [&str; 3] = ["from_pod", "node_egress", "socket"];

fn is_answered(env: &TestEnv, netns: &Netns, address: Ipv4Addr) -> bool {
    env.in_cgroup(|| http_get(netns, address, SHORT).is_answer())
}

fn is_denied(env: &TestEnv, netns: &Netns, address: Ipv4Addr) -> bool {
    let outcome = env.in_cgroup(|| http_get(netns, address, SHORT));
    matches!(outcome, Outcome::Error(error) if error.kind() == ErrorKind::PermissionDenied)
}

fn has_problem(status: &Status, text: &str) -> bool {
    status.problems.iter().any(|problem| problem.problem.contains(text))
}

fn is_pinned(env: &TestEnv, link: &str) -> bool {
    env.pin_dir().join("links").join(link).exists()
}

#[test]
fn load_balancer_attached_later_runs_first() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let balancer = ForeignProgram::redirecting_calls(BPF_CGROUP_INET4_CONNECT, METADATA);
    let attach = || balancer.attach_cgroup(env.cgroup(), BPF_CGROUP_INET4_CONNECT);
    let is_open = || {
        let before = env.received_packets();
        is_answered(&env, &pod.netns, SERVICE) && env.received_packets() != before
    };

    let link = attach();
    assert!(is_open());
    drop(link);

    let agent = env.agent().hooks(&["socket"]).resync(1).spawn_ready();
    let _link = attach();
    agent.wait_for_log("to the end of the programs", LONG);
    assert!(is_denied(&env, &pod.netns, SERVICE));
    assert!(!is_open());
    let status = env.status_when("the agent is ready", Status::is_ready);
    assert!(status.sockets.is_some_and(|sockets| sockets.attached));

    // The link at the last position is pinned.
    agent.kill9();
    assert!(is_denied(&env, &pod.netns, SERVICE));
    env.unload();
    assert!(is_open());
}

#[test]
fn load_balancer_of_datagrams_attached_later_runs_first() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let balancer = ForeignProgram::redirecting_calls(BPF_CGROUP_UDP4_SENDMSG, METADATA);
    let send = || {
        let call = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"datagram", (SERVICE, 9));
        env.in_cgroup(|| pod.netns.run(call))
    };
    let is_denied = || send().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
    let arrives = || {
        env.arrives(|| {
            send().expect("send a datagram");
        })
    };

    let link = balancer.attach_cgroup(env.cgroup(), BPF_CGROUP_UDP4_SENDMSG);
    assert!(arrives());
    drop(link);
    assert!(!arrives());

    let agent = env.agent().hooks(&["socket"]).resync(1).spawn_ready();
    assert!(!is_denied());
    let _link = balancer.attach_cgroup(env.cgroup(), BPF_CGROUP_UDP4_SENDMSG);
    agent.wait_for_log("to the end of the programs", LONG);
    env.assert_nothing_arrives(|| assert!(is_denied()));
    let status = env.status_when("the agent is ready", Status::is_ready);
    assert!(status.sockets.is_some_and(|sockets| sockets.attached));
    agent.kill9();
    assert!(is_denied());
    env.unload();
    assert!(arrives());
}

#[test]
fn repeated_detaching_is_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let balancer = ForeignProgram::redirecting_calls(BPF_CGROUP_INET4_CONNECT, METADATA);
    let attach = || balancer.attach_cgroup(env.cgroup(), BPF_CGROUP_INET4_CONNECT);
    let agent = env.agent().hooks(&["socket"]).resync(1).spawn_ready();
    let mut link = attach();
    // Until the status is read, the agent may move its program to the last position again.
    let code = poll_until(LONG, "the agent to back off and to report it", || {
        if is_denied(&env, &pod.netns, SERVICE) {
            link = attach();
        }
        if !agent.log().contains("is not last") {
            return None;
        }
        let output = env.imds_agent(&["status", "-o", "json"]).output();
        let status: Status = serde_json::from_slice(&output.stdout).unwrap();
        let is_reported = has_problem(&status, "imds_connect4 on cgroup")
            && has_problem(&status, "\"foreign\" runs after it");
        is_reported.then_some(output.status.code())
    });
    assert_eq!(code, Some(3));
    // The agent still moves its program to the last position, but later.
    poll_until(LONG, "imds_connect4 to be last", || is_denied(&env, &pod.netns, SERVICE).then_some(()));
    assert_eq!(agent.log().matches("is not last").count(), 1, "{}", agent.log());
    drop(link);
}

#[test]
fn occupied_cgroup_degrades_the_agent() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let foreign = ForeignProgram::allowing_calls(BPF_CGROUP_INET4_CONNECT);
    let occupant = foreign.attach_cgroup_alone(env.cgroup(), BPF_CGROUP_INET4_CONNECT);
    env.assert_open(&pod);

    let once = env.agent().hooks(&["from_pod", "socket"]).once();
    let output = String::from_utf8_lossy(&once.stderr);
    assert!(!once.status.success() && output.contains("without BPF_F_ALLOW_MULTI"), "{output}");
    env.unload();

    let agent = env.agent().hooks(&["from_pod", "socket"]).resync(1).spawn();
    agent.wait_for_log("failed to attach imds_connect4 to cgroup", LONG);
    let late = env.assert_enforced_with_later_pod(&pod);

    let status = env.status_when("the agent is ready", |status| status.agent.ready);
    assert!(
        has_problem(&status, "\"foreign\" is attached without BPF_F_ALLOW_MULTI"),
        "{:?}",
        status.problems
    );
    assert!(is_pinned(&env, "connect6") && !is_pinned(&env, "connect4"));
    assert!(status.sockets.is_some_and(|sockets| !sockets.attached));
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    let doctor = env.imds_agent(&["doctor"]).output();
    let doctor = String::from_utf8_lossy(&doctor.stdout);
    assert!(doctor.contains("attached without BPF_F_ALLOW_MULTI"), "{doctor}");

    drop(occupant);
    agent.wait_for_log("attached imds_connect4 to cgroup", LONG);
    env.status_when("the agent is ready", Status::is_ready);
    assert!(is_denied(&env, &pod.netns, METADATA));
    assert_eq!(agent.log().matches("failed to attach imds_connect4").count(), 1, "{}", agent.log());
    drop(agent);
    env.unload();
    env.assert_open(&pod);
    env.assert_open(&late);
}

/// Returns the status of the sendmsg programs, and compares it with the pins.
fn sendmsg(env: &TestEnv) -> (bool, Option<String>) {
    let sendmsg = env.status().sockets.expect("the hook is on").sendmsg;
    assert_eq!(sendmsg.attached, is_pinned(env, "sendmsg4") && is_pinned(env, "sendmsg6"));
    (sendmsg.attached, sendmsg.reason)
}

#[test]
fn sendmsg_is_attached_if_needed() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let covers = !imds_tests::lacks_tc_netns_cookie("coverage without sendmsg programs");
    let assert_udp_blocked = || {
        env.assert_nothing_arrives(|| {
            assert!(!env.in_cgroup(|| udp_echo(&pod.netns, METADATA, SHORT).is_answer()));
        });
    };
    let covered =
        (false, Some("from_pod and node_egress cover pods whose packets the node forwards".to_owned()));
    for (hooks, setting, expected) in [
        (&ALL[..], None, covers.then(|| covered.clone())),
        (&["socket"], None, Some((true, Some("from_pod is off".to_owned())))),
        (&["from_pod", "socket"], None, Some((true, Some("node_egress is off".to_owned())))),
        (&ALL[..], Some("false"), Some((false, Some("hooks.sendmsg is false".to_owned())))),
        (&ALL[..], Some("true"), Some((true, Some("hooks.sendmsg is true".to_owned())))),
        (&ALL[..], Some("'auto'"), covers.then_some(covered)),
    ] {
        let mut command = env.agent().hooks(hooks);
        if let Some(setting) = setting {
            command = command.sendmsg(setting);
        }
        let agent = command.spawn_ready();
        if let Some(expected) = expected {
            assert_eq!(sendmsg(&env), expected, "{hooks:?} {setting:?}");
        }
        assert!(env.status().sockets.is_some_and(|sockets| sockets.attached));
        assert_udp_blocked();
        // Links survive the agent, and the next agent adopts them.
        agent.kill9();
    }
    let text = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(text.contains("\nsendmsg "), "{text}");
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn local_service_follows_the_address() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [pod, exempt] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let is_open = |netns| http_get(netns, METADATA, SHORT).is_answer();
    let agent = || {
        let rule = format!("[[exempt]]\nname = 'proxy'\ninterface = '{}'", exempt.host_ifname);
        env.agent().hooks(&["node_egress", "local_service"]).config(&rule).spawn_ready()
    };
    let state = |status: &Status| {
        let local = status.local_service.as_ref().expect("the hook is on");
        (local.attached, local.desired)
    };
    // The agent records which state it desires before it changes the link.
    let status_when_attached = |what: &str, attached: bool| {
        env.status_when(what, |status| state(status) == (attached, attached));
        poll_until(LONG, what, || (is_pinned(&env, "local_service") == attached).then_some(()));
    };
    let running = agent();
    assert_eq!(state(&env.status()), (false, false));

    let address = format!("{METADATA}/32 dev lo");
    env.node.ip(&format!("addr add {address}"));
    let _services = env.in_cgroup(|| Services::start(&env.node, &[METADATA.into()]));
    status_when_attached("local_service is attached", true);
    assert!(!is_open(&pod.netns) && is_open(&exempt.netns) && is_open(&env.node));
    let counts = env.status().local_service.unwrap().counts;
    assert!(counts.denied.packets > 0 && counts.exempt.packets > 0, "{counts:?}");

    // The program survives the agent, and the next agent adopts it.
    running.kill9();
    assert!(!is_open(&pod.netns));
    let link = || link_at(&env.pin_dir().join("links/local_service")).map(|link| link.id);
    let before = link();
    let running = agent();
    assert!(before.is_some() && link() == before);
    assert!(!is_open(&pod.netns) && is_open(&env.node));

    foreign_bpf::detach_link(&env.pin_dir().join("links/local_service"));
    env.node.ip(&format!("addr del {address}"));
    status_when_attached("local_service is detached", false);
    env.node.ip(&format!("addr add {address}"));
    status_when_attached("local_service is attached again", true);
    assert!(!is_open(&pod.netns));
    drop(running);
    env.unload();
    assert!(is_open(&pod.netns) && is_open(&env.node));
}

/// A routing rule can select a table in which the address is local, as for a transparent proxy.
#[test]
fn local_service_follows_policy_routes() {
    let env = TestEnv::new();
    let agent = env.agent().hooks(&["node_egress", "local_service"]).spawn_ready();
    let is_attached = |status: &Status| status.local_service.as_ref().is_some_and(|local| local.attached);
    assert!(!is_attached(&env.status()));
    let route = format!("local {METADATA}/32 dev lo table 100");
    env.node.ip(&format!("route add {route}"));
    env.status_when("local_service is attached", is_attached);
    env.node.ip(&format!("route del {route}"));
    env.status_when("local_service is detached", |status| !is_attached(status));
    drop(agent);
    env.unload();
}

/// The kernel runs programs of ancestor cgroups last, in whatever order they were attached.
#[test]
fn program_of_ancestor_is_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let below = env.add_cgroup("below");
    let balancer = ForeignProgram::redirecting_calls(BPF_CGROUP_INET4_CONNECT, METADATA);
    let config = env.scratch_dir().join("socket.toml");
    fs::write(&config, "[hooks]\nfrom_pod = false\nnode_egress = false\nsocket = true").unwrap();
    let [config, cgroup] = [&config, below.path()].map(|path| path.to_str().unwrap());
    let agent = env.agent().config_file(config).args(&["--cgroup", cgroup]).resync(1).spawn_ready();
    let is_open = || below.run(|| http_get(&pod.netns, SERVICE, SHORT).is_answer());
    let link = balancer.attach_cgroup(env.cgroup(), BPF_CGROUP_INET4_CONNECT);
    let before = env.received_packets();
    assert!(is_open() && env.received_packets() != before);
    let is_reported =
        |status: &Status| status.problems.iter().any(|problem| problem.problem.contains("is not last"));
    env.status_when("the program of the ancestor is reported", is_reported);
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    drop(link);
    env.status_when("the agent is ready", Status::is_ready);
    drop(agent);
    env.unload();
}

/// Returns the ids of the pinned links of the socket hook.
fn link_ids(pin_dir: &Path) -> Vec<(String, u32)> {
    let links = ["connect4", "connect6", "sendmsg4", "sendmsg6"];
    let id = |name: &str| link_at(&pin_dir.join("links").join(name)).expect("a pinned link").id;
    links.into_iter().map(|name| (name.to_owned(), id(name))).collect()
}

#[test]
fn restart_keeps_links() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.agent().hooks(&["socket"]).spawn_ready().kill9();
    let before = link_ids(env.pin_dir());
    let _agent = env.agent().hooks(&["socket"]).spawn_ready();
    assert_eq!(link_ids(env.pin_dir()), before);
    assert!(is_denied(&env, &pod.netns, METADATA));
}

//! Calls and packets of listed and unlisted processes.

use std::{io, net::IpAddr};

use aya::util::KernelVersion;
use imds_tests::{
    Cgroup, METADATA, METADATA_V6, PodLink, SERVICE, TestEnv,
    poll::poll_until,
    probe::{LONG, SHORT, connect, http_exchange, http_get, icmp_echo, udp_echo},
    skip, skip_without_netns_cookie,
    status::{Counts, NodeAllow, NodeAllowEntry},
};
use serde_json::Value;

use crate::{
    AWS, ECHO_PORT, HOOK, OTHER_USER, USER, allow, echo, entry, http, node_allow, reaches, run_as, udp, uid,
};

fn connected_echo(any: &str, address: impl Into<IpAddr>) -> io::Result<()> {
    let socket = udp(any);
    socket.connect((address.into(), ECHO_PORT))?;
    socket.send(b"echo")?;
    socket.recv(&mut [0; 16]).map(drop)
}

/// A call that a process without capabilities can make.
type Call = fn() -> io::Result<()>;

/// Calls of both families that name an endpoint.
const CALLS: [(&str, Call); 8] = [
    ("TCP", || http(METADATA)),
    ("TCP to a mapped address", || http(METADATA.to_ipv6_mapped())),
    ("TCP by IPv6", || http(METADATA_V6)),
    ("UDP", || echo("0.0.0.0:0", METADATA)),
    ("UDP to a mapped address", || echo("[::]:0", METADATA.to_ipv6_mapped())),
    ("UDP by IPv6", || echo("[::]:0", METADATA_V6)),
    ("UDP, connected", || connected_echo("0.0.0.0:0", METADATA)),
    ("UDP by IPv6, connected", || connected_echo("[::]:0", METADATA_V6)),
];

#[track_caller]
fn assert_reaches(env: &TestEnv, cgroup: &Cgroup, user: u32) {
    for (name, call) in CALLS {
        poll_until(LONG, &format!("{name} of user {user}"), || run_as(env, cgroup, user, call).ok());
    }
}

#[track_caller]
fn assert_denied(env: &TestEnv, cgroup: &Cgroup, user: u32) {
    env.assert_nothing_arrives(|| {
        for (name, call) in CALLS {
            let error = run_as(env, cgroup, user, call).expect_err(name);
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name} of user {user}: {error}");
        }
    });
}

/// Reports whether the kernel does not let the packet program know the network namespace, which the skipped part needs.
fn lacks_packets(left_out: &str) -> bool {
    let lacks = KernelVersion::current().unwrap() < KernelVersion::new(6, 15, 0);
    if lacks {
        skip(left_out, "programs of cgroups do not see a socket's network namespace on this kernel");
    }
    lacks
}

#[test]
fn only_listed_users_reach_endpoints() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let cgroup = env.add_cgroup("user.slice");
    for user in [USER, OTHER_USER] {
        assert_reaches(&env, &cgroup, user);
    }
    let config = AWS.to_owned() + "\n" + &allow(&["uid:0", &uid(USER)]);
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&config).spawn_ready();
    for user in [0, USER] {
        assert_reaches(&env, &cgroup, user);
    }
    assert_denied(&env, &cgroup, OTHER_USER);
    // Other services are not restricted.
    poll_until(LONG, "another service", || {
        run_as(&env, &cgroup, OTHER_USER, || http(SERVICE).and_then(|()| echo("0.0.0.0:0", SERVICE))).ok()
    });
    let status = env.status();
    assert_eq!((status.state.as_str(), status.hooks.contains(&HOOK.to_owned())), ("enforcing", true));
    let NodeAllow { attached, allow, counts, .. } = status.node_allow.expect("node_allow is on");
    let entries = ["uid:0".to_owned(), uid(USER)].map(|process| NodeAllowEntry { process, active: true });
    assert_eq!((attached, allow), (true, entries.to_vec()));
    assert_eq!(counts.denied.packets, CALLS.len() as u64, "{counts:?}");
    assert!(counts.exempt.packets >= 2 * CALLS.len() as u64, "{counts:?}");
    drop(agent);
    assert_denied(&env, &cgroup, OTHER_USER);
    env.status().assert_lacks_only_an_agent();
    env.unload();
    for user in [USER, OTHER_USER] {
        assert_reaches(&env, &cgroup, user);
    }
}

#[test]
fn listed_cgroup_covers_descendants() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let listed = env.add_cgroup("system.slice/kubelet.service");
    let below = env.add_cgroup("system.slice/kubelet.service/a/b/c/d/e/f/g/h/i/j");
    let beside = env.add_cgroup("system.slice/kubelet.servic");
    let above = env.add_cgroup("system.slice");
    let config = AWS.to_owned() + "\n" + &allow(&[&entry(listed.path())]);
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    for cgroup in [&listed, &below] {
        assert_reaches(&env, cgroup, USER);
        assert_reaches(&env, cgroup, 0);
    }
    for cgroup in [&beside, &above] {
        assert_denied(&env, cgroup, USER);
        assert_denied(&env, cgroup, 0);
    }
    drop(agent);
    env.unload();
    assert_reaches(&env, &beside, USER);
}

/// systemd escapes characters of unit names, and the names of cgroups contain the escapes.
#[test]
fn unit_names_contain_escapes() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let listed = env.add_cgroup(r"foo\x2dbar.service");
    let other = env.add_cgroup("foo-bar.service");
    let list = allow(&[&entry(listed.path())]);
    // In double quotes, TOML would decode the escape.
    let agent = env.agent().hooks(&["from_pod"]).config(&list.replace('"', "'")).spawn_ready();
    assert!(reaches(&env, &listed, USER) && !reaches(&env, &other, USER));
    assert_eq!(node_allow(&env).allow, [NodeAllowEntry { process: entry(listed.path()), active: true }]);
    let status = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(status.contains(&format!("node allow {}\n", entry(listed.path()))), "{status}");
    drop(agent);
    env.unload();
}

#[test]
fn empty_list_denies_every_process() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("user.slice");
    assert!(reaches(&env, &cgroup, 0));
    let config = format!("on_deny_errno = 'EPERM'\n{}", allow(&[]));
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    for user in [0, USER] {
        env.assert_nothing_arrives(|| assert!(!reaches(&env, &cgroup, user)));
    }
    assert_eq!(node_allow(&env).allow, []);
    drop(agent);
    env.unload();
    assert!(reaches(&env, &cgroup, 0));
}

#[test]
fn broken_list_stays_closed_at_the_first_start() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("user.slice");
    let listed = uid(USER);
    for (entries, is_listed, left) in [
        (
            &[&*listed, "kubelet"][..],
            true,
            format!("only the valid entries of node.allow may reach the endpoints from the node: {listed}"),
        ),
        (
            &["kubelet"],
            false,
            "no process of the node may reach the endpoints, not even the kubelet".to_owned(),
        ),
    ] {
        let agent = env.agent().config(&allow(entries)).spawn();
        let status = env.status_when("the agent is ready", |status| status.agent.ready);
        assert_eq!(reaches(&env, &cgroup, USER), is_listed);
        assert!(!reaches(&env, &cgroup, OTHER_USER));
        let problem =
            status.problems.iter().find(|problem| problem.problem.contains("node.allow: \"kubelet\""));
        assert!(problem.is_some_and(|problem| problem.problem.contains(&left)), "{:?}", status.problems);
        agent.wait_for_log(&left, LONG);
        drop(agent);
        env.unload();
    }
}

#[test]
fn packets_of_unlisted_sockets_are_denied() {
    if skip_without_netns_cookie() || lacks_packets("the whole test") {
        return;
    }
    let env = TestEnv::new();
    let [listed, unlisted] = ["kubelet.service", "other.service"].map(|path| env.add_cgroup(path));
    let node = &*env.node;
    let open = |cgroup: &Cgroup| cgroup.run(|| node.run(|| connect(METADATA, LONG)).unwrap());
    let ping = |cgroup: &Cgroup, timeout| cgroup.run(|| icmp_echo(node, METADATA, timeout).is_answer());
    let [mut cut, mut spared] = [&unlisted, &listed].map(open);
    assert!(ping(&listed, LONG) && ping(&unlisted, LONG));

    let config = allow(&[&entry(listed.path())]);
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    env.assert_nothing_arrives(|| {
        assert!(http_exchange(&mut cut, SHORT).is_err());
        assert!(!ping(&unlisted, SHORT));
    });
    assert!(http_exchange(&mut spared, LONG).is_ok() && ping(&listed, LONG));
    let counts = node_allow(&env).counts;
    assert!(counts.denied.bytes > 0 && counts.exempt.bytes > 0, "{counts:?}");
    drop(agent);
    env.unload();
    assert!(ping(&unlisted, LONG));
}

#[test]
fn pods_keep_their_exemptions() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [exempt, other] = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let cgroup = env.add_cgroup("kubepods.slice/pod7.slice");
    // Pods with hostNetwork.
    let [host, other_host] = ["pod8.slice/a", "pod9.slice/a"].map(|path| env.add_cgroup(path));
    let rule = |name: &str, sender: &str| format!("[[exempt]]\nname = '{name}'\n{sender}\n");
    let config = [
        allow(&[&uid(USER)]),
        rule("pod", &format!("netns = '{}'", exempt.netns.path().display())),
        rule("host", &format!("cgroup = '{}'", host.path().display())),
    ];
    let agent = env.agent().hooks(&["from_pod", "node_egress", "socket"]).config(&config.concat());
    let agent = agent.spawn_ready();
    cgroup.run(|| {
        poll_until(LONG, "the pod to be exempt", || {
            http_get(&exempt.netns, METADATA, SHORT).is_answer().then_some(())
        });
        assert!(udp_echo(&exempt.netns, METADATA, LONG).is_answer());
        assert!(icmp_echo(&exempt.netns, METADATA, LONG).is_answer());
        env.assert_blocked(&other);
    });
    poll_until(LONG, "the pod with hostNetwork to be exempt", || reaches(&env, &host, 0).then_some(()));
    assert!(!reaches(&env, &other_host, 0) && reaches(&env, &other_host, USER));
    // Calls of pods with a network namespace of their own are not those of the node.
    let status = env.status();
    let denied = |counts: Counts| counts.denied.packets;
    let of_sockets = denied(status.sockets.as_ref().expect("socket is on").counts);
    let of_node = denied(status.node_allow.as_ref().expect("node_allow is on").counts);
    assert!(of_sockets > 0 && of_node >= 1, "{status:#?}");
    drop(agent);
    env.unload();
    assert!(reaches(&env, &other_host, 0));
}

#[test]
fn denials_name_process_and_cgroup() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).spawn_ready();
    assert!(!reaches(&env, &cgroup, USER));
    let report = poll_until(LONG, "the denial to be reported", || {
        let output = env.imds_agent(&["report", "-o", "json"]).output();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (!report["denials"].as_array().unwrap().is_empty()).then_some(report)
    });
    let denial = &report["denials"][0];
    assert_eq!((&denial["counts"][HOOK], &denial["verdict"]), (&1.into(), &"denied".into()), "{report}");
    assert_eq!(denial["cgroup"], entry(cgroup.path())["cgroup:/".len()..], "{report}");
    assert!(denial["comm"].is_string() && denial["namespace"].is_null(), "{report}");
    assert_eq!(node_allow(&env).counts.denied.packets, 1);
    drop(agent);
    env.unload();
}

#[test]
fn audit_counts_unlisted_processes() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let config = format!("mode = 'audit'\n{}", allow(&["uid:0"]));
    let _agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    poll_until(LONG, "a response", || reaches(&env, &cgroup, USER).then_some(()));
    poll_until(LONG, "a response", || reaches(&env, &cgroup, 0).then_some(()));
    let counts = node_allow(&env).counts;
    assert!(counts.audited.packets > 0 && counts.exempt.packets > 0, "{counts:?}");
    assert_eq!(counts.denied.packets, 0);
}

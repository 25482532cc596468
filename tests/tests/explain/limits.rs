//! Nodes on which denials cannot be explained: pods get what `on_deny = "reject"` gives.

use std::{fs, net::TcpListener, ops::RangeInclusive, time::Duration};

use imds_tests::{
    METADATA, Netns, Pod, PodLink, TestEnv, doctor,
    probe::{LONG, Outcome, http_get},
    skip_without_netns_cookie,
};

use crate::{HOOKS, IMDS, TOKEN, agent, assert_refused, explain, explained_pods, get, wait_explained};

/// Asserts that the packet hooks answer with a reset.
#[track_caller]
fn assert_reset(env: &TestEnv, pod: &Pod) {
    env.assert_nothing_arrives(|| {
        let outcome = env.in_cgroup(|| http_get(&pod.netns, METADATA, LONG));
        assert!(matches!(outcome, Outcome::Refused), "{outcome:?}");
    });
}

#[test]
fn without_the_socket_hook_packets_are_rejected() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = agent(&env, &explain("azure")).hooks(&["from_pod"]).spawn_ready();
    assert_reset(&env, &pod);
    let status = env.status();
    assert_eq!((status.state.as_str(), explained_pods(&status)), ("enforcing", 0), "{status:#?}");
    let text = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    let line = "on_deny    explain, answered as with \"reject\": hooks.socket is false\n";
    assert!(text.contains(line), "{text}");
    let report = doctor::doctor_report(&env);
    let check = doctor::one(&report, "on_deny");
    assert_eq!(check["state"], "ok", "{check}");
    doctor::assert_has(check, "observed", "hooks.socket is false");
}

#[test]
fn run_once_starts_no_broker() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let once = env.agent().config(&explain("azure")).hooks(HOOKS).once();
    assert!(once.status.success(), "{once:?}");
    assert_refused(&env, &pod.netns);
    let reason = env.status().explained.unwrap().reason;
    assert!(reason.is_some());
}

#[test]
fn missing_broker_is_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let command = env.agent().config(&explain("azure")).hooks(HOOKS);
    let problem = "denials are not explained: failed to start /nonexistent";
    let _agent = command.args(&["--broker", "/nonexistent"]).spawn();
    env.status_when("the missing broker is reported", |status| {
        status.problems.iter().any(|found| found.problem.contains(problem))
    });
    assert_refused(&env, &pod.netns);
}

#[test]
fn audit_mode_explains_nothing() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = agent(&env, &format!("mode = 'audit'\n{}", explain("azure"))).spawn_ready();
    std::thread::sleep(Duration::from_secs(2));
    assert!(get(&env, &pod.netns, IMDS, TOKEN).unwrap().starts_with("HTTP/1.1 200 "));
    assert_eq!(explained_pods(&env.status()), 0);
}

/// Other endpoints may have another protocol at port 80.
#[test]
fn only_metadata_services_are_explained() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = format!("{}[[endpoint]]\nname = 'vault'\naddress = '198.51.100.10'\n", explain("azure"));
    let _agent = agent(&env, &config).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    for address in ["198.51.100.10:80", "168.63.129.16:80"] {
        let error = get(&env, &pod.netns, address.parse().unwrap(), TOKEN).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{address}: {error}");
    }
}

/// Any pod may set its range of ports.
#[test]
fn pod_without_free_ports() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [pod, full] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let occupy = |netns: &Netns, ports: RangeInclusive<u16>| {
        netns.run(|| ports.map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap()).collect::<Vec<_>>())
    };
    let narrow = |netns: &Netns, range: &str| {
        netns.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)).unwrap();
    };
    narrow(&pod.netns, "40000 40000");
    let _one = occupy(&pod.netns, 40_000..=40_000);
    narrow(&full.netns, "65000 65535");
    let _all = occupy(&full.netns, 65_000..=65_535);
    let _agent = agent(&env, &explain("azure")).spawn_ready();
    env.status_when("the listener is open", |status| explained_pods(status) == 1);
    narrow(&pod.netns, "40000 40099");
    wait_explained(&env, &pod.netns, IMDS);
    assert_refused(&env, &full.netns);
    let status = env.status();
    assert_eq!((status.state.as_str(), explained_pods(&status)), ("enforcing", 1), "{status:#?}");
}

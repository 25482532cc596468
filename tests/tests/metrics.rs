//! Metrics and health endpoints, as a monitoring system requests them.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::Path,
};

use imds_tests::{
    AttachMode, METADATA, PodLink, TestEnv,
    flood::Flood,
    foreign_bpf::detach_link,
    http::{DEFAULT, exchange, try_get},
    known_here,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_tcx,
};

const DENIED: &str = r#"imds_agent_packets_total{hook="from_pod",verdict="denied"}"#;

#[track_caller]
fn get(env: &TestEnv, path: &str) -> (u16, String) {
    try_get(env, DEFAULT, path).unwrap()
}

/// Returns the value of a time series.
#[track_caller]
fn value(metrics: &str, series: &str) -> f64 {
    let found = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {series} in:\n{metrics}"))
}

#[test]
fn counters_and_config_are_served() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert!(try_get(&env, DEFAULT, "/healthz").is_err(), "no agent serves yet");
    assert!(http_get(&pod.netns, METADATA, LONG).is_answer());
    let agent = env.agent().spawn_ready();
    poll_until(LONG, "metrics to be served", || try_get(&env, DEFAULT, "/healthz").ok());
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(&env, path), (200, "ok\n".to_owned()), "{path}");
    }
    let (status, before) = get(&env, "/metrics");
    assert_eq!(status, 200);
    for (series, expected) in [
        (DENIED, 0.0),
        (r#"imds_agent_mode{mode="enforce"}"#, 1.0),
        (r#"imds_agent_mode{mode="audit"}"#, 0.0),
        // Two interfaces: the pod's, and the uplink, which is a veth too.
        (r#"imds_agent_interfaces{hook="from_pod",state="enforced"}"#, 2.0),
        (r#"imds_agent_interfaces{hook="from_pod",state="unenforced"}"#, 0.0),
        ("imds_agent_ready", 1.0),
        ("imds_agent_problems", 0.0),
        ("imds_agent_endpoints", 1.0),
        ("imds_agent_config_last_reload_successful", 1.0),
        (r#"imds_agent_config_reloads_total{result="succeeded"}"#, 0.0),
    ] {
        assert!((value(&before, series) - expected).abs() < f64::EPSILON, "{series}:\n{before}");
    }
    assert!(before.contains("imds_agent_build_info{version="), "{before}");
    let [tcx, clsact] = ["tcx", "clsact"].map(|backend| {
        value(&before, &format!(r#"imds_agent_attachments{{hook="from_pod",backend="{backend}"}}"#))
    });
    assert!((tcx + clsact - 2.0).abs() < f64::EPSILON, "{before}");

    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    let after = get(&env, "/metrics").1;
    let total = env.status().total.denied;
    assert!(value(&after, DENIED) > 0.0, "{after}");
    assert!(value(&after, r#"imds_agent_bytes_total{hook="from_pod",verdict="denied"}"#) > 0.0, "{after}");
    #[expect(clippy::cast_precision_loss, reason = "they are few")]
    let total = total.packets as f64;
    assert!(value(&after, DENIED) <= total);

    // Counts of a deleted interface stay.
    pod.delete();
    env.status_when("the pod is deleted", |status| status.interfaces.iter().all(|one| one.role != "pod"));
    assert!(value(&get(&env, "/metrics").1, DENIED) >= value(&after, DENIED));
    drop(agent);
    env.unload();
}

#[test]
fn every_packet_has_an_event_or_is_counted() {
    let env = TestEnv::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let agent = env.agent().hooks(&known_here(&["from_pod", "node_egress", "socket"])).spawn_ready();
    let flood = Flood::udp(&pods[0], METADATA);
    for _ in 0..100 {
        assert!(!env.in_cgroup(|| http_get(&pods[1].netns, METADATA, SHORT)).is_answer());
    }
    assert!(flood.stop() > 100);
    let series = |metrics: &str, prefix: &str| -> f64 {
        let values = metrics.lines().filter_map(|line| line.strip_prefix(prefix)?.rsplit_once(' '));
        values.map(|(_, value)| value.parse::<f64>().unwrap()).sum()
    };
    let is_accounted_for = || {
        let metrics = get(&env, "/metrics").1;
        let names =
            ["imds_agent_events_total", "imds_agent_events_suppressed_total", "imds_agent_events_pending"];
        let sum: f64 = names.iter().map(|name| value(&metrics, name)).sum();
        let counted = series(&metrics, "imds_agent_packets_total");
        assert!(value(&metrics, "imds_agent_events_pending") > 0.0, "{metrics}");
        ((sum - counted).abs() < 0.5 && counted > 200.0).then_some(())
    };
    poll_until(LONG, "each packet to be accounted for", is_accounted_for);
    for pod in pods {
        pod.delete();
    }
    env.status_when("the pods are deleted", |status| status.interfaces.iter().all(|one| one.role != "pod"));
    poll_until(LONG, "each packet to be accounted for", is_accounted_for);
    drop(agent);
    env.unload();
}

#[test]
fn not_ready_without_any_attachment() {
    let env = TestEnv::new();
    let config = "[interfaces]\nexclude = ['*']";
    let _agent = env.agent().config(config).hooks(&["node_egress"]).spawn();
    let status = env.status_when("the agent is ready", |status| status.agent.ready);
    assert_eq!(status.state, "degraded");
    assert!(status.problems[0].problem.contains("no enabled hook is attached"), "{:?}", status.problems);
    let (code, why) = poll_until(LONG, "readiness", || try_get(&env, DEFAULT, "/readyz").ok());
    assert!(code == 503 && why.contains("no enabled hook is attached"), "{code}: {why}");
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
}

#[test]
fn not_ready_while_a_pod_is_not_enforced() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().backend(AttachMode::Tcx).resync(3600).spawn_ready();
    poll_until(LONG, "metrics to be served", || try_get(&env, DEFAULT, "/healthz").ok());
    assert_eq!(get(&env, "/readyz").0, 200);
    // An event of the pod's link, or its queued attachment, lets the agent attach the program again at once.
    let metrics = poll_until(LONG, "the pod to be reported as not enforced", || {
        detach_link(&env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex)));
        let (status, why) = get(&env, "/readyz");
        let metrics = get(&env, "/metrics").1;
        let unenforced = value(&metrics, r#"imds_agent_interfaces{hook="from_pod",state="unenforced"}"#);
        (status == 503 && why.contains(&pod.host_ifname) && unenforced > 0.0).then_some(metrics)
    });
    assert!(value(&metrics, "imds_agent_ready").abs() < f64::EPSILON, "{metrics}");
    // The agent is still healthy.
    assert_eq!(get(&env, "/healthz").0, 200);
    agent.hang_up();
    poll_until(LONG, "the agent to be ready again", || (get(&env, "/readyz").0 == 200).then_some(()));
    // The agent publishes the number after the reload, the kernel's state is read at each request.
    poll_until(LONG, "the reload to be counted", || {
        let metrics = get(&env, "/metrics").1;
        (value(&metrics, r#"imds_agent_config_reloads_total{result="succeeded"}"#) > 0.0).then_some(())
    });
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn reload_changes_the_listen_address() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let (file, socket) = (env.scratch_dir().join("imds.toml"), env.scratch_dir().join("metrics.sock"));
    let write = |listen: &str| {
        let hooks = "[hooks]\nsocket = false\nnode_egress = false\n";
        std::fs::write(&file, format!("{hooks}[metrics]\nlisten = [{listen}]\n")).unwrap();
    };
    let at_socket = |path: &Path| exchange(UnixStream::connect(path)?, "/readyz");
    write(&format!("\"{}\"", socket.display()));
    let start = || env.imds_agent(&["run"]).config_file(file.to_str().unwrap()).spawn_ready();
    let agent = start();
    poll_until(LONG, "the Unix socket to be served", || at_socket(&socket).ok());
    assert_eq!(at_socket(&socket).unwrap().0, 200);
    assert!(try_get(&env, DEFAULT, "/readyz").is_err());
    // A killed agent leaves its socket, which the next one replaces.
    drop(agent);
    assert!(socket.metadata().unwrap().file_type().is_socket());
    let agent = start();
    poll_until(LONG, "the Unix socket to be served again", || at_socket(&socket).ok());

    // An address that the node does not have neither stops the agent nor reduces enforcement.
    write("\"127.0.0.1:9300\", \"192.0.2.1:9300\"");
    poll_until(LONG, "the other address to be served", || {
        try_get(&env, "127.0.0.1:9300", "/readyz").is_ok_and(|(status, _)| status == 200).then_some(())
    });
    assert!(at_socket(&socket).is_err() && !socket.exists());
    agent.wait_for_log("failed to serve metrics and health at 192.0.2.1:9300", LONG);
    env.assert_blocked(&pod);
    write("");
    poll_until(LONG, "nothing to be served", || try_get(&env, "127.0.0.1:9300", "/").is_err().then_some(()));
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn bad_requests_do_not_block_others() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    poll_until(LONG, "metrics to be served", || try_get(&env, DEFAULT, "/healthz").ok());
    let connect = || env.node.run(|| TcpStream::connect(DEFAULT)).unwrap();
    // More silent connections than the server accepts concurrently. Each one is closed after its timeout.
    let silent: Vec<_> = (0..20).map(|_| connect()).collect();
    poll_until(LONG * 4, "others to be served", || try_get(&env, DEFAULT, "/healthz").ok());
    drop(silent);
    for nonsense in [
        b"GET /metrics HTTP/1.1\r\n".repeat(10_000),
        [b"GET /".to_vec(), b"x".repeat(100_000)].concat(),
        b"\0\xff\r\n\r\n".to_vec(),
        b"POST /metrics HTTP/1.1\r\nHost: node\r\nContent-Length: 9999999999\r\n\r\n".to_vec(),
    ] {
        let mut stream = connect();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let _ = stream.write_all(&nonsense);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(get(&env, "/healthz").0, 200);
    }
    for (path, expected) in [("/", 404), ("/metrics/", 404), ("/healthz?verbose", 200)] {
        assert_eq!(get(&env, path).0, expected, "{path}");
    }
    env.assert_blocked(&pod);
    assert!(agent.terminate().success());
    env.unload();
}

//! Events of denied packets and calls. Their sum must match the counters.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use imds_tests::{
    METADATA, PacketSocket, Pod, PodLink, TestEnv, packets,
    poll::poll_until,
    probe::{LONG, SHORT, connect, http_get, icmp_echo},
    skip_without_netns_cookie,
};
use serde_json::Value;

/// A running `imds-agent events -o json`. Dropping it ends the process.
struct Follower {
    child: Child,
    events: Receiver<Value>,
}

impl Follower {
    fn start(env: &TestEnv) -> Self {
        let mut command = env.imds_agent(&["events", "-o", "json"]).command();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self { child, events }
    }

    /// Returns the next event, which must arrive within the time limit.
    fn next(&self) -> Value {
        self.events.recv_timeout(LONG).expect("an event")
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(pod: &Pod, count: usize) {
    let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
    let frame = packets::frame(pod, &packets::syn(pod.address, METADATA, 40_000, 1));
    for _ in 0..count {
        socket.send(&frame).unwrap();
    }
}

#[test]
fn packet_event_names_sender_and_place() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    for (hook, interface) in [("from_pod", pod.host_ifname.as_str()), ("node_egress", TestEnv::UPLINK)] {
        let agent = env.agent().hooks(&[hook]).spawn_ready();
        let follower = Follower::start(&env);
        send(&pod, 1);
        let event = follower.next();
        let is = |field: &str, value: Value| assert_eq!(event[field], value, "{field} of {event}");
        is("hook", hook.into());
        is("verdict", "denied".into());
        is("interface", interface.into());
        is("source", pod.address.to_string().into());
        is("source_port", 40_000.into());
        is("destination", METADATA.to_string().into());
        is("destination_port", 80.into());
        is("protocol", "tcp".into());
        is("pid", Value::Null);
        is("suppressed", 0.into());
        is("bytes", env.status().total.denied.bytes.into());
        drop((follower, agent));
        env.unload();
    }
}

#[test]
fn call_event_names_the_process() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let agent = env.agent().hooks(&["socket"]).spawn_ready();
    // No client is subscribed yet: the event waits for the first one.
    assert!(env.in_cgroup(|| !http_get(&pod.netns, METADATA, SHORT).is_answer()));
    agent.kill9();
    let follower = Follower::start(&env);
    let event = follower.next();
    assert_eq!(
        (event["hook"].as_str(), event["verdict"].as_str()),
        (Some("socket"), Some("denied")),
        "{event}"
    );
    assert_eq!(event["pid"], std::process::id(), "{event}");
    assert!(
        event["comm"].is_string() && event["cgroup"].is_u64() && event["netns_cookie"].is_u64(),
        "{event}"
    );
    assert_eq!((&event["destination_port"], &event["protocol"]), (&80.into(), &"tcp".into()), "{event}");
}

#[test]
fn host_network_event_names_the_cgroup() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup("kubepods.slice/pod7.slice");
    let agent = env.agent().hooks(&["host_network"]).spawn_ready();
    let follower = Follower::start(&env);
    let next_event = |protocol: &str| {
        let event = follower.next();
        let found = ["hook", "verdict", "protocol"].map(|field| event[field].as_str().unwrap());
        assert_eq!(found, ["host_network", "denied", protocol], "{event}");
        assert_eq!(event["cgroup"], container.id(), "{event}");
        event
    };
    assert!(container.run(|| !http_get(&env.node, METADATA, SHORT).is_answer()));
    let event = next_event("tcp");
    assert_eq!((&event["pid"], &event["interface"]), (&std::process::id().into(), &Value::Null), "{event}");
    assert!(event["comm"].is_string(), "{event}");
    assert!(container.run(|| !icmp_echo(&env.node, METADATA, SHORT).is_answer()));
    let event = next_event("icmp");
    let found = ["source", "interface"].map(|field| event[field].as_str().unwrap());
    assert_eq!(found, [env.node_address().to_string().as_str(), TestEnv::UPLINK], "{event}");
    drop((follower, agent));
    env.unload();
    assert!(container.run(|| icmp_echo(&env.node, METADATA, LONG).is_answer()));
}

#[test]
fn flood_events_add_up() {
    const FLOOD: usize = 5_000;
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().spawn_ready();
    let follower = Follower::start(&env);
    send(&pod, FLOOD);

    let (mut lines, mut sum, mut bytes) = (0, 0, 0);
    while sum < FLOOD as u64 {
        // Sends single packets, so that each CPU with pending events emits them in a later rate-limit window.
        if let Ok(event) = follower.events.recv_timeout(Duration::from_millis(300)) {
            lines += 1;
            sum += 1 + event["suppressed"].as_u64().unwrap();
            bytes += event["bytes"].as_u64().unwrap();
        } else {
            assert!(lines < 1_000, "{lines} lines for {sum} packets");
            send(&pod, 1);
        }
    }
    let denied = env.status().total.denied;
    assert!(sum <= denied.packets, "{sum} reported of {denied:?}");
    // All packets have the same size.
    assert_eq!(bytes * denied.packets, sum * denied.bytes);
    assert!(lines < FLOOD / 10, "{lines} lines");
}

#[test]
fn every_subscriber_gets_all_events() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    let [first, second] = [Follower::start(&env), Follower::start(&env)];
    let assert_all_receive = |followers: &[&Follower]| {
        for follower in followers {
            // A new subscriber does not receive events that others have received before.
            let event = poll_until(LONG, "an event", || {
                send(&pod, 1);
                follower.events.recv_timeout(Duration::from_millis(300)).ok()
            });
            assert_eq!(event["interface"], pod.host_ifname);
        }
    };
    assert_all_receive(&[&first, &second]);
    agent.kill9();
    assert_all_receive(&[&first, &second]);
    // The remaining subscriber takes over reading the ring buffer, whichever one did before.
    drop(first);
    assert_all_receive(&[&second]);
    let third = Follower::start(&env);
    assert_all_receive(&[&second, &third]);
    drop(second);
    assert_all_receive(&[&third]);
    let agent = env.agent().spawn_ready();
    assert_all_receive(&[&third]);
    drop((third, agent));
    env.unload();
}

#[test]
fn events_fail_without_agent() {
    let env = TestEnv::new();
    let output = env.imds_agent(&["events"]).output();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is loaded"));
}

#[test]
fn requests_that_pass_are_shown() {
    const SECRETS: [&str; 2] = ["q3ry", "t0k3n"];
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().config("mode = 'audit'\nprovider = 'aws'").hooks(&["from_pod"]).spawn_ready();
    let follower = Follower::start(&env);
    let exchange = |request: &str| {
        let mut stream = pod.netns.run(|| connect(METADATA, LONG)).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    };
    for (request, method, path, version) in [
        ("GET /latest/a?q3ry HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/latest/a", 1),
        ("GET /latest/b HTTP/1.1\r\nx-aws-ec2-metadata-token: t0k3n\r\n\r\n", "GET", "/latest/b", 2),
        ("PUT /latest/api/token HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "PUT", "/latest/api/token", 2),
    ] {
        exchange(request);
        let shown = loop {
            let event = follower.next();
            let text = event.to_string();
            assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{text}");
            if event["http"].is_object() {
                break event;
            }
        };
        let is = |field: &str, value: Value| assert_eq!(shown[field], value, "{field} of {shown}");
        is("hook", "from_pod".into());
        is("verdict", "audited".into());
        is("interface", pod.host_ifname.as_str().into());
        is("destination", METADATA.to_string().into());
        is("destination_port", 80.into());
        let http = &shown["http"];
        assert_eq!((&http["method"], &http["path"]), (&method.into(), &path.into()));
        assert_eq!((&http["imds_version"], &http["outcome"]), (&version.into(), &"audited".into()));
    }
    // The agent adds a request to the report after it has shown it.
    let report = poll_until(LONG, "three requests in the report", || {
        let report = env.imds_agent(&["report", "-o", "json"]).output();
        let report: Value = serde_json::from_slice(&report.stdout).unwrap();
        (report["requests"].as_array().unwrap().len() >= 3).then_some(report)
    });
    let mut requests: Vec<_> =
        report["requests"].as_array().unwrap().iter().map(|request| &request["path"]).collect();
    requests.sort_by_key(ToString::to_string);
    assert_eq!(requests, ["/latest/a", "/latest/api/token", "/latest/b"], "{report}");
    drop(agent);
}

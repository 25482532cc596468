//! OpenTelemetry logs over HTTP.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
    process::Stdio,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use imds_tests::{
    PodLink, TestEnv, WHOLE_TEST, certificate::SelfSigned, lacks_program, poll::poll_until, probe::LONG,
};

use crate::{
    otlp_receiver::{Answer, OtlpReceiver, attribute},
    send, sink, sink_errors, sink_records, sinks, wait_failing, wait_working,
};

#[test]
fn logs_have_attributes_and_headers() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let receiver = OtlpReceiver::start(&env, 0, Vec::new());
    let secret = env.scratch_dir().join("authorization");
    fs::write(&secret, "Bearer s3cret\n").unwrap();
    let key = env.scratch_dir().join("key");
    fs::write(&key, "k3y").unwrap();
    let keys = format!(
        "{}, headers = {{ x-tenant = 'nodes' }}, header_files = {{ authorization = '{}', x-api-key = '{}' }}",
        sink("otlp", "url", receiver.url()),
        secret.display(),
        key.display()
    );
    let agent = env.agent().config(&sinks(&[keys])).spawn_ready();
    send(&pod, [40_000, 40_001]);
    let request = receiver.next();
    assert_eq!((request.target.as_str(), request.ports()), ("/v1/logs", vec![40_000, 40_001]));
    let lines = [
        "content-type: application/json",
        "x-tenant: nodes",
        "authorization: Bearer s3cret",
        "x-api-key: k3y",
    ];
    for line in lines {
        assert!(request.has_header(line), "{line} in {:?}", request.headers);
    }
    let resource = &request.body["resourceLogs"][0]["resource"]["attributes"];
    assert_eq!(attribute(resource, "service.name").unwrap(), "imds-agent");
    assert!(attribute(resource, "host.name").is_some() && attribute(resource, "k8s.node.name").is_none());
    let log = &request.logs()[0];
    let nanoseconds: u128 = log["timeUnixNano"].as_str().unwrap().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    assert!(now.abs_diff(nanoseconds) < 60_000_000_000, "{log}");
    assert_eq!((&log["severityText"], &log["eventName"]), (&"WARN".into(), &"imds_agent.denial".into()));
    assert_eq!(attribute(&log["attributes"], "imds_agent.endpoint").unwrap(), "imds");

    // A rotated secret is used at once.
    fs::write(&secret, "Bearer other\n").unwrap();
    send(&pod, [40_002]);
    let request = receiver.next();
    assert!(request.has_header("authorization: Bearer other"), "{:?}", request.headers);
    drop(agent);
    env.unload();
}

#[test]
fn temporary_errors_are_retried() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let partial = r#"{"partialSuccess":{"rejectedLogRecords":"1","errorMessage":"too old"}}"#;
    let answers = vec![
        Answer::Response("503 Service Unavailable", "Retry-After: 1\r\n", "busy"),
        Answer::Response("429 Too Many Requests", "", ""),
        Answer::Response("200 OK", "", "{}"),
        Answer::Response("400 Bad Request", "", "no such\ntenant at /v1/logs"),
        Answer::Response("200 OK", "", partial),
    ];
    let receiver = OtlpReceiver::start(&env, 0, answers);
    let name = format!("otlp:http://{}", receiver.address);
    let agent = env.agent().config(&sinks(&[sink("otlp", "url", receiver.url())])).spawn_ready();
    send(&pod, [40_000]);
    assert_eq!(receiver.next().ports(), [40_000]);
    let first = Instant::now();
    for _ in 0..2 {
        assert_eq!(receiver.next().ports(), [40_000]);
    }
    assert!(first.elapsed() > Duration::from_secs(1));
    wait_working(&env);
    let counts = || ["written", "dropped", "failed"].map(|result| sink_records(&env, &name, result));
    poll_until(LONG, "the record to be counted", || (counts() == [1, 0, 0]).then_some(()));

    send(&pod, [40_001]);
    assert_eq!(receiver.next().ports(), [40_001]);
    wait_failing(&env, r"response 400 Bad Request: no such\ntenant at PATH");
    assert_eq!(counts(), [1, 0, 1]);
    send(&pod, [40_002]);
    receiver.next();
    wait_failing(&env, "1 records were rejected: too old");
    send(&pod, [40_003]);
    assert_eq!(receiver.next().ports(), [40_003]);
    wait_working(&env);
    assert_eq!(counts(), [2, 0, 2]);
    drop(agent);
    env.unload();
}

#[test]
fn dead_receiver_gets_the_records_later() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let origin = "http://127.0.0.1:4318";
    let url = format!("{origin}/v1/s3cret");
    let agent = env.agent().config(&sinks(&[sink("otlp", "url", url)])).spawn_ready();
    send(&pod, [40_000]);
    wait_failing(&env, "Connection refused");
    let status = env.imds_agent(&["status"]).output();
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.contains(&format!("\nsinks      otlp:{origin} (failing: ")), "{text}");
    assert_eq!(env.metric(&format!("imds_agent_sink_failing{{sink=\"otlp:{origin}\"}}")), 1);
    agent.wait_for_log(origin, LONG);
    let lines = agent.log_lines().iter().filter(|(_, line)| line.contains(origin)).count();
    assert_eq!(lines, 1, "{}", agent.log());
    // Only the configuration has the path, which may be secret.
    assert!(!text.contains("s3cret") && !agent.log().contains("s3cret"), "{text}{}", agent.log());
    let receiver = OtlpReceiver::start(&env, 4318, Vec::new());
    assert_eq!(receiver.next().ports(), [40_000]);
    wait_working(&env);
    drop(agent);
    // Without an agent, no sink works or fails.
    let output = env.imds_agent(&["status", "-o", "json"]).output();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["sinks"], serde_json::json!([]));
    env.unload();
}

#[test]
fn silent_receiver_delays_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let receiver = OtlpReceiver::start(&env, 0, vec![Answer::Silence]);
    let path = env.scratch_dir().join("denials.jsonl");
    let config = sinks(&[sink("otlp", "url", receiver.url()), crate::file_sink(&path)]);
    let agent = env.agent().config(&config).spawn_ready();
    send(&pod, [40_000]);
    assert_eq!(receiver.next().ports(), [40_000]);
    let start = Instant::now();
    send(&pod, [40_001]);
    crate::wait_records(&path, 2);
    assert_eq!(env.metric("imds_agent_ready"), 1);
    let late = env.add_pod(PodLink::Routed);
    env.wait_enforced(&late);
    env.assert_blocked(&late);
    assert_eq!(sink_errors(&env)[1].1, None);
    // The agent does not wait for the answer when it ends.
    assert!(agent.terminate().success());
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    env.unload();
}

#[test]
fn certificate_of_the_receiver_is_verified() {
    if lacks_program(WHOLE_TEST, &["openssl"]) {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let SelfSigned { certificate, key } = SelfSigned::create(env.scratch_dir());
    let free = env.node.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap().local_addr().unwrap();
    let mut server = env
        .node
        .command("openssl")
        .args(["s_server", "-quiet", "-accept", &free.to_string(), "-key"])
        .args([key.as_os_str(), "-cert".as_ref(), certificate.as_os_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let url = format!("https://{free}/v1/logs");
    let path = env.scratch_dir().join("imds.toml");
    let write = |keys: &str| {
        let hooks = "[hooks]\nsocket = false\nnode_egress = false\n";
        let new = path.with_extension("new");
        fs::write(&new, format!("{hooks}{}", sinks(&[sink("otlp", "url", &url) + keys]))).unwrap();
        fs::rename(new, &path).unwrap();
    };
    write("");
    let agent = env.imds_agent(&["run"]).config_file(path.to_str().unwrap()).spawn_ready();
    send(&pod, [40_000]);
    // No authority of the system has signed the certificate; a machine may also have no authorities at all.
    wait_failing(&env, "ertificate");

    write(&format!(", ca_file = '{}'", certificate.display()));
    // The configuration is effective before the telemetry thread has its sinks. A new sink has no error.
    let failing = format!("imds_agent_sink_failing{{sink=\"otlp:https://{free}\"}}");
    poll_until(LONG, "the new sink", || (env.metric(&failing) == 0).then_some(()));
    send(&pod, [40_001]);
    let (mut output, text) = (server.stdout.take().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let of_thread = Arc::clone(&text);
    let reader = thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            of_thread.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
    });
    poll_until(LONG, "a request", || {
        let text = String::from_utf8_lossy(&text.lock().unwrap()).into_owned();
        (text.contains("POST /v1/logs") && text.contains("\"40001\"") && text.ends_with("]}")).then_some(())
    });
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    server.stdin.as_mut().unwrap().write_all(answer).unwrap();
    wait_working(&env);
    server.kill().unwrap();
    server.wait().unwrap();
    reader.join().unwrap();
    drop(agent);
    env.unload();
}

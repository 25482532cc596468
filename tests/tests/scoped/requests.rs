//! Requests that the broker answered, in `events`, in sinks and in `report`.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Stdio,
    time::Duration,
};

use imds_tests::{
    Netns, PodLink, TestCluster, TestEnv,
    api_server::pod,
    kubelet::{Driver, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT},
    skip_without_netns_cookie,
};
use serde_json::Value;

use crate::{IMDS, agent, scoped, start};

const RULE: &str = "namespace = 'kube-system'\nservice_account = 'agent'";
/// Request that `instance` stands for at AWS.
const INSTANCE_ID: &str = "/latest/meta-data/instance-id";
const USER_DATA: &str = "/latest/user-data";
const TOKEN: &str = "X-aws-ec2-metadata-token: secret\r\n";

/// Sends a request with these headers. Returns the start of the response.
fn get(env: &TestEnv, netns: &Netns, path: &str, headers: &str) -> Option<String> {
    env.in_cgroup(|| {
        netns.run(|| {
            let mut stream = TcpStream::connect_timeout(&IMDS, SHORT).ok()?;
            stream.set_read_timeout(Some(LONG)).ok()?;
            let head = format!("GET {path} HTTP/1.1\r\nHost: metadata\r\n{headers}Connection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).ok()?;
            let mut start = [0; 12];
            stream.read_exact(&mut start).ok()?;
            String::from_utf8(start.to_vec()).ok()
        })
    })
}

fn output(env: &TestEnv, args: &[&str]) -> String {
    let output = env.imds_agent(args).output();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Returns the events or records of requests.
fn with_request(events: &str) -> Vec<Value> {
    lines(events).into_iter().filter(|event| !event["http"].is_null()).collect()
}

/// Returns the events of requests.
fn requests(env: &TestEnv, args: &[&str]) -> Vec<Value> {
    with_request(&output(env, &[&["events", "-o", "json", "--no-follow"], args].concat()))
}

/// Waits for events or records of all requests: the broker reports each after its end, perhaps in another order.
#[track_caller]
fn wait_requests(what: &str, read: impl Fn() -> Vec<Value>) -> Vec<Value> {
    let found = poll_until(LONG, what, || {
        let all = read();
        (summary(all.iter().map(|one| &one["http"])).len() >= EXPECTED.len()).then_some(all)
    });
    assert_eq!(summary(found.iter().map(|one| &one["http"])), EXPECTED);
    found
}

/// Returns the whole lines of a file that another process writes; nothing if there is no file yet.
fn whole_lines(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect()
}

/// Returns path, version and outcome of requests, sorted and without repetition.
fn summary<'v>(requests: impl IntoIterator<Item = &'v Value>) -> Vec<(&'v str, u64, &'v str)> {
    let text = |value: &'v Value| value.as_str().unwrap();
    let summary = |request: &'v Value| {
        (text(&request["path"]), request["imds_version"].as_u64().unwrap(), text(&request["outcome"]))
    };
    let mut all: Vec<_> = requests.into_iter().map(summary).collect();
    all.sort_unstable();
    all.dedup();
    all
}

const EXPECTED: [(&str, u64, &str); 3] =
    [(INSTANCE_ID, 1, "allowed"), (INSTANCE_ID, 2, "allowed"), (USER_DATA, 1, "refused")];

#[test]
fn requests_are_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let cluster = TestCluster::new();
    let env = &cluster.env;
    let [records, printed] = ["records.jsonl", "printed"].map(|name| env.scratch_dir().join(name));
    let sink = format!("sinks = [{{ type = 'file', path = '{}' }}]", records.display());
    let config = format!(
        "provider = 'aws'\n{}[events]\nverdicts = ['denied', 'allowed']\n{sink}\n",
        cluster.config(&scoped(RULE, "instance"))
    );
    let running = agent(env, &config).spawn_ready();
    let mut follower = env.imds_agent(&["events", "-o", "json"]).command();
    let follower = follower.stdin(Stdio::null()).stdout(File::create(&printed).unwrap()).spawn();
    let mut follower = follower.unwrap();
    let uid = new_uid();
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    let sandbox = env.add_pod(PodLink::Routed);
    cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "agent", &[]));
    cgroup.start_in(&sandbox.netns);
    let answer = |path: &str, headers: &str| get(env, &sandbox.netns, path, headers);
    poll_until(LONG, "an answer", || answer(INSTANCE_ID, "").filter(|start| start == "HTTP/1.1 200"));
    assert_eq!(answer(INSTANCE_ID, TOKEN).as_deref(), Some("HTTP/1.1 200"));
    assert_eq!(answer(USER_DATA, "").as_deref(), Some("HTTP/1.1 403"));

    let events = wait_requests("events of requests", || requests(env, &["--since", "1h"]));
    let refused = events.iter().find(|event| event["verdict"] == "denied").unwrap();
    let name = format!("pod-{uid}");
    assert_eq!((&refused["pod"]["namespace"], &refused["pod"]["pod"]), (&"kube-system".into(), &name.into()));
    assert_eq!((&refused["hook"], &refused["rule"]), (&"broker".into(), &"region".into()));
    assert_eq!(
        (&refused["destination"], &refused["destination_port"]),
        (&"169.254.169.254".into(), &80.into())
    );
    assert_eq!((&refused["http"]["method"], &refused["http"]["status"]), (&"GET".into(), &403.into()));
    assert!(refused["netns_cookie"].as_u64().is_some_and(|cookie| cookie > 0), "{refused}");
    let text = output(env, &["events", "--no-follow", "--since", "1h"]);
    let expected =
        format!("kube-system/pod-{uid} -> 169.254.169.254:80 refused GET {USER_DATA} (IMDSv1, status 403");
    assert!(text.contains(&expected) && !text.contains("secret"), "{text}");
    wait_requests("events of the follower", || with_request(&whole_lines(&printed)));
    follower.kill().unwrap();
    follower.wait().unwrap();
    // The follower has read all requests.
    assert_eq!(requests(env, &[]), Vec::<Value>::new());

    let of_requests = wait_requests("records of the sink", || with_request(&whole_lines(&records)));
    let recorded = whole_lines(&records);
    assert!(!recorded.contains("secret"), "{recorded}");
    let refused = of_requests.iter().find(|record| record["verdict"] == "denied").unwrap();
    assert_eq!((&refused["pod"]["service_account"], &refused["rule"]), (&"agent".into(), &"region".into()));

    // The report needs no agent.
    assert!(running.terminate().success());
    let report: Value = serde_json::from_str(&output(env, &["report", "-o", "json"])).unwrap();
    let reported = report["requests"].as_array().unwrap();
    assert_eq!(summary(reported), EXPECTED);
    assert_eq!(
        (&reported[0]["namespace"], &reported[0]["service_account"]),
        (&"kube-system".into(), &"agent".into())
    );
    let text = output(env, &["report"]);
    assert!(text.contains("\nrequests without a session token (IMDSv1): kube-system/agent\n"), "{text}");
    let has_header =
        |line: &str| line.split_whitespace().eq("SENDER ENDPOINT REQUEST IMDS OUTCOME COUNT LAST".split(' '));
    assert!(text.lines().any(has_header), "{text}");
    let rules = output(env, &["report", "--rules"]);
    let expected = format!(
        "# left out, because it may grant credentials or identity: GET {USER_DATA}\n[[exempt]]\nname = \"kube-system-agent\"\n\
         namespace = \"kube-system\"\nservice_account = \"agent\"\nendpoints = [\"imds\"]\n\
         allow = [\"GET {INSTANCE_ID}\"]\n"
    );
    assert!(rules.contains(&expected), "{rules}");
    let file = env.scratch_dir().join("proposed.toml");
    fs::write(&file, format!("provider = 'aws'\n{rules}")).unwrap();
    let mut check = std::process::Command::new(env.imds_agent(&[]).command().get_program());
    let check = check.args(["config", "check"]).arg(&file).output().unwrap();
    assert!(check.status.success(), "{check:?}");
    output(env, &["report", "--reset"]);
    let report: Value = serde_json::from_str(&output(env, &["report", "-o", "json"])).unwrap();
    assert_eq!(report["requests"], Value::Array(Vec::new()));
    env.unload();
    assert!(!env.pin_dir().exists());
}

/// Returns the requests in the report.
fn reported(env: &TestEnv) -> Vec<Value> {
    let report: Value = serde_json::from_str(&output(env, &["report", "-o", "json"])).unwrap();
    report["requests"].as_array().unwrap().clone()
}

fn sum(requests: &[Value]) -> u64 {
    requests.iter().map(|request| request["count"].as_u64().unwrap()).sum()
}

#[test]
fn counts_are_bounded_and_survive_the_agent() {
    const PATHS: u64 = 60;
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let running = start(&env, &pod);
    poll_until(LONG, "the first request", || (!reported(&env).is_empty()).then_some(()));
    output(&env, &["report", "--reset"]);
    let answer = |path: &str| get(&env, &pod.netns, path, "");
    for number in 0..PATHS {
        assert_eq!(answer(&format!("/{number}")).as_deref(), Some("HTTP/1.1 403"));
    }
    // The broker reports the requests that its limit suppressed with a later one.
    let requests = poll_until(LONG, "all requests", || {
        assert_eq!(answer("/0").as_deref(), Some("HTTP/1.1 403"));
        std::thread::sleep(Duration::from_millis(200));
        Some(reported(&env)).filter(|requests| sum(requests) >= PATHS)
    });
    let (own, other): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request["path"].is_string());
    // The broker reports a burst of 20, of which the first request has used some.
    assert!((15..=32).contains(&own.len()) && other.len() == 1, "{requests:#?}");
    assert!(requests.iter().all(|one| one["namespace"].is_null() && one["netns_cookie"].is_u64()));
    assert!(output(&env, &["report", "--rules"]).is_empty(), "no rule can name the sender");

    // A later agent continues the counts, and replaces a map without a pin.
    drop(running);
    let _running = start(&env, &pod);
    let count = |path: &str| {
        let requests = reported(&env);
        let one = requests.iter().find(|one| one["path"] == *path && one["outcome"] == "refused");
        one.map_or(0, |one| one["count"].as_u64().unwrap())
    };
    let before = count("/0");
    assert!(before > 0);
    assert_eq!(answer("/0").as_deref(), Some("HTTP/1.1 403"));
    poll_until(LONG, "another request", || (count("/0") == before + 1).then_some(()));
    fs::remove_file(env.pin_dir().join("maps/imds_req_counts")).unwrap();
    assert_eq!(answer("/0").as_deref(), Some("HTTP/1.1 403"));
    poll_until(LONG, "a new map", || (count("/0") == 1).then_some(()));
}

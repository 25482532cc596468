//! HTTP requests, and the events of one pod, are bounded in size, time and number. Excessive clients and pods get no more,
//! and neither delay others nor leave pods unenforced.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{TcpStream, UdpSocket},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use imds_ebpf_common::event::RateLimiter;
use imds_tests::{
    Agent, Cgroup, METADATA, Netns, PodLink, StopFlag, TestEnv,
    http::{DEFAULT, try_get},
    kubelet::new_uid,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    scaled, skip_without_netns_cookie,
};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
    socket::{setsockopt, sockopt},
};
use serde_json::Value;

/// Time limit of a whole connection, with a reserve for a busy machine.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15 + 10);
/// Maximum number of descriptors above those of an idle agent: concurrent connections and pods.
const MOST_DESCRIPTORS: usize = 16 + 16;

fn served(env: &TestEnv) -> Agent<'_> {
    let agent = env.agent().spawn_ready();
    poll_until(LONG, "metrics to be served", || try_get(env, DEFAULT, "/healthz").ok());
    agent
}

fn connect(env: &TestEnv) -> TcpStream {
    let stream = env.node.run(|| TcpStream::connect(DEFAULT)).expect("connect");
    stream.set_read_timeout(Some(CLOSE_TIMEOUT)).expect("set a timeout");
    stream.set_write_timeout(Some(CLOSE_TIMEOUT)).expect("set a timeout");
    stream
}

fn descriptors(agent: &Agent<'_>) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("descriptors of the agent").count()
}

/// Asserts that other clients are served and a new pod is enforced.
#[track_caller]
fn assert_unharmed(env: &TestEnv) {
    let start = Instant::now();
    for path in ["/metrics", "/healthz", "/readyz"] {
        // A connection may wait for those that came before it.
        poll_until(CLOSE_TIMEOUT, "the response with code 200", || {
            try_get(env, DEFAULT, path).is_ok_and(|(status, _)| status == 200).then_some(())
        });
    }
    assert!(start.elapsed() < CLOSE_TIMEOUT, "{:?}", start.elapsed());
    let pod = env.add_pod(PodLink::Routed);
    env.wait_enforced(&pod);
    env.assert_blocked(&pod);
}

/// Reads until the agent closes the connection, and returns the response.
#[track_caller]
fn until_closed(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        // The agent closed the connection with unread data.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the connection was not closed: {error}"),
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn finish(env: &TestEnv, agent: Agent<'_>) {
    assert!(agent.terminate().success());
    env.unload();
}

#[test]
fn thousand_idle_connections() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(soft.max(4096)), hard).unwrap();
    let env = TestEnv::new();
    let agent = served(&env);
    let before = descriptors(&agent);
    let silent: Vec<_> = (0..scaled(1000)).map(|_| connect(&env)).collect();
    assert_unharmed(&env);
    assert!(descriptors(&agent) < before + MOST_DESCRIPTORS, "{} after {before}", descriptors(&agent));
    for stream in silent {
        assert_eq!(until_closed(stream), "");
    }
    assert_unharmed(&env);
    finish(&env, agent);
}

#[test]
fn requests_byte_by_byte() {
    let env = TestEnv::new();
    let agent = served(&env);
    let drip = |mut stream: TcpStream| {
        let start = Instant::now();
        for byte in b"GET /metrics HTTP/1.1\r\nHost: ".iter().chain([b'x'; 10_000].iter()) {
            if stream.write_all(&[*byte]).is_err() {
                return start.elapsed();
            }
            sleep(Duration::from_millis(100));
        }
        panic!("the connection stayed open for {:?}", start.elapsed());
    };
    let streams: Vec<_> = (0..10).map(|_| connect(&env)).collect();
    thread::scope(|scope| {
        let drips: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || drip(stream))).collect();
        assert_unharmed(&env);
        for drip in drips {
            assert!(drip.join().unwrap() < CLOSE_TIMEOUT);
        }
    });
    finish(&env, agent);
}

#[test]
fn requests_without_end() {
    let env = TestEnv::new();
    let agent = served(&env);
    let pour = |head: &[u8], more: &[u8]| {
        let mut stream = connect(&env);
        let (start, mut poured) = (Instant::now(), 0);
        let mut result = stream.write_all(head);
        while result.is_ok() && start.elapsed() < CLOSE_TIMEOUT {
            result = stream.write_all(more);
            poured += more.len();
        }
        assert!(result.is_err(), "the agent read {poured} bytes within {CLOSE_TIMEOUT:?}");
        poured
    };
    thread::scope(|scope| {
        let chunk = [b"1000\r\n".to_vec(), vec![b'x'; 0x1000], b"\r\n".to_vec()].concat();
        let body = b"GET /metrics HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n";
        scope.spawn(|| pour(b"GET /", &[b'x'; 4096]));
        scope.spawn(|| pour(b"GET / HTTP/1.1\r\n", b"A: b\r\n"));
        scope.spawn(move || pour(body, &chunk));
        assert_unharmed(&env);
    });
    finish(&env, agent);
}

#[test]
fn one_request_per_connection() {
    let env = TestEnv::new();
    let agent = served(&env);
    let mut stream = connect(&env);
    let request = "GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: keep-alive\r\n\r\n";
    stream.write_all(request.repeat(100).as_bytes()).unwrap();
    let answer = until_closed(stream);
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 1, "{answer}");
    finish(&env, agent);
}

#[test]
fn unread_responses() {
    let env = TestEnv::new();
    let agent = served(&env);
    let before = descriptors(&agent);
    let deaf = || -> io::Result<TcpStream> {
        let mut stream = connect(&env);
        setsockopt(&stream, sockopt::RcvBuf, &1)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")?;
        Ok(stream)
    };
    let streams: Vec<_> = (0..100).filter_map(|_| deaf().ok()).collect();
    assert!(streams.len() > 50, "{}", streams.len());
    assert_unharmed(&env);
    poll_until(CLOSE_TIMEOUT, "all connections to be closed", || {
        (descriptors(&agent) < before + MOST_DESCRIPTORS).then_some(())
    });
    drop(streams);
    finish(&env, agent);
}

#[test]
fn continuous_requests() {
    let env = TestEnv::new();
    let agent = served(&env);
    let (stop, answers) = (StopFlag::default(), AtomicU32::new(0));
    thread::scope(|scope| {
        let stop_on_drop = stop.set_on_drop();
        for _ in 0..scaled(20) {
            scope.spawn(|| {
                while !stop.is_set() {
                    let is_served = try_get(&env, DEFAULT, "/metrics").is_ok_and(|(status, _)| status == 200);
                    answers.fetch_add(is_served.into(), Ordering::Relaxed);
                }
            });
        }
        let longest = (0..10).map(|_| {
            let pod = env.add_pod(PodLink::Bridged);
            let start = Instant::now();
            env.wait_enforced(&pod);
            start.elapsed()
        });
        let longest = longest.max();
        drop(stop_on_drop);
        assert!(longest < Some(CLOSE_TIMEOUT), "{longest:?}");
    });
    assert!(answers.into_inner() > 0);
    assert_unharmed(&env);
    finish(&env, agent);
}

// Denied calls, which a pod can send from any number of network namespaces, cgroups and threads.

const NAMESPACES: u32 = 200;
const CGROUPS: u32 = 500;
/// Cgroup of the burstable pods of a kubelet.
const BURSTABLE: &str = "kubepods.slice/kubepods-burstable.slice";
const DENIALS: &str = "imds_agent_denials_total{";
const EVENTS: &str = "imds_agent_events_total";

/// Returns the values of the time series whose names start with `prefix`.
#[track_caller]
fn series(env: &TestEnv, prefix: &str) -> BTreeMap<String, f64> {
    let (status, metrics) = try_get(env, DEFAULT, "/metrics").expect("metrics");
    assert_eq!(status, 200);
    let samples = metrics.lines().filter(|line| line.starts_with(prefix));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    samples.map(|line| sample(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// Asserts that no time series has a lower value than before, and returns the values.
#[track_caller]
fn assert_none_falls(env: &TestEnv, before: &BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let now = series(env, DENIALS);
    for (name, value) in before {
        assert!(now.get(name).is_some_and(|now| now >= value), "{name}: {value}, then {:?}", now.get(name));
    }
    now
}

/// Calls connect(2) on all sockets from each of the cgroups in turn, with a new thread name each time.
fn flood(cgroups: &[Cgroup], sockets: &[UdpSocket], stop: &StopFlag, sent: &AtomicU64) {
    for (number, cgroup) in cgroups.iter().enumerate().cycle() {
        if stop.is_set() {
            return;
        }
        cgroup.run(|| {
            prctl::set_name(&CString::new(format!("flood-{number}")).expect("a name")).expect("set a name");
            for socket in sockets {
                let denied = socket.connect((METADATA, 80)).expect_err("a denied call");
                assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

/// Floods from one pod with many cgroups, whose sockets are in `namespaces`. Asserts that the agent serves other pods: it
/// reports a single denied call from `others`, and attaches to a new pod.
#[track_caller]
fn assert_flood_is_bounded(env: &TestEnv, hook: &'static str, namespaces: &[&Netns], others: &Netns) {
    const FLOODERS: usize = 2;
    let [of_pod, of_other] =
        [(); 2].map(|()| format!("{BURSTABLE}/kubepods-burstable-pod{}.slice", new_uid().replace('-', "_")));
    let [pod_cgroup, other_cgroup] = [&of_pod, &of_other].map(|path| env.add_cgroup(path));
    let cgroups: Vec<_> =
        (0..scaled(CGROUPS)).map(|number| env.add_cgroup(&format!("{of_pod}/{number}"))).collect();
    let open = |netns: &&Netns| netns.run(|| UdpSocket::bind("0.0.0.0:0")).expect("a socket");
    let sockets = [(); FLOODERS].map(|()| pod_cgroup.run(|| namespaces.iter().map(open).collect::<Vec<_>>()));
    let agent = env.agent().hooks(&["from_pod", "socket", hook]).spawn_ready();
    poll_until(LONG, "metrics to be served", || try_get(env, DEFAULT, "/healthz").ok());

    let (stop, sent) = (StopFlag::default(), AtomicU64::new(0));
    thread::scope(|scope| {
        let stop_on_drop = stop.set_on_drop();
        for (sockets, cgroups) in sockets.iter().zip(cgroups.chunks(cgroups.len().div_ceil(FLOODERS))) {
            scope.spawn(|| flood(cgroups, sockets, &stop, &sent));
        }
        let (start, events) = (Instant::now(), series(env, EVENTS)[EVENTS]);
        let mut denials = series(env, DENIALS);
        while start.elapsed() < Duration::from_secs(3) {
            denials = assert_none_falls(env, &denials);
            sleep(Duration::from_millis(100));
        }

        assert!(!other_cgroup.run(|| http_get(others, METADATA, SHORT)).is_answer());
        poll_until(Duration::from_secs(5), "the other pod's denial in the report", || {
            let report = env.imds_agent(&["report", "-o", "json"]).output().stdout;
            let report: Value = serde_json::from_slice(&report).expect("a report");
            let senders = report["denials"].as_array().expect("denials");
            let is_others = |path: &str| path.ends_with(&of_other);
            senders.iter().any(|sender| sender["cgroup"].as_str().is_some_and(is_others)).then_some(())
        });

        let attaching = Instant::now();
        let new = env.add_pod(PodLink::Routed);
        env.wait_enforced(&new);
        assert!(attaching.elapsed() < Duration::from_secs(2), "{:?}", attaching.elapsed());
        env.assert_nothing_arrives(|| assert!(!http_get(&new.netns, METADATA, SHORT).is_answer()));

        let asking = Instant::now();
        assert!(try_get(env, DEFAULT, "/healthz").is_ok_and(|(status, _)| status == 200));
        assert!(asking.elapsed() < Duration::from_secs(1), "{:?}", asking.elapsed());
        denials = assert_none_falls(env, &denials);
        assert!(!denials.is_empty(), "the denials are not counted");

        // The flood is one source. Two windows are cut off by the start and the end, and the other pods have few events.
        let emitted = series(env, EVENTS)[EVENTS] - events;
        let cpus =
            u32::try_from(thread::available_parallelism().expect("CPUs").get()).expect("a small number");
        let windows = start.elapsed().as_secs_f64() + 2.0;
        let most = windows * f64::from(RateLimiter::MAX_EVENTS * cpus) + 50.0;
        let sent = sent.load(Ordering::Relaxed);
        println!("{sent} calls, {emitted} events of at most {most:.0}");
        assert!(sent > 10_000, "{sent} calls are no flood");
        assert!(emitted <= most, "{emitted} events, more than {most:.0}");
        drop(stop_on_drop);
    });
    drop(agent);
    env.unload();
}

#[test]
fn denied_calls_from_many_namespaces() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let other = env.add_pod(PodLink::Routed);
    let namespaces: Vec<_> = (0..scaled(NAMESPACES)).map(|_| Netns::new("nested")).collect();
    assert_flood_is_bounded(&env, "socket", &namespaces.iter().collect::<Vec<_>>(), &other.netns);
}

#[test]
fn denied_calls_from_many_cgroups_of_a_host_network_pod() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    assert_flood_is_bounded(&env, "host_network", &[&*env.node; 50], &env.node);
}

//! HTTP requests are bounded in size, time and number. Excessive clients get no more, and neither delay other clients
//! nor leave pods unenforced.

use std::{
    fs,
    io::{self, ErrorKind, Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use imds_tests::{
    Agent, PodLink, StopFlag, TestEnv,
    http::{DEFAULT, try_get},
    poll::poll_until,
    probe::LONG,
    scaled,
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{setsockopt, sockopt},
};

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
        let served = try_get(env, DEFAULT, path);
        assert!(served.as_ref().is_ok_and(|(status, _)| *status == 200), "{path}: {served:?}");
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

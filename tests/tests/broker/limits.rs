//! Limits of a listener, and their effect on others.

use std::{
    fs,
    io::Write as _,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use imds_broker::protocol::Outcome;
use imds_tests::{StopFlag, executable::broker_executable};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, BrokerPod, read_all, status},
    simulator::Simulator,
};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn requests_per_second_are_limited() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let start = Instant::now();
    let responses: Vec<_> = (0..500).map(|_| pod.get(LOCATION)).collect();
    let budget = 200 + start.elapsed().as_millis() / 5 + 1;
    let count = |code| responses.iter().filter(|response| status(response) == code).count();
    let (allowed, refused) = (count(200), count(429));
    assert_eq!((allowed + refused, service.seen().len()), (500, allowed));
    assert!(allowed as u128 <= budget, "{allowed} requests, budget {budget}");
    let response = responses.iter().find(|response| status(response) == 429);
    assert!(response.is_none_or(|response| response.contains("retry-after: 1\r\n")), "{response:?}");
}

#[test]
fn messages_about_requests_are_limited() {
    let broker = Broker::start();
    let pod = broker.pod("azure", &ALLOW);
    let total = 100;
    let start = Instant::now();
    for _ in 0..total {
        assert_eq!(status(&pod.get("/secret")), 403);
    }
    // The message after a pause has the number of the suppressed ones.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(status(&pod.get("/last")), 403);
    let (mut messages, mut suppressed) = (0, 0);
    loop {
        let request = broker.request();
        assert_eq!(request.outcome, Outcome::Refused);
        (messages, suppressed) = (messages + 1, suppressed + request.suppressed);
        if request.path == "/last" {
            break;
        }
    }
    assert_eq!(messages + suppressed, total + 1);
    // 20 messages, and 10 per second.
    let most = 21 + start.elapsed().as_millis() / 100;
    assert!(u128::from(messages) <= most, "{messages} messages, at most {most}");
}

#[test]
fn full_socket_does_not_block() {
    let broker = Broker::start_with(
        |node| node.command(broker_executable()),
        |socket| setsockopt(socket, sockopt::SndBuf, &2048).unwrap(),
    );
    let _service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    for _ in 0..60 {
        assert_eq!(status(&pod.get(LOCATION)), 200);
    }
    let first = broker.request();
    assert_eq!((first.status, first.suppressed), (200, 0));
}

#[test]
fn slow_clients_are_disconnected() {
    let broker = Broker::start();
    let pod = broker.pod("azure", &ALLOW);
    let start = Instant::now();
    let mut silent = pod.connect();
    let mut slow = pod.connect();
    slow.write_all(b"GET /").unwrap();
    let slow = thread::spawn(move || read_all(&mut slow));
    assert_eq!(read_all(&mut silent), "");
    assert_eq!(status(&slow.join().unwrap()), 408);
    assert!((4..8).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn connections_are_limited() {
    let broker = Broker::start();
    let _service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let mut idle: Vec<_> = (0..32).map(|_| pod.connect()).collect();
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    let request = format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let mut waiting = pod.connect();
    waiting.write_all(request.as_bytes()).unwrap();
    waiting.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(std::io::Read::read(&mut waiting, &mut [0]).is_err());
    drop(idle.pop());
    waiting.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(status(&read_all(&mut waiting)), 200);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn no_free_descriptors() {
    let broker = Broker::start_with_descriptors(20);
    let _service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let idle: Vec<_> = (0..20).map(|_| pod.connect()).collect();
    let processor_time = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", broker.child.id())).unwrap();
        let fields: Vec<_> = stat.split(' ').collect();
        fields[13].parse::<u32>().unwrap() + fields[14].parse::<u32>().unwrap()
    };
    let before = processor_time();
    thread::sleep(Duration::from_secs(1));
    let ticks = processor_time() - before;
    assert!(ticks < 20, "{ticks} of 100 ticks of processor time");
    drop(idle);
    assert_eq!(status(&pod.get(LOCATION)), 200);
}

#[test]
fn flood_leaves_other_pods_alone() {
    let broker = Broker::start();
    let _service = Simulator::start_echo(&broker.node);
    let [flooding, other] = [0, 1].map(|_| broker.pod("azure", &ALLOW));
    let stop = StopFlag::default();
    let slowest = thread::scope(|scope| {
        let _stop = stop.set_on_drop();
        for number in 0..4 {
            let (flooding, stop) = (&flooding, &stop);
            scope.spawn(move || flood(flooding, number, stop));
        }
        let latencies = (0..60).map(|_| {
            thread::sleep(Duration::from_millis(30));
            let start = Instant::now();
            assert_eq!(status(&other.get(LOCATION)), 200);
            start.elapsed()
        });
        latencies.max().unwrap()
    });
    println!("slowest request during the flood: {slowest:?}");
    // With one CPU, the flooding threads leave the broker a fifth of it.
    let cpus = thread::available_parallelism().map_or(1, Into::into);
    let limit = Duration::from_secs(if cpus == 1 { 5 } else { 1 });
    assert!(slowest < limit, "{slowest:?} with {cpus} CPUs");
}

/// Sends requests, garbage and large heads as fast as possible.
fn flood(pod: &BrokerPod, number: usize, stop: &StopFlag) {
    let large = "x".repeat(16 * 1024);
    let valid = format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\n\r\n");
    pod.netns.run(|| {
        while !stop.is_set() {
            let Ok(mut stream) = TcpStream::connect_timeout(&pod.address, Duration::from_millis(100)) else {
                continue;
            };
            let _ = match number {
                0 => stream.write_all(valid.as_bytes()),
                1 => stream.write_all(b"\0\0\0\0"),
                2 => stream.write_all(large.as_bytes()),
                _ => Ok(()),
            };
        }
    });
}

/// Prints the latency of requests through the broker, and of direct ones.
#[test]
fn latency() {
    let broker = Broker::start();
    let _service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let endpoint = crate::harness::ENDPOINT.parse().unwrap();
    let request = format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let measure = |netns: &imds_tests::Netns, address| {
        netns.run(|| {
            let mut latencies: Vec<_> = (0..1000)
                .map(|_| {
                    thread::sleep(Duration::from_millis(5));
                    let start = Instant::now();
                    let mut stream = TcpStream::connect(address).unwrap();
                    stream.write_all(request.as_bytes()).unwrap();
                    // Until the end of the body, which is the path.
                    let mut response = Vec::new();
                    while !response.ends_with(LOCATION.as_bytes()) {
                        let mut part = [0; 1024];
                        let length = std::io::Read::read(&mut stream, &mut part).unwrap();
                        assert_ne!(length, 0);
                        response.extend_from_slice(&part[..length]);
                    }
                    start.elapsed()
                })
                .collect();
            latencies.sort();
            (latencies[500], latencies[990])
        })
    };
    let (direct, brokered) = (measure(&broker.node, endpoint), measure(&pod.netns, pod.address));
    println!(
        "direct: median {:?}, p99 {:?}; broker: median {:?}, p99 {:?}",
        direct.0, direct.1, brokered.0, brokered.1
    );
    assert!(brokered.0 < Duration::from_millis(50), "{:?}", brokered.0);
}

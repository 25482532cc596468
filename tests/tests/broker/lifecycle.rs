//! Listeners that open and close, and the end of the broker.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread::sleep,
    time::{Duration, Instant},
};

use imds_broker::protocol::{FromBroker, MAX_MESSAGE, ToBroker};
use imds_tests::{Netns, poll::poll_until};

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, BrokerPod, ENDPOINT, read_all, status},
    simulator::Simulator,
};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn closed_listener_frees_the_namespace() {
    let broker = Broker::start();
    let service = Simulator::start(&broker.node, ENDPOINT, |_| {
        sleep(Duration::from_mins(1));
        Vec::new()
    });
    let netns = Netns::new("pod");
    netns.ip("link set lo up");
    broker.node.ip(&format!("link add leak0 type veth peer name eth0 netns {}", netns.name()));
    let pod = broker.pod_in(netns, &broker.listen("azure", &ALLOW));
    // A connection without a request, one in the middle of a request, and one that waits for the service.
    let mut streams: Vec<_> =
        ["", "GET ", "GET /metadata/instance/compute/location HTTP/1.1\r\nHost: a\r\n\r\n"]
            .into_iter()
            .map(|request| {
                let mut stream = pod.connect();
                stream.write_all(request.as_bytes()).unwrap();
                stream
            })
            .collect();
    poll_until(TIMEOUT, "the request", || (!service.seen().is_empty()).then_some(()));
    let BrokerPod { netns, address, id } = pod;
    broker.close(id);
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let refused = netns.run(|| TcpStream::connect(address)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    drop(streams);

    // The listener alone keeps the namespace alive.
    let other = broker.pod_in(netns, &broker.listen("azure", &ALLOW));
    let BrokerPod { netns, id, .. } = other;
    let has_link = || broker.node.run(|| nix::net::if_::if_nametoindex("leak0").is_ok());
    drop(netns);
    sleep(Duration::from_millis(300));
    assert!(has_link());
    broker.close(id);
    poll_until(TIMEOUT, "the end of the pod's network namespace", || (!has_link()).then_some(()));
}

#[test]
fn other_listeners_go_on() {
    let broker = Broker::start();
    let _service = Simulator::start_echo(&broker.node);
    let [first, second] = [0, 1].map(|_| broker.pod("azure", &ALLOW));
    broker.close(first.id);
    assert_eq!(status(&second.get(LOCATION)), 200);
    assert_eq!(broker.request().id, second.id);
    // An unknown number has no effect.
    broker.send(&ToBroker::Close { id: 99 }, &[]);
    assert_eq!(status(&second.get(LOCATION)), 200);
}

#[test]
fn invalid_messages() {
    let broker = Broker::start();
    let listener = broker.node.run(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let udp = broker.node.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let client = broker.node.run(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let error_of = |message: ToBroker, descriptors: &[_]| {
        broker.send(&message, descriptors);
        match broker.receive() {
            FromBroker::Closed { error: Some(error), .. } => error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(error_of(broker.listen("azure", &ALLOW), &[]), "0 descriptors instead of 1");
    let twice = [listener.as_raw_fd(); 2];
    assert_eq!(error_of(broker.listen("azure", &ALLOW), &twice), "2 descriptors instead of 1");
    for socket in [udp.as_raw_fd(), client.as_raw_fd()] {
        let error = error_of(broker.listen("azure", &ALLOW), &[socket]);
        assert_eq!(error, "the descriptor is not a listening TCP socket");
    }
    let error = error_of(broker.listen("azure", &["instance"]), &[listener.as_raw_fd()]);
    assert_eq!(error, "\"instance\" is not METHOD PATH, e.g. \"GET /metadata/instance\"");
    // Discarded, with a line in the log.
    broker.send_bytes(b"{}", &[listener.as_raw_fd()]);
    broker.send_bytes(&vec![b' '; MAX_MESSAGE + 1], &[]);
    let listen = broker.listen("azure", &ALLOW);
    let ToBroker::Listen { id, .. } = listen else { unreachable!() };
    broker.send(&listen, &[listener.as_raw_fd()]);
    assert_eq!(broker.receive(), FromBroker::Listening { id });
    assert_eq!(error_of(listen, &[listener.as_raw_fd()]), format!("listener {id} is open"));
}

#[test]
fn broker_ends_with_its_socket() {
    let mut broker = Broker::start();
    let pod = broker.pod("azure", &ALLOW);
    let mut stream = pod.connect();
    let start = Instant::now();
    assert!(broker.close_socket().success());
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(read_all(&mut stream), "");
    assert_eq!(
        pod.netns.run(|| TcpStream::connect(pod.address)).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
}

//! Starts of requests that pass are in the ring buffer for user space.

use std::thread;

use etherparse::PacketBuilder;
use imds_agent::telemetry::request_start;
use imds_ebpf_common::{
    Address, Hook, IMDS_IPV4, Mode, RequestStart, Verdict,
    event::RateLimiter,
    names::{MAP_REQUEST_STARTS, PROG_FROM_POD, PROG_FROM_POD_L3},
    request::MAX_TEXT,
};
use imds_tests::program::{Object, action};

use super::{ETHERNET_LEN, OTHER, POD, ethernet, object, with_tags};

const GET: &[u8] = b"GET /metadata/instance HTTP/1.1\r\n\r\n";

fn segment(destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let tcp = ethernet().ipv4(POD, destination, 64).tcp(40_000, 80, 7, 64_240);
    tcp.options_raw(&[1; 12]).unwrap().write(&mut packet, payload).unwrap();
    packet
}

/// Returns the starts of requests in the ring buffer.
fn starts(object: &mut Object) -> Vec<RequestStart> {
    let mut ring = object.ring(MAP_REQUEST_STARTS);
    let mut starts = Vec::new();
    while let Some(bytes) = ring.next() {
        starts.push(request_start::decode(&bytes).expect("a whole record"));
    }
    starts
}

/// Runs `from_pod` on a packet. Returns the text of the request in the ring buffer.
fn seen(object: &mut Object, packet: &[u8]) -> Option<Vec<u8>> {
    action(object.program(PROG_FROM_POD), packet);
    let starts = starts(object);
    assert!(starts.len() <= 1, "{starts:?}");
    starts.first().map(|start| start.text().to_vec())
}

#[test]
fn start_of_request_is_reported() {
    let mut object = object(Mode::Audit);
    action(object.program(PROG_FROM_POD), &segment(IMDS_IPV4, GET));
    let starts = starts(&mut object);
    let [start] = starts.as_slice() else { panic!("{starts:?}") };
    assert_eq!(start.text(), GET);
    assert_eq!(start.header.endpoint, Address::from_ipv4(IMDS_IPV4));
    // A test run's packet comes from the loopback interface.
    let header = start.header;
    assert_eq!((header.ifindex, header.port), (1, 80));
    assert_eq!((header.hook, header.verdict), (Hook::FromPod as u8, Verdict::Audited as u8));
    assert_ne!(header.time, 0);
}

#[test]
fn headers_and_lengths() {
    let mut object = object(Mode::Audit);
    let long = [b"GET /".as_slice(), &[b'a'; 200]].concat();
    assert_eq!(seen(&mut object, &segment(IMDS_IPV4, &long)).as_deref(), long.get(..MAX_TEXT));
    assert_eq!(seen(&mut object, &segment(IMDS_IPV4, &long[..MAX_TEXT])).as_deref(), long.get(..MAX_TEXT));
    let shortest = b"GET / HTTP/1.0";
    assert_eq!(seen(&mut object, &segment(IMDS_IPV4, shortest)).as_deref(), Some(shortest.as_slice()));
    assert_eq!(seen(&mut object, &segment(IMDS_IPV4, &shortest[..13])), None);
    let tagged = with_tags(&segment(IMDS_IPV4, GET), &[0x8100, 0x88a8]);
    assert_eq!(seen(&mut object, &tagged).as_deref(), Some(GET));
    // The address of the endpoint behind the prefix of NAT64.
    let mut v6 = Vec::new();
    let mut destination = [0; 16];
    destination[..4].copy_from_slice(&[0, 0x64, 0xff, 0x9b]);
    destination[12..].copy_from_slice(&IMDS_IPV4);
    let ip = PacketBuilder::ethernet2([2; 6], [2; 6]).ipv6([1; 16], destination, 64);
    ip.tcp(40_000, 80, 7, 64_240).write(&mut v6, GET).unwrap();
    assert_eq!(seen(&mut object, &v6).as_deref(), Some(GET));
    action(object.program(PROG_FROM_POD_L3), &segment(IMDS_IPV4, GET)[ETHERNET_LEN..]);
    assert_eq!(starts(&mut object).len(), 1);
}

#[test]
fn other_packets_are_not_reported() {
    let mut audit = object(Mode::Audit);
    assert_eq!(seen(&mut audit, &segment(OTHER, GET)), None);
    assert_eq!(seen(&mut audit, &segment(IMDS_IPV4, b"")), None);
    assert_eq!(
        seen(&mut audit, &segment(IMDS_IPV4, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00")),
        None
    );
    let mut udp = Vec::new();
    ethernet().ipv4(POD, IMDS_IPV4, 64).udp(40_000, 80).write(&mut udp, GET).unwrap();
    assert_eq!(seen(&mut audit, &udp), None);
    for mode in [Mode::Enforce, Mode::Off] {
        assert_eq!(seen(&mut object(mode), &segment(IMDS_IPV4, GET)), None, "{mode:?}");
    }
}

#[test]
fn truncated_headers_are_safe() {
    let mut object = object(Mode::Audit);
    let whole = segment(IMDS_IPV4, GET);
    // Newer kernels reject test runs with less than an IP header.
    for length in ETHERNET_LEN + 20..whole.len() {
        let _cut = seen(&mut object, &whole[..length]);
    }
    for data_offset in 0..16 {
        let mut packet = whole.clone();
        packet[ETHERNET_LEN + 20 + 12] = data_offset << 4;
        let _any = seen(&mut object, &packet);
    }
}

#[test]
fn requests_of_a_source_are_limited() {
    let mut object = object(Mode::Audit);
    // The limit is for each CPU and second, and a test run may move to the other CPUs.
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..200 {
        action(object.program(PROG_FROM_POD), &segment(IMDS_IPV4, GET));
    }
    let limit = RateLimiter::MAX_REQUESTS as usize;
    let emitted = starts(&mut object).len();
    assert!((limit..=3 * limit * cpus).contains(&emitted), "{emitted}");
}

//! Vectors of public advisories on request smuggling, and of the fixes of Azure's `GuestProxyAgent` (#180: traversal, #323: case, #344:
//! percent-encoded paths and parameters, #357: canonical form).

use std::{io::Write as _, thread::sleep, time::Duration};

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, read_all, status},
    simulator::Simulator,
};

/// Request that is not allowed, as a second request inside of another one.
const SMUGGLED: &str = "GET /metadata/identity/oauth2/token HTTP/1.1\r\nHost: a\r\nMetadata: true\r\n\r\n";

/// Requests whose framing servers disagree about. Each contains [`SMUGGLED`].
fn framing_vectors() -> Vec<String> {
    let length = SMUGGLED.len();
    let post =
        |headers: &str, body: &str| format!("POST {LOCATION} HTTP/1.1\r\nHost: a\r\n{headers}\r\n{body}");
    let get =
        |headers: &str, body: &str| format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\n{headers}\r\n{body}");
    let chunked = format!("0\r\n\r\n{SMUGGLED}");
    let as_chunk = format!("{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n");
    vec![
        // CL.TE, TE.CL and TE.TE.
        post(&format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", chunked.len()), &chunked),
        post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", &as_chunk),
        post("Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", &chunked),
        post("Transfer-Encoding: xchunked\r\n", &chunked),
        post("Transfer-Encoding : chunked\r\n", &chunked),
        post("Transfer-Encoding:\tchunked\r\n", &chunked),
        post("Transfer-Encoding: \x0bchunked\r\n", &chunked),
        post("X: y\r\n Transfer-Encoding: chunked\r\n", &chunked),
        post("X: y\nTransfer-Encoding: chunked\r\n", &chunked),
        post("Transfer-Encoding: chunked\r\n", &format!("0;x={SMUGGLED}\r\n\r\n{SMUGGLED}")),
        // Content-Length.
        get(&format!("Content-Length: 0\r\nContent-Length: {length}\r\n"), SMUGGLED),
        get(&format!("Content-Length: {length}\r\nContent-Length: 0\r\n"), SMUGGLED),
        get(&format!("Content-Length: 0, {length}\r\n"), SMUGGLED),
        get("Content-Length: +0\r\n", SMUGGLED),
        get("Content-Length: 00\r\n", SMUGGLED),
        get("Content-Length: 18446744073709551616\r\n", SMUGGLED),
        get(&format!("Content-Length: {length}\r\n"), SMUGGLED),
        get("Content_Length: 0\r\n", SMUGGLED),
        get("Content-Length\0: 0\r\n", SMUGGLED),
        // A second request in the same segment, after the first one, and inside of lines.
        get("", SMUGGLED),
        get("", &format!("\r\n{SMUGGLED}")),
        get(&format!("X: y\r\r{SMUGGLED}"), ""),
        get(&format!("X: y\n\n{SMUGGLED}"), ""),
        format!("GET {LOCATION}\n\n{SMUGGLED}"),
        format!("GET {LOCATION}\r\n\r\n{SMUGGLED}"),
        format!("GET {LOCATION} HTTP/1.1\nHost: a\n\n{SMUGGLED}"),
        format!("GET {LOCATION} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n{SMUGGLED}"),
        format!("GET {LOCATION} HTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}"),
        format!("GET {LOCATION}?x=y\u{560}HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}"),
        // Other protocols.
        format!("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{SMUGGLED}"),
        get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", SMUGGLED),
        format!("CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}"),
        format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n{SMUGGLED}"),
    ]
}

/// Targets that some servers route to another path.
const TARGETS: &[&str] = &[
    "/metadata/instance/compute/location/../../../identity/oauth2/token",
    "/metadata/instance/compute/../../identity",
    "/metadata/instance/compute/location/%2e%2e/%2e%2e/%2e%2e/identity",
    "/metadata/instance/compute/location/..%2f..%2f..%2fidentity",
    "/metadata/instance/compute/location/%252e%252e/identity",
    "/metadata/instance/compute/location/..;/..;/..;/identity",
    "/metadata/instance/compute/location;/../../../identity",
    "/metadata/instance/compute/location\\..\\..\\..\\identity",
    "/metadata/instance/compute/location/./././../../../identity",
    "//metadata/identity/oauth2/token",
    "/metadata//identity/oauth2/token",
    "/./metadata/identity/oauth2/token",
    "/METADATA/IDENTITY/OAUTH2/TOKEN",
    "/metadata/identity/oauth2/token;/metadata/instance/compute/location",
    "/metadata/identity/oauth2/token?x=/metadata/instance/compute/location",
    "/metadata/identity/oauth2/token#/metadata/instance/compute/location",
    "/metadata/%69dentity/oauth2/token",
    "/metadata%2fidentity%2foauth2%2ftoken",
    "/metadata/identity%00/metadata/instance/compute/location",
    "/\u{ff4d}etadata/identity",
    "/metadata/instance/compute/location\u{2215}..\u{2215}..\u{2215}..\u{2215}identity",
    "/metadata/instance/compute/location/\u{ff0e}\u{ff0e}/identity",
    "http://169.254.169.254/metadata/identity/oauth2/token",
    "http://169.254.169.254@10.0.0.1/metadata/instance/compute/location",
    "169.254.169.254:80",
    "*",
    "?/metadata/instance/compute/location",
    "/metadata/instance/compute/location?k%65y=1",
    "/metadata/instance/compute/location?api-version=1&api-version=2",
    "/metadata/instance/compute/location?api-version=1&API-VERSION=2",
    "/metadata/instance/compute/location?api-version=1;format=text",
];

#[test]
fn nothing_is_smuggled() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &[&ALLOW[..], &["POST /metadata/instance/compute/location"]].concat());
    for vector in framing_vectors() {
        let response = pod.exchange(&vector);
        assert_eq!(status(&response), 400, "{vector:?}: {response}");
    }
    for target in TARGETS {
        let response = pod.get(target);
        assert!([400, 403].contains(&status(&response)), "{target}: {response}");
    }
    assert!(service.seen().is_empty(), "{:?}", service.seen());
}

#[test]
fn later_requests_are_checked_too() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &["GET /metadata/instance/compute/location"]);
    let mut stream = pod.connect();
    let first = format!("GET {LOCATION} HTTP/1.1\r\nHost: a\r\n\r\n");
    stream.write_all(first.as_bytes()).unwrap();
    assert_eq!(broker.request().status, 200);
    stream.write_all(SMUGGLED.as_bytes()).unwrap();
    assert_eq!(broker.request().status, 403);
    stream.write_all(first.as_bytes()).unwrap();
    assert_eq!(broker.request().status, 200);
    // In several segments, with a body that looks like a request.
    for part in SMUGGLED.as_bytes().chunks(7) {
        stream.write_all(part).unwrap();
        sleep(Duration::from_millis(2));
    }
    assert_eq!(broker.request().status, 403);
    stream.write_all(b"\n").unwrap();
    let responses = read_all(&mut stream);
    assert_eq!(responses.matches("HTTP/1.1 ").count(), 5, "{responses}");
    assert_eq!(service.seen().len(), 2);
}

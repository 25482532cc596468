//! Forwarded and refused requests.

use std::{
    io::Write as _,
    thread::sleep,
    time::{Duration, Instant},
};

use imds_broker::protocol::{Outcome, ToBroker};

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, read_all, status},
    simulator::{Simulator, ok},
};

#[test]
fn allowed_requests_are_rebuilt() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let target = format!("{LOCATION}?api-version=2021-02-01&format=text");
    let response = pod.request(
        "GET",
        &target,
        "Metadata: true\r\nCookie: secret\r\nX-Aws-Ec2-Metadata-Token: t\r\nUser-Agent: sdk\r\n",
    );
    assert_eq!(status(&response), 200, "{response}");
    assert!(response.ends_with(&format!("\r\n\r\n{target}")), "{response}");
    let seen = service.last();
    assert_eq!((&*seen.method, &*seen.target), ("GET", &*target));
    assert_eq!(seen.headers, ["host: 169.254.169.254", "metadata: true", "user-agent: sdk"]);
    let request = broker.request();
    assert_eq!((&*request.method, &*request.path, request.status), ("GET", LOCATION, 200));
    assert_eq!((request.id, request.outcome, request.imds_version), (pod.id, Outcome::Allowed, None));
    assert_eq!((&*request.reason, request.suppressed), ("", 0));
}

#[test]
fn refusals_explain() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &ALLOW);
    let token = "/metadata/identity/oauth2/token";
    let response = pod.request("GET", &format!("{token}?api-version=1&resource=x"), "Metadata: true\r\n");
    assert_eq!(status(&response), 403, "{response}");
    assert!(response.contains("content-type: application/json"), "{response}");
    let (_, body) = response.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let reason = format!(
        "GET {token} is not allowed for this pod; an exemption with allow = [\"GET {token}\"] would allow it"
    );
    assert_eq!(body["error"], format!("imds-agent: {reason}"));
    let request = broker.request();
    assert_eq!((request.outcome, request.status, request.reason), (Outcome::Refused, 403, reason));

    for (method, target, expected) in [
        ("PUT", LOCATION, 403),
        ("DELETE", LOCATION, 403),
        ("GET", "/metadata/instance/compute", 403),
        ("GET", "/metadata/instance/compute/locations", 403),
        ("GET", "/metadata/instance/compute/Location", 403),
        ("GET", "/metadata/instance/compute/location?comp=goalstate", 403),
        ("GET", "/metadata/instance/compute/location?API-VERSION=1", 403),
        ("GET", "/metadata/instance/compute/location/?api-version=1&recursive=true", 403),
        ("GET", "/metadata/instance/compute/location/../userData", 400),
    ] {
        assert_eq!(status(&pod.request(method, target, "")), expected, "{method} {target}");
    }
    assert!(service.seen().is_empty(), "{:?}", service.seen());
}

#[test]
fn parameters_restrict_the_token() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let token = "/metadata/identity/oauth2/token";
    let pod = broker.pod("azure", &[&format!("GET {token}?resource=https://vault.azure.net")]);
    // SDKs encode the value.
    let encoded = pod.get(&format!("{token}?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net"));
    let decoded = format!("{token}?api-version=2018-02-01&resource=https://vault.azure.net");
    assert!(encoded.ends_with(&format!("\r\n\r\n{decoded}")), "{encoded}");
    assert_eq!(service.last().target, decoded);
    for query in [
        "",
        "?api-version=2018-02-01",
        "?resource=https%3A%2F%2Fmanagement.azure.com",
        "?resource=https%3A%2F%2Fvault.azure.net.example",
        "?resource=https%3A%2F%2Fvault.azure.net%26resource",
        "?Resource=https%3A%2F%2Fvault.azure.net",
        "?resource=https%3A%2F%2Fvault.azure.net&resource=https%3A%2F%2Fmanagement.azure.com",
        "?resource=https%3A%2F%2Fmanagement.azure.com&RESOURCE=https%3A%2F%2Fvault.azure.net",
        "?resource=https%253A%252F%252Fvault.azure.net",
        "?resource=https%3A%2F%2Fvault.azure.net#",
    ] {
        let response = pod.get(&format!("{token}{query}"));
        assert!([400, 403].contains(&status(&response)), "{query}: {response}");
    }
    assert_eq!(service.seen().len(), 1);
}

#[test]
fn token_of_imdsv2_works() {
    let broker = Broker::start();
    let service = Simulator::start(&broker.node, crate::harness::ENDPOINT, |seen| {
        if seen.method == "PUT" { ok("TOKEN") } else { ok("eu-west-1") }
    });
    let pod = broker.pod("aws", imds_broker::allow::instance_rules("aws").unwrap());
    let mut stream = pod.connect();
    write!(
        stream,
        "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\
         Content-Length: 0\r\n\r\n"
    )
    .unwrap();
    assert_eq!(broker.request().imds_version, Some(2));
    write!(
        stream,
        "GET /latest/meta-data/placement/region HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: TOKEN\r\n\
         Connection: close\r\n\r\n"
    )
    .unwrap();
    let response = read_all(&mut stream);
    assert!(response.contains("\r\n\r\nTOKEN") && response.ends_with("\r\n\r\neu-west-1"), "{response}");
    assert_eq!(broker.request().imds_version, Some(2));
    assert_eq!(status(&pod.get("/latest/meta-data/placement/region")), 200);
    assert_eq!(broker.request().imds_version, Some(1));
    assert_eq!(status(&pod.get("/latest/meta-data/iam/security-credentials/role")), 403);
    let seen = service.seen();
    assert!(seen[0].headers.contains(&"content-length: 0".to_owned()), "{seen:?}");
    assert!(seen[1].headers.contains(&"x-aws-ec2-metadata-token: TOKEN".to_owned()), "{seen:?}");
    assert_eq!(seen.len(), 3);
}

#[test]
fn bodies_are_forwarded() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let pod = broker.pod("azure", &["POST /metadata/scheduledevents"]);
    let request = |body: &str| {
        format!(
            "POST /metadata/scheduledevents HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let body = "x".repeat(4096);
    assert_eq!(status(&pod.exchange(request(&body))), 200);
    let seen = service.last();
    assert_eq!(seen.body, body.as_bytes());
    assert!(seen.headers.contains(&"content-type: application/json".to_owned()), "{seen:?}");
    assert_eq!(status(&pod.exchange(request(&"x".repeat(4097)))), 400);
    assert_eq!(service.seen().len(), 1);
}

/// A service may prefer the parameters of a form to those of the query.
#[test]
fn body_needs_a_rule_without_parameters() {
    let broker = Broker::start();
    let service = Simulator::start_echo(&broker.node);
    let target = "/metadata/identity/oauth2/token?resource=https://vault.azure.net";
    let restricted = format!("POST {target}");
    let request = |body: &str| {
        let length = body.len();
        format!(
            "POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
    };
    let form = "resource=https://management.azure.com";
    let pod = broker.pod("azure", &[&restricted]);
    let response = pod.exchange(request(form));
    assert!(status(&response) == 403 && response.contains("the body can contain parameters"), "{response}");
    assert!(service.seen().is_empty());
    assert_eq!(status(&pod.exchange(request(""))), 200);
    let pod = broker.pod("azure", &[&restricted, "POST /metadata/identity"]);
    assert_eq!(status(&pod.exchange(request(form))), 200);
}

#[test]
fn responses_of_every_form_are_relayed() {
    let broker = Broker::start();
    let large = 1024 * 1024;
    let _service = Simulator::start(&broker.node, crate::harness::ENDPOINT, move |seen| {
        let response = match seen.target.rsplit('/').next().unwrap() {
            "chunked" => "200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX: y\r\n\r\n".to_owned(),
            "none" => "204 No Content\r\nX: y\r\n\r\n".to_owned(),
            "unchanged" => "304 Not Modified\r\nETag: 1\r\n\r\n".to_owned(),
            "head" => "200 OK\r\nContent-Length: 7\r\nMetadata-Flavor: Google\r\n\r\n".to_owned(),
            "hop" => "200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nSet-Cookie: a\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "large" => format!("200 OK\r\nContent-Length: {large}\r\n\r\n{}", "x".repeat(large)),
            "too-large" => format!("200 OK\r\nContent-Length: {}\r\n\r\n", large + 1),
            "too-many-chunks" => format!("200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{}\r\n1\r\nx\r\n0\r\n\r\n", large, "x".repeat(large)),
            "garbage" => "two hundred\r\n\r\n".to_owned(),
            "upgrade" => "101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_owned(),
            other => panic!("{other}"),
        };
        format!("HTTP/1.1 {response}").into_bytes()
    });
    let pod = broker.pod("gcp", &["GET /a", "HEAD /a"]);
    let body = |path: &str| {
        let response = pod.get(path);
        let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
        (status(head), head.to_owned(), body.to_owned())
    };
    let (code, head, text) = body("/a/chunked");
    assert!(code == 200 && head.contains("transfer-encoding: chunked"), "{head}");
    assert!(
        text.starts_with("5\r\nhello\r\n") && text.ends_with("0\r\n\r\n") && !text.contains("x=y"),
        "{text}"
    );
    assert_eq!(body("/a/none").0, 204);
    let (code, head, text) = body("/a/unchanged");
    assert_eq!((code, head.contains("etag: 1"), &*text), (304, true, ""));
    let response = pod.request("HEAD", "/a/head", "");
    assert!(
        response.contains("content-length: 7\r\n") && response.contains("metadata-flavor: Google\r\n"),
        "{response}"
    );
    assert!(response.ends_with("\r\n\r\n"), "{response}");
    let (_, head, _) = body("/a/hop");
    assert!(!head.contains("x-hop") && !head.contains("set-cookie"), "{head}");
    assert_eq!(body("/a/large").2.len(), large);
    for path in ["/a/too-large", "/a/garbage", "/a/upgrade"] {
        assert_eq!(body(path).0, 502, "{path}");
    }
    // The response ends without its last chunk.
    let (code, _, text) = body("/a/too-many-chunks");
    assert!(code == 200 && !text.ends_with("0\r\n\r\n"));
}

#[test]
fn unreachable_service() {
    let broker = Broker::start();
    let pod = broker.pod("aws", &["GET /a"]);
    let response = pod.get("/a");
    assert_eq!(status(&response), 502, "{response}");
    let request = broker.request();
    assert_eq!((request.outcome, request.status), (Outcome::Failed, 502));
    assert!(request.reason.starts_with("failed to connect to the metadata service: "), "{}", request.reason);
    // Packets to this address get no response.
    broker.node.ip(
        "link add hole0 type veth peer name hole1\nlink set hole0 up\nlink set hole1 up\naddr add 192.0.2.1/24 dev hole0\n\
         neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev hole0",
    );
    let ToBroker::Listen { id, provider, allow, .. } = broker.listen("aws", &["GET /a"]) else {
        unreachable!()
    };
    let endpoint = "192.0.2.2:80".parse().unwrap();
    let pod = broker.pod_in(pod.netns, &ToBroker::Listen { id, endpoint, provider, allow });
    let start = Instant::now();
    assert_eq!(status(&pod.get("/a")), 504);
    assert!((2..5).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn service_that_hangs() {
    let broker = Broker::start();
    let service = Simulator::start(&broker.node, crate::harness::ENDPOINT, |_| {
        sleep(Duration::from_mins(1));
        Vec::new()
    });
    let pod = broker.pod("aws", &["GET /a"]);
    // The exchange ends as soon as the pod closes the connection.
    let mut stream = pod.connect();
    stream.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    imds_tests::poll::poll_until(Duration::from_secs(5), "the request", || {
        (!service.seen().is_empty()).then_some(())
    });
    drop(stream);
    let request = broker.request();
    assert_eq!((request.outcome, &*request.reason), (Outcome::Failed, "the pod closed the connection"));
    let start = Instant::now();
    assert_eq!(status(&pod.get("/a")), 504);
    assert!((10..14).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn ipv6_endpoint() {
    let broker = Broker::start();
    let service = Simulator::start(&broker.node, "[fd00:ec2::254]:80", |seen| ok(&seen.target));
    let ToBroker::Listen { id, provider, allow, .. } = broker.listen("aws", &["GET /a"]) else {
        unreachable!()
    };
    let endpoint = "[fd00:ec2::254]:80".parse().unwrap();
    let netns = imds_tests::Netns::new("pod");
    netns.ip("link set lo up");
    let pod = broker.pod_in(netns, &ToBroker::Listen { id, endpoint, provider, allow });
    assert_eq!(status(&pod.get("/a")), 200);
    assert_eq!(service.last().headers, ["host: [fd00:ec2::254]"]);
}

//! `on_deny = "explain"`: a denied pod gets the response 403 with the reason, and no packet reaches the metadata service.

mod clients;
mod lifecycle;
mod limits;

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
};

use imds_tests::{
    AgentCommand, METADATA, METADATA_V6, Netns, PodLink, SERVICE, Status, TestEnv,
    executable::broker_executable,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, udp_echo},
    skip_without_netns_cookie,
};
use serde_json::Value;

/// Hooks of all tests. The socket hook alone would deny only calls.
pub(crate) const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
pub(crate) const IMDS: SocketAddr = SocketAddr::new(IpAddr::V4(METADATA), 80);
pub(crate) const IMDS_V6: SocketAddr = SocketAddr::new(IpAddr::V6(METADATA_V6), 80);
/// Path of a token.
pub(crate) const TOKEN: &str = "/metadata/identity/oauth2/token";

/// Returns the configuration that explains denials of this provider.
pub(crate) fn explain(provider: &str) -> String {
    format!("provider = '{provider}'\non_deny = 'explain'\n")
}

/// Returns `imds-agent run` with all hooks of the tests and a broker.
pub(crate) fn agent<'e>(env: &'e TestEnv, config: &str) -> AgentCommand<'e> {
    let broker = broker_executable();
    env.agent().config(config).hooks(HOOKS).args(&["--broker", broker.to_str().unwrap()])
}

/// Sends a request from a socket in the cgroup of the socket hook. Returns the peer and the response.
pub(crate) fn ask(
    env: &TestEnv,
    netns: &Netns,
    address: SocketAddr,
    request: &str,
) -> io::Result<(SocketAddr, String)> {
    env.in_cgroup(|| {
        netns.run(|| {
            let mut stream = TcpStream::connect_timeout(&address, SHORT)?;
            stream.set_read_timeout(Some(LONG))?;
            stream.write_all(request.as_bytes())?;
            let mut response = Vec::new();
            stream.read_to_end(&mut response)?;
            Ok((stream.peer_addr()?, String::from_utf8_lossy(&response).into_owned()))
        })
    })
}

/// Returns the response to a GET.
pub(crate) fn get(env: &TestEnv, netns: &Netns, address: SocketAddr, path: &str) -> io::Result<String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\nConnection: close\r\n\r\n");
    ask(env, netns, address, &request).map(|(_, response)| response)
}

pub(crate) fn is_explained(response: &io::Result<String>) -> bool {
    response
        .as_ref()
        .is_ok_and(|text| text.starts_with("HTTP/1.1 403 ") && text.contains("imds-agent of this node"))
}

/// Waits until a pod gets an explanation. Until then it is denied.
#[track_caller]
pub(crate) fn wait_explained(env: &TestEnv, netns: &Netns, address: SocketAddr) {
    poll_until(LONG, "a denial to be explained", || {
        let response = get(env, netns, address, TOKEN);
        assert!(response.is_err() || is_explained(&response), "{response:?}");
        is_explained(&response).then_some(())
    });
}

/// Asserts that requests get an explanation, and that no packet arrives at the metadata service.
#[track_caller]
pub(crate) fn assert_explained(env: &TestEnv, netns: &Netns, address: SocketAddr) {
    env.assert_nothing_arrives(|| {
        let response = get(env, netns, address, TOKEN);
        assert!(is_explained(&response), "{response:?}");
    });
}

/// Asserts that a connection fails, and that no packet arrives at the metadata service.
#[track_caller]
pub(crate) fn assert_refused(env: &TestEnv, netns: &Netns) {
    env.assert_nothing_arrives(|| {
        let error = get(env, netns, IMDS, TOKEN).unwrap_err();
        let is_refused =
            matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ConnectionRefused);
        assert!(is_refused, "{error}");
    });
}

pub(crate) fn explained_pods(status: &Status) -> usize {
    status.explained.as_ref().map_or(0, |explained| explained.pods)
}

#[test]
fn denied_pod_gets_a_reason() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    assert!(get(&env, &pod.netns, IMDS, TOKEN).unwrap().starts_with("HTTP/1.1 200 "));
    let agent = agent(&env, &explain("azure")).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    let before = env.status().denied();
    env.assert_nothing_arrives(|| {
        let request = format!("GET {TOKEN}?resource=a HTTP/1.1\r\nHost: a\r\nMetadata: true\r\n\r\n");
        let (peer, response) = ask(&env, &pod.netns, IMDS, &request).unwrap();
        assert_eq!(peer, IMDS);
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains("content-type: application/json") && head.contains("connection: close"),
            "{head}"
        );
        let body: Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"], "access_denied");
        let reason = body["error_description"].as_str().unwrap();
        assert!(reason.ends_with(&format!("with allow = [\"GET {TOKEN}\"]")), "{reason}");
        // Everything but TCP port 80 is denied as before.
        let other = SocketAddr::new(METADATA.into(), 8080);
        let error = get(&env, &pod.netns, other, TOKEN).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        assert!(!env.in_cgroup(|| udp_echo(&pod.netns, METADATA, SHORT)).is_answer());
        // A socket in no pod cgroup meets the packet hooks.
        assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    });
    assert!(env.in_cgroup(|| http_get(&pod.netns, SERVICE, SHORT)).is_answer());
    assert!(env.in_cgroup(|| http_get(&env.node, METADATA, SHORT)).is_answer(), "the node is not denied");

    let status = env.status();
    assert_eq!((status.state.as_str(), explained_pods(&status)), ("enforcing", 1), "{status:#?}");
    assert_eq!(status.on_deny.as_deref(), Some("explain"));
    assert!(status.exemptions.is_empty(), "{:#?}", status.exemptions);
    assert!(status.denied() > before && status.total.redirected.packets == 0, "{:?}", status.total);
    let text = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(text.contains("on_deny    explain, 1 pod\n"), "{text}");
    assert_reported(&env);
    drop(agent);
    env.unload();
    assert!(get(&env, &pod.netns, IMDS, TOKEN).unwrap().starts_with("HTTP/1.1 200 "));
}

/// The operator sees explained connections as denials of the socket hook.
#[track_caller]
fn assert_reported(env: &TestEnv) {
    poll_until(LONG, "the report to have the denial", || {
        let output = env.imds_agent(&["report", "-o", "json"]).output();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let denials = report["denials"].as_array().unwrap();
        denials.iter().any(|denial| denial["counts"]["socket"].as_u64() > Some(0)).then_some(())
    });
}

#[test]
fn both_ip_versions_and_the_mapped_form() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    poll_until(LONG, "the endpoint to be reachable", || get(&env, &pod.netns, IMDS_V6, TOKEN).ok());
    let _agent = agent(&env, &explain("aws")).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    wait_explained(&env, &pod.netns, IMDS_V6);
    let mapped = SocketAddr::new(METADATA.to_ipv6_mapped().into(), 80);
    for address in [IMDS, IMDS_V6, mapped] {
        assert_explained(&env, &pod.netns, address);
    }
    assert_eq!(explained_pods(&env.status()), 1);
}

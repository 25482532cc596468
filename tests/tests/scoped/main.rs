//! Scoped exemptions: a pod makes the requests that its rule allows, and no others.
//!
//! The tests run the broker beside the agent, or the one that `IMDS_BROKER` names. Without either, a [stand-in](stand_in)
//! answers.

mod attacks;
mod broker_failures;
mod kubernetes;
mod lifecycle;
mod limits;
mod node;
mod requests;
mod stand_in;

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
};

use imds_tests::{
    Agent, AgentCommand, METADATA, METADATA_V6, Netns, Pod, PodLink, SERVICE, Status, TestEnv,
    lacks_netns_cookie,
    poll::poll_until,
    probe::{LONG, SHORT},
    skip_without_netns_cookie,
};

/// Hooks of all tests. The socket hook alone would deny only calls.
pub(crate) const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
/// Path that the rules of the tests allow.
pub(crate) const ALLOWED: &str = "/metadata/instance";
/// Path that the rules do not allow.
pub(crate) const REFUSED: &str = "/latest/user-data";
pub(crate) const IMDS: SocketAddr = SocketAddr::new(IpAddr::V4(METADATA), 80);
pub(crate) const IMDS_V6: SocketAddr = SocketAddr::new(IpAddr::V6(METADATA_V6), 80);

/// Endpoints of the tests.
pub(crate) const ENDPOINTS: &str = "provider = 'none'
    [[endpoint]]
    name = 'four'
    address = '169.254.169.254'
    [[endpoint]]
    name = 'six'
    address = 'fd00:ec2::254'
";

/// Returns a configuration with a scoped exemption for `sender`.
pub(crate) fn scoped(sender: &str, allow: &str) -> String {
    format!("[[exempt]]\nname = 'region'\n{sender}\nallow = ['{allow}']\n")
}

/// Returns a configuration with a scoped exemption for this namespace.
pub(crate) fn scoped_netns(netns: &Netns) -> String {
    let rule = scoped(&format!("netns = '{}'", netns.path().display()), "GET /metadata/instance");
    format!("{ENDPOINTS}{rule}")
}

/// Returns `imds-agent run` with all hooks of the tests and a broker.
pub(crate) fn agent<'e>(env: &'e TestEnv, config: &str) -> AgentCommand<'e> {
    let broker = stand_in::broker(env);
    env.agent().config(config).hooks(HOOKS).args(&["--broker", broker.to_str().unwrap()])
}

/// Sends a request to `address` from a socket in the cgroup of the socket hook. Returns the HTTP status.
pub(crate) fn get(env: &TestEnv, netns: &Netns, address: SocketAddr, path: &str) -> io::Result<u16> {
    get_with(env, netns, address, path, |_| ()).map(|(status, ())| status)
}

/// Calls `inspect` with the connected socket before it sends a request.
pub(crate) fn get_with<T: Send>(
    env: &TestEnv,
    netns: &Netns,
    address: SocketAddr,
    path: &str,
    inspect: impl FnOnce(&TcpStream) -> T + Send,
) -> io::Result<(u16, T)> {
    env.in_cgroup(|| {
        netns.run(|| {
            let mut stream = TcpStream::connect_timeout(&address, SHORT)?;
            let inspected = inspect(&stream);
            Ok((exchange(&mut stream, path)?, inspected))
        })
    })
}

pub(crate) fn exchange(stream: &mut TcpStream, path: &str) -> io::Result<u16> {
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, answer))
}

/// Waits until an allowed request gets an answer.
#[track_caller]
pub(crate) fn wait_allowed(env: &TestEnv, netns: &Netns, address: SocketAddr) {
    wait_answer(env, netns, address, ALLOWED);
}

/// Waits until the endpoint itself answers a request that the rules do not allow.
#[track_caller]
pub(crate) fn wait_open(env: &TestEnv, netns: &Netns) {
    wait_answer(env, netns, IMDS, REFUSED);
}

#[track_caller]
fn wait_answer(env: &TestEnv, netns: &Netns, address: SocketAddr, path: &str) {
    poll_until(LONG, &format!("an answer to the request of {path}"), || {
        (get(env, netns, address, path).ok() == Some(200)).then_some(())
    });
}

/// Asserts that an allowed request is answered, that another is refused, and that the peer seems to be `address`.
#[track_caller]
pub(crate) fn assert_scoped(env: &TestEnv, netns: &Netns, address: SocketAddr) {
    let (status, peer) = get_with(env, netns, address, ALLOWED, TcpStream::peer_addr).unwrap();
    assert_eq!((status, peer.unwrap()), (200, address));
    let refused = get(env, netns, address, REFUSED).unwrap();
    assert_eq!(refused, 403);
}

/// Asserts that connections are denied, and that no packet arrives at the metadata service.
#[track_caller]
pub(crate) fn assert_denied(env: &TestEnv, netns: &Netns) {
    env.assert_nothing_arrives(|| {
        let error = get(env, netns, IMDS, ALLOWED).unwrap_err();
        let is_refused = matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ConnectionRefused);
        assert!(is_refused, "{error}");
    });
}

/// Returns the endpoints to which connections of pods are redirected.
pub(crate) fn redirected(status: &Status) -> Vec<&str> {
    let senders = status.exemptions.iter().filter(|sender| sender.verdict == "redirected");
    senders.map(|sender| sender.endpoint.as_deref().unwrap()).collect()
}

pub(crate) fn start<'e>(env: &'e TestEnv, pod: &Pod) -> Agent<'e> {
    let agent = agent(env, &scoped_netns(&pod.netns)).spawn_ready();
    wait_allowed(env, &pod.netns, IMDS);
    agent
}

/// A kernel without netns cookies refuses the rule in words.
#[test]
fn rule_is_applied_or_reported() {
    let env = TestEnv::new();
    let [pod, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    wait_open(&env, &pod.netns);
    if lacks_netns_cookie() {
        let _agent = agent(&env, &scoped_netns(&pod.netns)).spawn_degraded("Linux 5.14");
        // The socket hook cannot be attached either, so that packets are dropped.
        return env.assert_nothing_arrives(|| assert!(get(&env, &pod.netns, IMDS, ALLOWED).is_err()));
    }
    let agent = start(&env, &pod);
    assert_scoped(&env, &pod.netns, IMDS);
    assert_denied(&env, &other.netns);
    wait_allowed(&env, &pod.netns, (SERVICE, 80).into());

    let status = env.status();
    // A pod may have a listener for the IPv6 endpoint too.
    let sender = status.exemptions.iter().find(|sender| sender.endpoint.as_deref() == Some("four")).unwrap();
    assert_eq!((sender.verdict.as_str(), status.state.as_str()), ("redirected", "enforcing"), "{status:#?}");
    assert_eq!((sender.rule.as_str(), sender.other_rules), ("region", 0));
    assert_eq!(sender.allow.as_deref(), Some(&["GET /metadata/instance".to_owned()][..]));
    let counts = status.sockets.unwrap().counts;
    assert!(counts.redirected.packets >= 3 && counts.denied.packets >= 1, "{counts:?}");
    let text = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(text.contains(" to four (rule region), only GET /metadata/instance\n"), "{text}");
    drop(agent);
    env.unload();
    wait_open(&env, &pod.netns);
}

#[test]
fn ipv6_endpoint_and_mapped_address() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    let _agent = start(&env, &pod);
    wait_allowed(&env, &pod.netns, IMDS_V6);
    let mapped = SocketAddr::new(METADATA.to_ipv6_mapped().into(), 80);
    for address in [IMDS, IMDS_V6, mapped] {
        assert_scoped(&env, &pod.netns, address);
    }
    let mut endpoints = redirected(&env.status()).iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    endpoints.sort();
    assert_eq!(endpoints, ["four", "six"]);
}

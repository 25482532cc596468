//! Clients of a denied pod, and requests in other forms than HTTP/1.1.

use std::process::Command;

use imds_tests::{
    METADATA, Netns, PodLink, TestEnv, executable::find_program, skip, skip_without_netns_cookie,
};

use crate::{IMDS, agent, ask, explain, wait_explained};

const PYTHON: &str = "
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error:
    print(error.code)
    print(error.headers.get('metadata-flavor'))
    print(error.read().decode())
";

/// Returns the standard output of a program in the pod, in the cgroup of the socket hook.
fn run(env: &TestEnv, netns: &Netns, program: &str, args: &[&str]) -> Option<String> {
    if find_program(program).is_none() {
        skip(program, "it is not installed");
        return None;
    }
    let output = env.in_cgroup(|| {
        let mut command: Command = netns.command(program);
        command.args(args).output().unwrap()
    });
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn curl_and_python_get_the_reason() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = agent(&env, &explain("gcp")).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    let url = format!("http://{METADATA}/computeMetadata/v1/instance/zone");
    env.assert_nothing_arrives(|| {
        let args = ["--silent", "--max-time", "5", "--noproxy", "*", "--include", &url];
        if let Some(text) = run(&env, &pod.netns, "curl", &args) {
            assert!(text.starts_with("HTTP/1.1 403 Forbidden\r\nmetadata-flavor: Google\r\n"), "{text}");
            let rule = "allow = [\"GET /computeMetadata/v1/instance/zone\"]";
            assert!(text.contains("content-type: text/html") && text.contains(rule), "{text}");
        }
        if let Some(text) = run(&env, &pod.netns, "python3", &["-c", PYTHON, &url]) {
            let mut lines = text.lines();
            assert_eq!((lines.next(), lines.next()), (Some("403"), Some("Google")), "{text}");
            assert!(text.contains("imds-agent of this node denies this pod"), "{text}");
        }
    });
}

/// A scoped exemption refuses these as malformed.
#[test]
fn every_request_is_answered() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = agent(&env, &explain("aws")).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    env.assert_nothing_arrives(|| {
        for request in [
            "GET / HTTP/1.0\r\n\r\n",
            "GET /latest/meta-data\r\n\r\n",
            "GET /a/../b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://169.254.169.254/latest HTTP/1.1\r\nHost: a\r\n\r\n",
            "PUT /latest/api/token HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "PATCH /latest HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            let (_, response) = ask(&env, &pod.netns, IMDS, request).unwrap();
            assert!(
                response.starts_with("HTTP/1.1 403 Forbidden\r\ncontent-type: text/html\r\n"),
                "{request}"
            );
            assert!(
                response.contains("<h1>403 - Forbidden</h1>\n  <p>imds-agent of this node"),
                "{response}"
            );
        }
        let (_, response) = ask(&env, &pod.netns, IMDS, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert!(response.starts_with("HTTP/1.1 403 ") && response.ends_with("\r\n\r\n"), "{response}");
    });
}

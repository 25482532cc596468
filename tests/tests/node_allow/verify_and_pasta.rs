//! `verify` with the allow list, and rootless containers whose network is pasta(1).

use std::net::Ipv4Addr;

use imds_tests::{
    Cgroup, METADATA, SERVICE, TestEnv, lacks_program, output, probe::reachable, skip,
    skip_without_netns_cookie,
};
use serde_json::Value;

use crate::{HOOK, USER, allow, entry, uid};

#[test]
fn verify_checks_an_unlisted_process() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let verify = || {
        let output = env.in_cgroup(|| env.imds_agent(&["verify", "-o", "json"]).output());
        let report: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let checks = report["checks"].as_array().unwrap().clone();
        let of = move |hook: &str, sender: &str| {
            let mut found = checks.iter().filter(|check| check["hook"] == hook && check["sender"] == sender);
            found.next().map(|check| (check["outcome"].clone(), check["observed"].to_string()))
        };
        (output.status.code(), report["passed"].clone(), of)
    };
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).spawn_ready();
    let (code, passed, of) = verify();
    assert_eq!((code, passed), (Some(0), true.into()));
    let (result, observed) = of(HOOK, "unlisted process").expect("a check of the hook");
    assert!(result == "passed" && observed.contains("refused"), "{result} {observed}");
    assert_eq!(of("path", "node").expect("a check of the node").0, "passed");
    assert!(reachable(&env.node, METADATA) && env.in_cgroup(|| reachable(&env.node, METADATA)));
    drop(agent);

    let _agent = env.agent().hooks(&["from_pod"]).config(&allow(&[&uid(USER)])).spawn_ready();
    let (code, _, of) = verify();
    assert_eq!(code, Some(0));
    assert_eq!(of(HOOK, "unlisted process").expect("a check of the hook").0, "passed");
    let (result, observed) = of("path", "node").expect("a check of the node");
    assert!(
        result == "skipped"
            && observed.contains("node.allow does not contain the process of this command; add")
            && observed.contains("uid:0")
            && observed.contains(&entry(env.cgroup())),
        "{result} {observed}"
    );
    let (result, observed) = of("path", "exempt pod").expect("a check of exempt pods");
    assert!(result == "skipped" && observed.contains("see the sender node"), "{result} {observed}");
}

/// Runs pasta as a user that may open /dev/net/tun, as on machines with udev. Arguments: the user, and a shell command
/// for the container.
const PASTA: &str = "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
     exec timeout 20 setpriv --reuid $0 --regid $0 --clear-groups pasta --config-net --quiet -- bash -c \"$1\"";

/// Reports whether a rootless container of the user with pasta(1) gets a response. The container has a network
/// namespace of its own; pasta sends the requests on sockets of the node.
fn pasta_reaches(env: &TestEnv, cgroup: &Cgroup, user: u32, to: Ipv4Addr) -> Result<bool, String> {
    let request = format!(
        "timeout 3 bash -c 'exec 3<>/dev/tcp/{to}/80; \
         printf \"GET / HTTP/1.1\\r\\nHost: m\\r\\nMetadata: true\\r\\n\\r\\n\" >&3; head -n 1 <&3'; echo ran"
    );
    let mut command = env.node.command("unshare");
    command.args(["--mount", "sh", "-c", PASTA, &user.to_string(), &request]);
    let output = cgroup.run(|| output(command));
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !stdout.contains("ran") {
        return Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " "));
    }
    Ok(stdout.contains("HTTP/1.1 200"))
}

#[test]
fn rootless_containers_with_pasta() {
    // `socket` would deny the call of the container, so that pasta gets none.
    const PACKETS: [&str; 2] = ["from_pod", "node_egress"];
    if skip_without_netns_cookie()
        || lacks_program("the whole test", &["pasta", "setpriv", "unshare", "bash", "timeout"])
    {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("user.slice");
    let reaches = |user| pasta_reaches(&env, &cgroup, user, METADATA);
    match reaches(USER) {
        Ok(is_answered) => assert!(is_answered, "pasta does not reach the endpoint without the agent"),
        Err(error) => return skip("the whole test", &format!("pasta does not run here: {error}")),
    }
    let agent = env.agent().hooks(&PACKETS);
    let agent = agent.config(&allow(&["uid:0"])).spawn_ready();
    env.assert_nothing_arrives(|| assert_eq!(reaches(USER), Ok(false)));
    assert_eq!(pasta_reaches(&env, &cgroup, USER, SERVICE), Ok(true));
    let status = env.status();
    let counts = status.node_allow.as_ref().expect("node_allow is on").counts;
    assert!(counts.denied.packets > 0, "{status:#?}");
    drop(agent);
    let agent = env.agent().hooks(&PACKETS);
    let agent = agent.config(&allow(&["uid:0", &uid(USER)])).spawn_ready();
    assert_eq!(reaches(USER), Ok(true));
    drop(agent);
    env.unload();
    assert_eq!(reaches(USER), Ok(true));
}

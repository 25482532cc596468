//! `verify` with the allow list, and rootless containers whose network is pasta(1) or slirp4netns(1).

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
    let (result, observed) = of("path", "node").expect("a check of the node");
    assert_eq!(result, "passed", "{observed}");
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

/// Network program of a rootless container.
struct Network {
    program: &'static str,
    /// Shell command that runs the program and a container as the user `$0`, who may open /dev/net/tun as on machines with
    /// udev. The container runs the shell command `$1`.
    script: &'static str,
}

const PASTA: Network = Network {
    program: "pasta",
    script: "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
             exec timeout 20 setpriv --reuid $0 --regid $0 --clear-groups pasta --config-net --quiet -- bash -c \"$1\"",
};
/// The container exists before slirp4netns starts, and waits until slirp4netns has configured its network.
const SLIRP4NETNS: Network = Network {
    program: "slirp4netns",
    script: r#"mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && mkfifo -m 666 /dev/net/up /dev/net/ready &&
               exec timeout 20 setpriv --reuid $0 --regid $0 --clear-groups bash -c '
               unshare --user --map-root-user --net bash -c "echo > /dev/net/up; read -r < /dev/net/ready; $0" & container=$!
               read -r < /dev/net/up
               slirp4netns --configure --ready-fd 3 $container tap0 3> /dev/net/ready >&2 &
               wait $container; kill $!' "$1""#,
};

impl Network {
    /// Reports whether a rootless container of the user gets a response. The container has a network namespace of its
    /// own; the program sends the requests on sockets of the node.
    fn reaches(&self, env: &TestEnv, cgroup: &Cgroup, user: u32, to: Ipv4Addr) -> Result<bool, String> {
        let request = format!(
            "timeout 3 bash -c 'exec 3<>/dev/tcp/{to}/80; \
             printf \"GET / HTTP/1.1\\r\\nHost: m\\r\\nMetadata: true\\r\\n\\r\\n\" >&3; head -n 1 <&3'; echo ran"
        );
        let mut command = env.node.command("unshare");
        command.args(["--mount", "sh", "-c", self.script, &user.to_string(), &request]);
        let output = cgroup.run(|| output(command));
        let stdout = String::from_utf8_lossy(&output.stdout);
        if !stdout.contains("ran") {
            return Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " "));
        }
        Ok(stdout.contains("HTTP/1.1 200"))
    }

    fn assert_denied_unless_listed(&self) {
        // `socket` would deny the call of the container, so that the program gets none.
        const PACKETS: [&str; 2] = ["from_pod", "node_egress"];
        let Self { program, .. } = self;
        if skip_without_netns_cookie()
            || lacks_program("the whole test", &[program, "setpriv", "unshare", "bash", "timeout"])
        {
            return;
        }
        let env = TestEnv::new();
        let cgroup = env.add_cgroup("user.slice");
        let reaches = |user| self.reaches(&env, &cgroup, user, METADATA);
        match reaches(USER) {
            Ok(is_answered) => {
                assert!(is_answered, "{program} does not reach the endpoint without the agent");
            }
            Err(error) => return skip("the whole test", &format!("{program} does not run here: {error}")),
        }
        let agent = env.agent().hooks(&PACKETS);
        let agent = agent.config(&allow(&["uid:0"])).spawn_ready();
        env.assert_nothing_arrives(|| assert_eq!(reaches(USER), Ok(false)));
        assert_eq!(self.reaches(&env, &cgroup, USER, SERVICE), Ok(true));
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
}

#[test]
fn rootless_containers_with_pasta() {
    PASTA.assert_denied_unless_listed();
}

#[test]
fn rootless_containers_with_slirp4netns() {
    SLIRP4NETNS.assert_denied_unless_listed();
}

//! The systemd service and containers with Debian's SELinux policy.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    thread,
};

use imds_tests::{
    METADATA, Netns, PodLink, TestCluster, TestEnv,
    api_server::{self},
    executable::broker_of,
    http::{DEFAULT, exchange, try_get},
    kubelet::{Driver, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT, reachable},
};

use crate::{
    Confined,
    distribution::{
        AGENT, BROKER, Policy, context, denials, label, write_attribute, write_container_launcher,
        write_service_launcher,
    },
};

const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
const DOMAINS: [&str; 2] = ["imds_agent_t", "imds_broker_t"];
/// Socket of the metrics, in the service's `RuntimeDirectory=`.
const METRICS: &str = "/run/imds-agent/metrics.sock";
/// Denial records, in the service's `LogsDirectory=`.
const RECORDS: &str = "/var/log/imds-agent/denials.json";
/// A pod whose exemption has `allow`, and one with an unrestricted exemption.
const RULES: &str = "provider = 'none'
    [[endpoint]]
    name = 'four'
    address = '169.254.169.254'
    [[exempt]]
    name = 'trusted'
    namespace = 'kube-system'
    [[exempt]]
    name = 'region'
    namespace = 'web'
    allow = ['GET /metadata/instance']
    [metrics]
    listen = ['127.0.0.1:9254', '/run/imds-agent/metrics.sock']
    [events]
    sinks = [{ type = 'file', path = '/var/log/imds-agent/denials.json' }]
";

/// Sends a request from a process of the pod. Returns the HTTP status.
fn get(env: &TestEnv, netns: &Netns, path: &str) -> io::Result<u16> {
    let address = SocketAddr::from((METADATA, 80));
    env.in_cgroup(|| {
        netns.run(|| {
            let mut stream = TcpStream::connect_timeout(&address, SHORT)?;
            stream.set_read_timeout(Some(LONG))?;
            let head = format!("GET {path} HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\n");
            write!(stream, "{head}Connection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
            status.ok_or_else(|| io::Error::other(answer.clone()))
        })
    })
}

/// Prints the denials of the service if the test fails.
struct ShowDenials;

impl Drop for ShowDenials {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("denials: {:#?}", denials(&DOMAINS));
        }
    }
}

/// A pod of a namespace, with a process in an ordinary domain of containers.
fn start_pod(cluster: &TestCluster, namespace: &str) -> (imds_tests::Pod, imds_tests::kubelet::PodCgroup) {
    let uid = new_uid();
    let pod = cluster.env.add_pod(PodLink::Routed);
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    let mut process = pod.netns.command("/tools/sh");
    let become_container = write_attribute("current", "container_t:s0:c1,c2");
    process.args(["-c", &format!("{become_container}; read -r line"), "sleep"]);
    process.stdin(std::process::Stdio::piped());
    let pid = cgroup.start(process);
    poll_until(LONG, "the process of a container", || context(pid).contains(":container_t:").then_some(()));
    cluster.server.apply(api_server::pod(&uid, TestCluster::NODE, namespace, "default", &[]));
    (pod, cgroup)
}

#[test]
fn service_has_a_domain_of_its_own() {
    let Some(policy) = Policy::load("service") else { return };
    for path in [AGENT, BROKER, "/run/imds-agent", "/var/log/imds-agent", "/var/lib/imds-agent"] {
        policy.restore_label(path);
    }
    let _show = ShowDenials;
    let cluster = TestCluster::new();
    let env = &cluster.env;
    fs::create_dir_all(env.state_dir()).unwrap();
    label(&env.state_dir(), "imds_agent_state_t");
    let [denied, trusted, region] =
        ["other", "kube-system", "web"].map(|namespace| start_pod(&cluster, namespace));
    let launcher = write_service_launcher(env.scratch_dir());
    let start = || env.agent().config(&cluster.config(RULES)).hooks(HOOKS).binary(&launcher).spawn_ready();

    let agent = start();
    assert_eq!(context(agent.pid()), "system_u:system_r:imds_agent_t:s0");
    env.assert_blocked(&denied.0);
    cluster.wait_exempt(&trusted.0);
    poll_until(LONG, "the allowed request to be answered", || {
        (get(env, &region.0.netns, "/metadata/instance").ok() == Some(200)).then_some(())
    });
    assert_eq!(get(env, &region.0.netns, "/latest/user-data").unwrap(), 403);
    assert_eq!(context(broker_of(agent.pid()).expect("a broker")), "system_u:system_r:imds_broker_t:s0");
    assert_eq!(try_get(env, DEFAULT, "/healthz").unwrap().0, 200);
    assert_eq!(exchange(UnixStream::connect(METRICS).unwrap(), "/metrics").unwrap().0, 200);
    poll_until(LONG, "denial records", || {
        fs::read_to_string(RECORDS).is_ok_and(|records| records.contains("denied")).then_some(())
    });

    agent.kill9();
    cluster.assert_denied(&denied.0.netns);
    let agent = start();
    cluster.wait_exempt(&trusted.0);
    cluster.wait_denied(&denied.0);
    assert_eq!(agent.terminate().code(), Some(0));
    env.assert_blocked(&denied.0);
    assert_eq!(denials(&DOMAINS), [""; 0]);

    env.unload();
    assert!(reachable(&denied.0.netns, METADATA));
    assert_eq!(denials(&DOMAINS), [""; 0]);
}

/// systemd starts executables without rules in the domain of init scripts, which Debian does not confine.
#[test]
fn service_without_the_module() {
    let Some(policy) = Policy::load("distribution") else { return };
    policy.restore_label(AGENT).restore_label(BROKER);
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let launcher = write_service_launcher(env.scratch_dir());
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).binary(&launcher).spawn_ready();
    assert_eq!(context(agent.pid()), "system_u:system_r:initrc_t:s0");
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    assert!(reachable(&pod.netns, METADATA));
}

#[test]
fn confined_service_is_refused() {
    let Some(_policy) = Policy::load("distribution") else { return };
    let confined = Confined::with_wrapper(write_service_launcher);
    // systemd then starts it in the domain of the time service.
    label(Path::new(AGENT), "ntpd_exec_t");
    confined.assert_refused("SELinux context system_u:system_r:ntpd_t:s0");
    let (_, table, _) = confined.run(&["doctor"]);
    assert!(table.contains("SELinux context system_u:system_r:ntpd_t:s0"), "{table}");
    label(Path::new(AGENT), "bin_t");
}

#[test]
fn container_is_refused_unless_its_type_is_privileged() {
    let Some(_policy) = Policy::load("distribution") else { return };
    let container = |kind: &'static str| {
        move |dir: &Path| {
            let program = dir.join("imds-agent");
            fs::copy(AGENT, &program).unwrap();
            label(&program, "container_file_t");
            write_container_launcher(dir, kind, &program)
        }
    };
    let confined = Confined::with_wrapper(container("container_t:s0:c1,c2"));
    confined.assert_refused("SELinux context system_u:system_r:container_t:s0:c1,c2");
    drop(confined);

    let privileged = Confined::with_wrapper(container("spc_t:s0"));
    let env = &privileged.env;
    let agent = env.agent().hooks(HOOKS).binary(&privileged.wrapper).spawn_ready();
    assert_eq!(context(agent.pid()), "system_u:system_r:spc_t:s0");
    env.assert_blocked(&privileged.pod);
    drop(agent);
    let (code, _, stderr) = privileged.run(&["unload"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(reachable(&privileged.pod.netns, METADATA));
    assert_eq!(denials(&["spc_t"]), [""; 0]);
}

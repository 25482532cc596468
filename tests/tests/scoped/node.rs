//! The broker asks the endpoints from the node: hooks that restrict the node let it pass.

use std::{env, fs, net::TcpStream, path::Path, process};

use imds_tests::{
    METADATA, Netns, PodLink, TestEnv,
    kubelet::{Driver, Kubelet, new_uid},
    output,
    poll::poll_until,
    probe::LONG,
    skip, skip_without_netns_cookie,
};

use crate::{
    ALLOWED, ENDPOINTS, IMDS, REFUSED, agent, assert_scoped, exchange, scoped, scoped_netns, stand_in,
    wait_allowed,
};

/// File that moves the process of [`request_from_cgroup`] into a cgroup.
const PROCS: &str = "IMDS_TEST_CGROUP_PROCS";
/// Path that [`request_from_cgroup`] requests.
const PATH: &str = "IMDS_TEST_REQUEST_PATH";

/// Sends a request from a process in the cgroup. Returns the output of the process, which contains the status code or the error.
fn get_in_cgroup(netns: &Netns, procs: &Path, path: &str) -> String {
    let mut child = netns.command(env::current_exe().unwrap());
    child.args(["--exact", "node::request_from_cgroup", "--nocapture"]).env(PROCS, procs).env(PATH, path);
    String::from_utf8(output(child).stdout).unwrap()
}

/// The request of [`get_in_cgroup`], if its variables are set; else a test that passes.
#[test]
fn request_from_cgroup() {
    let (Ok(procs), Ok(path)) = (env::var(PROCS), env::var(PATH)) else { return };
    fs::write(procs, process::id().to_string()).unwrap();
    let result = TcpStream::connect_timeout(&IMDS, LONG).and_then(|mut stream| exchange(&mut stream, &path));
    println!("{result:?}");
}

/// The agent runs in a hostNetwork pod, whose requests `host_network` denies.
#[test]
fn broker_in_a_host_network_pod() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let kubelet = Kubelet::new();
    let pod = env.add_pod(PodLink::Routed);
    let [own, others] = [(); 2].map(|()| kubelet.add_pod(&new_uid(), Driver::Cgroupfs));
    let procs = |container: &Path| container.join("cgroup.procs");
    let config = env.scratch_dir().join("imds.toml");
    let hooks = "[hooks]\nhost_network = true\nlocal_service = false\n";
    fs::write(&config, format!("{ENDPOINTS}{hooks}")).unwrap();
    let (root, broker) = (kubelet.root().to_str().unwrap(), stand_in::broker(&env));
    let command = env.agent().config_file(config.to_str().unwrap());
    let agent = command.args(&["--cgroup", root, "--broker", broker.to_str().unwrap()]).spawn_ready();
    fs::write(procs(&own.container), agent.pid().to_string()).unwrap();
    assert!(get_in_cgroup(&env.node, &procs(&others.container), ALLOWED).contains("Err("));
    assert!(get_in_cgroup(&env.node, &procs(&own.container), ALLOWED).contains("Err("));

    let rule = scoped(&format!("netns = '{}'", pod.netns.path().display()), "GET /metadata/instance");
    fs::write(&config, format!("{ENDPOINTS}{rule}{hooks}")).unwrap();
    agent.hang_up();
    poll_until(LONG, "the allowed request", || {
        get_in_cgroup(&pod.netns, &procs(&others.container), ALLOWED).contains("Ok(200)").then_some(())
    });
    assert!(get_in_cgroup(&pod.netns, &procs(&others.container), REFUSED).contains("Ok(403)"));
    let status = env.status();
    assert!(status.exemptions.iter().any(|sender| sender.rule == "imds-broker"), "{:#?}", status.exemptions);
    assert!(get_in_cgroup(&env.node, &procs(&others.container), ALLOWED).contains("Err("));

    fs::write(&config, format!("{ENDPOINTS}{hooks}")).unwrap();
    agent.hang_up();
    env.status_when("the exemption of the broker ends", |status| status.exemptions.is_empty());
    assert!(get_in_cgroup(&env.node, &procs(&own.container), ALLOWED).contains("Err("));
}

/// The broker has a user of its own, which the allow list of the node gets.
#[test]
fn broker_passes_the_allow_list_of_the_node() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    if stand_in::broker(&env).starts_with(env.scratch_dir()) {
        return skip("the whole test", "the stand-in runs as root, like other processes of the node");
    }
    let pod = env.add_pod(PodLink::Routed);
    let config = format!("{}[node]\nallow = []\n", scoped_netns(&pod.netns));
    let _agent = agent(&env, &config).spawn_ready();
    wait_allowed(&env, &pod.netns, IMDS);
    assert_scoped(&env, &pod.netns, IMDS);
    let node = env.in_cgroup(|| imds_tests::probe::http_get(&env.node, METADATA, imds_tests::probe::SHORT));
    assert!(!node.is_answer());
}

//! Scoped exemptions of Kubernetes pods.

use imds_tests::{
    PodLink, TestCluster,
    api_server::pod,
    kubelet::{Driver, new_uid},
    poll::poll_until,
    probe::LONG,
    skip_without_netns_cookie,
};

use crate::{ENDPOINTS, IMDS, agent, assert_denied, assert_scoped, redirected, scoped, wait_allowed};

const RULE: &str = "namespace = 'kube-system'\nservice_account = 'agent'";

#[test]
fn scope_follows_the_pod() {
    if skip_without_netns_cookie() {
        return;
    }
    for (link, driver) in [(PodLink::Routed, Driver::Systemd), (PodLink::Bridged, Driver::Cgroupfs)] {
        let cluster = TestCluster::new();
        let env = &cluster.env;
        let config = format!("{ENDPOINTS}{}", cluster.config(&scoped(RULE, "GET /metadata/instance")));
        let _agent = agent(env, &config).spawn_ready();
        let uid = new_uid();
        let mut cgroup = cluster.kubelet.add_pod(&uid, driver);
        let sandbox = env.add_pod(link);
        let other = env.add_pod(link);
        cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "agent", &[]));
        assert_denied(env, &sandbox.netns);
        cgroup.start_in(&sandbox.netns);
        wait_allowed(env, &sandbox.netns, IMDS);
        assert_scoped(env, &sandbox.netns, IMDS);
        assert_denied(env, &other.netns);
        let status = env.status();
        let sender = status.exemptions.first().expect("a sender");
        assert!(sender.pod.is_some() && sender.verdict == "redirected", "{sender:?}");

        cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "other", &[]));
        poll_until(LONG, "the listener to end", || redirected(&env.status()).is_empty().then_some(()));
        assert_denied(env, &sandbox.netns);
        cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "agent", &[]));
        wait_allowed(env, &sandbox.netns, IMDS);
        cluster.server.delete(&uid);
        poll_until(LONG, "the listener to end", || redirected(&env.status()).is_empty().then_some(()));
        assert_denied(env, &sandbox.netns);
    }
}

/// The sandbox ends while the API server still lists the pod.
#[test]
fn listener_ends_without_an_event() {
    if skip_without_netns_cookie() {
        return;
    }
    let cluster = TestCluster::new();
    let env = &cluster.env;
    let config = format!("{ENDPOINTS}{}", cluster.config(&scoped(RULE, "GET /metadata/instance")));
    let _agent = agent(env, &config).spawn_ready();
    let uid = new_uid();
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    let sandbox = env.add_pod(PodLink::Routed);
    cluster.server.apply(pod(&uid, TestCluster::NODE, "kube-system", "agent", &[]));
    cgroup.start_in(&sandbox.netns);
    wait_allowed(env, &sandbox.netns, IMDS);
    env.node.ip(&format!("link add witness0 type veth peer name witness1 netns {}", sandbox.netns.name()));
    cgroup.stop();
    sandbox.delete();
    poll_until(LONG, "the network namespace to end", || {
        let links = env.node.command("ip").args(["-o", "link"]).output().unwrap();
        (!String::from_utf8_lossy(&links.stdout).contains("witness0")).then_some(())
    });
}

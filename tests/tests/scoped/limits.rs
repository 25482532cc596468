//! Rules with `allow` that cannot be applied are reported, and modes in which no request is denied.

use imds_tests::{
    PodLink, TestEnv,
    executable::broker_of,
    kubelet::{Driver, Kubelet, new_uid},
    lacks_netns_cookie,
    poll::poll_until,
    probe::LONG,
    skip_without_netns_cookie,
};

use crate::{
    ENDPOINTS, IMDS, REFUSED, agent, assert_denied, get, redirected, scoped, scoped_netns, stand_in,
    wait_open,
};

#[test]
fn socket_hook_off_is_reported() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = scoped_netns(&pod.netns);
    let _agent = agent(&env, &config).hooks(&["from_pod"]).spawn_degraded("`allow` needs the socket hook");
    env.assert_nothing_arrives(|| assert!(get(&env, &pod.netns, IMDS, REFUSED).is_err()));
}

#[test]
fn audit_mode_redirects_nothing() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = format!("mode = 'audit'\n{}", scoped_netns(&pod.netns));
    let agent = agent(&env, &config).spawn_ready();
    wait_open(&env, &pod.netns);
    let status = env.status();
    assert!(redirected(&status).is_empty() && status.total.audited.packets > 0, "{status:#?}");
    assert_eq!(broker_of(agent.pid()), None, "no broker is needed");
}

#[test]
fn process_in_the_nodes_namespace_is_reported() {
    if lacks_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let kubelet = Kubelet::new();
    let mut host_pod = kubelet.add_pod(&new_uid(), Driver::Cgroupfs);
    host_pod.start_in(&env.node);
    let sender = format!("cgroup = '{}'", host_pod.path.display());
    let config = format!("{ENDPOINTS}{}", scoped(&sender, "GET /metadata/instance"));
    let agent = agent(&env, &config).spawn_degraded("`allow` does not cover hostNetwork pods");
    assert!(redirected(&env.status()).is_empty());
    drop(agent);
}

/// Ends while the broker runs: `unload` removes all listeners.
#[test]
fn unload_ends_the_broker() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = crate::start(&env, &pod);
    let broker = broker_of(agent.pid()).expect("a broker");
    env.unload();
    poll_until(LONG, "the broker to end", || (!stand_in::exists(broker)).then_some(()));
    wait_open(&env, &pod.netns);
    drop(agent);
    let _again = crate::start(&env, &pod);
    let other = env.add_pod(PodLink::Routed);
    assert_denied(&env, &other.netns);
}

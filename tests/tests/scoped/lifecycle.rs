//! Restarts of the agent, changed rules, and pods that end.

use std::{fs, path::PathBuf};

use imds_tests::{
    Agent, Netns, PodLink, TestEnv,
    executable::broker_of,
    kubelet::{Driver, Kubelet, new_uid},
    poll::poll_until,
    probe::LONG,
    skip_without_netns_cookie,
};

use nix::sys::signal::Signal;

use crate::{
    ALLOWED, ENDPOINTS, IMDS, REFUSED, agent, assert_denied, assert_scoped, get, redirected, scoped,
    stand_in, start, wait_allowed,
};

/// Writes the file of [`start_with_file`].
fn write_config(env: &TestEnv, rules: &str) -> PathBuf {
    let config = env.scratch_dir().join("imds.toml");
    fs::write(&config, format!("{ENDPOINTS}{rules}\n[hooks]\nlocal_service = false\n")).unwrap();
    config
}

/// Starts an agent that reloads these rules from a file.
fn start_with_file<'e>(env: &'e TestEnv, rules: &str) -> Agent<'e> {
    let (config, broker) = (write_config(env, rules), stand_in::broker(env));
    let cgroup = env.cgroup().to_str().unwrap().to_owned();
    let command = env.agent().config_file(config.to_str().unwrap());
    command.args(&["--cgroup", &cgroup, "--broker", broker.to_str().unwrap()]).spawn_ready()
}

#[test]
fn agent_restart_keeps_the_scope() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let first = start(&env, &pod);
    let broker = broker_of(first.pid()).expect("a broker");
    first.kill9();
    poll_until(LONG, "the broker to end with the agent", || (!stand_in::exists(broker)).then_some(()));
    assert_denied(&env, &pod.netns);
    let second = start(&env, &pod);
    assert_scoped(&env, &pod.netns, IMDS);
    assert!(second.terminate().success());
    assert!(redirected(&env.status()).is_empty());
    assert_denied(&env, &pod.netns);
    // Without the rule, a new agent removes all listeners.
    let _third = agent(&env, ENDPOINTS).spawn_ready();
    assert!(env.status().exemptions.is_empty());
    assert_denied(&env, &pod.netns);
}

#[test]
fn reload_changes_the_allowed_requests() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let sender = format!("netns = '{}'", pod.netns.path().display());
    let write = |rules: &str| drop(write_config(&env, rules));
    let agent = start_with_file(&env, &scoped(&sender, "GET /metadata/instance"));
    wait_allowed(&env, &pod.netns, IMDS);

    write(&scoped(&sender, &format!("GET {REFUSED}")));
    agent.hang_up();
    poll_until(LONG, "the other list", || {
        let result = get(&env, &pod.netns, IMDS, REFUSED);
        (result.ok() == Some(200)).then_some(())
    });
    assert_eq!(get(&env, &pod.netns, IMDS, ALLOWED).unwrap(), 403);

    // Two rules: the lists are merged. A full exemption takes precedence.
    let first = scoped(&sender, "GET /metadata/instance");
    let process = &mut Kubelet::new();
    let mut process = process.add_pod(&new_uid(), Driver::Cgroupfs);
    process.start_in(&pod.netns);
    let by_cgroup = format!("cgroup = '{}'", process.path.display());
    let second = scoped(&by_cgroup, &format!("GET {REFUSED}")).replace("'region'", "'second'");
    write(&format!("{first}{second}"));
    agent.hang_up();
    wait_allowed(&env, &pod.netns, IMDS);
    poll_until(LONG, "both lists", || (get(&env, &pod.netns, IMDS, REFUSED).ok() == Some(200)).then_some(()));
    assert_eq!(env.status().exemptions[0].other_rules, 1);
    write(&format!("{first}[[exempt]]\nname = 'all'\ninterface = '{}'\n", pod.host_ifname));
    agent.hang_up();
    poll_until(LONG, "the exemption", || {
        (get(&env, &pod.netns, IMDS, REFUSED).ok() == Some(200)).then_some(())
    });

    // Without rules, the broker ends.
    let broker = broker_of(agent.pid());
    write("");
    agent.hang_up();
    // A request may also fail because the machine is busy.
    env.status_when("the rules end", |status| status.exemptions.is_empty());
    assert_denied(&env, &pod.netns);
    if let Some(pid) = broker {
        poll_until(LONG, "the broker to end", || (!stand_in::exists(pid)).then_some(()));
    }
}

#[test]
fn revoked_list_ends_before_its_successor() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let sender = format!("netns = '{}'", pod.netns.path().display());
    let write = |rules: &str| drop(write_config(&env, rules));
    let agent = start_with_file(&env, &scoped(&sender, "GET /metadata/instance"));
    wait_allowed(&env, &pod.netns, IMDS);
    // The agent ends the listener although the broker cannot serve its successor.
    let broker = broker_of(agent.pid()).expect("a broker");
    stand_in::signal(broker, Signal::SIGSTOP);
    write(&scoped(&sender, "GET /metadata/versions"));
    agent.hang_up();
    env.status_when("the listener with the old list is removed", |status| redirected(status).is_empty());
    assert_eq!(broker_of(agent.pid()), Some(broker), "the broker has not been replaced yet");
    assert_denied(&env, &pod.netns);
    poll_until(2 * LONG, "another broker", || broker_of(agent.pid()).filter(|&pid| pid != broker));
    poll_until(LONG, "the new list", || {
        (get(&env, &pod.netns, IMDS, ALLOWED).ok() == Some(403)).then_some(())
    });
}

#[test]
fn listener_ends_with_the_sandbox() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let netns = Netns::new("sandbox");
    let path = netns.path();
    let pod = env.connect_pod(netns);
    // The kernel deletes this link when the namespace ends.
    env.node.ip(&format!("link add witness0 type veth peer name witness1 netns {}", pod.netns.name()));
    let config =
        format!("{ENDPOINTS}{}", scoped(&format!("netns = '{}'", path.display()), "GET /metadata/instance"));
    let agent = agent(&env, &config).spawn_ready();
    wait_allowed(&env, &pod.netns, IMDS);
    assert!(redirected(&env.status()).contains(&"four"));
    pod.delete();
    poll_until(LONG, "the network namespace to end", || {
        let links = env.node.command("ip").args(["-o", "link"]).output().unwrap();
        (!String::from_utf8_lossy(&links.stdout).contains("witness0")).then_some(())
    });
    env.status_when("the listener is removed", |status| redirected(status).is_empty());
    drop(agent);
}

#[test]
fn pod_without_listener_is_refused() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = start(&env, &pod);
    // The broker, and with it the listener, ends before the agent can react.
    let broker = broker_of(agent.pid()).expect("a broker");
    stand_in::signal(agent.pid(), Signal::SIGSTOP);
    stand_in::signal(broker, Signal::SIGKILL);
    poll_until(LONG, "connections to be refused", || {
        let result = get(&env, &pod.netns, IMDS, ALLOWED);
        let error = result.err()?;
        (error.kind() == std::io::ErrorKind::ConnectionRefused).then_some(())
    });
    assert_denied(&env, &pod.netns);
}

//! Pods that start and end, other rules, reloads, and a broker that ends.

use std::{fs, io::ErrorKind, path::Path};

use aya::maps::{HashMap, Map, MapData};
use imds_ebpf_common::{AllowedProcess, names::MAP_NODE_ALLOW};
use imds_tests::{
    Agent, METADATA, Netns, PodLink, TestEnv,
    executable::{broker_executable, broker_of},
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_netns_cookie,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    IMDS, TOKEN, agent, assert_explained, assert_refused, explain, explained_pods, get, is_explained,
    wait_explained,
};

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

#[test]
fn pods_come_and_go() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _agent = agent(&env, &explain("azure")).spawn_ready();
    assert_eq!(explained_pods(&env.status()), 0);
    let netns = Netns::new("sandbox");
    let pod = env.connect_pod(netns);
    wait_explained(&env, &pod.netns, IMDS);
    let other = env.add_pod(PodLink::Bridged);
    wait_explained(&env, &other.netns, IMDS);
    assert_eq!(explained_pods(&env.status()), 2);
    // The kernel deletes this link when the namespace ends.
    env.node.ip(&format!("link add witness0 type veth peer name witness1 netns {}", pod.netns.name()));
    pod.delete();
    poll_until(LONG, "the network namespace to end", || {
        let links = env.node.command("ip").args(["-o", "link"]).output().unwrap();
        (!String::from_utf8_lossy(&links.stdout).contains("witness0")).then_some(())
    });
    env.status_when("the listener is removed", |status| explained_pods(status) == 1);
    assert_explained(&env, &other.netns, IMDS);
}

/// Without a name, the namespace is found by its process.
#[test]
fn pod_without_a_name() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let _agent = agent(&env, &explain("azure")).spawn_ready();
    let mut process = env.node.command("unshare").args(["-n", "sleep", "1000"]).spawn().unwrap();
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let node = env.node.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
    let path = format!("/proc/{}/ns/net", process.id());
    poll_until(LONG, "the process to enter its namespace", || {
        fs::read_link(&path).ok().filter(|link| *link != own && *link != node)
    });
    env.node.ip(&format!("link add nameless0 type veth peer name eth0 netns {}", process.id()));
    env.node.ip("link set nameless0 up");
    env.status_when("the pod is found", |status| explained_pods(status) == 1);
    process.kill().unwrap();
    process.wait().unwrap();
    env.status_when("the listener is removed", |status| explained_pods(status) == 0);
}

#[test]
fn rules_win() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [denied, scoped, exempt] = [(); 3].map(|()| env.add_pod(PodLink::Routed));
    let rule =
        |name: &str, netns: &Path| format!("[[exempt]]\nname = '{name}'\nnetns = '{}'\n", netns.display());
    let config = format!(
        "{}{}allow = ['GET /metadata/instance']\n{}",
        explain("azure"),
        rule("region", &scoped.netns.path()),
        rule("all", &exempt.netns.path())
    );
    let _agent = agent(&env, &config).spawn_ready();
    wait_explained(&env, &denied.netns, IMDS);
    let allowed = |netns: &Netns, path: &str| get(&env, netns, IMDS, path);
    poll_until(LONG, "the allowed request", || {
        allowed(&scoped.netns, "/metadata/instance").is_ok_and(|text| text.contains(" 200 ")).then_some(())
    });
    let refused = allowed(&scoped.netns, TOKEN).unwrap();
    assert!(refused.contains(" 403 ") && refused.contains("is not allowed for this pod"), "{refused}");
    assert!(allowed(&exempt.netns, TOKEN).unwrap().contains(" 200 "));
    assert_explained(&env, &denied.netns, IMDS);
    // The rule also covers the WireServer, for which the broker opens another listener.
    let status = env.status_when("both listeners of the rule are open", |status| {
        let redirected = status.exemptions.iter().filter(|sender| sender.verdict == "redirected");
        redirected.map(|sender| sender.rule.as_str()).eq(["region"; 2]) && status.problems.is_empty()
    });
    assert_eq!((explained_pods(&status), status.state.as_str()), (1, "enforcing"), "{status:#?}");
    assert!(status.total.redirected.packets > 0);
}

fn reload(env: &TestEnv, agent: &Agent<'_>, config: &Path, text: &str) {
    fs::write(config, format!("{text}[hooks]\nlocal_service = false\n")).unwrap();
    let before = env.status().generation();
    agent.hang_up();
    env.status_when("the configuration is loaded", |status| status.generation() > before);
}

#[test]
fn reload_changes_the_action() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = env.scratch_dir().join("imds.toml");
    let drop_text = "provider = 'azure'\n";
    fs::write(&config, format!("{drop_text}[hooks]\nlocal_service = false\n")).unwrap();
    let (cgroup, broker) = (env.cgroup().to_str().unwrap().to_owned(), broker_executable());
    let command = env.agent().config_file(config.to_str().unwrap());
    let agent = command.args(&["--cgroup", &cgroup, "--broker", broker.to_str().unwrap()]).spawn_ready();
    assert_refused(&env, &pod.netns);
    assert_eq!(broker_of(agent.pid()), None);
    for _ in 0..2 {
        reload(&env, &agent, &config, &explain("azure"));
        wait_explained(&env, &pod.netns, IMDS);
        assert_explained(&env, &pod.netns, IMDS);
        let broker = broker_of(agent.pid()).expect("a broker");
        reload(&env, &agent, &config, drop_text);
        assert_refused(&env, &pod.netns);
        assert_eq!(env.status().on_deny.as_deref(), Some("drop"));
        poll_until(LONG, "the broker to end", || {
            (!Path::new("/proc").join(broker.to_string()).exists()).then_some(())
        });
    }
}

#[test]
fn killed_broker_refuses() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = agent(&env, &explain("azure")).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    // The broker, and with it the listener, ends before the agent can react.
    let broker = broker_of(agent.pid()).expect("a broker");
    signal(agent.pid(), Signal::SIGSTOP);
    signal(broker, Signal::SIGKILL);
    poll_until(LONG, "connections to be refused", || {
        let error = get(&env, &pod.netns, IMDS, TOKEN).err()?;
        (error.kind() == ErrorKind::ConnectionRefused).then_some(())
    });
    assert_refused(&env, &pod.netns);
    signal(agent.pid(), Signal::SIGCONT);
    wait_explained(&env, &pod.netns, IMDS);
    assert_explained(&env, &pod.netns, IMDS);
    // An agent that ends takes its listeners with it, and the pod stays denied.
    assert!(agent.terminate().success());
    assert_refused(&env, &pod.netns);
}

/// A broker that only explains needs no access to the metadata service.
#[test]
fn broker_gets_no_access() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = format!("{}[node]\nallow = []\n", explain("azure"));
    let _agent = agent(&env, &config).spawn_ready();
    wait_explained(&env, &pod.netns, IMDS);
    assert!(!env.in_cgroup(|| http_get(&env.node, METADATA, SHORT)).is_answer());
    let pin = env.pin_dir().join("maps").join(MAP_NODE_ALLOW);
    let map: HashMap<MapData, AllowedProcess, u32> =
        Map::HashMap(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    assert_eq!(map.keys().count(), 0, "the broker is in the allow list of the node");
    assert!(is_explained(&get(&env, &pod.netns, IMDS, TOKEN)));
}

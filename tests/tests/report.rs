//! What `imds-agent report` says of who was denied, and that the rules that it prints exempt just them.

use std::fs;

use imds_tests::{
    METADATA, Netns, PodLink, World,
    api_server::{ApiServer, pod},
    kubelet::{Driver, Kubelet, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_netns_cookie,
};
use serde_json::Value;

const NODE: &str = "node-0";

fn report(world: &World, args: &[&str]) -> String {
    let output = world.imds_agent(&[&["report"], args].concat()).output();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn denials(world: &World) -> Vec<Value> {
    let report: Value = serde_json::from_str(&report(world, &["-o", "json"])).unwrap();
    report["denials"].as_array().unwrap().clone()
}

fn reaches(world: &World, netns: &Netns) -> bool {
    world.in_cgroup(|| http_get(netns, METADATA, SHORT).is_answer())
}

fn sum(denials: &[Value]) -> u64 {
    let counts = denials.iter().flat_map(|denial| denial["counts"].as_object().unwrap().values());
    counts.filter_map(Value::as_u64).sum()
}

#[test]
fn from_audit_to_the_rules_to_enforcement() {
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new();
    let server = ApiServer::start_in(&world.node);
    let kubelet = Kubelet::new();
    let kubeconfig = world.scratch_dir().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig);
    let config = world.scratch_dir().join("imds.toml");
    let write = |mode: &str, rules: &str| {
        let kubernetes =
            format!("[kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'\n", kubeconfig.display());
        fs::write(&config, format!("mode = '{mode}'\n{kubernetes}\n{rules}")).unwrap();
    };
    write("audit", "");
    let cgroup = world.cgroup().to_str().unwrap();
    let agent = world.agent().config_file(config.to_str().unwrap()).args(&["--cgroup", cgroup]).spawn_ready();
    let uids = [new_uid(), new_uid()];
    let pods = [world.add_pod(PodLink::Routed), world.add_pod(PodLink::Bridged)];
    let cgroups: Vec<_> = uids
        .iter()
        .zip(&pods)
        .zip(["agent", "web"])
        .map(|((uid, pod_of), account)| {
            let mut cgroup = kubelet.add_pod(uid, Driver::Systemd);
            cgroup.start_in(&pod_of.netns);
            server.apply(pod(uid, NODE, "tools", account, &[("app", account)]));
            cgroup
        })
        .collect();
    world.status_when("both pods are known", |status| {
        status.kubernetes.as_ref().is_some_and(|kubernetes| kubernetes.pods == 2 && kubernetes.awaited == 0)
    });
    assert!(denials(&world).is_empty() && report(&world, &[]).starts_with("nobody"));
    assert!(reaches(&world, &pods[0].netns));

    let found = poll_until(LONG, "the audited pod in the report", || {
        let found = denials(&world);
        let hooks = |denial: &Value| denial["counts"].as_object().map(serde_json::Map::len);
        (found.first().and_then(hooks) == Some(3)).then_some(found)
    });
    let [denial] = &found[..] else { panic!("{found:?}") };
    for (field, expected) in [
        ("namespace", "tools"),
        ("service_account", "agent"),
        ("label", "app=agent"),
        ("pod", &format!("pod-{}", uids[0])),
        ("endpoint", "imds"),
        ("verdict", "audit"),
    ] {
        assert_eq!(denial[field], expected, "{field}: {denial}");
    }
    let table = report(&world, &[]);
    assert!(table.contains("tools/agent app=agent") && table.contains("[[exempt]]"), "{table}");

    // Pasted as they are, they exempt who was there, and nobody else, from the moment of enforcement on.
    write("enforce", &report(&world, &["--rules", "--reset"]));
    poll_until(LONG, "enforcement", || (!reaches(&world, &pods[1].netns)).then_some(()));
    world.assert_nothing_arrives(|| assert!(!reaches(&world, &pods[1].netns)));
    assert!(reaches(&world, &pods[0].netns), "{}", agent.log());
    let denied = || {
        let denials = denials(&world);
        denials.into_iter().filter(|denial| denial["verdict"] == "deny").collect::<Vec<_>>()
    };
    let found =
        poll_until(LONG, "the denied pod in the report", || Some(denied()).filter(|found| !found.is_empty()));
    assert!(found.iter().all(|denial| denial["service_account"] == "web"), "{found:?}");

    // It is there without an agent, and what comes now is added.
    agent.kill9();
    let before = sum(&found);
    assert!(!reaches(&world, &pods[1].netns));
    assert!(sum(&denied()) > before, "{before}");
    drop(cgroups);
    world.unload();
    assert!(reaches(&world, &pods[1].netns));
}

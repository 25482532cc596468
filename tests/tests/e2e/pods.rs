//! Real pods of container runtimes.

use std::{fs, process::Output, thread};

use imds_tests::{PodLink, TestEnv, poll::poll_until, probe::LONG};
use serde_json::json;

use crate::runtime::{Containerd, Podman, stdout, wait_ready};

const URL: &str = "http://169.254.169.254/metadata/instance?api-version=2023-11-15";
/// The exact commands of the AKS documentation, for a pod without hostNetwork and one with it.
const NON_HOST: [&str; 9] =
    ["curl", "-s", "-H", "Metadata:true", "--connect-timeout", "10", "--noproxy", "*", URL];
const HOST: [&str; 7] = ["curl", "-s", "-H", "Metadata:true", "--noproxy", "*", URL];
/// A request with a short timeout, for sequences of many pods.
const HASTY: [&str; 9] = ["curl", "-s", "-H", "Metadata:true", "--max-time", "1", "--noproxy", "*", URL];

#[track_caller]
fn assert_document(output: &Output) {
    let document = stdout(output);
    assert!(document.contains("azEnvironment"), "{document:?} {output:?}");
}

#[track_caller]
fn assert_nothing(output: &Output) {
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
}

/// Returns the cgroup of podman's pods.
fn pods_cgroup() -> String {
    let cgroup = imds_agent::node::cgroup::root().unwrap().unwrap().join(Podman::CGROUP);
    fs::create_dir_all(&cgroup).unwrap();
    cgroup.to_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs container runtimes and the static binary: cargo xtask e2e"]
fn aks_steps_with_image_on_podman_pods() {
    let env = TestEnv::new();
    let podman = Podman::new(&env);
    podman.build_agent();
    podman.play("non-host-nw", false);
    podman.play("host-nw", true);
    assert_document(&podman.exec("non-host-nw", &NON_HOST));
    assert_document(&podman.exec("host-nw", &HOST));

    // `doctor` in the container must see the node's cgroups and processes.
    let doctor = imds_tests::output(podman.agent(&["--rm"], &["doctor", "-o", "json"]));
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let check = |name: &str| {
        let checks = doctor["checks"].as_array().unwrap();
        checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap_or_else(|| panic!("{name}: {doctor}"))
            .clone()
    };
    let root = imds_agent::node::cgroup::root().unwrap().unwrap();
    assert_eq!(check("cgroup2")["observed"], root.to_str().unwrap());
    assert_eq!(check("pods")["state"], "ok");

    // Enabling needs no restart of pods.
    let config = env.scratch_dir().join("imds.toml");
    fs::write(&config, "provider = 'azure'").unwrap();
    let cgroup = pods_cgroup();
    let run = ["run", "--config", config.to_str().unwrap(), "--cgroup", &cgroup];
    let started = imds_tests::output(podman.agent(&["--detach", "--name", "agent"], &run));
    assert!(started.status.success(), "{started:?}");
    wait_ready(&env);
    podman.run(&["exec", "agent", "/imds-agent", "verify", "--pin-dir", env.pin_dir().to_str().unwrap()]);
    env.assert_nothing_arrives(|| assert_nothing(&podman.exec("non-host-nw", &NON_HOST)));
    assert_document(&podman.exec("host-nw", &HOST));
    let status = env.status();
    assert!(status.total.denied.packets > 0, "{status:?}");

    // The mode is switched off and on again by changing the configuration only.
    for (mode, is_denied) in [("off", false), ("enforce", true)] {
        fs::write(&config, format!("provider = 'azure'\nmode = '{mode}'")).unwrap();
        poll_until(LONG, mode, || {
            (podman.exec("non-host-nw", &HASTY).stdout.is_empty() == is_denied).then_some(())
        });
    }
    // Enforcement continues without the agent, also for a pod that starts then.
    podman.run(&["kill", "--signal", "KILL", "agent"]);
    podman.play("later", false);
    env.assert_nothing_arrives(|| {
        assert_nothing(&podman.exec("non-host-nw", &NON_HOST));
        assert_nothing(&podman.exec("later", &NON_HOST));
    });
    // Disabling needs no change of the node.
    let unloaded = imds_tests::output(podman.agent(&["--rm"], &["unload"]));
    assert!(unloaded.status.success(), "{unloaded:?}");
    assert_document(&podman.exec("non-host-nw", &NON_HOST));
    assert_document(&podman.exec("host-nw", &HOST));
}

#[test]
#[ignore = "needs container runtimes: cargo xtask e2e"]
fn hundred_churning_pods_are_denied() {
    let env = TestEnv::new();
    let podman = Podman::new(&env);
    podman.play("lasting", false);
    assert_document(&podman.exec("lasting", &HOST));
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    env.assert_nothing_arrives(|| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        assert_nothing(&podman.run_once(&HASTY));
                    }
                });
            }
        });
        assert_nothing(&podman.exec("lasting", &HASTY));
    });
    drop(agent);
    env.unload();
    assert_document(&podman.run_once(&HASTY));
}

#[test]
#[ignore = "needs container runtimes: cargo xtask e2e"]
fn single_pod_is_exempt_by_cgroup() {
    let env = TestEnv::new();
    let podman = Podman::new(&env);
    for name in ["trusted", "other"] {
        podman.play(name, false);
        assert_document(&podman.exec(name, &HOST));
    }
    let cgroup = podman.run(&["pod", "inspect", "--format", "{{.CgroupPath}}", "trusted"]);
    let rule = format!("[[exempt]]\nname = 'trusted'\ncgroup = '{}'", cgroup.trim().trim_start_matches('/'));
    let config = env.scratch_dir().join("imds.toml");
    fs::write(&config, rule).unwrap();
    let agent =
        env.agent().config_file(config.to_str().unwrap()).args(&["--cgroup", &pods_cgroup()]).spawn_ready();
    poll_until(LONG, "the exemption", || podman.exec("trusted", &HASTY).status.success().then_some(()));
    env.assert_nothing_arrives(|| assert_nothing(&podman.exec("other", &HASTY)));
    podman.run(&["pod", "rm", "--force", "--time", "0", "trusted"]);
    podman.play("successor", false);
    env.assert_nothing_arrives(|| assert_nothing(&podman.exec("successor", &HASTY)));
    drop(agent);
    env.unload();
    // Only the pod with hostNetwork has access: podman removed the NAT rules together with the first pod.
    assert_document(&podman.exec("successor", &HOST));
}

#[test]
#[ignore = "needs container runtimes: cargo xtask e2e"]
fn containerd_with_reference_cni_plugins() {
    let env = TestEnv::new();
    // Routes to the harness's own pods must not interfere.
    let _neighbour = env.add_pod(PodLink::Routed);
    let mut containerd = Containerd::new(&env);
    for (network, subnet) in [
        (json!({ "type": "bridge", "bridge": "cni9", "isGateway": true, "ipMasq": true }), "10.89.1.0/24"),
        (json!({ "type": "ptp", "ipMasq": true }), "10.89.2.0/24"),
        // Pods of this network are neighbours of the node.
        (json!({ "type": "macvlan", "master": TestEnv::UPLINK }), "10.0.0.64/26"),
    ] {
        let kind = network["type"].as_str().unwrap().to_owned();
        let sandbox = containerd.sandbox(network.clone(), subnet);
        let exempt = containerd.sandbox(network.clone(), subnet);
        for sandbox in [&sandbox, &exempt] {
            if kind == "macvlan" {
                // The metadata service is a neighbour on this link.
                sandbox.netns.ip("route add 169.254.169.254/32 dev eth0");
            }
            assert_document(&sandbox.run(&HOST));
        }
        let rule = format!("[[exempt]]\nname = 'trusted'\nnetns = '{}'", exempt.netns.path().display());
        let agent = env.agent().config(&rule).hooks(&["from_pod", "node_egress"]).spawn_ready();
        if kind == "macvlan" && imds_tests::lacks_tc_netns_cookie("macvlan") {
            drop(agent);
            env.unload();
            continue;
        }
        assert_document(&exempt.run(&HOST));
        env.assert_nothing_arrives(|| assert_nothing(&sandbox.run(&HASTY)));
        drop([sandbox, exempt]);
        containerd.restart();
        let sandbox = containerd.sandbox(network, subnet);
        env.assert_nothing_arrives(|| assert_nothing(&sandbox.run(&HASTY)));
        drop(agent);
        env.assert_nothing_arrives(|| assert_nothing(&sandbox.run(&HASTY)));
        env.unload();
        if kind != "macvlan" {
            assert_document(&sandbox.run(&HOST));
        }
    }
}

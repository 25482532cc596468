//! Nodes on which /proc, /sys, cgroups or user namespaces differ from those of a usual machine.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use imds_tests::{
    METADATA, Netns, Pod, PodLink, TestEnv,
    executable::{find_program, write_executable},
    kubelet::{Driver, Kubelet, PodCgroup, new_uid},
    probe::reachable,
    skip_without_netns_cookie,
};

const HOOKS: [&str; 2] = ["from_pod", "node_egress"];

/// Writes a program that runs the agent after `prepare`, in a mount namespace of its own.
fn agent_after(test_env: &TestEnv, options: &str, prepare: &str) -> PathBuf {
    let (inner, outer) = (test_env.scratch_dir().join("inner"), test_env.scratch_dir().join("outer"));
    let agent = test_env.imds_agent(&[]).command().get_program().to_str().unwrap().to_owned();
    // busybox's shell, in the virtual machines, would prefer its own `unshare`.
    let unshare = find_program("unshare").unwrap();
    let unshare = format!("exec {} --mount {options} {} \"$@\"", unshare.display(), inner.display());
    for (path, script) in [(&inner, format!("set -e\n{prepare}\nexec {agent} \"$@\"")), (&outer, unshare)] {
        write_executable(path, &format!("#!/bin/sh\n{script}\n"));
    }
    outer
}

/// A pod that is exempt by the cgroup of its process, and one that is not.
struct Pods {
    exempt: Pod,
    denied: Pod,
    rule: String,
    _cgroup: PodCgroup,
    _kubelet: Kubelet,
}

impl Pods {
    fn new(env: &TestEnv) -> Self {
        let kubelet = Kubelet::new();
        let [exempt, denied] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
        let mut cgroup = kubelet.add_pod(&new_uid(), Driver::Cgroupfs);
        cgroup.start_in(&exempt.netns);
        let rule = format!("[[exempt]]\nname = 'a'\ncgroup = '{}'\n", kubelet.root().display());
        Self { exempt, denied, rule, _cgroup: cgroup, _kubelet: kubelet }
    }
}

/// Runs the agent after `prepare`: it must exempt and deny as on a usual node, and `unload` must remove everything.
#[track_caller]
fn assert_complete(prepare: &str) {
    let env = TestEnv::new();
    let pods = Pods::new(&env);
    assert!(reachable(&pods.denied.netns, METADATA));
    let binary = agent_after(&env, "", prepare);
    let agent = env.agent().config(&pods.rule).hooks(&HOOKS).binary(&binary).spawn_ready();
    assert!(reachable(&pods.exempt.netns, METADATA), "{}", agent.log());
    env.assert_blocked(&pods.denied);
    drop(agent);
    let unloaded = env.imds_agent(&["unload"]).binary(&binary).output();
    assert!(unloaded.status.success(), "{unloaded:?}");
    assert!(reachable(&pods.denied.netns, METADATA));
}

#[test]
fn hidepid() {
    assert_complete("mount -t proc -o hidepid=2 proc /proc");
}

#[test]
fn read_only_sys() {
    assert_complete("mount -o remount,bind,ro /sys");
}

/// Returns the table of `doctor` after `prepare`.
fn doctor(env: &TestEnv, options: &str, prepare: &str) -> String {
    let binary = agent_after(env, options, prepare);
    String::from_utf8_lossy(&env.imds_agent(&["doctor"]).binary(&binary).output().stdout).into_owned()
}

/// Starts the agent with the hook `socket`, and asserts that it does not attach it and says why.
#[track_caller]
fn assert_no_socket_hook(options: &str, prepare: &str) {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let config = env.scratch_dir().join("imds.toml");
    fs::write(&config, "[hooks]\nsocket = true\n").unwrap();
    let binary = agent_after(&env, options, prepare);
    let agent = env.agent().config_file(config.to_str().unwrap()).binary(&binary);
    let agent = agent.spawn_degraded("cgroup");
    env.assert_blocked(&pod);
    drop(agent);
    let table = doctor(&env, options, prepare);
    assert!(table.contains("the root of the cgroup v2 hierarchy is not mounted"), "{table}");
    env.unload();
    assert!(reachable(&pod.netns, METADATA));
}

#[test]
fn cgroup_v1_only() {
    assert_no_socket_hook("", "umount -l /sys/fs/cgroup\nmount -t tmpfs tmpfs /sys/fs/cgroup");
}

#[test]
fn cgroup_namespace() {
    assert_no_socket_hook("--cgroup", "umount -l /sys/fs/cgroup\nmount -t cgroup2 cgroup2 /sys/fs/cgroup");
}

#[test]
fn hybrid_cgroups() {
    let table = doctor(
        &TestEnv::new(),
        "",
        "umount -l /sys/fs/cgroup\nmount -t tmpfs tmpfs /sys/fs/cgroup\nmkdir /sys/fs/cgroup/unified
         mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    );
    assert!(table.contains("ok        /sys/fs/cgroup/unified"), "{table}");
}

/// A process in a user namespace and in a network namespace that it owns.
struct UserNamespace(Child);

impl UserNamespace {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
            .unwrap();
        Self(child)
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Pods with `hostUsers: false`, whose network namespaces belong to user namespaces.
#[test]
fn pods_in_user_namespaces() {
    let env = TestEnv::new();
    let processes = [(); 2].map(|()| UserNamespace::new());
    let [exempt, denied] =
        processes.each_ref().map(|process| env.connect_pod(Netns::of_process("user", process.0.id())));
    assert!(reachable(&denied.netns, METADATA) && reachable(&exempt.netns, METADATA));
    let rule = format!("[[exempt]]\nname = 'a'\nnetns = '/proc/{}/ns/net'\n", processes[0].0.id());
    let agent = env.agent().config(&rule).hooks(&HOOKS).spawn_ready();
    assert!(reachable(&exempt.netns, METADATA), "{}", agent.log());
    env.assert_blocked(&denied);
    drop(agent);
    env.unload();
    assert!(reachable(&denied.netns, METADATA));
}

/// LXD and Incus run unprivileged containers in a user namespace, in which no process has capabilities for BPF.
#[test]
fn agent_in_user_namespace() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let binary = agent_after(&env, "--user --map-root-user", "");
    let output = env.agent().hooks(&HOOKS).binary(&binary).once();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("initial user namespace"), "{stderr}");
    assert!(reachable(&pod.netns, METADATA));
    assert!(!env.pin_dir().exists());
}

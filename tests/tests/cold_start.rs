//! An agent that starts with a broken configuration file enforces, applies no exemption of that file, and reports the
//! file.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
};

use imds_tests::{
    Agent, AgentCommand, Pod, PodLink, Status, TestEnv, http::try_get, poll::poll_until, probe::LONG,
};

/// Hooks that every tested kernel supports.
const HOOKS: &str = "[hooks]\nsocket = false\n";

struct Node {
    env: TestEnv,
    pod: Pod,
    file: PathBuf,
}

impl Node {
    fn new() -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let file = env.scratch_dir().join("imds.toml");
        Self { env, pod, file }
    }

    /// Returns a rule that exempts the pod.
    fn exempt(&self) -> String {
        format!("[[exempt]]\nname = 'one'\ninterface = '{}'\n", self.pod.host_ifname)
    }

    fn write(&self, text: &str) {
        // Replaced atomically, so that the agent never reads half a file.
        let new = self.file.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    fn stored(&self) -> PathBuf {
        self.env.state_dir().join("last-good.toml")
    }

    fn command(&self) -> AgentCommand<'_> {
        let cgroup = self.env.cgroup().to_str().unwrap();
        self.env.imds_agent(&["run"]).config_file(self.file.to_str().unwrap()).args(&["--cgroup", cgroup])
    }

    /// Starts an agent and waits until it is degraded for a reason that contains `part`.
    #[track_caller]
    fn start_degraded(&self, part: &str) -> (Agent<'_>, Status) {
        let agent = self.command().spawn();
        let pid = agent.pid();
        let status = self.env.status_when("the agent is degraded", |status| {
            status.agent.ready && status.agent.pid == Some(pid) && status.all_pods_enforced()
        });
        assert_eq!(status.state, "degraded", "{}", agent.log());
        let refused = status.configuration.as_ref().unwrap().rejected.as_ref().expect("a rejected file");
        assert!(refused.error.contains(part), "{}", refused.error);
        assert!(
            status.problems.iter().any(|problem| problem.problem.contains(part)),
            "{:?}",
            status.problems
        );
        assert_eq!(self.env.imds_agent(&["status"]).output().status.code(), Some(3));
        // The line is written and read by other threads than the status.
        agent.wait_for_log(part, LONG);
        let log = agent.log();
        let errors: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
        assert!(matches!(errors[..], [error] if error.contains(part)), "{errors:?}");
        (agent, status)
    }

    /// Waits until the file is effective and no problem is left.
    #[track_caller]
    fn wait_recovered(&self) -> Status {
        self.env.status_when("the configuration is valid", |status| {
            let configuration = status.configuration.as_ref().unwrap();
            configuration.rejected.is_none() && status.problems.is_empty()
        })
    }

    fn rejected_metric(&self) -> String {
        let metrics = self.env.metrics();
        let line = metrics.lines().find(|line| line.starts_with("imds_agent_config_last_reload_successful "));
        line.unwrap_or_default().to_owned()
    }
}

#[test]
fn unknown_key_is_fail_closed_until_fixed() {
    let node = Node::new();
    node.write(&format!("unknown = 1\n{HOOKS}{}", node.exempt()));
    let (agent, status) = node.start_degraded("imds.toml:1:1: unknown: ");
    assert_eq!((status.mode.as_deref(), status.exemptions.len()), (Some("enforce"), 0));
    assert_eq!(status.configuration.unwrap().file, None);
    node.env.assert_blocked(&node.pod);
    assert_eq!(node.rejected_metric(), "imds_agent_config_last_reload_successful 0");
    assert!(!node.stored().exists());

    // A reload that still finds the broken file changes nothing.
    agent.hang_up();
    agent.wait_for_log("keeping the previous one", LONG);
    node.env.assert_blocked(&node.pod);

    node.write(&format!("{HOOKS}{}", node.exempt()));
    let status = node.wait_recovered();
    assert_eq!(
        (status.state.as_str(), status.configuration.unwrap().file),
        ("enforcing", Some(node.file.clone()))
    );
    node.env.assert_open(&node.pod);
    assert_eq!(node.rejected_metric(), "imds_agent_config_last_reload_successful 1");
    drop(agent);
    node.env.unload();
    node.env.assert_open(&node.pod);
}

#[test]
fn last_good_config_is_used_if_intact() {
    let node = Node::new();
    node.write(&format!("{HOOKS}{}", node.exempt()));
    let good = node.command().spawn_ready();
    let metadata = poll_until(LONG, "the configuration to be stored", || fs::metadata(node.stored()).ok());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    good.kill9();

    // Simulates a reboot, which ends all enforcement. `unload` deletes the last good configuration, so that the test
    // restores a copy.
    let stored = fs::read_to_string(node.stored()).unwrap();
    let reboot = || {
        node.env.unload();
        assert!(!node.stored().exists());
        node.env.assert_open(&node.pod);
        fs::create_dir(node.env.state_dir()).unwrap();
    };
    let store = |text: &str, mode: u32| {
        fs::write(node.stored(), text).unwrap();
        fs::set_permissions(node.stored(), fs::Permissions::from_mode(mode)).unwrap();
    };
    for broken in [Some(format!("unknown = 1\n{HOOKS}")), None] {
        reboot();
        store(&stored, 0o600);
        let part = if let Some(text) = &broken {
            node.write(text);
            "unknown"
        } else {
            fs::remove_file(&node.file).unwrap();
            "No such file"
        };
        let (agent, status) = node.start_degraded(part);
        assert_eq!(status.configuration.unwrap().file, Some(node.stored()));
        assert_eq!(status.hooks, ["from_pod", "node_egress", "local_service"]);
        node.env.assert_open(&node.pod);
        drop(agent);
    }
    node.write(&format!("unknown = 1\n{HOOKS}{}", node.exempt()));
    for (text, mode, part) in [
        (stored.replace("one", "two"), 0o600, "its checksum is wrong"),
        (stored.clone(), 0o644, "other users can access it"),
        (String::new(), 0o600, "it has no header"),
    ] {
        reboot();
        store(&text, mode);
        let (agent, status) = node.start_degraded(part);
        assert_eq!(status.configuration.unwrap().file, None);
        node.env.assert_blocked(&node.pod);
        drop(agent);
    }
    node.env.unload();
}

#[test]
fn broken_file_keeps_mode_and_metrics() {
    for (text, part, mode) in [
        ("mode = 'audit'\nunknown = 1\n", "unknown", "audit"),
        ("mode = 'of'\nprovider = 'none'\n", "mode: ", "enforce"),
        ("mode = 'off'\n[hooks\n", "imds.toml:2", "enforce"),
        (
            "mode = 'audit'\n[[endpoint]]\nname = 'a'\naddress = '169.254.169.254'\n",
            "already protected",
            "audit",
        ),
        ("mode = 'off'\nmode = 'audit'\n", "imds.toml:2", "enforce"),
    ] {
        let node = Node::new();
        node.write(&format!("{text}[metrics]\nlisten = ['127.0.0.1:9301']\n"));
        let (agent, status) = node.start_degraded(part);
        assert_eq!(status.mode.as_deref(), Some(mode), "{text}");
        assert!(!status.endpoints.is_empty() && status.hooks.contains(&"from_pod".to_owned()));
        if mode == "enforce" {
            node.env.assert_blocked(&node.pod);
        } else {
            node.env.assert_open(&node.pod);
            poll_until(LONG, "metrics at the file's address", || {
                try_get(&node.env, "127.0.0.1:9301", "/healthz").ok()
            });
        }
        drop(agent);
        node.env.unload();
    }
}

#[test]
fn directory_counts_as_broken_file() {
    let node = Node::new();
    fs::create_dir(&node.file).unwrap();
    let (agent, _) = node.start_degraded("not a regular file");
    node.env.assert_blocked(&node.pod);
    fs::remove_dir(&node.file).unwrap();
    node.write(HOOKS);
    assert_eq!(node.wait_recovered().state, "enforcing");
    drop(agent);
    node.env.unload();
}

#[test]
fn once_enforces_and_exits_with_2() {
    let node = Node::new();
    node.write(&format!("unknown = 1\n{}", node.exempt()));
    let output = node.command().once();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("imds.toml:1:1: unknown"), "{output:?}");
    node.env.assert_blocked(&node.pod);
    node.env.unload();
    node.env.assert_open(&node.pod);
}

#[test]
fn unwritable_state_dir_is_not_fatal() {
    let node = Node::new();
    // A file at the path of the directory.
    fs::write(node.env.state_dir(), "").unwrap();
    node.write(HOOKS);
    let agent = node.command().spawn_ready();
    agent.wait_for_log("failed to store the last good configuration", LONG);
    node.env.assert_blocked(&node.pod);
    drop(agent);
    node.env.unload();
}

/// Without a stored configuration, as with a state directory that does not outlive the container.
#[test]
fn a_warm_start_keeps_the_effective_configuration() {
    let node = Node::new();
    let other = node.env.add_pod(PodLink::Routed);
    node.write(&format!("{HOOKS}{}", node.exempt()));
    let good = node.command().spawn_ready();
    node.env.status_when("the pod is exempt", |status| !status.exemptions.is_empty());
    good.kill9();
    let mut generation = node.env.status().configuration.unwrap().generation;
    node.write(&format!("unknown = 1\n{HOOKS}"));
    // The second start meets a configuration that the first one kept.
    for _ in 0..2 {
        let _absent = fs::remove_dir_all(node.env.state_dir());
        let (agent, status) = node.start_degraded("keeping the effective configuration");
        let configuration = status.configuration.unwrap();
        assert_eq!(configuration.file.as_ref(), Some(&node.file));
        assert!(configuration.generation > generation);
        generation = configuration.generation;
        assert_eq!(status.hooks, ["from_pod", "node_egress", "local_service"]);
        node.env.assert_open(&node.pod);
        node.env.assert_blocked(&other);
        assert!(!node.stored().exists());
        drop(agent);
    }

    // Ignores the configuration of another file.
    let another = node.env.scratch_dir().join("another.toml");
    fs::write(&another, "unknown = 1\n").unwrap();
    let cgroup = node.env.cgroup().to_str().unwrap();
    let command = node.env.imds_agent(&["run"]).config_file(another.to_str().unwrap());
    assert_eq!(command.args(&["--cgroup", cgroup]).once().status.code(), Some(2));
    node.env.assert_blocked(&node.pod);

    // Ignores the defaults that replaced a broken file.
    node.write("mode = 'audit'\nunknown = 1\n");
    let (agent, status) = node.start_degraded("enforcing the built-in defaults");
    assert_eq!(status.mode.as_deref(), Some("audit"));
    drop(agent);
    node.env.unload();
    node.env.assert_open(&node.pod);
}

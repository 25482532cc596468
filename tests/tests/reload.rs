//! Reloads while the agent runs: immediate, without a gap in enforcement, and never to an invalid configuration.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::programs::TcAttachType::{self, Egress, Ingress};
use imds_tests::{
    Agent, AttachMode, METADATA, Pod, PodLink, SERVICE, Status, TestEnv,
    flood::Flood,
    hook,
    poll::poll_until,
    probe::{LONG, Outcome, SHORT, http_get, reachable},
    skip_without_netns_cookie, with_each_backend,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
const FROM_POD: &str = "[hooks]\nsocket = false\nnode_egress = false\n";
const NODE_EGRESS: &str = "[hooks]\nsocket = false\nfrom_pod = false\n";
const TC_HOOKS: &str = "[hooks]\nsocket = false\n";

fn has_program(env: &TestEnv, interface: &str, at: TcAttachType) -> bool {
    !hook::programs_at(&env.node, interface, at).is_empty()
}

/// A configuration file that changes.
struct ConfigFile<'w> {
    env: &'w TestEnv,
    path: PathBuf,
}

impl<'w> ConfigFile<'w> {
    fn new(env: &'w TestEnv, text: &str) -> Self {
        let path = env.scratch_dir().join("imds.toml");
        fs::write(&path, text).unwrap();
        Self { env, path }
    }

    fn start(&self, backend: AttachMode, args: &[&str]) -> Agent<'w> {
        self.env
            .agent()
            .backend(backend)
            .config_file(self.path.to_str().unwrap())
            .args(&["--cgroup", self.env.cgroup().to_str().unwrap()])
            .args(args)
            .spawn_ready()
    }

    /// Replaces the file atomically, as editors do.
    fn replace(&self, text: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    /// Replaces the file and waits until the new configuration is effective.
    #[track_caller]
    fn reload(&self, text: &str) -> Status {
        let before = generation(&self.env.status());
        self.replace(text);
        self.env.status_when("the configuration is effective", |status| {
            generation(status) > before && status.configuration.as_ref().unwrap().rejected.is_none()
        })
    }
}

fn generation(status: &Status) -> u64 {
    status.configuration.as_ref().expect("a configuration").generation
}

fn hang_up(agent: &Agent<'_>) {
    kill(Pid::from_raw(agent.pid().try_into().unwrap()), Signal::SIGHUP).unwrap();
}

/// Waits until the file is rejected with this error, and asserts that the earlier configuration stays effective.
#[track_caller]
fn assert_rejected(env: &TestEnv, before: &Status, part: &str) -> Status {
    let status = env.status_when("the file is rejected", |status| {
        let rejected =
            status.configuration.as_ref().and_then(|configuration| configuration.rejected.as_ref());
        rejected.is_some_and(|rejected| rejected.error.contains(part))
    });
    assert_eq!(status.state, "degraded");
    assert!(status.problems.iter().any(|problem| problem.problem.contains(part)), "{:?}", status.problems);
    assert_eq!((generation(&status), &status.mode), (generation(before), &before.mode));
    assert_eq!(status.hooks, before.hooks);
    status
}

fn flood(pods: &[Pod; 2]) -> [Flood; 2] {
    [Flood::udp(&pods[0], METADATA), Flood::syn(&pods[1], METADATA)]
}

#[track_caller]
fn assert_flood_arrives(env: &TestEnv, pods: &[Pod; 2]) {
    let before = env.received_packets();
    let _floods = flood(pods);
    poll_until(LONG, "packets of each pod to arrive", || {
        let now = env.received_packets();
        pods.iter().all(|pod| now.from(pod.address) > before.from(pod.address) + 100).then_some(())
    });
}

/// Returns configurations that all protect [`METADATA`], each with another change.
fn protecting_configs() -> Vec<String> {
    let others = |count: u8| {
        let other = |n| format!("[[endpoint]]\nname = 'e{n}'\naddress = '10.9.0.{n}'\n");
        (1..=count).map(other).collect::<Vec<_>>().concat()
    };
    let own = |ports: &str| {
        format!("[[endpoint]]\nname = 'own'\naddress = '169.254.169.254'\nallow_ports = [{ports}]\n")
    };
    vec![
        FROM_POD.to_owned(),
        format!("provider = 'aws'\n{FROM_POD}{}", others(3)),
        format!("on_deny = 'reject'\n{TC_HOOKS}"),
        format!("provider = 'none'\n{NODE_EGRESS}{}", own("'udp/5300', 'tcp/5300'")),
        format!("provider = 'none'\n{TC_HOOKS}{}{}", others(200), own("")),
        format!("{FROM_POD}[interfaces]\ninclude = ['nothing*']\n{}", others(1)),
        format!("provider = 'gcp'\non_deny = 'reject'\n{NODE_EGRESS}"),
        format!("extra_endpoints = ['ecs']\n{TC_HOOKS}{}", others(9)),
    ]
}

#[test]
fn flood_is_denied_during_reloads() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        assert_flood_arrives(&env, &pods);

        let configs = protecting_configs();
        let file = ConfigFile::new(&env, &configs[0]);
        let agent = file.start(backend, &[]);
        let first = env.status();
        let before = env.received_packets();
        let floods = flood(&pods);
        let mut denied = 0;
        for config in configs.iter().cycle().skip(1).take(56) {
            let status = file.reload(config);
            assert!(status.denied() > denied, "the count went from {denied} to {}", status.denied());
            denied = status.denied();
        }
        let sent: u64 = floods.into_iter().map(Flood::stop).sum();
        assert_eq!(env.received_packets(), before, "of {sent} packets");
        assert!(sent > 100_000, "{sent} packets are no flood");
        let status = env.status();
        assert!(generation(&status) >= generation(&first) + 56);
        // A packet is counted once: packets that `from_pod` denies never reach `node_egress`.
        assert!(status.denied() <= sent && status.denied() > sent / 2, "{} of {sent}", status.denied());

        drop(agent);
        env.unload();
        assert_flood_arrives(&env, &pods);
    });
}

#[test]
fn off_and_on_without_restart() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let file = ConfigFile::new(&env, TC_HOOKS);
        let agent = file.start(backend, &[]);
        env.assert_blocked(&pod);
        let pid = env.status().agent.pid;

        for (mode, state) in [("off", "off"), ("audit", "auditing")] {
            let status = file.reload(&format!("mode = '{mode}'\n{TC_HOOKS}"));
            assert_eq!((status.mode.as_deref(), status.state.as_str()), (Some(mode), state));
            env.assert_open(&pod);
            let denied = env.status().denied();
            let status = file.reload(TC_HOOKS);
            assert_eq!((status.state.as_str(), status.agent.pid), ("enforcing", pid));
            env.assert_blocked(&pod);
            let total = env.status().total;
            assert!(total.denied.packets > denied && total.allowed.packets > 0, "{total:?}");
        }
        assert!(env.status().total.audited.packets > 0);
        // No endpoint at all, and then one again.
        file.reload(&format!("mode = 'off'\nprovider = 'none'\n{TC_HOOKS}"));
        env.assert_open(&pod);
        file.reload(TC_HOOKS);
        env.assert_blocked(&pod);
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn reload_changes_hooks() {
    if skip_without_netns_cookie() {
        return;
    }
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.assert_open(&pod);
        let file = ConfigFile::new(&env, FROM_POD);
        let agent = file.start(backend, &[]);
        let (veth, uplink) = (pod.host_ifname.as_str(), TestEnv::UPLINK);
        let attached = || [has_program(&env, veth, Ingress), has_program(&env, uplink, Egress)];
        // Distinguishes a denied call from one that times out.
        let is_call_denied =
            || env.in_cgroup(|| matches!(http_get(&pod.netns, METADATA, SHORT), Outcome::Error(_)));
        assert_eq!(attached(), [true, false]);
        assert!(!is_call_denied());

        for _ in 0..2 {
            let status = file.reload("[hooks]\nfrom_pod = false\n");
            assert_eq!(status.hooks, ["node_egress", "socket", "local_service"]);
            assert_eq!(attached(), [false, true]);
            assert!(is_call_denied() && status.sockets.unwrap().attached);
            env.assert_blocked(&pod);

            let status = file.reload("[hooks]\nnode_egress = false\nsocket = false\n");
            assert_eq!(status.hooks, ["from_pod", "local_service"]);
            assert!(status.sockets.is_none() && !is_call_denied());
            assert_eq!(attached(), [true, false]);
            env.assert_blocked(&pod);
        }
        assert_eq!(fs::read_dir(env.pin_dir().join("progs")).unwrap().count(), 3);
        // The effective hooks also apply to later pods.
        file.reload(TC_HOOKS);
        let late = env.add_pod(PodLink::Bridged);
        env.wait_enforced(&late);
        env.assert_blocked(&late);
        drop(agent);
        env.unload();
        assert_eq!(attached(), [false, false]);
        env.assert_open(&pod);
    });
}

#[test]
fn reload_changes_host_network() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let container = env.add_cgroup("kubepods.slice/pod7.slice");
    let is_open = || container.run(|| http_get(&env.node, METADATA, SHORT).is_answer());
    assert!(reachable(&env.node, METADATA) && is_open());
    let file = ConfigFile::new(&env, FROM_POD);
    let agent = file.start(AttachMode::Clsact, &[]);
    assert!(is_open());
    for _ in 0..2 {
        let status = file.reload(&format!("{FROM_POD}host_network = true\n"));
        assert!(status.problems.is_empty() && status.hooks.contains(&"host_network".to_owned()));
        assert!(!is_open() && reachable(&env.node, METADATA));
        let status = file.reload(FROM_POD);
        assert_eq!(status.hooks, ["from_pod", "local_service"]);
        assert!(is_open());
    }
    file.reload(&format!("{FROM_POD}host_network = true\n"));
    assert!(!is_open());
    drop(agent);
    env.unload();
    assert!(is_open());
}

#[test]
fn reload_changes_endpoints_and_interfaces() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [pod, other] = LINKS.map(|link| env.add_pod(link));
        let dmi = env.scratch_dir().join("dmi");
        fs::create_dir(&dmi).unwrap();
        let file = ConfigFile::new(&env, FROM_POD);
        let agent = file.start(backend, &["--dmi-dir", dmi.to_str().unwrap()]);
        env.assert_blocked(&pod);
        assert!(reachable(&pod.netns, SERVICE));

        let service = format!("[[endpoint]]\nname = 'service'\naddress = '{SERVICE}'\n");
        file.reload(&format!("provider = 'none'\n{FROM_POD}{service}"));
        assert!(!http_get(&pod.netns, SERVICE, SHORT).is_answer());
        env.assert_open(&pod);

        let exclude = format!("{FROM_POD}[interfaces]\nexclude = ['{}']\n", pod.host_ifname);
        let status = file.reload(&exclude);
        assert_eq!(status.interface(&pod.host_ifname).role, "excluded");
        assert_eq!(hook::programs(&env.node, &pod.host_ifname), []);
        env.assert_open(&pod);
        env.assert_blocked(&other);
        let status = file.reload(FROM_POD);
        assert_eq!(status.interface(&pod.host_ifname).role, "pod");
        env.assert_blocked(&pod);

        // The firmware data changes, the file does not.
        assert_eq!(status.provider.unwrap().effective, "generic");
        fs::write(dmi.join("sys_vendor"), "Amazon EC2\n").unwrap();
        hang_up(&agent);
        let status = env.status_when("the provider has changed", |status| {
            status.provider.as_ref().is_some_and(|provider| provider.effective == "aws")
        });
        assert_eq!(status.endpoints.len(), 2);
        env.assert_blocked(&pod);
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn new_endpoint_route_makes_an_uplink() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, TC_HOOKS);
    let agent = file.start(AttachMode::Clsact, &["--resync", "3600"]);
    let vault = Ipv4Addr::new(10, 9, 0, 1);
    // The uplink of a nested node: a veth without a default route.
    let pod = env.add_pod(PodLink::Routed);
    let role = |role: &'static str| {
        env.status_when(role, |status| status.find(&pod.host_ifname).is_some_and(|found| found.role == role))
    };
    role("pod");
    file.reload(&format!("{TC_HOOKS}[[endpoint]]\nname = 'vault'\naddress = '{vault}'\n"));
    role("pod");
    env.node.ip(&format!("route add {vault}/32 dev {}", pod.host_ifname));
    role("uplink");
    file.reload(TC_HOOKS);
    role("pod");
    file.reload(&format!("{TC_HOOKS}[[endpoint]]\nname = 'vault'\naddress = '{vault}'\n"));
    role("uplink");
    env.node.ip(&format!("route delete {vault}/32 dev {}", pod.host_ifname));
    role("pod");
    drop(agent);
    env.unload();
}

#[test]
fn bad_file_keeps_previous_config() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let file = ConfigFile::new(&env, TC_HOOKS);
    let agent = file.start(AttachMode::Clsact, &[]);
    let good = env.status();

    file.replace(&format!("mode = 'of'\n{TC_HOOKS}"));
    let status = assert_rejected(&env, &good, "imds.toml:1:8: mode: ");
    assert_eq!(status.configuration.unwrap().file.unwrap(), file.path);
    agent.wait_for_log("keeping the previous one", LONG);
    env.assert_blocked(&pod);

    // The endpoint conflicts with the provider's.
    file.replace(&format!("{TC_HOOKS}[[endpoint]]\nname = 'mine'\naddress = '{METADATA}'\n"));
    assert_rejected(&env, &good, "already protected");

    let good = file.reload(&format!("on_deny = 'reject'\n{TC_HOOKS}"));
    assert!(good.problems.is_empty(), "{:?}", good.problems);

    fs::remove_file(&file.path).unwrap();
    assert_rejected(&env, &good, "No such file");
    env.assert_blocked(&pod);
    let good = file.reload(TC_HOOKS);

    // A directory, and a pipe without a writer.
    fs::remove_file(&file.path).unwrap();
    fs::create_dir(&file.path).unwrap();
    assert_rejected(&env, &good, "not a regular file");
    fs::remove_dir(&file.path).unwrap();
    nix::unistd::mkfifo(&file.path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    hang_up(&agent);
    assert_rejected(&env, &good, "not a regular file");
    fs::remove_file(&file.path).unwrap();
    fs::write(&file.path, [0xff, 0xfe]).unwrap();
    assert_rejected(&env, &good, "UTF-8");
    fs::write(&file.path, " ".repeat((1 << 20) + 1)).unwrap();
    assert_rejected(&env, &good, "MiB");

    // The rejection is recorded without the agent too, until the next agent loads a valid file.
    agent.kill9();
    assert_rejected(&env, &good, "MiB");
    file.replace(TC_HOOKS);
    let agent = file.start(AttachMode::Clsact, &[]);
    assert!(env.status().configuration.unwrap().rejected.is_none());
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn unusable_cgroup_rejects_the_file() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let file = ConfigFile::new(&env, FROM_POD);
    let cgroup = env.add_cgroup("missing");
    let missing = cgroup.path().to_owned();
    let agent = env
        .agent()
        .config_file(file.path.to_str().unwrap())
        .args(&["--cgroup", missing.to_str().unwrap()])
        .spawn_ready();
    let good = env.status();
    drop(cgroup);
    // The file also enables `node_egress`, which must be detached again.
    file.replace("on_deny = 'reject'\n");
    let status = assert_rejected(&env, &good, missing.to_str().unwrap());
    assert!(!has_program(&env, TestEnv::UPLINK, Egress));
    assert!(status.interface(&pod.host_ifname).is_attached());
    env.assert_blocked(&pod);
    file.reload(FROM_POD);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn every_file_replacement_is_noticed() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    // No resync runs during the test.
    let agent = file.start(AttachMode::Clsact, &["--resync", "3600"]);
    let modes = |n: usize| ["enforce", "audit", "off"][n % 3];
    let config = |mode: &str| format!("mode = '{mode}'\n{FROM_POD}");
    let assert_in_force = |mode: &str| {
        env.status_when(mode, |status| status.mode.as_deref() == Some(mode) && status.problems.is_empty());
    };

    fs::write(&file.path, config("audit")).unwrap();
    assert_in_force("audit");
    file.replace(&config("off"));
    assert_in_force("off");
    fs::remove_file(&file.path).unwrap();
    assert_rejected(&env, &env.status(), "No such file");
    fs::write(&file.path, config("enforce")).unwrap();
    assert_in_force("enforce");

    // Replaces symlinks as the kubelet does for a ConfigMap.
    let dir = env.scratch_dir();
    let version = |n: usize| {
        let name = format!("..2026_11_23_{n}");
        fs::create_dir(dir.join(&name)).unwrap();
        fs::write(dir.join(&name).join("imds.toml"), config(modes(n))).unwrap();
        symlink(&name, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        name
    };
    let mut current = version(1);
    fs::remove_file(&file.path).unwrap();
    symlink("..data/imds.toml", &file.path).unwrap();
    assert_in_force(modes(1));
    for n in 2..6 {
        let before = std::mem::replace(&mut current, version(n));
        fs::remove_dir_all(dir.join(before)).unwrap();
        assert_in_force(modes(n));
    }

    // Several fast changes: the last one counts.
    for n in 0..10 {
        file_in(dir, &current, &config(modes(n)));
        file_in(dir, &current, &config(modes(n + 1)));
        assert_in_force(modes(n + 1));
    }
    drop(agent);
    env.unload();
}

fn file_in(dir: &Path, version: &str, text: &str) {
    fs::write(dir.join(version).join("imds.toml"), text).unwrap();
}

#[test]
fn inotify_overflow_is_handled() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    let agent = file.start(AttachMode::Clsact, &["--resync", "3600"]);
    let pid = Pid::from_raw(agent.pid().try_into().unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    let most: usize =
        fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    // Two events per file. Successive events differ, because the kernel would merge equal ones.
    for n in 0..most {
        let name = env.scratch_dir().join(format!("other-{}", n % 2));
        fs::write(&name, "").unwrap();
        fs::remove_file(&name).unwrap();
    }
    file.replace(&format!("mode = 'audit'\n{FROM_POD}"));
    kill(pid, Signal::SIGCONT).unwrap();
    env.status_when("the change is noticed", |status| status.mode.as_deref() == Some("audit"));
    drop(agent);
    env.unload();
}

#[test]
fn polling_finds_unreported_changes() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    // A second name of the same file, in a directory that the agent does not watch.
    let elsewhere = env.scratch_dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::hard_link(&file.path, elsewhere.join("imds.toml")).unwrap();
    let agent = file.start(AttachMode::Clsact, &["--resync", "1"]);
    fs::write(elsewhere.join("imds.toml"), format!("mode = 'audit'\n{FROM_POD}")).unwrap();
    poll_until(Duration::from_secs(20), "the change to be noticed", || {
        (env.status().mode.as_deref() == Some("audit")).then_some(())
    });
    drop(agent);
    env.unload();
}

#[test]
fn sighup_without_file_is_ignored() {
    // Without a file, all hooks are on.
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let args = ["--cgroup", env.cgroup().to_str().unwrap()];
    let mut agent = env.imds_agent(&["run"]).args(&args).spawn_ready();
    let before = generation(&env.status());
    hang_up(&agent);
    env.status_when("the configuration is loaded again", |status| generation(status) == before + 1);
    agent.wait_ready();
    env.assert_blocked(&pod);
    assert!(agent.terminate().success());
    env.unload();
}

//! Starts for which the kernel rejects programs, and starts that fail while they load. The agent enforces the hooks
//! that it can, reports the others, and a failed start changes nothing.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use imds_ebpf_common::{Policy, PolicyFilter};
use imds_tests::{
    AgentCommand, AttachMode, Pod, PodLink, Status, TestEnv,
    foreign_bpf::detach_link,
    hook, output,
    poll::poll_until,
    probe::LONG,
    program_policy::{CGROUP_SOCK_ADDR, ProgramPolicy, SCHED_CLS},
    seccomp, skip_without_netns_cookie, with_each_backend,
};
use nix::sys::resource::{Resource, setrlimit};

fn has_problem(status: &Status, text: &str) -> bool {
    status.problems.iter().any(|problem| problem.problem.contains(text))
}

fn ready_metric(env: &TestEnv) -> String {
    let metrics = env.metrics();
    metrics.lines().find(|line| line.starts_with("imds_agent_ready ")).unwrap_or_default().to_owned()
}

/// Waits until the agent has loaded the rejected programs, which it tries with every sixth resync.
#[track_caller]
fn wait_recovered(env: &TestEnv) {
    poll_until(LONG * 3, "no problem is left", || env.status().is_ready().then_some(()));
}

#[track_caller]
fn assert_degraded(env: &TestEnv, problem: &str) -> Status {
    let status = env.status_when("the agent is ready", |status| status.agent.ready);
    assert_eq!(status.state, "degraded");
    assert!(has_problem(&status, problem), "{:?}", status.problems);
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    status
}

#[test]
fn rejected_socket_programs_degrade_the_agent() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let policy = ProgramPolicy::new(|request| request.prog_type == CGROUP_SOCK_ADDR);
    let agent = env.agent().hooks(&["from_pod", "socket"]).resync(1).policy(&policy).spawn();
    env.wait_enforced(&pod);
    env.assert_blocked(&pod);
    let late = env.add_pod(PodLink::Routed);
    env.wait_enforced(&late);
    env.assert_blocked(&late);

    let cause = "socket is not enforced: failed to load BPF program imds_connect4: Permission denied";
    let status = assert_degraded(&env, cause);
    assert_eq!(status.hooks, ["from_pod", "socket"]);
    assert!(status.sockets.is_some_and(|sockets| !sockets.attached));
    assert_eq!(ready_metric(&env), "imds_agent_ready 0");
    let failures = || agent.log().matches("failed to load BPF program imds_connect4").count();
    poll_until(LONG, "both lines about the program", || (failures() >= 2).then_some(()));
    assert_eq!(failures(), 2, "{}", agent.log());

    policy.lift();
    agent.wait_for_log("attached imds_connect4 to cgroup", LONG * 3);
    wait_recovered(&env);
    assert_eq!(ready_metric(&env), "imds_agent_ready 1");
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn one_rejected_program_degrades_the_agent() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let policy = ProgramPolicy::new(|request| request.name == "imds_from_pod");
        let hooks = ["from_pod", "node_egress"];
        let agent = env.agent().backend(backend).hooks(&hooks).resync(1).policy(&policy).spawn();
        let cause = "from_pod is not enforced: failed to load BPF program imds_from_pod: Permission denied";
        let status = assert_degraded(&env, cause);
        assert!(!status.has_attached(&pod.host_ifname, "from_pod"));
        env.assert_blocked(&pod);
        let late = env.add_pod(PodLink::Bridged);
        env.status_when("the pod is known", |status| status.find(&late.host_ifname).is_some());
        env.assert_blocked(&late);

        policy.lift();
        wait_recovered(&env);
        for pod in [&pod, &late] {
            assert!(env.status().has_attached(&pod.host_ifname, "from_pod"));
            env.assert_blocked(pod);
        }
        drop(agent);
        env.unload();
        env.assert_open(&pod);
    });
}

#[test]
fn once_names_a_rejected_program() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let policy = ProgramPolicy::new(|request| request.name == "imds_from_podl3");
    let agent = env.agent().policy(&policy).args(&["--once"]).spawn();
    agent.wait_for_log("failed to load BPF program imds_from_podl3", LONG);
    assert_eq!(agent.wait_end().code(), Some(1));
    env.assert_blocked(&pod);
}

/// An update whose programs the kernel rejects: those of the earlier agent also protect new pods.
#[test]
fn programs_of_an_earlier_agent_run_on() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        env.start_agent(backend).kill9();
        let program = || hook::pinned_program(&env.pin_dir().join("progs/imds_from_pod"));
        let before = program();
        let policy =
            ProgramPolicy::new(|request| request.prog_type == SCHED_CLS && request.name != "imds_probe");
        let agent = env.agent().backend(backend).resync(1).policy(&policy).spawn();
        let status = assert_degraded(&env, "from_pod runs imds_from_pod of an earlier agent");
        assert!(status.all_pods_enforced());
        env.assert_blocked(&pod);
        let late = env.add_pod(PodLink::Routed);
        env.wait_enforced(&late);
        env.assert_blocked(&late);
        assert_eq!(program(), before);

        policy.lift();
        wait_recovered(&env);
        assert_ne!(program(), before);
        drop(agent);
        env.unload();
        env.assert_open(&late);
    });
}

/// Makes `SO_NETNS_COOKIE` fail in a process before its exec, as on Linux before 5.14.
fn reject_netns_cookie() -> io::Result<()> {
    const SO_NETNS_COOKIE: u32 = 71;
    let action = libc::SECCOMP_RET_ERRNO | libc::ENOPROTOOPT.cast_unsigned();
    seccomp::filter(libc::SYS_getsockopt, (2, SO_NETNS_COOKIE), action, 0).map(drop)
}

fn without_netns_cookie(mut command: Command) -> Command {
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(reject_netns_cookie) };
    command
}

/// Starts an agent to which the kernel does not report the cookie, and waits until it is ready.
fn start_without_netns_cookie(env: &TestEnv, agent: &AgentCommand<'_>) -> Child {
    let log = fs::File::create(env.scratch_dir().join("log")).unwrap();
    let mut command = without_netns_cookie(agent.command());
    let child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
    env.status_when("the agent is ready", |status| status.agent.ready);
    child
}

/// Returns the problems of a degraded node on a kernel that does not report the cookie.
#[track_caller]
fn problems_without_netns_cookie(env: &TestEnv) -> Vec<String> {
    let output = output(without_netns_cookie(env.imds_agent(&["status", "-o", "json"]).command()));
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let status: Status = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status.state, "degraded");
    status.problems.into_iter().map(|problem| problem.problem).collect()
}

#[track_caller]
fn assert_start_with(texts: &[String], expected: &[String]) {
    let is_expected = |(text, expected): (&String, &String)| text.starts_with(expected);
    assert!(texts.len() == expected.len() && texts.iter().zip(expected).all(is_expected), "{texts:#?}");
}

const NO_COOKIE: &str = "before Linux 5.14 the kernel does not report the cookie of a network namespace";

/// Before Linux 5.14, programs on cgroups can't identify a network namespace that is not the machine's initial one. The other
/// hooks are enforced, and each missing one is reported.
#[test]
fn missing_netns_cookie_degrades_the_agent() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().hooks(&["from_pod", "socket", "host_network"]);
    let agent = agent.config("[node]\nallow = ['uid:0']\n").resync(1);
    let mut child = start_without_netns_cookie(&env, &agent);
    env.wait_enforced(&pod);
    env.assert_blocked(&pod);
    let late = env.add_pod(PodLink::Routed);
    env.wait_enforced(&late);
    env.assert_blocked(&late);
    let expected = ["socket", "host_network", "node_allow"];
    assert_eq!(env.status().hooks, ["from_pod", expected[0], expected[1], expected[2]]);
    let expected = expected.map(|hook| format!("{hook} is not attached: {NO_COOKIE}"));
    assert_start_with(&problems_without_netns_cookie(&env), &expected);
    assert_eq!(ready_metric(&env), "imds_agent_ready 0");
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(env.scratch_dir().join("log")).unwrap();
    for line in &expected {
        assert_eq!(log.matches(line.as_str()).count(), 1, "{log}");
    }
    env.unload();
    env.assert_open(&pod);
}

/// Links of an agent that could identify the namespace stay attached, but the next agent does not restore them.
#[test]
fn links_of_an_earlier_agent_are_reported_without_netns_cookie() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let agent = || {
        let agent = env.agent().hooks(&["from_pod", "socket", "local_service"]);
        agent.config("[node]\nallow = ['uid:0']\n").resync(1)
    };
    agent().spawn_ready().kill9();
    let mut child = start_without_netns_cookie(&env, &agent());
    let earlier = ["socket", "node_allow"].map(|hook| {
        format!("{hook} runs programs of an earlier agent, which are not restored if they are detached: {NO_COOKIE}")
    });
    assert_start_with(&problems_without_netns_cookie(&env), &earlier);
    assert_eq!(ready_metric(&env), "imds_agent_ready 1");
    detach_link(&env.pin_dir().join("links/connect4"));
    sleep(Duration::from_secs(3));
    let detached = [format!("socket is not attached: {NO_COOKIE}"), earlier[1].clone()];
    assert_start_with(&problems_without_netns_cookie(&env), &detached);
    assert_eq!(ready_metric(&env), "imds_agent_ready 0");
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(env.scratch_dir().join("log")).unwrap();
    assert!(earlier.iter().all(|line| log.contains(line)), "{log}");
    env.unload();
}

/// Numbers of the pinned maps and programs, names of the pinned links, and content of the maps that decide.
#[derive(Debug, PartialEq)]
struct Pinned {
    objects: Vec<(PathBuf, u32)>,
    links: Vec<PathBuf>,
    policy: Option<Policy>,
    filter: Option<Box<[u8]>>,
    endpoints: Vec<String>,
}

impl Pinned {
    fn read(env: &TestEnv) -> Self {
        let entries = |directory: &str| {
            let entries = fs::read_dir(env.pin_dir().join(directory)).unwrap();
            let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            paths.sort();
            paths
        };
        let maps = entries("maps").into_iter().map(|path| (path.clone(), hook::pinned_map(&path)));
        let programs = entries("progs").into_iter().map(|path| (path.clone(), hook::pinned_program(&path)));
        let filter: PolicyFilter = value(&env.pin_dir().join("maps/imds_filter"));
        // SAFETY: `PolicyFilter` is plain data without padding (`aya::Pod`), and borrowed for as long as the bytes.
        let filter = unsafe {
            std::slice::from_raw_parts((&raw const filter).cast::<u8>(), size_of::<PolicyFilter>())
        };
        let status = env.try_status();
        let endpoints =
            status.map(|status| status.endpoints.into_iter().map(|endpoint| endpoint.address).collect());
        Self {
            objects: maps.chain(programs).collect(),
            links: entries("links"),
            policy: Some(value(&env.pin_dir().join("maps/imds_policy"))),
            filter: Some(filter.into()),
            endpoints: endpoints.unwrap_or_default(),
        }
    }
}

fn value<V: aya::Pod>(pin: &Path) -> V {
    let array: Array<MapData, V> = Map::Array(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    array.get(&0, 0).unwrap()
}

fn enforced_env() -> (TestEnv, Pod) {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.start_agent(AttachMode::Clsact).kill9();
    env.assert_blocked(&pod);
    (env, pod)
}

/// A configuration under which the pod would reach the service.
const OPEN: &str = "mode = 'off'\nprovider = 'none'\n[[endpoint]]\nname = 'other'\naddress = '10.9.9.9'\n";

#[test]
fn a_start_without_any_program_fails_and_changes_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let policy =
        ProgramPolicy::new(|request| request.name.starts_with("imds_") && request.name != "imds_probe");
    let agent = env.agent().policy(&policy).spawn();
    agent.wait_for_log("imds-agent: failed to load BPF program imds_from_pod: Permission denied", LONG);
    assert_eq!(agent.wait_end().code(), Some(1));
    assert!(!env.pin_dir().exists());
    env.assert_open(&pod);

    // The maps of another version would be replaced.
    env.start_agent(AttachMode::Clsact).kill9();
    let pin = env.pin_dir().join("maps/imds_policy");
    let mut policies: Array<MapData, Policy> =
        Map::Array(MapData::from_pin(&pin).unwrap()).try_into().unwrap();
    policies.set(0, Policy { layout: 99, ..value(&pin) }, 0).unwrap();
    let before = Pinned::read(&env);
    let agent = env.agent().backend(AttachMode::Clsact).config(OPEN).policy(&policy).spawn();
    assert_eq!(agent.wait_end().code(), Some(1));
    assert_eq!(Pinned::read(&env), before);
    env.assert_blocked(&pod);
}

/// Each limit makes another call of the start fail.
#[test]
fn a_start_that_runs_out_of_descriptors_changes_nothing() {
    let (env, pod) = enforced_env();
    let before = Pinned::read(&env);
    let agent = env.agent().backend(AttachMode::Clsact).config(OPEN).args(&["--once"]);
    let mut failed = 0;
    for limit in 8.. {
        let mut command = agent.command();
        // SAFETY: between fork and exec it makes one system call, and allocates nothing.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)) };
        let output = output(command);
        let now = Pinned::read(&env);
        if now != before {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!stderr.contains("failed to load"), "{limit}: {stderr}");
            assert_eq!(now.policy.unwrap().mode, imds_ebpf_common::Mode::Off as u32, "{limit}: {stderr}");
            break;
        }
        failed += 1;
    }
    assert!(failed > 40, "{failed}");
    drop(pod);
}

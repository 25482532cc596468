//! Failures: the agent reports an unmet requirement in one line that names the subject, and leaves nothing behind.

mod bpffs;
mod descriptors;

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Output},
};

use aya::util::KernelVersion;
use imds_tests::{
    AgentCommand, METADATA, PodLink, TestEnv, hook,
    kubelet::{Driver, Kubelet, new_uid},
    output,
    probe::{SHORT, http_get, reachable},
    skip_without_netns_cookie,
};
use nix::sys::resource::{Resource, setrlimit};

/// An environment with a pod in which an agent fails.
struct FailedStart {
    env: TestEnv,
    pod: imds_tests::Pod,
}

impl FailedStart {
    fn new() -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        Self { env, pod }
    }

    fn agent(&self) -> AgentCommand<'_> {
        self.env.agent()
    }

    /// Asserts that an agent failed with this code and one line that contains all `subjects`, and left nothing behind.
    #[track_caller]
    fn assert(&self, output: &Output, code: i32, subjects: &[&str]) {
        assert_line(output, code, subjects);
        assert!(!self.env.pin_dir().exists(), "{}", self.env.pin_dir().display());
        assert_eq!(hook::programs(&self.env.node, &self.pod.host_ifname), []);
        assert!(!hook::has_clsact(&self.env.node, &self.pod.host_ifname));
    }
}

#[track_caller]
fn assert_line(output: &Output, code: i32, subjects: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("imds-agent: "), "{stderr}");
    for subject in subjects {
        assert!(stderr.contains(subject), "{subject:?} is not in: {stderr}");
    }
}

/// Runs the command through `wrapper`.
fn wrapped(env: &TestEnv, wrapper: &[&str], agent: &AgentCommand<'_>) -> Command {
    let inner = agent.command();
    let mut command = env.node.command(wrapper[0]);
    command.args(&wrapper[1..]).arg(inner.get_program()).args(inner.get_args());
    command
}

#[test]
fn unprivileged_user() {
    let start = FailedStart::new();
    let inner = start.agent().command();
    // The directory is not accessible for other users.
    let copy = start.env.scratch_dir().join("imds-agent");
    fs::copy(inner.get_program(), &copy).unwrap();
    fs::set_permissions(start.env.scratch_dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = start.env.node.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(copy).args(inner.get_args());
    start.assert(&output(command), 1, &["CAP_BPF", "CAP_NET_ADMIN"]);
}

#[test]
fn root_without_capabilities() {
    // CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (capabilities(7)).
    let cases = [
        ("-net_admin", "CAP_NET_ADMIN"),
        ("-bpf,-sys_admin", "CAP_BPF"),
        ("-perfmon,-sys_admin", "CAP_PERFMON"),
    ];
    let start = FailedStart::new();
    for (dropped, name) in cases {
        start.assert(&run_with_capabilities(&start.env, dropped), 1, &[name]);
    }
}

/// Capabilities that are sufficient without exemptions.
const ENOUGH: &str = "-all,+bpf,+net_admin,+perfmon";

fn run_with_capabilities(env: &TestEnv, capabilities: &str) -> Output {
    output(with_capabilities(env, capabilities))
}

fn with_capabilities(env: &TestEnv, capabilities: &str) -> Command {
    let (bounding, inheritable) =
        (format!("--bounding-set={capabilities}"), format!("--inh-caps={capabilities}"));
    wrapped(env, &["setpriv", &bounding, &inheritable], &env.agent().args(&["--once"]))
}

#[test]
fn three_capabilities_are_sufficient() {
    let FailedStart { env, pod } = FailedStart::new();
    let result = run_with_capabilities(&env, ENOUGH);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    env.assert_blocked(&pod);
}

/// The unit and the pods have two more capabilities. Exemptions need both.
#[test]
fn exemptions_need_two_more_capabilities() {
    if skip_without_netns_cookie() {
        return;
    }
    let FailedStart { env, pod } = FailedStart::new();
    // Requires access to the pod's processes, which belong to another user, and to its network namespace.
    let kubelet = Kubelet::new();
    let mut cgroup = kubelet.add_pod(&new_uid(), Driver::Cgroupfs);
    cgroup.start_as(&pod.netns, 1000);
    let rule = format!("[[exempt]]\nname = 'one'\ncgroup = '{}'", cgroup.path.display());
    for (capabilities, is_exempt) in [
        ("-all,+bpf,+net_admin,+perfmon,+sys_admin,+sys_ptrace", true),
        ("-all,+bpf,+net_admin,+perfmon,+sys_admin", false),
        ("-all,+bpf,+net_admin,+perfmon,+sys_ptrace", false),
    ] {
        let (bounding, inheritable) =
            (format!("--bounding-set={capabilities}"), format!("--inh-caps={capabilities}"));
        let agent = env.agent().config(&rule).args(&["--once"]);
        let result = output(wrapped(&env, &["setpriv", &bounding, &inheritable], &agent));
        let is_reached = if is_exempt {
            reachable(&pod.netns, METADATA)
        } else {
            http_get(&pod.netns, METADATA, SHORT).is_answer()
        };
        assert_eq!(is_reached, is_exempt, "{capabilities}: {result:?}");
        env.unload();
    }
}

#[test]
fn locked_memory_limit_on_old_kernel() {
    let start = FailedStart::new();
    let mut command = with_capabilities(&start.env, ENOUGH);
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_MEMLOCK, 1 << 16, 1 << 16)?)) };
    let output = output(command);
    // Since Linux 5.11 maps count as memory of the cgroup.
    if KernelVersion::current().unwrap() < KernelVersion::new(5, 11, 0) {
        start.assert(&output, 1, &["65536", "LimitMEMLOCK", "CAP_SYS_RESOURCE"]);
    } else {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        start.env.assert_blocked(&start.pod);
    }
}

/// Makes bpf(2) fail with `errno` in a process before its exec.
fn reject_bpf(errno: i32) -> io::Result<()> {
    const fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
        #[expect(clippy::cast_possible_truncation, reason = "codes are 16 bits, the constants are not")]
        let code = code as u16;
        libc::sock_filter { code, jt, jf, k }
    }
    let bpf = u32::try_from(libc::SYS_bpf).map_err(io::Error::other)?;
    let mut filter = [
        // The first field of struct seccomp_data is the number of the system call.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, bpf, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(), 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter outlive the call, which copies them.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn kernel_without_bpf() {
    let start = FailedStart::new();
    for errno in [libc::ENOSYS, libc::EPERM] {
        let mut command = start.agent().command();
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || reject_bpf(errno)) };
        start.assert(&output(command), 1, &["kernel"]);
    }
}

#[test]
fn second_agent_on_same_pin_dir() {
    let start = FailedStart::new();
    let mut first = start.agent().spawn_ready();
    assert_line(
        &start.agent().output(),
        1,
        &[&first.pid().to_string(), start.env.pin_dir().to_str().unwrap()],
    );
    assert_line(&start.agent().once(), 1, &[&first.pid().to_string()]);
    first.wait_ready();
    start.env.assert_blocked(&start.pod);
}

#[test]
fn two_agents_with_separate_pin_dirs() {
    let [one, other] = [FailedStart::new(), FailedStart::new()];
    let _agents = [one.agent().spawn_ready(), other.agent().spawn_ready()];
    one.env.assert_blocked(&one.pod);
    other.env.assert_blocked(&other.pod);
}

#[test]
fn path_that_is_not_a_cgroup() {
    let start = FailedStart::new();
    let missing = start.env.scratch_dir().join("missing");
    for path in [Path::new("/tmp"), Path::new("/dev/null"), &missing] {
        let config = start.env.scratch_dir().join("empty.toml");
        fs::write(&config, "").unwrap();
        let agent = start.agent().config_file(config.to_str().unwrap());
        let path = path.to_str().unwrap();
        start.assert(&agent.args(&["--cgroup", path]).output(), 2, &["--cgroup", path]);
    }
}

#[test]
fn failed_start_keeps_earlier_enforcement() {
    let start = FailedStart::new();
    start.agent().spawn_ready().kill9();
    let before = (
        hook::programs(&start.env.node, &start.pod.host_ifname),
        hook::pinned_map(&start.env.pin_dir().join("maps/imds_policy")),
    );
    let config = start.env.scratch_dir().join("off.toml");
    fs::write(&config, "mode = 'off'").unwrap();
    let agent = start.agent().config_file(config.to_str().unwrap());
    assert_line(&agent.args(&["--cgroup", "/tmp"]).output(), 2, &["--cgroup"]);
    let after = (
        hook::programs(&start.env.node, &start.pod.host_ifname),
        hook::pinned_map(&start.env.pin_dir().join("maps/imds_policy")),
    );
    assert_eq!(before, after);
    start.env.assert_blocked(&start.pod);
}

/// The other hooks are enforced, and the missing one is reported.
#[test]
fn missing_cgroup_v2_degrades_the_agent() {
    let FailedStart { env, pod } = FailedStart::new();
    let config = env.scratch_dir().join("socket.toml");
    let hooks = "node_egress = false\nlocal_service = false\nhost_network = false";
    fs::write(&config, format!("[metrics]\nlisten = []\n[hooks]\n{hooks}")).unwrap();
    let log = fs::File::create(env.scratch_dir().join("log")).unwrap();
    let script = "umount -l /sys/fs/cgroup && exec \"$@\"";
    let agent = env.agent().config_file(config.to_str().unwrap());
    let mut command = wrapped(&env, &["unshare", "--mount", "sh", "-c", script, "sh"], &agent);
    let mut child = command.stderr(log).spawn().unwrap();
    let _late = env.assert_enforced_with_later_pod(&pod);
    let status = env.status_when("the agent is ready", |status| status.agent.ready);
    assert_eq!(status.state, "degraded");
    assert!(status.problems.iter().any(|problem| problem.problem.contains("imds_connect4 is not attached")));
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(env.scratch_dir().join("log")).unwrap();
    assert_eq!(log.matches("no cgroup v2 hierarchy is mounted").count(), 1, "{log}");
    assert!(log.contains("run --cgroup"), "{log}");
}

#[test]
fn wrong_configuration() {
    let cases: [(&str, &[&str]); 9] = [
        ("mode = \"enforce\"\nmodus = \"audit\"", &[":2:", "modus"]),
        ("[interfaces]\n\nexcluded = []", &[":3:", "excluded"]),
        ("mode = \"observe\"", &[":1:", "observe"]),
        ("mode = 1", &[":1:"]),
        ("mode = \"audit\"\nmode = \"off\"", &[":2:", "duplicate", "mode"]),
        ("mode = \"audit", &[":1:"]),
        ("= [", &[":1:"]),
        ("[interfaces]\nexclude = [\"veth[\"]", &[":2:", "veth["]),
        ("[interfaces]\ninclude = \"veth*\"", &[":2:"]),
    ];
    let env = TestEnv::new();
    let file = env.scratch_dir().join("imds.toml");
    let program = env.imds_agent(&[]).command().get_program().to_owned();
    for (config, subjects) in cases {
        fs::write(&file, config).unwrap();
        let mut check = env.node.command(&program);
        check.args(["config", "check", file.to_str().unwrap()]);
        let output = output(check);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        let first = stderr.lines().next().unwrap_or_default();
        assert!([&[".toml"], subjects].concat().iter().all(|subject| first.contains(subject)), "{first}");
    }
}

#[test]
fn wrong_config_keeps_last_good_one() {
    let FailedStart { env, pod } = FailedStart::new();
    let file = env.scratch_dir().join("imds.toml");
    let agent = || {
        let cgroup = env.cgroup().to_str().unwrap();
        env.imds_agent(&["run"]).config_file(file.to_str().unwrap()).args(&["--cgroup", cgroup])
    };
    fs::write(&file, "[hooks]\nsocket = false\nnode_egress = false\n").unwrap();
    agent().spawn_ready().kill9();
    let before = env.status();
    fs::write(&file, "mode = 'of'").unwrap();
    let output = agent().once();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let after = env.status();
    assert_eq!((after.mode, after.hooks), (before.mode, before.hooks));
    env.assert_blocked(&pod);
}

#[test]
fn wrong_command_line() {
    let start = FailedStart::new();
    let cases: [&[&str]; 6] = [
        &[],
        &["start"],
        &["run", "--fast"],
        &["run", "--tc-backend", "xdp"],
        &["run", "--resync", "soon"],
        &["status", "-o", "xml"],
    ];
    for args in cases {
        let output = start.env.imds_agent(args).output();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{args:?}: {output:?}");
    }
    assert!(!start.env.pin_dir().exists());
}

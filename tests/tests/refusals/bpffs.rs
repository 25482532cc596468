//! Starts on a node without a bpffs: the agent mounts one, or enforces without pins and reports that.

use std::{
    ffi::OsStr,
    fs,
    path::PathBuf,
    process::{Child, Command},
};

use imds_tests::{
    AgentCommand, Pod, PodLink, Status, TestEnv, hook,
    http::{DEFAULT, try_get},
    lacks_netns_cookie, output,
    poll::poll_until,
    probe::LONG,
    status::Problem,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{FailedStart, assert_line, wrapped};

#[test]
fn pin_directory_outside_bpffs() {
    let start = FailedStart::new();
    let path = start.env.scratch_dir().join("pins");
    let agent = start.agent().pin_dir(&path);
    start.assert(&agent.output(), 1, &[path.to_str().unwrap(), "bpffs"]);
    assert!(!path.exists());
}

/// Returns a command that runs the agent in a mount namespace in which /sys/fs/bpf is not a bpffs, as on a bare machine.
fn without_bpffs(env: &TestEnv, capabilities: &str, agent: &AgentCommand<'_>) -> Command {
    let bounding = format!("--bounding-set={capabilities}");
    let script = format!("umount -l /sys/fs/bpf && exec setpriv {bounding} --inh-caps=-all \"$@\"");
    wrapped(env, &["unshare", "--mount", "sh", "-c", &script, "sh"], agent)
}

#[test]
fn missing_bpffs_is_mounted() {
    let FailedStart { env, pod: _pod } = FailedStart::new();
    // Prints the mode of the root of the bpffs after the agent has ended. The kernel adds the sticky bit.
    let script = "umount -l /sys/fs/bpf && \"$@\" && stat -c %a /sys/fs/bpf";
    let agent = env.agent().args(&["--once"]);
    let result = output(wrapped(&env, &["unshare", "--mount", "sh", "-c", script, "sh"], &agent));
    let stderr = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success() && stderr.contains("mounted a bpffs at /sys/fs/bpf"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&result.stdout), "1700\n");
    let warning = "run `mount -t bpf bpf /sys/fs/bpf` on the node, not in the container";
    assert!(stderr.contains(warning), "{stderr}");
    // The bpffs and its pins are removed together with the mount namespace.
}

/// A container without the node's bpffs mounts one of its own.
#[test]
fn a_bpffs_of_a_container_is_a_problem() {
    let FailedStart { env, pod } = FailedStart::new();
    let run = env.agent().args(&["--once"]).command();
    let status = env.imds_agent(&["status", "-o", "json"]).command();
    let words = |command: &Command| {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    };
    let script = format!("umount -l /sys/fs/bpf && {} && {}", words(&run), words(&status));
    let mut command = env.node.command("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    let result = output(command);
    assert_eq!(result.status.code(), Some(3), "{result:?}");
    let status: Status = serde_json::from_slice(&result.stdout).unwrap();
    let problem = "the bpffs is mounted only in the mount namespace of the agent: enforcement ends with";
    assert!(status.problems.iter().any(|found| found.problem.starts_with(problem)), "{:?}", status.problems);
    assert_eq!(status.state, "degraded");
    drop(pod);
}

/// Links of a process that only attaches would end with it.
#[test]
fn once_needs_a_bpffs() {
    let start = FailedStart::new();
    let result = output(without_bpffs(&start.env, "-sys_admin", &start.agent().args(&["--once"])));
    start.assert(&result, 1, &["`mount -t bpf bpf /sys/fs/bpf` on the node", "CAP_SYS_ADMIN"]);
}

/// An agent that runs without a bpffs. Dropping it ends it.
struct Unpinned {
    child: Child,
    log: PathBuf,
}

impl Unpinned {
    fn start(env: &TestEnv, agent: &AgentCommand<'_>) -> Self {
        let log = env.scratch_dir().join("log");
        let mut command = without_bpffs(env, "-sys_admin", agent);
        command.env("RUST_LOG", "info").stderr(fs::File::create(&log).unwrap());
        Self { child: command.spawn().unwrap(), log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Returns a command in the namespaces of the agent.
    fn beside(&self, env: &TestEnv, program: &OsStr) -> Command {
        let mut command = env.node.command("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.child.id())).arg(program);
        command
    }

    fn stop(&mut self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Unpinned {
    fn drop(&mut self) {
        // Fails after `stop`.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[track_caller]
fn assert_enforced(env: &TestEnv, pod: &Pod) {
    poll_until(LONG, "the pod to be enforced", || {
        hook::programs(&env.node, &pod.host_ifname).first().is_some_and(hook::Attached::is_ours).then_some(())
    });
    env.assert_blocked(pod);
}

#[test]
fn missing_bpffs_degrades_the_agent() {
    let FailedStart { env, pod } = FailedStart::new();
    let mut agent = Unpinned::start(&env, &env.agent());
    assert_enforced(&env, &pod);
    let late = env.add_pod(PodLink::Routed);
    assert_enforced(&env, &late);

    let pid = agent.child.id();
    let status = env.imds_agent(&["status", "-o", "json"]).output();
    assert_eq!(status.status.code(), Some(3), "{status:?}");
    let status: Status = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((status.state.as_str(), status.agent.pid), ("degraded", Some(pid)));
    let problem = &status.problems[0];
    assert!(problem.problem.contains("enforcement ends with the agent"), "{problem:?}");
    assert!(problem.remedy.contains("`mount -t bpf bpf /sys/fs/bpf`"), "{problem:?}");
    let doctor = env.imds_agent(&["doctor"]).output();
    assert_eq!(doctor.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("runs without a bpffs"), "{doctor:?}");
    assert_line(&env.imds_agent(&["unload"]).output(), 1, &[&format!("kill {pid}")]);
    let second = output(without_bpffs(&env, "-sys_admin", &env.agent()));
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    assert!(String::from_utf8_lossy(&second.stderr).contains(&format!("(pid {pid})")), "{second:?}");

    agent.stop();
    if hook::has_tcx() {
        env.assert_open(&pod);
    } else {
        // A clsact filter needs no pin.
        env.assert_blocked(&pod);
    }
}

#[test]
fn later_bpffs_gets_all_pins() {
    let FailedStart { env, pod } = FailedStart::new();
    let hooks: &[_] =
        if lacks_netns_cookie() { &["from_pod"] } else { &["from_pod", "node_egress", "socket"] };
    let agent = Unpinned::start(&env, &env.agent().hooks(hooks).resync(1));
    assert_enforced(&env, &pod);
    let lines = |pattern: &str| agent.log().matches(pattern).count();
    poll_until(LONG, "readiness to name the problem", || {
        let (code, text) = try_get(&env, DEFAULT, "/readyz").ok()?;
        (code == 503 && text.contains("without a bpffs")).then_some(())
    });
    assert_eq!(
        (lines("failed to mount a bpffs at /sys/fs/bpf"), lines("restored")),
        (1, 0),
        "{}",
        agent.log()
    );

    let mut mount = agent.beside(&env, OsStr::new("mount"));
    assert!(
        output({
            mount.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]);
            mount
        })
        .status
        .success()
    );
    poll_until(LONG, "a status without that problem", || {
        let status = env.imds_agent(&["status", "-o", "json"]).command();
        let mut command = agent.beside(&env, status.get_program());
        command.args(status.get_args());
        let status: Status = serde_json::from_slice(&output(command).stdout).ok()?;
        let is_private = |problem: &Problem| problem.problem.contains("only in the mount namespace");
        (status.agent.ready && status.all_pods_enforced() && status.problems.iter().all(is_private))
            .then_some(())
    });
    poll_until(LONG, "the log of the restored pins", || (lines("restored") > 0).then_some(()));
    assert_eq!(
        (lines("failed to mount a bpffs at /sys/fs/bpf"), lines("restored")),
        (1, 1),
        "{}",
        agent.log()
    );
    env.assert_blocked(&pod);
}

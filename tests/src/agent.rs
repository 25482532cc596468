//! Runs imds-agent on an environment's node.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    Status, TestEnv,
    executable::agent_executable,
    netns::unique,
    poll::{poll_until, try_poll},
    program_policy::ProgramPolicy,
    scale::scaled_timeout,
};

/// Time limit of any command of the agent.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for an agent to become ready, or to end.
const READY_TIMEOUT: Duration = Duration::from_secs(15);

/// Every hook of the agent, by its configuration key.
const HOOKS: [&str; 5] = ["from_pod", "node_egress", "socket", "host_network", "local_service"];

/// Arguments of the command that prints the status as JSON.
const STATUS: &[&str] = &["status", "-o", "json"];

/// Mode in which the agent attaches its TC programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachMode {
    /// TCX links (Linux 6.6).
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl AttachMode {
    /// Returns the name of the mode on the command line and in the status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl TestEnv {
    /// Returns `imds-agent run` on this environment's node. Unless the test says otherwise, only `from_pod` is on, and
    /// the cgroup hooks are attached to this environment's cgroup.
    pub fn agent(&self) -> AgentCommand<'_> {
        AgentCommand { run: Some((String::new(), vec!["from_pod"])), ..self.imds_agent(&["run"]) }
    }

    /// Starts an agent and waits until it enforces every pod.
    #[must_use]
    #[track_caller]
    pub fn start_agent(&self, backend: AttachMode) -> Agent<'_> {
        self.agent().backend(backend).spawn_ready()
    }

    /// Returns the output of `imds-agent status`, which must succeed.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> Status {
        self.try_status().unwrap_or_else(|failure| panic!("status does not match its schema: {failure}"))
    }

    /// Returns the output of `imds-agent status`. The command fails while foreign pins are waiting to be replaced.
    #[track_caller]
    pub fn try_status(&self) -> Result<Status, String> {
        try_status(&self.imds_agent(STATUS))
    }

    /// Runs `imds-agent unload`, which must succeed.
    #[track_caller]
    pub fn unload(&self) {
        let output = self.imds_agent(&["unload"]).output();
        assert!(output.status.success(), "unload must succeed: {output:?}");
    }

    /// Returns any command of imds-agent on this environment's node, with the environment's pin directory.
    pub fn imds_agent(&self, args: &[&str]) -> AgentCommand<'_> {
        let (args, pin_dir) = (args.iter().map(ToString::to_string).collect(), self.pin_dir().to_owned());
        AgentCommand {
            test_env: self,
            args,
            env: Vec::new(),
            pin_dir,
            binary: self.agent.clone(),
            run: None,
            sendmsg: None,
            policy: None,
        }
    }
}

fn try_status(command: &AgentCommand<'_>) -> Result<Status, String> {
    let output = command.output();
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {output:?}"))
}

/// Runs a command and returns its output. Panics if it does not end within 30 seconds.
#[track_caller]
pub fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = pid(&child);
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || sender.send(child.wait_with_output()));
    let output = receiver.recv_timeout(COMMAND_TIMEOUT).unwrap_or_else(|_| {
        // The process id is not reused yet: the waiter has not reaped the child.
        let _ = kill(pid, Signal::SIGKILL);
        panic!("{command:?} did not end within {COMMAND_TIMEOUT:?}");
    });
    let _ = waiter.join();
    output.expect("wait for a child")
}

/// Option for the seconds in which the agent leaves the qdisc of a new interface to CNI plugins.
const CLSACT_DELAY: &str = "--clsact-delay";

/// A command of imds-agent that is not started yet.
#[derive(Clone, Debug)]
#[must_use]
pub struct AgentCommand<'w> {
    test_env: &'w TestEnv,
    args: Vec<String>,
    env: Vec<(&'static str, String)>,
    pin_dir: PathBuf,
    binary: Option<PathBuf>,
    /// Configuration and enabled hooks, for `run`.
    run: Option<(String, Vec<&'static str>)>,
    /// Value of `hooks.sendmsg`, for `run`.
    sendmsg: Option<&'static str>,
    policy: Option<ProgramPolicy>,
}

impl<'w> AgentCommand<'w> {
    /// Restricts the agent to one attach mode.
    pub fn backend(self, backend: AttachMode) -> Self {
        self.args(&["--tc-backend", backend.name()])
    }

    /// Sets the interval of the full resync in seconds.
    pub fn resync(self, seconds: u32) -> Self {
        self.args(&["--resync", &seconds.to_string()])
    }

    /// Sets the configuration, which must not contain a `[hooks]` table.
    pub fn config(mut self, toml: &str) -> Self {
        if let Some((config, _)) = &mut self.run {
            toml.clone_into(config);
        }
        self
    }

    /// Reads the configuration from this file.
    pub fn config_file(self, path: &str) -> Self {
        Self { run: None, ..self }.args(&["--config", path])
    }

    /// Sets `hooks.sendmsg` to a TOML value.
    pub fn sendmsg(mut self, value: &'static str) -> Self {
        self.sendmsg = Some(value);
        self
    }

    /// Enables these hooks and disables all others.
    pub fn hooks(mut self, on: &[&'static str]) -> Self {
        if let Some((_, hooks)) = &mut self.run {
            *hooks = on.to_vec();
        }
        self
    }

    /// Adds arguments to the command line.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.to_owned()));
        self
    }

    /// Replaces the environment's pin directory with another one.
    pub fn pin_dir(self, path: &Path) -> Self {
        Self { pin_dir: path.to_owned(), ..self }
    }

    /// Runs the agent under a policy that rejects BPF programs, from [`AgentCommand::spawn`] on.
    pub fn policy(self, policy: &ProgramPolicy) -> Self {
        Self { policy: Some(policy.clone()), ..self }
    }

    /// Runs another binary than the environment's.
    pub fn binary(self, path: &Path) -> Self {
        Self { binary: Some(path.to_owned()), ..self }
    }

    /// Runs `run --once`, which protects the node and ends.
    #[track_caller]
    pub fn once(self) -> Output {
        self.args(&["--once"]).output()
    }

    /// Runs the command until it ends, for commands that must fail.
    #[track_caller]
    pub fn output(&self) -> Output {
        output(self.command())
    }

    /// Returns the process, not started and with nothing redirected.
    #[track_caller]
    pub fn command(&self) -> Command {
        let binary = self.binary.clone().unwrap_or_else(agent_executable);
        let mut command = self.test_env.node.command(binary);
        command.args(&self.args).arg("--pin-dir").arg(&self.pin_dir);
        let subcommand = self.args.first().map(String::as_str);
        if matches!(subcommand, Some("run" | "unload")) {
            command.arg("--state-dir").arg(self.test_env.state_dir());
        }
        if subcommand == Some("run") && !self.args.iter().any(|argument| argument == CLSACT_DELAY) {
            // Pods of tests have no CNI plugin that could need their qdisc slot.
            command.args([CLSACT_DELAY, "0"]);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some((config, on)) = &self.run {
            // The hooks follow the test's text, whose lines therefore keep their numbers.
            let hooks = HOOKS.map(|hook| format!("{hook} = {}\n", on.contains(&hook))).concat();
            let sendmsg = self.sendmsg.map(|value| format!("sendmsg = {value}\n")).unwrap_or_default();
            let path = self.test_env.scratch_dir().join(unique("config-")).with_extension("toml");
            fs::write(&path, format!("{config}\n[hooks]\n{hooks}{sendmsg}")).expect("write a configuration");
            command.arg("--config").arg(path).arg("--cgroup").arg(self.test_env.cgroup());
        }
        command
    }

    /// Starts the agent in the background and collects its log.
    #[must_use]
    #[track_caller]
    pub fn spawn(self) -> Agent<'w> {
        let mut command = self.command();
        command.env("RUST_LOG", "info").stdin(Stdio::null()).stderr(Stdio::piped());
        if self.policy.is_some() {
            ProgramPolicy::apply(&mut command);
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        if let Some(policy) = &self.policy {
            policy.supervise(child.id());
        }
        let stderr = child.stderr.take().expect("a pipe");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        // The thread ends with the process.
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().expect("no reader panicked").push((Instant::now(), line));
            }
        });
        // The status is read with the same binary, which knows the agent's map layout.
        let status = AgentCommand { binary: self.binary, ..self.test_env.imds_agent(STATUS) };
        Agent { status, child, log }
    }

    /// Starts the agent and waits until it enforces every existing pod.
    #[must_use]
    #[track_caller]
    pub fn spawn_ready(self) -> Agent<'w> {
        let mut agent = self.spawn();
        agent.wait_ready();
        agent
    }

    /// Starts the agent and waits until it has synced all interfaces and reports a problem with this text.
    #[must_use]
    #[track_caller]
    pub fn spawn_degraded(self, problem: &str) -> Agent<'w> {
        let mut agent = self.spawn();
        let has = |status: &Status| status.problems.iter().any(|other| other.problem.contains(problem));
        agent.wait_status(|status| status.agent.ready && status.state == "degraded" && has(status));
        agent
    }
}

/// A running agent. Dropping it kills the process, which does not end enforcement.
#[derive(Debug)]
pub struct Agent<'w> {
    status: AgentCommand<'w>,
    child: Child,
    log: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Agent<'_> {
    /// Returns the process id of the agent.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGHUP to the agent, which reloads its configuration.
    #[track_caller]
    pub fn hang_up(&self) {
        let pid = Pid::from_raw(self.pid().try_into().expect("a process id"));
        kill(pid, Signal::SIGHUP).expect("signal the agent");
    }

    /// Waits until the status reports that this agent has synced all interfaces, has no problems and enforces every
    /// pod.
    #[track_caller]
    pub fn wait_ready(&mut self) -> Status {
        self.wait_status(Status::is_ready)
    }

    #[track_caller]
    fn wait_status(&mut self, is_reached: impl Fn(&Status) -> bool) -> Status {
        let (pid, mut last) = (self.pid(), None);
        let ready = try_poll(scaled_timeout(READY_TIMEOUT), || {
            let ended = self.child.try_wait().expect("wait for the agent");
            assert!(ended.is_none(), "the agent ended ({ended:?}):\n{}", self.log());
            let status = try_status(&self.status);
            last = Some(status.clone());
            status.ok().filter(|status| is_reached(status) && status.agent.pid == Some(pid))
        });
        ready.unwrap_or_else(|| panic!("the agent is not ready: {last:#?}\n{}", self.log()))
    }

    /// Returns the standard error of the agent so far.
    #[must_use]
    pub fn log(&self) -> String {
        let lines: Vec<_> = self.log_lines().into_iter().map(|(_, line)| line).collect();
        lines.join("\n")
    }

    /// Returns the lines of standard error so far, each with the time at which it was read.
    #[must_use]
    pub fn log_lines(&self) -> Vec<(Instant, String)> {
        self.log.lock().expect("the reader has not panicked").clone()
    }

    /// Waits for a line of the log that contains `pattern`, and returns it. The limit is longer on emulated machines.
    #[track_caller]
    pub fn wait_for_log(&self, pattern: &str, deadline: Duration) -> String {
        let deadline = scaled_timeout(deadline);
        let found = try_poll(deadline, || {
            self.log_lines().into_iter().map(|(_, line)| line).find(|line| line.contains(pattern))
        });
        found.unwrap_or_else(|| panic!("no {pattern:?} in the log within {deadline:?}:\n{}", self.log()))
    }

    /// Waits until the agent ends by itself.
    #[track_caller]
    pub fn wait_end(mut self) -> ExitStatus {
        poll_until(READY_TIMEOUT, "the agent to end", || self.child.try_wait().expect("wait for the agent"))
    }

    /// Kills the agent with SIGKILL.
    pub fn kill9(mut self) {
        self.child.kill().expect("kill the agent");
        self.child.wait().expect("wait for the agent");
    }

    /// Sends SIGTERM to the agent and waits until it ends.
    #[track_caller]
    pub fn terminate(mut self) -> ExitStatus {
        kill(pid(&self.child), Signal::SIGTERM).expect("signal the agent");
        poll_until(READY_TIMEOUT, "the agent to end after SIGTERM", || {
            self.child.try_wait().expect("wait for the agent")
        })
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        // Both calls fail if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("log of agent {}:\n{}", self.pid(), self.log());
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().expect("process ids are positive C ints"))
}

//! The agent's log on standard error, and external names in every output.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, ErrorKind, Write as _, pipe},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    thread,
};

use imds_tests::{
    METADATA, PacketSocket, Pod, PodLink, TestEnv,
    api_server::write_kubeconfig,
    http::{DEFAULT, try_get},
    packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_netns_cookie,
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, kill},
        stat::fstat,
    },
    unistd::Pid,
};
use serde_json::Value;

/// A process that is killed on drop.
struct Running(Child);

impl Running {
    fn start(mut command: Command, stderr: OwnedFd) -> Self {
        Self(command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Creates a pipe and fills it.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe().unwrap();
    let mut writer = File::from(OwnedFd::from(writer));
    fcntl(writer.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let error = loop {
        if let Err(error) = writer.write_all(&[b'\n'; 512]) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    // The agent shares the file status flags of the pipe.
    fcntl(writer.as_fd(), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader.into(), writer.into())
}

fn dropped(env: &TestEnv) -> u64 {
    env.metric("imds_agent_log_lines_dropped_total")
}

#[test]
fn pipe_without_reader_blocks_nothing() {
    let env = TestEnv::new();
    let config = env.scratch_dir().join("imds.toml");
    fs::write(&config, "").unwrap();
    let run = || env.imds_agent(&["run"]).config_file(config.to_str().unwrap()).command();
    let is_ready = || {
        let status = env.try_status().ok().filter(|status| status.is_ready() && status.agent.running)?;
        Some(status)
    };

    let (reader, writer) = full_pipe();
    let mut agent = Running::start(run(), writer);
    poll_until(LONG, "the agent to be ready", is_ready);
    assert_eq!(dropped(&env), 0);
    // Each rejected configuration is quoted in the log.
    fs::write(&config, format!("mode = '{}'", "x".repeat(12_000))).unwrap();
    poll_until(LONG, "dropped lines", || {
        agent.signal(Signal::SIGHUP);
        (dropped(&env) > 0).then_some(())
    });
    let pod = env.add_pod(PodLink::Routed);
    env.wait_enforced(&pod);
    env.assert_blocked(&pod);
    agent.signal(Signal::SIGTERM);
    let status = poll_until(LONG, "the agent to end", || agent.0.try_wait().unwrap());
    assert!(status.success(), "{status}");
    drop(reader);

    fs::write(&config, "").unwrap();
    let (reader, writer) = full_pipe();
    let agent = Running::start(run(), writer);
    poll_until(LONG, "the agent to be ready again", is_ready);
    fs::write(&config, format!("mode = '{}'", "x".repeat(12_000))).unwrap();
    poll_until(LONG, "dropped lines", || {
        agent.signal(Signal::SIGHUP);
        (dropped(&env) > 0).then_some(())
    });
    // Standard error is read again.
    let mut lines = BufReader::new(File::from(reader)).lines().map_while(Result::ok);
    let report = lines.find(|line| line.contains(" log lines: standard error was not read"));
    let report = report.expect("a report of dropped lines");
    let count = report.split("dropped ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    let count = count.filter(|&count| count > 0).unwrap_or_else(|| panic!("no number of lines in {report}"));
    // The agent publishes the number after the reload that dropped the last line.
    poll_until(LONG, "the reported lines in the metrics", || (count <= dropped(&env)).then_some(()));
    drop((agent, lines));
    env.unload();
    env.assert_open(&pod);
}

/// Runs the agent once and returns the lines of its log.
fn log_of(env: &TestEnv, args: &[&str], variables: &[(&'static str, &str)]) -> Vec<String> {
    let mut command = env.agent().args(&["--once"]).args(args);
    for (name, value) in variables {
        command = command.env(name, value);
    }
    let output = command.output();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn journal_has_priorities_without_timestamp() {
    let env = TestEnv::new();
    let (reader, writer) = pipe().unwrap();
    let stat = fstat(writer.as_fd()).unwrap();
    let stream = format!("{}:{}", stat.st_dev, stat.st_ino);
    let command = env.agent().args(&["--once"]).env("JOURNAL_STREAM", &stream);
    let mut agent = Running::start(command.command(), writer.into());
    assert!(agent.0.wait().unwrap().success());
    let lines: Vec<_> = BufReader::new(reader).lines().map(Result::unwrap).collect();
    assert!(lines.iter().any(|line| line.starts_with("<6>mode enforce")), "{lines:#?}");
    assert!(lines.iter().all(|line| line.starts_with('<')), "{lines:#?}");

    // The stream differs from standard error.
    let lines = log_of(&env, &[], &[("JOURNAL_STREAM", &stream)]);
    assert!(lines.iter().any(|line| line.contains("Z INFO  mode enforce")), "{lines:#?}");
    env.unload();
}

#[test]
fn json_has_one_object_a_line() {
    let env = TestEnv::new();
    let lines = log_of(&env, &["--log-format", "json"], &[]);
    let objects: Vec<HashMap<String, String>> =
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    let line = objects.iter().find(|line| line["message"].starts_with("mode enforce")).expect("the summary");
    assert_eq!((&*line["level"], &*line["target"]), ("info", "imds_agent::controller"), "{line:?}");
    assert!(line["timestamp"].ends_with('Z') && line["timestamp"].contains('T'), "{line:?}");
    assert_eq!(line.len(), 4, "{line:?}");
    env.unload();
}

#[test]
fn level_option_takes_precedence() {
    let env = TestEnv::new();
    let debug = |lines: &[String]| lines.iter().any(|line| line.contains(" DEBUG "));
    assert!(log_of(&env, &["--log-level", "error"], &[("RUST_LOG", "debug")]).is_empty());
    assert!(debug(&log_of(&env, &["--log-level", "debug"], &[("RUST_LOG", "error")])));
    assert!(debug(&log_of(&env, &[], &[("RUST_LOG", "imds_agent=debug")])));
    assert!(!debug(&log_of(&env, &[], &[])));
    env.unload();
}

#[test]
fn initial_sync_is_one_line() {
    let env = TestEnv::new();
    let pods: Vec<_> = (0..8).map(|_| env.add_pod(PodLink::Routed)).collect();
    let names_pods = |lines: &[String]| {
        lines.iter().filter(|line| pods.iter().any(|pod| line.contains(&pod.host_ifname))).count()
    };
    let lines = log_of(&env, &[], &[]);
    assert_eq!(names_pods(&lines), 0, "{lines:#?}");
    assert!(
        lines.iter().any(|line| line.contains("initial sync: ") && line.contains(" attached")),
        "{lines:#?}"
    );
    env.unload();
    let lines = log_of(&env, &["--log-level", "debug"], &[]);
    assert!(names_pods(&lines) >= pods.len(), "{lines:#?}");
    env.unload();
}

#[test]
fn api_errors_name_url_and_causes_once() {
    let env = TestEnv::new();
    let kubeconfig = env.scratch_dir().join("kubeconfig");
    write_kubeconfig(&kubeconfig, "http://127.0.0.1:1");
    let config = format!("[kubernetes]\nkubeconfig = '{}'\nnode_name = 'node-0'\n", kubeconfig.display());
    let agent = env.agent().config(&config).spawn();
    let line = agent.wait_for_log("http://127.0.0.1:1/api/v1/pods: ", LONG);
    assert_eq!(line.matches("client error (Connect)").count(), 1, "{line}");
    assert_eq!(line.to_lowercase().matches("connection refused").count(), 1, "{line}");
    drop(agent);
    env.unload();
}

#[test]
fn external_names_are_escaped_everywhere() {
    const INTERFACE: &str = "e\x1b[31mv\u{202e}l";
    const THREAD: &str = "a\x1b[2J\nforged";
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.node.ip(&format!("link add {INTERFACE} type bridge"));
    env.node.ip(&format!("link set {INTERFACE} up"));
    let agent = env.agent().hooks(&["node_egress", "socket"]).args(&["--log-level", "debug"]).spawn_ready();
    env.in_cgroup(|| {
        let name = std::ffi::CString::new(THREAD).unwrap();
        nix::sys::prctl::set_name(&name).unwrap();
        assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    });

    let safe = |what: &str, text: &str| {
        let is_safe = |c: char| c == '\n' || !(c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c));
        assert!(text.chars().all(is_safe), "{what}: {text:?}");
        assert!(!text.lines().any(|line| line.starts_with("forged")), "{what}: {text:?}");
    };
    let shown = |args: &[&str]| {
        let output = env.imds_agent(args).output();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        safe(&format!("{args:?}"), &text);
        text
    };
    let interface = r"e\u{1b}[31mv\u{202e}l";
    let thread = r"a\u{1b}[2J\nforged";
    let json = |args: &[&str]| shown(args).lines().map(|line| line.trim().to_owned()).collect::<String>();
    assert!(shown(&["status"]).contains(interface));
    let status: Value = serde_json::from_str(&json(&["status", "-o", "json"])).unwrap();
    let interfaces = status["interfaces"].as_array().unwrap();
    assert!(interfaces.iter().any(|one| one["name"] == interface), "{interfaces:?}");

    let events = poll_until(LONG, "the event", || {
        let text = shown(&["events", "--no-follow", "--since", "1h"]);
        text.contains(thread).then_some(text)
    });
    assert!(events.lines().all(|line| line.contains(" -> ")), "{events}");
    let lines = shown(&["events", "--no-follow", "--since", "1h", "-o", "json"]);
    let comm = |line: &str| serde_json::from_str::<Value>(line).unwrap()["comm"].clone();
    assert!(lines.lines().any(|line| comm(line) == thread), "{lines}");
    assert!(shown(&["report"]).contains(thread));
    let report: Value = serde_json::from_str(&json(&["report", "-o", "json"])).unwrap();
    let denials = report["denials"].as_array().unwrap();
    assert!(denials.iter().any(|denial| denial["comm"] == thread), "{denials:?}");
    shown(&["doctor"]);
    shown(&["doctor", "-o", "json"]);

    safe("metrics", &try_get(&env, DEFAULT, "/metrics").unwrap().1);
    safe("readyz", &try_get(&env, DEFAULT, "/readyz").unwrap().1);
    env.node.ip(&format!("link delete {INTERFACE}"));
    agent.wait_for_log(&format!("{interface} (ifindex "), LONG);
    safe("log", &agent.log());
    drop(agent);
    env.unload();
}

/// Asserts that a command ends with success and without output when its reader has closed the pipe.
#[track_caller]
fn assert_ends_quietly(env: &TestEnv, args: &[&str]) {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut command = env.imds_agent(args).command();
    let mut child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let stderr = child.stderr.take().unwrap();
    let said = thread::spawn(move || std::io::read_to_string(stderr).unwrap());
    let mut child = Running(child);
    // Afterwards only the child has the write end of the pipe.
    drop(command);
    let status = poll_until(LONG, "the command to end", || child.0.try_wait().unwrap());
    let said = said.join().unwrap();
    assert!(status.success() && said.is_empty(), "{args:?}: {status}: {said}");
}

#[test]
fn commands_exit_quietly_on_closed_pipe() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    assert_ends_quietly(&env, &["events"]);
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    for args in [
        &["events"][..],
        &["events", "--since", "1h", "-o", "json"],
        &["report"],
        &["report", "--rules"],
        &["report", "-o", "json"],
        &["status"],
        &["config", "show"],
    ] {
        assert_ends_quietly(&env, args);
    }
    drop(agent);
    // Without the agent, the command reads the ring buffer itself.
    assert_ends_quietly(&env, &["events"]);
    env.unload();
}

#[test]
fn recorded_events_without_following() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    let events = |args: &[&str]| {
        let output = env.imds_agent(&[&["events", "--no-follow"], args].concat()).output();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().count()
    };
    assert_eq!(events(&[]), 0);
    // A frame needs no neighbour entry, so that it certainly causes an event.
    let frame = packets::frame(&pod, &packets::syn(pod.address, METADATA, 40_000, 1));
    PacketSocket::frames(&pod.netns, Pod::IFNAME).send(&frame).unwrap();
    poll_until(LONG, "the events", || (events(&["--since", "1h"]) > 0).then_some(()));
    assert_eq!(events(&["--since", "0s"]), 0);
    // Events printed with --since are not marked as printed.
    assert!(events(&[]) > 0);
    assert_eq!(events(&[]), 0);
    assert!(events(&["--since", "1h"]) > 0);
    for wrong in ["soon", "-1m", ""] {
        let output = env.imds_agent(&["events", &format!("--since={wrong}")]).output();
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output:?}");
    }
    drop(agent);
    env.unload();
}

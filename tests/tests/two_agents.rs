//! Two agents on one node with different pin directories.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use imds_tests::{
    Agent, AgentCommand, AttachMode, PodLink, Status, TestEnv, hook, probe::LONG, with_each_backend,
};

/// A second pin directory, which is unloaded on drop.
struct Second<'w> {
    env: &'w TestEnv,
    path: PathBuf,
}

impl<'w> Second<'w> {
    fn new(env: &'w TestEnv) -> Self {
        let mut path = env.pin_dir().as_os_str().to_owned();
        path.push("-second");
        Self { env, path: path.into() }
    }

    /// Starts an agent that uses this directory. Such an agent reports the first one, so that it never gets ready.
    fn spawn(&self, backend: AttachMode) -> Agent<'w> {
        self.env.agent().backend(backend).resync(1).pin_dir(&self.path).spawn()
    }

    fn command(&self, args: &[&str]) -> AgentCommand<'w> {
        self.env.imds_agent(args).pin_dir(&self.path)
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        let _unloaded = self.command(&["unload"]).command().output();
    }
}

fn names(status: &Status, pid: u32, path: &str) -> bool {
    let text = format!("another imds-agent (pid {pid}) runs on this node with pins in {path}");
    status.problems.iter().any(|problem| problem.problem == text)
}

#[test]
fn both_agents_are_reported_and_coexist() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let directory = Second::new(&env);
        let first = env.agent().backend(backend).resync(1).spawn_ready();
        let second = directory.spawn(backend);
        second.wait_for_log(&format!("another imds-agent (pid {}) runs on this node", first.pid()), LONG);
        first.wait_for_log(&format!("another imds-agent (pid {}) runs on this node", second.pid()), LONG * 3);

        let status = env.status();
        assert_eq!(status.state, "degraded");
        assert!(names(&status, second.pid(), directory.path.to_str().unwrap()), "{:?}", status.problems);
        let output = directory.command(&["status", "-o", "json"]).output();
        assert_eq!(output.status.code(), Some(3));
        let status = String::from_utf8_lossy(&output.stdout);
        assert!(status.contains(&format!("another imds-agent (pid {})", first.pid())), "{status}");

        // A reload reconciles each interface without the backoff of repairs.
        for round in 2..6 {
            for agent in [&first, &second] {
                agent.hang_up();
                agent.wait_for_log(&format!("loaded configuration {round}:"), LONG);
            }
        }
        let late = env.add_pod(PodLink::Routed);
        env.wait_enforced(&late);
        for pod in [&pod, &late] {
            assert!(!hook::programs(&env.node, &pod.host_ifname).is_empty());
            env.assert_blocked(pod);
        }
        for agent in [&first, &second] {
            let log = agent.log();
            assert_eq!(log.matches("another imds-agent (pid").count(), 1, "{log}");
            let fights = ["moved from_pod", "replaced another program", "again with"];
            let fights: usize = fights.map(|fight| log.matches(fight).count()).iter().sum();
            assert!(fights <= 3, "{log}");
        }

        // Ending one agent does not end enforcement of the other. Both agents share one position for clsact filters,
        // which the unload clears and the other agent fills again.
        second.kill9();
        drop(directory);
        env.wait_enforced(&pod);
        env.assert_blocked(&pod);
        env.status_when("only one agent runs", Status::is_ready);
    });
}

#[test]
fn unload_of_stopped_agents() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let directory = Second::new(&env);
        let first = env.agent().backend(backend).resync(1).spawn_ready();
        let start_second = || {
            let agent = directory.spawn(backend);
            agent.wait_for_log("mode enforce:", LONG);
            agent
        };
        let second = start_second();
        let unload = || {
            let output = env.imds_agent(&["unload", "--stopped"]).output();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let is_running =
            |path: &Path, pid| format!("left {}: its agent (pid {pid}) is running\n", path.display());
        let [one, two] = [env.pin_dir(), &directory.path];
        assert_eq!(unload(), is_running(one, first.pid()) + &is_running(two, second.pid()));
        env.assert_blocked(&pod);

        second.kill9();
        let text = unload();
        assert!(text.starts_with(&is_running(one, first.pid())), "{text}");
        assert!(text.contains(&format!("removed {} (", two.display())) && !two.exists(), "{text}");
        env.wait_enforced(&pod);
        env.assert_blocked(&pod);

        // A directory that is not named is found.
        let third = start_second();
        first.kill9();
        third.kill9();
        env.assert_blocked(&pod);
        let text = unload();
        assert!(one.parent().is_some_and(Path::exists) && !one.exists() && !two.exists(), "{text}");
        env.assert_open(&pod);
        assert_eq!(unload(), format!("nothing is loaded at {}\n", one.display()));
    });
}

#[test]
fn full_disk_does_not_end_an_unload() {
    let env = TestEnv::new();
    let directory = Second::new(&env);
    let pin_dirs = [env.pin_dir(), &directory.path];
    for pin_dir in pin_dirs {
        let agent = env.agent().pin_dir(pin_dir).spawn();
        agent.wait_for_log("mode enforce:", LONG);
        agent.kill9();
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut unload = env.imds_agent(&["unload", "--stopped"]).command();
    let status = unload.stdout(full.try_clone().unwrap()).stderr(full).status().unwrap();
    assert!(status.success() && !pin_dirs.into_iter().any(Path::exists), "{status}");
}

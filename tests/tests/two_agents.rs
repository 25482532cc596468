//! Two agents on one node with different pin directories.

use std::path::PathBuf;

use imds_tests::{AgentCommand, PodLink, Status, TestEnv, hook, probe::LONG, with_each_backend};

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
        let second = env.agent().backend(backend).resync(1).pin_dir(&directory.path).spawn();
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

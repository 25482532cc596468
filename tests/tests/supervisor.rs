//! Notifications to a service manager: `sd_notify(3)` to a socket of the test.

use std::{fs, os::unix::net::UnixDatagram, time::Duration};

use imds_tests::{PodLink, TestEnv, poll::poll_until, probe::LONG};

/// Settings that work on every tested kernel.
const REST: &str = "[hooks]\nsocket = false\n[metrics]\nlisten = []";

/// Notification socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    /// Waits for a line with this prefix, and returns the rest of the line.
    #[track_caller]
    fn wait_for(&self, start: &str) -> String {
        let mut message = [0; 4096];
        poll_until(LONG * 3, &format!("the notification {start}"), || {
            while let Ok(length) = self.0.recv(&mut message) {
                let text = std::str::from_utf8(&message[..length]).unwrap();
                if let Some(rest) = text.lines().find_map(|line| line.strip_prefix(start)) {
                    return Some(rest.to_owned());
                }
                // Printed if the test fails.
                eprintln!("another notification: {text}");
            }
            None
        })
    }
}

#[test]
fn readiness_and_watchdog_are_notified() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let (socket, config) = (env.scratch_dir().join("notify"), env.scratch_dir().join("imds.toml"));
    fs::write(&config, format!("mode = 'audit'\n{REST}")).unwrap();
    let manager = Manager(UnixDatagram::bind(&socket).unwrap());
    manager.0.set_nonblocking(true).unwrap();
    env.assert_open(&pod);

    let agent = env
        .agent()
        .config_file(config.to_str().unwrap())
        .env("NOTIFY_SOCKET", socket.to_str().unwrap())
        .env("WATCHDOG_USEC", &Duration::from_millis(200).as_micros().to_string())
        .spawn();
    manager.wait_for("READY=1");
    let status = manager.wait_for("STATUS=");
    assert!(status.starts_with("mode audit: 1 pod and "), "{status}");
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }

    // When the agent reports that it is ready again, the new configuration is effective.
    fs::write(&config, format!("mode = 'enforce'\n{REST}")).unwrap();
    agent.hang_up();
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
    env.assert_blocked(&pod);
    let status = manager.wait_for("STATUS=");
    assert!(status.starts_with("mode enforce: 1 pod and "), "{status}");
    // The agent is ready after a rejected configuration as well, with the earlier one effective.
    fs::write(&config, "mode = 'nonsense'").unwrap();
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
    env.assert_blocked(&pod);

    assert!(agent.terminate().success());
    manager.wait_for("STOPPING=1");
    env.assert_blocked(&pod);
    env.unload();
    env.assert_open(&pod);
}

//! `imds-agent top` in a pseudo terminal, as a user sees it.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    num::NonZero,
    process::{Child, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use imds_tests::{METADATA, PacketSocket, Pod, PodLink, TestEnv, packets, poll::poll_until, probe::LONG};
use nix::{
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LINES: NonZero<u16> = NonZero::new(24).unwrap();
const COLUMNS: NonZero<u16> = NonZero::new(100).unwrap();

/// `imds-agent top` and its terminal.
struct Terminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    fn start(env: &TestEnv, args: &[&str]) -> Self {
        let size = Winsize { ws_row: LINES.get(), ws_col: COLUMNS.get(), ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = env.imds_agent(&[&["top"], args].concat()).command();
        command.env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().unwrap();
        // Closes the copies of the terminal's descriptors in this process; otherwise its closing could not be detected.
        drop(command);
        drop(pty.slave);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(LINES, COLUMNS, 0)));
        let to_screen = Arc::clone(&screen);
        let mut output = File::from(pty.master.try_clone().unwrap());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                to_screen.lock().unwrap().process(&bytes[..count]);
            }
        });
        Self { child, keyboard: File::from(pty.master), screen }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, is_shown: impl Fn(&str) -> bool) -> String {
        poll_until(LONG, &format!("{what} on the screen"), || Some(self.text()).filter(|text| is_shown(text)))
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for the end of the command, and for the terminal to be restored.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        let status = poll_until(LONG, "the end", || self.child.try_wait().unwrap());
        poll_until(LONG, "the screen to be restored", || {
            let parser = self.screen.lock().unwrap();
            (!parser.screen().alternate_screen() && !parser.screen().hide_cursor()).then_some(())
        });
        status
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(pod: &Pod, count: usize) {
    let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
    let frame = packets::frame(pod, &packets::syn(pod.address, METADATA, 40_000, 1));
    for _ in 0..count {
        socket.send(&frame).unwrap();
    }
}

/// Returns the total number of denials at the pod's interface from the table.
fn denied(text: &str, pod: &Pod) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(&pod.host_ifname))?;
    line.split_whitespace().nth(6)?.parse().ok()
}

#[test]
fn denials_of_a_pod_grow() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    let mut terminal = Terminal::start(&env, &["--interval", "0.1"]);
    terminal.wait_for("the pod", |text| denied(text, &pod) == Some(0) && text.contains("mode enforce"));
    send(&pod, 3);
    terminal.wait_for("denials", |text| denied(text, &pod) == Some(3));
    let text = terminal.wait_for("the event", |text| text.contains("169.254.169.254:80 tcp"));
    assert!(text.contains(&format!("agent running, pid {}", agent.pid())), "{text}");

    terminal.press("?");
    terminal.wait_for("the keys", |text| text.contains("Ctrl-C  quit"));
    terminal.press("?");
    terminal.press("s");
    terminal.wait_for("another order", |text| {
        text.contains("sorted by denied ") && !text.contains("Ctrl-C  quit")
    });
    terminal.press("p");
    terminal.wait_for("the pause", |text| text.contains("paused"));
    send(&pod, 2);
    env.status_when("the packets are counted", |status| status.total.denied.packets == 5);
    assert_eq!(denied(&terminal.text(), &pod), Some(3));
    terminal.press("p");
    terminal.wait_for("the packets sent while stopped", |text| denied(text, &pod) == Some(5));

    // The display continues without an agent and shows the problem.
    agent.kill9();
    terminal.wait_for("the agent's end", |text| text.contains("agent not running"));
    terminal.press("q");
    assert!(terminal.end().success());
    env.unload();
}

#[test]
fn terminal_is_restored_on_every_exit() {
    let env = TestEnv::new();
    let _agent = env.agent().spawn_ready();
    for keys in ["\x1b", "\x03"] {
        let mut terminal = Terminal::start(&env, &[]);
        terminal.wait_for("the mode", |text| text.contains("mode enforce"));
        terminal.press(keys);
        assert!(terminal.end().success(), "{keys:?}");
    }
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let terminal = Terminal::start(&env, &[]);
        terminal.wait_for("the mode", |text| text.contains("mode enforce"));
        kill(Pid::from_raw(terminal.child.id().try_into().unwrap()), signal).unwrap();
        assert!(terminal.end().success(), "{signal}");
    }
}

#[test]
fn missing_terminal_names_the_alternative() {
    let env = TestEnv::new();
    let output = env.imds_agent(&["top"]).output();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("imds-agent status") && stderr.contains("imds-agent events"), "{stderr}");
    let output = env.imds_agent(&["top", "--interval", "0"]).output();
    assert_eq!(output.status.code(), Some(2));
}

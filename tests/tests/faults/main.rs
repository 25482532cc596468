//! Faults while pods send continuously. No packet may arrive. The tests take minutes and are therefore ignored: `cargo
//! xtask faults` runs them. Faster tests of faults are in `restore.rs`, `pins.rs`, `restart.rs` and `kube_watch.rs`.

mod clock;
mod kills;
mod link_faults;
mod maps;
mod pin_faults;
mod resource_limits;
mod versions;

use std::{
    fs::File,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    path::Path,
    process::{Child, Command, Stdio},
};

use imds_tests::{
    AgentCommand, AttachMode, METADATA, Pod, PodLink, TestEnv, flood::Flood, lacks_netns_cookie, skip,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
const TC_HOOKS: &[&str] = &["from_pod", "node_egress"];
const ALL: &[&str] = &["from_pod", "node_egress", "socket"];

/// An environment whose pods had access, and were then denied by an agent that has been killed.
struct Case {
    pods: [Pod; 2],
    env: TestEnv,
    backend: AttachMode,
    hooks: &'static [&'static str],
}

impl Case {
    /// Creates a case in which both TC hooks deny the pods.
    fn new(backend: AttachMode) -> Self {
        Self::with(backend, TC_HOOKS)
    }

    /// Creates a case in which the socket hook denies the pods too, if it works on this kernel.
    fn with_sockets(backend: AttachMode) -> Self {
        if lacks_netns_cookie() {
            skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
            return Self::new(backend);
        }
        Self::with(backend, ALL)
    }

    fn with(backend: AttachMode, hooks: &'static [&'static str]) -> Self {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        for pod in &pods {
            env.assert_open(pod);
        }
        env.agent().backend(backend).hooks(hooks).spawn_ready().kill9();
        Self { pods, env, backend, hooks }
    }

    fn has_sockets(&self) -> bool {
        self.hooks.contains(&"socket")
    }

    /// Returns a command that starts an agent like the earlier one.
    fn agent(&self) -> AgentCommand<'_> {
        self.env.agent().backend(self.backend).hooks(self.hooks)
    }

    /// Runs `work` while the pods send, and asserts that no packet arrives.
    #[track_caller]
    fn under_flood<T>(&self, work: impl FnOnce() -> T) -> T {
        let Self { pods, env, .. } = self;
        let (result, sent) = env.assert_nothing_arrives(|| {
            // The socket hook denies these calls if it is on, otherwise the TC hooks deny the packets.
            let calls = self.has_sockets().then(|| env.in_cgroup(|| Flood::udp(&pods[0], METADATA)));
            let floods = [Flood::udp(&pods[0], METADATA), Flood::syn(&pods[1], METADATA)];
            let result = work();
            drop(calls);
            (result, floods.into_iter().map(Flood::stop).sum::<u64>())
        });
        assert!(sent > 1000, "{sent} packets are no flood");
        println!("{sent} packets sent, 0 arrived");
        result
    }

    /// Asserts that an agent enforces everything after the fault, and that `unload` ends enforcement.
    #[track_caller]
    fn assert_well(self) {
        let agent = self.agent().spawn_ready();
        for pod in &self.pods {
            self.env.assert_blocked(pod);
        }
        drop(agent);
        self.env.unload();
        for pod in &self.pods {
            self.env.assert_open(pod);
        }
    }

    /// Returns the sum of the agent's metrics whose series begins with `name`.
    #[track_caller]
    fn metric(&self, name: &str) -> u64 {
        let metrics = self.env.metrics();
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// Pseudo-random numbers (splitmix64). `IMDS_SEED` sets the seed to repeat a run.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let fresh = || RandomState::new().build_hasher().finish();
        let seed =
            std::env::var("IMDS_SEED").map_or_else(|_| fresh(), |seed| seed.parse().expect("a number"));
        println!("IMDS_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn is_true(&mut self) -> bool {
        self.below(2) == 1
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// A process that is killed on drop.
struct Process(Child);

impl Process {
    fn start(mut command: Command, log: &Path) -> Self {
        let log = File::options().write(true).create(true).truncate(false).open(log).unwrap();
        Self(command.stdin(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Runs `command` through `wrapper`, which must execute it, in the same network namespace.
fn wrapped(case: &Case, wrapper: &[&str], command: &AgentCommand<'_>) -> Command {
    let inner = command.command();
    let mut command = case.env.node.command(wrapper[0]);
    command.args(&wrapper[1..]).arg(inner.get_program()).args(inner.get_args());
    command
}

//! The command `cargo xtask demo`.

use std::{io::ErrorKind, net::Ipv4Addr, thread};

use anyhow::{Context as _, Result, bail};
use imds_tests::{
    METADATA, Netns, Pod, PodLink, SERVICE, TestEnv,
    probe::{Outcome, SHORT, http_get},
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::{
    build,
    setup::{self, Purpose},
    workspace::{ensure_root, print_status},
};

pub(crate) fn run() -> Result<()> {
    ensure_root("the demo creates network namespaces: run it as root")?;
    setup::ensure(Purpose::Demo)?;
    let agent = build::debug()?;
    let interrupt = Interrupt::new()?;

    print_status("creating a node with two pods, and a metadata service beyond its uplink");
    let env = TestEnv::new().with_agent(agent);
    let pods = [env.add_pod(PodLink::Routed), env.add_pod(PodLink::Bridged)];
    let probes = probes(&env, &pods);
    // Runs in the cgroup to which the agent attaches its socket programs.
    let observe = || env.in_cgroup(|| observe(&probes, &interrupt));
    let before = observe()?;

    print_status("starting imds-agent on the node");
    let running = env.agent().hooks(&["from_pod", "node_egress", "socket"]).spawn_ready();
    let during = observe()?;
    let status = env.imds_agent(&["status"]).output();

    print_status("killing imds-agent with SIGKILL");
    running.kill9();
    let killed = observe()?;

    print_status("unloading");
    let unload = env.imds_agent(&["unload"]).output();
    if !unload.status.success() {
        bail!("unload failed: {}", String::from_utf8_lossy(&unload.stderr));
    }
    let after = observe()?;

    let row = |from: &str, to: &str, cells: [&str; 4]| {
        println!("{from:<30} {to:<16} {:<10} {:<14} {:<14} {:<10}", cells[0], cells[1], cells[2], cells[3]);
    };
    println!();
    row("HTTP FROM", "TO", ["BEFORE", "RUNNING", "KILLED", "UNLOADED"]);
    for (index, probe) in probes.iter().enumerate() {
        let cells = [before[index], during[index], killed[index], after[index]];
        row(probe.from, &probe.to.to_string(), cells);
    }
    println!("\nimds-agent status while the agent ran:\n\n{}", String::from_utf8_lossy(&status.stdout));
    Ok(())
}

/// A sender of HTTP requests.
struct Probe<'a> {
    from: &'static str,
    netns: &'a Netns,
    in_container: bool,
    to: Ipv4Addr,
}

fn probes<'a>(env: &'a TestEnv, [routed, bridged]: &'a [Pod; 2]) -> Vec<Probe<'a>> {
    let probe = |from, netns, in_container, to| Probe { from, netns, in_container, to };
    vec![
        probe("routed pod", &routed.netns, true, METADATA),
        probe("bridged pod", &bridged.netns, true, METADATA),
        probe("pod with hostNetwork", &env.node, true, METADATA),
        probe("process of the node", &env.node, false, METADATA),
        probe("routed pod", &routed.netns, true, SERVICE),
        probe("bridged pod", &bridged.netns, true, SERVICE),
    ]
}

fn observe(probes: &[Probe<'_>], interrupt: &Interrupt) -> Result<Vec<&'static str>> {
    interrupt.check()?;
    probes.iter().map(Probe::observe).collect()
}

impl Probe<'_> {
    fn observe(&self) -> Result<&'static str> {
        let outcome = thread::scope(|scope| {
            let asking = scope.spawn(|| {
                if self.in_container {
                    // A container has these namespaces of its own. The network namespace is the pod's or the node's.
                    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
                }
                Ok::<_, nix::Error>(http_get(self.netns, self.to, SHORT))
            });
            asking.join().expect("probes do not panic")
        });
        Ok(match outcome.context("failed to create the namespaces of a container")? {
            Outcome::Answer(_) => "200 OK",
            Outcome::Timeout => "no answer",
            Outcome::Refused => "refused",
            Outcome::Error(error) if error.kind() == ErrorKind::PermissionDenied => "not permitted",
            Outcome::Error(_) => "error",
        })
    }
}

/// Termination signals, which are handled between two steps, so that the namespaces are removed before the exit.
struct Interrupt {
    signals: SignalFd,
}

impl Interrupt {
    /// Blocks the signals for this thread and for threads that it starts later.
    fn new() -> Result<Self> {
        let blocked: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        blocked.thread_block().context("failed to block signals")?;
        let signals =
            SignalFd::with_flags(&blocked, SfdFlags::SFD_NONBLOCK).context("failed to open a signalfd")?;
        Ok(Self { signals })
    }

    fn check(&self) -> Result<()> {
        if self.signals.read_signal().context("failed to read a signal")?.is_some() {
            bail!("interrupted; removing everything");
        }
        Ok(())
    }
}

//! Agents that run into resource limits.

use std::{
    fs,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
};

use aya::util::KernelVersion;
use imds_tests::{
    AttachMode, MemoryLimit, PodLink, WHOLE_TEST, output,
    poll::{poll_until, try_poll},
    probe::LONG,
    scaled, skip,
};
use nix::sys::resource::{Resource, setrlimit};

use super::{Case, Process, wrapped};

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn out_of_descriptors() {
    let case = Case::new(AttachMode::Clsact);
    let log = case.env.scratch_dir().join("log");
    let more: Vec<_> = (0..scaled(60)).map(|_| case.env.add_pod(PodLink::Routed)).collect();
    case.under_flood(|| {
        for limit in [10, 16, 24, 32, 48, 64] {
            let mut command = case.agent().command();
            // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
            unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)) };
            let mut agent = Process::start(command, &log);
            // The agent must end with an error, or work as far as possible and report the rest.
            poll_until(LONG, "an end or a status", || {
                let is_known = case.env.try_status().is_ok_and(|status| status.agent.ready);
                (agent.has_ended() || is_known).then_some(())
            });
            let text = || fs::read_to_string(&log).unwrap();
            let is_whole = || case.env.try_status().is_ok_and(|status| status.is_ready());
            let found = try_poll(LONG, || (is_whole() || text().contains("os error 24")).then_some(()));
            assert!(found.is_some(), "limit {limit}: {}", text());
            fs::write(&log, "").unwrap();
        }
    });
    drop(more);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn full_disk_under_the_log() {
    let case = Case::new(AttachMode::Clsact);
    let path = case.env.scratch_dir().join("imds.toml");
    fs::write(&path, "[hooks]\nsocket = false").unwrap();
    let command = case.agent().config_file(path.to_str().unwrap()).command();
    let mut agent = Process::start(command, Path::new("/dev/full"));
    case.under_flood(|| {
        case.env.status_when("an agent", |status| status.agent.ready);
        // The agent must log the rejected file.
        fs::write(&path, "nonsense = 1").unwrap();
        case.env.status_when("the rejection", |status| {
            status.configuration.as_ref().is_some_and(|configuration| configuration.rejected.is_some())
        });
        let late = case.env.add_pod(PodLink::Routed);
        case.env.wait_enforced(&late);
    });
    assert!(!agent.has_ended());
    drop(agent);
    case.assert_well();
}

/// Before Linux 5.11 the agent fails with an error, and the earlier enforcement stays. Later kernels do not count
/// locked memory.
#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn out_of_locked_memory() {
    const CAPABILITIES: &str = "-all,+bpf,+net_admin,+perfmon";
    let case = Case::new(AttachMode::Clsact);
    let counts_locked_memory = KernelVersion::current().unwrap() < KernelVersion::new(5, 11, 0);
    case.under_flood(|| {
        for limit in [0, 1 << 12, 1 << 16, 1 << 20] {
            let (bounding, inheritable) =
                (format!("--bounding-set={CAPABILITIES}"), format!("--inh-caps={CAPABILITIES}"));
            let mut command =
                wrapped(&case, &["setpriv", &bounding, &inheritable], &case.agent().args(&["--once"]));
            // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
            unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_MEMLOCK, limit, limit)?)) };
            let done = output(command);
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.success(), !counts_locked_memory, "limit {limit}: {said}");
            assert!(done.status.success() || said.contains("LimitMEMLOCK"), "limit {limit}: {said}");
        }
    });
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn out_of_memory() {
    let Some(memory) = MemoryLimit::new() else {
        return skip(WHOLE_TEST, "no cgroup with a memory controller on this machine");
    };
    let case = Case::new(AttachMode::Clsact);
    let log = case.env.scratch_dir().join("log");
    let enter = format!("echo $$ > {} && exec \"$@\"", memory.procs().display());
    let (mut killed, mut failed, mut stuck, mut ready) = (0, 0, 0, 0);
    case.under_flood(|| {
        for mebibytes in [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64] {
            memory.set(mebibytes << 20);
            let mut agent =
                Process::start(wrapped(&case, &["sh", "-c", &enter, "sh"], &case.agent().resync(1)), &log);
            // An older kernel may try to reclaim memory until the agent is killed from outside.
            let ended = try_poll(LONG * 4, || {
                let ended = agent.0.try_wait().unwrap();
                let is_ready = case.env.try_status().is_ok_and(|status| status.is_ready());
                (ended.is_some() || is_ready).then_some(ended)
            });
            let text = fs::read_to_string(&log).unwrap();
            assert!(!text.contains("panicked"), "{mebibytes} MiB: {text}");
            match ended {
                Some(Some(status)) if status.signal().is_some() => killed += 1,
                Some(Some(_)) => failed += 1,
                Some(None) => ready += 1,
                None => stuck += 1,
            }
            drop(agent);
            fs::write(&log, "").unwrap();
        }
    });
    println!("{killed} agents were killed, {failed} failed, {stuck} hung, {ready} were ready");
    assert!(killed + failed + stuck > 0 && ready > 0);
    case.assert_well();
}

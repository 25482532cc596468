//! Many TCX links: the time that the kernel takes to detach one, which docs/upgrade.md documents, and an interrupted `unload`.
//! `unload` changes a setting of the machine, so that no other test may run beside these.

use std::{
    fmt::Write as _,
    fs,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use imds_agent::datapath::sys::bpf::{MprogHook, link_create_first, link_detach, load_noop_program};
use imds_tests::{AttachMode, Netns, TestEnv, probe::LONG, skip_without_tcx};

const LINKS: u32 = 200;
/// Kernel setting that sends interrupts instead of waiting for an RCU grace period.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// Restores the setting on drop.
struct Expedited(String);

impl Expedited {
    fn unchanged() -> Self {
        Self(fs::read_to_string(EXPEDITED).unwrap())
    }

    fn set() -> Self {
        let before = Self::unchanged();
        fs::write(EXPEDITED, "1").unwrap();
        before
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        fs::write(EXPEDITED, &self.0).unwrap();
    }
}

fn is_expedited() -> bool {
    fs::read_to_string(EXPEDITED).unwrap().trim() == "1"
}

/// Creates veth pairs on the node.
fn add_links(netns: &Netns, count: u32) {
    let mut batch = String::new();
    for number in 0..count {
        writeln!(batch, "link add d{number} type veth peer name p{number}").unwrap();
    }
    netns.ip(&batch);
}

fn attach(netns: &Netns) -> Vec<OwnedFd> {
    let program = load_noop_program().unwrap();
    netns.run(|| {
        let interfaces =
            (0..LINKS).map(|number| nix::net::if_::if_nametoindex(&*format!("d{number}")).unwrap());
        interfaces.map(|index| link_create_first(&program, index, MprogHook::TcxIngress).unwrap()).collect()
    })
}

fn detach(links: &[OwnedFd], threads: usize) -> Duration {
    let start = Instant::now();
    let share = links.len().div_ceil(threads);
    thread::scope(|scope| {
        for links in links.chunks(share) {
            scope.spawn(move || links.iter().for_each(|link| link_detach(link).unwrap()));
        }
    });
    start.elapsed()
}

#[test]
#[ignore = "measures: cargo test -p imds-tests --test tcx_detach -- --ignored --nocapture"]
fn time_per_link() {
    if skip_without_tcx() {
        return;
    }
    let netns = Netns::new("detach");
    add_links(&netns, LINKS);
    for (threads, is_expedited) in [(1, false), (4, false), (1, true), (4, true)] {
        let links = attach(&netns);
        let expedited = is_expedited.then(Expedited::set);
        let time = detach(&links, threads);
        drop(expedited);
        println!("{threads} threads, rcu_expedited {is_expedited}: {:?} a link", time / LINKS);
    }
}

#[test]
#[ignore = "measures: cargo test -p imds-tests --test tcx_detach -- --ignored --nocapture"]
fn time_of_unload() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    add_links(&env.node, LINKS);
    let once = env.agent().backend(AttachMode::Tcx).hooks(&["node_egress"]).once();
    assert!(once.status.success(), "{once:?}");
    let links = fs::read_dir(env.pin_dir().join("links")).unwrap().count();
    let start = Instant::now();
    env.unload();
    let time = start.elapsed();
    println!("{links} links: {time:?}");
    assert!(links >= 100 && time < Duration::from_secs(5) * u32::try_from(links).unwrap() / 1000);
    assert!(!is_expedited());
}

/// Starts `unload` of many links, and kills it while grace periods are expedited. An idle machine detaches all links within
/// milliseconds, so that an attempt can come too late.
#[track_caller]
fn kill_unload(env: &TestEnv) {
    for _ in 0..20 {
        let once = env.agent().backend(AttachMode::Tcx).hooks(&["node_egress"]).once();
        assert!(once.status.success(), "{once:?}");
        let mut unload = env.imds_agent(&["unload"]).command().spawn().unwrap();
        while !is_expedited() && unload.try_wait().unwrap().is_none() {}
        unload.kill().unwrap();
        unload.wait().unwrap();
        if is_expedited() {
            return;
        }
    }
    panic!("no `unload` was killed while grace periods were expedited");
}

#[test]
fn killed_unload_leaves_no_expedited_grace_periods() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    add_links(&env.node, 100);
    let _restore = Expedited::unchanged();
    kill_unload(&env);
    let agent = env.agent().hooks(&["node_egress"]).spawn();
    agent.wait_for_log("restored /sys/kernel/rcu_expedited", LONG);
    assert!(!is_expedited());
    agent.kill9();

    kill_unload(&env);
    env.unload();
    assert!(!is_expedited());
    assert!(!env.pin_dir().exists());
}

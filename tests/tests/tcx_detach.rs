//! Time that the kernel takes to detach a TCX link, which docs/upgrade.md documents.

use std::{
    fmt::Write as _,
    fs,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use imds_agent::datapath::sys::bpf::{MprogHook, link_create_first, link_detach, load_noop_program};
use imds_tests::{AttachMode, Netns, TestEnv, skip_without_tcx};

const LINKS: u32 = 200;
/// Kernel setting that sends interrupts instead of waiting for an RCU grace period.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// Restores the setting on drop.
struct Expedited(String);

impl Expedited {
    fn set() -> Self {
        let before = fs::read_to_string(EXPEDITED).unwrap();
        fs::write(EXPEDITED, "1").unwrap();
        Self(before)
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        fs::write(EXPEDITED, &self.0).unwrap();
    }
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
    let mut batch = String::new();
    for number in 0..LINKS {
        writeln!(batch, "link add d{number} type veth peer name p{number}").unwrap();
    }
    netns.ip(&batch);
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
    let mut batch = String::new();
    for number in 0..LINKS {
        writeln!(batch, "link add d{number} type veth peer name p{number}").unwrap();
    }
    env.node.ip(&batch);
    let once = env.agent().backend(AttachMode::Tcx).hooks(&["node_egress"]).once();
    assert!(once.status.success(), "{once:?}");
    let links = fs::read_dir(env.pin_dir().join("links")).unwrap().count();
    let start = Instant::now();
    env.unload();
    let time = start.elapsed();
    println!("{links} links: {time:?}");
    assert!(links >= 100 && time < Duration::from_secs(5) * u32::try_from(links).unwrap() / 1000);
    assert_eq!(fs::read_to_string(EXPEDITED).unwrap().trim(), "0");
}

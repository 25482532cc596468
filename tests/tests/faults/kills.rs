//! Agents that are killed at random moments.

use std::{
    fs,
    thread::{self, sleep},
    time::Duration,
};

use imds_tests::{
    AttachMode, METADATA, Pod, StopFlag, TestEnv, hook, packets, probe, scaled, skip_without_tcx,
};

use super::{Case, LINKS, Random};

/// Maximum number of pods at a time besides those that stay.
const CROWD: usize = 8;
/// Number of addresses that an environment has for pods.
const MAX_KILLS: u32 = 240;

/// Returns a configuration that denies the same traffic, with random settings and up to 200 additional endpoints.
fn configuration(random: &mut Random) -> String {
    let answer = random.of(&["drop", "reject"]);
    let node_egress = random.is_true();
    let endpoints = (0..random.below(200))
        .map(|number| format!("[[endpoint]]\nname = 'e{number}'\naddress = '203.0.113.{number}'\n"));
    format!(
        "on_deny = '{answer}'\n[hooks]\nsocket = false\nnode_egress = {node_egress}\n{}",
        endpoints.collect::<String>()
    )
}

fn killed_at_any_moment(backend: AttachMode) {
    let case = Case::new(backend);
    let path = case.env.scratch_dir().join("imds.toml");
    let mut random = Random::new();
    let replace = |text: &str| {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &path).unwrap();
    };
    let kills = scaled(150);
    case.under_flood(|| {
        for round in 0..kills {
            replace(&configuration(&mut random));
            let agent = case.agent().config_file(path.to_str().unwrap()).resync(1).spawn();
            // The kill happens between the very start and the end of the initial sync, in every second round during a
            // reload.
            sleep(Duration::from_millis(random.below(200)));
            if round % 2 == 1 {
                replace(&configuration(&mut random));
                sleep(Duration::from_millis(random.below(60)));
            }
            agent.kill9();
        }
    });
    println!("{kills} kills");
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_during_start_and_reload_tcx() {
    if !skip_without_tcx() {
        killed_at_any_moment(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_during_start_and_reload_clsact() {
    killed_at_any_moment(AttachMode::Clsact);
}

/// Creates pods that send a few packets and then are deleted or stay, until `stop` is set. Returns the pods that stay
/// and the number of all pods.
fn come_and_go(env: &TestEnv, mut random: Random, stop: &StopFlag) -> (Vec<Pod>, u32) {
    let (mut pods, mut came) = (Vec::new(), 0);
    while came < MAX_KILLS && !stop.is_set() {
        if pods.is_empty() || (pods.len() < CROWD && random.below(3) > 0) {
            let pod = env.add_pod(*random.of(&LINKS));
            let syns: Vec<_> = (1..100_u16)
                .map(|number| packets::syn(pod.address, METADATA, number, number.into()))
                .collect();
            // Sent before the agent can have seen the pod.
            probe::send_ipv4(&pod.netns, METADATA, &syns).unwrap();
            pods.push(pod);
            came += 1;
        } else {
            let gone = usize::try_from(random.below(pods.len() as u64)).unwrap();
            pods.swap_remove(gone).delete();
        }
        sleep(Duration::from_millis(random.below(40)));
    }
    (pods, came)
}

fn killed_while_pods_come_and_go(backend: AttachMode) {
    let case = Case::new(backend);
    let mut random = Random::new();
    let kills = scaled(100);
    let stop = StopFlag::default();
    let (staying, count) = case.under_flood(|| {
        thread::scope(|scope| {
            let stop_on_drop = stop.set_on_drop();
            let pods = scope.spawn(|| come_and_go(&case.env, Random::new(), &stop));
            for _ in 0..kills {
                let agent = case.agent().resync(1).spawn();
                sleep(Duration::from_millis(random.below(400)));
                agent.kill9();
            }
            drop(stop_on_drop);
            pods.join().unwrap()
        })
    });
    println!("{kills} kills while {count} pods came and {} stayed", staying.len());
    let agent = case.agent().spawn_ready();
    for pod in &staying {
        let programs = hook::programs(&case.env.node, &pod.host_ifname);
        assert_eq!(programs.iter().filter(|program| program.is_ours()).count(), 1, "{programs:?}");
        case.env.assert_blocked(pod);
    }
    drop(agent);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_during_pod_churn_tcx() {
    if !skip_without_tcx() {
        killed_while_pods_come_and_go(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_during_pod_churn_clsact() {
    killed_while_pods_come_and_go(AttachMode::Clsact);
}

//! Foreign objects in the pin directory are not mistaken for the agent's.

use std::fs;

use aya::maps::{Array, Map, MapData};
use imds_ebpf_common::{Mode, Policy};
use imds_tests::{
    AttachMode, Netns, Pod, PodLink, TestEnv,
    foreign_bpf::{ForeignProgram, TC_ACT_OK},
    hook, output,
    probe::LONG,
    skip_without_tcx, with_each_backend,
};

fn bpftool(args: &[&str]) {
    let mut command = std::process::Command::new("bpftool");
    command.args(args);
    let output = output(command);
    assert!(output.status.success(), "bpftool {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn enforced_env(backend: AttachMode) -> (TestEnv, Pod) {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    env.start_agent(backend).kill9();
    env.assert_blocked(&pod);
    (env, pod)
}

/// Asserts that the next agent starts with new maps, logs the reason, and enforces the pod.
#[track_caller]
fn assert_starts_with_new_maps(env: &TestEnv, pod: &Pod, backend: AttachMode, reason: &str) {
    env.assert_blocked(pod);
    let agent = env.start_agent(backend);
    for text in ["starting with new maps and counters", reason] {
        agent.wait_for_log(text, LONG);
    }
    env.assert_blocked(pod);
    env.assert_harmless(pod);
    assert!(env.status().interface(&pod.host_ifname).counts.denied.packets > 0);
    agent.kill9();

    // The next start must find nothing to replace.
    let agent = env.start_agent(backend);
    assert!(!agent.log().contains("starting with new maps"), "{}", agent.log());
    drop(agent);
    env.unload();
    env.assert_open(pod);
}

#[test]
fn map_of_other_layout_is_replaced() {
    with_each_backend(|backend| {
        let (env, pod) = enforced_env(backend);
        let pin = env.pin_dir().join("maps/imds_counters");
        fs::remove_file(&pin).unwrap();
        let pin = pin.to_str().unwrap();
        bpftool(&[
            "map", "create", pin, "type", "hash", "key", "4", "value", "8", "entries", "7", "name", "other",
        ]);
        assert_starts_with_new_maps(&env, &pod, backend, "imds_counters");
    });
}

#[test]
fn maps_of_other_version_are_replaced() {
    if skip_without_tcx() {
        return;
    }
    let (env, pod) = enforced_env(AttachMode::Tcx);
    let pin = env.pin_dir().join("maps/imds_policy");
    let mut policies: Array<MapData, Policy> =
        Map::Array(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    assert!(env.status().total.denied.packets > 0);
    // A misread policy must not open access.
    policies.set(0, Policy { mode: Mode::Off as u32, layout: 99, ..Policy::default() }, 0).unwrap();
    // Until the replacement the programs use the changed policy, which is in their own map.
    env.assert_open(&pod);
    for command in [&["status"][..], &["report"], &["config", "show"]] {
        let output = env.imds_agent(command).output();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("another version"), "{command:?}: {said}");
    }
    let agent = env.start_agent(AttachMode::Tcx);
    agent.wait_for_log("schema 99", LONG);
    env.assert_blocked(&pod);
}

#[test]
fn program_at_map_or_link_pin_is_replaced() {
    if skip_without_tcx() {
        return;
    }
    let (env, pod) = enforced_env(AttachMode::Tcx);
    let foreign = ForeignProgram::returning(TC_ACT_OK);
    let (map, link) = (
        env.pin_dir().join("maps/imds_policy"),
        env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex)),
    );
    for pin in [&map, &link] {
        fs::remove_file(pin).unwrap();
        bpftool(&["prog", "pin", "pinned", foreign.pin().to_str().unwrap(), pin.to_str().unwrap()]);
    }
    let agent = env.start_agent(AttachMode::Tcx);
    for pin in ["imds_policy", "links/from_pod_"] {
        agent.wait_for_log(pin, LONG);
    }
    env.assert_blocked(&pod);
    assert_eq!(hook::tcx(&env.node, &pod.host_ifname).len(), 1);
}

/// Runs `imds-agent` with this environment's pin directory in another network namespace.
fn elsewhere(env: &TestEnv, netns: &Netns, args: &[&str]) -> std::process::Output {
    let here = env.imds_agent(args).command();
    let mut there = netns.command(here.get_program());
    there.args(here.get_args());
    output(there)
}

#[test]
fn pins_of_another_netns_are_left_alone() {
    with_each_backend(|backend| {
        let (env, pod) = enforced_env(backend);
        let refused = |args: &[&str]| {
            let output = elsewhere(&env, &env.fabric, args);
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
            assert!(stderr.contains("network namespace"), "{args:?}: {stderr}");
        };
        refused(&["status"]);
        match backend {
            // A pinned link shows that the directory is in use. Filters of another namespace are not visible, but
            // `unload` would fail to remove them.
            AttachMode::Tcx => refused(&["run", "--once"]),
            AttachMode::Clsact => refused(&["unload"]),
        }
        env.assert_blocked(&pod);
        env.unload();
        env.assert_open(&pod);
    });
}

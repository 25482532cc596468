//! Reloads of the sinks, and files that a sink refuses.

use std::{fs, os::unix::fs::symlink};

use imds_tests::{PodLink, TestEnv, poll::poll_until, probe::LONG};

use crate::{file_sink, records, send, sink_errors, sinks, wait_failing, wait_records, wait_working};

/// Start of the series that each sink has once.
const SERIES: &str = "imds_agent_sink_failing{sink=\"";

#[test]
fn reload_adds_and_removes_sinks() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let [first, second] = ["first", "second"].map(|name| env.scratch_dir().join(name));
    let path = env.scratch_dir().join("imds.toml");
    let write = |events: &str| {
        let hooks = "[hooks]\nsocket = false\nnode_egress = false\n";
        fs::write(&path, format!("{hooks}{events}")).unwrap();
    };
    // `status` names the sinks of the configuration, which the telemetry thread gets separately.
    let wait_sinks = |expected: &[&String]| {
        poll_until(LONG, &format!("the sinks {expected:?}"), || {
            let names: Vec<_> = sink_errors(&env).into_iter().map(|(name, _)| name).collect();
            let metrics = env.metrics();
            let has_series = |name: &&String| metrics.contains(&format!("{SERIES}{name}\"}}"));
            let is_running =
                metrics.matches(SERIES).count() == expected.len() && expected.iter().all(has_series);
            (is_running && names.iter().eq(expected.iter().copied())).then_some(())
        });
    };
    let [first_name, second_name] = [&first, &second].map(|path| format!("file:{}", path.display()));
    write(&sinks(&[file_sink(&first)]));
    let agent = env.imds_agent(&["run"]).config_file(path.to_str().unwrap()).spawn_ready();
    send(&pod, [40_000]);
    wait_records(&first, 1);

    write(&sinks(&[file_sink(&second), file_sink(&first)]));
    wait_sinks(&[&second_name, &first_name]);
    send(&pod, [40_001]);
    assert_eq!(wait_records(&second, 1)[0]["src_endpoint"]["port"], 40_001);
    wait_records(&first, 2);

    write(&sinks(&[file_sink(&second)]));
    wait_sinks(&[&second_name]);
    send(&pod, [40_002]);
    wait_records(&second, 2);
    write("");
    wait_sinks(&[]);
    // An invalid table changes nothing.
    write(&sinks(&["type = 'file'".to_owned()]));
    agent.wait_for_log("needs the key `path`", LONG);
    env.assert_blocked(&pod);
    assert_eq!([records(&first).len(), records(&second).len()], [2, 2]);
    drop(agent);
    env.unload();
}

#[test]
fn file_sink_follows_no_symlink() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let [path, target] = ["denials.jsonl", "target"].map(|name| env.scratch_dir().join(name));
    symlink(&target, &path).unwrap();
    let agent = env.agent().config(&sinks(&[file_sink(&path)])).spawn_ready();
    send(&pod, [40_000]);
    wait_failing(&env, "symbolic links");
    assert!(!target.exists());
    fs::remove_file(&path).unwrap();
    wait_records(&path, 1);
    wait_working(&env);
    drop(agent);
    env.unload();
}

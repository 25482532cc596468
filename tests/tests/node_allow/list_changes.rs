//! Changes of the list, its cgroups and its programs while the agent runs.

use std::{fs, thread};

use aya::maps::{HashMap, Map, MapData};
use imds_ebpf_common::{AllowedKind, AllowedProcess, names::MAP_NODE_ALLOW};
use imds_tests::{
    ConfigFile, METADATA, StopFlag, TestEnv, foreign_bpf, poll::poll_until, probe::LONG,
    skip_without_netns_cookie,
};

use crate::{ECHO_PORT, HOOKS, USER, allow, entry, http, node_allow, reaches, run_as, udp, uid};

/// Returns a configuration with [`HOOKS`] and this text.
fn with_hooks(text: &str) -> String {
    format!("{HOOKS}{text}")
}

#[test]
fn reload_changes_entries() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [kubelet, session] = ["kubelet.service", "session.scope"].map(|path| env.add_cgroup(path));
    let is_open = || [reaches(&env, &kubelet, 0), reaches(&env, &session, USER), reaches(&env, &session, 0)];
    let file = ConfigFile::new(&env, &with_hooks(""));
    let agent = file.agent().spawn_ready();
    assert_eq!(is_open(), [true; 3]);
    assert!(env.status().node_allow.is_none());
    file.reload(&with_hooks(&allow(&[&entry(kubelet.path())])));
    assert_eq!(is_open(), [true, false, false]);
    file.reload(&with_hooks(&allow(&[&entry(kubelet.path()), &uid(USER)])));
    assert_eq!(is_open(), [true, true, false]);
    file.reload(&with_hooks(&allow(&[&uid(USER)])));
    assert_eq!(is_open(), [false, true, false]);
    // A broken file changes nothing.
    file.replace(&with_hooks(&allow(&["uid:root"])));
    env.status_when("the file is rejected", |status| {
        status.problems.iter().any(|problem| problem.problem.contains("node.allow: \"uid:root\""))
    });
    assert_eq!(is_open(), [false, true, false]);
    file.reload(&with_hooks(""));
    assert_eq!(is_open(), [true; 3]);
    assert!(env.status().node_allow.is_none());
    assert!(links(&env).is_empty());

    // Without an agent the list stays, and the next agent takes over.
    file.reload(&with_hooks(&allow(&[&uid(USER)])));
    agent.kill9();
    assert_eq!(is_open(), [false, true, false]);
    let agent = file.agent().spawn_ready();
    assert_eq!(is_open(), [false, true, false]);
    agent.kill9();
    file.replace(&with_hooks(""));
    let agent = file.agent().spawn_ready();
    assert_eq!(is_open(), [true; 3]);
    assert!(links(&env).is_empty());
    drop(agent);
    env.unload();
    assert_eq!(is_open(), [true; 3]);
}

/// Names of the pinned links of the hook.
fn links(env: &TestEnv) -> Vec<String> {
    let entries = fs::read_dir(env.pin_dir().join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("node_") && !name.starts_with("node_egress_")).collect()
}

#[test]
fn listed_process_stays_allowed_during_reloads() {
    const RELOADS: usize = 5;
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("kubelet.service");
    let texts = [allow(&["uid:0", &uid(USER)]), allow(&[&uid(USER), &entry(cgroup.path())])];
    let file = ConfigFile::new(&env, &with_hooks(&texts[0]));
    let _agent = file.agent().spawn_ready();
    let stop = StopFlag::default();
    thread::scope(|scope| {
        let stop_on_drop = stop.set_on_drop();
        let calls = scope.spawn(|| {
            let mut calls = 0;
            while !stop.is_set() {
                let socket = run_as(&env, &cgroup, USER, || udp("0.0.0.0:0"));
                let sent = run_as(&env, &cgroup, USER, || socket.send_to(b"echo", (METADATA, ECHO_PORT)));
                sent.expect("a listed process is not denied");
                calls += 1;
            }
            calls
        });
        for reload in 1..=RELOADS {
            file.reload(&with_hooks(&texts[reload % 2]));
        }
        drop(stop_on_drop);
        assert!(calls.join().unwrap() > 0);
    });
}

#[test]
fn later_cgroups_are_found() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let path = env.cgroup().join("kubelet.service");
    let config = allow(&["uid:1", &entry(&path)]);
    // Nothing is resynced.
    let agent = env.agent().hooks(&["from_pod"]).config(&config).resync(3600).spawn_ready();
    let active = || node_allow(&env).allow.into_iter().map(|entry| entry.active).collect::<Vec<_>>();
    assert_eq!(active(), [true, false]);
    assert_eq!(env.status().state, "enforcing");
    // Twice, as when the unit is restarted.
    for _ in 0..2 {
        let kubelet = env.add_cgroup("kubelet.service");
        poll_until(LONG, "the cgroup to be found", || reaches(&env, &kubelet, 0).then_some(()));
        assert_eq!(active(), [true, true]);
        drop(kubelet);
        poll_until(LONG, "the cgroup to be missed", || (active() == [true, false]).then_some(()));
    }
    let status = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(status.contains(&format!("node allow uid:1 {} (not found)", entry(&path))), "{status}");
    drop(agent);
    env.unload();
}

#[test]
fn programs_and_entries_are_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).resync(1).spawn_ready();
    assert!(!reaches(&env, &cgroup, USER) && reaches(&env, &cgroup, 0));
    foreign_bpf::detach_link(&env.pin_dir().join("links/node_connect4"));
    poll_until(LONG, "calls to be denied again", || {
        // Calls pass until the agent restores the program.
        let result = run_as(&env, &cgroup, USER, || http(METADATA));
        result.is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)).then_some(())
    });
    let map = MapData::from_pin(env.pin_dir().join("maps").join(MAP_NODE_ALLOW)).unwrap();
    let mut map: HashMap<_, AllowedProcess, u32> = Map::HashMap(map).try_into().unwrap();
    map.remove(&AllowedProcess::new(AllowedKind::Uid, 0)).unwrap();
    map.insert(AllowedProcess::new(AllowedKind::Uid, USER.into()), 9, 0).unwrap();
    poll_until(LONG, "the list to be restored", || {
        (reaches(&env, &cgroup, 0) && !reaches(&env, &cgroup, USER)).then_some(())
    });
    agent.wait_for_log("updated the allow list of the node", LONG);
    env.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn status_names_missing_programs() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let row = || {
        let status = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
        let row = status.lines().map(str::trim_start).find(|line| line.starts_with("(node_allow)"));
        let row = row.unwrap_or_else(|| panic!("no row of the hook in:\n{status}"));
        row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).nth(1).unwrap().to_owned()
    };
    env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).spawn_ready().kill9();
    assert_eq!(row(), "cgroup");
    foreign_bpf::detach_link(&env.pin_dir().join("links/node_connect4"));
    assert_eq!(row(), "cgroup, without imds_node_conn4");
    assert!(!node_allow(&env).attached);
    env.unload();
}

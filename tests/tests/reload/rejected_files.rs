//! Files that the agent rejects: the previous configuration stays effective.

use std::fs;

use aya::programs::TcAttachType::Egress;
use imds_tests::{
    AttachMode, ConfigFile, METADATA, PodLink, TestEnv, probe::LONG, skip_without_netns_cookie,
};

use crate::{FROM_POD, TC_HOOKS, assert_rejected, has_program};

#[test]
fn bad_file_keeps_previous_config() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let file = ConfigFile::new(&env, TC_HOOKS);
    let agent = file.agent().backend(AttachMode::Clsact).spawn_ready();
    let good = env.status();

    file.replace(&format!("mode = 'of'\n{TC_HOOKS}"));
    let status = assert_rejected(&env, &good, "imds.toml:1:8: mode: ");
    assert_eq!(status.configuration.unwrap().file.unwrap(), file.path);
    agent.wait_for_log("keeping the previous one", LONG);
    env.assert_blocked(&pod);

    // The endpoint conflicts with the provider's.
    file.replace(&format!("{TC_HOOKS}[[endpoint]]\nname = 'mine'\naddress = '{METADATA}'\n"));
    assert_rejected(&env, &good, "already protected");

    let good = file.reload(&format!("on_deny = 'reject'\n{TC_HOOKS}"));
    assert!(good.problems.is_empty(), "{:?}", good.problems);

    fs::remove_file(&file.path).unwrap();
    assert_rejected(&env, &good, "No such file");
    env.assert_blocked(&pod);
    let good = file.reload(TC_HOOKS);

    // A directory, and a pipe without a writer.
    fs::remove_file(&file.path).unwrap();
    fs::create_dir(&file.path).unwrap();
    assert_rejected(&env, &good, "not a regular file");
    fs::remove_dir(&file.path).unwrap();
    nix::unistd::mkfifo(&file.path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    agent.hang_up();
    assert_rejected(&env, &good, "not a regular file");
    fs::remove_file(&file.path).unwrap();
    // Moved there as a whole: an empty file would be a valid one.
    let whole = file.path.with_extension("new");
    fs::write(&whole, [0xff, 0xfe]).unwrap();
    fs::rename(&whole, &file.path).unwrap();
    assert_rejected(&env, &good, "UTF-8");
    file.replace(&" ".repeat((1 << 20) + 1));
    assert_rejected(&env, &good, "MiB");

    // The rejection is recorded without the agent too, until the next agent loads a valid file.
    agent.kill9();
    assert_rejected(&env, &good, "MiB");
    file.replace(TC_HOOKS);
    let agent = file.agent().backend(AttachMode::Clsact).spawn_ready();
    assert!(env.status().configuration.unwrap().rejected.is_none());
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn unusable_cgroup_rejects_the_file() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let file = ConfigFile::new(&env, FROM_POD);
    let cgroup = env.add_cgroup("missing");
    let missing = cgroup.path().to_owned();
    let agent = env
        .agent()
        .config_file(file.path.to_str().unwrap())
        .args(&["--cgroup", missing.to_str().unwrap()])
        .spawn_ready();
    let good = env.status();
    drop(cgroup);
    // The file also enables `node_egress`, which must be detached again.
    file.replace("on_deny = 'reject'\n");
    let status = assert_rejected(&env, &good, missing.to_str().unwrap());
    assert!(!has_program(&env, TestEnv::UPLINK, Egress));
    assert!(status.interface(&pod.host_ifname).is_attached());
    env.assert_blocked(&pod);
    file.reload(FROM_POD);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

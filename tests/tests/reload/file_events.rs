//! Changes of the file that the agent must notice, and SIGHUP.

use std::{cell::Cell, fs, os::unix::fs::symlink, path::Path, time::Duration};

use imds_tests::{AttachMode, ConfigFile, PodLink, TestEnv, poll::poll_until, skip_without_netns_cookie};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{FROM_POD, assert_rejected};

#[test]
fn every_file_replacement_is_noticed() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    // No resync runs during the test.
    let agent = file.agent().backend(AttachMode::Clsact).args(&["--resync", "3600"]).spawn_ready();
    let modes = |n: usize| ["enforce", "audit", "off"][n % 3];
    let config = |mode: &str| format!("mode = '{mode}'\n{FROM_POD}");
    let generation = Cell::new(env.status().generation());
    // The mode is effective before its generation is recorded.
    let assert_effective = |mode: &str| {
        let status = env.status_when(mode, |status| {
            let is_recorded = status.generation() > generation.get();
            status.mode.as_deref() == Some(mode) && is_recorded && status.problems.is_empty()
        });
        generation.set(status.generation());
    };

    fs::write(&file.path, config("audit")).unwrap();
    assert_effective("audit");
    file.replace(&config("off"));
    assert_effective("off");
    fs::remove_file(&file.path).unwrap();
    assert_rejected(&env, &env.status(), "No such file");
    fs::write(&file.path, config("enforce")).unwrap();
    assert_effective("enforce");

    // Replaces symlinks as the kubelet does for a ConfigMap.
    let dir = env.scratch_dir();
    let version = |n: usize| {
        let name = format!("..2026_11_23_{n}");
        fs::create_dir(dir.join(&name)).unwrap();
        fs::write(dir.join(&name).join("imds.toml"), config(modes(n))).unwrap();
        symlink(&name, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        name
    };
    let mut current = version(1);
    fs::remove_file(&file.path).unwrap();
    symlink("..data/imds.toml", &file.path).unwrap();
    assert_effective(modes(1));
    for n in 2..6 {
        let before = std::mem::replace(&mut current, version(n));
        fs::remove_dir_all(dir.join(before)).unwrap();
        assert_effective(modes(n));
    }

    // Several fast changes: the last one counts.
    for n in 0..10 {
        file_in(dir, &current, &config(modes(n)));
        file_in(dir, &current, &config(modes(n + 1)));
        assert_effective(modes(n + 1));
    }
    drop(agent);
    env.unload();
}

fn file_in(dir: &Path, version: &str, text: &str) {
    fs::write(dir.join(version).join("imds.toml"), text).unwrap();
}

#[test]
fn inotify_overflow_is_handled() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    let agent = file.agent().backend(AttachMode::Clsact).args(&["--resync", "3600"]).spawn_ready();
    let pid = Pid::from_raw(agent.pid().try_into().unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    let most: usize =
        fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    // Two events per file. Successive events differ, because the kernel would merge equal ones.
    for n in 0..most {
        let name = env.scratch_dir().join(format!("other-{}", n % 2));
        fs::write(&name, "").unwrap();
        fs::remove_file(&name).unwrap();
    }
    file.replace(&format!("mode = 'audit'\n{FROM_POD}"));
    kill(pid, Signal::SIGCONT).unwrap();
    env.status_when("the change is noticed", |status| status.mode.as_deref() == Some("audit"));
    drop(agent);
    env.unload();
}

#[test]
fn polling_finds_unreported_changes() {
    let env = TestEnv::new();
    let file = ConfigFile::new(&env, FROM_POD);
    // A second name of the same file, in a directory that the agent does not watch.
    let elsewhere = env.scratch_dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::hard_link(&file.path, elsewhere.join("imds.toml")).unwrap();
    let agent = file.agent().backend(AttachMode::Clsact).args(&["--resync", "1"]).spawn_ready();
    fs::write(elsewhere.join("imds.toml"), format!("mode = 'audit'\n{FROM_POD}")).unwrap();
    poll_until(Duration::from_secs(20), "the change to be noticed", || {
        (env.status().mode.as_deref() == Some("audit")).then_some(())
    });
    drop(agent);
    env.unload();
}

#[test]
fn sighup_without_file_is_ignored() {
    // Without a file, all hooks are on.
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let args = ["--cgroup", env.cgroup().to_str().unwrap()];
    let mut agent = env.imds_agent(&["run"]).args(&args).spawn_ready();
    let before = env.status().generation();
    agent.hang_up();
    env.status_when("the configuration is loaded again", |status| status.generation() == before + 1);
    agent.wait_ready();
    env.assert_blocked(&pod);
    assert!(agent.terminate().success());
    env.unload();
}

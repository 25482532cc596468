//! Directories that `unload` and `run` must not touch because they contain no pins of the agent.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AgentCommand, AttachMode, PodLink, TestEnv,
    foreign_bpf::{ForeignProgram, TC_ACT_OK, replace_pin},
    hook, skip_without_tcx,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A separate bpffs for the test.
struct Bpffs(PathBuf);

impl Bpffs {
    fn new(env: &TestEnv) -> Self {
        let path = env.scratch_dir().join("bpffs");
        fs::create_dir(&path).unwrap();
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(path)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[track_caller]
fn assert_rejected(command: AgentCommand<'_>, path: &Path, reason: &str) {
    let output = command.pin_dir(path).output();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{}: {stderr}", path.display());
    for part in [path.to_str().unwrap(), reason, "--pin-dir"] {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

fn unload(env: &TestEnv) -> AgentCommand<'_> {
    env.imds_agent(&["unload"])
}

fn pin_foreign_program(path: &Path) {
    let foreign = ForeignProgram::returning(TC_ACT_OK);
    replace_pin(foreign.pin(), path);
}

#[test]
fn directory_of_files_is_left_alone() {
    let env = TestEnv::new();
    let path = env.scratch_dir().join("files");
    fs::create_dir_all(path.join("maps")).unwrap();
    fs::write(path.join("maps/imds_policy"), "precious").unwrap();
    assert_rejected(unload(&env), &path, "not on a bpffs");
    assert_eq!(fs::read(path.join("maps/imds_policy")).unwrap(), b"precious");
}

#[test]
fn bpffs_root_and_foreign_dirs_are_kept() {
    let env = TestEnv::new();
    let bpffs = Bpffs::new(&env);
    let other = bpffs.0.join("other");
    fs::create_dir_all(other.join("maps")).unwrap();
    let pins = [bpffs.0.join("program"), other.join("program"), other.join("maps/imds_policy")];
    for pin in &pins {
        pin_foreign_program(pin);
    }
    let run = || env.agent().args(&["--once"]);
    for (path, reason) in [(&bpffs.0, "root of a bpffs"), (&other, "no map of imds-agent")] {
        assert_rejected(unload(&env), path, reason);
        assert_rejected(run(), path, reason);
    }
    assert!(pins.iter().all(|pin| pin.exists()) && !bpffs.0.join("links").exists());
    let empty = bpffs.0.join("empty");
    fs::create_dir(&empty).unwrap();
    let output = unload(&env).pin_dir(&empty).output();
    assert!(String::from_utf8_lossy(&output.stdout).contains("nothing is loaded"), "{output:?}");
    assert!(empty.exists());
}

#[test]
fn symlinks_are_not_followed() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.start_agent(AttachMode::Clsact).kill9();
    let link = env.scratch_dir().join("link");
    symlink(env.pin_dir(), &link).unwrap();
    assert_rejected(unload(&env), &link, "symlink");
    env.assert_blocked(&pod);

    // Symlinks inside the directory are not followed either.
    let bpffs = Bpffs::new(&env);
    let other = bpffs.0.join("other");
    fs::create_dir(&other).unwrap();
    pin_foreign_program(&other.join("imds_from_pod"));
    let programs = env.pin_dir().join("progs");
    fs::rename(&programs, env.pin_dir().join("earlier")).unwrap();
    symlink(&other, &programs).unwrap();
    assert_rejected(unload(&env), env.pin_dir(), "symlink");
    fs::remove_file(&programs).unwrap();
    fs::rename(env.pin_dir().join("earlier"), &programs).unwrap();
    env.unload();
    assert!(other.join("imds_from_pod").exists() && !env.pin_dir().exists());
}

#[test]
fn foreign_pins_in_the_directory_stay() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let bpffs = Bpffs::new(&env);
    let foreign = ForeignProgram::returning(TC_ACT_OK);
    let theirs = foreign.attach_tcx_first(&env.node, pod.host_ifindex, TcAttachType::Ingress);
    let elsewhere = bpffs.0.join("link");
    theirs.pin_over(&elsewhere);
    theirs.close();
    env.start_agent(AttachMode::Tcx).kill9();
    let pin_dir = env.pin_dir();
    let kept = [pin_dir.join("maps/other"), pin_dir.join("progs/other"), pin_dir.join("other")];
    for pin in &kept {
        pin_foreign_program(pin);
    }
    symlink(&elsewhere, pin_dir.join("links/node_egress_9999")).unwrap();

    let output = unload(&env).output();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    for pin in &kept {
        assert!(pin.exists() && stderr.contains(pin.to_str().unwrap()), "{}: {stderr}", pin.display());
    }
    assert!(!pin_dir.join("links").exists() && !pin_dir.join("maps/imds_policy").exists());
    assert_eq!(hook::tcx(&env.node, &pod.host_ifname).len(), 1, "the program of the other agent");
    env.assert_open(&pod);
}

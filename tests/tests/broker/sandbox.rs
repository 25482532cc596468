//! Privileges of a running broker.

use std::{
    fs,
    io::ErrorKind,
    os::{linux::fs::MetadataExt as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use imds_tests::executable::broker_executable;

use crate::{
    ALLOW, LOCATION,
    harness::{Broker, status},
    simulator::Simulator,
};

/// User of the broker.
const USER: &str = "69254";

#[test]
fn broker_has_no_privileges() {
    let broker = Broker::start();
    let _service = Simulator::start_echo(&broker.node);
    // After the first requests, so that nothing of it is only true at the start.
    assert_eq!(status(&broker.pod("azure", &ALLOW).get(LOCATION)), 200);
    let proc = PathBuf::from(format!("/proc/{}", broker.child.id()));
    let text = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name} is not in {text}")).trim().to_owned()
    };
    let user = [USER; 4].join("\t");
    for (name, expected) in [
        ("Uid", &*user),
        ("Gid", &*user),
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        assert_eq!(field(name), expected, "{name}");
    }
    assert_eq!(fs::read_dir(proc.join("root")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(proc.join("cwd")).unwrap().count(), 0);
    // In a machine that runs from its initramfs, the empty file system hides the root directory.
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    assert!(mounts.is_empty() || (mounts.lines().count() == 1 && mounts.contains(" / / ro,")), "{mounts}");
    let namespace = |name: &str| {
        (
            fs::read_link(proc.join("ns").join(name)).unwrap(),
            fs::read_link(format!("/proc/self/ns/{name}")).unwrap(),
        )
    };
    let (its, own) = namespace("mnt");
    assert_ne!(its, own);
    // Files of a process that is not dumpable belong to root.
    assert_eq!(fs::metadata(proc.join("environ")).unwrap().st_uid(), 0);
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    for entry in fs::read_dir(proc.join("fd")).unwrap() {
        let target = match fs::read_link(entry.unwrap().path()) {
            // The broker has closed the connection of the request.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            target => target.unwrap(),
        };
        let target = target.to_string_lossy();
        let number = target.split(['/', ':']).next().unwrap_or_default().to_owned();
        assert!(["socket", "anon_inode", "pipe", ""].contains(&&*number), "{target}");
    }
}

#[test]
fn broker_without_rights_does_not_start() {
    let mut command = Command::new(broker_executable());
    // SAFETY: the closure only makes a system call.
    unsafe {
        command.pre_exec(|| Ok(nix::unistd::setresuid(65534.into(), 65534.into(), 65534.into())?));
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(error.starts_with("imds-broker: failed to create a mount namespace: EPERM"), "{error}");
}

#[test]
fn broker_needs_a_socket() {
    let output = Command::new(broker_executable()).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{error}");
    assert!(error.starts_with("imds-broker: standard input is not a socket"), "{error}");
}

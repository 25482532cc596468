//! AppArmor profiles: the default one of container runtimes, and the agent's own.

use std::{fs, path::Path, process::Command};

use imds_tests::{
    METADATA, PodLink, TestEnv, WHOLE_TEST, lacks_netns_cookie, lacks_program, output, probe::reachable,
    skip, skip_unless_disposable,
};

use crate::{Confined, succeed};

const CONTAINER_DEFAULT: &str = include_str!("container-default.apparmor");
const SHIPPED: &str = include_str!("../../../deploy/apparmor/imds-agent");

fn skip_without_apparmor() -> bool {
    if skip_unless_disposable("loads AppArmor profiles") || lacks_program(WHOLE_TEST, &["apparmor_parser"]) {
        return true;
    }
    let is_missing = !Path::new("/sys/kernel/security/apparmor/.replace").exists();
    if is_missing {
        skip(WHOLE_TEST, "there is no AppArmor on this kernel");
    }
    is_missing
}

fn confined(profile: &str, text: &str) -> Confined {
    let confined = Confined::new("apparmor/exec", &format!("exec {profile}"));
    let file = confined.env.scratch_dir().join("profile");
    fs::write(&file, text).unwrap();
    succeed("apparmor_parser", &["--replace", "--skip-cache"], &file);
    confined
}

/// Returns the lines of the kernel log about operations that the profile denied.
fn denials(profile: &str) -> Vec<String> {
    let log = String::from_utf8_lossy(&output(Command::new("dmesg")).stdout).into_owned();
    let is_denial = |line: &&str| line.contains("DENIED") && line.contains(&format!("profile=\"{profile}\""));
    log.lines().filter(is_denial).map(str::to_owned).collect()
}

#[test]
fn default_container_profile_is_refused() {
    if skip_without_apparmor() {
        return;
    }
    let confined = confined("imds-test-container-default", CONTAINER_DEFAULT);
    confined.assert_refused("AppArmor profile imds-test-container-default (enforce)");
    assert!(reachable(&confined.pod.netns, METADATA));
    let (code, table, _) = confined.run(&["doctor"]);
    assert_eq!(code, Some(3), "{table}");
    for part in [
        "is on a bpffs, but nothing can be created there: Permission denied",
        "security_modules         ok        AppArmor profile imds-test-container-default (enforce)",
        "run the agent unconfined, or with the profile of deploy/apparmor",
    ] {
        assert!(table.contains(part), "{part:?} is not in:\n{table}");
    }
    // Linux 5.10 lets the process open namespaces.
    let denied = "failed to open the namespaces of processes: Permission denied";
    assert!(table.contains(denied) || lacks_netns_cookie(), "{table}");
}

#[test]
fn shipped_profile_has_all_rights() {
    if skip_without_apparmor() {
        return;
    }
    let text = SHIPPED.replace("include if exists <local/imds-agent>", "/tmp/** rwk,");
    let confined = confined("imds-agent", &text);
    let env: &TestEnv = &confined.env;
    let exempt = env.add_pod(PodLink::Routed);
    let config = format!("[[exempt]]\nname = 'a'\nnetns = '{}'\n", exempt.netns.path().display());
    let agent = env.agent().config(&config).hooks(&["from_pod", "node_egress"]).binary(&confined.wrapper);
    let agent = agent.spawn_ready();
    env.assert_blocked(&confined.pod);
    assert!(reachable(&exempt.netns, METADATA));
    assert_eq!(denials("imds-agent"), [""; 0]);
    // The profile denies the programs that `doctor` runs, such as nft.
    let (_, table, _) = confined.run(&["doctor"]);
    assert!(table.contains("AppArmor profile imds-agent (enforce)"), "{table}");
    assert!(!table.contains("Permission denied"), "{table}");
    drop(agent);
    let (code, _, stderr) = confined.run(&["unload"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(reachable(&confined.pod.netns, METADATA));
}

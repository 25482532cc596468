//! The user data of cloud-init on a machine that boots with it.

use std::{env, fs, os::unix::fs::symlink, process::Command, time::Duration};

use imds_tests::{Machine, PodLink, TestEnv, executable::write_executable, poll::poll_until};
use tempfile::TempDir;

use crate::deb_package::package_name;

const USER_DATA: &str = include_str!("../../../deploy/cloud-init/user-data.yaml");
/// Longer than the interval of the attempts.
const RETRY: Duration = Duration::from_mins(1);
const INSTALLER: &str = "imds-agent-install.service";
/// Order of the unit in Debian's package, and of its modules.
const CLOUD_INIT: &str = "[Unit]\nDefaultDependencies=no\nBefore=network-online.target sysinit.target\n\
    [Service]\nType=oneshot\nRemainAfterExit=yes\nTimeoutStartSec=20\n\
    ExecStart=sh /srv/bootcmd\nExecStart=mkdir -p /etc/imds-agent\nExecStart=cp /srv/imds.toml /etc/imds-agent/\n";
/// Records the state of the agent before the first pod starts.
const KUBELET: &str = "[Service]\nType=oneshot\nRemainAfterExit=yes\n\
    ExecStart=sh -c 'systemctl is-active imds-agent >/mnt/kubelet'\n";
/// Serves the release of the publisher.
const CURL: &str = "#!/bin/sh\nfor url; do :; done\ncp \"/srv/release/${url##*/}\" .\n";

/// Returns the lines of the YAML block scalar that follows `head`.
fn block(head: &str) -> String {
    let (_, text) = USER_DATA.split_once(head).unwrap();
    let indent = &text[..text.len() - text.trim_start_matches(' ').len()];
    text.lines().map_while(|line| line.strip_prefix(indent).or(line.is_empty().then_some(""))).fold(
        String::new(),
        |mut block, line| {
            block.extend([line, "\n"]);
            block
        },
    )
}

/// Boots a machine with the user data, on the node of `env`. The files of the release are in `/srv/NAME`: downloads work if the
/// name is `release`. Returns the machine, and the directory that it needs until its end.
fn boot(env: &TestEnv, name: &str) -> (Machine, TempDir) {
    let layer = TempDir::with_prefix("imds-layer-").unwrap();
    let write = |path: &str, text: &str| {
        let path = layer.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_executable(&path, text);
    };
    write("srv/bootcmd", &block("bootcmd:\n  - |\n"));
    write("srv/imds.toml", &block("    content: |\n"));
    let wants = layer.path().join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).unwrap();
    for (unit, text) in [("cloud-init.service", CLOUD_INIT), ("kubelet.service", KUBELET)] {
        write(&format!("etc/systemd/system/{unit}"), text);
        symlink(format!("../{unit}"), wants.join(unit)).unwrap();
    }
    // The machine has no curl and no minisign. The tests of the script verify real signatures.
    write("usr/local/bin/curl", CURL);
    write("usr/local/bin/minisign", "#!/bin/sh\n");
    let script = include_str!("../../../deploy/install.sh")
        .replace("\nBASE_URL=\n", "\nBASE_URL=https://releases.example.com/v{version}\n")
        .replace("\nPUBLIC_KEY=\n", "\nPUBLIC_KEY=key\n");
    write(&format!("srv/{name}/install.sh"), &script);
    write(&format!("srv/{name}/SHA256SUMS.minisig"), "");
    let release = layer.path().join("srv").join(name);
    let deb = env::var("IMDS_DEB").expect("IMDS_DEB: run `cargo xtask e2e`");
    fs::copy(deb, release.join(package_name())).unwrap();
    let sums = Command::new("sha256sum").arg(package_name()).current_dir(&release).output().unwrap();
    fs::write(release.join("SHA256SUMS"), sums.stdout).unwrap();
    let machine = Machine::boot_with(&env.node, Some(layer.path()));
    assert_eq!(machine.property("cloud-init.service", "ActiveState"), "active");
    (machine, layer)
}

/// Returns the state of the agent when the kubelet started.
fn state_at_kubelet(machine: &Machine) -> String {
    fs::read_to_string(machine.shared().join("kubelet")).unwrap_or_default()
}

fn run_last_command(machine: &Machine) -> bool {
    let (_, command) = USER_DATA.split_once("runcmd:\n  - ").unwrap();
    machine.run(&["sh", "-c", command]).status.success()
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn first_boot_enforces_before_the_kubelet() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let (machine, _layer) = boot(&env, "release");
    assert_eq!(state_at_kubelet(&machine), "active\n");
    env.assert_blocked(&pod);
    assert!(run_last_command(&machine));
    assert!(machine.checked(&["cat", "/etc/imds-agent/imds.toml"]).contains("docs/configuration.md"));
    // Another boot must not install again.
    machine.checked(&["test", "-e", "/var/lib/imds-agent-installed"]);
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn failed_download_is_repeated_after_the_boot() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let (machine, _layer) = boot(&env, "later");
    assert_eq!(state_at_kubelet(&machine), "inactive\n");
    env.assert_open(&pod);
    assert_eq!(machine.property(INSTALLER, "UnitFileState"), "enabled");
    // An attempt may be running.
    poll_until(RETRY, "a pause between attempts", || {
        (machine.property(INSTALLER, "SubState") == "auto-restart").then_some(())
    });
    assert!(!run_last_command(&machine));
    machine.checked(&["mv", "/srv/later", "/srv/release"]);
    poll_until(RETRY, "the next attempt", || {
        (machine.property("imds-agent.service", "ActiveState") == "active").then_some(())
    });
    env.assert_blocked(&pod);
}

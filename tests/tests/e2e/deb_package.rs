//! The Debian package on a machine with systemd.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use imds_tests::{
    METADATA, Machine, Pod, PodLink, TestEnv,
    flood::Flood,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
};

const CONFIG: &str = "/etc/imds-agent/imds.toml";
const SERVICE: &str = "imds-agent.service";
const SECOND_PIN_DIR: &str = "/sys/fs/bpf/imds-second";
/// Path of the package inside the machine.
const DEB: &str = "/mnt/imds-agent.deb";

/// A machine without the package, and a pod on it.
struct Case {
    // Dropped before its network.
    machine: Machine,
    pod: Pod,
    env: TestEnv,
}

impl Case {
    fn new() -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let machine = Machine::boot(&env.node);
        env.assert_open(&pod);
        // The agent reads the addresses of an exempt pod through one of its processes.
        machine.start_in(&pod.netns);
        let deb = env::var("IMDS_DEB").expect("IMDS_DEB: run `cargo xtask e2e`");
        fs::copy(deb, machine.shared().join("imds-agent.deb")).unwrap();
        Self { machine, pod, env }
    }

    #[track_caller]
    fn install(&self, deb: &str) {
        self.machine.checked(&["apt-get", "install", "--yes", deb]);
    }

    #[track_caller]
    fn configure(&self, text: &str) {
        fs::write(self.machine.shared().join("imds.toml"), text).unwrap();
        self.machine.checked(&["cp", "/mnt/imds.toml", CONFIG]);
    }

    fn is_denied(&self) -> bool {
        !http_get(&self.pod.netns, METADATA, SHORT).is_answer()
    }

    #[track_caller]
    fn wait_active(&self) {
        poll_until(LONG, "the service to run", || {
            (self.machine.property(SERVICE, "ActiveState") == "active").then_some(())
        });
    }

    fn pid(&self) -> String {
        self.machine.property(SERVICE, "MainPID")
    }

    /// Waits until the main process of the service is another one than `pid`.
    #[track_caller]
    fn wait_for_another(&self, pid: &str, what: &str) {
        poll_until(LONG, what, || (![pid, "0"].contains(&&*self.pid())).then_some(()));
    }

    /// Installs another version while the pod sends, and asserts that no packet arrives.
    #[track_caller]
    fn replace(&self, install: impl FnOnce()) {
        let pid = self.pid();
        self.env.assert_nothing_arrives(|| {
            let flood = Flood::udp(&self.pod, METADATA);
            install();
            self.wait_active();
            drop(flood);
        });
        assert_ne!(self.pid(), pid);
    }

    fn has(&self, path: &str) -> bool {
        self.machine.run(&["test", "-e", path]).status.success()
    }

    /// Returns the number of packets denied at the pod's interface, as the agent on the machine reports it.
    fn denied(&self) -> u64 {
        let status = self.machine.run(&["imds-agent", "status", "-o", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        status["total"]["denied"]["packets"].as_u64().unwrap()
    }

    /// Builds the same package with an older version number, and returns its path inside the machine.
    fn older(&self) -> &'static str {
        let script = "dpkg-deb --raw-extract imds-agent.deb older && \
                      sed -i 's/^Version: .*/Version: 0.0.9-1/' older/DEBIAN/control && \
                      dpkg-deb -Znone --build older older.deb";
        self.machine.checked(&["sh", "-ec", &format!("cd /mnt && {script}")]);
        "/mnt/older.deb"
    }

    /// Returns all files on the machine with the package's name in their own.
    fn traces(&self) -> Vec<PathBuf> {
        let found = self.machine.checked(&[
            "sh", "-c",
            "find /bin/ /etc /lib/ /run /sys/fs/bpf /usr /var/lib -name '*imds*' -not -path '/var/lib/apt/*' -not -path '/run/systemd/*' 2>/dev/null || :",
        ]);
        found.lines().map(|line| Path::new(line).to_owned()).collect()
    }
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn install_enforces_and_removal_ends_it() {
    let case = Case::new();
    let before = case.traces();
    case.install(DEB);
    // The service manager was notified that everything is enforced, so the pod must be denied immediately.
    case.wait_active();
    case.env.assert_blocked(&case.pod);
    let status = case.machine.property(SERVICE, "StatusText");
    assert!(status.starts_with("mode enforce: 1 pod and "), "{status}");
    let verify = case.machine.checked(&["imds-agent", "verify"]);
    assert!(verify.contains(" 0 failed"), "{verify}");
    for page in ["/usr/share/man/man1/imds-agent.1.gz", "/usr/share/bash-completion/completions/imds-agent"] {
        assert!(case.has(page), "{page}");
    }

    // The unit's capabilities and system call filter also permit exemptions.
    let rule = format!("[[exempt]]\nname = 'one'\ninterface = '{}'", case.pod.host_ifname);
    case.configure(&format!("{rule}\n[metrics]\nlisten = ['/run/imds-agent/metrics.sock']"));
    case.machine.checked(&["systemctl", "reload", SERVICE]);
    poll_until(LONG, "the exemption", || (!case.is_denied()).then_some(()));
    poll_until(LONG, "the socket", || case.has("/run/imds-agent/metrics.sock").then_some(()));
    let status = case.machine.checked(&["imds-agent", "status"]);
    assert!(status.contains("enforcing"), "{status}");
    case.configure("");
    case.machine.checked(&["systemctl", "reload", SERVICE]);
    poll_until(LONG, "the end of the exemption", || case.is_denied().then_some(()));

    // A stopped service keeps enforcement, a removed package ends it, and a purge leaves nothing.
    case.machine.checked(&["systemctl", "stop", SERVICE]);
    case.env.assert_blocked(&case.pod);
    case.machine.checked(&["systemctl", "start", SERVICE]);
    case.machine.checked(&["imds-agent", "run", "--once", "--pin-dir", SECOND_PIN_DIR]);
    assert!(case.has(SECOND_PIN_DIR));
    case.machine.checked(&["apt-get", "remove", "--yes", "imds-agent"]);
    case.env.assert_open(&case.pod);
    assert!(case.has(CONFIG) && !case.has("/sys/fs/bpf/imds") && !case.has(SECOND_PIN_DIR));
    case.machine.checked(&["apt-get", "purge", "--yes", "imds-agent"]);
    assert_eq!(case.traces(), before);
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn upgrade_keeps_enforcement_and_counters() {
    let case = Case::new();
    let older = case.older();
    case.install(older);
    case.wait_active();
    case.machine.checked(&["sh", "-c", &format!("echo '# of the operator' >> {CONFIG}")]);
    assert!(case.is_denied());
    let denied = case.denied();
    assert!(denied > 0);
    case.replace(|| case.install(DEB));
    assert!(case.denied() > denied);
    assert!(case.machine.checked(&["cat", CONFIG]).contains("of the operator"));
    // Back to the newer version.
    case.replace(|| {
        case.machine.checked(&["apt-get", "install", "--yes", "--allow-downgrades", older]);
    });
    case.machine.checked(&["apt-get", "purge", "--yes", "imds-agent"]);
    case.env.assert_open(&case.pod);
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn service_restart_never_blocks_runtime() {
    let case = Case::new();
    case.install(DEB);
    case.wait_active();
    // A hanging agent must be restarted by the watchdog.
    let drop_in = "mkdir -p /run/systemd/system/imds-agent.service.d && \
                   printf '[Service]\\nWatchdogSec=1\\n' > /run/systemd/system/imds-agent.service.d/test.conf && \
                   systemctl daemon-reload && systemctl restart imds-agent";
    case.machine.checked(&["sh", "-ec", drop_in]);
    let pid = case.pid();
    case.machine.checked(&["kill", "-STOP", &pid]);
    case.wait_for_another(&pid, "the watchdog");
    case.wait_active();
    case.env.assert_blocked(&case.pod);
    let pid = case.pid();
    case.machine.checked(&["kill", "-KILL", &pid]);
    case.wait_for_another(&pid, "a restart");

    // With an unusable configuration, the service starts with the last good one. A container runtime starts after it.
    case.machine.checked(&["systemctl", "stop", SERVICE]);
    case.configure("nonsense = 1");
    let runtime = "printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=/bin/true\\n' > /run/systemd/system/containerd.service && \
                   systemctl daemon-reload && systemctl start --no-block imds-agent containerd";
    case.machine.checked(&["sh", "-ec", runtime]);
    poll_until(LONG, "the runtime to start", || {
        (case.machine.property("containerd.service", "ActiveState") == "active").then_some(())
    });
    case.wait_active();
    let status = case.machine.run(&["imds-agent", "status"]);
    assert_eq!(status.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&status.stdout).contains("degraded"));
    case.env.assert_blocked(&case.pod);
    case.machine.checked(&["apt-get", "purge", "--yes", "imds-agent"]);
    case.env.assert_open(&case.pod);
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn service_is_hardened() {
    let case = Case::new();
    case.install(DEB);
    let text =
        case.machine.checked(&["systemd-analyze", "security", "--no-pager", "--threshold=35", SERVICE]);
    assert!(text.contains("Overall exposure level"), "{text}");
}

#[test]
#[ignore = "needs a Debian root and a package: cargo xtask e2e"]
fn script_installs_the_package() {
    let case = Case::new();
    let package = package_name();
    let release = format!(
        "mkdir /mnt/release && cd /mnt/release && mv {DEB} {package} && sha256sum {package} > SHA256SUMS"
    );
    case.machine.checked(&["sh", "-ec", &release]);
    fs::copy(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/install.sh"),
        case.machine.shared().join("install.sh"),
    )
    .unwrap();
    let script = ["sh", "/mnt/install.sh", "--from", "/mnt/release", "--no-signature"];
    case.machine.checked(&[&script[..], &["--dry-run"]].concat());
    assert!(!case.has("/usr/bin/imds-agent"));
    case.machine.checked(&[&script[..], &["--no-start"]].concat());
    assert_eq!(case.machine.property(SERVICE, "UnitFileState"), "enabled");
    assert_eq!(case.machine.property(SERVICE, "ActiveState"), "inactive");
    case.env.assert_open(&case.pod);
    // Starts the service of a package that is already installed, too.
    case.machine.checked(&script);
    case.wait_active();
    case.env.assert_blocked(&case.pod);
    case.machine.checked(&["apt-get", "purge", "--yes", "imds-agent"]);
    case.env.assert_open(&case.pod);
}

/// Returns the name of the package in a release.
pub(crate) fn package_name() -> String {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    format!("imds-agent_{}-1_{arch}.deb", env!("CARGO_PKG_VERSION"))
}

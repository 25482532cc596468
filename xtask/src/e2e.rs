//! The command `cargo xtask e2e`.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use imds_tests::DEBIAN_ROOT;

use crate::{
    arch::Arch,
    cache, dist,
    setup::{self, Purpose},
    test,
    workspace::{cargo, ensure_root, execute, print_status},
};

/// Packages of the test machine in addition to Debian's base.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,procps";

/// First filter that selects the tests with real software, and the name of their executable.
const REAL: &str = "real";
/// Tests of the other executable that run pods and need no release artifact.
const POD_TESTS: [&str; 3] = ["containerd_with", "single_pod_is_exempt", "hundred_churning"];

/// Test the release artifacts: the package on machines with systemd, the image and the agent on pods of podman and
/// containerd; needs root, takes some minutes
///
/// `e2e real` runs the tests with real software instead: CNI plugins, nft, iptables, tc, Open vSwitch, and podman and
/// containerd if they are installed.
#[derive(clap::Args)]
pub(crate) struct EndToEnd {
    /// Test the existing artifacts in target/dist
    #[arg(long)]
    no_build: bool,
    /// `real`, or parts of test names, and options of the test binary such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

impl EndToEnd {
    pub(crate) fn run(self) -> Result<()> {
        ensure_root("the tests create machines in namespaces: run them as root")?;
        if let Some((REAL, filter)) = self.filter.split_first().map(|(first, rest)| (first.as_str(), rest)) {
            return real(filter);
        }
        setup::ensure(Purpose::EndToEnd)?;
        let arch = Arch::host()?;
        let dir = if self.no_build { dist::dir(arch)? } else { dist::build(arch)? };
        let root = cache::dir()?.join("debian-12");
        if !root.exists() {
            cache::make(&root, |root, _| debootstrap(root))?;
        }
        let mut test = cargo("test");
        test.args(["--package", "imds-tests", "--locked", "--test", "e2e", "--", "--include-ignored"]);
        test.args(self.filter)
            .env("IMDS_DEB", dist::artifact(&dir, ".deb")?)
            .env("IMDS_AGENT", dir.join("imds-agent"));
        execute(test.env(DEBIAN_ROOT, root))
    }
}

/// Runs the tests with real software, including the long ones.
fn real(filter: &[String]) -> Result<()> {
    let agent = test::prepare()?;
    let test = |executable: &str| {
        let mut test = cargo("test");
        test.args(["--package", "imds-tests", "--locked", "--test", executable]);
        test.env("IMDS_AGENT", &agent).args(["--", "--include-ignored"]);
        test
    };
    execute(test("real").args(filter))?;
    if let Some(missing) = setup::missing(Purpose::Runtimes) {
        print_status(format_args!("pods of podman and containerd were NOT tested, {missing}"));
    } else if filter.is_empty() {
        execute(test("e2e").args(POD_TESTS))?;
    }
    Ok(())
}

fn debootstrap(root: &Path) -> Result<()> {
    print_status("creating a Debian root: this takes a minute");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", "--include", PACKAGES, "bookworm"]).arg(root);
    debootstrap.stdout(Stdio::null());
    execute(&mut debootstrap).context("failed to create a Debian root: is this machine online?")
}

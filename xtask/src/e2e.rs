//! What is shipped, as it is used.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};
use imds_tests::DEBIAN_ROOT;
use nix::unistd::Uid;

use crate::{
    cache, dist,
    setup::{self, Purpose},
    test,
    workspace::{cargo, execute, say},
};

/// What a machine of the tests has besides Debian's base.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,procps";

/// Name of the test executable that runs programs of others, as the first filter.
const REAL: &str = "real";
/// Tests of the other executable that run pods, and need nothing that is shipped.
const POD_TESTS: [&str; 3] = ["containerd_and", "one_pod_is_exempt", "none_of_a_hundred"];

/// Try what is shipped: the package on machines with systemd, the image and the agent on pods of podman and containerd;
/// needs root, takes some minutes. `e2e real` runs the tests with programs of others instead: CNI plugins, nft, iptables,
/// tc, Open vSwitch, and podman and containerd if they are installed
#[derive(clap::Args)]
pub(crate) struct EndToEnd {
    /// Try what is in target/dist already
    #[arg(long)]
    no_build: bool,
    /// `real`, or names of tests, in whole or in part, and options of the test binary such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

impl EndToEnd {
    pub(crate) fn run(self) -> Result<ExitCode> {
        if !Uid::effective().is_root() {
            bail!("the tests make machines of namespaces: run them as root");
        }
        if let Some((REAL, filter)) = self.filter.split_first().map(|(first, rest)| (first.as_str(), rest)) {
            return real(filter);
        }
        setup::ensure(Purpose::EndToEnd)?;
        let dir = if self.no_build { dist::dir()? } else { dist::build()? };
        let root = cache::dir()?.join("debian-12");
        if !root.exists() {
            cache::make(&root, |root, _| debootstrap(root))?;
        }
        let mut test = cargo("test");
        test.args(["--package", "imds-tests", "--locked", "--test", "e2e", "--", "--include-ignored"]);
        test.args(self.filter).env("IMDS_DEB", package(&dir)?).env("IMDS_AGENT", dir.join("imds-agent"));
        execute(test.env(DEBIAN_ROOT, root))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs the tests with programs of others, the long ones too.
fn real(filter: &[String]) -> Result<ExitCode> {
    let agent = test::prepare()?;
    let test = |executable: &str| {
        let mut test = cargo("test");
        test.args(["--package", "imds-tests", "--locked", "--test", executable]);
        test.env("IMDS_AGENT", &agent).args(["--", "--include-ignored"]);
        test
    };
    execute(test("real").args(filter))?;
    if let Some(missing) = setup::missing(Purpose::Runtimes) {
        say(format_args!("pods of podman and containerd were NOT tested, {missing}"));
    } else if filter.is_empty() {
        execute(test("e2e").args(POD_TESTS))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn debootstrap(root: &Path) -> Result<()> {
    say("making a Debian root: this takes a minute");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", "--include", PACKAGES, "bookworm"]).arg(root);
    debootstrap.stdout(Stdio::null());
    execute(&mut debootstrap).context("could not make a Debian root: is this machine online?")
}

/// The one Debian package in `dir`.
fn package(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
    let mut packages = entries.flatten().map(|entry| entry.path());
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    packages
        .find(is_package)
        .with_context(|| format!("there is no .deb in {}: run it without --no-build", dir.display()))
}

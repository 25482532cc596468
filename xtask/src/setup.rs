//! The command `cargo xtask setup`: requirements for building and testing.

use std::fmt;

use anyhow::{Context as _, Result, bail};
use imds_ebpf_build::{Compiler, DEBIAN_PACKAGES, Host, Survey, compiles_programs, linker_install};
use nix::unistd::Uid;

pub(crate) use crate::requirements::Purpose;
use crate::{
    apt,
    requirements::{CARGO_TOOLS, CargoTool, TOOLS, Tools},
    workspace::{cargo, execute, print_status, root},
};

/// Install missing requirements for building, testing and linting: Debian packages and bpf-linker
#[derive(clap::Args)]
pub(crate) struct Setup {
    /// Only report missing requirements
    #[arg(long)]
    check: bool,
}

const CLIPPY_PACKAGE: &str = "rust-web-clippy";

impl Setup {
    pub(crate) fn run(self) -> Result<()> {
        let (host, purposes) =
            (Host::current(), [Purpose::Build, Purpose::Ebpf, Purpose::Test, Purpose::Lint]);
        let missing = Missing::find(&host, &purposes);
        if !self.check {
            missing.install(&host, &purposes)?;
        } else if !missing.is_empty() {
            bail!("missing: {missing}");
        }
        let toolchain = Survey::new(&host).toolchain()?;
        print_status(format_args!(
            "no requirement is missing; the BPF object is built with {} and {}",
            toolchain.compiler(),
            toolchain.linker().display()
        ));
        Ok(())
    }
}

/// Installs missing requirements of `purpose`. Prints nothing if none is missing.
pub(crate) fn ensure(purpose: Purpose) -> Result<()> {
    let host = Host::current();
    let mut purposes = vec![purpose];
    if compiles_programs(root())? {
        // Every build of the agent compiles the BPF programs.
        purposes.push(Purpose::Ebpf);
    }
    Missing::find(&host, &purposes).install(&host, &purposes)
}

/// Returns a list of the missing requirements of `purpose`, if any.
pub(crate) fn missing(purpose: Purpose) -> Option<String> {
    let missing = Missing::find(&Host::current(), &[purpose]);
    (!missing.is_empty()).then(|| format!("missing: {missing}"))
}

/// Missing requirements of a machine.
#[derive(Debug, Default)]
struct Missing {
    /// Descriptions of the missing requirements with their remedies.
    descriptions: Vec<String>,
    /// Missing Debian packages. bpf-linker is installed after them, see [`install_linker`].
    packages: Vec<&'static str>,
    cargo_tools: Vec<&'static CargoTool>,
}

impl Missing {
    fn find(host: &Host, purposes: &[Purpose]) -> Self {
        let mut missing = Self::default();
        if needs_toolchain(purposes) {
            let survey = Survey::new(host);
            let toolchain = survey.toolchain();
            if let Err(error) = &toolchain {
                missing.descriptions.push(error.to_string());
                if survey.debian.is_err() {
                    missing.packages.extend(DEBIAN_PACKAGES);
                }
            }
            if purposes.contains(&Purpose::Lint) {
                let compiler = toolchain.map_or(Compiler::Debian, |toolchain| toolchain.compiler());
                missing.check_clippy(host, compiler);
            }
        }
        let is_needed = |of: &[Purpose]| of.iter().any(|purpose| purposes.contains(purpose));
        for Tools { owner, programs, .. } in TOOLS.iter().filter(|tools| is_needed(tools.purposes)) {
            for (program, package) in programs.iter().filter(|(program, _)| host.find(program).is_none()) {
                missing.add(format!("{owner} {program} (package {package})"), package);
            }
        }
        for tool in CARGO_TOOLS.iter().filter(|tool| is_needed(tool.purposes)) {
            if host.find(tool.program).is_none() {
                let install = format!("cargo install {} --version {}", tool.program, tool.version);
                missing.descriptions.push(format!("{} ({install})", tool.program));
                missing.cargo_tools.push(tool);
            }
        }
        missing
    }

    fn check_clippy(&mut self, host: &Host, compiler: Compiler) {
        if compiler.has_clippy(host) {
            return;
        }
        match compiler {
            Compiler::Debian => {
                self.add(format!("clippy for the BPF crate (package {CLIPPY_PACKAGE})"), CLIPPY_PACKAGE);
            }
            // rustup's toolchains belong to the user.
            Compiler::Nightly => self.descriptions.push(
                "clippy for the BPF crate (rustup component add clippy --toolchain nightly)".to_owned(),
            ),
        }
    }

    fn add(&mut self, thing: String, package: &'static str) {
        self.descriptions.push(thing);
        if !self.packages.contains(&package) {
            self.packages.push(package);
        }
    }

    const fn is_empty(&self) -> bool {
        self.descriptions.is_empty()
    }

    fn install(&self, host: &Host, purposes: &[Purpose]) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if !self.packages.is_empty() {
            let packages: Vec<_> = self.packages.iter().copied().map(str::to_owned).collect();
            install_packages(host, &packages).with_context(|| format!("missing: {self}"))?;
        }
        if needs_toolchain(purposes) {
            let survey = Survey::new(host);
            if survey.toolchain().is_err() {
                install_linker(host, &survey)?;
            }
        }
        for CargoTool { program, version, arguments, .. } in &self.cargo_tools {
            print_status(format_args!("building {program}: this takes some minutes"));
            let mut install = cargo("install");
            install.args([program, "--version", version, "--locked", "--quiet"]).args(*arguments);
            execute(&mut install).with_context(|| format!("failed to build {program}"))?;
        }
        let left = Self::find(host, purposes);
        if !left.is_empty() {
            bail!("still missing after setup: {left}");
        }
        Ok(())
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.descriptions.join(". Also "))
    }
}

/// Reports whether one of the purposes compiles or lints the BPF programs.
fn needs_toolchain(purposes: &[Purpose]) -> bool {
    purposes.iter().any(|purpose| matches!(purpose, Purpose::Ebpf | Purpose::Lint))
}

/// Builds bpf-linker with the LLVM version of Debian's compiler, which changes within a Debian release.
fn install_linker(host: &Host, survey: &Survey) -> Result<()> {
    let llvm = survey
        .debian
        .clone()?
        .with_context(|| format!("failed to determine the LLVM version of {}", Compiler::Debian))?;
    if !host.file(&format!("/usr/lib/llvm-{llvm}/lib/libLLVM.so")).exists() {
        install_packages(host, &[format!("llvm-{llvm}-dev")])?;
    }
    print_status("building bpf-linker: this takes a minute");
    execute(&mut linker_install(llvm)).context("failed to build bpf-linker")
}

fn install_packages(host: &Host, packages: &[String]) -> Result<()> {
    if host.find("apt-get").is_none() {
        bail!("setup supports only Debian-based systems; needed packages: {}", packages.join(", "));
    }
    if !Uid::effective().is_root() {
        bail!("run as root, or run `apt-get install {}`", packages.join(" "));
    }
    apt::install(packages)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use super::*;

    const FOR_TESTS: [&str; 14] = [
        "containernetworking-plugins",
        "iproute2",
        "iptables",
        "nftables",
        "bpftool",
        "util-linux",
        "passt",
        "slirp4netns",
        "curl",
        "minisign",
        "openssl",
        "rpm",
        "shellcheck",
        "skopeo",
    ];
    const ALL: [Purpose; 4] = [Purpose::Build, Purpose::Ebpf, Purpose::Test, Purpose::Lint];

    /// Creates a machine on which programs at these paths exist and do nothing.
    fn host(root: &Path, programs: &[&str]) -> Host {
        for path in programs.iter().map(|program| root.join(program)) {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink("/bin/true", &path).unwrap();
        }
        Host::below(root)
    }

    #[test]
    fn empty_machine_lacks_all_packages() {
        let root = tempfile::tempdir().unwrap();
        let missing = Missing::find(&host(root.path(), &[]), &ALL);
        let mut expected = DEBIAN_PACKAGES.to_vec();
        expected.extend([CLIPPY_PACKAGE, "python3"]);
        expected.extend(FOR_TESTS);
        assert_eq!(missing.packages, expected);
        assert!(!missing.to_string().contains('\n'), "{missing}");
    }

    #[test]
    fn purposes_need_only_their_packages() {
        let root = tempfile::tempdir().unwrap();
        let core = root.path().join("usr/lib/rustlib/bpfel-unknown-none/lib");
        fs::create_dir_all(core).unwrap();
        let host = host(root.path(), &["usr/bin/rustc", "usr/bin/cargo", "bin/bpf-linker"]);
        assert!(Missing::find(&host, &[Purpose::Build, Purpose::Ebpf]).is_empty());
        assert_eq!(Missing::find(&host, &[Purpose::Lint]).packages, [CLIPPY_PACKAGE, "python3"]);
        assert_eq!(Missing::find(&host, &[Purpose::Test]).packages, FOR_TESTS);
        let for_machines = Missing::find(&host, &[Purpose::Vm]).packages;
        assert!(for_machines.contains(&"bpftool") && for_machines.contains(&"xz-utils"));
    }

    #[test]
    fn agent_and_demo_need_no_bpf_toolchain() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path(), &[]);
        assert!(Missing::find(&host, &[Purpose::Build]).is_empty());
        assert_eq!(Missing::find(&host, &[Purpose::Demo]).packages, ["iproute2"]);
        assert_eq!(Missing::find(&host, &[Purpose::Test]).packages, FOR_TESTS);
    }

    #[test]
    fn missing_linker_needs_no_compiler() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("usr/lib/rustlib/bpfel-unknown-none/lib")).unwrap();
        let host = host(root.path(), &["usr/bin/rustc", "usr/bin/cargo"]);
        let missing = Missing::find(&host, &[Purpose::Ebpf]);
        assert!(missing.packages.is_empty(), "{missing:?}");
        assert!(missing.to_string().contains("bpf-linker is neither"), "{missing}");
    }
}

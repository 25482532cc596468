//! Access to Debian's archive with a separate apt configuration: its own suites, and the machine's mirror, proxy and
//! keyring.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt,
    arch::Arch,
    workspace::{execute, output_of},
};

const KERNEL_PACKAGES: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists of one suite and architecture in a separate directory. apt checks their signatures and the hash of every package.
pub(super) struct Archive {
    config: PathBuf,
    dir: PathBuf,
    suite: &'static str,
    /// Error messages of apt about lists that it failed to download.
    complaints: String,
}

impl Archive {
    /// Downloads the package lists of `suite` for `arch` to `dir`.
    pub(super) fn open(dir: &Path, suite: &'static str, arch: Arch) -> Result<Self> {
        for directory in ["state/lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(dir.join(directory)).context("failed to create apt's directories")?;
        }
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text)
                .with_context(|| format!("failed to write {}", path.display()))
                .map(|()| path)
        };
        write("status", String::new())?;
        write("sources.list", Mirrors::from_apt_sources()?.sources(suite, arch))?;
        let dump = output_of(Command::new("apt-config").arg("dump"))?;
        let config = write("apt.conf", configuration(dir, arch, &dump))?;
        let mut archive = Self { config, dir: dir.to_owned(), suite, complaints: String::new() };
        let update = archive.apt("apt-get").arg("update").output().context("failed to start apt-get")?;
        archive.complaints = String::from_utf8_lossy(&update.stderr).into_owned();
        Ok(archive)
    }

    /// Returns the packages of the newest kernel of this flavour, such as `cloud-amd64`.
    pub(super) fn kernel(&self, flavour: &str) -> Result<Vec<String>> {
        let mut packages: Vec<String> = Vec::new();
        let meta_package = format!("linux-image-{flavour}");
        let mut asked = meta_package.clone();
        for next in 0.. {
            let answer = output_of(self.apt("apt-cache").args(["depends", &asked]));
            let answer = answer.with_context(|| {
                let complaints = self.complaints.trim().replace('\n', " ");
                format!("failed to get the suite {} from apt's mirror: {complaints}", self.suite)
            })?;
            for package in dependencies(&answer).filter(|package| is_kernel(package)) {
                if packages.iter().all(|known| known != package) {
                    packages.push(package.to_owned());
                }
            }
            match packages.get(next) {
                Some(package) => asked.clone_from(package),
                None => break,
            }
        }
        if packages.is_empty() {
            bail!("{meta_package} of the suite {} depends on no kernel", self.suite);
        }
        Ok(packages)
    }

    /// Downloads packages and unpacks them below `root`.
    pub(super) fn unpack(&self, packages: &[String], root: &Path) -> Result<()> {
        let dir = self.dir.join("packages");
        output_of(self.apt("apt-get").arg("download").args(packages).current_dir(&dir))?;
        apt::unpack(&dir, root)
    }

    /// Downloads packages with all packages on which they depend, and unpacks them below `root`.
    pub(super) fn unpack_closure(&self, packages: &[&str], root: &Path) -> Result<()> {
        let mut install = self.apt("apt-get");
        install.args(["install", "--yes", "--no-install-recommends", "--download-only"]);
        execute(install.args(packages).stdout(Stdio::null()))?;
        apt::unpack(&self.dir.join("cache/archives"), root)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }
}

/// Returns the configuration of a separate apt below `dir`. Copies only download settings from the machine's
/// configuration (`dump`), because its hooks must not run.
fn configuration(dir: &Path, arch: Arch, dump: &str) -> String {
    let is_about_downloading =
        |line: &&str| line.starts_with("Acquire::") && !line.starts_with("Acquire::IndexTargets");
    let (dir, arch) = (dir.display(), arch.debian());
    let own = format!(
        r#"Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::SourceList "{dir}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State "{dir}/state";
Dir::State::Status "{dir}/status";
Dir::Cache "{dir}/cache";
APT::Architecture "{arch}";
APT::Architectures "{arch}";
APT::Sandbox::User "";
Acquire::Languages "none";
"#
    );
    own + &dump.lines().filter(is_about_downloading).collect::<Vec<_>>().join("\n") + "\n"
}

/// Debian mirrors in the machine's apt sources.
#[derive(Debug, Eq, PartialEq)]
struct Mirrors {
    main: String,
    security: Option<String>,
}

impl Mirrors {
    fn from_apt_sources() -> Result<Self> {
        let mut targets = Command::new("apt-get");
        targets.args(["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]);
        Self::parse(&output_of(&mut targets)?)
            .context("no Debian mirror in apt's sources: add one and run `apt-get update`")
    }

    /// Parses lines with a label and a URI.
    fn parse(targets: &str) -> Option<Self> {
        let labeled = |name: &str| {
            let mut targets = targets.lines().filter_map(|line| line.split_once(' '));
            targets.find(|(label, _)| *label == name).map(|(_, uri)| uri.trim().to_owned())
        };
        Some(Self { main: labeled("Debian")?, security: labeled("Debian-Security") })
    }

    fn sources(&self, suite: &str, arch: Arch) -> String {
        let arch = arch.debian();
        let line = |mirror: &str, suite: &str| {
            format!("deb [arch={arch} signed-by={KEYRING}] {mirror} {suite} main\n")
        };
        // Neither sid nor backports have separate security updates.
        let security = self.security.as_ref().filter(|_| suite != "sid" && !suite.ends_with("-backports"));
        line(&self.main, suite)
            + &security.map(|mirror| line(mirror, &format!("{suite}-security"))).unwrap_or_default()
    }
}

/// Returns the dependencies in the output of `apt-cache depends`.
fn dependencies(answer: &str) -> impl Iterator<Item = &str> {
    answer.lines().filter_map(|line| line.trim_start().strip_prefix("Depends: "))
}

/// Reports whether a package is a kernel of one version, or a part of it.
fn is_kernel(package: &str) -> bool {
    KERNEL_PACKAGES.iter().any(|prefix| {
        package
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_recognized_by_label() {
        let targets = "nodistro https://deb.example/node\n\
                       Debian http://mirror.example/debian/\n\
                       Debian http://mirror.example/updates/\n\
                       Debian-Security http://mirror.example/debian-security/\n";
        let mirrors = Mirrors::parse(targets).unwrap();
        let sources = mirrors.sources("bullseye", Arch::Arm64);
        assert!(sources.contains("http://mirror.example/debian/ bullseye main\n"), "{sources}");
        assert!(sources.contains("[arch=arm64 "), "{sources}");
        assert!(
            sources.contains("http://mirror.example/debian-security/ bullseye-security main\n"),
            "{sources}"
        );
        assert_eq!(mirrors.sources("sid", Arch::Amd64).lines().count(), 1);
        assert_eq!(Mirrors::parse("Ubuntu http://mirror.example/ubuntu/\n"), None);
    }

    #[test]
    fn kernel_packages_of_one_version() {
        let answer = "\
linux-image-cloud-amd64
  Depends: linux-image-7.2.13+deb14-cloud-amd64
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
    dracut
  Depends: linux-base
  Replaces: linux-image-7.2.12+deb14-cloud-amd64
";
        let kernels: Vec<_> = dependencies(answer).filter(|package| is_kernel(package)).collect();
        assert_eq!(kernels, ["linux-image-7.2.13+deb14-cloud-amd64"]);
    }

    #[test]
    fn only_download_settings_are_kept() {
        let dump = "Acquire::http::Proxy \"http://proxy.example\";\nDPkg::Post-Invoke:: \"rm\";\n\
                    Acquire::IndexTargets::deb::DEP-11::MetaKey \"x\";\n";
        let configuration = configuration(Path::new("/cache"), Arch::Arm64, dump);
        assert!(
            configuration.ends_with("Acquire::http::Proxy \"http://proxy.example\";\n"),
            "{configuration}"
        );
        for line in ["Dir::State \"/cache/state\";\n", "APT::Architecture \"arm64\";\n"] {
            assert!(configuration.contains(line), "{configuration}");
        }
    }
}

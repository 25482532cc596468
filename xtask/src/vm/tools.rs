//! QEMU and programs for its machines. Missing ones are unpacked in the cache and not installed, because Debian's QEMU
//! may conflict with an installed package.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use imds_ebpf_build::Host;

use super::archive::Archive;
use crate::{apt, cache, workspace::print_status};

const QEMU: &str = "qemu-system-x86_64";
/// Programs and their Debian packages.
const PROGRAMS: [(&str, &str); 2] = [(QEMU, "qemu-system-x86"), ("busybox", "busybox-static")];
/// A version of iproute2 that supports netkit devices and runs with the libraries of Debian 12, and its suite.
const IPROUTE2: (&str, &str) = ("iproute2", "bookworm-backports");
/// Device type that older versions of `ip` do not list.
const NEWEST_KIND: &str = "netkit";
const BINARIES: [&str; 4] = ["usr/bin", "bin", "usr/sbin", "sbin"];
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Programs of this machine and in the cache.
#[derive(Debug)]
pub(super) struct Tools {
    host: Host,
    unpacked: PathBuf,
    /// Directory of programs that take precedence over the machine's.
    newer: Option<PathBuf>,
}

impl Tools {
    /// Downloads programs that are neither installed nor in `cache`.
    pub(super) fn get(cache: &Path) -> Result<Self> {
        let mut tools = Self { host: Host::current(), unpacked: cache.join("tools"), newer: None };
        let lacking: Vec<_> = PROGRAMS
            .into_iter()
            .filter(|(program, _)| tools.find(program).is_err())
            .map(|(_, package)| package.to_owned())
            .collect();
        if !lacking.is_empty() {
            apt::unpack_to_cache(&lacking, &tools.unpacked)?;
        }
        if !tools.knows_newest_kind()? {
            tools.newer = Some(get_iproute2(cache)?);
        }
        Ok(tools)
    }

    /// Reports whether this machine's `ip` has options for [`NEWEST_KIND`].
    fn knows_newest_kind(&self) -> Result<bool> {
        let help = Command::new(self.find("ip")?).args(["link", "help"]).output();
        let help = help.context("failed to start ip")?;
        Ok([help.stdout, help.stderr].iter().any(|text| String::from_utf8_lossy(text).contains(NEWEST_KIND)))
    }

    /// Returns the path of a program.
    pub(super) fn find(&self, program: &str) -> Result<PathBuf> {
        let below = |root: &PathBuf| {
            BINARIES.map(|dir| root.join(dir).join(program)).into_iter().find(|path| path.is_file())
        };
        let newer = self.newer.as_ref().and_then(below);
        let found = newer.or_else(|| self.host.find(program)).or_else(|| below(&self.unpacked));
        found.with_context(|| format!("{program} is not installed"))
    }

    /// Returns a command that runs QEMU with its libraries and firmware.
    pub(super) fn qemu(&self) -> Result<Command> {
        let path = self.find(QEMU)?;
        let mut command = Command::new(&path);
        if path.starts_with(&self.unpacked) {
            let libraries = LIBRARIES.map(|dir| self.unpacked.join(dir));
            command.env(
                "LD_LIBRARY_PATH",
                env::join_paths(libraries).context("failed to build the library path")?,
            );
            for firmware in ["qemu", "seabios"] {
                command.arg("-L").arg(self.unpacked.join("usr/share").join(firmware));
            }
        }
        Ok(command)
    }
}

/// Downloads [`IPROUTE2`] if it is missing in `cache`, and returns its directory.
fn get_iproute2(cache: &Path) -> Result<PathBuf> {
    let (package, suite) = IPROUTE2;
    let dir = cache.join(package);
    if !dir.exists() {
        print_status(format_args!("downloading {package} of {suite} to {}", dir.display()));
        cache::make(&dir, |root, staging| {
            Archive::open(&staging.join("apt"), suite)?.unpack(&[package.to_owned()], root)
        })
        .with_context(|| format!("failed to get {package} of {suite}"))?;
    }
    Ok(dir)
}

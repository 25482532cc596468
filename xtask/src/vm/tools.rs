//! QEMU and what runs in its machines. What this machine lacks is unpacked in the cache: nothing is installed, as
//! Debian's QEMU may conflict with something that is.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use imds_ebpf_build::Host;

use super::archive::unpack;
use crate::{apt, cache, workspace::say};

const QEMU: &str = "qemu-system-x86_64";
/// Programs, and Debian's packages that have them.
const PROGRAMS: [(&str, &str); 2] = [(QEMU, "qemu-system-x86"), ("busybox", "busybox-static")];
const BINARIES: [&str; 2] = ["usr/bin", "bin"];
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The programs of this machine, and those in the cache.
#[derive(Debug)]
pub(super) struct Tools {
    host: Host,
    unpacked: PathBuf,
}

impl Tools {
    /// Downloads what is neither here nor in `cache`.
    pub(super) fn get(cache: &Path) -> Result<Self> {
        let tools = Self { host: Host::current(), unpacked: cache.join("tools") };
        let lacking: Vec<_> = PROGRAMS
            .into_iter()
            .filter(|(program, _)| tools.find(program).is_err())
            .map(|(_, package)| package.to_owned())
            .collect();
        if !lacking.is_empty() {
            let names = lacking.join(" and ");
            say(format_args!("downloading {names} to {}", tools.unpacked.display()));
            cache::make(&tools.unpacked, |root, staging| {
                let packages = staging.join("packages");
                apt::download(&lacking, &packages)?;
                unpack(&packages, root)
            })
            .with_context(|| format!("could not get {names}"))?;
        }
        Ok(tools)
    }

    /// The program of that name.
    pub(super) fn find(&self, program: &str) -> Result<PathBuf> {
        let unpacked = || BINARIES.map(|dir| self.unpacked.join(dir).join(program)).into_iter();
        let found = self.host.find(program).or_else(|| unpacked().find(|path| path.is_file()));
        found.with_context(|| format!("there is no {program}"))
    }

    /// QEMU, with its libraries and its firmware.
    pub(super) fn qemu(&self) -> Result<Command> {
        let path = self.find(QEMU)?;
        let mut command = Command::new(&path);
        if path.starts_with(&self.unpacked) {
            let libraries = LIBRARIES.map(|dir| self.unpacked.join(dir));
            command.env("LD_LIBRARY_PATH", env::join_paths(libraries).context("no path of libraries")?);
            for firmware in ["qemu", "seabios"] {
                command.arg("-L").arg(self.unpacked.join("usr/share").join(firmware));
            }
        }
        Ok(command)
    }
}

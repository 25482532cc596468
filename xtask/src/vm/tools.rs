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
use crate::{apt, arch::Arch, cache, workspace::print_status};

/// A version of iproute2 that supports netkit devices and runs with the libraries of Debian 12, and its suite.
const IPROUTE2: (&str, &str) = ("iproute2", "bookworm-backports");
/// Device type that older versions of `ip` do not list.
const NEWEST_KIND: &str = "netkit";
/// Packages with the programs of a machine of another architecture, and their suite.
const FOREIGN_PACKAGES: [&str; 8] =
    ["apparmor", "bpftool", "busybox-static", "dash", "iproute2", "nftables", "secilc", "util-linux"];
/// Programs of a machine of this architecture with their packages, which are unpacked in the cache if they are missing.
const PROGRAMS: [(&str, &str); 3] =
    [("apparmor_parser", "apparmor"), ("busybox", "busybox-static"), ("secilc", "secilc")];
const FOREIGN_SUITE: &str = "trixie";
const BINARIES: [&str; 4] = ["usr/bin", "bin", "usr/sbin", "sbin"];

/// Programs of this machine and in the cache.
#[derive(Debug)]
pub(super) struct Tools {
    /// Architecture of the virtual machines.
    pub(super) arch: Arch,
    qemu: &'static str,
    /// QEMU's emulator of single programs, for another architecture.
    emulator: Option<&'static str>,
    host: Host,
    unpacked: PathBuf,
    /// Directory of programs that take precedence over the machine's.
    newer: Option<PathBuf>,
    /// Root directory of the programs of another architecture.
    foreign: Option<PathBuf>,
}

impl Tools {
    /// Downloads programs for machines of this architecture that are neither installed nor in `cache`.
    pub(super) fn get(arch: Arch, cache: &Path) -> Result<Self> {
        let (qemu, qemu_package, emulator) = match arch {
            Arch::Amd64 => ("qemu-system-x86_64", "qemu-system-x86", "qemu-x86_64-static"),
            Arch::Arm64 => ("qemu-system-aarch64", "qemu-system-arm", "qemu-aarch64-static"),
        };
        let is_foreign = arch.is_foreign();
        let mut tools = Self {
            arch,
            qemu,
            emulator: is_foreign.then_some(emulator),
            host: Host::current(),
            unpacked: cache.join(if is_foreign { "tools-foreign" } else { "tools" }),
            newer: None,
            foreign: None,
        };
        let others = if is_foreign { &[(emulator, "qemu-user-static")][..] } else { &PROGRAMS };
        let mut needed: Vec<_> = [(qemu, qemu_package)].into_iter().chain(others.iter().copied()).collect();
        needed.retain(|(program, _)| tools.host.find(program).is_none());
        if needed.iter().any(|(program, _)| program_below(&tools.unpacked, program).is_none()) {
            let packages: Vec<_> = needed.into_iter().map(|(_, package)| package.to_owned()).collect();
            apt::unpack_to_cache(&packages, &tools.unpacked)?;
        }
        if is_foreign {
            let dir = cache.join("programs").join(arch.debian());
            download(&dir, FOREIGN_SUITE, arch, |archive, root| {
                archive.unpack_closure(&FOREIGN_PACKAGES, root)
            })?;
            tools.foreign = Some(dir);
        } else if !tools.knows_newest_kind()? {
            let (package, suite) = IPROUTE2;
            let dir = cache.join(package);
            download(&dir, suite, arch, |archive, root| archive.unpack(&[package.to_owned()], root))?;
            tools.newer = Some(dir);
        }
        Ok(tools)
    }

    /// Reports whether this machine's `ip` has options for [`NEWEST_KIND`].
    fn knows_newest_kind(&self) -> Result<bool> {
        let help = Command::new(self.find("ip")?).args(["link", "help"]).output();
        let help = help.context("failed to start ip")?;
        Ok([help.stdout, help.stderr].iter().any(|text| String::from_utf8_lossy(text).contains(NEWEST_KIND)))
    }

    /// Returns the path of a program that runs on this machine.
    fn find(&self, program: &str) -> Result<PathBuf> {
        let found = self.host.find(program).or_else(|| program_below(&self.unpacked, program));
        found.with_context(|| format!("{program} is not installed"))
    }

    /// Returns the path of a program for the virtual machine.
    pub(super) fn guest_program(&self, program: &str) -> Result<PathBuf> {
        if let Some(root) = &self.foreign {
            return program_below(root, program)
                .with_context(|| format!("{} does not contain {program}: remove it", root.display()));
        }
        let newer = self.newer.as_ref().and_then(|root| program_below(root, program));
        newer.map_or_else(|| self.find(program), Ok)
    }

    /// Returns the path of a library of the virtual machine's programs, or of their dynamic linker. Uses only the file name
    /// of `library`, because distributions have different directories.
    pub(super) fn guest_library(&self, library: &str) -> Option<PathBuf> {
        let root = self.foreign.as_deref().unwrap_or(Path::new("/"));
        let name = Path::new(library).file_name()?;
        let of_arch = format!("lib/{}-linux-gnu", self.arch.machine());
        let roots = [root, self.foreign.as_deref().unwrap_or(&self.unpacked)];
        let mut paths = roots.into_iter().flat_map(|root| {
            let below = |dir: &str| [root.join(dir).join(name), root.join("usr").join(dir).join(name)];
            [&*of_arch, "lib64", "lib"].into_iter().flat_map(below)
        });
        paths.find(|path| path.is_file())
    }

    /// Returns a command that runs a program for the virtual machine on this machine.
    pub(super) fn emulated(&self, program: &Path) -> Result<Command> {
        let Some(emulator) = self.emulator else { return Ok(Command::new(program)) };
        let mut command = Command::new(self.find(emulator)?);
        command.arg(program);
        Ok(command)
    }

    /// Returns a command that runs QEMU with its libraries and firmware.
    pub(super) fn qemu(&self) -> Result<Command> {
        let mut command = self.command(self.qemu)?;
        if Path::new(command.get_program()).starts_with(&self.unpacked) {
            for firmware in ["qemu", "seabios"] {
                command.arg("-L").arg(self.unpacked.join("usr/share").join(firmware));
            }
        }
        Ok(command)
    }

    /// Returns a command that runs a program of this machine, or one of the cache with its libraries.
    pub(super) fn command(&self, program: &str) -> Result<Command> {
        let path = self.find(program)?;
        let mut command = Command::new(&path);
        if path.starts_with(&self.unpacked) {
            let triplet = format!("lib/{}-linux-gnu", env::consts::ARCH);
            let libraries = [self.unpacked.join("usr").join(&triplet), self.unpacked.join(&triplet)];
            command.env(
                "LD_LIBRARY_PATH",
                env::join_paths(libraries).context("failed to build the library path")?,
            );
        }
        Ok(command)
    }
}

fn program_below(root: &Path, program: &str) -> Option<PathBuf> {
    BINARIES.map(|dir| root.join(dir).join(program)).into_iter().find(|path| path.is_file())
}

/// Downloads programs to `dir` of the cache if it is missing. `unpack` gets the archive and the directory.
fn download(
    dir: &Path,
    suite: &'static str,
    arch: Arch,
    unpack: impl FnOnce(&Archive, &Path) -> Result<()>,
) -> Result<()> {
    if dir.exists() {
        return Ok(());
    }
    print_status(format_args!("downloading programs of {suite} to {}", dir.display()));
    cache::make(dir, |root, staging| unpack(&Archive::open(&staging.join("apt"), suite, arch)?, root))
        .with_context(|| format!("failed to get programs of {suite} for {}", arch.debian()))
}

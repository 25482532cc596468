//! The command `cargo xtask install-check`.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{
    archive::Archive,
    initramfs::Cpio,
    kernels::{Kernel, Line},
    qemu_machine::Machine,
    tools::Tools,
};
use crate::{
    arch::Arch,
    cache, dist,
    setup::{self, Purpose},
    workspace::{artifacts, print_status},
};

const INIT: &[u8] = include_bytes!("install_check_init.sh");
const INSTALL: &[u8] = include_bytes!("install_check.sh");
/// Packages of the machine, with their dependencies: the essential ones of Debian that the installation may use, and iproute2 for the
/// network of a pod.
const PACKAGES: [&str; 16] = [
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "init-system-helpers",
    "iproute2",
    "libc-bin",
    "sed",
    "tar",
    "util-linux",
];
const SUITE: &str = "bookworm";
/// Directories of the packages that the machine does not need.
const LEFT_OUT: [&str; 4] = ["usr/share/doc", "usr/share/i18n", "usr/share/locale", "usr/share/man"];
/// Longest time from the artifact to a successful `imds-agent verify`.
const LIMIT: Duration = Duration::from_mins(1);
/// Time limit of the machine.
const TIMEOUT: Duration = Duration::from_mins(10);

/// Install the tarball and the .deb on machines with Debian's essential packages only, up to a successful `imds-agent verify`
///
/// Fails if one takes longer than a minute on the clock of the machine, which executes 250 million instructions per second.
#[derive(clap::Args)]
pub(crate) struct InstallCheck {
    /// Architecture of the machine [default: this machine's]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Kernel of the machine
    #[arg(long, value_enum, value_name = "VERSION", default_value = "6.1")]
    kernel: Line,
    /// Install the existing artifacts in target/dist
    #[arg(long)]
    no_build: bool,
}

impl InstallCheck {
    pub(crate) fn run(self) -> Result<()> {
        let arch = self.arch.map_or_else(Arch::host, Ok)?;
        setup::ensure(Purpose::Vm)?;
        let cache = cache::dir()?;
        let tools = Tools::get(arch, &cache)?;
        let kernel = Kernel::get(self.kernel, arch, &cache, false)?;
        let artifacts_dir = if self.no_build { dist::dir(arch)? } else { dist::build(arch)? };
        let root = cache.join("debian-essential").join(arch.debian());
        if !root.exists() {
            print_status(format_args!("downloading Debian's essential packages to {}", root.display()));
            cache::make(&root, |root, staging| {
                Archive::open(&staging.join("apt"), SUITE, arch)?.unpack_closure(&PACKAGES, root)
            })?;
        }
        let times = boot(&tools, &kernel, &archive(&tools, &kernel, &root, &artifacts_dir)?)?;
        for kind in ["tarball", "deb"] {
            let Some(time) = times.get(kind) else { bail!("the {kind} was not verified: see the console") };
            let seconds = time.as_secs_f32();
            print_status(format_args!("{} {kind}: verified after {seconds:.1} s", arch.debian()));
            if *time > LIMIT {
                bail!("the {kind} took longer than {} s", LIMIT.as_secs());
            }
        }
        Ok(())
    }
}

fn archive(tools: &Tools, kernel: &Kernel, root: &Path, dir: &Path) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    cpio.add("init", INIT);
    cpio.add("install", INSTALL);
    cpio.copy_program("tools/busybox", &tools.guest_program("busybox")?, tools)?;
    cpio.add_modules(kernel)?;
    for (name, suffix) in [("imds-agent.tar.gz", ".tar.gz"), ("imds-agent.deb", ".deb")] {
        cpio.copy(&format!("artifacts/{name}"), &dist::artifact(dir, suffix)?)?;
    }
    add_tree(&mut cpio, root, root)?;
    Ok(cpio.finish())
}

/// Adds the files, directories and symbolic links of `dir`, by their paths below `root`.
fn add_tree(cpio: &mut Cpio, root: &Path, dir: &Path) -> Result<()> {
    let failed = || format!("failed to read {}", dir.display());
    for entry in fs::read_dir(dir).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let metadata = path.symlink_metadata().with_context(failed)?;
        if metadata.is_symlink() {
            cpio.add_symlink(&name, &fs::read_link(&path).with_context(failed)?.to_string_lossy());
        } else if metadata.is_dir() && !LEFT_OUT.contains(&name.as_str()) {
            cpio.add_directory(&name);
            add_tree(cpio, root, &path)?;
        } else if metadata.is_file() && metadata.permissions().mode() & 0o400 != 0 {
            cpio.copy(&name, &path)?;
        }
    }
    Ok(())
}

/// Runs the machine, and returns the time of each installation.
fn boot(tools: &Tools, kernel: &Kernel, archive: &[u8]) -> Result<BTreeMap<String, Duration>> {
    let dir = artifacts("vm")?.join(tools.arch.debian());
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let (initramfs, log) = (dir.join("install-check.cpio"), dir.join("install-check.log"));
    fs::write(&initramfs, archive).with_context(|| format!("failed to write {}", initramfs.display()))?;
    print_status(format_args!("kernel {} starts; its console is {}", kernel.release, log.display()));
    let machine = Machine {
        kernel: &kernel.vmlinuz,
        initramfs: &initramfs,
        accel: "tcg",
        boot: "",
        log: &log,
        timeout: TIMEOUT,
    };
    let mut times = Times::default();
    machine.run(tools, |line| times.read(line))?;
    Ok(times.verified)
}

/// Times on the machine's clock, which counts instructions, so that other load of the host does not matter.
#[derive(Debug, Default)]
struct Times {
    /// Time since the boot at which the installation of a kind began.
    started: BTreeMap<String, Duration>,
    /// Duration of each installation up to a successful `imds-agent verify`.
    verified: BTreeMap<String, Duration>,
}

impl Times {
    /// Reads a line of the console.
    fn read(&mut self, line: &str) {
        let mut words = line.split(' ');
        let (Some(event), Some(kind), Some(seconds)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        let Some(now) = seconds.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        else {
            return;
        };
        if event == "@install" {
            self.started.insert(kind.to_owned(), now);
        } else if event == "@verified"
            && let Some(&started) = self.started.get(kind)
        {
            self.verified.insert(kind.to_owned(), now.saturating_sub(started));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_between_two_lines() {
        let mut times = Times::default();
        for line in [
            "@verified deb 9.0",
            "@install deb 10.50",
            "@install deb -1",
            "@install tarball 1",
            "@verified deb 12.75",
        ] {
            times.read(line);
        }
        assert_eq!(times.verified, BTreeMap::from([("deb".to_owned(), Duration::from_millis(2250))]));
    }
}

//! Debian's kernels, downloaded once.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use super::archive::Archive;
use crate::{arch::Arch, cache, workspace::print_status};

/// A kernel series that is tested.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub(super) enum Line {
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    /// With real-time preemption.
    #[value(name = "6.12-rt")]
    V6_12Rt,
    /// With pages of 16 KiB, for arm64 only.
    #[value(name = "6.12-16k")]
    V6_12Pages16k,
    #[value(name = "7")]
    V7,
    /// The kernel of this machine, which is not emulated.
    #[value(name = "this")]
    This,
}

impl Line {
    /// Kernels for virtual machines, one of each series.
    pub(super) const DEBIANS: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::V7];

    /// Returns the Debian suite that has this kernel.
    const fn suite(self) -> Option<&'static str> {
        match self {
            Self::V5_10 => Some("bullseye"),
            Self::V6_1 => Some("bookworm"),
            Self::V6_12 | Self::V6_12Rt | Self::V6_12Pages16k => Some("trixie"),
            Self::V7 => Some("sid"),
            Self::This => None,
        }
    }

    /// Returns the end of the names of this kernel's packages.
    fn flavour(self, arch: Arch) -> String {
        match self {
            Self::V6_12Rt => format!("rt-{}", arch.debian()),
            Self::V6_12Pages16k => format!("{}-16k", arch.debian()),
            Self::V5_10 | Self::V6_1 | Self::V6_12 | Self::V7 | Self::This => {
                format!("cloud-{}", arch.debian())
            }
        }
    }

    /// Returns the features that the agent must use on this kernel, by the names of guest.sh. TCX exists since 6.6,
    /// netns cookies of sockets since 5.14, and netns cookies in TC programs since 6.13.
    pub(super) fn takes(self) -> Vec<(&'static str, &'static str)> {
        let (attach_mode, node, node_egress) = match self {
            Self::V5_10 => ("clsact", "initial namespace", "ifindex"),
            Self::V6_1 => ("clsact", "cookie", "ifindex"),
            Self::V6_12 | Self::V6_12Rt | Self::V6_12Pages16k => ("tcx", "cookie", "ifindex"),
            Self::V7 => ("tcx", "cookie", "cookie"),
            Self::This => return Vec::new(),
        };
        vec![
            ("attach_mode", attach_mode),
            ("node", node),
            ("node_egress", node_egress),
            ("events", "ringbuf"),
        ]
    }

    /// Reports whether the kernel lacks a feature that a test needs.
    pub(super) const fn may_skip(self) -> bool {
        !matches!(self, Self::V7)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().expect("no variant is skipped").get_name())
    }
}

/// A kernel that is unpacked in the cache.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) line: Line,
    pub(super) release: String,
    pub(super) vmlinuz: PathBuf,
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// Returns the kernel in `cache`. Downloads it if it is missing or `refresh` is set.
    pub(super) fn get(line: Line, arch: Arch, cache: &Path, refresh: bool) -> Result<Self> {
        let dir = cache.join("kernels").join(arch.debian()).join(line.to_string());
        if refresh || !dir.exists() {
            download(line, arch, &dir).with_context(|| format!("failed to get kernel {line}"))?;
        }
        Self::find(line, &dir)
            .with_context(|| format!("{} does not contain a kernel: remove it", dir.display()))
    }

    /// Finds the kernel in either directory layout of Debian's packages.
    fn find(line: Line, dir: &Path) -> Option<Self> {
        let mut entries = ["lib/modules", "usr/lib/modules"]
            .into_iter()
            .filter_map(|modules| fs::read_dir(dir.join(modules)).ok())
            .flatten();
        let modules = entries.next()?.ok()?.path();
        let release = modules.file_name()?.to_str()?.to_owned();
        let vmlinuz = [dir.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let vmlinuz = vmlinuz.into_iter().find(|path| path.is_file())?;
        Some(Self { line, release, vmlinuz, modules })
    }
}

fn download(line: Line, arch: Arch, dir: &Path) -> Result<()> {
    print_status(format_args!("downloading kernel {line} for {}", arch.debian()));
    cache::make(dir, |root, staging| {
        let suite = line.suite().context("no Debian suite has this kernel")?;
        let archive = Archive::open(&staging.join("apt"), suite, arch)?;
        archive.unpack(&archive.kernel(&line.flavour(arch))?, root)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_is_found_in_either_layout() {
        for [vmlinuz, modules] in [
            ["boot/vmlinuz-5.10.0-46-cloud-amd64", "lib/modules/5.10.0-46-cloud-amd64/kernel/net"],
            ["usr/lib/modules/7.2.13+deb14-cloud-amd64/vmlinuz", "usr/lib/modules/7.2.13+deb14-cloud-amd64"],
        ] {
            let root = tempfile::tempdir().unwrap();
            let vmlinuz = root.path().join(vmlinuz);
            fs::create_dir_all(vmlinuz.parent().unwrap()).unwrap();
            fs::create_dir_all(root.path().join(modules)).unwrap();
            assert!(Kernel::find(Line::V7, root.path()).is_none());
            fs::write(&vmlinuz, "").unwrap();
            let kernel = Kernel::find(Line::V7, root.path()).unwrap();
            assert_eq!(kernel.vmlinuz, vmlinuz);
            assert!(kernel.release.ends_with("-cloud-amd64") && kernel.modules.ends_with(&kernel.release));
        }
    }

    #[test]
    fn line_is_named_by_version() {
        assert_eq!(
            Line::value_variants().iter().map(Line::to_string).collect::<Vec<_>>(),
            ["5.10", "6.1", "6.12", "6.12-rt", "6.12-16k", "7", "this"]
        );
    }
}

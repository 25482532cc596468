//! Debian's SELinux policy for the virtual machines, with and without the module of deploy/selinux.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{archive::Archive, tools::Tools};
use crate::{
    arch::Arch,
    cache,
    workspace::{output_of, print_status, root},
};

/// Parameters of the kernel command line. No policy is loaded at first, and nothing is denied until a test loads one.
pub(super) const BOOT: &str = "lsm=lockdown,selinux,bpf selinux=1 enforcing=0";
/// Suite of the policy.
const SUITE: &str = "bookworm";
/// Packages with the policy, and with the converter of its modules.
const PACKAGES: [&str; 2] = ["selinux-policy-default", "policycoreutils"];
const MODULES: &str = "usr/share/selinux/default";
const CONVERTER: &str = "usr/libexec/selinux/hll/pp";
/// Modules that the package disables when it is installed (its script `postinst`).
const DISABLED: [&str; 17] = [
    "amtu",
    "bugzilla",
    "cobbler",
    "condor",
    "cyphesis",
    "git",
    "ksmtuned",
    "likewise",
    "livecd",
    "nessus",
    "numad",
    "oddjob",
    "openca",
    "soundserver",
    "thunderbird",
    "updfstab",
    "usernetctl",
];
/// Newest version of the binary format that Linux 5.10 reads (`POLICYDB_VERSION_MAX`).
const FORMAT: &str = "33";
/// Module of the tests, which is part of both policies.
const TEST_MODULE: &str = "tests/tests/security_modules/distribution.cil";
const SERVICE_MODULE: &str = "deploy/selinux/imds-agent.cil";

/// A policy for the kernel and the file contexts that belong to it.
#[derive(Debug)]
pub(super) struct Policy {
    /// Name of its directory in the virtual machine.
    pub(super) name: &'static str,
    pub(super) binary: PathBuf,
    pub(super) file_contexts: PathBuf,
}

/// Builds Debian's policy in `dir`: alone as `distribution`, and with the module of deploy/selinux as `service`. Downloads it if
/// it is missing in `cache`.
pub(super) fn build(tools: &Tools, cache: &Path, dir: &Path) -> Result<Vec<Policy>> {
    let modules = cached_modules(cache)?;
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let variants = [("distribution", None), ("service", Some(SERVICE_MODULE))];
    let build = |(name, module): (&'static str, Option<&str>)| {
        print_status(format_args!("building the SELinux policy `{name}`"));
        let policy = Policy {
            name,
            binary: dir.join(name).with_extension("policy"),
            file_contexts: dir.join(name).with_extension("contexts"),
        };
        let mut compile = tools.command("secilc")?;
        compile.args(["--policyvers", FORMAT, "--output"]).arg(&policy.binary);
        compile.arg("--filecontext").arg(&policy.file_contexts).args(&modules);
        compile.args([TEST_MODULE].into_iter().chain(module).map(|path| root().join(path)));
        output_of(&mut compile)?;
        Ok(policy)
    };
    variants.into_iter().map(build).collect()
}

/// Returns the modules of Debian's policy in the Common Intermediate Language.
fn cached_modules(cache: &Path) -> Result<Vec<PathBuf>> {
    let dir = cache.join("selinux").join(SUITE);
    if !dir.exists() {
        print_status(format_args!("downloading the SELinux policy of {SUITE} to {}", dir.display()));
        cache::make(&dir, |to, staging| {
            let unpacked = staging.join("unpacked");
            let archive = Archive::open(&staging.join("apt"), SUITE, Arch::host()?)?;
            archive.unpack(&PACKAGES.map(str::to_owned), &unpacked)?;
            convert_modules(&unpacked, to)
        })
        .with_context(|| format!("failed to get the SELinux policy of {SUITE}"))?;
    }
    list(&dir, "cil")
}

/// Converts the enabled modules of the unpacked packages.
fn convert_modules(unpacked: &Path, to: &Path) -> Result<()> {
    let dir = unpacked.join(MODULES);
    output_of(Command::new("bzip2").arg("--decompress").args(list(&dir, "bz2")?))?;
    for module in list(&dir, "pp")? {
        let name = module.file_stem().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| !DISABLED.contains(name)) else { continue };
        let converted = to.join(name).with_extension("cil");
        output_of(Command::new(unpacked.join(CONVERTER)).arg(&module).arg(converted))?;
    }
    Ok(())
}

/// Returns the files in `dir` whose names end with `extension`.
fn list(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let failed = || format!("failed to list {}", dir.display());
    let entries = fs::read_dir(dir).with_context(failed)?;
    let paths = entries.map(|entry| Ok(entry.with_context(failed)?.path()));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    Ok(paths)
}

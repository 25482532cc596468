//! Checks of capabilities, kernel features and limits, before the agent changes anything.

use std::io;

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType},
    sys::{is_map_supported, is_program_supported},
    util::KernelVersion,
};
use caps::{CapSet, Capability};
use nix::sys::{
    resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
    utsname::uname,
};
use thiserror::Error;

#[derive(Debug, Error)]
pub(crate) enum PreflightError {
    #[error("missing {}: run as root, or grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN", .0.join(" and "))]
    Capabilities(Vec<&'static str>),
    #[error(
        "kernel {release} lacks {feature}; imds-agent needs Linux 5.10 or newer, built with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
    )]
    TooOld {
        /// Release of the kernel, from uname(2).
        release: String,
        feature: &'static str,
    },
    /// The kernel has the feature, but denies it to this process.
    #[error(
        "the kernel denies bpf(2) to this process; a container needs CAP_BPF in the initial user namespace, and lockdown or a seccomp profile may forbid it"
    )]
    Forbidden(#[source] io::Error),
    /// The kernel counts BPF maps as locked memory, and the limit cannot be raised.
    #[error(
        "locked memory is limited to {0} bytes, and Linux before 5.11 counts BPF maps as such: lift the limit (LimitMEMLOCK=infinity in a systemd unit) or grant CAP_SYS_RESOURCE"
    )]
    LockedMemory(u64),
}

/// Checks the capabilities that every command needs to access BPF objects.
pub(crate) fn check_capabilities() -> Result<(), PreflightError> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let mut missing = Vec::new();
    // CAP_SYS_ADMIN implies both (capabilities(7)). Without CAP_PERFMON the verifier treats programs as untrusted, and
    // rejects the agent's (bpf_allow_ptr_leaks and related functions, include/linux/bpf.h).
    for (capability, name) in [(Capability::CAP_BPF, "CAP_BPF"), (Capability::CAP_PERFMON, "CAP_PERFMON")] {
        if !has(capability) && !has(Capability::CAP_SYS_ADMIN) {
            missing.push(name);
        }
    }
    if !has(Capability::CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    if missing.is_empty() { Ok(()) } else { Err(PreflightError::Capabilities(missing)) }
}

/// Checks that the kernel has the features that the datapath requires, by probing each one.
pub(crate) fn check_kernel() -> Result<(), PreflightError> {
    // One program type is enough: hooks of a type that is missing are reported as not enforced.
    let cgroup_types = [ProgramType::CgroupSockAddr, ProgramType::CgroupSkb];
    if !cgroup_types.into_iter().any(|program_type| is_program_supported(program_type).unwrap_or(false)) {
        let programs = is_program_supported(ProgramType::SchedClassifier).map_err(errno_of);
        demand("BPF programs for TC", programs)?;
    }
    for (feature, map_type) in [
        ("BPF array maps", MapType::Array),
        ("BPF hash maps", MapType::Hash),
        ("BPF per-CPU hash maps", MapType::PerCpuHash),
    ] {
        demand(feature, is_map_supported(map_type).map_err(|error| error.io_error))?;
    }
    Ok(())
}

/// Raises the limits that 1,000 interfaces would exceed: one descriptor for each, and locked memory for maps and
/// programs before Linux 5.11.
///
/// A failure to raise the limit of open files is not an error, because a later EMFILE names its cause. Locked memory is
/// shared with other processes of the user, and exceeding the limit is reported as EPERM without a cause.
pub(crate) fn lift_limits() -> Result<(), PreflightError> {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::debug!("failed to raise the limit of open files: {errno}");
    }
    if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        log::debug!("failed to raise the limit of locked memory: {errno}");
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        if counts_locked_memory() {
            return Err(PreflightError::LockedMemory(limit));
        }
    }
    Ok(())
}

/// Reports whether the kernel counts maps and programs as locked memory. Since Linux 5.11 they are charged to the
/// cgroup.
pub(crate) fn counts_locked_memory() -> bool {
    KernelVersion::current().is_ok_and(|kernel| kernel < KernelVersion::new(5, 11, 0))
}

fn demand(feature: &'static str, supported: Result<bool, io::Error>) -> Result<(), PreflightError> {
    let too_old = || {
        let release = uname().map(|name| name.release().to_string_lossy().into_owned());
        PreflightError::TooOld { release: release.unwrap_or_else(|_| "(unknown)".to_owned()), feature }
    };
    match supported {
        Ok(true) => Ok(()),
        Ok(false) => Err(too_old()),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(too_old()),
        Err(error) => Err(PreflightError::Forbidden(error)),
    }
}

pub(crate) fn errno_of(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(error) => error.io_error,
        ProgramError::LoadError { io_error, .. } => io_error,
        other => io::Error::other(other),
    }
}

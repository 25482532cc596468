//! Drops all privileges of the process.

use std::{
    fs::{self, File},
    io,
};

use anyhow::{Context as _, Result};
use caps::CapSet;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, chdir, chroot, dup2_stdout, fchdir, setgroups, setresgid, setresuid},
};

/// User and group of the process. The number is in a range that systemd (<https://systemd.io/UIDS-GIDS>: 65536 to 524287) and the
/// subordinate users of `useradd` (from 100000, `SUB_UID_MIN` in login.defs(5)) leave unused.
const USER: u32 = 69_254;

/// Upper limit of open descriptors: two for each of 1,024 connections, and one for each of 4,096 listeners.
const MAX_DESCRIPTORS: u64 = 8192;

/// Directory that exists on every system, under which the new root is mounted for a moment.
const MOUNT_POINT: &str = "/proc";

/// Drops all privileges. If a step fails, the process must end.
pub(crate) fn enter() -> Result<()> {
    close_descriptors()?;
    limit_resources()?;
    change_root()?;
    drop_privileges()?;
    prctl::set_no_new_privs().context("failed to set no_new_privs")?;
    prctl::set_dumpable(false).context("failed to make the process not dumpable")?;
    // The kernel clears the setting when the user changes.
    prctl::set_pdeathsig(Signal::SIGKILL).context("failed to set the signal of the agent's death")
}

/// Closes all descriptors except standard input and standard error. The latter also becomes the standard output.
fn close_descriptors() -> Result<()> {
    dup2_stdout(io::stderr()).context("failed to duplicate standard error")?;
    // SAFETY: only the three standard descriptors are in use in this process so far.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("failed to close descriptors") }
}

fn limit_resources() -> Result<()> {
    // The agent's service protects the agent from the OOM killer, and children inherit that. Fails only without /proc.
    let _unprotected = fs::write("/proc/self/oom_score_adj", "0");
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("failed to forbid core dumps")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("failed to read the limit of descriptors")?;
    let limit = hard.min(MAX_DESCRIPTORS);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).context("failed to limit descriptors")
}

/// Replaces the root directory by an empty read-only file system, and detaches all others.
///
/// Uses chroot(2) instead of `pivot_root(2)`, because the seccomp profiles of Docker and containerd forbid the latter to all
/// containers. The result is the same: after the old root is detached, no path and no descriptor leads to it.
fn change_root() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("failed to create a mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("failed to make all mounts private")?;
    let old = File::open("/").context("failed to open the root directory")?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), MOUNT_POINT, Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=0555"))
        .context("failed to mount an empty file system")?;
    chdir(MOUNT_POINT).context("failed to enter the empty file system")?;
    chroot(".").context("failed to change the root directory")?;
    fchdir(&old).context("failed to return to the old root directory")?;
    match umount2(".", MntFlags::MNT_DETACH) {
        // The initramfs of a machine that runs from it cannot be detached. The empty file system hides it instead, as with
        // switch_root(8).
        Err(Errno::EINVAL) => mount(Some("/"), ".", none, MsFlags::MS_MOVE, none)
            .context("failed to hide the old root directory"),
        detached => detached.context("failed to detach the old root directory"),
    }?;
    chdir("/").context("failed to enter the root directory")
}

/// Drops all capabilities and changes to an unprivileged user.
fn drop_privileges() -> Result<()> {
    caps::clear(None, CapSet::Bounding).context("failed to clear the bounding set of capabilities")?;
    caps::clear(None, CapSet::Ambient).context("failed to clear the ambient capabilities")?;
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setgroups(&[]).context("failed to drop supplementary groups")?;
    setresgid(group, group, group).context("failed to change the group")?;
    setresuid(user, user, user).context("failed to change the user")?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).with_context(|| format!("failed to clear the {set:?} capabilities"))?;
    }
    Ok(())
}

//! A security policy that rejects BPF programs, as a Linux security module does: a seccomp supervisor in the test.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::seccomp;

/// `BPF_PROG_TYPE_SCHED_CLS`.
pub const SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
pub const CGROUP_SOCK_ADDR: u32 = 18;

/// `BPF_PROG_LOAD`.
const PROG_LOAD: u32 = 5;
/// Descriptor of the listener in the process that the policy is for.
const LISTENER: RawFd = 200;
// ioctl(2) requests of include/uapi/linux/seccomp.h.
const NOTIF_RECV: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const NOTIF_SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
/// Lets the system call continue: `SECCOMP_USER_NOTIF_FLAG_CONTINUE` (include/uapi/linux/seccomp.h).
const FLAG_CONTINUE: u32 = 1;

/// A program that a process wants to load.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// A `bpf_prog_type`.
    pub prog_type: u32,
    /// Name of the program.
    pub name: String,
}

/// Programs that a process may not load: bpf(2) fails with `EACCES`.
#[derive(Clone, Debug)]
pub struct ProgramPolicy {
    rejects: fn(&LoadRequest) -> bool,
    is_lifted: Arc<AtomicBool>,
}

impl ProgramPolicy {
    /// A policy against the programs for which `rejects` returns true.
    #[must_use]
    pub fn new(rejects: fn(&LoadRequest) -> bool) -> Self {
        Self { rejects, is_lifted: Arc::default() }
    }

    /// Allows all programs from now on.
    pub fn lift(&self) {
        self.is_lifted.store(true, Ordering::SeqCst);
    }

    /// Puts the process that `command` becomes under the policy. [`ProgramPolicy::supervise`] must follow.
    pub(crate) fn apply(command: &mut Command) {
        // SAFETY: between fork and exec the closure makes system calls only, and allocates nothing.
        unsafe { command.pre_exec(install) };
    }

    /// Answers the calls of the process with this id until it ends.
    pub(crate) fn supervise(&self, pid: u32) {
        let listener = listener_of(pid).expect("descriptor of the seccomp listener");
        let policy = self.clone();
        thread::spawn(move || while policy.answer_next(&listener).is_ok() {});
    }

    fn answer_next(&self, listener: &OwnedFd) -> io::Result<()> {
        let mut ready = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the structure outlives the call.
        check(unsafe { libc::poll(&raw mut ready, 1, -1) })?;
        if ready.revents & libc::POLLIN == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: all bits zero are a value of this structure, which the kernel demands.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one such structure, which outlives the call.
        if unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut notification) } < 0 {
            // The process was killed in between.
            return Ok(());
        }
        let is_rejected = !self.is_lifted.load(Ordering::SeqCst)
            && request(notification.pid, notification.data.args[1])
                .is_ok_and(|request| (self.rejects)(&request));
        let response = libc::seccomp_notif_resp {
            id: notification.id,
            val: 0,
            error: if is_rejected { -libc::EACCES } else { 0 },
            flags: if is_rejected { 0 } else { FLAG_CONTINUE },
        };
        // SAFETY: the kernel reads one such structure, which outlives the call.
        let _killed = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw const response) };
        Ok(())
    }
}

/// Reads the start of `union bpf_attr` in the memory of a process.
fn request(pid: u32, address: u64) -> io::Result<LoadRequest> {
    let mut attr = [0; 64];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut attr, address)?;
    let (prog_type, name) = (u32::from_ne_bytes([attr[0], attr[1], attr[2], attr[3]]), &attr[48..]);
    Ok(LoadRequest { prog_type, name: String::from_utf8_lossy(name).trim_end_matches('\0').to_owned() })
}

fn install() -> io::Result<()> {
    let listener = seccomp::filter(
        libc::SYS_bpf,
        (0, PROG_LOAD),
        libc::SECCOMP_RET_USER_NOTIF,
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
    )?;
    // The copy stays open in the executed program, until the test has taken it over.
    // SAFETY: it takes no pointers.
    check(unsafe { libc::dup2(RawFd::try_from(listener).map_err(io::Error::other)?, LISTENER) })?;
    Ok(())
}

fn listener_of(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let process = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just returned it, so that nothing else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(process).map_err(io::Error::other)?) };
    // SAFETY: it takes no pointers.
    let listener = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), LISTENER, 0) })?;
    // SAFETY: the kernel has just returned it, so that nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(listener).map_err(io::Error::other)?) })
}

fn check<T: Copy + Into<i64>>(result: T) -> io::Result<T> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

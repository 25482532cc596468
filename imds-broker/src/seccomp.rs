//! List of the system calls that the process may make.

use std::io;

use anyhow::{Context as _, Result};
use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long, sock_filter};

/// Value of `arch` in `struct seccomp_data` (include/uapi/linux/audit.h).
const ARCHITECTURE: u32 = if cfg!(target_arch = "aarch64") { 0xc000_00b7 } else { 0xc000_003e };

/// Offsets in `struct seccomp_data` (include/uapi/linux/seccomp.h). Each argument has 8 bytes, lower half first.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// Calls that are allowed with any arguments. None of them opens a file, starts a program or reaches another process.
const ALLOWED: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpeername,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Calls that are allowed if all their arguments pass.
const ALLOWED_WITH: &[(c_long, &[Argument])] = &[
    (libc::SYS_mmap, &[Argument { index: 2, mask: libc::PROT_EXEC as u32, values: &[0] }]),
    (libc::SYS_mprotect, &[Argument { index: 2, mask: libc::PROT_EXEC as u32, values: &[0] }]),
    // TCP only.
    (
        libc::SYS_socket,
        &[
            Argument { index: 0, mask: u32::MAX, values: &[libc::AF_INET as u32, libc::AF_INET6 as u32] },
            // The rest of the type are flags.
            Argument { index: 1, mask: 0xf, values: &[libc::SOCK_STREAM as u32] },
            Argument { index: 2, mask: u32::MAX, values: &[0, libc::IPPROTO_TCP as u32] },
        ],
    ),
];

/// Condition on the lower half of an argument. The kernel ignores the upper half of these arguments.
struct Argument {
    index: u32,
    mask: u32,
    values: &'static [u32],
}

/// Makes the kernel kill the process if it makes a call that is not on the list.
pub(crate) fn forbid_other_calls() -> Result<()> {
    let mut filter = build_filter()?;
    let program = libc::sock_fprog { len: u16::try_from(filter.len())?, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter outlive the call, which copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("failed to set the seccomp filter")
    }
}

fn build_filter() -> Result<Vec<sock_filter>> {
    let allow = statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW);
    let kill = statement(BPF_RET | BPF_K, libc::SECCOMP_RET_KILL_PROCESS);
    let mut filter = vec![load(ARCHITECTURE_OFFSET), jump_if(ARCHITECTURE, 1, 0), kill, load(NUMBER_OFFSET)];
    for &call in ALLOWED {
        filter.extend([jump_if(u32::try_from(call)?, 0, 1), allow]);
    }
    for &(call, arguments) in ALLOWED_WITH {
        let mut checks = Vec::new();
        for argument in arguments {
            checks.push(load(ARGUMENTS_OFFSET + 8 * argument.index));
            checks.push(statement(BPF_ALU | BPF_AND | BPF_K, argument.mask));
            for (index, &value) in argument.values.iter().enumerate() {
                // To the statement after `kill`.
                checks.push(jump_if(value, u8::try_from(argument.values.len() - index)?, 0));
            }
            checks.push(kill);
        }
        checks.push(allow);
        filter.push(jump_if(u32::try_from(call)?, 0, u8::try_from(checks.len())?));
        filter.extend(checks);
    }
    filter.push(kill);
    Ok(filter)
}

const fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

const fn jump_if(value: u32, if_equal: u8, if_not: u8) -> sock_filter {
    sock_filter { jt: if_equal, jf: if_not, ..statement(BPF_JMP | BPF_JEQ | BPF_K, value) }
}

const fn statement(code: u32, k: u32) -> sock_filter {
    #[expect(clippy::cast_possible_truncation, reason = "codes are 16 bits, the constants are not")]
    let code = code as u16;
    sock_filter { code, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter on a call as the kernel does.
    fn run(call: c_long, arguments: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&u32::try_from(call).unwrap().to_le_bytes());
        data[4..8].copy_from_slice(&ARCHITECTURE.to_le_bytes());
        for (slot, argument) in data[16..].chunks_mut(8).zip(arguments) {
            slot.copy_from_slice(&argument.to_le_bytes());
        }
        let filter = build_filter().unwrap();
        let (mut next, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter[next];
            next += 1;
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let offset = k as usize;
                    accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    next += usize::from(if accumulator == k { jt } else { jf });
                }
                _ => return k,
            }
        }
    }

    #[test]
    fn only_listed_calls_are_allowed() {
        let (allow, kill) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_KILL_PROCESS);
        for &call in ALLOWED {
            assert_eq!(run(call, [u64::MAX; 6]), allow, "{call}");
        }
        for call in [
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_sendmsg,
            libc::SYS_socketpair,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_kill,
            libc::SYS_pidfd_getfd,
        ] {
            assert_eq!(run(call, [0; 6]), kill, "{call}");
        }
    }

    #[test]
    fn arguments_are_checked() {
        #[expect(clippy::cast_sign_loss, reason = "the constants are positive")]
        let socket = |domain: i32, kind: i32, protocol: i32| {
            run(libc::SYS_socket, [domain as u64, kind as u64, protocol as u64, 0, 0, 0])
        };
        let (allow, kill) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_KILL_PROCESS);
        let stream = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        assert_eq!(socket(libc::AF_INET, stream, 0), allow);
        assert_eq!(socket(libc::AF_INET6, stream, libc::IPPROTO_TCP), allow);
        for (domain, kind, protocol) in [
            (libc::AF_UNIX, stream, 0),
            (libc::AF_NETLINK, libc::SOCK_RAW, 0),
            (libc::AF_PACKET, libc::SOCK_RAW, 0),
            (libc::AF_INET, libc::SOCK_DGRAM, 0),
            (libc::AF_INET, libc::SOCK_RAW, 1),
            (libc::AF_INET, stream, libc::IPPROTO_MPTCP),
            (libc::AF_VSOCK, stream, 0),
        ] {
            assert_eq!(socket(domain, kind, protocol), kill, "{domain} {kind} {protocol}");
        }
        assert_eq!(run(libc::SYS_mmap, [0, 4096, 3, 0x22, 0, 0]), allow);
        assert_eq!(run(libc::SYS_mmap, [0, 4096, 7, 0x22, 0, 0]), kill);
        assert_eq!(run(libc::SYS_mprotect, [0, 4096, 5, 0, 0, 0]), kill);
    }
}

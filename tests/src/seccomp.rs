//! Filters for one argument of one system call.

use std::io;

/// Offset of the arguments in `struct seccomp_data` (include/uapi/linux/seccomp.h), of 8 bytes each. The number of the system
/// call is at 0.
const ARGUMENTS: u32 = 16;
/// Offset of the lower half in an argument.
const LOWER_HALF: u32 = if cfg!(target_endian = "little") { 0 } else { 4 };

/// Applies `action` to the calls of `syscall` by this process whose argument, counted from 0, has `value` as lower half. Returns
/// the result of the system call, such as the descriptor of a listener.
///
/// Allocates nothing, so that it can run between fork and exec.
pub fn filter(
    syscall: libc::c_long,
    (argument, value): (u32, u32),
    action: u32,
    flags: libc::c_ulong,
) -> io::Result<libc::c_long> {
    const fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
        #[expect(clippy::cast_possible_truncation, reason = "codes are 16 bits, the constants are not")]
        let code = code as u16;
        libc::sock_filter { code, jt, jf, k }
    }
    let syscall = u32::try_from(syscall).map_err(io::Error::other)?;
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, syscall, 0, 3),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, ARGUMENTS + 8 * argument + LOWER_HALF, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, action, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: 6, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter outlive the call, which copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

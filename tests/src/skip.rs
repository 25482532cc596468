//! Checks for missing kernel features and programs. Tests that need them print a skip notice.

use std::{env, net::UdpSocket, os::fd::AsRawFd as _, process::Stdio};

use crate::{Netns, executable::find_program, foreign_bpf::ForeignProgram, hook};

/// Prefix of a line that reports a skipped test or part of one, with the reason. `cargo xtask vm` reads these lines.
pub const SKIPPED: &str = "skipped: ";
/// Name of the skipped part if a test runs nothing.
pub const WHOLE_TEST: &str = "the whole test";

/// Environment variable that allows tests to change the machine, for virtual machines that exist for tests only.
const DISPOSABLE: &str = "IMDS_DISPOSABLE";

/// Reports whether the machine must not be changed, and prints a skip notice then. `what` is the change.
#[must_use]
pub fn skip_unless_disposable(what: &str) -> bool {
    let is_needed = env::var_os(DISPOSABLE).is_none();
    if is_needed {
        skip(WHOLE_TEST, &format!("the test {what}, which needs {DISPOSABLE}"));
    }
    is_needed
}

/// Reports whether the kernel lacks TCX, and prints a skip notice for the whole test then.
#[must_use]
pub fn skip_without_tcx() -> bool {
    lacks_tcx(WHOLE_TEST)
}

/// Reports whether the socket hook cannot recognize the node's sockets, and prints a skip notice then. Before Linux
/// 5.14 the agent cannot read the netns cookie of an environment's namespace.
#[must_use]
pub fn skip_without_netns_cookie() -> bool {
    let lacks = lacks_netns_cookie();
    if lacks {
        skip(WHOLE_TEST, "no SO_NETNS_COOKIE on this kernel");
    }
    lacks
}

/// Returns the hooks that can deny an environment's pods. Omits the socket hook with a skip notice if it cannot
/// recognize the node's sockets.
#[must_use]
pub fn known_here(hooks: &[&'static str]) -> Vec<&'static str> {
    let mut known = hooks.to_vec();
    if hooks.contains(&"socket") && lacks_netns_cookie() {
        skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
        known.retain(|&hook| hook != "socket");
    }
    known
}

/// Reports whether the kernel lacks `SO_NETNS_COOKIE` (Linux 5.14), without a skip notice.
#[must_use]
pub fn lacks_netns_cookie() -> bool {
    // SO_NETNS_COOKIE of include/uapi/asm-generic/socket.h.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket");
    let (mut cookie, mut length) = (0_u64, 8);
    // SAFETY: the length is the size of the buffer, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    result != 0
}

pub(crate) fn lacks_tcx(left_out: &str) -> bool {
    let lacks = !hook::has_tcx();
    if lacks {
        skip(left_out, "no TCX on this kernel");
    }
    lacks
}

/// Reports whether TC programs can't read a socket's network namespace cookie (Linux 6.13), so that `node_egress` can't
/// distinguish the node from a pod that shares an interface with it.
#[must_use]
pub fn lacks_tc_netns_cookie(left_out: &str) -> bool {
    // bpf_get_netns_cookie of include/uapi/linux/bpf.h.
    const GET_NETNS_COOKIE: u32 = 122;
    let lacks = ForeignProgram::calling(GET_NETNS_COOKIE, &[]).is_err();
    if lacks {
        skip(left_out, "TC programs do not see a socket's network namespace on this kernel");
    }
    lacks
}

/// Reports whether the kernel lacks network devices of this kind, and prints a skip notice then.
#[must_use]
pub fn lacks_device(left_out: &str, kind: &str, options: &str) -> bool {
    let netns = Netns::new("devices");
    netns.ip("link add lower0 type veth peer name lower1");
    let mut command = netns.command("ip");
    command.args(["link", "add", "upper0"]).args(options.split_whitespace());
    // The error message of `ip` becomes part of the reason.
    let added = command.stdin(Stdio::null()).output().expect("run ip");
    if !added.status.success() {
        let said = String::from_utf8_lossy(&added.stderr);
        // An `ip` that does not know the device's options prints this message.
        let of =
            if said.contains("Garbage instead of arguments") { "by this `ip`" } else { "on this kernel" };
        skip(left_out, &format!("no {kind} devices {of} ({})", said.trim().replace('\n', " ")));
    }
    !added.status.success()
}

/// Reports whether one of these programs, names in `PATH` or absolute paths, is not installed, and prints a skip notice
/// then.
#[must_use]
pub fn lacks_program(left_out: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| find_program(program).is_none());
    if let Some(program) = missing {
        skip(left_out, &format!("there is no {program} on this machine"));
    }
    missing.is_some()
}

/// Prints a skip notice with the skipped part and the reason.
pub fn skip(left_out: &str, reason: &str) {
    eprintln!("{SKIPPED}{left_out}: {reason}");
}

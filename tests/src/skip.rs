//! What a kernel lacks of what tests need, and how they say so.

use std::{env, net::UdpSocket, os::fd::AsRawFd as _, process::Stdio};

use crate::{Netns, foreign::Foreign, hook};

/// How a line begins that tells what a test leaves out and why. `cargo xtask vm` reads it.
pub const SKIPPED: &str = "skipped: ";
/// What is left out by a test that runs nothing.
pub const WHOLE_TEST: &str = "the whole test";

/// Says, in the environment, that nobody minds what becomes of the machine, as of a virtual one that is made for tests.
const DISPOSABLE: &str = "IMDS_DISPOSABLE";

/// Whether a test that does `what` to the machine can't run, which it tells.
#[must_use]
pub fn skip_unless_disposable(what: &str) -> bool {
    let is_needed = env::var_os(DISPOSABLE).is_none();
    if is_needed {
        skip(WHOLE_TEST, &format!("it {what}, which takes {DISPOSABLE}"));
    }
    is_needed
}

/// Whether a test that is about TCX alone can't run, which it tells.
#[must_use]
pub fn skip_without_tcx() -> bool {
    lacks_tcx(WHOLE_TEST)
}

/// Whether the socket hook can't know the node here, which is said: before Linux 5.14 the namespace of a world has no
/// cookie that the agent can ask for.
#[must_use]
pub fn skip_without_netns_cookie() -> bool {
    let lacks = lacks_netns_cookie();
    if lacks {
        skip(WHOLE_TEST, "no SO_NETNS_COOKIE on this kernel");
    }
    lacks
}

/// Those of `hooks` that can hold a world's pods: all but the socket hook where it can't know the node, which is said.
#[must_use]
pub fn known_here(hooks: &[&'static str]) -> Vec<&'static str> {
    let mut known = hooks.to_vec();
    if hooks.contains(&"socket") && lacks_netns_cookie() {
        skip("the socket hook", "no SO_NETNS_COOKIE on this kernel");
        known.retain(|&hook| hook != "socket");
    }
    known
}

/// The same as [`skip_without_netns_cookie`], without a word.
#[must_use]
pub fn lacks_netns_cookie() -> bool {
    // SO_NETNS_COOKIE of include/uapi/asm-generic/socket.h.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket");
    let (mut cookie, mut length) = (0_u64, 8);
    // SAFETY: the buffer is as long as the length says, and both outlive the call.
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
    let lacks = Foreign::calling(GET_NETNS_COOKIE, &[]).is_err();
    if lacks {
        skip(left_out, "TC programs do not see a socket's network namespace on this kernel");
    }
    lacks
}

/// Whether the kernel has no network devices of this kind, which a test that is about them says.
#[must_use]
pub fn lacks_device(left_out: &str, kind: &str, options: &str) -> bool {
    let netns = Netns::new("devices");
    netns.ip("link add lower0 type veth peer name lower1");
    let mut command = netns.command("ip");
    command.args(["link", "add", "upper0"]).args(options.split_whitespace());
    // What it says where it fails is in the reason.
    let added = command.stdin(Stdio::null()).output().expect("run ip");
    if !added.status.success() {
        let said = String::from_utf8_lossy(&added.stderr);
        // So an `ip` complains that has no options for such a device.
        let of =
            if said.contains("Garbage instead of arguments") { "by this `ip`" } else { "on this kernel" };
        skip(left_out, &format!("no {kind} devices {of} ({})", said.trim().replace('\n', " ")));
    }
    !added.status.success()
}

/// Reports whether one of these programs, names in `PATH` or absolute paths, is not installed, and says which.
#[must_use]
pub fn lacks_program(left_out: &str, programs: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_installed = |program: &&&str| env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let missing = programs.iter().find(|program| !is_installed(program));
    if let Some(program) = missing {
        skip(left_out, &format!("there is no {program} on this machine"));
    }
    missing.is_some()
}

/// Says what is left out and why.
pub fn skip(left_out: &str, reason: &str) {
    eprintln!("{SKIPPED}{left_out}: {reason}");
}

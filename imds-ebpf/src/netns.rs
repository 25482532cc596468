//! Identification of the network namespaces of sockets.

use aya_ebpf::{Global, bindings::__sk_buff, helpers::generated::bpf_get_netns_cookie};

use crate::maps;

/// 1 if TC programs may call `bpf_get_netns_cookie` (Linux 6.13). The loader sets it before loading. The verifier treats it
/// as a constant, and ignores the call as dead code if it is 0.
#[unsafe(no_mangle)]
static TC_HAS_COOKIE: Global<u8> = Global::new(0);

/// 1 if `cgroup_skb` programs may call `bpf_get_netns_cookie` (Linux 6.15). The loader sets it like [`TC_HAS_COOKIE`].
#[unsafe(no_mangle)]
static CGROUP_HAS_COOKIE: Global<u8> = Global::new(0);

/// Reports whether `cookie` belongs to the network namespace in which the agent runs.
#[inline(always)]
pub(crate) fn is_node(cookie: u64) -> bool {
    // SAFETY: the helper accepts a null context, and then returns the cookie of the initial namespace.
    let node = maps::node_cookie().unwrap_or_else(|| unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) });
    cookie == node
}

/// Reports whether TC programs can read the network namespace of a socket.
#[inline(always)]
pub(crate) fn is_known_at_tc() -> bool {
    TC_HAS_COOKIE.load() != 0
}

/// Network namespace of a packet's socket.
#[derive(Clone, Copy)]
pub(crate) enum SocketNetns {
    /// The packet has no socket, or the kernel has orphaned it.
    NoSocket,
    /// Cookie of the socket's namespace.
    Cookie(u64),
    /// The packet has a socket, but the kernel does not report its namespace.
    Unknown,
}

/// Returns the network namespace of the packet's socket at a TC hook.
#[inline(always)]
pub(crate) fn from_socket(skb: *mut __sk_buff) -> SocketNetns {
    #[expect(
        clippy::multiple_unsafe_ops_per_block,
        reason = "reading a union field behind a pointer counts as two"
    )]
    // SAFETY: the kernel passes a valid context to every TC program; the verifier checks the access to the union, which has
    // one field.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        return SocketNetns::NoSocket;
    }
    if !is_known_at_tc() {
        return SocketNetns::Unknown;
    }
    // SAFETY: the helper takes the context of a TC program.
    SocketNetns::Cookie(unsafe { bpf_get_netns_cookie(skb.cast()) })
}

/// Returns the network namespace of the packet's socket at a `cgroup_skb` hook, where every packet has a socket.
#[inline(always)]
pub(crate) fn from_socket_in_cgroup(skb: *mut __sk_buff) -> SocketNetns {
    if CGROUP_HAS_COOKIE.load() == 0 {
        return SocketNetns::Unknown;
    }
    // SAFETY: the helper takes the context of a `cgroup_skb` program.
    SocketNetns::Cookie(unsafe { bpf_get_netns_cookie(skb.cast()) })
}

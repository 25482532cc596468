//! Whose network namespace.

use aya_ebpf::{Global, bindings::__sk_buff, helpers::generated::bpf_get_netns_cookie};

use crate::maps;

/// 1 where the kernel lets TC programs ask for a socket's network namespace (Linux 6.13); set by the loader. It is a
/// constant to the verifier, which does not look at the call where it is 0.
#[unsafe(no_mangle)]
static TC_HAS_COOKIE: Global<u8> = Global::new(0);

/// The same for programs on packets of a cgroup (Linux 6.15).
#[unsafe(no_mangle)]
static CGROUP_HAS_COOKIE: Global<u8> = Global::new(0);

/// Whether `cookie` is that of the network namespace in which the agent runs.
#[inline(always)]
pub(crate) fn is_node(cookie: u64) -> bool {
    // SAFETY: with no context the helper returns the cookie of the initial namespace.
    let node = maps::node_cookie().unwrap_or_else(|| unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) });
    cookie == node
}

/// The network namespace of the socket that sent a packet.
#[derive(Clone, Copy)]
pub(crate) enum Sender {
    /// It has no socket, or none any more.
    None,
    /// Its cookie.
    Netns(u64),
    /// The kernel does not tell.
    Unknown,
}

/// Whose packet it is.
#[inline(always)]
pub(crate) fn sender(skb: *mut __sk_buff) -> Sender {
    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "a union behind a pointer is two")]
    // SAFETY: the kernel hands every TC program a valid context; the verifier checks the access to the union, which has
    // one field.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        return Sender::None;
    }
    if TC_HAS_COOKIE.load() == 0 {
        return Sender::Unknown;
    }
    // SAFETY: the helper takes the context of a TC program.
    Sender::Netns(unsafe { bpf_get_netns_cookie(skb.cast()) })
}

/// Whose packet it is, asked at a cgroup, where every packet has a socket.
#[inline(always)]
pub(crate) fn sender_in_cgroup(skb: *mut __sk_buff) -> Sender {
    if CGROUP_HAS_COOKIE.load() == 0 {
        return Sender::Unknown;
    }
    // SAFETY: the helper takes the context of a program on packets.
    Sender::Netns(unsafe { bpf_get_netns_cookie(skb.cast()) })
}

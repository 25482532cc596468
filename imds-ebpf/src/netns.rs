//! Whose network namespace.

use aya_ebpf::helpers::generated::bpf_get_netns_cookie;

use crate::maps;

/// Whether `cookie` is that of the network namespace in which the agent runs.
#[inline(always)]
pub(crate) fn is_node(cookie: u64) -> bool {
    // SAFETY: with no context the helper returns the cookie of the initial namespace.
    let node = maps::node_cookie().unwrap_or_else(|| unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) });
    cookie == node
}

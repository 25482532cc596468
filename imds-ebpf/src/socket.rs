//! The socket hook: calls that name a destination, seen before a packet is made. Addresses are never rewritten.

use aya_ebpf::{helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext};
use imds_ebpf_common::{CounterKey, Hook, Verdict, judge_ipv4, judge_ipv6};

use crate::{maps, netns};

#[inline(always)]
pub(crate) fn judge_v4(ctx: &SockAddrContext) -> Verdict {
    // SAFETY: the kernel hands the program a valid context; the verifier checks the access.
    let destination = unsafe { (*ctx.sock_addr).user_ip4 };
    of_sender(ctx, judge_ipv4(destination.to_ne_bytes(), maps::mode))
}

#[inline(always)]
pub(crate) fn judge_v6(ctx: &SockAddrContext) -> Verdict {
    // SAFETY: as above.
    let [a, b, c, d] = unsafe { (*ctx.sock_addr).user_ip6 }.map(u32::to_ne_bytes);
    let mut destination = [0; 16];
    destination[..4].copy_from_slice(&a);
    destination[4..8].copy_from_slice(&b);
    destination[8..12].copy_from_slice(&c);
    destination[12..].copy_from_slice(&d);
    of_sender(ctx, judge_ipv6(destination, maps::mode))
}

/// The verdict, unless the socket is of the node's own network namespace.
#[inline(always)]
fn of_sender(ctx: &SockAddrContext, verdict: Verdict) -> Verdict {
    match verdict {
        Verdict::Foreign => return verdict,
        Verdict::Deny | Verdict::Audit | Verdict::Allow => {}
    }
    // SAFETY: the helper takes the context of a socket address program.
    if netns::is_node(unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }) {
        return Verdict::Foreign;
    }
    maps::count(CounterKey::DEPARTED, Hook::Socket, verdict, 0);
    verdict
}

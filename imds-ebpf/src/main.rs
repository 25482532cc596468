//! The BPF programs of imds-agent: entry points, which only translate.
#![deny(
    clippy::expect_used,
    clippy::panic,
    clippy::todo,
    clippy::unimplemented,
    clippy::unreachable,
    clippy::unwrap_used
)]
#![no_std]
#![no_main]

mod diagnostics;
mod edge;
mod events;
mod exempt;
mod from_pod;
mod host;
mod local_service;
mod maps;
mod netns;
mod node_egress;
mod packet;
mod probe;
mod reject;
mod sender;
mod socket;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, classifier},
    programs::{SkBuffContext, SockAddrContext, TcContext},
};
use imds_ebpf_common::{Frame, Hook, Verdict};

use crate::{from_pod::FromPod, node_egress::NodeEgress};

/// Ingress of the node's end of a pod's link.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_from_pod(ctx: TcContext) -> i32 {
    edge::judge::<FromPod>(&ctx, Frame::Ethernet)
}

/// The same for interfaces without a link layer.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_from_podl3(ctx: TcContext) -> i32 {
    edge::judge::<FromPod>(&ctx, Frame::Ip)
}

/// Egress of an interface of the node's own.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_egress(ctx: TcContext) -> i32 {
    edge::judge::<NodeEgress>(&ctx, Frame::Ethernet)
}

/// The same for interfaces without a link layer.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_egress_l3(ctx: TcContext) -> i32 {
    edge::judge::<NodeEgress>(&ctx, Frame::Ip)
}

/// connect(2) on an IPv4 socket.
#[cgroup_sock_addr(connect4)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_connect4(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v4(&ctx, Hook::Socket))
}

/// connect(2) on an IPv6 socket.
#[cgroup_sock_addr(connect6)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_connect6(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v6(&ctx, Hook::Socket))
}

/// sendmsg(2) and its like on an unconnected IPv4 UDP socket.
#[cgroup_sock_addr(sendmsg4)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_sendmsg4(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v4(&ctx, Hook::Socket))
}

/// The same for IPv6.
#[cgroup_sock_addr(sendmsg6)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_sendmsg6(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v6(&ctx, Hook::Socket))
}

/// connect(2) on an IPv4 socket of a pod in the node's network namespace.
#[cgroup_sock_addr(connect4)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_host_conn4(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v4(&ctx, Hook::HostNetwork))
}

/// The same for IPv6.
#[cgroup_sock_addr(connect6)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_host_conn6(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v6(&ctx, Hook::HostNetwork))
}

/// sendmsg(2) and its like on an unconnected IPv4 UDP socket of a pod in the node's network namespace.
#[cgroup_sock_addr(sendmsg4)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_host_send4(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v4(&ctx, Hook::HostNetwork))
}

/// The same for IPv6.
#[cgroup_sock_addr(sendmsg6)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_host_send6(ctx: SockAddrContext) -> i32 {
    permission(socket::judge_v6(&ctx, Hook::HostNetwork))
}

/// IP packets of sockets of pods in the node's network namespace.
#[cgroup_skb(egress)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_host_out(ctx: SkBuffContext) -> i32 {
    permission(host::judge(&ctx))
}

/// IP packets that sockets of the node receive.
#[cgroup_skb(ingress)]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_local_in(ctx: SkBuffContext) -> i32 {
    permission(local_service::judge(&ctx))
}

/// What a cgroup program returns: 1 lets the call or packet go on, 0 ends it with `EPERM`.
#[inline(always)]
const fn permission(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Deny => 0,
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept | Verdict::Exempt => 1,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The project is Apache-2.0 OR MIT; the kernel wants to hear of the GPL-compatible one of these.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! Entry points of the BPF programs of imds-agent. They only convert contexts and verdicts.
#![deny(
    clippy::expect_used,
    clippy::panic,
    clippy::todo,
    clippy::unimplemented,
    clippy::unreachable,
    clippy::unwrap_used
)]
#![expect(clippy::needless_pass_by_value, reason = "the macros pass the context of an entry point by value")]
#![no_std]
#![no_main]

mod cgroup_packet;
mod diagnostics;
mod event_source;
mod events;
mod exempt;
mod from_pod;
mod host_network;
mod local_service;
mod maps;
mod netns;
mod node_egress;
mod node_process;
mod packet;
mod passed;
mod probe;
mod redirect;
mod reject;
mod requests;
mod sender;
mod socket;
mod tc_hook;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, classifier},
    programs::{SkBuffContext, SockAddrContext, TcContext},
};
use imds_ebpf_common::{Hook, LinkLayer, Verdict};

use crate::{from_pod::FromPod, node_egress::NodeEgress};

/// `from_pod`: TC ingress of a pod's host-side interface.
#[classifier]
fn imds_from_pod(ctx: TcContext) -> i32 {
    tc_hook::classify::<FromPod>(&ctx, LinkLayer::Ethernet)
}

/// Variant of [`imds_from_pod`] for interfaces without a link layer. The kernel truncates names to 15 characters.
#[classifier]
fn imds_from_podl3(ctx: TcContext) -> i32 {
    tc_hook::classify::<FromPod>(&ctx, LinkLayer::None)
}

/// `node_egress`: TC egress of an interface of the node.
#[classifier]
fn imds_egress(ctx: TcContext) -> i32 {
    tc_hook::classify::<NodeEgress>(&ctx, LinkLayer::Ethernet)
}

/// Variant of [`imds_egress`] for interfaces without a link layer.
#[classifier]
fn imds_egress_l3(ctx: TcContext) -> i32 {
    tc_hook::classify::<NodeEgress>(&ctx, LinkLayer::None)
}

/// `socket`: connect(2) on an IPv4 socket.
#[cgroup_sock_addr(connect4)]
fn imds_connect4(ctx: SockAddrContext) -> i32 {
    permission(socket::connect_v4(&ctx))
}

/// `socket`: connect(2) on an IPv6 socket.
#[cgroup_sock_addr(connect6)]
fn imds_connect6(ctx: SockAddrContext) -> i32 {
    permission(socket::connect_v6(&ctx))
}

/// `socket`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv4 UDP socket.
#[cgroup_sock_addr(sendmsg4)]
fn imds_sendmsg4(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v4(&ctx, Hook::Socket))
}

/// `socket`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv6 UDP socket.
#[cgroup_sock_addr(sendmsg6)]
fn imds_sendmsg6(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v6(&ctx, Hook::Socket))
}

/// `socket`: getpeername(2) on a connected IPv4 socket. The kernel requires the result 1.
#[cgroup_sock_addr(getpeername4)]
fn imds_peer4(ctx: SockAddrContext) -> i32 {
    redirect::restore_peer_v4(&ctx);
    1
}

/// `socket`: getpeername(2) on a connected IPv6 socket. The kernel requires the result 1.
#[cgroup_sock_addr(getpeername6)]
fn imds_peer6(ctx: SockAddrContext) -> i32 {
    redirect::restore_peer_v6(&ctx);
    1
}

/// `host_network`: connect(2) on an IPv4 socket of a hostNetwork pod.
#[cgroup_sock_addr(connect4)]
fn imds_host_conn4(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v4(&ctx, Hook::HostNetwork))
}

/// `host_network`: connect(2) on an IPv6 socket of a hostNetwork pod.
#[cgroup_sock_addr(connect6)]
fn imds_host_conn6(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v6(&ctx, Hook::HostNetwork))
}

/// `host_network`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv4 UDP socket of a hostNetwork pod.
#[cgroup_sock_addr(sendmsg4)]
fn imds_host_send4(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v4(&ctx, Hook::HostNetwork))
}

/// `host_network`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv6 UDP socket of a hostNetwork pod.
#[cgroup_sock_addr(sendmsg6)]
fn imds_host_send6(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v6(&ctx, Hook::HostNetwork))
}

/// `host_network`: IP packets that sockets of hostNetwork pods send.
#[cgroup_skb(egress)]
fn imds_host_out(ctx: SkBuffContext) -> i32 {
    permission(cgroup_packet::classify(&ctx, host_network::classify_slow))
}

/// `local_service`: IP packets that sockets of the node receive.
#[cgroup_skb(ingress)]
fn imds_local_in(ctx: SkBuffContext) -> i32 {
    permission(local_service::classify(&ctx))
}

/// `node_allow`: connect(2) on an IPv4 socket of a process of the node.
#[cgroup_sock_addr(connect4)]
fn imds_node_conn4(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v4(&ctx, Hook::NodeAllow))
}

/// `node_allow`: connect(2) on an IPv6 socket of a process of the node.
#[cgroup_sock_addr(connect6)]
fn imds_node_conn6(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v6(&ctx, Hook::NodeAllow))
}

/// `node_allow`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv4 UDP socket of a process of the node.
#[cgroup_sock_addr(sendmsg4)]
fn imds_node_send4(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v4(&ctx, Hook::NodeAllow))
}

/// `node_allow`: sendmsg(2), sendto(2) and sendmmsg(2) on an unconnected IPv6 UDP socket of a process of the node.
#[cgroup_sock_addr(sendmsg6)]
fn imds_node_send6(ctx: SockAddrContext) -> i32 {
    permission(socket::classify_v6(&ctx, Hook::NodeAllow))
}

/// `node_allow`: IP packets that sockets of the node's processes send.
#[cgroup_skb(egress)]
fn imds_node_out(ctx: SkBuffContext) -> i32 {
    permission(cgroup_packet::classify(&ctx, node_process::classify_slow))
}

/// Returns the result of a cgroup program: 1 lets the call or packet pass, 0 denies it with `EPERM` or the error that the
/// program has set.
#[inline(always)]
const fn permission(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Denied => 0,
        Verdict::Unrelated
        | Verdict::Audited
        | Verdict::Off
        | Verdict::Allowed
        | Verdict::Exempt
        | Verdict::Redirected => 1,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// License string for the kernel, which allows some helpers only for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

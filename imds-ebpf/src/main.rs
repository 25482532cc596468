//! The BPF programs of imds-agent: entry points, which only turn a verdict into a TC action.
#![no_std]
#![no_main]

mod maps;
mod packet;
mod pod_edge;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use imds_ebpf_common::{Frame, Verdict};

/// Ingress of the node's end of a pod's link.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_pod_edge(ctx: TcContext) -> i32 {
    action(pod_edge::judge(&ctx, Frame::Ethernet))
}

/// The same for interfaces without a link layer.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro hands the context over")]
fn imds_pod_edgel3(ctx: TcContext) -> i32 {
    action(pod_edge::judge(&ctx, Frame::Ip))
}

/// `TC_ACT_UNSPEC` for all that is not denied: it leaves the packet to the other programs on the hook, which
/// `TC_ACT_OK` would skip.
#[inline(always)]
const fn action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Deny => TC_ACT_SHOT,
        Verdict::Foreign | Verdict::Audit | Verdict::Allow | Verdict::Kept => TC_ACT_UNSPEC,
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

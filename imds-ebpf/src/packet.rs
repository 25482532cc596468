//! Bounded access to the bytes of a socket buffer.

use core::mem::transmute_copy;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes, programs::TcContext};
use imds_ebpf_common::Packet;

/// A socket buffer at a TC hook.
pub(crate) struct Skb<'a> {
    ctx: &'a TcContext,
}

impl<'a> Skb<'a> {
    #[inline(always)]
    pub(crate) const fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    /// Length in bytes, link-layer header and non-linear part included.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        self.ctx.len()
    }

    /// Index of the interface at whose hook the packet is.
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        let skb: *const __sk_buff = self.ctx.skb.skb;
        // SAFETY: the kernel hands every TC program a valid context; the verifier checks the access.
        unsafe { (*skb).ifindex }
    }
}

impl Packet for Skb<'_> {
    /// Reads from the linear part where it reaches, else through the helper, which changes nothing: a sender chooses
    /// how little of its packet is linear (`AF_PACKET` with a mapped ring leaves 14 bytes).
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.ctx.data() + offset;
        if start + N <= self.ctx.data_end() {
            // SAFETY: the range was just compared with data_end, as the verifier demands too.
            return Some(unsafe { load(start) });
        }
        self.read_nonlinear(offset)
    }
}

impl Skb<'_> {
    #[cold]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "both are below the length of a few headers")]
    fn read_nonlinear<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0_u8; N];
        // SAFETY: the buffer is N bytes and outlives the call; the helper checks the range against the packet.
        let failed = unsafe {
            bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        (failed == 0).then_some(bytes)
    }
}

/// Reads `N` bytes of linear packet data, two and four of them with one instruction.
///
/// # Safety
///
/// `address` to `address + N` is within the linear part of the packet.
#[inline(always)]
unsafe fn load<const N: usize>(address: usize) -> [u8; N] {
    match N {
        2 => {
            // SAFETY: in range says the caller. A BPF load has the alignment rules of the machine below, and the
            // verifier refuses the program where that machine has any that the packet's layout does not meet.
            let word = unsafe { *(address as *const u16) };
            // SAFETY: N is 2: both are two bytes.
            unsafe { transmute_copy(&word) }
        }
        4 => {
            // SAFETY: as above.
            let word = unsafe { *(address as *const u32) };
            // SAFETY: N is 4: both are four bytes.
            unsafe { transmute_copy(&word) }
        }
        // SAFETY: in range says the caller, and bytes need no alignment.
        _ => unsafe { *(address as *const [u8; N]) },
    }
}

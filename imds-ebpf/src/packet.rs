//! Bounded access to the bytes of a socket buffer.

use core::mem::MaybeUninit;

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
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.ctx.data() + offset;
        if start + N <= self.ctx.data_end() {
            // SAFETY: the range was just compared with data_end, as the verifier demands too; bytes need no alignment.
            return Some(unsafe { *(start as *const [u8; N]) });
        }
        self.read_nonlinear(offset)
    }

    #[inline(always)]
    fn read_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        let start = self.ctx.data();
        if start + second + size_of::<u32>() > self.ctx.data_end() {
            let (first, second) = (self.read_nonlinear(first)?, self.read_nonlinear(second)?);
            return Some((u16::from_ne_bytes(first), u32::from_ne_bytes(second)));
        }
        // SAFETY: in range, as the second word is and the first comes before it. A BPF load has the alignment rules of
        // the machine below, and the verifier refuses the program where the packet's layout does not meet them.
        let first = unsafe { *((start + first) as *const u16) };
        // SAFETY: as above.
        let second = unsafe { *((start + second) as *const u32) };
        Some((first, second))
    }

    #[inline(always)]
    fn read_pair(&self, offset: usize) -> Option<(u64, u64)> {
        let start = self.ctx.data() + offset;
        if start + 2 * size_of::<u64>() > self.ctx.data_end() {
            let (first, second) =
                (self.read_nonlinear(offset)?, self.read_nonlinear(offset + size_of::<u64>())?);
            return Some((u64::from_ne_bytes(first), u64::from_ne_bytes(second)));
        }
        // SAFETY: in range, as was just seen; of the alignment as above.
        let first = unsafe { *(start as *const u64) };
        // SAFETY: as above.
        let second = unsafe { *((start + size_of::<u64>()) as *const u64) };
        Some((first, second))
    }

    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.read_nonlinear(offset)
    }
}

impl Skb<'_> {
    /// Reads through the helper, which changes nothing: a sender chooses how little of its packet is linear
    /// (`AF_PACKET` with a mapped ring leaves 14 bytes).
    #[cold]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "both are below the length of a few headers")]
    fn read_nonlinear<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the buffer is N bytes and outlives the call; the helper checks the range against the packet.
        let failed = unsafe {
            bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: a call that succeeds has written all of it.
        Some(unsafe { bytes.assume_init() })
    }
}

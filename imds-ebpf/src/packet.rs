//! Bounded access to the bytes of a socket buffer.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use imds_ebpf_common::{Packet, Place, Service, opaque::opaque_xor, service};

/// A socket buffer at a TC or `cgroup_skb` hook.
pub(crate) struct Skb {
    /// The context that the kernel handed to the program: valid while it runs.
    skb: *mut __sk_buff,
}

impl Skb {
    /// Takes the context of the running program.
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// Length in bytes, with the non-linear part; at TC hooks also with the link-layer header.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: the kernel hands every TC program a valid context; the verifier checks the access.
        unsafe { (*self.skb).len }
    }

    /// Index of the interface at which the packet is: of the hook at TC, of the receiving interface at `cgroup_skb/ingress`,
    /// and of the output device at `cgroup_skb/egress`.
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).ifindex }
    }

    /// Index of the interface by which the packet entered the node; 0 if the kernel has recorded none. That is so for packets
    /// of local sockets, and for some packets of pods (macvlan, ipvlan, and IPv6 packets that the node fragments again).
    #[inline(always)]
    pub(crate) fn ingress_ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).ingress_ifindex }
    }

    /// Mark of the packet, by which the node's own rules and programs know it.
    #[inline(always)]
    pub(crate) fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).mark }
    }

    /// Sets the mark of the packet.
    #[inline(always)]
    pub(crate) fn set_mark(&self, mark: u32) {
        // SAFETY: as above; it is one of the fields that a TC program may write.
        unsafe { (*self.skb).mark = mark };
    }

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.skb).data as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.skb).data_end as usize }
    }
}

impl Skb {
    /// Reads through the helper, which changes nothing: a sender chooses how little of its packet is linear
    /// (`AF_PACKET` with a mapped ring leaves 14 bytes).
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "both are below the length of a few headers")]
    pub(crate) fn fetch_to<'a, T: Number, const N: usize>(
        &self,
        offset: usize,
        to: &'a mut MaybeUninit<[T; N]>,
    ) -> Option<&'a mut [T; N]> {
        let length = size_of::<[T; N]>() as u32;
        // SAFETY: the buffer is as long as said and outlives the call; the helper checks the range against the packet.
        let failed =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset as u32, to.as_mut_ptr().cast(), length) };
        if failed != 0 {
            return None;
        }
        // SAFETY: a call that succeeds has written all of it, and of a number any bytes are one.
        Some(unsafe { to.assume_init_mut() })
    }
}

/// What can be read from a packet.
pub(crate) trait Number {}

impl Number for u8 {}
impl Number for u32 {}

impl Packet for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.data() + offset;
        if start + N <= self.data_end() {
            // SAFETY: the range was just compared with data_end, as the verifier demands too; bytes need no alignment.
            return Some(unsafe { *(start as *const [u8; N]) });
        }
        self.fetch(offset)
    }

    #[inline(always)]
    fn peek_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        let start = self.data();
        if start + second + size_of::<u32>() > self.data_end() {
            return None;
        }
        // SAFETY: in range, as the second word is and the first comes before it. A BPF load has the alignment rules of
        // the machine below, and the verifier refuses the program where the packet's layout does not meet them.
        let first = unsafe { *((start + first) as *const u16) };
        // SAFETY: as above.
        let second = unsafe { *((start + second) as *const u32) };
        Some((first, second))
    }

    #[inline(always)]
    fn peek_pair(&self, offset: usize) -> Option<(u64, u64)> {
        let start = self.data() + offset;
        if start + 2 * size_of::<u64>() > self.data_end() {
            return None;
        }
        // SAFETY: in range, as was just seen; of the alignment as above.
        let first = unsafe { *(start as *const u64) };
        // SAFETY: as above.
        let second = unsafe { *((start + size_of::<u64>()) as *const u64) };
        Some((first, second))
    }

    #[inline(always)]
    fn read_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        if let Some(words) = self.peek_words(first, second) {
            return Some(words);
        }
        let (first, second) = (self.fetch(first)?, self.fetch(second)?);
        Some((u16::from_ne_bytes(first), u32::from_ne_bytes(second)))
    }

    #[inline(always)]
    fn read_pair(&self, offset: usize) -> Option<(u64, u64)> {
        if let Some(pair) = self.peek_pair(offset) {
            return Some(pair);
        }
        let (first, second) = (self.fetch(offset)?, self.fetch(offset + size_of::<u64>())?);
        Some((u64::from_ne_bytes(first), u64::from_ne_bytes(second)))
    }

    /// Hides the value from the verifier: XOR with an unknown number twice gives the same value without known bounds.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "BPF has words of 64 bits")]
    fn forget_origin(&self, offset: usize) -> usize {
        let unknown = self.len() as usize;
        opaque_xor(offset as u64, unknown as u64) as usize ^ unknown
    }

    /// Reads the service in a separate function, which the verifier checks once for all header positions.
    #[inline(always)]
    fn service(&self, place: Place) -> Option<Service> {
        Some(Service::from_number(service_number(self.skb, place)))
    }

    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.fetch_to(offset, &mut MaybeUninit::uninit()).copied()
    }
}

/// Returns the [number](Service::number) of the packet's service, or that of [`Service::NONE`] if it can't be found.
#[inline(never)]
fn service_number(skb: *mut __sk_buff, place: Place) -> u32 {
    service(&Skb::new(skb), place).unwrap_or(Service::NONE).number()
}

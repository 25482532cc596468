//! Bounds-checked access to the bytes of a socket buffer.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use imds_ebpf_common::{IpOffset, LinkLayer, Packet, Service, is_vlan, opaque::opaque_xor, service};

/// A socket buffer at a TC or `cgroup_skb` hook.
pub(crate) struct Skb {
    /// Context of the running program, valid while it runs.
    skb: *mut __sk_buff,
}

impl Skb {
    /// Creates the socket buffer from the context of the running program.
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// Returns the length in bytes, including the non-linear part, and at TC hooks the link-layer header.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).len }
    }

    /// Returns the interface index: of the hook's interface at TC, of the receiving interface at `cgroup_skb/ingress`, and of
    /// the output device at `cgroup_skb/egress`.
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).ifindex }
    }

    /// Returns the index of the interface by which the packet entered the node; 0 if the kernel has recorded none. The kernel
    /// records none for packets of local sockets, and for some packets of pods (macvlan, ipvlan, and IPv6 packets that the
    /// node fragments again).
    #[inline(always)]
    pub(crate) fn ingress_ifindex(&self) -> u32 {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).ingress_ifindex }
    }

    /// Returns the EtherType by which the kernel chooses the protocol that handles the packet (`skb->protocol`), in memory
    /// order.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the kernel's field has 16 bits")]
    fn protocol(&self) -> u16 {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).protocol as u16 }
    }

    /// Returns the flow hash (`skb->hash`); 0 if the kernel has not computed it.
    #[inline(always)]
    pub(crate) fn hash(&self) -> u32 {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).hash }
    }

    /// Returns the length in bytes of the part that programs read directly. Other processes can't change it.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "packets have less than 4 GiB")]
    pub(crate) fn linear_len(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).data as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: the kernel passes a valid context, and the verifier checks the access.
        unsafe { (*self.skb).data_end as usize }
    }
}

impl Skb {
    /// Reads through a helper, which also reads the non-linear part of the packet. The sender controls the length of the linear
    /// part (14 bytes from `AF_PACKET` with a mapped ring), and the helper does not change the packet.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "offset and length are within a few headers")]
    pub(crate) fn fetch_to<'a, T: Number, const N: usize>(
        &self,
        offset: usize,
        to: &'a mut MaybeUninit<[T; N]>,
    ) -> Option<&'a mut [T; N]> {
        let length = size_of::<[T; N]>() as u32;
        // SAFETY: the buffer has `length` bytes and outlives the call. The helper checks the range against the packet.
        let failed =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset as u32, to.as_mut_ptr().cast(), length) };
        if failed != 0 {
            return None;
        }
        // SAFETY: a successful call has written the whole buffer, and any bytes are a valid number.
        Some(unsafe { to.assume_init_mut() })
    }
}

/// Types that can be read from a packet: all bit patterns are valid.
pub(crate) trait Number {}

impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}

impl Packet for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.data() + offset;
        if start + N <= self.data_end() {
            // SAFETY: the range ends before `data_end`, which the verifier checks too. Bytes need no alignment.
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
        // SAFETY: the word is before the second one, which ends before `data_end`. The verifier rejects the program on machines
        // that need a stricter alignment than packets have.
        let first = unsafe { *((start + first) as *const u16) };
        // SAFETY: the word ends before `data_end`. The verifier rejects the program on machines that need a stricter alignment.
        let second = unsafe { *((start + second) as *const u32) };
        Some((first, second))
    }

    #[inline(always)]
    fn peek_pair(&self, offset: usize) -> Option<(u64, u64)> {
        let start = self.data() + offset;
        if start + 2 * size_of::<u64>() > self.data_end() {
            return None;
        }
        // SAFETY: both words end before `data_end`. The verifier rejects the program on machines that need a stricter alignment.
        let first = unsafe { *(start as *const u64) };
        // SAFETY: both words end before `data_end`. The verifier rejects the program on machines that need a stricter alignment.
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

    /// Hides the bounds of the value from the verifier: XOR with an unknown number twice gives the same value without known
    /// bounds.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
    fn verifier_opaque(&self, offset: usize) -> usize {
        let unknown = self.len() as usize;
        opaque_xor(offset as u64, unknown as u64) as usize ^ unknown
    }

    /// Reads the service in a separate function, so that the verifier checks that once for all header positions.
    #[inline(always)]
    fn service(&self, ip: IpOffset) -> Option<Service> {
        Some(Service::from_number(service_number(self.skb, ip)))
    }

    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.fetch_to(offset, &mut MaybeUninit::uninit()).copied()
    }
}

/// A socket buffer at a TC hook on the receiving side of an interface.
///
/// The EtherType is `skb->protocol`, by which the node chooses the protocol that handles the packet. A veth device sets it from
/// the frame. A netkit device keeps the value that the sender has given to its packet socket (`netkit_xmit`,
/// drivers/net/netkit.c), and the node ignores the EtherType of the frame then.
pub(crate) struct ReceivedSkb(Skb);

impl ReceivedSkb {
    /// Creates the socket buffer from the context of the running program.
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self(Skb::new(skb))
    }
}

impl Packet for ReceivedSkb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(offset)
    }

    #[inline(always)]
    fn ether_type(&self, link_layer: LinkLayer) -> Option<u16> {
        let protocol = self.0.protocol();
        // Without a link-layer header, the IP version decides, as the handlers of IPv4 and IPv6 check it. Tags precede it.
        match link_layer {
            LinkLayer::None if !is_vlan(protocol) => self.0.ether_type(link_layer),
            LinkLayer::Ethernet | LinkLayer::None => Some(protocol),
        }
    }

    #[inline(always)]
    fn peek_ether_type(&self, link_layer: LinkLayer, offset: usize) -> Option<(u16, u32)> {
        let protocol = self.0.protocol();
        let (first, word) = self.0.peek_ether_type(link_layer, offset)?;
        match link_layer {
            LinkLayer::None if !is_vlan(protocol) => Some((first, word)),
            LinkLayer::Ethernet | LinkLayer::None => Some((protocol, word)),
        }
    }

    #[inline(always)]
    fn peek_words(&self, first: usize, second: usize) -> Option<(u16, u32)> {
        self.0.peek_words(first, second)
    }

    #[inline(always)]
    fn peek_pair(&self, offset: usize) -> Option<(u64, u64)> {
        self.0.peek_pair(offset)
    }

    #[inline(always)]
    fn verifier_opaque(&self, offset: usize) -> usize {
        self.0.verifier_opaque(offset)
    }

    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.fetch(offset)
    }
}

/// Returns the [number](Service::number) of the packet's service, or that of [`Service::NONE`] if it can't be found.
#[inline(never)]
fn service_number(skb: *mut __sk_buff, ip: IpOffset) -> u32 {
    service(&Skb::new(skb), ip).unwrap_or(Service::NONE).number()
}

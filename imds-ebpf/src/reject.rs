//! Replies to denied packets: turns the packet into a reset or an ICMP error, and sends that to the sender.

use core::{mem::MaybeUninit, ptr};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT},
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes,
    },
};
use imds_ebpf_common::{
    IpOffset, Packet as _,
    endpoint::TCP,
    reply::{self, ICMP, ICMP_V6, ReplyKind, Sum, WORD},
};

use crate::{packet::Skb, passed::set_passed};

/// Direction in which the reply is sent.
#[derive(Clone, Copy)]
pub(crate) enum ReplyDirection {
    /// Egress of the interface on which the packet was received.
    Egress,
    /// Ingress of the interface on which the packet would leave, like a reply of the endpoint, so that NAT translates it back.
    Ingress,
}

/// Turns the packet into a reply and sends it. Returns the TC action. Drops the packet if no reply is possible or allowed.
#[inline(always)]
pub(crate) fn send_reply(skb: *mut __sk_buff, ip: IpOffset, direction: ReplyDirection) -> i32 {
    // Without a link layer the packet starts with the IP header.
    if !turn_into_reply(skb, ip) || (ip.offset() != 0 && swap_macs(skb).is_none()) {
        return TC_ACT_SHOT;
    }
    let flags = match direction {
        ReplyDirection::Egress => 0,
        ReplyDirection::Ingress => {
            // A real reply has no mark when it is received. Routing and NAT rules of the node may match marks.
            set_passed(skb, 0);
            // SAFETY: the kernel passes a valid context, and the verifier checks the access.
            unsafe { (*skb).mark = 0 };
            u64::from(BPF_F_INGRESS)
        }
    };
    // SAFETY: the helper takes only numbers.
    let action = unsafe { bpf_redirect(Skb::new(skb).ifindex(), flags) };
    #[expect(clippy::cast_possible_truncation, reason = "TC actions are small numbers")]
    let action = action as i32;
    action
}

/// Turns the packet into the reply, except for the link-layer header. A separate function, so that it has its own stack frame
/// and the verifier checks it once.
#[inline(never)]
fn turn_into_reply(skb: *mut __sk_buff, ip: IpOffset) -> bool {
    match reply::reply_kind(&Skb::new(skb), ip) {
        Some(ReplyKind::Reset) => write_reset(skb, ip).is_some(),
        Some(ReplyKind::Prohibited) => write_prohibited(skb, ip).is_some(),
        None => false,
    }
}

#[inline(always)]
fn write_reset(skb: *mut __sk_buff, ip: IpOffset) -> Option<()> {
    let packet = Skb::new(skb);
    let at = payload_offset(skb, ip);
    let mut tcp = MaybeUninit::uninit();
    let tcp: &mut [u32; reply::TCP_WORDS] = packet.fetch_to(at, &mut tcp)?;
    let addresses = swap_addresses(skb, ip)?;
    let length = payload_len(&packet, ip)?;
    let pseudo = reply::reset(tcp, length, addresses)?;
    store(skb, at, tcp)?;
    write_ip_header(skb, ip, TCP, size_of_val(tcp), addresses)?;
    resize(skb, at + size_of_val(tcp))?;

    // If the sender leaves its checksum to the network device (CHECKSUM_PARTIAL), the device also completes the checksum of the
    // reply, and the field must hold the sum of the pseudo-header. No field of the context shows this. The program detects it
    // because then this helper changes nothing (inet_proto_csum_replace4, net/core/utils.c).
    let at = at + reply::CHECKSUM_WORD * WORD;
    let full = packet.fetch::<2>(at)?;
    // SAFETY: the helper takes the context of a TC program and checks the range against the packet.
    unsafe { bpf_l4_csum_replace(skb, as_u32(at), 0, 1, size_of::<u16>() as u64) };
    let expected = if packet.fetch::<2>(at)? == full { pseudo } else { full };
    store(skb, at, &expected)
}

#[inline(always)]
fn write_prohibited(skb: *mut __sk_buff, ip: IpOffset) -> Option<()> {
    let (length, quote) = if ip.is_v6() {
        write_quote::<{ reply::QUOTE_V6 }>(skb, ip)?
    } else if Skb::new(skb).fetch(ip.offset())? == [0x45] {
        write_quote::<{ reply::QUOTE_V4 }>(skb, ip)?
    } else {
        // The header has options: quotes as many words as the largest header needs.
        write_quote::<{ reply::QUOTE_V4_OPTIONS }>(skb, ip)?
    };
    let length = Skb::new(skb).verifier_opaque(reply::ICMP_WORDS * WORD + length);
    let addresses = swap_addresses(skb, ip)?;
    let (protocol, header) = if ip.is_v6() {
        (ICMP_V6, reply::prohibited_v6(quote, length, addresses))
    } else {
        (ICMP, reply::prohibited_v4(quote))
    };
    write_ip_header(skb, ip, protocol, length, addresses)?;
    store(skb, payload_offset(skb, ip), &header)
}

/// Returns the length of the IP payload in bytes, according to the IP header.
#[inline(always)]
fn payload_len(packet: &Skb, ip: IpOffset) -> Option<u32> {
    let (at, header) = if ip.is_v6() { (4, 0) } else { (2, 20) };
    let length = u16::from_be_bytes(packet.fetch(ip.offset() + at)?);
    Some(u32::from(length).saturating_sub(header))
}

/// Returns the offset of the IP payload of the reply.
#[inline(always)]
fn payload_offset(skb: *mut __sk_buff, ip: IpOffset) -> usize {
    let length = if ip.is_v6() { 40 } else { 20 };
    Skb::new(skb).verifier_opaque(ip.offset() + length)
}

/// Truncates the IP packet to its first `N` words, and moves them back to make room for IP and ICMP header before them.
/// Returns the number of quoted bytes, and their sum.
#[inline(always)]
fn write_quote<const N: usize>(skb: *mut __sk_buff, ip: IpOffset) -> Option<(usize, Sum)> {
    let mut quote = MaybeUninit::uninit();
    let quote: &mut [u32; N] = Skb::new(skb).fetch_to(ip.offset(), &mut quote)?;
    let at = payload_offset(skb, ip) + reply::ICMP_WORDS * WORD;
    resize(skb, at + size_of_val(quote))?;
    store(skb, at, quote)?;
    Some((size_of_val(quote), checksum(quote)))
}

/// Returns the sum of `words`. Uses a helper, because adding many words costs many instructions.
#[inline(always)]
fn checksum<const N: usize>(words: &mut [u32; N]) -> Sum {
    // SAFETY: the helper reads no more than these words.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, words.as_mut_ptr(), as_u32(N * WORD), 0) };
    Sum::new(sum.cast_unsigned() & 0xffff_ffff)
}

/// Writes the IP header up to its addresses.
#[inline(always)]
fn write_ip_header(
    skb: *mut __sk_buff,
    ip: IpOffset,
    protocol: u8,
    length: usize,
    addresses: Sum,
) -> Option<()> {
    if ip.is_v6() {
        store(skb, ip.offset(), &reply::ipv6_header_start(protocol, length))
    } else {
        store(skb, ip.offset(), &reply::ipv4_header_start(protocol, length, addresses))
    }
}

/// Swaps source and destination address. Returns the sum of both addresses.
#[inline(always)]
fn swap_addresses(skb: *mut __sk_buff, ip: IpOffset) -> Option<Sum> {
    if ip.is_v6() {
        swap_halves::<{ 2 * 4 }>(skb, ip.offset() + reply::ADDRESSES_V6 * WORD)
    } else {
        swap_halves::<2>(skb, ip.offset() + reply::ADDRESSES_V4 * WORD)
    }
}

/// Swaps the halves of the `N` words at offset `at`. Returns the sum of all words.
#[inline(always)]
fn swap_halves<const N: usize>(skb: *mut __sk_buff, at: usize) -> Option<Sum> {
    let mut halves = MaybeUninit::uninit();
    let halves: &mut [u32; N] = Skb::new(skb).fetch_to(at, &mut halves)?;
    let sum = checksum(halves);
    let (first, second) = halves.split_at_mut(N / 2);
    first.swap_with_slice(second);
    store(skb, at, halves)?;
    Some(sum)
}

/// Swaps source and destination address of the Ethernet header.
#[inline(always)]
fn swap_macs(skb: *mut __sk_buff) -> Option<()> {
    let mut addresses = MaybeUninit::uninit();
    let addresses: &mut [u16; 6] = Skb::new(skb).fetch_to(0, &mut addresses)?;
    let (destination, source) = addresses.split_at_mut(3);
    destination.swap_with_slice(source);
    store(skb, 0, addresses)
}

/// Sets the length of the packet in bytes. The helper also makes the packet linear and resets its GSO state.
#[inline(always)]
fn resize(skb: *mut __sk_buff, length: usize) -> Option<()> {
    // SAFETY: the helper takes the context of a TC program, and rejects invalid lengths.
    let failed = unsafe { bpf_skb_change_tail(skb, as_u32(length), 0) };
    (failed == 0).then_some(())
}

#[inline(always)]
fn store<T, const N: usize>(skb: *mut __sk_buff, offset: usize, content: &[T; N]) -> Option<()> {
    let (from, length) = (content.as_ptr().cast(), as_u32(size_of_val(content)));
    // SAFETY: `from` and `length` describe `content`. The helper checks the range against the packet.
    let failed =
        unsafe { bpf_skb_store_bytes(skb, as_u32(offset), from, length, u64::from(BPF_F_RECOMPUTE_CSUM)) };
    (failed == 0).then_some(())
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "offsets and lengths are within a few headers")]
const fn as_u32(length: usize) -> u32 {
    length as u32
}

//! Scoped exemptions and explained denials: connects denied callers to a listener in their own network namespace, and shows them
//! the endpoint as peer.
//!
//! The listener decides about each request, or refuses all of them. The programs deny all packets of the caller to the endpoint as
//! before.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext,
};
use imds_ebpf_common::{
    Address, ExemptionKey, ListenerKey, RedirectRecord, Subject, SubjectKind, opaque::opaque,
    redirect::HTTP_PORT,
};

use crate::maps;

/// 127.0.0.1 in network byte order.
const LOOPBACK_V4: u32 = u32::from_ne_bytes([127, 0, 0, 1]);
/// Third word of IPv4-mapped addresses, in network byte order.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
/// Last word of `::1`, in network byte order.
const LOOPBACK_V6: u32 = u32::from_ne_bytes([0, 0, 0, 1]);

/// Listener to which a call was redirected.
#[derive(Clone, Copy)]
pub(crate) struct Listener(u32);

impl Listener {
    /// The call was not redirected.
    pub(crate) const NONE: Self = Self(0);
    /// Flag beside the port of a listener that only explains the denial.
    const EXPLAINS: u32 = 1 << 16;

    #[inline(always)]
    pub(crate) const fn is_some(self) -> bool {
        self.0 != 0
    }

    /// Reports whether the listener only explains the denial.
    #[inline(always)]
    pub(crate) const fn explains(self) -> bool {
        self.0 & Self::EXPLAINS != 0
    }
}

/// Redirects a connect(2) to the endpoint `address` from the network namespace with this cookie, if it has a listener.
#[inline(always)]
pub(crate) fn connect_v4(call: *mut bpf_sock_addr, cookie: u64, address: &Address) -> Listener {
    let listener = Listener(find_listener(cookie, address));
    if listener.is_some() {
        set_v4(call, LOOPBACK_V4);
        set_port(call, listener.0);
    }
    listener
}

/// IPv6 variant of [`connect_v4`]. IPv4 endpoints have a listener at 127.0.0.1, which IPv6 sockets
/// reach only in the IPv4-mapped form. The other forms that embed an IPv4 address stay denied.
#[inline(always)]
pub(crate) fn connect_v6(call: *mut bpf_sock_addr, cookie: u64, address: &Address) -> Listener {
    // Read again, because few callers get here, and keeping the words would cost all of them.
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let words = unsafe { (*call).user_ip6 };
    let [first, second, third, last] = words.map(u64::from);
    if address.halves() != [first | second << 32, third | last << 32] {
        return Listener::NONE;
    }
    let listener = Listener(find_listener(cookie, address));
    if !listener.is_some() {
        return listener;
    }
    let is_mapped = is_mapped(words);
    let (third, last) = if is_mapped { (MAPPED, LOOPBACK_V4) } else { (0, LOOPBACK_V6) };
    set_v6(call, [0, 0, third, last]);
    set_port(call, listener.0);
    listener
}

/// Replaces the peer of an IPv4 socket by the endpoint if it is a listener of a scoped exemption.
#[inline(always)]
pub(crate) fn restore_peer_v4(ctx: &SockAddrContext) {
    let call = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let peer = unsafe { (*call).user_ip4 };
    if peer != LOOPBACK_V4 {
        return;
    }
    if let Some(endpoint) = find_endpoint(call, ListenerKey::V4) {
        let [_, second] = endpoint.halves();
        set_v4(call, upper(second));
        set_port(call, HTTP_PORT.into());
    }
}

/// IPv6 variant of [`restore_peer_v4`].
#[inline(always)]
pub(crate) fn restore_peer_v6(ctx: &SockAddrContext) {
    let call = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let words = unsafe { (*call).user_ip6 };
    let [first, second, third, last] = words;
    let version = if is_mapped(words) && last == LOOPBACK_V4 {
        ListenerKey::V4
    } else if first | second | third == 0 && last == LOOPBACK_V6 {
        ListenerKey::V6
    } else {
        return;
    };
    if let Some(endpoint) = find_endpoint(call, version) {
        let [first, second] = endpoint.halves();
        set_v6(call, [lower(first), upper(first), lower(second), upper(second)]);
        set_port(call, HTTP_PORT.into());
    }
}

/// Returns the port of the listener with [`Listener::EXPLAINS`] if that applies, or 0. A separate function, because few calls need it.
#[inline(never)]
fn find_listener(cookie: u64, address: &Address) -> u32 {
    let (port, rule) = maps::listener(&ExemptionKey {
        address: *address,
        subject: Subject::new(SubjectKind::Netns, cookie),
    });
    if port != 0 && rule == RedirectRecord::EXPLAINS { port | Listener::EXPLAINS } else { port }
}

/// Returns the endpoint of the listener that is the peer of the socket.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the first half of the field has the port")]
fn find_endpoint(call: *mut bpf_sock_addr, version: u32) -> Option<Address> {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let port = unsafe { (*call).user_port };
    // SAFETY: the helper takes the context of a socket address program.
    let cookie = unsafe { bpf_get_netns_cookie(call.cast()) };
    maps::redirected_endpoint(&ListenerKey { cookie, port: u16::from_be(port as u16).into(), version })
}

#[inline(always)]
fn is_mapped([first, second, third, _]: [u32; 4]) -> bool {
    first | second == 0 && third == MAPPED
}

/// Returns the first of the two words of half an address, in memory order.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "takes the lower half")]
const fn lower(half: u64) -> u32 {
    half as u32
}

/// Returns the second of the two words of half an address, in memory order.
#[inline(always)]
const fn upper(half: u64) -> u32 {
    lower(half >> 32)
}

#[inline(always)]
fn set_v4(call: *mut bpf_sock_addr, address: u32) {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let field = unsafe { ptr::addr_of_mut!((*call).user_ip4) };
    // SAFETY: the pointer to a field of the context is valid.
    unsafe { field.write_volatile(address) };
}

/// Writes word by word: kernels before 5.3 reject wider writes, and the compiler would combine plain ones.
#[inline(always)]
fn set_v6(call: *mut bpf_sock_addr, words: [u32; 4]) {
    let [first, second, third, last] = words;
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let address = unsafe { ptr::addr_of_mut!((*call).user_ip6) }.cast::<u32>();
    for (index, word) in [(0, first), (1, second), (2, third), (3, last)] {
        let field = address.wrapping_add(index);
        // SAFETY: the pointer into a field of the context is valid.
        unsafe { field.write_volatile(word) };
    }
}

/// Writes a port in host byte order. The field has the port in network byte order in its first half.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits")]
fn set_port(call: *mut bpf_sock_addr, port: u32) {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let field = unsafe { ptr::addr_of_mut!((*call).user_port) };
    // Opaque, so that the compiler writes the whole field.
    let port = opaque(u64::from((port as u16).to_be())) as u32;
    // SAFETY: the pointer to a field of the context is valid.
    unsafe { field.write_volatile(port) };
}

//! The guarded endpoints.

use crate::{opaque::opaque_xor, packet::Packet};

/// The instance metadata service of nearly every cloud, in network byte order (RFC 3927 link-local block).
pub const IMDS_IPV4: [u8; 4] = [169, 254, 169, 254];

/// Most endpoints that can be guarded at a time.
pub const MAX_ENDPOINTS: usize = 256;
/// Most services that can be kept at one address.
pub const MAX_KEPT: usize = 8;
/// Bytes of an endpoint's name, of which the last is zero.
pub const NAME_LEN: usize = 16;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// What a packet is for at its destination, and what can be kept open there. Aligned to be compared as one word.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Service {
    /// Destination port, in host byte order.
    pub port: u16,
    /// IP protocol number: [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl Service {
    /// In the place of no service: protocol 0 is the IPv6 hop-by-hop header and has no ports.
    pub const NONE: Self = Self::new(0, 0);

    /// A port, in host byte order, of a protocol.
    #[inline(always)]
    #[must_use]
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self { port, protocol, reserved: 0 }
    }

    /// The same, but one of which a verifier does not know [how it came about](Packet::forget_origin).
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "it comes back as it went")]
    pub(crate) fn without_origin<P: Packet + ?Sized>(self, packet: &P) -> Self {
        Self::from_number(packet.forget_origin(self.number() as usize) as u32)
    }

    /// The one with this [number](Service::number).
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        let [port_0, port_1, protocol, reserved] = number.to_ne_bytes();
        Self { port: u16::from_ne_bytes([port_0, port_1]), protocol, reserved }
    }

    /// Port and protocol in one.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u32 {
        let ([port_0, port_1], protocol) = (self.port.to_ne_bytes(), self.protocol);
        u32::from_ne_bytes([port_0, port_1, protocol, self.reserved])
    }
}

/// A guarded endpoint: everything at its address is denied, except the services that are kept.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// Name, padded with zero bytes.
    pub name: [u8; NAME_LEN],
    /// Number of the endpoint, from 1, in the order of the configuration.
    pub id: u32,
    /// What is kept.
    pub keep: Keep,
}

impl Endpoint {
    /// The kept services.
    pub fn kept(&self) -> impl Iterator<Item = Service> + '_ {
        self.keep.iter().copied().take_while(|service| service.protocol != 0)
    }
}

/// Kept services; [`Service::NONE`] after the last.
pub type Keep = [Service; MAX_KEPT];

/// Whether anything is kept, so that a packet's ports matter.
#[inline(always)]
#[must_use]
pub const fn keeps_any(keep: &Keep) -> bool {
    keep[0].protocol != 0
}

/// Reports whether `service` is kept. A separate function in BPF programs, so that the verifier follows it once.
#[cfg_attr(target_arch = "bpf", inline(never))]
#[cfg_attr(not(target_arch = "bpf"), inline(always))]
#[must_use]
pub fn keeps(keep: &Keep, service: Service) -> bool {
    // By arithmetic, so that the verifier has one way through here and not eight, and two at a time: with 1 taken off each
    // half, a zero half is the only one whose highest bit is set and was not before, but for a half above one that is zero
    // itself. Opaque, as the compiler else makes branches of it.
    const ONES: u64 = 0x0000_0001_0000_0001;
    let wanted = u64::from(service.number()) * ONES;
    let mut found = 0;
    for pair in keep.as_chunks::<2>().0 {
        let [first, second] = pair;
        let difference = opaque_xor(u64::from(second.number()) << 32 | u64::from(first.number()), wanted);
        found |= difference.wrapping_sub(ONES) & !difference;
    }
    service.protocol != 0 && found & (ONES << 31) != 0
}

const _: () = assert!(size_of::<Service>() == 4);
const _: () = assert!(size_of::<Endpoint>() == 52);

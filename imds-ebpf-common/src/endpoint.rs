//! Protected endpoints and their allowed ports.

use crate::{opaque::opaque_xor, packet::Packet};

/// Address of the instance metadata service on most clouds, in network byte order (RFC 3927 link-local block).
pub const IMDS_IPV4: [u8; 4] = [169, 254, 169, 254];

/// Largest number of protected endpoints.
pub const MAX_ENDPOINTS: usize = 256;
/// Largest number of allowed ports of one endpoint.
pub const MAX_ALLOWED_PORTS: usize = 8;
/// Size of an endpoint's name in bytes, including the terminating zero.
pub const NAME_LEN: usize = 16;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Transport protocol and destination port. Aligned so that the programs compare it as one word.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Service {
    /// Destination port, in host byte order.
    pub port: u16,
    /// IP protocol number: [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Explicit padding, always written as 0.
    pub reserved: u8,
}

impl Service {
    /// Placeholder for no service: protocol 0 is the IPv6 hop-by-hop header, which has no ports.
    pub const NONE: Self = Self::new(0, 0);

    /// Creates a service from an IP protocol number and a port in host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self { port, protocol, reserved: 0 }
    }

    /// Returns the service with bounds that the verifier does not know, see [`Packet::verifier_opaque`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the number has 32 bits")]
    pub(crate) fn hide_bounds<P: Packet + ?Sized>(self, packet: &P) -> Self {
        Self::from_number(packet.verifier_opaque(self.number() as usize) as u32)
    }

    /// Returns the service with this [number](Service::number).
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        let [port_0, port_1, protocol, reserved] = number.to_ne_bytes();
        Self { port: u16::from_ne_bytes([port_0, port_1]), protocol, reserved }
    }

    /// Returns port and protocol as one word in memory order.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u32 {
        let ([port_0, port_1], protocol) = (self.port.to_ne_bytes(), self.protocol);
        u32::from_ne_bytes([port_0, port_1, protocol, self.reserved])
    }
}

/// A protected endpoint: requests to its address are denied, except to its allowed ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// Name, padded with zero bytes.
    pub name: [u8; NAME_LEN],
    /// Number of the endpoint in the configuration, from 1.
    pub id: u32,
    /// Allowed ports; all other ports are denied.
    pub allow_ports: AllowedPorts,
}

impl Endpoint {
    /// Iterates over the allowed ports, without the unused entries.
    pub fn allowed_ports(&self) -> impl Iterator<Item = Service> + '_ {
        self.allow_ports.iter().copied().take_while(|service| service.protocol != 0)
    }
}

/// Allowed ports of an endpoint; [`Service::NONE`] after the last one.
pub type AllowedPorts = [Service; MAX_ALLOWED_PORTS];

/// Reports whether an endpoint has allowed ports. If not, its verdict does not depend on the ports of the packet.
#[inline(always)]
#[must_use]
pub const fn allows_any(allowed_ports: &AllowedPorts) -> bool {
    allowed_ports[0].protocol != 0
}

/// Reports whether `service` is an allowed port. A separate function in BPF programs, so that the verifier checks it once.
#[cfg_attr(target_arch = "bpf", inline(never))]
#[cfg_attr(not(target_arch = "bpf"), inline(always))]
#[must_use]
pub fn allows(allowed_ports: &AllowedPorts, service: Service) -> bool {
    // Compares without branches, so that the verifier follows one path and not eight. Each step compares two services: XOR
    // makes the half of an equal service zero, and subtracting 1 sets the highest bit of a zero half. `& !difference` ignores
    // halves that had the bit before. The borrow of a zero lower half can also set the bit of the upper half, but then the
    // lower half matches already. The XOR is opaque, because LLVM would turn it back into branches.
    const ONES: u64 = 0x0000_0001_0000_0001;
    let pattern = u64::from(service.number()) * ONES;
    let mut found = 0;
    for pair in allowed_ports.as_chunks::<2>().0 {
        let [first, second] = pair;
        let difference = opaque_xor(u64::from(second.number()) << 32 | u64::from(first.number()), pattern);
        found |= difference.wrapping_sub(ONES) & !difference;
    }
    service.protocol != 0 && found & (ONES << 31) != 0
}

const _: () = assert!(size_of::<Service>() == 4);
const _: () = assert!(size_of::<Endpoint>() == 52);

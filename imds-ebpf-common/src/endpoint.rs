//! The guarded endpoints, and the filter that tells most other addresses from them without a lookup.

use core::hint;

use crate::address::{Address, SLOTS};

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

    /// Both in one.
    #[inline(always)]
    fn number(self) -> u32 {
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
    /// Number of the endpoint, from 1 to [`MAX_ENDPOINTS`]. It is the same for as long as the address is guarded.
    pub id: u32,
    /// Kept services; [`Service::NONE`] after the last.
    pub keep: [Service; MAX_KEPT],
}

impl Endpoint {
    /// Whether anything at the address is kept, so that a packet's ports matter.
    #[inline(always)]
    #[must_use]
    pub fn keeps_any(&self) -> bool {
        self.keep[0].protocol != 0
    }

    /// Whether `service` is kept.
    #[inline(always)]
    #[must_use]
    pub fn keeps(&self, service: Service) -> bool {
        // By arithmetic, so that the verifier has one way through here and not eight: the highest bit of each difference
        // with its negative is set where there is a difference. Hidden from the compiler, which else makes branches of it.
        let mut differs = u32::MAX;
        for kept in &self.keep {
            let difference = kept.number() ^ service.number();
            differs &= hint::black_box(difference | difference.wrapping_neg());
        }
        service.protocol != 0 && differs >> 31 == 0
    }

    /// The kept services.
    pub fn kept(&self) -> impl Iterator<Item = Service> + '_ {
        self.keep.iter().copied().take_while(|service| service.protocol != 0)
    }
}

/// What the programs read without a lookup. One bit for each of the slots that addresses fold to: where an address's bit
/// is not set, no endpoint has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Filter {
    /// The slots, from the lowest bit of the first byte on.
    pub bits: [u8; SLOTS / 8],
    /// The first endpoints at which nothing is kept: their addresses say all that there is to know.
    pub closed: [Address; MAX_CLOSED],
    /// Their numbers, in the same order.
    pub closed_ids: [u32; MAX_CLOSED],
    /// Zero.
    pub reserved: u32,
}

/// Most endpoints that are [`Filter::closed`]: as many as any cloud has without what is kept there, and each costs a
/// comparison.
pub const MAX_CLOSED: usize = 3;

impl Filter {
    /// Matches nothing.
    pub const EMPTY: Self = Self {
        bits: [0; SLOTS / 8],
        closed: [Address::NONE; MAX_CLOSED],
        closed_ids: [0; MAX_CLOSED],
        reserved: 0,
    };

    /// Byte and bit of a slot.
    #[inline(always)]
    #[must_use]
    pub const fn position(slot: u16) -> (usize, u32) {
        ((slot >> 3) as usize, (slot & 7) as u32)
    }

    /// The filter for these endpoints.
    #[must_use]
    pub fn of<'a>(endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)>) -> Self {
        let mut filter = Self::EMPTY;
        let mut closed = filter.closed.iter_mut().zip(&mut filter.closed_ids);
        for (address, endpoint) in endpoints {
            let (byte, bit) = Self::position(address.slot());
            filter.bits[byte] |= 1 << bit;
            if !endpoint.keeps_any()
                && let Some((place, id)) = closed.next()
            {
                (*place, *id) = (address, endpoint.id);
            }
        }
        filter
    }

    /// Whether an address with this slot may be an endpoint's.
    #[must_use]
    pub fn has(&self, slot: u16) -> bool {
        let (byte, bit) = Self::position(slot);
        self.bits[byte] >> bit & 1 == 1
    }

    /// The number of the endpoint with this address, if it is one of the closed.
    #[must_use]
    pub fn closed_id(&self, address: &Address) -> Option<u32> {
        self.closed.iter().zip(self.closed_ids).find(|(closed, _)| *closed == address).map(|(_, id)| id)
    }

    /// Of the closed, only those that `other` has with the same number.
    #[must_use]
    pub fn closed_as_in(mut self, other: &Self) -> Self {
        for (address, id) in self.closed.iter_mut().zip(&mut self.closed_ids) {
            if other.closed_id(address) != Some(*id) {
                (*address, *id) = (Address::NONE, 0);
            }
        }
        self
    }

    /// Matches what `other` matches, too. What is closed stays as it is.
    #[must_use]
    pub fn and_slots_of(mut self, other: &Self) -> Self {
        for (to, from) in self.bits.iter_mut().zip(other.bits) {
            *to |= from;
        }
        self
    }
}

const _: () = assert!(size_of::<Service>() == 4);
const _: () = assert!(size_of::<Endpoint>() == 52);
const _: () = assert!(size_of::<Filter>() == 8192 + 20 * MAX_CLOSED + 4);

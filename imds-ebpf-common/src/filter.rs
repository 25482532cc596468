//! The policy that the programs read without a map lookup: protected addresses, their allowed ports, and a bitmap of
//! identities that may be exempt.

use crate::{
    address::{Address, SLOTS},
    endpoint::{AllowedPorts, Endpoint, MAX_ALLOWED_PORTS, MAX_ENDPOINTS, Service},
    exemption::{SUBJECT_SLOTS, Subject},
};

/// Number of hash buckets of an [`EndpointTable`]. With 256 endpoints most buckets have at most one entry.
pub const BUCKETS: usize = 1 << 12;
/// Largest number of entries of a bucket.
pub const MAX_BUCKET_LEN: usize = 4;

/// The policy: two bitmaps that exclude most addresses and senders, and two tables of endpoints.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PolicyFilter {
    /// Bitmap of the slots of protected addresses, lowest bit of the first byte first. If the bit of an address is 0, the
    /// address is not protected.
    pub addresses: [u8; SLOTS / 8],
    /// Bitmap of the slots of exempt identities. If the bit of an identity is 0, it is not exempt.
    pub subjects: [u8; SUBJECT_SLOTS / 8],
    /// Index of the effective table, 0 or 1. User space writes the other one.
    pub current: u64,
    /// The effective table, and the one that the next change is written to.
    pub tables: [EndpointTable; 2],
}

/// Hash table of the endpoints, with the slot of the address as hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EndpointTable {
    /// Number of the first entry of each bucket, from 1; 0 for an empty bucket.
    pub heads: [u16; BUCKETS],
    /// Entries of all buckets. Unused ones are [`EndpointEntry::EMPTY`].
    pub entries: [EndpointEntry; MAX_ENDPOINTS],
}

/// Entry of an [`EndpointTable`]: the part of an endpoint that the programs need.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EndpointEntry {
    /// Address of the protected endpoint.
    pub address: Address,
    /// Allowed ports of the endpoint.
    pub allowed_ports: AllowedPorts,
    /// Number of the next entry of the bucket, from 1; 0 for none.
    pub next: u64,
}

impl EndpointEntry {
    /// Unused entry: no endpoint has [`Address::NONE`].
    pub const EMPTY: Self =
        Self { address: Address::NONE, allowed_ports: [Service::NONE; MAX_ALLOWED_PORTS], next: 0 };
}

/// Returns the bucket of an address with this slot. Folds the slot again, so that consecutive addresses get different buckets.
#[inline(always)]
#[must_use]
pub const fn bucket(slot: u16) -> usize {
    (slot ^ (slot >> 4)) as usize % BUCKETS
}

impl EndpointTable {
    /// Table without endpoints: all buckets are empty.
    pub const EMPTY: Self = Self { heads: [0; BUCKETS], entries: [EndpointEntry::EMPTY; MAX_ENDPOINTS] };

    /// Replaces all entries. The caller passes at most [`MAX_ENDPOINTS`] endpoints, and at most [`MAX_BUCKET_LEN`] per
    /// [`bucket`].
    fn fill<'a>(&mut self, endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)>) {
        *self = Self::EMPTY;
        for ((entry, number), (address, endpoint)) in self.entries.iter_mut().zip(1..).zip(endpoints) {
            let Some(head) = self.heads.get_mut(bucket(address.slot())) else { continue };
            *entry = EndpointEntry { address, allowed_ports: endpoint.allow_ports, next: u64::from(*head) };
            *head = number;
        }
    }

    /// Returns the allowed ports of `address`, or `None` if it is not protected.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<&AllowedPorts> {
        let mut number = usize::from(*self.heads.get(bucket(address.slot()))?);
        for _ in 0..MAX_BUCKET_LEN {
            let entry = self.entries.get(number.checked_sub(1)?)?;
            if entry.address == address {
                return Some(&entry.allowed_ports);
            }
            number = usize::try_from(entry.next).ok()?;
        }
        None
    }
}

impl PolicyFilter {
    /// Filter that protects no address.
    #[expect(clippy::large_stack_arrays, reason = "initial value of a global variable of the programs")]
    pub const EMPTY: Self = Self {
        addresses: [0; SLOTS / 8],
        subjects: [0; SUBJECT_SLOTS / 8],
        current: 0,
        tables: [EndpointTable::EMPTY; 2],
    };

    /// Returns the byte index and the bit number of a slot in a bitmap.
    #[inline(always)]
    #[must_use]
    pub const fn position(slot: u16) -> (usize, u32) {
        ((slot >> 3) as usize, (slot & 7) as u32)
    }

    /// Creates a filter with these endpoints and without exempt identities.
    #[must_use]
    pub fn new<'a>(endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)> + Clone) -> Self {
        let mut filter = Self::EMPTY;
        filter.set_endpoints(endpoints);
        filter
    }

    /// Writes `endpoints` to the other table and makes it the effective one.
    pub fn set_endpoints<'a>(
        &mut self,
        endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)> + Clone,
    ) {
        self.addresses = Self::EMPTY.addresses;
        for (address, _) in endpoints.clone() {
            set_bit(&mut self.addresses, address.slot());
        }
        self.current ^= 1;
        self.table_mut().fill(endpoints);
    }

    /// Returns the table that the programs use.
    #[must_use]
    pub fn table(&self) -> &EndpointTable {
        let [first, second] = &self.tables;
        if self.current & 1 == 0 { first } else { second }
    }

    fn table_mut(&mut self) -> &mut EndpointTable {
        let [first, second] = &mut self.tables;
        if self.current & 1 == 0 { first } else { second }
    }

    /// Reports whether an address with this slot may be protected.
    #[must_use]
    pub fn has_address(&self, slot: u16) -> bool {
        has_bit(&self.addresses, slot)
    }

    /// Reports whether an identity with this slot may be exempt.
    #[must_use]
    pub fn has_subject(&self, slot: u16) -> bool {
        has_bit(&self.subjects, slot)
    }

    /// Replaces the bitmap of identities.
    pub fn set_subjects(&mut self, subjects: impl IntoIterator<Item = Subject>) {
        self.subjects = Self::EMPTY.subjects;
        for subject in subjects {
            set_bit(&mut self.subjects, subject.slot());
        }
    }

    /// Adds the address bits of `other`, so that the old and the new endpoints are protected during a change.
    pub fn add_addresses(&mut self, other: &Self) {
        for (to, from) in self.addresses.iter_mut().zip(other.addresses) {
            *to |= from;
        }
    }
}

fn has_bit(bitmap: &[u8], slot: u16) -> bool {
    let (byte, bit) = PolicyFilter::position(slot);
    bitmap.get(byte).is_some_and(|byte| byte >> bit & 1 == 1)
}

fn set_bit(bitmap: &mut [u8], slot: u16) {
    let (byte, bit) = PolicyFilter::position(slot);
    if let Some(byte) = bitmap.get_mut(byte) {
        *byte |= 1 << bit;
    }
}

const _: () = assert!(size_of::<EndpointEntry>() == 56);
const _: () = assert!(size_of::<EndpointTable>() == 2 * BUCKETS + 56 * MAX_ENDPOINTS);
const _: () = assert!(size_of::<PolicyFilter>() == 8192 + 2048 + 8 + 2 * size_of::<EndpointTable>());

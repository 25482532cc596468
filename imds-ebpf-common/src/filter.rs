//! What the programs go by, in one variable of theirs, so that they need no lookup: which addresses are guarded, what is
//! kept there, and who may be exempt.

use crate::{
    address::{Address, SLOTS},
    endpoint::{Endpoint, Keep, MAX_ENDPOINTS, MAX_KEPT, Service},
    exemption::{SUBJECT_SLOTS, Subject},
};

/// Chains of a [`Table`]: so many that nearly all have one row at most.
pub const CHAINS: usize = 1 << 12;
/// Most rows of a chain.
pub const MAX_CHAIN: usize = 4;

/// Two bitmaps that tell most addresses and senders from those that matter, and the endpoints.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Filter {
    /// One bit for each of the slots that addresses fold to, from the lowest bit of the first byte on: where an address's
    /// bit is not set, no endpoint has it.
    pub bits: [u8; SLOTS / 8],
    /// One bit for each of the slots that subjects fall in: where a subject's bit is not set, it is exempt from nothing.
    pub subjects: [u8; SUBJECT_SLOTS / 8],
    /// Which of the tables is in force: 0 or 1. The other one can be written meanwhile.
    pub current: u64,
    /// The endpoints.
    pub tables: [Table; 2],
}

/// The endpoints, found by the slot of their address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Table {
    /// Number of the first row of each chain, from 1; 0 where it has none.
    pub heads: [u16; CHAINS],
    /// The rows.
    pub rows: [Row; MAX_ENDPOINTS],
}

/// An endpoint, as the programs know it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Row {
    /// Its address.
    pub address: Address,
    /// What is kept there.
    pub keep: Keep,
    /// Number of the next row of the chain, from 1; 0 for none.
    pub next: u64,
}

impl Row {
    /// No endpoint.
    pub const EMPTY: Self = Self { address: Address::NONE, keep: [Service::NONE; MAX_KEPT], next: 0 };
}

/// The chain of an address with this slot: folded once more, so that addresses in a row have chains of their own.
#[inline(always)]
#[must_use]
pub const fn chain(slot: u16) -> usize {
    (slot ^ (slot >> 4)) as usize % CHAINS
}

impl Table {
    /// No endpoints.
    pub const EMPTY: Self = Self { heads: [0; CHAINS], rows: [Row::EMPTY; MAX_ENDPOINTS] };

    /// Writes these endpoints, of which there are [`MAX_ENDPOINTS`] at most, and [`MAX_CHAIN`] in a [`chain`].
    fn fill<'a>(&mut self, endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)>) {
        *self = Self::EMPTY;
        for ((row, number), (address, endpoint)) in self.rows.iter_mut().zip(1..).zip(endpoints) {
            let Some(head) = self.heads.get_mut(chain(address.slot())) else { continue };
            *row = Row { address, keep: endpoint.keep, next: u64::from(*head) };
            *head = number;
        }
    }

    /// What is kept at this address, if it is an endpoint's.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<&Keep> {
        let mut number = usize::from(*self.heads.get(chain(address.slot()))?);
        for _ in 0..MAX_CHAIN {
            let row = self.rows.get(number.checked_sub(1)?)?;
            if row.address == address {
                return Some(&row.keep);
            }
            number = usize::try_from(row.next).ok()?;
        }
        None
    }
}

impl Filter {
    /// Matches nothing.
    #[expect(clippy::large_stack_arrays, reason = "it starts as a variable of the programs")]
    pub const EMPTY: Self = Self {
        bits: [0; SLOTS / 8],
        subjects: [0; SUBJECT_SLOTS / 8],
        current: 0,
        tables: [Table::EMPTY; 2],
    };

    /// Byte and bit of a slot.
    #[inline(always)]
    #[must_use]
    pub const fn position(slot: u16) -> (usize, u32) {
        ((slot >> 3) as usize, (slot & 7) as u32)
    }

    /// The filter for these endpoints.
    #[must_use]
    pub fn of<'a>(endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)> + Clone) -> Self {
        let mut filter = Self::EMPTY;
        filter.set_endpoints(endpoints);
        filter
    }

    /// Makes these the endpoints, in the table that is not in force, and that is in force then.
    pub fn set_endpoints<'a>(
        &mut self,
        endpoints: impl IntoIterator<Item = (Address, &'a Endpoint)> + Clone,
    ) {
        self.bits = Self::EMPTY.bits;
        for (address, _) in endpoints.clone() {
            set_bit(&mut self.bits, address.slot());
        }
        self.current ^= 1;
        self.table_mut().fill(endpoints);
    }

    /// The table in force.
    #[must_use]
    pub fn table(&self) -> &Table {
        let [first, second] = &self.tables;
        if self.current & 1 == 0 { first } else { second }
    }

    fn table_mut(&mut self) -> &mut Table {
        let [first, second] = &mut self.tables;
        if self.current & 1 == 0 { first } else { second }
    }

    /// Whether an address with this slot may be an endpoint's.
    #[must_use]
    pub fn has(&self, slot: u16) -> bool {
        has_bit(&self.bits, slot)
    }

    /// Whether a subject in this slot may be exempt from something.
    #[must_use]
    pub fn has_subject(&self, slot: u16) -> bool {
        has_bit(&self.subjects, slot)
    }

    /// Makes these all who may be exempt.
    pub fn set_subjects(&mut self, subjects: impl IntoIterator<Item = Subject>) {
        self.subjects = Self::EMPTY.subjects;
        for subject in subjects {
            set_bit(&mut self.subjects, subject.slot());
        }
    }

    /// Matches the addresses that `other` matches, too. The rest stays as it is.
    pub fn add_slots_of(&mut self, other: &Self) {
        for (to, from) in self.bits.iter_mut().zip(other.bits) {
            *to |= from;
        }
    }
}

fn has_bit(bitmap: &[u8], slot: u16) -> bool {
    let (byte, bit) = Filter::position(slot);
    bitmap.get(byte).is_some_and(|byte| byte >> bit & 1 == 1)
}

fn set_bit(bitmap: &mut [u8], slot: u16) {
    let (byte, bit) = Filter::position(slot);
    if let Some(byte) = bitmap.get_mut(byte) {
        *byte |= 1 << bit;
    }
}

const _: () = assert!(size_of::<Row>() == 56);
const _: () = assert!(size_of::<Table>() == 2 * CHAINS + 56 * MAX_ENDPOINTS);
const _: () = assert!(size_of::<Filter>() == 8192 + 2048 + 8 + 2 * size_of::<Table>());

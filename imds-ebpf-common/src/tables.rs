//! What a verdict is looked up in.

use crate::{
    address::Address,
    endpoint::{Endpoint, Keep},
    exemption::{Exemption, Grant},
    filter::Filter,
    verdict::Mode,
};

/// Filter, endpoints and mode: maps in the BPF programs, values on the host.
pub trait Tables {
    /// Whether an address that folds to `slot` may be an endpoint's. Asked for every packet.
    fn may_guard(&self, slot: u16) -> bool;

    /// Returns the kept services of the endpoint at this address, which folds to `slot`; `None` for all other addresses.
    fn keep(&self, slot: u16, address: &Address) -> Option<&Keep>;

    /// The mode in force. Asked for packets to an endpoint.
    fn mode(&self) -> Mode;

    /// Whether a subject that falls in `slot` may be exempt from something. Asked for what would be denied.
    fn may_be_exempt(&self, slot: u16) -> bool;

    /// What is granted. Asked for what [`Tables::may_be_exempt`] lets through.
    fn grant(&self, exemption: &Exemption) -> Option<Grant>;
}

/// Tables without a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// The filter for all of `endpoints`.
    pub filter: &'a Filter,
    /// The endpoints.
    pub endpoints: &'a [(Address, Endpoint)],
    /// The exemptions, whose subjects the filter has.
    pub grants: &'a [(Exemption, Grant)],
    /// The mode.
    pub mode: Mode,
}

impl Tables for Listed<'_> {
    fn may_guard(&self, slot: u16) -> bool {
        self.filter.has(slot)
    }

    fn keep(&self, _slot: u16, address: &Address) -> Option<&Keep> {
        self.endpoints.iter().find(|(guarded, _)| guarded == address).map(|(_, endpoint)| &endpoint.keep)
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn may_be_exempt(&self, slot: u16) -> bool {
        self.filter.has_subject(slot)
    }

    fn grant(&self, exemption: &Exemption) -> Option<Grant> {
        self.grants.iter().find(|(granted, _)| granted == exemption).map(|(_, grant)| *grant)
    }
}

//! What a verdict is looked up in.

use crate::{
    address::Address,
    endpoint::{Endpoint, Filter},
    verdict::Mode,
};

/// Filter, endpoints and mode: maps in the BPF programs, values on the host.
pub trait Tables {
    /// Whether an address that folds to `slot` may be an endpoint's. Asked for every packet.
    fn may_guard(&self, slot: u16) -> bool;

    /// The number of the endpoint with this address, if nothing is kept there. `None` says nothing.
    fn closed(&self, address: &Address) -> Option<u32>;

    /// The endpoint with this address. Asked for what [`Tables::may_guard`] lets through.
    fn endpoint(&self, address: &Address) -> Option<&Endpoint>;

    /// The mode in force. Asked for packets to an endpoint.
    fn mode(&self) -> Mode;
}

/// Tables without a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// The filter for all of `endpoints`.
    pub filter: &'a Filter,
    /// The endpoints.
    pub endpoints: &'a [(Address, Endpoint)],
    /// The mode.
    pub mode: Mode,
}

impl Tables for Listed<'_> {
    fn may_guard(&self, slot: u16) -> bool {
        self.filter.has(slot)
    }

    fn closed(&self, address: &Address) -> Option<u32> {
        self.filter.closed_id(address)
    }

    fn endpoint(&self, address: &Address) -> Option<&Endpoint> {
        self.endpoints.iter().find(|(guarded, _)| guarded == address).map(|(_, endpoint)| endpoint)
    }

    fn mode(&self) -> Mode {
        self.mode
    }
}

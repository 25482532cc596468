//! Policy lookup, implemented for the maps in the BPF programs and for plain values on the host.

use crate::{
    address::Address,
    endpoint::{AllowedPorts, Endpoint},
    exemption::{Exemption, Grant},
    filter::PolicyTable,
    policy::Mode,
};

/// Lookup of endpoints, exemptions and the mode for a verdict.
pub trait PolicyLookup {
    /// Reports whether an address with this slot may be protected. Called for every packet.
    fn may_guard(&self, slot: u16) -> bool;

    /// Returns the allowed ports of the endpoint at `address`, whose slot is `slot`, or `None` if it is not protected.
    fn allowed_ports(&self, slot: u16, address: &Address) -> Option<&AllowedPorts>;

    /// Returns the effective mode. Called only for requests to an endpoint.
    fn mode(&self) -> Mode;

    /// Reports whether a subject with this slot may be exempt. Called only for requests that would be denied.
    fn may_be_exempt(&self, slot: u16) -> bool;

    /// Returns the grant of an exemption. Called only if [`PolicyLookup::may_be_exempt`] returns `true`.
    fn grant(&self, exemption: &Exemption) -> Option<Grant>;
}

/// [`PolicyLookup`] without a kernel, for tests and tools on the host.
#[derive(Clone, Copy, Debug)]
pub struct InMemoryPolicy<'a> {
    /// Filter with all of `endpoints` and the subjects of `grants`.
    pub filter: &'a PolicyTable,
    /// Protected endpoints with their addresses.
    pub endpoints: &'a [(Address, Endpoint)],
    /// Exemptions. `filter` must contain their subjects.
    pub grants: &'a [(Exemption, Grant)],
    /// Effective mode, returned by [`PolicyLookup::mode`].
    pub mode: Mode,
}

impl PolicyLookup for InMemoryPolicy<'_> {
    fn may_guard(&self, slot: u16) -> bool {
        self.filter.has(slot)
    }

    fn allowed_ports(&self, _slot: u16, address: &Address) -> Option<&AllowedPorts> {
        self.endpoints
            .iter()
            .find(|(guarded, _)| guarded == address)
            .map(|(_, endpoint)| &endpoint.allow_ports)
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

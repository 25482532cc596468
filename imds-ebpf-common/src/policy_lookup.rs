//! Policy lookup, implemented for the maps in the BPF programs and for plain values on the host.

use crate::{
    address::Address,
    endpoint::{AllowedPorts, Endpoint},
    exemption::{ExemptionKey, ExemptionRecord},
    filter::PolicyFilter,
    policy::Mode,
};

/// Lookup of endpoints, exemptions and the mode for a verdict.
pub trait PolicyLookup {
    /// Reports whether an address with this slot may be protected. Called for every packet.
    fn may_be_protected(&self, slot: u16) -> bool;

    /// Returns the allowed ports of the endpoint at `address`, whose slot is `slot`, or `None` if it is not protected.
    fn allowed_ports(&self, slot: u16, address: &Address) -> Option<&AllowedPorts>;

    /// Returns the effective mode. Called only for requests to an endpoint.
    fn mode(&self) -> Mode;

    /// Reports whether a subject with this slot may be exempt. Called only for requests that would be denied.
    fn may_be_exempt(&self, slot: u16) -> bool;

    /// Returns the exemption with this key. Called only if [`PolicyLookup::may_be_exempt`] returns `true`.
    fn exemption(&self, key: &ExemptionKey) -> Option<ExemptionRecord>;
}

/// [`PolicyLookup`] without a kernel, for tests and tools on the host.
#[derive(Clone, Copy, Debug)]
pub struct InMemoryPolicy<'a> {
    /// Filter with all of `endpoints` and the subjects of `exemptions`.
    pub filter: &'a PolicyFilter,
    /// Protected endpoints with their addresses.
    pub endpoints: &'a [(Address, Endpoint)],
    /// Exemptions. `filter` must contain their subjects.
    pub exemptions: &'a [(ExemptionKey, ExemptionRecord)],
    /// Effective mode, returned by [`PolicyLookup::mode`].
    pub mode: Mode,
}

impl PolicyLookup for InMemoryPolicy<'_> {
    fn may_be_protected(&self, slot: u16) -> bool {
        self.filter.has_address(slot)
    }

    fn allowed_ports(&self, _slot: u16, address: &Address) -> Option<&AllowedPorts> {
        self.endpoints
            .iter()
            .find(|(protected, _)| protected == address)
            .map(|(_, endpoint)| &endpoint.allow_ports)
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn may_be_exempt(&self, slot: u16) -> bool {
        self.filter.has_subject(slot)
    }

    fn exemption(&self, key: &ExemptionKey) -> Option<ExemptionRecord> {
        self.exemptions.iter().find(|(known, _)| known == key).map(|(_, record)| *record)
    }
}

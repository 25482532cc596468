//! The verdict: a pure function of the packet and the policy.

use crate::{
    address::{Address, Destination},
    endpoint::{AllowedPorts, Service, allows, allows_any},
    link_layer::{IpOffset, LinkLayer},
    packet::{self, NoHeader, Packet, find_header, is_unrelated_fast},
    policy::{Mode, Verdict},
    policy_lookup::PolicyLookup,
};

/// Returns the verdict on a packet without exemptions: the fast path first, then the slow path.
#[inline(always)]
pub fn classify<P, T>(packet: &P, link_layer: LinkLayer, policy: &T) -> Verdict
where
    P: Packet + ?Sized,
    T: PolicyLookup + ?Sized,
{
    if is_unrelated_fast(packet, link_layer, policy) {
        return Verdict::Unrelated;
    }
    if link_layer == LinkLayer::Ethernet && packet::is_unrelated_frame(packet, policy) {
        return Verdict::Unrelated;
    }
    classify_slow(packet, link_layer, policy)
}

/// Slow path. Returns the verdict on a packet without exemptions.
///
/// Looks up the mode only if the destination is an endpoint.
#[inline(always)]
pub fn classify_slow<P, T>(packet: &P, link_layer: LinkLayer, policy: &T) -> Verdict
where
    P: Packet + ?Sized,
    T: PolicyLookup + ?Sized,
{
    match find_header(packet, link_layer) {
        Ok(ip) => lookup_endpoint(packet, ip, policy).map_or(Verdict::Unrelated, |found| found.verdict),
        Err(NoHeader::TooManyTags) => by_mode(policy),
        Err(NoHeader::NotIp) => Verdict::Unrelated,
    }
}

/// A packet to a protected endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EndpointMatch {
    /// Verdict on senders without an exemption.
    pub verdict: Verdict,
    /// Canonical address of the endpoint.
    pub destination: Address,
}

/// Returns the verdict on a packet with an IP header at `ip`, or `None` for [`Verdict::Unrelated`].
#[inline(always)]
pub fn lookup_endpoint<P, T>(packet: &P, ip: IpOffset, policy: &T) -> Option<EndpointMatch>
where
    P: Packet + ?Sized,
    T: PolicyLookup + ?Sized,
{
    let destination = packet::destination(packet, ip)?;
    let (slot, address) = (destination.slot(), destination.address().hide_bounds(packet));
    let allowed_ports = policy.allowed_ports(slot, &address)?;
    let verdict = if allows_any(allowed_ports) {
        classify_service(
            allowed_ports,
            packet.service(ip).unwrap_or(Service::NONE).hide_bounds(packet),
            policy,
        )
    } else {
        by_mode(policy)
    };
    Some(EndpointMatch { verdict: verdict.hide_bounds(packet), destination: address })
}

/// Returns the verdict on a call to `address`. `service` is `None` if protocol or port is unknown.
#[inline(always)]
pub fn classify_address<T: PolicyLookup + ?Sized>(
    address: Address,
    service: Option<Service>,
    policy: &T,
) -> Verdict {
    let destination = Destination::from_ipv6(address.octets());
    let slot = destination.slot();
    if !policy.may_be_protected(slot) {
        return Verdict::Unrelated;
    }
    match policy.allowed_ports(slot, &destination.address()) {
        Some(allowed_ports) => classify_service(allowed_ports, service.unwrap_or(Service::NONE), policy),
        None => Verdict::Unrelated,
    }
}

#[inline(always)]
fn classify_service<T: PolicyLookup + ?Sized>(
    allowed_ports: &AllowedPorts,
    service: Service,
    policy: &T,
) -> Verdict {
    if allows(allowed_ports, service) {
        return Verdict::Allowed;
    }
    by_mode(policy)
}

/// Returns the verdict on a packet that is denied in mode `enforce`.
#[inline(always)]
pub fn by_mode<T: PolicyLookup + ?Sized>(policy: &T) -> Verdict {
    match policy.mode() {
        Mode::Enforce => Verdict::Denied,
        Mode::Audit => Verdict::Audited,
        Mode::Off => Verdict::Off,
    }
}

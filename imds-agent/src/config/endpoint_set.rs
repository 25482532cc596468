//! Protected endpoints after validation, and their form in the maps.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use imds_ebpf_common::{
    Address, Endpoint as Entry, Service,
    endpoint::{MAX_ALLOWED_PORTS, NAME_LEN, TCP, UDP},
};

use crate::escape::escape_bytes;

/// A protected endpoint. All traffic to its address is denied, except to the services in `allow_ports`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Address of the service. An IPv6 address in the configuration that embeds an IPv4 address becomes the latter.
    pub address: IpAddr,
    /// Services that every pod may reach at the address, at most [`MAX_ALLOWED_PORTS`].
    pub allow_ports: Vec<AllowedPort>,
}

/// Port that every pod may reach, shown as in the configuration: `udp/53`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AllowedPort(pub Service);

impl fmt::Display for AllowedPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Service { protocol, port, .. }) = *self;
        match protocol {
            TCP => write!(formatter, "tcp/{port}"),
            UDP => write!(formatter, "udp/{port}"),
            other => write!(formatter, "{other}/{port}"),
        }
    }
}

impl Endpoint {
    fn entry(&self, id: u32) -> Entry {
        let mut allow_ports = [Service::NONE; MAX_ALLOWED_PORTS];
        for (to, from) in allow_ports.iter_mut().zip(&self.allow_ports) {
            *to = from.0;
        }
        Entry { name: padded(&self.name), id, allow_ports }
    }

    /// Returns the endpoint that a map entry describes.
    #[must_use]
    pub fn from_entry(address: Address, entry: &Entry) -> Self {
        Self {
            name: unpadded(&entry.name),
            address: plain(address),
            allow_ports: entry.allowed_ports().map(AllowedPort).collect(),
        }
    }
}

/// All protected endpoints, and the provider that they come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSet {
    configured: &'static str,
    provider: &'static str,
    endpoints: Vec<Endpoint>,
}

impl EndpointSet {
    /// Creates the set from endpoints with distinct addresses. `configured` is the provider in the configuration, and
    /// `provider` the one that it resolves to.
    #[must_use]
    pub(crate) fn new(configured: &'static str, provider: &'static str, endpoints: Vec<Endpoint>) -> Self {
        Self { configured, provider, endpoints }
    }

    /// Returns the provider in the configuration: `auto`, `none` or a name.
    #[must_use]
    pub fn configured(&self) -> &'static str {
        self.configured
    }

    /// Returns the provider whose preset is effective, or `none`.
    #[must_use]
    pub fn provider(&self) -> &'static str {
        self.provider
    }

    /// Returns the endpoints of the preset, followed by those of the configuration.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// Returns the addresses of the endpoints.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.endpoints.iter().map(|endpoint| endpoint.address).collect()
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (Address, Entry)> {
        (1..).zip(&self.endpoints).map(|(id, endpoint)| (address(endpoint.address), endpoint.entry(id)))
    }
}

/// Returns the map form of an address.
pub(crate) fn address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::from_ipv4(address.octets()),
        IpAddr::V6(address) => Address::from_ipv6(address.octets()),
    }
}

/// Returns the address of a map key. IPv4-mapped addresses become IPv4 addresses.
pub(crate) fn plain(address: Address) -> IpAddr {
    address
        .ipv4()
        .map_or_else(|| Ipv6Addr::from(address.octets()).into(), |address| Ipv4Addr::from(address).into())
}

/// Returns a name as a zero-padded field of a map entry. Names longer than 15 bytes are cut.
pub(crate) fn padded(name: &str) -> [u8; NAME_LEN] {
    let mut padded = [0; NAME_LEN];
    for (to, from) in padded.iter_mut().zip(name.bytes().take(NAME_LEN - 1)) {
        *to = from;
    }
    padded
}

/// Returns the text of a zero-padded field, escaped for output.
pub(crate) fn unpadded(text: &[u8]) -> String {
    escape_bytes(without_padding(text))
}

/// Returns the text of a zero-padded field without escaping, or `None` if it is not UTF-8.
pub(crate) fn raw(text: &[u8]) -> Option<&str> {
    str::from_utf8(without_padding(text)).ok()
}

fn without_padding(text: &[u8]) -> &[u8] {
    text.split(|&byte| byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_for_terminals() {
        assert_eq!(unpadded(b"curl\0\0x"), "curl");
        assert_eq!(unpadded(b"a\x1b[2J\nb"), r"a\u{1b}[2J\nb");
        assert_eq!(unpadded(b"\xff"), r"\xff");
        assert_eq!((raw(b"a\nb\0"), raw(b"\xff")), (Some("a\nb"), None));
    }
}

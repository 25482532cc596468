//! What is guarded, as the agent knows it: validated, and turned into the maps' form.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use imds_ebpf_common::{
    Address, Endpoint as Entry, Service,
    endpoint::{MAX_KEPT, NAME_LEN, TCP, UDP},
};

use crate::escape::escape_bytes;

/// An endpoint: all at its address is denied but the services that are kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Address; for an IPv4 address the plain form, however it was written.
    pub address: IpAddr,
    /// What pods may reach there, at most [`MAX_KEPT`].
    pub keep: Vec<Keep>,
}

/// A service that is kept, shown as in the configuration: `udp/53`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Keep(pub Service);

impl fmt::Display for Keep {
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
        let mut keep = [Service::NONE; MAX_KEPT];
        for (to, from) in keep.iter_mut().zip(&self.keep) {
            *to = from.0;
        }
        Entry { name: padded(&self.name), id, keep }
    }

    /// The endpoint that a map's entry stands for.
    #[must_use]
    pub fn from_entry(address: Address, entry: &Entry) -> Self {
        Self { name: unpadded(&entry.name), address: plain(address), keep: entry.kept().map(Keep).collect() }
    }
}

/// All that is guarded, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Guarded {
    configured: &'static str,
    provider: &'static str,
    endpoints: Vec<Endpoint>,
}

impl Guarded {
    /// Takes endpoints whose addresses differ. `configured` is the provider as the configuration has it, `provider` the
    /// one that it came to.
    #[must_use]
    pub(crate) fn new(configured: &'static str, provider: &'static str, endpoints: Vec<Endpoint>) -> Self {
        Self { configured, provider, endpoints }
    }

    /// The provider as configured: `auto`, `none` or a name.
    #[must_use]
    pub fn configured(&self) -> &'static str {
        self.configured
    }

    /// The provider whose preset is in force, or `none`.
    #[must_use]
    pub fn provider(&self) -> &'static str {
        self.provider
    }

    /// The endpoints, in the order of the preset and then of the configuration.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// Addresses of the endpoints.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.endpoints.iter().map(|endpoint| endpoint.address).collect()
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (Address, Entry)> {
        (1..).zip(&self.endpoints).map(|(id, endpoint)| (address(endpoint.address), endpoint.entry(id)))
    }
}

/// An address as the maps have it.
pub(crate) fn address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::from_ipv4(address.octets()),
        IpAddr::V6(address) => Address::from_ipv6(address.octets()),
    }
}

/// The plain form of an address that the maps have.
pub(crate) fn plain(address: Address) -> IpAddr {
    address
        .ipv4()
        .map_or_else(|| Ipv6Addr::from(address.octets()).into(), |address| Ipv4Addr::from(address).into())
}

/// A name as the maps have it: at most 15 bytes, then zeros.
pub(crate) fn padded(name: &str) -> [u8; NAME_LEN] {
    let mut padded = [0; NAME_LEN];
    for (to, from) in padded.iter_mut().zip(name.bytes().take(NAME_LEN - 1)) {
        *to = from;
    }
    padded
}

/// The text in these bytes, escaped for outputs.
pub(crate) fn unpadded(text: &[u8]) -> String {
    escape_bytes(without_padding(text))
}

/// The text in these bytes as it is; `None` if it is not UTF-8.
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

//! Protected endpoints after validation, and their form in the maps.

use std::{fmt, net::IpAddr};

use imds_ebpf_common::{
    Address, Endpoint as Entry, Service,
    endpoint::{MAX_ALLOWED_PORTS, TCP, UDP},
};
use serde::{Serialize, Serializer};

use crate::encode::{address_key, field_text, ip_address, name_field};

/// A protected endpoint. All traffic to its address is denied, except to the services in `allow_ports`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
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

impl Serialize for AllowedPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, address, allow_ports } = self;
        write!(formatter, "{address} ({name})")?;
        for (index, port) in allow_ports.iter().enumerate() {
            write!(formatter, "{} {port}", if index == 0 { ", allows" } else { "" })?;
        }
        Ok(())
    }
}

impl Endpoint {
    fn entry(&self, id: u32) -> Entry {
        let mut allow_ports = [Service::NONE; MAX_ALLOWED_PORTS];
        for (to, from) in allow_ports.iter_mut().zip(&self.allow_ports) {
            *to = from.0;
        }
        Entry { name: name_field(&self.name), id, allow_ports }
    }

    /// Returns the endpoint that a map entry describes.
    pub fn from_entry(address: Address, entry: &Entry) -> Self {
        Self {
            name: field_text(&entry.name),
            address: ip_address(address),
            allow_ports: entry.allowed_ports().map(AllowedPort).collect(),
        }
    }
}

/// All protected endpoints, and the provider that they come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSet {
    /// Provider in the configuration: `auto`, `none` or a name.
    pub configured: &'static str,
    /// Provider whose preset is effective, or `none`.
    pub provider: &'static str,
    /// Endpoints of the preset, followed by those of the configuration. Their addresses are distinct.
    pub endpoints: Vec<Endpoint>,
}

impl EndpointSet {
    /// Returns the addresses of the endpoints.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.endpoints.iter().map(|endpoint| endpoint.address).collect()
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (Address, Entry)> {
        (1..).zip(&self.endpoints).map(|(id, endpoint)| (address_key(endpoint.address), endpoint.entry(id)))
    }
}

//! Endpoints in the configuration: a provider, additional presets, and the operator's own endpoints.

use std::{collections::BTreeMap, net::IpAddr};

use imds_ebpf_common::{
    Service,
    endpoint::{MAX_ALLOWED_PORTS, MAX_ENDPOINTS, NAME_LEN, TCP, UDP},
    filter::{self, MAX_BUCKET_LEN},
};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{
    ConfigError, ConfigErrors,
    file::File,
    source::{Diagnostics, Location},
    suggest::did_you_mean,
};
use crate::{
    config::{
        endpoint_set::{AllowedPort, Endpoint, EndpointSet},
        provider::{Dmi, EXTRAS, NO_PROVIDER, PROVIDERS, Provider},
    },
    encode::address_key,
};

/// Selection of the protected endpoints. The default is the preset of the provider that DMI identifies.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    /// Selected provider. `None` stands for `auto`.
    provider: Option<&'static Provider>,
    extra: Vec<(&'static Provider, Location)>,
    own: Vec<(Endpoint, Location)>,
    /// Changes to endpoints of the provider's preset and of additional presets.
    presets: Vec<PresetChange>,
}

/// A change to an endpoint of a preset.
#[derive(Clone, Debug)]
struct PresetChange {
    name: String,
    location: Location,
    allow_ports: Vec<AllowedPort>,
}

/// `[preset.NAME]`: changes to endpoints of presets, by their names.
pub(super) type Presets = BTreeMap<Spanned<String>, PresetTable>;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PresetTable {
    allow_ports: Spanned<Vec<Spanned<String>>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EndpointTable {
    name: Spanned<String>,
    address: Spanned<String>,
    #[serde(default = "no_services")]
    allow_ports: Spanned<Vec<Spanned<String>>>,
}

fn no_services() -> Spanned<Vec<Spanned<String>>> {
    Spanned::new(0..0, Vec::new())
}

impl Endpoints {
    pub(super) fn parse(file: &File, diagnostics: &mut Diagnostics<'_>) -> Self {
        let File { provider, extra_endpoints, endpoint, preset, .. } = file;
        let mut extra = Vec::new();
        for name in extra_endpoints {
            let known = diagnostics.ok(name.span(), parse_extra(name.get_ref()));
            extra.extend(known.map(|known| (known, diagnostics.source.location(name.span()))));
        }
        Self {
            provider: diagnostics.ok(provider.span(), parse_provider(provider.get_ref())).flatten(),
            extra,
            own: endpoint.iter().filter_map(|table| parse_endpoint(table, diagnostics)).collect(),
            presets: preset.iter().map(|change| parse_preset(change, diagnostics)).collect(),
        }
    }

    /// Reports whether no endpoint is protected, independent of the machine.
    pub(super) fn is_empty(&self) -> bool {
        self.provider == Some(&NO_PROVIDER) && self.extra.is_empty() && self.own.is_empty()
    }

    /// Returns all protected endpoints on a machine with the SMBIOS fields `dmi`.
    pub fn resolve(&self, dmi: &Dmi) -> Result<EndpointSet, ConfigErrors> {
        let provider = self.provider.unwrap_or_else(|| dmi.provider());
        let mut endpoints: Vec<_> = provider.endpoints().collect();
        let mut errors = Vec::new();
        for (extra, location) in &self.extra {
            for endpoint in extra.endpoints() {
                errors.extend(add(endpoint, location, &mut endpoints).err());
            }
        }
        for change in &self.presets {
            let applied = change.apply(provider, &mut endpoints);
            errors.extend(applied.map_err(|message| change.location.error(message)).err());
        }
        for (endpoint, location) in &self.own {
            errors.extend(add(endpoint.clone(), location, &mut endpoints).err());
        }
        ConfigErrors::check(errors)?;
        let configured = self.provider.map_or("auto", |provider| provider.name);
        Ok(EndpointSet { configured, provider: provider.name, endpoints })
    }
}

impl PresetChange {
    /// Applies the change. The endpoint must belong to the provider or to an extra.
    fn apply(&self, provider: &Provider, endpoints: &mut [Endpoint]) -> Result<(), String> {
        if let Some(endpoint) = endpoints.iter_mut().find(|endpoint| endpoint.name == self.name) {
            endpoint.allow_ports.clone_from(&self.allow_ports);
            return Ok(());
        }
        let names: Vec<_> = endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
        let suggestion = did_you_mean(&self.name, names.iter().copied());
        let (name, provider) = (&self.name, provider.name);
        let valid = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Err(format!("preset.{name}: provider {provider} has no endpoint {name:?}, only {valid}{suggestion}"))
    }
}

fn add(endpoint: Endpoint, location: &Location, endpoints: &mut Vec<Endpoint>) -> Result<(), ConfigError> {
    check_new(&endpoint, endpoints).map_err(|message| location.error(message))?;
    endpoints.push(endpoint);
    Ok(())
}

fn check_new(endpoint: &Endpoint, others: &[Endpoint]) -> Result<(), String> {
    if others.len() >= MAX_ENDPOINTS {
        return Err(format!("endpoint: more than {MAX_ENDPOINTS} endpoints"));
    }
    let bucket_of = |endpoint: &Endpoint| filter::bucket(address_key(endpoint.address).slot());
    let same_bucket: Vec<_> = others.iter().filter(|other| bucket_of(other) == bucket_of(endpoint)).collect();
    if same_bucket.len() >= MAX_BUCKET_LEN {
        let address = endpoint.address;
        let addresses: Vec<_> = same_bucket.iter().map(|other| other.address.to_string()).collect();
        return Err(format!(
            "endpoint.address: hash bucket of {address} is full (at most {MAX_BUCKET_LEN} endpoints): remove one of {}",
            addresses.join(", ")
        ));
    }
    if let Some(other) = others.iter().find(|other| other.name == endpoint.name) {
        return Err(format!("endpoint.name: {:?} is already the name of {}", endpoint.name, other.address));
    }
    if let Some(other) =
        others.iter().find(|other| address_key(other.address) == address_key(endpoint.address))
    {
        return Err(format!(
            "endpoint.address: {} is already protected as {:?}",
            endpoint.address, other.name
        ));
    }
    Ok(())
}

fn parse_provider(name: &str) -> Result<Option<&'static Provider>, String> {
    if name == "auto" {
        return Ok(None);
    }
    Provider::named(name).map(Some).ok_or_else(|| {
        let valid: Vec<_> = PROVIDERS.iter().map(|provider| provider.name).collect();
        let names = ["auto", "none", "generic"].into_iter().chain(valid.iter().copied());
        let suggestion = did_you_mean(name, names);
        let valid = valid.join(", ");
        format!("provider: {name:?} is not one of auto, none, generic, {valid}{suggestion}")
    })
}

fn parse_extra(name: &str) -> Result<&'static Provider, String> {
    Provider::extra(name).ok_or_else(|| {
        let valid: Vec<_> = EXTRAS.iter().map(|extra| extra.name).collect();
        format!("extra_endpoints: {name:?} is not one of {}", valid.join(", "))
    })
}

/// Parses an endpoint. Records the errors of all its keys.
fn parse_endpoint(table: &EndpointTable, diagnostics: &mut Diagnostics<'_>) -> Option<(Endpoint, Location)> {
    let name = diagnostics.plain_name(&table.name, "endpoint.name", NAME_LEN - 1);
    let address = diagnostics.ok(table.address.span(), parse_address(table.address.get_ref()));
    let allow_ports = parse_allow_ports("endpoint.allow_ports", &table.allow_ports, diagnostics);
    // Conflicts with endpoints of the provider are checked later, when the provider is known.
    let endpoint = Endpoint { name: name?, address: address?, allow_ports };
    Some((endpoint, diagnostics.source.location(table.address.span())))
}

fn parse_preset(
    (name, table): (&Spanned<String>, &PresetTable),
    diagnostics: &mut Diagnostics<'_>,
) -> PresetChange {
    let key = format!("preset.{}.allow_ports", name.get_ref());
    let allow_ports = parse_allow_ports(&key, &table.allow_ports, diagnostics);
    let location = diagnostics.source.location(name.span());
    PresetChange { name: name.get_ref().clone(), location, allow_ports }
}

/// Parses a list of ports. Records an error for each invalid one.
fn parse_allow_ports(
    key: &str,
    texts: &Spanned<Vec<Spanned<String>>>,
    diagnostics: &mut Diagnostics<'_>,
) -> Vec<AllowedPort> {
    let count = texts.get_ref().len();
    if count > MAX_ALLOWED_PORTS {
        let message = format!("{key}: {count} ports, but at most {MAX_ALLOWED_PORTS} are supported");
        diagnostics.error(texts.span(), message);
    }
    let mut ports: Vec<AllowedPort> = Vec::new();
    // One error covers all ports beyond the maximum.
    for text in texts.get_ref().iter().take(MAX_ALLOWED_PORTS) {
        let port = parse_port(key, text.get_ref()).and_then(|port| {
            let is_new = !ports.contains(&port);
            is_new.then_some(port).ok_or_else(|| format!("{key}: {port} is listed twice"))
        });
        ports.extend(diagnostics.ok(text.span(), port));
    }
    ports
}

/// Parses the address of an endpoint. Rejects addresses that no metadata service can have.
fn parse_address(text: &str) -> Result<IpAddr, String> {
    let written: IpAddr = text.parse().map_err(|_| {
        let address = text.split_once('/').map(|(address, _)| address.parse::<IpAddr>());
        let hint =
            if matches!(address, Some(Ok(_))) { ": ranges are not supported: list the address" } else { "" };
        format!("endpoint.address: {text:?} is not an IPv4 or IPv6 address{hint}")
    })?;
    // Packets are compared in this form: an IPv6 address that embeds an IPv4 address becomes the latter.
    let canonical = address_key(written).ipv4().map_or(written, IpAddr::from);
    for address in [written, canonical] {
        let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
        let kind = if address.is_unspecified() {
            "the unspecified"
        } else if address.is_loopback() {
            "a loopback"
        } else if address.is_multicast() {
            "a multicast"
        } else if is_broadcast {
            "the broadcast"
        } else {
            continue;
        };
        return Err(format!(
            "endpoint.address: {text} is {kind} address, which no metadata service can have"
        ));
    }
    Ok(canonical)
}

fn parse_port(key: &str, text: &str) -> Result<AllowedPort, String> {
    let parsed = text.split_once('/').and_then(|(protocol, port)| {
        let protocol = match protocol {
            "tcp" => TCP,
            "udp" => UDP,
            _ => return None,
        };
        // Only digits: `parse` would also accept a sign.
        let port = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())??;
        (port != 0).then_some(AllowedPort(Service::new(protocol, port)))
    });
    parsed
        .ok_or_else(|| format!("{key}: {text:?} is not `tcp/PORT` or `udp/PORT` with a port from 1 to 65535"))
}

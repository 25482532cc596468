//! Cloud providers: addresses of their metadata services, the services at these addresses that pods need, and the
//! detection of the provider from DMI. "(secondary source)" marks facts that the provider's own documentation does not
//! contain.

use std::{fs, io, net::IpAddr, path::Path};

use imds_ebpf_common::{
    Service,
    endpoint::{TCP, UDP},
};

use crate::config::endpoint_set::{AllowedPort, Endpoint};

/// Directory in which the kernel exposes the SMBIOS (DMI) fields of the machine.
pub const DMI_DIR: &str = "/sys/class/dmi/id";

/// A cloud provider with known endpoints.
#[derive(Debug, Eq, PartialEq)]
pub struct Provider {
    /// Name of the provider in the configuration.
    pub name: &'static str,
    endpoints: &'static [Preset],
}

type Preset = (&'static str, &'static str, &'static [Service]);

const NONE: &[Service] = &[];
/// DNS resolver at the address of the metadata service.
const DNS: &[Service] = &[Service::new(UDP, 53), Service::new(TCP, 53)];
const DNS_DHCP: &[Service] = &[Service::new(UDP, 53), Service::new(TCP, 53), Service::new(UDP, 67)];

const IMDS: &str = "169.254.169.254";
const WIRESERVER: &str = "wireserver";
const EQUINIX: &str = "equinix";

/// Fallback for an unknown provider: the address that nearly all providers use, without allowed ports.
pub static GENERIC: Provider = Provider { name: "generic", endpoints: &[("imds", IMDS, NONE)] };

/// The provider `none`, without endpoints.
pub static NO_PROVIDER: Provider = Provider { name: "none", endpoints: &[] };

/// All providers that the configuration can name, except `generic` and `none`.
pub static PROVIDERS: &[Provider] = &[
    // 168.63.129.16 is the WireServer, which serves the goal state and TLS bootstrap at tcp/80 and tcp/32526 (AKS
    // #4503: denying port 80 alone is not enough). DNS and DHCP of every VM use the address, too, and stay allowed.
    Provider { name: "azure", endpoints: &[("imds", IMDS, NONE), (WIRESERVER, "168.63.129.16", DNS_DHCP)] },
    // Not protected: 169.254.170.23 and fd00:ec2::23 (EKS Pod Identity, meant for pods), 169.254.169.253 and
    // fd00:ec2::253 (DNS), 169.254.169.123 (NTP). 169.254.170.2 is the extra `ecs`.
    Provider { name: "aws", endpoints: &[("imds", IMDS, NONE), ("imds-v6", "fd00:ec2::254", NONE)] },
    // The metadata server is also the VM's DNS resolver. IPv6 address: (secondary source).
    Provider { name: "gcp", endpoints: &[("imds", IMDS, DNS), ("imds-v6", "fd20:ce::254", DNS)] },
    // Like GCP. 192.0.0.192: (secondary source).
    Provider {
        name: "oracle",
        endpoints: &[
            ("imds", IMDS, DNS),
            ("imds-v6", "fd00:c1::a9fe:a9fe", DNS),
            ("imds-classic", "192.0.0.192", DNS),
        ],
    },
    // IPv6 address: (secondary source).
    Provider {
        name: "alibaba",
        endpoints: &[("imds", "100.100.100.200", NONE), ("imds-v6", "fd00:100::100:200", NONE)],
    },
    // The IPv6 address is link-local. The programs match it on every link.
    Provider { name: "openstack", endpoints: &[("imds", IMDS, NONE), ("imds-v6", "fe80::a9fe:a9fe", NONE)] },
    Provider { name: "hetzner", endpoints: &[("imds", IMDS, NONE), ("imds-v6", "fe80::a9fe:a9fe", NONE)] },
    Provider { name: "akamai", endpoints: &[("imds", IMDS, NONE), ("imds-v6", "fd00:a9fe:a9fe::1", NONE)] },
    Provider {
        name: "scaleway",
        endpoints: &[("imds", "169.254.42.42", NONE), ("imds-v6", "fd00:42::42", NONE)],
    },
    // 169.254.10.10, which one secondary source names, is missing because it is the address of a DNS server elsewhere
    // (AKS LocalDNS).
    Provider { name: "tencent", endpoints: &[("imds", "169.254.0.23", NONE)] },
    Provider { name: "digitalocean", endpoints: &[("imds", IMDS, NONE)] },
    Provider { name: "vultr", endpoints: &[("imds", IMDS, NONE)] },
    Provider { name: "exoscale", endpoints: &[("imds", IMDS, NONE)] },
    Provider { name: "upcloud", endpoints: &[("imds", IMDS, NONE)] },
    // (secondary source)
    Provider { name: EQUINIX, endpoints: &[("imds", "192.80.8.124", NONE)] },
];

/// Endpoints that are protected only if the configuration names them in `extra_endpoints`.
///
/// `ecs`: credentials of ECS tasks. The tasks themselves need them, if the node runs any.
pub static EXTRAS: &[Provider] = &[Provider { name: "ecs", endpoints: &[("ecs", "169.254.170.2", NONE)] }];

impl Provider {
    /// Returns the provider with this name, including `generic` and `none`.
    pub fn named(name: &str) -> Option<&'static Self> {
        PROVIDERS.iter().chain([&GENERIC, &NO_PROVIDER]).find(|provider| provider.name == name)
    }

    /// Returns the extra with this name.
    pub fn extra(name: &str) -> Option<&'static Self> {
        EXTRAS.iter().find(|extra| extra.name == name)
    }

    /// Returns the addresses of the metadata service, if it serves HTTP at port 80. The `WireServer` has another protocol, and the
    /// service of Equinix is documented for HTTPS only.
    pub fn http_addresses(&self) -> Vec<IpAddr> {
        let is_http = |endpoint: &Endpoint| endpoint.name != WIRESERVER && self.name != EQUINIX;
        self.endpoints().filter(is_http).map(|endpoint| endpoint.address).collect()
    }

    /// Returns the endpoints of the preset.
    pub fn endpoints(&self) -> impl Iterator<Item = Endpoint> + use<> {
        self.endpoints.iter().filter_map(|&(name, address, ports)| {
            // A test checks that all addresses parse.
            let address: IpAddr = address.parse().ok()?;
            let allow_ports = ports.iter().copied().map(AllowedPort).collect();
            Some(Endpoint { name: name.to_owned(), address, allow_ports })
        })
    }
}

/// SMBIOS fields of the machine: file contents without surrounding white space, or empty if the file does not exist.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[expect(missing_docs, reason = "named after the kernel's files")]
pub struct Dmi {
    pub sys_vendor: String,
    pub product_name: String,
    pub chassis_asset_tag: String,
    pub bios_vendor: String,
    pub product_uuid: String,
}

impl Dmi {
    /// Reads the files in `dir`, usually [`DMI_DIR`]. A missing file leaves its field empty, as does one that cannot be
    /// read, which is logged.
    pub fn read(dir: &Path) -> Self {
        let file = |name| match fs::read(dir.join(name)) {
            Ok(contents) => String::from_utf8_lossy(&contents).trim().to_owned(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    log::warn!("failed to read {}: {error}", dir.join(name).display());
                }
                String::new()
            }
        };
        Self {
            sys_vendor: file("sys_vendor"),
            product_name: file("product_name"),
            chassis_asset_tag: file("chassis_asset_tag"),
            bios_vendor: file("bios_vendor"),
            product_uuid: file("product_uuid"),
        }
    }

    /// Returns the provider of the machine, or [`GENERIC`] if the fields do not identify one.
    pub fn provider(&self) -> &'static Provider {
        Provider::named(self.provider_name()).unwrap_or(&GENERIC)
    }

    fn provider_name(&self) -> &'static str {
        /// Asset tag of every Azure VM: "MSFT AZURE VM" as character codes.
        const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77";
        let vendor = self.sys_vendor.as_str();
        let uuid_prefix = self.product_uuid.get(..3).unwrap_or_default();
        if self.chassis_asset_tag == AZURE_TAG {
            return "azure";
        }
        if self.chassis_asset_tag == "OracleCloud.com" {
            return "oracle";
        }
        // Xen instances have no EC2 vendor, but their UUID starts with `ec2`.
        let is_xen_on_ec2 = uuid_prefix.eq_ignore_ascii_case("ec2") && vendor == "Xen";
        if vendor == "Amazon EC2" || self.bios_vendor == "Amazon EC2" || is_xen_on_ec2 {
            return "aws";
        }
        if self.product_name == "Google Compute Engine" {
            return "gcp";
        }
        if self.product_name.starts_with("OpenStack Nova")
            || self.product_name.starts_with("OpenStack Compute")
        {
            return "openstack";
        }
        match vendor {
            "Alibaba Cloud" => "alibaba",
            "DigitalOcean" => "digitalocean",
            "Hetzner" => "hetzner",
            "Vultr" => "vultr",
            "Scaleway" => "scaleway",
            "Akamai" | "Linode" => "akamai",
            "Tencent Cloud" => "tencent",
            "UpCloud" => "upcloud",
            "Exoscale" => "exoscale",
            _ => "generic",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn all() -> impl Iterator<Item = &'static Provider> {
        PROVIDERS.iter().chain(EXTRAS).chain([&GENERIC])
    }

    #[test]
    fn presets_fit_the_maps() {
        for provider in all() {
            let endpoints: Vec<_> = provider.endpoints().collect();
            assert_eq!(
                endpoints.len(),
                provider.endpoints.len(),
                "{}: an address does not parse",
                provider.name
            );
            let names: BTreeSet<_> = endpoints.iter().map(|endpoint| &endpoint.name).collect();
            let addresses: BTreeSet<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
            assert_eq!(
                (names.len(), addresses.len()),
                (endpoints.len(), endpoints.len()),
                "{}",
                provider.name
            );
            assert!(names.iter().all(|name| name.len() < 16) && provider.name.len() < 16, "{names:?}");
        }
        assert!(!PROVIDERS.iter().any(|provider| Provider::extra(provider.name).is_some()));
    }

    #[test]
    fn presets_spare_addresses_pods_need() {
        let never = ["169.254.20.10", "169.254.10.11", "100.100.100.100", "169.254.170.23", "fd00:ec2::23"];
        let never: Vec<IpAddr> = never.iter().map(|address| address.parse().unwrap()).collect();
        for endpoint in all().flat_map(Provider::endpoints) {
            assert!(!never.contains(&endpoint.address), "{endpoint:?}");
        }
    }

    #[test]
    fn machine_identification() {
        let dmi = |sys_vendor: &str, product_name: &str, tag: &str, uuid: &str| Dmi {
            sys_vendor: sys_vendor.into(),
            product_name: product_name.into(),
            chassis_asset_tag: tag.into(),
            bios_vendor: String::new(),
            product_uuid: uuid.into(),
        };
        let azure = "7783-7084-3265-9085-8269-3286-77";
        for (dmi, expected) in [
            (dmi("Microsoft Corporation", "Virtual Machine", azure, ""), "azure"),
            (dmi("Microsoft Corporation", "Virtual Machine", "", ""), "generic"),
            (dmi("Amazon EC2", "m5.large", "", ""), "aws"),
            (dmi("Xen", "HVM domU", "", "EC2e1916-9099-7caf-fd21-012345abcdef"), "aws"),
            (dmi("QEMU", "Standard PC", "", "ec2e1916-9099-7caf-fd21-012345abcdef"), "generic"),
            (dmi("Google", "Google Compute Engine", "", ""), "gcp"),
            (dmi("QEMU", "Standard PC", "OracleCloud.com", ""), "oracle"),
            (dmi("Alibaba Cloud", "Alibaba Cloud ECS", "", ""), "alibaba"),
            (dmi("OpenStack Foundation", "OpenStack Nova", "", ""), "openstack"),
            (dmi("Hetzner", "vServer", "", ""), "hetzner"),
            (dmi("Linode", "Compute Instance", "", ""), "akamai"),
            (dmi("DigitalOcean", "Droplet", "", ""), "digitalocean"),
            (dmi("Scaleway", "SCW-DEV1-S", "", ""), "scaleway"),
            (dmi("Vultr", "VC2", "", ""), "vultr"),
            (Dmi::default(), "generic"),
        ] {
            assert_eq!(dmi.provider().name, expected, "{dmi:?}");
        }
    }

    #[test]
    fn missing_dmi_gives_no_provider() {
        assert_eq!(Dmi::read(Path::new("/nonexistent")), Dmi::default());
    }
}

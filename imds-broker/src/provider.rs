//! Properties of the providers' metadata services: the headers and query parameters that the broker forwards, and the harmless paths.
//!
//! docs/scoped-paths.md lists the sources of the paths. The lists contain no path that returns credentials, user data, SSH keys or
//! signed documents, and no directory that contains such a path, because some services return a whole directory in one response.

/// Metadata service of a provider.
#[derive(Debug)]
pub struct Provider {
    /// Name of the provider in the configuration.
    pub name: &'static str,
    /// Names of the headers that the service evaluates, in lower case.
    pub headers: &'static [&'static str],
    /// Query parameters that the service evaluates. Requests with others are refused: they could select something else than the path.
    pub query: &'static [&'static str],
    /// Rules that the keyword `instance` stands for.
    pub instance: &'static [&'static str],
}

/// Headers of every provider.
const COMMON_HEADERS: [&str; 3] = ["accept", "content-type", "user-agent"];

/// Longest value of a header of [`COMMON_HEADERS`]. Longer ones are left out.
const MAX_COMMON_VALUE: usize = 256;

/// Only value of `Authorization` that is forwarded: a constant of the metadata service of Oracle.
const ORACLE_AUTHORIZATION: &str = "Bearer Oracle";

/// Name of the provider AWS, whose service has two versions.
pub const AWS: &str = "aws";
/// Path of AWS for session tokens, which version 2 needs.
pub const AWS_TOKEN_PATH: &str = "/latest/api/token";

const UNKNOWN: Provider = Provider { name: "generic", headers: &[], query: &[], instance: &[] };

/// All providers with properties of their own.
pub const PROVIDERS: &[Provider] = &[
    Provider {
        name: "azure",
        headers: &["metadata"],
        // `comp` is missing: the WireServer selects the goal state and the configuration with it.
        query: &["api-version", "format", "resource", "client_id", "object_id", "msi_res_id", "nonce"],
        instance: &[
            "GET /metadata/instance/compute/azEnvironment",
            "GET /metadata/instance/compute/evictionPolicy",
            "GET /metadata/instance/compute/location",
            "GET /metadata/instance/compute/name",
            "GET /metadata/instance/compute/osType",
            "GET /metadata/instance/compute/physicalZone",
            "GET /metadata/instance/compute/platformFaultDomain",
            "GET /metadata/instance/compute/platformUpdateDomain",
            "GET /metadata/instance/compute/priority",
            "GET /metadata/instance/compute/tags",
            "GET /metadata/instance/compute/tagsList",
            "GET /metadata/instance/compute/vmId",
            "GET /metadata/instance/compute/vmScaleSetName",
            "GET /metadata/instance/compute/vmSize",
            "GET /metadata/instance/compute/zone",
            "GET /metadata/scheduledevents",
            "GET /metadata/versions",
        ],
    },
    Provider {
        name: AWS,
        headers: &["x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds"],
        query: &[],
        instance: &[
            "PUT /latest/api/token",
            "GET /latest/meta-data/ami-id",
            "GET /latest/meta-data/autoscaling",
            "GET /latest/meta-data/events",
            "GET /latest/meta-data/instance-id",
            "GET /latest/meta-data/instance-life-cycle",
            "GET /latest/meta-data/instance-type",
            "GET /latest/meta-data/placement",
            "GET /latest/meta-data/services",
            "GET /latest/meta-data/spot",
            "GET /latest/meta-data/tags/instance",
        ],
    },
    Provider {
        name: "gcp",
        headers: &["metadata-flavor", "x-google-metadata-request"],
        query: &[
            "alt",
            "audience",
            "format",
            "last_etag",
            "licenses",
            "recursive",
            "scopes",
            "timeout_sec",
            "wait_for_change",
        ],
        instance: &[
            "GET /computeMetadata/v1/instance/cpu-platform",
            "GET /computeMetadata/v1/instance/id",
            "GET /computeMetadata/v1/instance/machine-type",
            "GET /computeMetadata/v1/instance/maintenance-event",
            "GET /computeMetadata/v1/instance/name",
            "GET /computeMetadata/v1/instance/preempted",
            "GET /computeMetadata/v1/instance/scheduling",
            "GET /computeMetadata/v1/instance/tags",
            "GET /computeMetadata/v1/instance/upcoming-maintenance",
            "GET /computeMetadata/v1/instance/zone",
            "GET /computeMetadata/v1/project/numeric-project-id",
            "GET /computeMetadata/v1/project/project-id",
        ],
    },
    Provider {
        name: "oracle",
        headers: &["authorization"],
        query: &[],
        instance: &[
            "GET /opc/v2/instance/availabilityDomain",
            "GET /opc/v2/instance/canonicalRegionName",
            "GET /opc/v2/instance/definedTags",
            "GET /opc/v2/instance/displayName",
            "GET /opc/v2/instance/faultDomain",
            "GET /opc/v2/instance/freeformTags",
            "GET /opc/v2/instance/id",
            "GET /opc/v2/instance/ociAdName",
            "GET /opc/v2/instance/region",
            "GET /opc/v2/instance/regionInfo",
            "GET /opc/v2/instance/shape",
            "GET /opc/v2/instance/shapeConfig",
        ],
    },
    Provider {
        name: "alibaba",
        headers: &["x-aliyun-ecs-metadata-token", "x-aliyun-ecs-metadata-token-ttl-seconds"],
        query: &[],
        instance: &[
            "PUT /latest/api/token",
            "GET /latest/meta-data/image-id",
            "GET /latest/meta-data/instance-id",
            "GET /latest/meta-data/instance/instance-name",
            "GET /latest/meta-data/instance/instance-type",
            "GET /latest/meta-data/instance/spot/termination-time",
            "GET /latest/meta-data/region-id",
            "GET /latest/meta-data/zone-id",
        ],
    },
    // /openstack/*/meta_data.json is one document with SSH keys and an administrator's password.
    Provider {
        name: "openstack",
        headers: &[],
        query: &[],
        instance: &[
            "GET /2009-04-04/meta-data/instance-id",
            "GET /2009-04-04/meta-data/instance-type",
            "GET /2009-04-04/meta-data/placement",
            "GET /latest/meta-data/instance-id",
            "GET /latest/meta-data/instance-type",
            "GET /latest/meta-data/placement",
        ],
    },
    Provider {
        name: "hetzner",
        headers: &[],
        query: &[],
        instance: &[
            "GET /hetzner/v1/metadata/availability-zone",
            "GET /hetzner/v1/metadata/hostname",
            "GET /hetzner/v1/metadata/instance-id",
            "GET /hetzner/v1/metadata/region",
        ],
    },
    Provider {
        name: "akamai",
        headers: &["metadata-token", "metadata-token-expiry-seconds"],
        query: &[],
        instance: &["PUT /v1/token", "GET /v1/instance"],
    },
    // No harmless path: /conf is one document with SSH keys.
    Provider { name: "scaleway", headers: &[], query: &["format"], instance: &[] },
    Provider {
        name: "tencent",
        headers: &[],
        query: &[],
        instance: &[
            "GET /latest/meta-data/instance-id",
            "GET /latest/meta-data/instance-name",
            "GET /latest/meta-data/instance/instance-type",
            "GET /latest/meta-data/placement",
            "GET /latest/meta-data/spot/termination-time",
        ],
    },
    Provider {
        name: "digitalocean",
        headers: &[],
        query: &[],
        instance: &[
            "GET /metadata/v1/features",
            "GET /metadata/v1/hostname",
            "GET /metadata/v1/id",
            "GET /metadata/v1/region",
            "GET /metadata/v1/tags",
        ],
    },
    Provider {
        name: "vultr",
        headers: &[],
        query: &[],
        instance: &["GET /v1/hostname", "GET /v1/instance-v2-id", "GET /v1/instanceid", "GET /v1/region"],
    },
    Provider {
        name: "exoscale",
        headers: &[],
        query: &[],
        instance: &[
            "GET /latest/meta-data/availability-zone",
            "GET /latest/meta-data/cloud-identifier",
            "GET /latest/meta-data/instance-id",
            "GET /latest/meta-data/service-offering",
            "GET /latest/meta-data/vm-id",
        ],
    },
    Provider {
        name: "upcloud",
        headers: &[],
        query: &[],
        instance: &[
            "GET /metadata/v1/cloud_name",
            "GET /metadata/v1/hostname",
            "GET /metadata/v1/instance_id",
            "GET /metadata/v1/region",
            "GET /metadata/v1/tags",
        ],
    },
    // No harmless path: the service is documented for HTTPS only, and scoped exemptions are for port 80.
    Provider { name: "equinix", headers: &[], query: &[], instance: &[] },
];

impl Provider {
    /// Returns the provider with this name, or one without properties of its own.
    #[must_use]
    pub fn named(name: &str) -> &'static Self {
        PROVIDERS.iter().find(|provider| provider.name == name).unwrap_or(&UNKNOWN)
    }

    /// Reports whether the broker forwards a header. Names are in lower case.
    #[must_use]
    pub fn forwards_header(&self, name: &str, value: &str) -> bool {
        if COMMON_HEADERS.contains(&name) {
            return value.len() <= MAX_COMMON_VALUE;
        }
        self.headers.contains(&name) && (name != "authorization" || value == ORACLE_AUTHORIZATION)
    }

    /// Returns the first parameter of a query that the service does not evaluate.
    #[must_use]
    pub fn unknown_parameter<'q>(&self, query: Option<&'q str>) -> Option<&'q str> {
        let parameters = query.into_iter().flat_map(|query| query.split('&'));
        let mut keys = parameters.filter_map(|parameter| Some(parameter.split_once('=')?.0));
        keys.find(|key| !self.query.contains(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_headers_by_provider() {
        let [azure, oracle] = ["azure", "oracle"].map(Provider::named);
        assert!(azure.forwards_header("metadata", "true"));
        assert!(!azure.forwards_header("metadata-flavor", "Google"));
        assert!(azure.forwards_header("user-agent", "curl/8"));
        assert!(!azure.forwards_header("user-agent", &"x".repeat(257)));
        assert!(oracle.forwards_header("authorization", "Bearer Oracle"));
        assert!(!oracle.forwards_header("authorization", "Bearer secret"));
        for name in ["cookie", "x-forwarded-for", "connection", "host", "transfer-encoding", "content-length"]
        {
            assert!(PROVIDERS.iter().all(|provider| !provider.forwards_header(name, "x")), "{name}");
        }
    }

    #[test]
    fn unknown_parameters_are_found() {
        let azure = Provider::named("azure");
        assert_eq!(azure.unknown_parameter(None), None);
        assert_eq!(azure.unknown_parameter(Some("api-version=1&format=text")), None);
        assert_eq!(azure.unknown_parameter(Some("api-version=1&comp=goalstate")), Some("comp"));
        assert_eq!(azure.unknown_parameter(Some("Api-Version=1")), Some("Api-Version"));
        assert_eq!(Provider::named("unknown").unknown_parameter(Some("a=b")), Some("a"));
    }
}

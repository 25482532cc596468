//! Requests that a scoped exemption allows.
//!
//! A rule is a method and a path: `GET /metadata/instance/compute` allows that path and all paths below it, compared by whole
//! segments. `GET /metadata/identity/oauth2/token?resource=https://vault.azure.net` allows only requests that have this parameter, and no
//! body. The keyword `instance` stands for the harmless paths of a provider: region, zone, instance type, maintenance, tags.
//!
//! Rules and paths are case-sensitive, also where a provider's service is not: another spelling is refused.

use std::fmt;

use crate::{
    canonical::{canonical_query, check_path},
    provider::Provider,
};

/// Keyword for the harmless paths of a provider.
pub const INSTANCE: &str = "instance";

/// Methods that a rule can name, and that a request can have.
pub const METHODS: [&str; 5] = ["GET", "HEAD", "POST", "PUT", "DELETE"];

/// Error in the text of a rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RuleError(String);

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RuleError {}

/// Request that is allowed: a method, a path with all paths below it, and the values of some parameters of the query.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    method: &'static str,
    /// Canonical path without a trailing slash.
    path: String,
    /// Parameters in canonical form, each of which the request must have.
    query: Option<String>,
}

impl Rule {
    /// Parses a rule such as `GET /metadata/instance/compute`. A trailing slash of the path has no meaning.
    ///
    /// # Errors
    ///
    /// Returns an error if the text is not a known method, one space and an absolute path in canonical form, if the path is `/`, or
    /// if the query is not canonical.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        let (method, target) = text.split_once(' ').ok_or_else(|| {
            RuleError(format!("{text:?} is not METHOD PATH, e.g. \"GET /metadata/instance\""))
        })?;
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        let Some(method) = METHODS.into_iter().find(|&known| known == method) else {
            return Err(RuleError(format!("method {method:?} is not GET, HEAD, POST, PUT or DELETE")));
        };
        if !path.starts_with('/') {
            return Err(RuleError(format!("path {path:?} does not start with /")));
        }
        check_path(path).map_err(|error| RuleError(format!("path {path:?} is not canonical: {error}")))?;
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() {
            return Err(RuleError(
                "path \"/\" allows all paths: use an exemption without `allow`".to_owned(),
            ));
        }
        let query = query.map(canonical_query).transpose().map_err(|error| {
            RuleError(format!("query {:?} is not canonical: {error}", query.unwrap_or_default()))
        })?;
        Ok(Self { method, path: path.to_owned(), query })
    }

    /// Reports whether the rule allows a request with a canonical path and a canonical query.
    #[must_use]
    pub fn allows(&self, method: &str, path: &str, query: Option<&str>) -> bool {
        method == self.method
            && path.strip_prefix(&*self.path).is_some_and(|below| below.is_empty() || below.starts_with('/'))
            && self.query.as_deref().is_none_or(|needed| {
                let has = |parameter| query.is_some_and(|query| query.split('&').any(|own| own == parameter));
                needed.split('&').all(has)
            })
    }

    /// Reports whether the rule names parameters. A body could contain others, which the service may prefer.
    #[must_use]
    pub fn restricts_parameters(&self) -> bool {
        self.query.is_some()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)?;
        self.query.as_ref().map_or(Ok(()), |query| write!(f, "?{query}"))
    }
}

/// Returns the rules that the keyword [`INSTANCE`] stands for, or `None` if the provider is unknown or has no harmless paths.
#[must_use]
pub fn instance_rules(provider: &str) -> Option<&'static [&'static str]> {
    let rules = Provider::named(provider).instance;
    (!rules.is_empty()).then_some(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::PROVIDERS;

    #[test]
    fn rules_match_whole_segments() {
        let rule = Rule::parse("GET /metadata/instance/compute").unwrap();
        for path in
            ["/metadata/instance/compute", "/metadata/instance/compute/", "/metadata/instance/compute/zone"]
        {
            assert!(rule.allows("GET", path, None), "{path}");
            for method in ["HEAD", "PUT", "get", ""] {
                assert!(!rule.allows(method, path, None), "{method} {path}");
            }
        }
        for path in [
            "/",
            "/metadata/instance",
            "/metadata/instance/",
            "/metadata/instance/computer",
            "/metadata/instance/compute.json",
            "/metadata/instance/Compute",
            "/metadata/identity/metadata/instance/compute",
        ] {
            assert!(!rule.allows("GET", path, None), "{path}");
        }
        assert_eq!(Rule::parse("GET /metadata/instance/compute/").unwrap(), rule);
        assert_eq!(rule.to_string(), "GET /metadata/instance/compute");
    }

    #[test]
    fn rules_restrict_parameters() {
        let path = "/metadata/identity/oauth2/token";
        let rule =
            Rule::parse(&format!("GET {path}?resource=https%3A%2F%2Fvault.azure.net&client_id=7")).unwrap();
        let needed = "resource=https://vault.azure.net&client_id=7";
        assert_eq!(rule.to_string(), format!("GET {path}?{needed}"));
        for query in [needed, "api-version=2018-02-01&client_id=7&resource=https://vault.azure.net"] {
            assert!(rule.allows("GET", path, Some(query)), "{query}");
            assert!(!rule.allows("GET", "/metadata/identity", Some(query)), "{query}");
        }
        for query in [
            "",
            "client_id=7",
            "resource=https://vault.azure.net",
            "resource=https://vault.azure.net/&client_id=7",
            "resource=https://vault.azure.net.example&client_id=7",
            "xresource=https://vault.azure.net&client_id=7",
            "Resource=https://vault.azure.net&client_id=7",
            "resource=https://management.azure.com&client_id=7",
        ] {
            assert!(!rule.allows("GET", path, Some(query)), "{query}");
        }
        assert!(!rule.allows("GET", path, None));
    }

    #[test]
    fn errors_name_the_mistake() {
        for (text, expected) in [
            ("instances", "\"instances\" is not METHOD PATH, e.g. \"GET /metadata/instance\""),
            ("get /a", "method \"get\" is not GET, HEAD, POST, PUT or DELETE"),
            ("GET a", "path \"a\" does not start with /"),
            ("GET  /a", "path \" /a\" does not start with /"),
            ("GET /a/../b", "path \"/a/../b\" is not canonical: the path has a segment of dots"),
            ("GET /a%20b", "path \"/a%20b\" is not canonical: the target is percent-encoded"),
            ("GET /a?b", "query \"b\" is not canonical: the query is not of the form key=value&key=value"),
            ("GET /a?", "query \"\" is not canonical: the query is not of the form key=value&key=value"),
            ("GET /?a=b", "path \"/\" allows all paths: use an exemption without `allow`"),
            ("GET /", "path \"/\" allows all paths: use an exemption without `allow`"),
        ] {
            assert_eq!(Rule::parse(text).unwrap_err().to_string(), expected);
        }
    }

    /// Paths with credentials, user data, keys or signed documents, and documents that contain all data of an instance.
    const SECRETS: &[&str] = &[
        "/",
        "/metadata/identity/oauth2/token",
        "/metadata/attested/document",
        "/metadata/instance",
        "/metadata/instance/compute",
        "/metadata/instance/compute/userData",
        "/metadata/instance/compute/customData",
        "/metadata/instance/compute/publicKeys",
        "/metadata/instance/compute/osProfile",
        "/machine",
        "/vmSettings",
        "/latest",
        "/latest/user-data",
        "/latest/meta-data",
        "/latest/meta-data/iam/security-credentials/role",
        "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "/latest/meta-data/public-keys/0/openssh-key",
        "/latest/meta-data/tags",
        "/latest/meta-data/ram/security-credentials/role",
        "/latest/meta-data/cam/security-credentials/role",
        "/latest/dynamic/instance-identity/document",
        "/2009-04-04/user-data",
        "/2009-04-04/meta-data/public-keys",
        "/computeMetadata/v1",
        "/computeMetadata/v1/instance",
        "/computeMetadata/v1/instance/attributes/kube-env",
        "/computeMetadata/v1/instance/service-accounts/default/token",
        "/computeMetadata/v1/project",
        "/computeMetadata/v1/project/attributes/ssh-keys",
        "/opc/v2/instance",
        "/opc/v2/instance/metadata/user_data",
        "/opc/v2/identity/key.pem",
        "/openstack/latest/meta_data.json",
        "/openstack/latest/user_data",
        "/hetzner/v1/metadata",
        "/hetzner/v1/userdata",
        "/hetzner/v1/metadata/public-keys",
        "/v1/user-data",
        "/v1/ssh-keys",
        "/v1.json",
        "/v1/public-keys",
        "/conf",
        "/user_data",
        "/metadata/v1.json",
        "/metadata/v1",
        "/metadata/v1/user-data",
        "/metadata/v1/user_data",
        "/metadata/v1/public-keys",
        "/metadata/v1/public_keys",
        "/metadata",
    ];

    #[test]
    fn instance_rules_are_harmless() {
        for provider in PROVIDERS {
            for text in instance_rules(provider.name).unwrap_or_default() {
                let rule = Rule::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
                assert_eq!(rule.to_string(), *text);
                for path in SECRETS {
                    assert!(!rule.allows("GET", path, None), "{}: {text} allows {path}", provider.name);
                }
                assert!(
                    text.starts_with("GET ") || text.starts_with("PUT ") && text.ends_with("/token"),
                    "{text} changes something"
                );
            }
        }
        assert_eq!(instance_rules("generic"), None);
        assert_eq!(instance_rules("unknown"), None);
    }
}
